"""A whole run: a fresh process for the times of each case, and one for each peak memory."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from . import busy, machine, measure
from .cases import Case
from .devices import DEVICES
from .implementations import IMPLEMENTATIONS
from .measure import Settings
from .results import CaseResult, Report


def report(cases: Sequence[Case], names: Sequence[str], settings: Settings) -> Report:
    """Measures every case that it can; if interrupted, returns the results so far."""
    reasons = {name: IMPLEMENTATIONS[name].unavailable() for name in names}
    missing = [f"{IMPLEMENTATIONS[name].title} ({why})" for name, why in reasons.items() if why]
    usable = [name for name in names if not reasons[name]]
    try:
        DEVICES[settings.device].reset_peak_memory()
    except OSError as error:
        settings = replace(settings, memory=False)
        missing.append(f"peak memory ({error})")
    result = Report(machine.facts(settings))
    if missing:
        result.facts["not measured"] = ", ".join(missing)
    try:
        for case in cases:
            rows = [name for name in usable if IMPLEMENTATIONS[name].network == case.network]
            if rows:
                print(f"measuring {case.name}: {case}", file=sys.stderr, flush=True)
                result.cases[case.name] = measured(case, rows, settings)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return result


def measured(case: Case, names: Sequence[str], settings: Settings) -> CaseResult:
    """Times of all implementations together, then the memory of each in its own process."""
    device = DEVICES[settings.device]
    times = busy.times if settings.busy else measure.times
    try:
        result = in_fresh_process(device.spawn, times, case, names, settings)
    except Exception as error:  # the process may have died, for lack of memory for example
        notes = {name: {"notes": [_reason(error)]} for name in names}
        return CaseResult(str(case), notes, network=case.network)
    for name in names if settings.memory and device.memory_needs_fresh_process else ():
        found = result.measurements[name]
        if "step" in found:
            try:
                found |= in_fresh_process(device.spawn, measure.memory, case, name, settings)
            except Exception as error:
                found["notes"].append(f"memory: {_reason(error)}")
    return result


def in_fresh_process(spawn: bool, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a new process, a fork unless `spawn`."""
    context = multiprocessing.get_context("spawn" if spawn else "fork")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
