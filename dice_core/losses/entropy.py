"""Cross-entropy and focal loss, of the softmax and of each channel's sigmoid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import spec
from .terms import Array, Settings, Sums, assign, ignored, left_out, namespace


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Entropy(Settings):
    """A weighted sum of entropy sums, divided by a number of voxels; 0 of no voxels.

    - weight: (C,) numbers that multiply the classes' sums; None for 1.
    - pool: "batch", one mean over all counted voxels of all samples; "none", one per sample.
    - reduction: of the samples' means, "mean", "sum", or "none" -> (N,); or "classes" -> (N, C),
      each class's part of its sample's (pool "batch": of the) loss.
    """

    pool: str = "batch"
    divisor: str = "voxels"

    divisors: ClassVar[tuple[str, ...]] = ("voxels", "one")

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.one_of(self.pool, "pool", ("none", "batch"))
        spec.one_of(self.divisor, "divisor", self.divisors)
        if self.reduction == "none" and self.pool == "batch":
            raise ValueError("pool='batch' leaves nothing per sample: reduction 'none'")

    def _factors(self, like: Array) -> dict[str, Any]:
        """What each row is multiplied by, (C,) or a number."""
        raise NotImplementedError

    def _counted(self, sums: Sums) -> Array:
        """(N,): what the weighted sums are divided by."""
        raise NotImplementedError

    def value(self, sums: Sums) -> Array:
        return self._value(sums)[0]

    def with_derivative(
        self, sums: Array, names: Sequence[str] = spec.STATISTICS
    ) -> tuple[Array, Array]:
        value, shares = self._value(Sums.of(sums, names))
        derivative = np.zeros(sums.shape)
        for name, share in shares.items():
            derivative[names.index(name)] = share
        return value, derivative

    def _value(self, sums: Sums) -> tuple[Array, dict[str, Array]]:
        """The loss, and its derivative for the rows that have one."""
        if self.pool == "batch":
            sums = sums.of_batch()
        counted: Array | float = 1.0
        if self.divisor != "one":
            counted = self._counted(sums)[:, None]
            counted = namespace(counted).where(counted == 0, math.inf, counted)
        samples = len(sums.target_sum)
        if self.reduction == "mean" and samples > 1:
            counted = counted * samples
        factors = self._factors(sums.target_sum)
        shares = {name: factor / counted for name, factor in factors.items()}
        value = sum(getattr(sums, name) * share for name, share in shares.items())
        if self.reduction != "classes":
            value = value.sum(-1) if self.reduction == "none" else value.sum()
        if self.reduction == "mean" and not samples:
            value = value + math.nan  # the mean of nothing
        return value, shares


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CrossEntropy(Entropy):
    """sum_c w_c H_c / sum_c w_c Y_c, H the sum of -log s over a class's voxels.

    - label_smoothing: from 0 to 1, how much of the target is spread over all C classes, with L the
      sum of -log s over all voxels: (1 - e) w_c H_c + e w_c L_c / C in place of w_c H_c.
    - divisor: "weights", sum_c w_c Y_c, as torch has it; "voxels", as many as are counted; "one".

    Source: torch. Settings: `Entropy`.
    """

    label_smoothing: float = 0.0
    divisor: str = "weights"

    divisors: ClassVar[tuple[str, ...]] = ("weights", "voxels", "one")

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = spec.number(self.label_smoothing, "label_smoothing")
        if smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1, got {smoothing}")
        assign(self, label_smoothing=smoothing)

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"gamma": 0.0, **({"smoothing": True} if self.label_smoothing else {})}

    def _factors(self, like: Array) -> dict[str, Any]:
        weight = namespace(like).ones_like(like[:1]) if self.weight is None else self.weight
        smoothing = self.label_smoothing
        factors = {spec.CROSS_ENTROPY: weight if not smoothing else (1 - smoothing) * weight}
        if smoothing:
            factors[spec.SMOOTHING] = smoothing / like.shape[1] * weight
        return factors

    def _counted(self, sums: Sums) -> Array:
        if self.divisor == "voxels":
            return sums.voxels
        count = sums.target_sum
        return (count if self.weight is None else count * self.weight).sum(-1)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Focal(Entropy):
    """sum_c w_c H_c / V, H the sum of (1 - s)^gamma (-log s) over a class's voxels, V how many are
    counted.

    - divisor: "voxels", V; "one".

    Source: Lin et al., 2017. Settings: `Entropy`.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, gamma=spec.focusing(self.gamma))

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"gamma": self.gamma}

    def _factors(self, like: Array) -> dict[str, Any]:
        weight = namespace(like).ones_like(like[:1]) if self.weight is None else self.weight
        return {spec.CROSS_ENTROPY: weight}

    def _counted(self, sums: Sums) -> Array:
        return sums.voxels


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BinaryCrossEntropy(Entropy):
    """sum_c w_c (u_c B+_c + B-_c) / (C V): each channel's sigmoid s against its own target, B+ the
    sum of -log s over a class's voxels, B- of -log(1 - s) over the others.

    Of a single channel with class labels, which is two classes, that of the foreground is
    ignore_channel=0.

    - pos_weight: (C,) numbers u; None for 1.
    - ignore_channel: the class, or classes, left out, of C too; outside [0, C) without effect.
    - divisor: "voxels", how many are counted times C; "one".

    Source: torch. Settings: `Entropy`.
    """

    pos_weight: Any = None
    ignore_channel: Any = -1

    arrays: ClassVar[tuple[str, ...]] = ("weight", "pos_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, ignore_channel=ignored(self.ignore_channel))

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"binary_gamma": 0.0}

    def _factors(self, like: Array) -> dict[str, Any]:
        out = left_out(self.ignore_channel, like.shape[1])
        weight = namespace(like).ones_like(like[:1])
        weight[:, out] = 0
        if self.divisor != "one":
            weight = weight / max(like.shape[1] - len(set(out)), 1)
        if self.weight is not None:
            weight = weight * self.weight
        positive, negative = self._halves()
        return {spec.BINARY[0]: positive * weight, spec.BINARY[1]: negative * weight}

    def _halves(self) -> tuple[Any, Any]:
        """What B+ and B- are multiplied by."""
        return 1.0 if self.pos_weight is None else self.pos_weight, 1.0

    def _counted(self, sums: Sums) -> Array:
        return sums.voxels


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SigmoidFocal(BinaryCrossEntropy):
    """`BinaryCrossEntropy` with B+ the sum of (1 - s)^gamma (-log s), B- of s^gamma (-log(1 - s)).

    - alpha: B+ counts alpha, B- 1 - alpha, from 0 to 1; None for 1 both.

    Source: Lin et al., 2017. Settings: `Entropy`.
    """

    gamma: float = 2.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, gamma=spec.focusing(self.gamma))
        if self.alpha is not None:
            assign(self, alpha=spec.number(self.alpha, "alpha"))
            if self.alpha > 1:
                raise ValueError(f"alpha must be at most 1, got {self.alpha}")

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"binary_gamma": self.gamma}

    def _halves(self) -> tuple[Any, Any]:
        positive, negative = super()._halves()
        if self.alpha is None:
            return positive, negative
        return positive * self.alpha, 1 - self.alpha
