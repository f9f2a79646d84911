"""A run in words and tables of strings, for a terminal and for Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from . import summary
from .implementations import IMPLEMENTATIONS
from .results import CaseResult, Measurement, Report

HOST = "host us"
NOTE_LENGTH = 700  # characters; JSON has them whole


@dataclass(frozen=True)
class Table:
    """Rows of strings; the first column is a name, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def without_empty(self, *names: str) -> Table:
        """The same without these columns where nobody has a number in them."""
        columns = [
            i
            for i, name in enumerate(self.header)
            if name not in names or any(row[i] not in ("", "-") for row in self.rows)
        ]
        header, *rows = (tuple(row[i] for i in columns) for row in (self.header, *self.rows))
        return Table(self.title, header, rows)

    def markdown(self) -> str:
        """A heading line and a table of GitHub's kind."""
        ruler = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines])


def heading(report: Report) -> list[str]:
    """Lines: machine, settings, versions, what the environment decides, the command."""
    facts = report.facts
    settings = facts["settings"]
    set_variables = [f"{name}={value}" for name, value in facts["environment"].items() if value]
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB; "
        f"backend {facts['backend']}, {settings['threads']} threads, {settings['labels']} labels; "
        f"{facts['date']}, load {facts['load']:.1f} at the start",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "environment: " + (", ".join(set_variables) or "the allocator's and OpenMP's defaults"),
        facts["command"],
    ]
    if "gpu" in facts:
        lines.insert(
            0,
            f"{facts['gpu']}, compute capability {facts['compute_capability']}, "
            f"{facts['gpu_memory_bytes'] / 2**30:.0f} GiB, {facts['l2_bytes'] / 2**20:.0f} MiB of "
            f"L2 cache; driver {facts['driver']}, CUDA {facts['cuda']}",
        )
    if not facts["peak_memory_exact"]:
        lines.append("peak memory is a lower bound: the system keeps a lifetime maximum only")
    missing = [f"{IMPLEMENTATIONS[name].title} ({why})" for name, why in report.unavailable.items()]
    return lines + ([f"not measured: {', '.join(missing)}"] if missing else [])


def details(result: CaseResult, footnotes: list[str]) -> Table:
    """Every implementation of a case, with the numbers of its notes among the footnotes."""
    floor, rows = result.floor, []
    for name, found in result.measurements.items():
        marks = "".join(f" [{1 + footnotes.index(note)}]" for note in found.notes)
        rows.append((IMPLEMENTATIONS[name].title + marks, *_cells(name, found, result)))
    title = f"{result.case.name}: {result.case}, {result.rounds} rounds"
    if floor:
        rows.append(("floor", _ms(floor.forward), "", _ms(floor.step), *[""] * 5))
        read, copy = result.x_bytes / floor.read_x / 1e9, result.x_bytes / floor.copy_x / 1e9
        title += f"; read {read:.1f}, copy {copy:.1f} GB/s"
    if result.copies > 1:
        title += f"; {result.copies} copies of the input in turns"
    header = ("", "forward ms", "backward ms", "step ms", "fwd / floor", "step / floor", HOST)
    return Table(title, (*header, "peak", "kept"), rows).without_empty(HOST)


def _cells(name: str, found: Measurement, result: CaseResult) -> Iterator[str]:
    yield from map(_ms, (found.forward, found.backward, found.step))
    yield from (_number(result.above_floor(name, what)) for what in ("forward", "step"))
    yield _us(found.host)
    yield from map(_number, (found.peak, found.kept))


def summaries(report: Report) -> list[Table]:
    """Ours against the peers and the floor; then memory and the host's time; what there is."""
    results = list(report.cases.values())
    tables = [_speeds(results, quantity) for quantity in summary.QUANTITIES]
    tables += [_compounds(results, name) for name in summary.COMPOUNDS]
    tables += [_memory(results), _hosts(results)]
    return [table for table in tables if any(set(row[1:]) != {"-"} for row in table.rows)]


def _speeds(results: list[CaseResult], quantity: str) -> Table:
    rows = []
    for result in results:
        row = summary.speed(result, quantity)
        compared = (row.over_monai, row.over_compile, row.over_exacta)
        rows.append((row.case, _ms(row.seconds), *map(_times, compared), _number(row.above_floor)))
    header = ("case", "ms", "vs MONAI", "vs compile", "vs exacta", "/ floor")
    return Table(f"dice_core, {quantity}", header, rows).without_empty("vs exacta")


def _compounds(results: list[CaseResult], name: str) -> Table:
    rows = []
    for result in results:
        row = summary.compound(result, name)
        speeds = map(_times, (row.over_dice, row.over_monai, row.over_nnunet))
        peaks = map(_number, (row.peak, row.peak_of_monai, row.peak_of_nnunet))
        rows.append((row.case, _ms(row.seconds), *speeds, *peaks))
    header = ("case", "ms", "of Dice", "vs MONAI", "vs nnU-Net", "peak", "MONAI", "nnU-Net")
    table = Table(f"dice_core, step of {name}", header, rows)
    return table.without_empty("vs nnU-Net").without_empty("nnU-Net")


def _memory(results: list[CaseResult]) -> Table:
    weights = map(summary.memory, results)
    header = ("case", "dice_core", "over the logits", "MONAI", "compile")
    rows = [
        (row.case, *map(_number, (row.ours, row.over_logits, row.monai, row.compile)))
        for row in weights
    ]
    return Table("peak memory of a step, in units of the logits", header, rows)


def _hosts(results: list[CaseResult]) -> Table:
    hosts = map(summary.host, results)
    header = ("case", "dice_core", "MONAI", "compile", "exacta")
    rows = [(row.case, *map(_us, (row.ours, row.monai, row.compile, row.exacta))) for row in hosts]
    return Table("time of a step on the host, us", header, rows).without_empty("exacta")


def legend(report: Report) -> list[str]:
    """What the cases and the words of the summaries stand for."""
    cases = "; ".join(f"{name} {result.case}" for name, result in report.cases.items())
    lines = [
        f"Cases: {cases}. Labels (N, *), {report.facts['settings']['labels']}.",
        "A step is forward and backward. MONAI is its DiceLoss; compile is the fastest of "
        "torch.compile of the naive code, of the naive code with ==, and of MONAI's DiceLoss. "
        "'vs' is their time divided by ours, '/ floor' ours divided by the time to read the logits "
        "and labels (forward), and to read the labels again and copy the logits (step).",
        "All compute the same Dice loss, except that nnU-Net's lacks the 1 and SMP's is of the "
        "whole batch. One channel is a Dice of the foreground alone; ours has weight (0, 1) there. "
        "Compounds add the mean cross-entropy, or the focal loss of each channel's sigmoid; "
        "'of Dice' is their time divided by that of our Dice alone.",
    ]
    if "gpu" in report.facts:
        lines.append(
            "Times are the device's, the host far enough ahead; the host's is what it takes to "
            "enqueue a step. A step alone takes the longer of the two."
        )
    return lines


def notes(report: Report) -> dict[str, str]:
    """Refusals and doubts, each with whom it is about, in the order of the footnotes' numbers."""
    about: dict[str, list[str]] = {}
    for case, result in report.cases.items():
        for name, found in result.measurements.items():
            for note in found.notes:
                about.setdefault(note, []).append(f"{case} {IMPLEMENTATIONS[name].title}")
    return {
        note: textwrap.shorten(f"{'; '.join(who)}: {note}", NOTE_LENGTH)
        for note, who in about.items()
    }


def show(report: Report, console: Console) -> None:
    """Everything, on a terminal."""
    if not console.is_terminal:
        console.width = 140

    def text(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    text("\n".join([*heading(report), ""]))
    footnotes = notes(report)
    for result in report.cases.values():
        console.print(details(result, list(footnotes)).rich())
    for table in summaries(report):
        console.print(table.rich())
    text("\n\n".join(legend(report)))
    for i, line in enumerate(footnotes.values(), start=1):
        text(f"[{i}] {line}")


def markdown(report: Report) -> str:
    """The summaries with all that a reader needs to judge them."""
    parts = ["  \n".join(heading(report)), *(table.markdown() for table in summaries(report))]
    parts += legend(report)
    footnotes = [f"{i}. {note}" for i, note in enumerate(notes(report).values(), start=1)]
    return "\n\n".join([*parts, "\n".join(footnotes)]).rstrip() + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{_number(value)}x"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else _number(1e3 * seconds)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else _number(1e6 * seconds)
