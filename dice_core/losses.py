"""Losses as plain arithmetic on statistics: pool, score, penalty, average.

Everything here is small: `sums` is (K, N, C) with K = intersection I, pred_sum P, target_sum Y, in
float64, a NumPy array or a torch tensor. Values are written once for both; torch differentiates
them, NumPy callers use `pullback`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import spec

Array = Any  # of either library


@dataclass(frozen=True)
class Ratio:
    """A score q = (a . sums + smooth) / (b . sums + smooth), one number of a and b per statistic.

    Nothing predicted where nothing is, 0/0, is a perfect score of 1 with derivative 0.
    """

    a: tuple[float, float, float]
    b: tuple[float, float, float]

    def __call__(self, sums: Array, smooth: float) -> Array:
        """(K, N, C) -> (N, C)."""
        num, den, empty = self._parts(sums, smooth)
        xp = namespace(sums)
        return xp.where(empty, xp.ones_like(num), num / den)

    def pullback(self, sums: Array, smooth: float, grad: Array) -> Array:
        """(N, C) -> (K, N, C): dq/dsums_k = (a_k - q b_k) / den."""
        num, den, empty = self._parts(sums, smooth)
        xp = namespace(sums)
        grad = xp.where(empty, xp.zeros_like(num), grad / den)
        return xp.stack([(a - num / den * b) * grad for a, b in zip(self.a, self.b, strict=True)])

    def _parts(self, sums: Array, smooth: float) -> tuple[Array, Array, Array]:
        num, den = (
            sum(k * s for k, s in zip(row, sums, strict=True) if k) + smooth
            for row in (self.a, self.b)
        )
        empty = den == 0
        # A denominator of 1 there keeps NaN out of what torch differentiates but does not choose.
        return num, namespace(sums).where(empty, namespace(sums).ones_like(den), den), empty


DICE = Ratio(a=(2, 0, 0), b=(0, 1, 1))  # 2 I / (P + Y)


@dataclass(frozen=True)
class Dice:
    """loss_c = 1 - (2 I + smooth) / (P + Y + smooth), combined over classes and samples.

    - weight: (C,) numbers in the sums' library, or None for 1/C each.
    - ignore_channel: the class whose term is left out (it still counts in that 1/C), if in [0, C).
    - smooth: added above and below, >= 0.
    - reduction: "none" -> (N,); "mean" and "sum" over samples -> (); "batch" -> (), the sums pooled
      over samples first.
    """

    weight: Array | None = None
    ignore_channel: int = -1
    smooth: float = 0.0
    reduction: str = "mean"

    def __call__(self, sums: Array) -> Array:
        """(K, N, C) -> the loss."""
        pooled = self._pool(sums)
        penalty = 1 - DICE(pooled, self.smooth)
        return self._average((penalty * self._class_weights(pooled)).sum(-1))

    def pullback(self, sums: Array, grad: Array) -> Array:
        """dLoss/dsums (K, N, C), multiplied by the incoming gradient of the loss's shape."""
        pooled = self._pool(sums)
        of_penalty = self._average_pullback(grad, pooled)[:, None] * self._class_weights(pooled)
        of_pooled = DICE.pullback(pooled, self.smooth, -of_penalty)
        return of_pooled + namespace(sums).zeros_like(sums)  # every sample of a pooled batch alike

    def _pool(self, sums: Array) -> Array:
        return sums.sum(1)[:, None] if self.reduction == "batch" else sums

    def _class_weights(self, pooled: Array) -> Array:
        one = namespace(pooled).ones_like(pooled[0, :1])  # (1, C), or (0, C) without samples
        if 0 <= self.ignore_channel < one.shape[-1]:
            one[:, self.ignore_channel] = 0
        return one / one.shape[-1] if self.weight is None else one * self.weight

    def _average(self, per_sample: Array) -> Array:
        if self.reduction == "none":
            return per_sample
        if self.reduction == "mean":
            samples = per_sample.shape[0]
            return per_sample.sum() / (samples or float("nan"))  # the mean of nothing is NaN
        return per_sample.sum()

    def _average_pullback(self, grad: Array, pooled: Array) -> Array:
        if self.reduction == "mean":
            grad = grad / max(pooled.shape[1], 1)
        return grad + namespace(pooled).zeros_like(pooled[0, :, 0])


def dice(
    classes: int, weight: Array | None, ignore_channel: Any, smooth: Any, reduction: Any
) -> Dice:
    """A Dice of checked options. Raises TypeError or ValueError naming what does not fit."""
    if weight is not None:
        spec.check_weight(weight, classes)
    return Dice(
        weight, spec.channel(ignore_channel), spec.smoothing(smooth), spec.reduction(reduction)
    )


def namespace(array: Array) -> Any:
    """The library of an array: torch if it is a tensor, else NumPy."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np
