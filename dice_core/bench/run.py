"""A whole run: a fresh process for the times of each case, and one for each peak memory."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
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
    """The result of `work` in a new process, a fork unless `spawn`.

    Not a pool, whose threads in this process would make dice_core use one thread in a fork.
    """
    get_context = multiprocessing.get_context
    context = get_context("spawn") if spawn else get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        error = RuntimeError(f"its process ended with exit code {process.exitcode}")
    process.join()
    if error is not None:
        raise error
    return result


def _send(sender: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Sends the result of `work`, and the error that it raised or None."""
    result = error = None
    try:
        result = work(*arguments)
    except Exception as raised:
        error = raised
    sender.send((result, error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
