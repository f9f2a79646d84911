"""The results of a run, in memory and as JSON.

A measurement is a dictionary of the results of one implementation on one case:

- forward, backward, step (both together), host (on a GPU, the host's time for a step): medians, in
  seconds;
- peak, the growth of memory over a step, and kept, the part of it that forward leaves for backward:
  in units of the logits' bytes;
- value, of the loss, and expected, the naive formula's value in float32;
- one, all, one busy, all busy: of --busy, a step with one thread and with all, on free cores and on
  busy ones: medians, in seconds;
- notes: refusals and wrong values.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .implementations import IMPLEMENTATIONS

Measurement = dict[str, Any]


@dataclass
class CaseResult:
    """One case: measurements by the names of IMPLEMENTATIONS, and of the "floor"."""

    title: str
    measurements: dict[str, Measurement]
    rounds: int = 0
    copies: int = 1  # of the input, for successive steps
    logits_bytes: int = 0  # 0 if unknown
    network: str = ""  # of a whole training step

    def get(self, name: str, what: str) -> float | None:
        """An entry of a measurement, None if it is missing; the name "compile" stands for the
        fastest compiled implementation, by forward time if `what` is forward, else by step time,
        and "floor" of a whole training step for the one without a loss.
        """
        if name == "floor" and self.network:
            name = f"{self.network}-none"
        if name == "compile":
            time = "forward" if what == "forward" else "step"
            compiled = (n for n, row in IMPLEMENTATIONS.items() if row.compiled)
            seconds = {n: s for n in compiled if (s := self.get(n, time)) is not None}
            name = min(seconds, key=seconds.__getitem__, default="")
        return self.measurements.get(name, {}).get(what)

    def mebibytes(self, name: str) -> float | None:
        """The peak memory of a measurement in MiB, None if it is unknown."""
        peak = self.get(name, "peak") if self.logits_bytes else None
        return None if peak is None else peak * self.logits_bytes / 2**20

    def ratio(self, a: str, b: str, what: str) -> float | None:
        """`get` of a divided by that of b, None if one is missing."""
        return _divided(self.get(a, what), self.get(b, what))

    def quotient(self, name: str, what: str, by: str) -> float | None:
        """One entry of a measurement divided by another one, None if one is missing."""
        return _divided(self.get(name, what), self.get(name, by))


def _divided(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


@dataclass
class Report:
    """One run."""

    facts: dict[str, str]
    cases: dict[str, CaseResult] = field(default_factory=dict)


def write(report: Report, path: Path) -> None:
    """The whole report as JSON."""
    path.write_text(json.dumps(asdict(report), indent=2) + "\n")


def read(path: Path) -> Report:
    """A report that `write` wrote."""
    found = json.loads(path.read_text())
    return Report(
        found["facts"], {name: CaseResult(**case) for name, case in found["cases"].items()}
    )
