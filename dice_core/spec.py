"""Spec: what a call sums over the voxels. Signature: a Spec and the layouts of the arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import checks
from .buffers import Layout

ACTIVATIONS = ("softmax", "sigmoid", "none")
DECISIONS = {"softmax": "argmax", "sigmoid": "threshold"}  # activation -> the hard decision
TARGETS = ("labels", "soft", "binary")

# The names of the sums, in the order of the K axis. The first three are always there.
INTERSECTION, PRED_SUM, TARGET_SUM = BASIC = ("intersection", "pred_sum", "target_sum")
CROSS_ENTROPY = "cross_entropy_sum"
NLL = "nll_sum"
POSITIVE, NEGATIVE = BINARY = ("positive_sum", "negative_sum")
TARGET_SQUARE = "target_square_sum"
VOXELS = "voxel_count"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a kernel sums over the valid voxels of each sample, for every class.

    With s the probabilities, t the targets (one-hot labels, or soft) and m = 1 for valid voxels:
    ``intersection`` sum m s t, ``pred_sum`` sum m s^p, ``target_sum`` sum m t, and the optional
    sums below.

    - activation: s is the "softmax" over channels, of a single channel (1 - sigmoid, sigmoid); the
      "sigmoid" of each channel; or the input itself ("none"). Or a hard decision, which has no
      gradient: "argmax" is 1 for the largest logit (the first of equals; NaN ranks as +inf),
      "threshold" for logits above 0.
    - p: exponent of s in pred_sum.
    - ignore_label: voxels with this label are ignored; None for no such label. In soft targets it
      marks individual channels of a voxel.
    - gamma: adds ``cross_entropy_sum``, sum m t (1 - q)^gamma (-log q) with q the softmax: plain
      cross-entropy for 0, focal loss above.
    - nll: adds ``nll_sum``, sum m (-log q) for every class, whatever the voxel's own.
    - binary_gamma: adds ``positive_sum``, sum m t (1 - b)^gamma (-log b), and ``negative_sum``,
      sum m (1 - t) b^gamma (-log(1 - b)), with b the sigmoid.
    - target_square: adds ``target_square_sum``, sum m t^2, of soft targets; of labels it would be
      target_sum again, and is not summed.
    - targets: "labels" are class indices (N, *). "soft" targets (N, C, *) are the degree, in [0,
      1], to which each voxel belongs to each class; "binary" targets are 0 or 1, and anything else
      is out of range. Both add ``voxel_count``, sum m.
    """

    activation: str = "softmax"
    p: int = 1
    ignore_label: int | None = None
    gamma: float | None = None
    nll: bool = False
    binary_gamma: float | None = None
    target_square: bool = False
    targets: str = "labels"

    # Derived from these: the names of the sums, in the order of the K axis; whether targets have a
    # channel for each class; whether this is a softmax and labels with no sums but the first four;
    # whether a softmax is needed.
    fields: tuple[str, ...] = field(init=False, repr=False, compare=False)
    soft_targets: bool = field(init=False, repr=False, compare=False)
    plain: bool = field(init=False, repr=False, compare=False)
    needs_softmax: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        soft = self.targets != "labels"
        names = [*BASIC]
        if self.gamma is not None:
            names.append(CROSS_ENTROPY)
        if self.nll:
            names.append(NLL)
        if self.binary_gamma is not None:
            names += BINARY
        if soft and self.target_square:
            names.append(TARGET_SQUARE)
        if soft:
            names.append(VOXELS)
        usual = not (self.nll or soft) and self.binary_gamma is None
        softmax = self.activation == "softmax"
        for name, value in (
            ("fields", tuple(names)),
            ("soft_targets", soft),
            ("plain", softmax and usual),
            ("needs_softmax", softmax or self.gamma is not None or self.nll),
        ):
            object.__setattr__(self, name, value)

    def classes(self, channels: int) -> int:
        """C of the sums for this many channels; a softmax of a single channel has two classes."""
        return max(2, channels) if self.activation in ("softmax", "argmax") else channels

    def sums_shape(self, logits: Sequence[int]) -> tuple[int, int, int]:
        """(K, N, C) of the sums of logits (N, channels, *)."""
        return len(self.fields), logits[0], self.classes(logits[1])

    def __str__(self) -> str:
        words = [self.activation, f"p = {self.p}", f"ignore_label = {self.ignore_label}"]
        for name in ("gamma", "binary_gamma"):
            if getattr(self, name) is not None:
                words.append(f"{name} = {getattr(self, name):g}")
        words += ["nll"] * self.nll + ["target_square"] * self.target_square
        words += [f"{self.targets} targets"] * self.soft_targets
        return ", ".join(words)


def checked(
    *,
    activation: Any = "softmax",
    p: Any = 1,
    ignore_label: Any = None,
    gamma: Any = None,
    nll: Any = False,
    binary_gamma: Any = None,
    target_square: Any = False,
    targets: Any = "labels",
) -> Spec:
    """The checked Spec of these options. Raises TypeError or ValueError naming what is wrong."""
    checks.one_of(activation, "activation", ACTIVATIONS)
    checks.one_of(targets, "targets", TARGETS)
    return Spec(
        activation,
        checks.power(p),
        checks.ignore_label(ignore_label),
        None if gamma is None else checks.number(gamma, "gamma"),
        checks.flag(nll, "nll"),
        None if binary_gamma is None else checks.number(binary_gamma, "binary_gamma"),
        checks.flag(target_square, "target_square"),
        targets,
    )


def decision(activation: Any, ignore_label: Any) -> Spec:
    """The Spec of the sums of hard decisions instead of probabilities. Raises as `checked` does."""
    checks.one_of(activation, "activation", tuple(DECISIONS))
    return Spec(DECISIONS[activation], ignore_label=checks.ignore_label(ignore_label))


@dataclass(frozen=True, eq=False, slots=True)
class Signature:
    """The layouts of a call's logits (N, C, *) and targets, labels (N, *) or soft (N, C, *), and
    the sums to compute. Calls with the same layouts and Spec share an instance.
    """

    logits: Layout
    labels: Layout
    spec: Spec
    sums_shape: tuple[int, int, int]  # (K, N, C)
    loss_dtype: str  # float32 for half-precision logits

    def __str__(self) -> str:
        return f"logits  {self.logits}\nlabels  {self.labels}\n{self.spec}"


@functools.lru_cache(1024)
def signature(logits: Layout, labels: Layout, spec: Spec) -> Signature:
    """A checked Signature: `spec.targets` is derived from the shapes, and labels (N, 1, *) become
    (N, *). Raises TypeError or ValueError for arrays that do not fit together.
    """
    spec = for_shapes(logits.shape, labels.shape, spec)
    checks.dtypes(logits.dtype, labels.dtype, spec.soft_targets)
    checks.same_device(logits.device, labels.device)
    if not spec.soft_targets and len(labels.shape) == len(logits.shape):
        labels = labels.without_axis(1)
    loss_dtype = "float64" if logits.dtype == "float64" else "float32"
    return Signature(logits, labels, spec, spec.sums_shape(logits.shape), loss_dtype)


def for_shapes(x: Sequence[int], y: Sequence[int], spec: Spec) -> Spec:
    """The Spec with `targets` derived from the shapes: "labels" for y (N, *) or (N, 1, *), "soft"
    or, if requested, "binary" for y of x's shape (N, C, *).

    For a softmax a single channel is two classes with labels; otherwise it is one class with soft
    targets.
    """
    x, y = tuple(x), tuple(y)
    checks.shapes(x, y)
    one_class = x[1] == 1 and spec.classes(1) == 1
    soft = y == x and (x[1] > 1 or one_class)
    if one_class and not soft:
        raise ValueError(
            f"y must have x's shape {x} for a single channel with activation "
            f"{spec.activation!r}, got {y}"
        )
    targets = "labels" if not soft else "binary" if spec.targets == "binary" else "soft"
    return spec if targets == spec.targets else replace(spec, targets=targets)
