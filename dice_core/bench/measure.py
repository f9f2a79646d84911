"""Measurement of the time and memory of steps, in a process that `run` has started."""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch

from . import floor, formulas
from .cases import Case
from .devices import DEVICES, Device
from .implementations import IMPLEMENTATIONS, Step
from .results import CaseResult, Measurement

SAMPLE = 0.01  # seconds: if the slowest step is faster, all are repeated equally often
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    device: str = "cpu"  # a key of DEVICES
    labels: str = "int64"  # their dtype
    threads: int = 1  # of torch, and so of every implementation
    rounds: int = 30  # at most
    budget: float = 20.0  # seconds after which no further round starts, if there are FEWEST_ROUNDS
    memory: bool = True  # whether memory is measured too
    busy: int = 0  # processes that use the cores too; measured by `busy` then, without memory


def times(case: Case, names: Sequence[str], settings: Settings) -> CaseResult:
    """Medians of rounds, and memory unless that needs fresh processes.

    Every step runs, and compiles, before the first round; an exception is noted as its result.
    """
    _set_up(settings)
    device = DEVICES[settings.device]
    inputs = device.inputs(*case.tensors(settings.labels))
    x, y = inputs[0]

    @cache
    def expected(formula: str) -> float:
        with torch.no_grad():
            return float(getattr(formulas, formula)(case.logits(x).float(), y))

    rows: dict[str, Measurement] = {name: {"notes": []} for name in names}
    readers = () if case.network else floor.READERS
    steps = {f"floor {i}": floor.step(read, inputs) for i, read in enumerate(readers)}
    for name, found in rows.items():
        row = IMPLEMENTATIONS[name]
        try:
            step = row.step(inputs, case.shape[1])
            *_, value = step()
            found["value"] = float(value)
        except Exception as error:
            found["notes"].append(f"{type(error).__name__}: {error}")
            continue
        steps[name] = step
        found["expected"] = expected(row.formula) + row.offset
        found["notes"] += wrong_value(found["value"], found["expected"], x.dtype)

    samples = _samples(steps, device, settings)
    for name, of_rounds in samples.items():
        found = rows.setdefault(name, {"notes": []})
        found |= {what: median(times[what] for times in of_rounds) for what in of_rounds[0]}
        if settings.memory and not device.memory_needs_fresh_process:
            found |= growth(steps[name], device, case.logits_bytes())
    if floors := [rows.pop(name) for name in steps if name not in names]:
        rows["floor"] = {what: min(row[what] for row in floors) for what in ("forward", "step")}
    count = max(map(len, samples.values()), default=0)
    return CaseResult(str(case), rows, count, len(inputs), case.logits_bytes(), case.network)


def rounds(settings: Settings) -> Iterator[int]:
    """Counts rounds until they, or their time, are used up; no garbage is collected meanwhile."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for done in range(settings.rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start >= settings.budget:
            break
        yield done


def _samples(
    steps: Mapping[str, Step], device: Device, settings: Settings
) -> dict[str, list[dict[str, float]]]:
    """The times of each step in each round.

    Every round has its own order, so that no step always follows the same other one, and input that
    is still in a cache helps all of them equally, including the floor.
    """
    slowest = max((device.seconds(step, 1)["step"] for step in steps.values()), default=1.0)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in rounds(settings):
        shuffle(order)
        for name in order:
            samples[name].append(device.seconds(steps[name], math.ceil(SAMPLE / slowest)))
    return samples


def memory(case: Case, name: str, settings: Settings) -> dict[str, float]:
    """`growth` over a step, in a fresh process.

    A warm-up step on a tiny input comes first, so that libraries and threads are not included; an
    implementation that is compiled for a shape is warmed up at full size.
    """
    _set_up(settings)
    row, device = IMPLEMENTATIONS[name], DEVICES[settings.device]
    warm_up = case if row.compiled else case.with_sides(8)
    for _ in row.step(device.inputs(*warm_up.tensors(settings.labels)), case.shape[1])():
        pass
    inputs = device.inputs(*case.tensors(settings.labels))
    return growth(row.step(inputs, case.shape[1]), device, case.logits_bytes())


def growth(step: Step, device: Device, unit: int) -> dict[str, float]:
    """Growth of memory over a step, its peak and after forward, in units of so many bytes."""
    phases = step()
    next(phases)
    gc.collect()
    device.reset_peak_memory()
    start = device.memory()
    # (bytes in use, peak) after each phase, before the step cleans up
    found = [(device.memory() - start, device.peak_memory() - start) for _ in phases]
    peak, kept = found[-1][1], found[0][0]
    return {"peak": max(0, peak) / unit, "kept": max(0, kept) / unit}


def wrong_value(value: float, expected: float, dtype: torch.dtype) -> list[str]:
    """A note if a loss differs from its formula by more than the precision of its dtype."""
    tolerance = (1e-4 if dtype == torch.float32 else 1e-2) * max(1.0, abs(expected))
    if abs(value - expected) <= tolerance:
        return []
    return [f"its loss is {value:.4g}, but its formula gives {expected:.4g}"]


def _set_up(settings: Settings) -> None:
    gc.freeze()  # so that collections do not touch imported objects, whose pages a fork would copy
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
