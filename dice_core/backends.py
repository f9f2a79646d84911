"""The table of backends, and which of them takes a call.

A backend is a module with three functions:

- ``statistics(logits, labels, sums, spec, threads) -> int`` fills sums, (K, N, C);
- ``gradient(logits, labels, cotangent, grad, spec, threads) -> int`` fills grad, of the logits'
  shape and dtype, with the vector-Jacobian product of the statistics and cotangent, (K, N, C);
- ``unsupported(signature) -> list[str]`` says why it does not take such calls; empty if it does.

Arrays are Buffers: logits (N, C, *), labels (N, *) or soft targets (N, C, *), (K, N, C) contiguous
float64 in the order of ``spec.fields``. The integers count labels and targets out of range.

It may have

- ``unavailable() -> list[str]``, why it does not run on this machine;
- ``loss(logits, labels, value, derivative, spec, ratio, weight, threads) -> int``, which fills the
  value of a ``losses.Ratio``, () or (N,), in the loss's dtype, and its derivative for the sums,
  (K, N, C); the class weights are (C,) float64 or None.

A backend whose arrays lie on a device, where reading a number back means to synchronize, has
`loss`, and more:

- labels out of range are not counted: they make their sample's sums NaN;
- ``gradient(..., scale=None)`` multiplies each sample's cotangent by scale, () or (N,), in the
  loss's dtype;
- ``precompile(logits, labels, spec)`` compiles what calls with such arrays need;
- ``wait(logits)`` synchronizes with what was queued for such logits.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .spec import Signature

VARIABLE = "DICE_CORE_BACKEND"
ENTRY_POINTS = "dice_core.backends"


class BackendError(RuntimeError):
    """No backend takes a call, or the named one does not; the message gives the reasons of each."""


@dataclass(frozen=True, eq=False)
class Backend:
    """A row of the table."""

    name: str
    module: str
    device: str | None  # whose memory it reads, "cpu" or "cuda"; None if `unsupported` checks that
    description: str
    level: str | None = None  # the processor level its code needs
    remedy: str = ""
    automatic: bool = True  # whether it may be chosen without being named

    def unavailable(self) -> list[str]:
        """Why it does not run on this machine; empty if it does. Cached."""
        return list(_unavailable(self))

    def load(self) -> Any:
        """Its module, imported on first use: it may need instructions that the processor lacks."""
        return importlib.import_module(self.module)

    def unsupported(self, signature: Signature) -> list[str]:
        """Why it does not take such calls; empty if it does."""
        device = signature.logits.device
        if self.device not in (
            None,
            device.partition(":")[0],
        ):  # checked first, so that no driver is loaded in vain
            return [f"reads {self.device} memory, and the logits are on {device}"]
        return self.unavailable() or list(self.load().unsupported(signature))


BUILT_IN = (
    Backend(
        "cuda",
        "dice_core._gpu",
        "cuda",
        "numba.cuda kernels for NVIDIA GPUs",
    ),
    Backend("cpu-avx512", "dice_core._cpu_avx512", "cpu", "OpenMP, AVX-512", level="x86-64-v4"),
    Backend("cpu-avx2", "dice_core._cpu_avx2", "cpu", "OpenMP, AVX2", level="x86-64-v3"),
    Backend(
        "cpu",
        "dice_core._cpu",
        "cpu",
        "OpenMP, any processor",
        remedy=f" in {Path(__file__).parent}, which was not built (pip install -e .)",
    ),
    Backend("reference", "dice_core._reference", "cpu", "plain NumPy, float64", automatic=False),
)


def table() -> Iterator[Backend]:
    """Every backend in the order in which they are tried, those of other packages last."""
    yield from BUILT_IN
    yield from _entry_points()


def select(signature: Signature, name: str | None = None) -> Any:
    """The kernel module for such calls: `name`, else DICE_CORE_BACKEND's, else the first to take
    them.

    Raises ValueError for a name that is not in the table, BackendError where the one asked for, or
    every one, refuses.
    """
    if name is not None:
        return _named(signature, name, "backend=")
    name = os.environ.get(VARIABLE)
    return _named(signature, name, f"{VARIABLE}=") if name else _first(signature)


@functools.lru_cache(1024)
def _named(signature: Signature, name: str, asked_by: str) -> Any:
    row = _by_name(name, asked_by)
    reasons = row.unsupported(signature)
    if reasons:
        raise BackendError(
            _refusal(signature, {row.name: reasons}, f"{asked_by}{name} was asked for")
        )
    return row.load()


@functools.lru_cache(1024)
def _first(signature: Signature) -> Any:
    refused = {}
    for row in table():
        reasons = ["runs only when asked for by name"]
        if row.automatic:
            reasons = row.unsupported(signature)
            if not reasons:
                return row.load()
        refused[row.name] = reasons
    raise BackendError(_refusal(signature, refused, "no backend takes this call"))


def _by_name(name: str, asked_by: str) -> Backend:
    for row in table():
        if row.name == name:
            return row
    names = ", ".join(row.name for row in table())
    raise ValueError(f"{asked_by}{name} names no backend; there are {names}")


def _refusal(signature: Signature, refused: dict[str, list[str]], headline: str) -> str:
    lines = [headline]
    lines += [f"    {line}" for line in str(signature).splitlines()]
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in refused.items()]
    lines.append("`python -m dice_core` lists every backend of this machine.")
    return "\n".join(lines)


@functools.cache
def _entry_points() -> tuple[Backend, ...]:
    return tuple(
        Backend(point.name, point.value, None, f"from {point.dist.name if point.dist else '?'}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
    )


@functools.cache
def _unavailable(row: Backend) -> tuple[str, ...]:
    try:
        if row.level and not importlib.import_module("dice_core._cpu").processor_runs(row.level):
            return (f"needs a processor of level {row.level}",)
        module = row.load()
        return tuple(module.unavailable()) if hasattr(module, "unavailable") else ()
    except ModuleNotFoundError as error:
        if error.name != row.module:
            return (f"needs the module {error.name}",)
        return (f"{row.module} is not part of this installation{row.remedy}",)
    except Exception as error:  # a driver's OSError, say: one broken row must not hide the others
        return (f"{row.module} does not load: {error}",)
