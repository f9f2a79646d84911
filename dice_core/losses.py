"""Losses as plain arithmetic on statistics: pool, loss of each class, total.

Everything here is small: `sums` is (K, N, C) with K = intersection I, pred_sum P, target_sum Y, in
float64, a NumPy array or a torch tensor. Values are written once for both; their derivative, of
NumPy arrays, is written beside them, and torch finds its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import spec

Array = Any  # of either library


class Ratio:
    """A loss q = num / (den + smooth), num and den linear functions of the statistics.

    Where there is nothing to be wrong about, 0/0, it is 0 with derivative 0.
    """

    def __init__(self, linear: Callable[[Array, Array, Array], tuple[Array, Array]]) -> None:
        self.linear = linear  # (I, P, Y) -> (num, den)
        self.slopes = np.array(linear(*np.eye(3)))[..., None, None]  # of num and den, (2, K, 1, 1)

    def __call__(self, sums: Array, smooth: float) -> tuple[Array, Array]:
        """(K, N, C) -> the loss and its denominator, (N, C) each."""
        num, den = self.linear(*sums)
        if smooth:
            den = den + smooth
            return num / den, den
        den = namespace(sums).where(den == 0, math.inf, den)  # which passes no derivative on
        return num / den, den

    def derivative(self, loss: Array, den: Array, share: Array) -> Array:
        """(K, N, C): share dq/dsums = share (dnum/dsums - q dden/dsums) / den."""
        of_num, of_den = self.slopes
        return (of_num - loss * of_den) * (share / den)


def _dice(i: Array, p: Array, y: Array) -> tuple[Array, Array]:
    den = p + y
    return den - (i + i), den


DICE = Ratio(_dice)  # 1 - (2 I + smooth) / (P + Y + smooth)


@dataclass(frozen=True)
class Dice:
    """loss_c = 1 - (2 I + smooth) / (P + Y + smooth), combined over classes and samples.

    - weight: (C,) numbers in the sums' library, or None for 1/C each.
    - ignore_channel: the class whose term is left out (it still counts in that 1/C), if in [0, C).
    - smooth: added above and below, >= 0.
    - reduction: "none" -> (N,); "mean" and "sum" over samples -> (); "batch" -> (), the sums pooled
      over samples first.
    """

    ratio: ClassVar[Ratio] = DICE
    weight: Array | None = None
    ignore_channel: int = -1
    smooth: float = 0.0
    reduction: str = "mean"

    def __call__(self, sums: Array) -> Array:
        """(K, N, C) -> the loss."""
        pooled = self._pool(sums)
        loss, _ = self.ratio(pooled, self.smooth)
        return self._total(loss * self._shares(pooled))

    def with_derivative(self, sums: Array) -> tuple[Array, Array]:
        """The loss and, (K, N, C), the derivative of each sample's loss for its sums.

        Times an incoming gradient of the loss's shape, an axis for the classes appended, this is
        the cotangent of the sums.
        """
        pooled = self._pool(sums)
        loss, den = self.ratio(pooled, self.smooth)
        shares = self._shares(pooled)
        derivative = self.ratio.derivative(loss, den, shares)
        if self.reduction == "batch":
            derivative = derivative.repeat(sums.shape[1], 1)
        return self._total(loss * shares), derivative

    def _pool(self, sums: Array) -> Array:
        return sums.sum(1)[:, None] if self.reduction == "batch" else sums

    def _shares(self, pooled: Array) -> Array:
        """What a class's loss counts in the total: (1, C), or one number for all."""
        _, samples, classes = pooled.shape
        share = 1 / classes if self.weight is None else self.weight
        if self.reduction == "mean":
            share = share / max(samples, 1)
        if not 0 <= self.ignore_channel < classes:
            return share
        keep = namespace(pooled).ones_like(pooled[0, :1])  # (1, C), or (0, C) without samples
        keep[:, self.ignore_channel] = 0
        return keep * share

    def _total(self, terms: Array) -> Array:
        if self.reduction == "none":
            return terms.sum(-1)
        if self.reduction == "mean" and not terms.shape[0]:
            return terms.sum() + math.nan  # the mean of nothing
        return terms.sum()


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
