"""How a step is timed and weighed. Both run in a process of their own (see `processes`)."""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from . import floor, formulas, memory
from .cases import Case
from .implementations import IMPLEMENTATIONS, Step
from .results import CaseResult, Measurement, medians

SAMPLE = 0.01  # seconds: where the slowest step is faster, all are repeated equally often


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    - labels: dtype of y.
    - threads: of torch, and so of all.
    - rounds: at most so many.
    - budget: seconds after which a case starts no further round, if it has `fewest`.
    """

    labels: str = "int64"
    threads: int = 1
    rounds: int = 30
    fewest: int = 5
    budget: float = 20.0


Progress = tuple[float, str]  # the share that is done, what comes next
Samples = dict[str, list[list[float]]]  # by name: rounds of phases, seconds


def times(case: Case, names: Sequence[str], settings: Settings) -> Iterator[Progress | CaseResult]:
    """The case's result without memory: medians of rounds.

    Before the first round everything has run twice, and is compiled.
    """
    _settle(settings)
    x, y = case.tensors(settings.labels)
    result = CaseResult(case, settings.labels, x.nbytes, y.nbytes)
    floor_steps, steps = floor.steps(x, y), {}
    expected = cache(partial(_expected, x, y))
    for i, name in enumerate(names):
        row, found = IMPLEMENTATIONS[name], Measurement()
        result.measurements[name] = found
        yield i / len(names) / 2, f"{case.name}: warming up {row.title}"
        try:
            step = row.prepare(x, y)
            *_, value = step()
        except Exception as error:  # a refusal is a result
            found.notes.append(f"{type(error).__name__}: {error}")
            continue
        steps[name] = step
        found.value, found.expected = float(value), expected(row.formula)
        found.notes += doubts(found.value, found.expected, case.single_precision)

    samples: Samples = {}
    for share in _rounds(floor_steps | steps, samples, settings):
        yield 0.5 + share / 2, f"{case.name}: round {result.rounds + 1}"
        result.rounds += 1
    result.floor = floor.of({name: medians(samples[name])[-1] for name in floor_steps})
    for name in steps:
        found = result.measurements[name]
        *phases, found.step = medians(samples[name])
        if len(phases) == 2:
            found.forward, found.backward = phases
    yield result


def _rounds(steps: Mapping[str, Step], samples: Samples, settings: Settings) -> Iterator[float]:
    """Adds a sample of each step in each round, before which it yields the share that is done.

    Every round has its own order, so that none always follows the same other, and whatever a cache
    still holds of the input helps all alike, the floor included.
    """
    repeats = math.ceil(SAMPLE / max(sum(seconds(step, 1)) for step in steps.values()))
    samples.update({name: [] for name in steps})
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for done in range(settings.rounds):
        used = (time.perf_counter() - start) / settings.budget
        if used >= 1 and done >= settings.fewest:
            break
        yield min(1.0, max(used, done / settings.rounds))
        shuffle(order)
        for name in order:
            samples[name].append(seconds(steps[name], repeats))


def seconds(step: Step, repeats: int) -> list[float]:
    """Of each phase of a step, the mean of so many steps; what readies the input is not timed."""
    totals: list[float] = []
    for _ in range(repeats):
        marks = [time.perf_counter() for _ in step()]
        phases = [stop - start for start, stop in pairwise(marks)]
        totals = [a + b for a, b in zip(totals or [0.0] * len(phases), phases, strict=True)]
    return [total / repeats for total in totals]


def weight(case: Case, name: str, settings: Settings) -> Iterator[tuple[float, float]]:
    """(peak, kept): resident growth over one step and after its forward, per bytes of the logits.

    A step on a tiny input comes first, so that neither libraries nor threads count; what is
    compiled for a shape takes that step at full size. Memory that is free but still the process's
    goes back to the system before the measured step.
    """
    _settle(settings)
    row = IMPLEMENTATIONS[name]
    warm_up = case if row.compiled else case.with_sides(8)
    for _ in row.prepare(*warm_up.tensors(settings.labels))():
        pass
    x, y = case.tensors(settings.labels)
    phases = row.prepare(x, y)()
    next(phases)
    gc.collect()
    meter = memory.Meter()
    next(phases)
    kept = meter.growth()
    for _ in phases:
        pass
    yield meter.peak() / x.nbytes, kept / x.nbytes


def doubts(value: float, expected: float, single_precision: bool) -> list[str]:
    """A note if a loss is not what its formula gives, within what its dtype can hold."""
    tolerance = (1e-4 if single_precision else 1e-2) * max(1.0, abs(expected))
    if abs(value - expected) <= tolerance:
        return []
    return [f"its loss is {value:.4g}, where its formula gives {expected:.4g}"]


def _expected(x: Tensor, y: Tensor, formula: str) -> float:
    with torch.no_grad():
        return float(getattr(formulas, formula)(x.float(), y))


def _settle(settings: Settings) -> None:
    gc.freeze()  # what is imported is no garbage, and a fork need not copy it to find out
    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
