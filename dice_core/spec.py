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
CROSS_ENTROPY = "cross_entropy_sum"  # then those of these that are asked for
SMOOTHING = "smoothing_sum"
BINARY = ("positive_sum", "negative_sum")
VOXELS = "voxel_sum"
ACTIVATIONS = ("softmax", "sigmoid", "none")
HARD = {"softmax": "argmax", "sigmoid": "threshold"}  # what they decide for
# A Spec's fields, as callers call them.
OPTIONS = {
    "activation": "activation",
    "power": "p",
    "gamma": "gamma",
    "smoothing": "smoothing",
    "binary_gamma": "binary_gamma",
}
REDUCTIONS = ("none", "mean", "sum", "batch")
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


@dataclass(frozen=True, slots=True)
class Spec:
    """What a kernel sums over the voxels of a call.

    - activation: scores are "softmax" over the channels, a single one being the second of two whose
      first is 0; "sigmoid" of each channel; "none", the logits themselves. Or decisions, without a
      gradient: "argmax" scores the largest 1, the first of equals, NaN as +inf, and "threshold"
      logits above 0.
    - power: P sums score**power.
    - ignore_label: voxels so labelled contribute to nothing; None for no such label. Of dense
      targets it is each channel's own.
    - gamma: H sums (1 - s)**gamma (-log s), s the softmax, of each voxel's own class, cross-entropy
      for 0 and focal loss above; None for no such sum.
    - smoothing: L sums -log s over all counted voxels, whatever their class.
    - binary_gamma: B+ and B- sum, s being the sigmoid, (1 - s)**binary_gamma (-log s) over the
      voxels of the class and s**binary_gamma (-log(1 - s)) over the others; None for no such sums.
    - dense: labels are (N, C, *), how much of each class from 0 to 1, not class indices; V then
      counts the voxels.
    """

    activation: str = "softmax"
    power: int = 1
    ignore_label: int | None = None
    gamma: float | None = None
    smoothing: bool = False
    binary_gamma: float | None = None
    dense: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the sums, in the order of the K axis."""
        names: tuple[str, ...] = STATISTICS
        if self.gamma is not None:
            names = (*names, CROSS_ENTROPY)
        if self.smoothing:
            names = (*names, SMOOTHING)
        if self.binary_gamma is not None:
            names = (*names, *BINARY)
        return (*names, VOXELS) if self.dense else names

    @property
    def plain(self) -> bool:
        """Whether it is only softmax, labels, I, P, Y and maybe H."""
        return (
            self.activation == "softmax"
            and not self.smoothing
            and self.binary_gamma is None
            and not self.dense
        )

    @property
    def softmax(self) -> bool:
        """Whether there is a sum of softmax scores."""
        return self.activation == "softmax" or self.gamma is not None or self.smoothing

    def classes(self, channels: int) -> int:
        """How many classes so many channels score."""
        return max(2, channels) if self.activation in ("softmax", "argmax") else channels

    def sums_shape(self, x: Sequence[int]) -> tuple[int, int, int]:
        """(K, N, C) of the statistics of logits (N, channels, *)."""
        return len(self.statistics), x[0], self.classes(x[1])

    def __str__(self) -> str:
        more = [
            f"{name} = {value:g}"
            for name, value in (("gamma", self.gamma), ("binary_gamma", self.binary_gamma))
            if value is not None
        ]
        more += ["smoothing"] * self.smoothing + ["dense targets"] * self.dense
        known = (self.activation, f"p = {self.power}", f"ignore_label = {self.ignore_label}")
        return ", ".join((*known, *more))


@dataclass(frozen=True, eq=False, slots=True)
class Signature:
    """What a call looks like: how its logits (N, C, *) and labels (N, *), or dense (N, C, *), lie,
    and what to sum.

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
        """C of the statistics."""
        return self.spec.classes(self.logits.shape[1])

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """(K, N, C) of the statistics."""
        return self.spec.sums_shape(self.logits.shape)


def asked(
    *,
    p: Any = 1,
    ignore_label: Any = None,
    gamma: Any = None,
    smoothing: Any = False,
    binary_gamma: Any = None,
    activation: Any = "softmax",
) -> Spec:
    """What these options ask for. Raises TypeError or ValueError naming what does not fit."""
    one_of(activation, "activation", ACTIVATIONS)
    return Spec(
        activation,
        power(p),
        label(ignore_label),
        None if gamma is None else focusing(gamma),
        bool(smoothing),
        None if binary_gamma is None else number(binary_gamma, "binary_gamma"),
    )


def call(logits: Buffer, labels: Buffer, spec: Spec | None = None, **options: Any) -> Call:
    """The checked request, for a Spec or the options of `asked`. Raises TypeError or ValueError
    naming what does not fit.
    """
    seen = signature(logits.layout, labels.layout, spec or asked(**options))
    if labels.layout is not seen.labels:
        labels = replace(labels, layout=seen.labels)
    return Call(logits, labels, seen)


@functools.lru_cache(1024)
def signature(logits: Layout, labels: Layout, spec: Spec) -> Signature:
    """Of what is asked for; the rest is checked here."""
    spec = of_shapes(logits.shape, labels.shape, spec)
    if logits.dtype not in FLOATS:
        raise TypeError(
            f"x must hold floating-point logits ({', '.join(FLOATS)}), got {logits.dtype}"
        )
    if labels.dtype not in INTEGERS and not (spec.dense and labels.dtype in FLOATS):
        hint = "; cast them to an integer dtype" if labels.dtype in FLOATS else ""
        raise TypeError(f"y must hold integer or bool class labels, got {labels.dtype}{hint}")
    if logits.device != labels.device:
        raise ValueError(f"x is on {logits.device} but y is on {labels.device}")
    if not spec.dense and len(labels.shape) == len(logits.shape):
        labels = labels.without_axis(1)
    return Signature(logits, labels, spec)


def of_shapes(x: Sequence[int], y: Sequence[int], spec: Spec) -> Spec:
    """The same, with dense targets if they are y's. Raises ValueError for shapes that do not fit.

    x is (N, C, *) with C >= 1; y is (N, *) or (N, 1, *), or for dense targets like x.
    """
    x, y = tuple(x), tuple(y)
    check_shapes(x, y)
    one_class = x[1] == 1 and spec.classes(1) == 1
    dense = y == x and (x[1] > 1 or one_class)
    if one_class and not dense:
        raise ValueError(
            f"y must have x's shape {x} for a single channel of activation {spec.activation!r}, "
            f"got {y}"
        )
    return replace(spec, dense=dense) if dense != spec.dense else spec


def check_shapes(x: Sequence[int], y: Sequence[int]) -> None:
    """x is (N, C, *) with C >= 1; y is (N, *), (N, 1, *) or like x."""
    x, y = tuple(x), tuple(y)
    if len(x) < 2:
        raise ValueError(f"x must have at least two axes, (N, C, d1, d2, ...), got shape {x}")
    if x[1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {x}")
    labels = (x[0], *x[2:]), (x[0], 1, *x[2:])
    if y not in (*labels, x):
        raise ValueError(
            f"y must have shape {labels[0]} or {labels[1]} for x of shape {x}, got {y}; "
            f"dense targets have x's shape"
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
    """Raises ValueError if there are labels that are neither a class nor the ignore label, or dense
    targets outside [0, 1].

    `bad`: how many a kernel met; 0 if it does not say.
    """
    ignore, dense = at.spec.ignore_label, at.spec.dense
    y = buffers.to_host(at.labels)
    position, found = None, 0
    for n, sample in enumerate(y):  # one sample at a time: a mask of all of y could be large
        if dense and sample.dtype.kind not in "biu":  # half precision would round the ignore label
            sample = sample.astype(np.float64)
        wrong = ~(sample <= 1) if dense else sample >= at.classes
        wrong |= sample < 0
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
    kind, allowed = ("value", "[0, 1]") if dense else ("label", f"[0, {at.classes})")
    raise ValueError(
        f"y has {bad} {kind}{'s'[: bad != 1]} outside {allowed} ({ignored}); "
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
