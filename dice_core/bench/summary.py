"""How many times faster than MONAI and torch.compile, and how far above the floor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .implementations import EXACTA, IMPLEMENTATIONS, MONAI, OURS, OUT, OVER
from .results import CaseResult, Report, ratio


@dataclass(frozen=True)
class Speed:
    """One quantity of ours on one case; None for what was not measured."""

    case: str
    seconds: float | None
    over_monai: float | None  # MONAI's time by ours
    over_compile: float | None  # the fastest compiled peer's time by ours
    compiled: str | None  # which that is
    above_floor: float | None  # our time by the floor
    over_exacta: float | None = None  # exacta's time by ours


@dataclass(frozen=True)
class Compound:
    """A step of ours of several losses at once on one case; None for what was not measured."""

    case: str
    seconds: float | None
    over_dice: float | None  # our time by that of our Dice alone
    over_monai: float | None  # MONAI's time by ours
    over_nnunet: float | None
    peak: float | None  # in units of the logits' bytes
    peak_of_monai: float | None
    peak_of_nnunet: float | None


@dataclass(frozen=True)
class Memory:
    """Peak growth of a step, in units of the logits' bytes."""

    case: str
    ours: float | None
    over_logits: float | None
    monai: float | None
    compile: float | None
    compiled: str | None  # the peer whose step is the fastest of the compiled


@dataclass(frozen=True)
class Host:
    """Seconds that a step costs the host, where a device does the work."""

    case: str
    ours: float | None
    monai: float | None
    compile: float | None
    compiled: str | None  # the peer whose step is the fastest of the compiled
    exacta: float | None


# what is compared: (ours, the attribute of the peers' and of the floor)
QUANTITIES = {
    "forward": (OURS, "forward"),
    "step, fresh gradient": (OURS, "step"),
    "step, gradient into out=": (OUT, "step"),
    "step, gradient over the logits": (OVER, "step"),
}


def speed(result: CaseResult, quantity: str) -> Speed:
    """A row of one of QUANTITIES."""
    ours, what = QUANTITIES[quantity]
    seconds, compiled = _of(result, ours, what), fastest_compiled(result, what)
    return Speed(
        result.case.name,
        seconds,
        ratio(_of(result, MONAI, what), seconds),
        ratio(_of(result, compiled, what), seconds),
        compiled,
        result.above_floor(ours, what),
        ratio(_of(result, EXACTA, what), seconds),
    )


# what is compared: (ours, our Dice alone, MONAI's, nnU-Net's)
COMPOUNDS = {
    "Dice + cross-entropy, fresh gradient": ("ours-ce", OURS, "monai-ce", "nnunet-ce"),
    "Dice + cross-entropy, into out=": ("ours-ce-out", OUT, "monai-ce", "nnunet-ce"),
    "Dice + focal, fresh gradient": ("ours-focal", OURS, "monai-focal", None),
    "Dice + focal, into out=": ("ours-focal-out", OUT, "monai-focal", None),
}


def compound(result: CaseResult, name: str) -> Compound:
    """A row of one of COMPOUNDS."""
    ours, dice, *peers = COMPOUNDS[name]
    seconds = _of(result, ours, "step")
    return Compound(
        result.case.name,
        seconds,
        ratio(seconds, _of(result, dice, "step")),
        *(ratio(_of(result, peer, "step"), seconds) for peer in peers),
        *(_of(result, each, "peak") for each in (ours, *peers)),
    )


def memory(result: CaseResult) -> Memory:
    """The row of memory."""
    compiled = fastest_compiled(result, "step")
    return Memory(
        result.case.name,
        _of(result, OURS, "peak"),
        _of(result, OVER, "peak"),
        _of(result, MONAI, "peak"),
        _of(result, compiled, "peak"),
        compiled,
    )


def host(result: CaseResult) -> Host:
    """The row of the host's time."""
    compiled = fastest_compiled(result, "step")
    return Host(
        result.case.name,
        _of(result, OURS, "host"),
        _of(result, MONAI, "host"),
        _of(result, compiled, "host"),
        compiled,
        _of(result, EXACTA, "host"),
    )


def fastest_compiled(result: CaseResult, what: str) -> str | None:
    """The compiled implementation with the least "forward" or "step"; None without any."""
    seconds = {
        name: value
        for name, found in result.measurements.items()
        if IMPLEMENTATIONS[name].compiled and (value := getattr(found, what)) is not None
    }
    return min(seconds, key=seconds.__getitem__, default=None)


def _of(result: CaseResult, name: str | None, what: str) -> float | None:
    found = result.measurements.get(name or "")
    return getattr(found, what, None)


def as_json(report: Report) -> dict[str, Any]:
    """The whole run and its summary: dictionaries, lists, numbers, None."""
    results = report.cases.values()
    found = {name: [asdict(speed(r, name)) for r in results] for name in QUANTITIES}
    found |= {name: [asdict(compound(r, name)) for r in results] for name in COMPOUNDS}
    found["memory"] = [asdict(memory(r)) for r in results]
    found["host"] = [asdict(host(r)) for r in results]
    return asdict(report) | {"summary": found}
