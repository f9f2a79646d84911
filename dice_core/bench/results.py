"""What a run finds out, as it goes into JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .cases import Case
from .floor import Floor


@dataclass
class Measurement:
    """One implementation on one case; None for what was not measured."""

    forward: float | None = None  # seconds, medians
    backward: float | None = None
    step: float | None = None  # forward and backward together
    host: float | None = None  # what a step costs the host, where a device does the work
    peak: float | None = None  # growth of memory, in units of the logits' bytes
    kept: float | None = None  # of it, what forward leaves for backward
    value: float | None = None  # of the loss
    expected: float | None = None  # by the naive formula, in float32
    notes: list[str] = field(default_factory=list)  # refusals and doubts


@dataclass
class CaseResult:
    """One case."""

    case: Case
    labels: str
    x_bytes: int = 0
    y_bytes: int = 0
    copies: int = 1  # of the input, that steps take in turns
    rounds: int = 0
    floor: Floor | None = None
    measurements: dict[str, Measurement] = field(default_factory=dict)

    def above_floor(self, name: str, what: str) -> float | None:
        """An implementation's "forward" or "step" as a multiple of the floor's."""
        found = self.measurements.get(name)
        if found is None or self.floor is None:
            return None
        return ratio(getattr(found, what), getattr(self.floor, what))


@dataclass
class Report:
    """One run: facts about it, what could not be measured and why, results by case."""

    facts: dict[str, Any]
    unavailable: dict[str, str]
    cases: dict[str, CaseResult] = field(default_factory=dict)


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    """Rounds of phases -> the median of each phase and, last, of their sum."""
    rounds = [(*phases, sum(phases)) for phases in samples]
    return [median(phase) for phase in zip(*rounds, strict=True)]


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None if one is missing."""
    return None if a is None or b is None else a / b
