"""A report as Markdown that is also readable in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import TypeVar

from .implementations import IMPLEMENTATIONS
from .results import CaseResult, Report

Row = TypeVar("Row")

# title: (the phase, ours, our Dice alone, MONAI, nnU-Net, torch.compile)
_DICE = ("", "monai", "nnunet", "compile")
_CE, _FOCAL = ("monai-ce", "nnunet-ce", ""), ("monai-focal", "", "")
COMPARISONS = {
    "forward": ("forward", "ours", *_DICE),
    "step, fresh gradient": ("step", "ours", *_DICE),
    "step, inplace=True": ("step", "ours-inplace", *_DICE),
    "step, gradient into out=": ("step", "ours-out", *_DICE),
    "step, gradient in place": ("step", "ours-over", *_DICE),
    "step of Dice + cross-entropy, fresh gradient": ("step", "ours-ce", "ours", *_CE),
    "step of Dice + cross-entropy, inplace=True": ("step", "ours-ce-inplace", "ours-inplace", *_CE),
    "step of Dice + cross-entropy, into out=": ("step", "ours-ce-out", "ours-out", *_CE),
    "step of Dice + focal, fresh gradient": ("step", "ours-focal", "ours", *_FOCAL),
    "step of Dice + focal, into out=": ("step", "ours-focal-out", "ours-out", *_FOCAL),
}

LEGEND = """\
Times are medians of rounds in which everything runs once, in changing order, in one process per
case. A step is forward and backward. 'vs' is their time divided by ours, 'compile' the fastest of
torch.compile, 'of Dice' our time divided by that of our Dice alone. The floor of forward is the
time to read logits and labels; that of a step adds the time to read the labels again and to copy
the logits. 'peak' is the growth of memory over a step, 'kept' what forward leaves for backward, in
units of the logits: of a fresh process or, on a GPU, as counted by torch's allocator.

A training step is the forward pass of a network with the loss of its logits, and the backward pass
to its weights: one image, float32, no deep supervision, no optimizer. Its floor is the same step
with the mean of the logits as the loss, which reads the logits and passes on a gradient of their
size; inplace=True may take less memory, and the fused head, which never has logits, less of both.
Peak memory is the growth above what the network, image and labels take before the step, in a
process whose libraries have run a step on a small patch: activations, logits, what the loss
allocates, all gradients, scratch of convolutions. The losses are Dice + cross-entropy,
PlainConvUNet's as in nnU-Net's trainer, without class 0; 'dice_core' is the drop-in of that name.

All compute the same Dice loss, except that nnU-Net's is without the 1 and SMP's is of the whole
batch; with one channel it is the Dice of the foreground alone. Compounds add the mean cross-entropy
(CE) or the focal loss of each channel's sigmoid.

With --busy, the times are those of a step with one thread and with all of them, on cores that are
free and, 'busy', on cores that other processes use too, which only compute.

On a GPU times are the device's, which does not wait for the host; 'host' is the time that the host
takes to enqueue a step. A single step takes the longer of the two."""
NOTE_LENGTH = 700  # characters; JSON has notes in full


def text(report: Report) -> str:
    """Facts, all measurements of each case, comparisons, the legend, notes."""
    parts = [heading(report), *(details(name, found) for name, found in report.cases.items())]
    parts.append(savings(report.cases))
    parts += [comparison(title, report.cases, *names) for title, names in COMPARISONS.items()]
    return "\n\n".join(filter(None, [*parts, LEGEND, notes(report)])) + "\n"


def heading(report: Report) -> str:
    """One line per fact."""
    return "  \n".join(f"{name}: {fact}" for name, fact in report.facts.items())


def details(case: str, result: CaseResult) -> str:
    """The table of every implementation of a case."""
    copies = f", {result.copies} copies of the input" if result.copies > 1 else ""
    title = f"{case}: {result.title}, {result.rounds} rounds{copies}"
    columns: dict[str, Callable[[str], str]] = {
        "forward ms": lambda name: _number(result.get(name, "forward"), 1e3),
        "backward ms": lambda name: _number(result.get(name, "backward"), 1e3),
        "step ms": lambda name: _number(result.get(name, "step"), 1e3),
        "forward / floor": lambda name: _number(result.ratio(name, "floor", "forward")),
        "step / floor": lambda name: _number(result.ratio(name, "floor", "step")),
        "host us": lambda name: _number(result.get(name, "host"), 1e6),
        "peak MiB": lambda name: _number(result.mebibytes(name)),
        "peak": lambda name: _number(result.get(name, "peak")),
        "kept": lambda name: _number(result.get(name, "kept")),
        "1 thread ms": lambda name: _number(result.get(name, "one"), 1e3),
        "all ms": lambda name: _number(result.get(name, "all"), 1e3),
        "1 busy ms": lambda name: _number(result.get(name, "one busy"), 1e3),
        "all busy ms": lambda name: _number(result.get(name, "all busy"), 1e3),
        "all busy / all": lambda name: _times(result.quotient(name, "all busy", "all")),
        "1 busy / all busy": lambda name: _times(result.quotient(name, "one busy", "all busy")),
    }
    return table(title, {_title(name): name for name in result.measurements}, columns)


def comparison(title: str, results: Mapping[str, CaseResult], time: str, *names: str) -> str:
    """The table of one of COMPARISONS, a row per case; empty if ours was not measured."""
    ours, dice, monai, nnunet, compiled = names
    results = {case: result for case, result in results.items() if not result.network}
    if all(result.get(ours, time) is None for result in results.values()):
        return ""
    peak = "peak" if time == "step" else ""
    columns: dict[str, Callable[[CaseResult], str]] = {
        "ms": lambda r: _number(r.get(ours, time), 1e3),
        "of Dice": lambda r: _times(r.ratio(ours, dice, time)),
        "vs MONAI": lambda r: _times(r.ratio(monai, ours, time)),
        "vs nnU-Net": lambda r: _times(r.ratio(nnunet, ours, time)),
        "vs compile": lambda r: _times(r.ratio(compiled, ours, time)),
        "/ floor": lambda r: _number(r.ratio(ours, "floor", time)),
        "peak": lambda r: _number(r.get(ours, peak)),
        "MONAI peak": lambda r: _number(r.get(monai, peak)),
        "nnU-Net peak": lambda r: _number(r.get(nnunet, peak)),
        "compile peak": lambda r: _number(r.get(compiled, peak)),
    }
    return table(f"dice_core, {title}", results, columns)


def savings(results: Mapping[str, CaseResult]) -> str:
    """The table of what whole training steps save; empty if none was measured."""
    rows = {
        f"{case}, {_title(name)}": (result, name)
        for case, result in results.items()
        for name in (f"{result.network}-{role}" for role in ("ours", "inplace", "fused"))
        if name in result.measurements
    }

    def column(what: str) -> Callable[[tuple[CaseResult, str]], str]:
        def cell(row: tuple[CaseResult, str]) -> str:
            result, name = row
            ratio = result.ratio(name, f"{result.network}-theirs", what)
            return "-" if ratio is None else f"{100 * (1 - ratio):.0f} %"

        return cell

    columns = {"of time": column("step"), "of peak memory": column("peak")}
    return table("saved of a step with the library's own loss", rows, columns) if rows else ""


def notes(report: Report) -> str:
    """Refusals and wrong values, each with the cases and implementations concerned."""
    about: dict[str, list[str]] = {}
    for case, result in report.cases.items():
        for name, found in result.measurements.items():
            for note in found.get("notes", []):
                about.setdefault(note, []).append(f"{case} {_title(name)}")
    lines = [f"- {'; '.join(names)}: {note}" for note, names in about.items()]
    return "\n".join(textwrap.shorten(line, NOTE_LENGTH) for line in lines)


def table(title: str, rows: Mapping[str, Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A Markdown table, without the columns in which nothing was measured."""
    cells = {header: [cell(row) for row in rows.values()] for header, cell in columns.items()}
    cells = {header: column for header, column in cells.items() if set(column) != {"-"}}
    lines = [
        ["", *cells],
        ["---", *["---:"] * len(cells)],
        *zip(rows, *cells.values(), strict=True),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in aligned)])


def _title(name: str) -> str:
    return IMPLEMENTATIONS[name].title if name in IMPLEMENTATIONS else name


def _number(value: float | None, scale: float = 1) -> str:
    if value is None:
        return "-"
    value *= scale
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{_number(value)}x"
