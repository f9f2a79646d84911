"""A run as bars: the time of a step and its memory, against the floor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .implementations import IMPLEMENTATIONS
from .results import CaseResult, Report


def save(report: Report, path: Path) -> None:
    """Writes the picture; the suffix of `path` says in which format."""
    names = [
        name
        for name in IMPLEMENTATIONS
        if any(name in result.measurements for result in report.cases.values())
    ]
    figure = Figure(figsize=(max(8, 1.6 * len(report.cases) + 3), 8), layout="constrained")
    time, memory = figure.subplots(2, sharex=True)
    _bars(time, report, names, _time)
    time.set_yscale("log")
    time.set_ylabel("time of a step / floor")
    time.axhline(1, color="black", linewidth=1)
    _bars(memory, report, names, _memory)
    memory.set_ylabel("peak memory of a step / logits")
    memory.axhline(1, color="black", linewidth=1, linestyle=":")
    memory.set_xticks(range(len(report.cases)), [str(name) for name in report.cases])
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    facts = report.facts
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['settings']['threads']} threads"
    time.set_title(f"{where}, {facts['date']}", fontsize="medium", loc="left")
    figure.savefig(path, dpi=150)


def _bars(
    axes: Axes,
    report: Report,
    names: list[str],
    height: Callable[[CaseResult, str], float | None],
) -> None:
    """A group of bars for each case, a bar for each implementation that has a height."""
    width = 0.8 / len(names)
    colours = colormaps["tab20"]
    for i, name in enumerate(names):
        heights = [height(result, name) for result in report.cases.values()]
        there = [(k, value) for k, value in enumerate(heights) if value is not None]
        axes.bar(
            [k + (i + 0.5) * width - 0.4 for k, _ in there],
            [value for _, value in there],
            width,
            color=colours(i),
            label=IMPLEMENTATIONS[name].title,
        )
    axes.spines[["top", "right"]].set_visible(False)


def _time(result: CaseResult, name: str) -> float | None:
    return result.above_floor(name, "step")


def _memory(result: CaseResult, name: str) -> float | None:
    return result.measurements[name].peak if name in result.measurements else None
