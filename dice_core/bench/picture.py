"""Whole training steps as a picture: time and peak memory, and the loss alone beside them.

It is drawn for a page of any width: few words in a large font, each bar labelled. One file is for a
light background and one for a dark one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import CaseResult, Report


class Theme(NamedTuple):
    """Colours, which the colour-blind can tell apart, of text and of the bars by their KIND."""

    text: str
    theirs: str
    ours: str
    fused: str
    none: str


THEMES = {
    "light": Theme("#1f2328", "#d55e00", "#0072b2", "#009e73", "#8c959f"),
    "dark": Theme("#e6edf3", "#e8853d", "#56b4e9", "#2fc79a", "#6e7681"),
}
Bars = Sequence[tuple[str, str, str]]
# A panel: its title, its case, and the name, label and colour of each bar.
NNUNET: Bars = (
    ("nnunet-step-theirs", "nnU-Net's loss", "theirs"),
    ("nnunet-step-ours", "dice_core", "ours"),
    ("nnunet-step-fused", "fused head", "fused"),
    ("nnunet-step-none", "no loss", "none"),
)
ALONE: Bars = (
    ("naive-ce", "plain torch", "theirs"),
    ("monai-ce", "MONAI", "theirs"),
    ("nnunet-ce", "nnU-Net", "theirs"),
    ("ours-ce", "dice_core", "ours"),
)
PANELS = (
    ("Training step, 105 classes", "nnunet-step-105", NNUNET),
    ("Training step, 14 classes", "nnunet-step-14", NNUNET),
    ("The loss alone, 105 classes", "e", ALONE),
)
WIDTH, BAR, HEAD = 9.0, 0.4, 0.8  # inches: of the picture, for each bar, above a panel's bars
TOP = 0.25  # more, above the first panel's bars
LEFT, GAP, ROOM = 2.15, 0.2, 1.6  # of the labels, between columns, for the number after a bar
FONT = 19  # points


def save(report: Report, path: Path) -> None:
    """Writes path's stem with -light and -dark, in the format given by the suffix."""
    for name, theme in THEMES.items():
        settings: Any = {"svg.hashsalt": "dice_core", "font.size": FONT, "text.color": theme.text}
        with matplotlib.rc_context(settings):
            figure = drawn(report, theme)
            metadata = {"Date": None} if path.suffix == ".svg" else None
            target = path.with_name(f"{path.stem}-{name}{path.suffix}")
            figure.savefig(target, dpi=100, transparent=True, metadata=metadata)


def drawn(report: Report, theme: Theme) -> Figure:
    """The panels that were measured, one below the other."""
    panels = []
    for title, case, bars in PANELS:
        result = report.cases.get(case, CaseResult("", {}))
        if present := [bar for bar in bars if result.get(bar[0], "step") is not None]:
            panels.append((title, result, present))
    height = TOP + sum(HEAD + BAR * len(bars) for *_, bars in panels)
    figure = Figure(figsize=(WIDTH, height))
    top = height
    for i, (title, result, bars) in enumerate(panels):
        top -= HEAD if i else HEAD + TOP
        above = 0.15 if i else 0.5
        figure.text(0, (top + above) / height, title, weight="bold", size=FONT + 1)
        width = (WIDTH - LEFT - GAP) / 2
        for column, (name, value, text) in enumerate(COLUMNS):
            left = LEFT + column * (width + GAP)
            size = BAR * len(bars)
            box = (left / WIDTH, (top - size) / height, width / WIDTH, size / height)
            axes = figure.add_axes(box)
            _bars(axes, [value(result, bar[0]) for bar in bars], text, bars, theme)
            if i == 0:
                axes.set_title(name, loc="left", size=FONT, color=theme.text, pad=4)
            if column == 0:
                axes.set_yticks(range(len(bars)), [label for _, label, _ in bars])
                axes.tick_params(axis="y", length=0, colors=theme.text, pad=8)
        top -= BAR * len(bars)
    return figure


def _bars(
    axes: Axes, values: list[float | None], text: Callable[[float], str], bars: Bars, theme: Theme
) -> None:
    """Bars of these lengths with their numbers, one for each of `bars`, the first at the top."""
    lengths = [value or 0.0 for value in values]
    colours = [getattr(theme, kind) for *_, kind in bars]
    axes.barh(range(len(bars)), lengths, 0.72, color=colours)
    inches = (WIDTH - LEFT - GAP) / 2
    longest = max(lengths) or 1.0
    axes.set(xlim=(0, longest * inches / (inches - ROOM)), ylim=(len(bars) - 0.5, -0.5))
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)
    for i, value in enumerate(values):
        if value is not None:
            axes.annotate(
                text(value), (value, i), (6, 0), textcoords="offset points", va="center_baseline"
            )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"


def _mebibytes(value: float) -> str:
    return f"{value:,.0f} MiB"


Column = tuple[str, Callable[[CaseResult, str], "float | None"], Callable[[float], str]]
COLUMNS: tuple[Column, ...] = (
    ("time", lambda result, name: result.get(name, "step"), _seconds),
    ("peak memory", CaseResult.mebibytes, _mebibytes),
)
