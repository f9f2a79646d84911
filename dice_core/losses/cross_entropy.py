"""Cross-entropy and focal loss, of the softmax and of each channel's sigmoid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import checks, spec
from ..sums import Statistics
from .terms import Array, Settings, assign, ignored_channels, namespace


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class VoxelLoss(Settings):
    """A weighted sum over classes of the voxels' losses, divided by the number of valid voxels or
    by another count.

    - weight: (C,) numbers that multiply the classes' sums; None for 1.
    - pool: "batch", one mean over all valid voxels of all samples; "none", one per sample.
    - reduction: of the samples' means, "mean", "sum", or "none" -> (N,); or "classes" -> (N, C),
      each class's part of the loss of its sample (pool "batch": of the batch). "batch" is pool
      "batch" with "mean".
    - divisor: "voxels", the number of valid voxels; "one", no division.
    - empty: a mean over no voxels is "perfect", 0, or "nan".
    """

    pool: str = "batch"
    divisor: str = "voxels"
    empty: str = "perfect"

    divisors: ClassVar[tuple[str, ...]] = ("voxels", "one")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of(self.divisor, "divisor", self.divisors)
        checks.one_of(self.empty, "empty", ("perfect", "nan"))

    def factors(self, xp: Any, like: Array) -> dict[str, Any]:
        """The factor of each sum, (C,) or a number; `like` is a row (N, C)."""
        raise NotImplementedError

    def count(self, sums: Statistics) -> Array:
        """(N,): the divisor of the weighted sums."""
        return sums.voxels

    def value(self, sums: Statistics) -> Array:
        return self._evaluate(sums)[0]

    def with_derivative(self, sums: Statistics) -> tuple[Array, Array]:
        value, shares = self._evaluate(sums)
        derivative = np.zeros(sums.array.shape)
        for name, share in shares.items():
            derivative[sums.spec.fields.index(name)] = share
        return value, derivative

    def _evaluate(self, sums: Statistics) -> tuple[Array, dict[str, Array]]:
        """The loss, and its derivatives with respect to the sums that it depends on."""
        xp = namespace(sums.array)
        if self.pool == "batch":
            sums = sums.pooled()
        count: Any = 1.0
        if self.divisor != "one":
            count = self.count(sums)[:, None]
            count = xp.where(count == 0, math.inf if self.empty == "perfect" else math.nan, count)
        samples = sums.array.shape[1]
        if self.reduction == "mean" and samples > 1:
            count = count * samples
        factors = self.factors(xp, sums.target_sum)
        shares = {name: factor / count for name, factor in factors.items()}
        channels = getattr(self, "ignore_channel", -1)
        if channels != -1:  # 0 times the NaN of an excluded class would be NaN
            kept = xp.ones_like(sums.target_sum[:1])
            kept[:, ignored_channels(channels, kept.shape[1])] = 0
            sums = Statistics(xp.where(kept > 0, sums.array, 0.0), sums.spec, sums.dtype)
        value = sum(sums.row(name) * share for name, share in shares.items())
        if self.reduction != "classes":
            value = value.sum(-1) if self.reduction == "none" else value.sum()
        if self.reduction == "mean" and not samples:
            value = value + math.nan  # the mean of an empty batch
        return value, shares


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CrossEntropy(VoxelLoss):
    """sum_c w_c H_c / sum_c w_c Y_c, H the sum of -log s over a class's voxels.

    - label_smoothing: e from 0 to 1, how much of the target is distributed evenly over all C
      classes: (1 - e) w_c H_c + e w_c L_c / C in place of w_c H_c, L the sum of -log s over all
      valid voxels.
    - divisor: "weights", as in torch: sum_c w_c Y_c for labels, the number of valid voxels for soft
      targets; "voxels", that number always; "one", no division.

    Source: torch. Settings: `VoxelLoss`.
    """

    label_smoothing: float = 0.0
    divisor: str = "weights"

    divisors: ClassVar[tuple[str, ...]] = ("weights", "voxels", "one")

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = checks.number(self.label_smoothing, "label_smoothing", largest=1)
        needs = {"gamma": 0.0, "nll": True} if smoothing else {"gamma": 0.0}
        self.settle(needs, label_smoothing=smoothing)

    def factors(self, xp: Any, like: Array) -> dict[str, Any]:
        weight = 1.0 if self.weight is None else self.weight
        smoothing = self.label_smoothing
        if not smoothing:
            return {spec.CROSS_ENTROPY: weight}
        return {
            spec.CROSS_ENTROPY: (1 - smoothing) * weight,
            spec.NLL: smoothing / like.shape[1] * weight,
        }

    def count(self, sums: Statistics) -> Array:
        if self.divisor == "voxels" or sums.spec.soft_targets:
            return sums.voxels
        target_sum = sums.target_sum
        return (target_sum if self.weight is None else target_sum * self.weight).sum(-1)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Focal(VoxelLoss):
    """sum_c w_c H_c / V, H the sum of (1 - s)^gamma (-log s) over a class's voxels, V the number of
    valid voxels.

    Source: Lin et al., 2017. Settings: `VoxelLoss`.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma = checks.number(self.gamma, "gamma")
        self.settle({"gamma": gamma}, gamma=gamma)

    def factors(self, xp: Any, like: Array) -> dict[str, Any]:
        return {spec.CROSS_ENTROPY: 1.0 if self.weight is None else self.weight}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BinaryCrossEntropy(VoxelLoss):
    """sum_c w_c (u_c B+_c + B-_c) / (C V): each channel's sigmoid s against its own target, B+ the
    sum of -log s over a class's voxels, B- of -log(1 - s) over the others.

    A single channel with class labels is two classes; ignore_channel=0 leaves the foreground only.

    - pos_weight: (C,) numbers u; None for 1.
    - ignore_channel: the class or classes excluded, from C too; no effect outside [0, C).
    - divisor: "voxels", the number of valid voxels times C; "one", no division.

    Source: torch. Settings: `VoxelLoss`.
    """

    pos_weight: Any = None
    ignore_channel: Any = -1

    of_classes: ClassVar[tuple[str, ...]] = ("weight", "pos_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = checks.ignore_channel(self.ignore_channel)
        self.settle({"binary_gamma": 0.0}, ignore_channel=channels)

    def factors(self, xp: Any, like: Array) -> dict[str, Any]:
        out, weight = ignored_channels(self.ignore_channel, like.shape[1]), xp.ones_like(like[:1])
        weight[:, out] = 0
        if self.divisor != "one":
            weight = weight / max(like.shape[1] - len(set(out)), 1)
        if self.weight is not None:
            weight = weight * self.weight
        positive, negative = self._halves()
        return {spec.POSITIVE: positive * weight, spec.NEGATIVE: negative * weight}

    def _halves(self) -> tuple[Any, Any]:
        """The factors of B+ and B-."""
        return 1.0 if self.pos_weight is None else self.pos_weight, 1.0


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SigmoidFocal(BinaryCrossEntropy):
    """`BinaryCrossEntropy` with B+ the sum of (1 - s)^gamma (-log s), B- of s^gamma (-log(1 - s)).

    - alpha: multiplies B+, and 1 - alpha B-, from 0 to 1; None for 1 both.

    Source: Lin et al., 2017. Settings: `VoxelLoss`.
    """

    gamma: float = 2.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma = checks.number(self.gamma, "gamma")
        self.settle({"binary_gamma": gamma}, gamma=gamma)
        if self.alpha is not None:
            assign(self, alpha=checks.number(self.alpha, "alpha", largest=1))

    def _halves(self) -> tuple[Any, Any]:
        positive, negative = super()._halves()
        if self.alpha is None:
            return positive, negative
        return positive * self.alpha, 1 - self.alpha
