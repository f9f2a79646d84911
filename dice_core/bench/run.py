"""A whole run: every case timed, then each implementation of it weighed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, measure
from .cases import Case
from .device import DEVICES
from .implementations import Implementation
from .measure import Settings
from .processes import ProcessDied, fresh
from .results import CaseResult, Measurement, Report

Show = Callable[[float, str], None]  # the share that is done, what comes next


def report(
    chosen: Sequence[Case],
    rows: Sequence[Implementation],
    settings: Settings,
) -> Report:
    """Measures, with a progress bar on standard error; interrupted, returns what there is."""
    log = Console(stderr=True)
    with log.status("importing the peers"):
        reasons = {row.name: row.unavailable() for row in rows}
    unavailable = {name: reason for name, reason in reasons.items() if reason}
    result = Report(machine.facts(settings.device) | {"settings": asdict(settings)}, unavailable)
    usable = [row for row in rows if row.name not in unavailable]
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # No thread refreshes it: this process may fork.
    with Progress(*columns, console=log, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1)

        def show(done: float, what: str) -> None:
            bar.update(task, completed=done, description=what, refresh=True)

        try:
            for found in cases(chosen if usable else (), usable, settings, show):
                result.cases[found.case.name] = found
        except KeyboardInterrupt:
            log.print("interrupted")
    return result


def cases(
    chosen: Sequence[Case],
    rows: Sequence[Implementation],
    settings: Settings,
    show: Show,
) -> Iterator[CaseResult]:
    """Each case's result as soon as it is there."""
    apart = rows if settings.memory and DEVICES[settings.device].weighs_apart else ()
    parts = 1 + len(apart)  # the timing, and a weighing each
    for i, case in enumerate(chosen):

        def show_part(done: float, what: str, before: int = i * parts) -> None:
            show((before + done) / (len(chosen) * parts), what)

        result = timed(case, [row.name for row in rows], settings, show_part)
        for k, row in enumerate(apart, start=1):
            show_part(k, f"{case.name}: memory of {row.title}")
            found = result.measurements[row.name]
            if found.step is not None:  # what was refused once is not asked again
                weigh(case, row, settings, found)
        yield result


def timed(case: Case, names: Sequence[str], settings: Settings, show: Show) -> CaseResult:
    """The case's result, as far as one process finds it out."""
    result = CaseResult(case, settings.labels)
    try:
        for message in _fresh(measure.times, case, names, settings):
            if isinstance(message, CaseResult):
                result = message
            else:
                show(*message)
    except ProcessDied as died:
        result.measurements = {name: Measurement(notes=[str(died)]) for name in names}
    return result


def weigh(case: Case, row: Implementation, settings: Settings, found: Measurement) -> None:
    """Fills in peak and kept."""
    try:
        for found.peak, found.kept in _fresh(measure.weight, case, row.name, settings):
            pass
    except ProcessDied as died:
        found.notes.append(f"memory: {died}")


def _fresh(
    work: Callable[..., Iterator[Any]], case: Case, what: Any, settings: Settings
) -> Iterator[Any]:
    return fresh(work, case, what, settings, spawn=DEVICES[settings.device].spawn)
