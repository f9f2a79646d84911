"""Cross-entropy and focal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import spec
from .terms import Array, Settings, Sums, assign, namespace


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CrossEntropy(Settings):
    """sum_c w_c H_c / sum_c w_c Y_c, H the sum of -log s over a class's voxels; 0 of no voxels.

    - weight: (C,) numbers w; None for 1.
    - pool: "batch", one mean over all counted voxels of all samples; "none", one per sample.
    - divisor: "weights", sum_c w_c Y_c; "voxels", as many as are counted; "one".
    - reduction: of the samples' means, "mean", "sum", or "none" -> (N,); or "classes" -> (N, C),
      each class's part of its sample's (pool "batch": of the) loss.
    """

    pool: str = "batch"
    divisor: str = "weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.one_of(self.pool, "pool", ("none", "batch"))
        spec.one_of(self.divisor, "divisor", ("weights", "voxels", "one"))
        if self.reduction == "none" and self.pool == "batch":
            raise ValueError("pool='batch' leaves nothing per sample: reduction 'none'")

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"gamma": 0.0}

    def value(self, sums: Sums) -> Array:
        return self._value(sums)[0]

    def with_derivative(
        self, sums: Array, names: Sequence[str] = spec.STATISTICS
    ) -> tuple[Array, Array]:
        value, share = self._value(Sums.of(sums, names))
        derivative = np.zeros(sums.shape)
        derivative[names.index(spec.CROSS_ENTROPY)] = share
        return value, derivative

    def _value(self, sums: Sums) -> tuple[Array, Array]:
        """The loss, and its derivative for H."""
        entropy, count = sums.cross_entropy_sum, sums.target_sum
        if self.pool == "batch":
            entropy, count = entropy.sum(0)[None], count.sum(0)[None]
        weight = namespace(count).ones_like(count[0]) if self.weight is None else self.weight
        if self.divisor == "one":
            share = weight[None]
        else:
            counted = (count * weight if self.divisor == "weights" else count).sum(-1)[:, None]
            share = weight / namespace(count).where(counted == 0, math.inf, counted)
        samples = len(entropy)
        if self.reduction == "mean":
            share = share / max(samples, 1)
        value = entropy * share
        if self.reduction != "classes":
            value = value.sum(-1) if self.reduction == "none" else value.sum()
        if self.reduction == "mean" and not samples:
            value = value + math.nan  # the mean of nothing
        return value, share


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Focal(CrossEntropy):
    """Cross-entropy with H the sum of (1 - s)^gamma (-log s) over a class's voxels."""

    gamma: float = 2.0
    divisor: str = "voxels"

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, gamma=spec.focusing(self.gamma))

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"gamma": self.gamma}
