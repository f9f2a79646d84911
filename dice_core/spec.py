"""What one call sums, and every check of what a caller gives, with its error text."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import buffers
from .buffers import Buffer, Layout

STATISTICS = ("intersection", "pred_sum", "target_sum")  # the order of the K axis,
CROSS_ENTROPY = "cross_entropy_sum"  # which has this one last, if it is asked for
OPTIONS = {"power": "p", "gamma": "gamma"}  # a Spec's fields, as callers call them
REDUCTIONS = ("none", "mean", "sum", "batch")
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


@dataclass(frozen=True, slots=True)
class Spec:
    """What a kernel sums over the voxels of a call.

    - activation: "softmax" over the channels, or "sigmoid" of a single channel, whose two classes
      score 1 - sigmoid (background) and sigmoid (foreground).
    - power: P sums score**power.
    - ignore_label: voxels so labelled contribute to nothing; None for no such label.
    - gamma: H sums (1 - score)**gamma (-log score) of each voxel's own class, cross-entropy for 0
      and focal loss above; None for no such sum.
    """

    activation: str
    power: int = 1
    ignore_label: int | None = None
    gamma: float | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the sums, in the order of the K axis."""
        return STATISTICS if self.gamma is None else (*STATISTICS, CROSS_ENTROPY)

    def __str__(self) -> str:
        focal = "" if self.gamma is None else f", gamma = {self.gamma:g}"
        return f"{self.activation}, p = {self.power}, ignore_label = {self.ignore_label}{focal}"


@dataclass(frozen=True, eq=False, slots=True)
class Signature:
    """What a call looks like: how its logits (N, C, *) and labels (N, *) lie, and what to sum.

    Calls that look alike share one.
    """

    logits: Layout
    labels: Layout
    spec: Spec

    def __str__(self) -> str:
        return f"logits  {self.logits}\nlabels  {self.labels}\n{self.spec}"


@dataclass(slots=True)
class Call:
    """One request to a backend."""

    logits: Buffer
    labels: Buffer
    signature: Signature

    @property
    def spec(self) -> Spec:
        """What to sum."""
        return self.signature.spec

    @property
    def classes(self) -> int:
        """C of the statistics: the channels, or two for a single channel."""
        return classes(self.logits.shape[1])

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """(K, N, C) of the statistics."""
        return sums_shape(self.logits.shape, self.spec)


def classes(channels: int) -> int:
    """How many classes so many channels score: one is two, background and foreground."""
    return max(2, channels)


def sums_shape(x: Sequence[int], spec: Spec) -> tuple[int, int, int]:
    """(K, N, C) of the statistics of logits (N, channels, *)."""
    return len(spec.statistics), x[0], classes(x[1])


def call(
    logits: Buffer, labels: Buffer, *, p: Any = 1, ignore_label: Any, gamma: Any = None
) -> Call:
    """The checked request. Raises TypeError or ValueError naming what does not fit."""
    numbers = power(p), label(ignore_label), None if gamma is None else focusing(gamma)
    seen = signature(logits.layout, labels.layout, *numbers)
    if labels.layout is not seen.labels:
        labels = replace(labels, layout=seen.labels)
    return Call(logits, labels, seen)


@functools.lru_cache(1024)
def signature(
    logits: Layout, labels: Layout, power: int, ignore_label: int | None, gamma: float | None
) -> Signature:
    """Of checked numbers; the rest is checked here."""
    check_shapes(logits.shape, labels.shape)
    if logits.dtype not in FLOATS:
        raise TypeError(
            f"x must hold floating-point logits ({', '.join(FLOATS)}), got {logits.dtype}"
        )
    if labels.dtype not in INTEGERS:
        hint = "; cast them to an integer dtype" if labels.dtype in FLOATS else ""
        raise TypeError(f"y must hold integer or bool class labels, got {labels.dtype}{hint}")
    if logits.device != labels.device:
        raise ValueError(f"x is on {logits.device} but y is on {labels.device}")
    if len(labels.shape) == len(logits.shape):
        labels = labels.without_axis(1)
    return Signature(logits, labels, of_channels(logits.shape[1], power, ignore_label, gamma))


def of_channels(channels: int, *numbers: Any) -> Spec:
    """What to sum of logits of so many channels, given the numbers of a Spec."""
    return Spec("sigmoid" if channels == 1 else "softmax", *numbers)


def check_shapes(x: Sequence[int], y: Sequence[int]) -> None:
    """x is (N, C, *) with C >= 1; y is (N, *) or (N, 1, *)."""
    x, y = tuple(x), tuple(y)
    if len(x) < 2:
        raise ValueError(f"x must have at least two axes, (N, C, d1, d2, ...), got shape {x}")
    if x[1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {x}")
    expected = (x[0], *x[2:])
    if y not in (expected, (x[0], 1, *x[2:])):
        hint = "; y holds class indices: for one-hot labels pass y.argmax(1)" if y == x else ""
        raise ValueError(
            f"y must have shape {expected} or {(x[0], 1, *x[2:])} for x of shape {x}, got {y}{hint}"
        )


def check_out(out: Buffer, at: Call) -> None:
    """`out` can take the gradient: like x, writable, and either x itself or apart from x and y."""
    x, y = at.logits, at.labels
    for what in ("shape", "dtype", "device"):
        if getattr(out, what) != getattr(x, what):
            raise ValueError(
                f"out must have x's {what} {getattr(x, what)}, got {getattr(out, what)}"
            )
    if out.readonly:
        raise ValueError("out is read-only")
    if buffers.may_overlap_itself(out.layout):
        raise ValueError(
            f"out must not share memory between its own elements (strides {out.strides})"
        )
    is_x = (out.address, out.strides) == (x.address, x.strides)
    if not is_x and buffers.may_overlap(out, x):
        raise ValueError("out overlaps x; it must be x itself or lie apart from it")
    if buffers.may_overlap(out, y):
        raise ValueError("out overlaps y")


def check_labels(at: Call, bad: int = 0) -> None:
    """Raises ValueError if there are labels that are neither a class nor the ignore label.

    `bad`: how many a kernel met; 0 if it does not say.
    """
    ignore = at.spec.ignore_label
    y = buffers.to_host(at.labels)
    position, found = None, 0
    for n, sample in enumerate(y):  # one sample at a time: a mask of all of y could be large
        wrong = (sample < 0) | (sample >= at.classes)
        if ignore is not None:
            wrong &= sample != ignore
        if position is None and wrong.any():
            position = (n, *map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
            if bad:
                break
        found += int(wrong.sum())
    if position is None and not bad:
        return
    if position is None:
        raise ValueError("y was changed by another thread while it was read")
    bad = bad or found
    has_channel_axis = len(at.labels.owner.shape) > len(position)
    where = (position[0], 0, *position[1:]) if has_channel_axis else position
    ignored = "no label is ignored" if ignore is None else f"{ignore} is ignored"
    raise ValueError(
        f"y has {bad} label{'s'[: bad != 1]} outside [0, {at.classes}) ({ignored}); "
        f"the first is {y[position]} at {where}"
    )


def power(p: Any) -> int:
    """The integer p >= 1 of P = sum s^p."""
    value = _integer(p, "p")
    if not 1 <= value < 2**31:
        raise ValueError(f"p must be an integer from 1 to 2**31 - 1, got {value}")
    return value


def label(ignore_label: Any) -> int | None:
    """Any integer, or None for no ignored label."""
    return None if ignore_label is None else _integer(ignore_label, "ignore_label")


def channel(ignore_channel: Any) -> int:
    """Any integer; outside [0, C) it has no effect."""
    return _integer(ignore_channel, "ignore_channel")


def smoothing(smooth: Any) -> float:
    """A finite number >= 0."""
    return number(smooth, "smooth")


def focusing(gamma: Any) -> float:
    """The finite gamma >= 0 of a focal loss."""
    return number(gamma, "gamma")


def number(value: Any, name: str) -> float:
    """A finite number >= 0."""
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond any float
        result = math.inf
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {result}")
    return result


def one_of(value: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if it is not."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def reduction(name: Any) -> str:
    """One of REDUCTIONS."""
    one_of(name, "reduction", REDUCTIONS)
    return str(name)


def weights(weight: Any) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Finite numbers in float64, or None."""
    if weight is None:
        return None
    try:
        array = np.asarray(weight).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"weight must be numbers, one per class, got {weight!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"weight must be finite, got {array.tolist()}")
    return array


def check_weight(weight: Any, length: int) -> None:
    """`weight`, an array of either library, has one entry per class."""
    if tuple(weight.shape) != (length,):
        note = " (one channel is two classes, background and foreground)" if length == 2 else ""
        raise ValueError(
            f"weight must have {length} entries, one per class{note}, "
            f"got shape {tuple(weight.shape)}"
        )


def upstream(grad_loss: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The incoming gradient of a loss of this shape, in float64."""
    try:
        array = np.asarray(grad_loss).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(f"grad_loss must be numbers, got {type(grad_loss).__name__}") from None
    if array.shape not in ((), shape):
        raise ValueError(f"grad_loss must have the loss's shape {shape}, got {array.shape}")
    return np.broadcast_to(array, shape)


def check_upstream(grad_loss: Buffer, shape: tuple[int, ...], dtype: str, at: Call) -> None:
    """The incoming gradient, on the logits' device, fits a loss of this shape and dtype."""
    for what, expected, got in (
        ("shape", shape, grad_loss.shape),
        ("dtype", dtype, grad_loss.dtype),
        ("device", at.logits.device, grad_loss.device),
    ):
        if got != expected:
            raise ValueError(f"grad_loss must have the loss's {what} {expected}, got {got}")


def _integer(value: Any, name: str) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
