"""How a step is timed and weighed, in a process of its own (see `processes`)."""

from __future__ import annotations

import gc
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from . import floor, formulas
from .cases import Case
from .device import DEVICES, Device
from .implementations import IMPLEMENTATIONS, Step
from .results import CaseResult, Measurement, medians

SAMPLE = 0.01  # seconds: where the slowest step is faster, all are repeated equally often


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    - device: a key of DEVICES.
    - memory: whether steps are weighed too.
    - labels: dtype of y.
    - threads: of torch, and so of all.
    - rounds: at most so many.
    - budget: seconds after which a case starts no further round, if it has `fewest`.
    """

    device: str = "cpu"
    memory: bool = True
    labels: str = "int64"
    threads: int = 1
    rounds: int = 30
    fewest: int = 5
    budget: float = 20.0


Progress = tuple[float, str]  # the share that is done, what comes next


@dataclass
class Samples:
    """Of a step, one of each in every round; seconds."""

    phases: list[list[float]] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # where that is not the time itself


def times(case: Case, names: Sequence[str], settings: Settings) -> Iterator[Progress | CaseResult]:
    """The case's result: medians of rounds, and memory unless that takes processes of its own.

    Before the first round everything has run twice, and is compiled.
    """
    _settle(settings)
    device = DEVICES[settings.device]
    inputs = device.inputs(*case.tensors(settings.labels))
    x, y = inputs[0]
    result = CaseResult(case, settings.labels, x.nbytes, y.nbytes, len(inputs))
    floor_steps, steps = floor.steps(inputs), {}
    expected = cache(partial(_expected, x, y))
    for i, name in enumerate(names):
        row, found = IMPLEMENTATIONS[name], Measurement()
        result.measurements[name] = found
        yield i / len(names) / 2, f"{case.name}: warming up {row.title}"
        try:
            step = row.prepare(inputs)
            *_, value = step()
            found.value = float(value)
        except Exception as error:  # a refusal is a result
            found.notes.append(f"{type(error).__name__}: {error}")
            continue
        steps[name] = step
        found.expected = expected(row.formula)
        found.notes += doubts(found.value, found.expected, case.single_precision)

    samples = {name: Samples() for name in floor_steps | steps}
    for share in _rounds(floor_steps | steps, samples, device, settings):
        yield 0.5 + share / 2, f"{case.name}: round {result.rounds + 1}"
        result.rounds += 1
    result.floor = floor.of({name: medians(samples[name].phases)[-1] for name in floor_steps})
    for name, step in steps.items():
        found = result.measurements[name]
        *phases, found.step = medians(samples[name].phases)
        if len(phases) == 2:
            found.forward, found.backward = phases
        if samples[name].host:
            found.host = median(samples[name].host)
        if settings.memory and not device.weighs_apart:
            found.peak, found.kept = _weigh(step, device, x)
    yield result


def _rounds(
    steps: Mapping[str, Step],
    samples: Mapping[str, Samples],
    device: Device,
    settings: Settings,
) -> Iterator[float]:
    """Adds a sample of each step in each round, before which it yields the share that is done.

    Every round has its own order, so that none always follows the same other, and whatever a cache
    still holds of the input helps all alike, the floor included.
    """
    repeats = math.ceil(SAMPLE / max(sum(device.seconds(step, 1)) for step in steps.values()))
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
            samples[name].phases.append(device.seconds(steps[name], repeats))
            host = device.host_seconds(steps[name])
            if host is not None:
                samples[name].host.append(host)


def weight(case: Case, name: str, settings: Settings) -> Iterator[tuple[float, float]]:
    """(peak, kept) of a step, in this new process.

    A step on a tiny input comes first, so that neither libraries nor threads count; what is
    compiled for a shape takes that step at full size. Memory that is free but still the process's
    goes back to the system before the measured step.
    """
    _settle(settings)
    row, device = IMPLEMENTATIONS[name], DEVICES[settings.device]
    warm_up = case if row.compiled else case.with_sides(8)
    for _ in row.prepare(device.inputs(*warm_up.tensors(settings.labels)))():
        pass
    inputs = device.inputs(*case.tensors(settings.labels))
    yield _weigh(row.prepare(inputs), device, inputs[0][0])


def _weigh(step: Step, device: Device, x: Tensor) -> tuple[float, float]:
    """Growth over one step, at most and after its forward, per bytes of the logits."""
    phases = step()
    next(phases)
    gc.collect()
    meter = device.meter()
    next(phases)
    kept = meter.growth()
    for _ in phases:
        pass
    return meter.peak() / x.nbytes, kept / x.nbytes


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
