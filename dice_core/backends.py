"""The table of backends, and the choice of a backend for a call.

A backend is a module with three functions:

- ``statistics(logits, labels, sums, spec, threads) -> int`` fills sums, (K, N, C);
- ``gradient(logits, labels, cotangent, grad, spec, threads) -> int`` fills grad, of the logits'
  shape and dtype, with the vector-Jacobian product of the statistics and cotangent, (K, N, C);
- ``unsupported(signature) -> list[str]`` gives the reasons why such calls are not supported; empty
  if they are.

Arrays are Buffers: logits (N, C, *), labels (N, *) or soft targets (N, C, *), (K, N, C) contiguous
float64 in the order of ``spec.fields``. The integer returned is the number of out-of-range labels
or targets.

It may also define

- ``unavailable() -> list[str]``, the reasons why it does not run on this machine;
- ``loss(logits, labels, value, derivative, spec, ratio, weight, threads) -> int``, which fills the
  value of a ``losses.Ratio``, () or (N,), in the loss's dtype, and its derivative with respect to
  the sums, (K, N, C), which in host memory may be None; the class weights are (C,) float64 or None.

On a device, reading a number back would synchronize; a backend for device memory defines `loss` and
differs:

- out-of-range labels are not counted; they make the sums of their sample NaN;
- ``gradient(..., scale=None)`` multiplies each sample's cotangent by scale, () or (N,), in the
  loss's dtype;
- ``precompile(logits, labels, spec)`` compiles the kernels that calls with such arrays need;
- ``wait(logits)`` waits for the work queued on the logits' stream.

A backend of another package is imported only if it is requested by name, or by `python -m
dice_core`, which lists all: a package that happens to be installed runs no code.
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

from . import checks
from .spec import Signature

VARIABLE = "DICE_CORE_BACKEND"
ENTRY_POINTS = "dice_core.backends"


class BackendError(RuntimeError):
    """No backend, or not the requested one, supports a call; the message gives the reasons."""


@dataclass(frozen=True, eq=False)
class Backend:
    """A row of the table."""

    name: str
    module: str
    device: str | None  # the memory it reads, "cpu" or "cuda"; None if `unsupported` checks it
    description: str
    level: str | None = None  # the instruction-set level its code requires
    remedy: str = ""
    automatic: bool = True  # whether it may be chosen without being named

    def unavailable(self) -> list[str]:
        """The reasons why it does not run on this machine; empty if it does. Cached."""
        return list(_unavailable(self))

    def load(self) -> Any:
        """Its module, imported on first use: it may need instructions that the processor lacks."""
        return importlib.import_module(self.module)

    def unsupported(self, signature: Signature) -> list[str]:
        """The reasons why it does not support such calls; empty if it does."""
        device = signature.logits.device
        # Checked first, so that no driver is loaded needlessly.
        if self.device not in (None, device.partition(":")[0]):
            return [f"reads {self.device} memory, but the logits are on {device}"]
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
        remedy=(
            f" in {Path(__file__).parent}, which was not built: pip install -e ., or run Python in "
            f"another folder, where an installed dice_core is found"
        ),
    ),
    Backend("reference", "dice_core._reference", "cpu", "plain NumPy, float64", automatic=False),
)


def table() -> Iterator[Backend]:
    """Every backend in the order in which they are tried, those of other packages last."""
    yield from BUILT_IN
    yield from _entry_points()


def select(signature: Signature, name: str | None = None) -> Any:
    """The kernel module for such calls: of the backend `name`, else of DICE_CORE_BACKEND, else of
    the first backend that supports them.

    Raises ValueError for a name that is not in the table, BackendError if the requested backend, or
    every backend, does not support them.
    """
    if name is not None:
        checks.backend(name)
        return _named(signature, name, "backend=")
    name = os.environ.get(VARIABLE)
    return _named(signature, name, f"{VARIABLE}=") if name else _first(signature)


@functools.lru_cache(1024)
def _named(signature: Signature, name: str, source: str) -> Any:
    row = _by_name(name, source)
    reasons = row.unsupported(signature)
    if reasons:
        raise BackendError(
            _refusal(signature, {row.name: reasons}, f"{source}{name} does not support this call")
        )
    return row.load()


@functools.lru_cache(1024)
def _first(signature: Signature) -> Any:
    refused = {}
    for row in table():
        reasons = ["runs only if requested by name"]
        if row.automatic:
            reasons = row.unsupported(signature)
            if not reasons:
                return row.load()
        refused[row.name] = reasons
    raise BackendError(_refusal(signature, refused, "no backend supports this call"))


def _by_name(name: str, source: str) -> Backend:
    for row in table():
        if row.name == name:
            return row
    names = ", ".join(row.name for row in table())
    raise ValueError(f"{source}{name} is not a backend; choose from {names}")


def _refusal(signature: Signature, refused: dict[str, list[str]], headline: str) -> str:
    lines = [headline]
    lines += [f"    {line}" for line in str(signature).splitlines()]
    lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in refused.items()]
    lines.append("`python -m dice_core` lists every backend of this machine.")
    return "\n".join(lines)


@functools.cache
def _entry_points() -> tuple[Backend, ...]:
    return tuple(
        Backend(
            point.name,
            point.value,
            None,
            f"from {point.dist.name if point.dist else '?'}",
            automatic=False,
        )
        for point in importlib.metadata.entry_points(group=ENTRY_POINTS)
    )


@functools.cache
def _unavailable(row: Backend) -> tuple[str, ...]:
    try:
        if row.level and not importlib.import_module("dice_core._cpu").processor_runs(row.level):
            return (f"needs a processor that supports {row.level}",)
        module = row.load()
        return tuple(module.unavailable()) if hasattr(module, "unavailable") else ()
    except ModuleNotFoundError as error:
        if error.name != row.module:
            return (f"needs the module {error.name}",)
        return (f"{row.module} is not part of this installation{row.remedy}",)
    except Exception as error:  # for example OSError: a broken backend must not hide the others
        return (f"{row.module} failed to load: {error}",)
