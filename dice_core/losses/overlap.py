"""Losses of the overlap of prediction and labels: pool, score, penalise, average."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import spec
from .terms import Array, Ratio, Settings, Sums, assign, ignored, left_out, namespace

POOLS = ("none", "batch", "classes", "all")
ABSENT = ("count", "skip", "zero", "one")
DIVISORS = ("one", "classes", "kept", "weights")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Overlap(Settings):
    """A loss 1 - q of a score q = (a + above) / (b + below), a and b linear in I, P and Y.

    0/0, where there is nothing to be wrong about, is a perfect score with derivative 0.

    - p: exponent of the scores in P, an integer from 1.
    - smooth: added above and below, or the pair (above, below); >= 0.
    - pool: what is summed before the ratio: "none", "batch" over samples, "classes" over classes,
      times their weights, "all" both.
    - absent: what a class does that no label has: "count" as any other, "skip" be left out of the
      mean, "zero" and "one" have this loss and no derivative.
    - weight: (C,) numbers that multiply the classes' losses; None for 1.
    - ignore_channel: the class, or classes, left out; outside [0, C) without effect.
    - divisor: of the sum over classes: "classes" C, or with absent="skip" as many as are left;
      "kept" as many as are left in any case; "weights" the sum of their weights; "one". None: "one"
      where there are weights, else "classes".
    - reduction: over samples, "mean", "sum", or "none" -> (N,); or "classes" -> (N, C), times the
      weights, 0 for those left out, and not divided.
    - floor: the least denominator.
    """

    p: int = 1
    smooth: Any = 0.0
    pool: str = "none"
    absent: str = "count"
    ignore_channel: Any = -1
    divisor: str | None = None
    floor: float = 0.0

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q, linear functions of the sums."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.one_of(self.pool, "pool", POOLS)
        spec.one_of(self.absent, "absent", ABSENT)
        if self.divisor is not None:
            spec.one_of(self.divisor, "divisor", DIVISORS)
        if self.reduction == "classes" and self.pool in ("classes", "all"):
            raise ValueError(f"pool={self.pool!r} leaves nothing per class: reduction 'classes'")
        if self.reduction == "none" and self.pool in ("batch", "all"):
            raise ValueError(f"pool={self.pool!r} leaves nothing per sample: reduction 'none'")
        smooth = self.smooth
        if isinstance(smooth, (tuple, list)):
            if len(smooth) != 2:
                raise ValueError(f"smooth must be a number or a pair, got {smooth!r}")
            smooth = tuple(map(spec.smoothing, smooth))
        else:
            smooth = spec.smoothing(smooth)
        assign(
            self,
            p=spec.power(self.p),
            smooth=smooth,
            ignore_channel=ignored(self.ignore_channel),
            floor=spec.number(self.floor, "floor"),
        )

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"power": self.p}

    def value(self, sums: Sums) -> Array:
        kept = self._kept(sums.intersection)
        pooled, _ = self._pooled(sums, kept)
        return self._average(self._penalty(self._ratio(pooled)[0]), pooled, kept)[0]

    def with_derivative(
        self, sums: Array, names: Sequence[str] = spec.STATISTICS
    ) -> tuple[Array, Array]:
        rows = Sums.of(sums, names)
        kept = self._kept(rows.intersection)
        pooled, times = self._pooled(rows, kept)
        loss, den = self._ratio(pooled)
        value, share = self._average(self._penalty(loss), pooled, kept)
        for factor in (times, self._slope(loss)):
            share = share if factor is None else share * factor
        slopes = self._ratio_slopes(pooled, loss, den, share)
        if slopes.shape == sums.shape:
            return value, slopes
        derivative = np.zeros(sums.shape)
        derivative[:3] = slopes
        return value, derivative

    # pool

    def _kept(self, like: Array) -> Array | None:
        """(C,): 0 for the classes left out, 1 for the others; None if all are kept."""
        if self.ignore_channel == -1:
            return None
        out = left_out(self.ignore_channel, like.shape[1])
        if not out:
            return None
        kept = namespace(like).ones_like(like.sum(0))
        kept[out] = 0
        return kept

    def _pooled(self, sums: Sums, kept: Array | None) -> tuple[Sums, Array | None]:
        """The sums to take the ratio of, and the factors with which each entered them."""
        if self.pool == "none":
            return sums, None
        if self.pool in ("batch", "all"):
            sums = sums.of_batch()
        if self.pool not in ("classes", "all"):
            return sums, None
        rows = sums[:3]
        times = self._class_weights(rows[2], kept)
        return Sums(*((times * row).sum(-1)[:, None] for row in rows)), times

    def _class_weights(self, target_sum: Array, kept: Array | None) -> Array:
        weight = namespace(target_sum).ones_like(target_sum[:1].sum(0))
        for factor in (self.weight, kept):
            if factor is not None:
                weight = weight * factor
        return weight

    # score

    def _ratio(self, pooled: Sums) -> tuple[Array, Array]:
        """1 - q and its denominator."""
        num, den = self.linear(*pooled[:3])
        above, below = self._smoothing
        if below:
            den = den + below
        if below != above:
            num = num + (below - above)
        if self.floor:
            raised = namespace(den).clip(den, self.floor, None)
            num, den = num + (raised - den), raised
        if not below and not self.floor:
            den = namespace(den).where(den == 0, math.inf, den)  # which passes no derivative on
        return num / den, den

    def _ratio_slopes(self, pooled: Sums, loss: Array, den: Array, share: Array) -> Array:
        """(3, N, C): share times the derivative of 1 - q for I, P and Y."""
        of_num, of_den = self._coefficients
        if self.floor:
            loss = np.where(den > self.floor, loss, 1)  # num = den - a: a alone is left of it
        slopes: Array = (of_num - loss * of_den) * (share / den)
        return slopes

    @property
    def _smoothing(self) -> tuple[float, float]:
        """What is added above and below."""
        return self.smooth if isinstance(self.smooth, tuple) else (self.smooth, self.smooth)

    @functools.cached_property
    def _coefficients(self) -> Array:
        """(2, 3, 1, 1): of I, P and Y in numerator and denominator."""
        return np.array(self.linear(*np.eye(3)))[..., None, None]

    def ratio(self, samples: int, classes: int) -> Ratio | None:
        """This loss as a Ratio, if it is one."""
        above, below = self._smoothing
        own = type(self)
        if (
            any(
                getattr(own, step) is not getattr(Overlap, step)
                for step in ("_ratio", "_penalty", "_of_mean")
            )
            or self.pool not in ("none", "batch")
            or self.reduction == "classes"
            or self.absent != "count"
            or self.divisor == "weights"
            or isinstance(self.ignore_channel, tuple)
            or self.floor
        ):
            return None
        rows, out = 1 if self.pool == "batch" else samples, left_out(self.ignore_channel, classes)
        divisor, share = self.divisor or ("classes" if self.weight is None else "one"), 1.0
        if divisor != "one":
            kept = classes - len(out) if divisor == "kept" else classes
            share = share / kept if kept else 0.0
        if self.reduction == "mean":
            share = share / max(rows, 1)
        pooled, each, excess = self.pool == "batch", self.reduction == "none", below - above
        start = math.nan if self.reduction == "mean" and not rows else 0.0
        num, den = self._coefficients.reshape(2, 3).tolist()
        first_out = out[0] if out else -1
        return Ratio(pooled, each, first_out, share, start, excess, below, num, den)

    # penalise

    def _penalty(self, loss: Array) -> Array:
        """A function of 1 - q."""
        return loss

    def _slope(self, loss: Array) -> Array | None:
        """The penalty's derivative; None for 1."""
        return None

    # average

    def _average(self, cells: Array, pooled: Sums, kept: Array | None) -> tuple[Array, Array]:
        """The loss, and what each cell's derivative counts in it."""
        xp, weight, absent = namespace(cells), self.weight, None
        if self.pool in ("classes", "all"):
            kept = weight = None  # counted before the ratio
        if self.absent != "count":
            absent = pooled.target_sum == 0
            if self.absent == "skip":
                kept = xp.where(absent, 0.0, xp.ones_like(cells) if kept is None else kept)
            else:
                cells = xp.where(absent, float(self.absent == "one"), cells)
        share: Array | float = 1.0
        for factor in (weight, kept):
            share = share if factor is None else factor * share
        if self.reduction != "classes":
            share = share / self._divisor(cells, weight, kept)
        value, samples = cells * share, cells.shape[0]
        if absent is not None:
            share = xp.where(absent, 0.0, share)
        if self.reduction == "classes":
            return value, share
        value, slope = self._of_mean(value.sum(-1))
        if slope is not None:
            share = slope[:, None] * share
        if self.reduction == "none":
            return value, share
        value = value.sum()
        if self.reduction == "mean" and samples != 1:
            share = share / max(samples, 1)
            value = value / samples if samples else value + math.nan  # the mean of nothing
        return value, share

    def _of_mean(self, means: Array) -> tuple[Array, Array | None]:
        """A function of each sample's mean over classes, and its derivative; None for 1."""
        return means, None

    def _divisor(self, cells: Array, weight: Array | None, kept: Array | None) -> Array | float:
        divisor = self.divisor or ("classes" if weight is None else "one")
        classes = cells.shape[1]
        if divisor == "one":
            return 1.0
        if divisor == "classes" and (kept is None or kept.ndim == 1):
            return classes
        if divisor == "weights" and weight is not None:
            counted = weight if kept is None else weight * kept
        elif kept is None:
            return classes
        else:
            counted = kept
        total = counted.sum(-1)
        if total.ndim:
            total = total[:, None]
        return namespace(cells).where(total == 0, math.inf, total)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dice(Overlap):
    """1 - (2 I + smooth) / (P + Y + smooth).

    Source: Milletari et al., V-Net, 2016 (p = 2). Settings: `Overlap`.
    """

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q."""
        den = p + y
        return den - (i + i), den


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Jaccard(Overlap):
    """1 - (I + smooth) / (P + Y - I + smooth).

    Source: Rahman & Wang, 2016. Settings: `Overlap`.
    """

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q."""
        den = p + y - i
        return den - i, den


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tversky(Overlap):
    """1 - (I + smooth) / (I + alpha (P - I) + beta (Y - I) + smooth): alpha weighs false positives,
    beta false negatives.

    Source: Salehi et al., 2017. Settings: `Overlap`.
    """

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, alpha=spec.number(self.alpha, "alpha"), beta=spec.number(self.beta, "beta"))

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q."""
        num = self.alpha * (p - i) + self.beta * (y - i)
        return num, i + num


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FocalTversky(Tversky):
    """(1 - q)^gamma of each class's Tversky score q, or with `of_mean` of the mean over classes.

    The derivative of 0^gamma is 0.

    Source: Abraham & Khan, 2019. Settings: `Overlap`.
    """

    alpha: float = 0.3
    beta: float = 0.7
    gamma: float = 0.75
    of_mean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, gamma=spec.focusing(self.gamma))
        if self.of_mean and self.reduction == "classes":
            raise ValueError("of_mean=True leaves nothing per class: reduction 'classes'")

    def _penalty(self, loss: Array) -> Array:
        return loss if self.of_mean else _power(loss, self.gamma)

    def _slope(self, loss: Array) -> Array | None:
        return None if self.of_mean else _power_slope(loss, self.gamma)

    def _of_mean(self, means: Array) -> tuple[Array, Array | None]:
        if not self.of_mean:
            return means, None
        return _power(means, self.gamma), _power_slope(means, self.gamma)


def _power(loss: Array, gamma: float) -> Array:
    """loss^gamma, 0 with derivative 0 where there is no loss."""
    where = namespace(loss).where
    return where(loss > 0, where(loss > 0, loss, 1.0) ** gamma, 0.0)


def _power_slope(loss: Array, gamma: float) -> Array:
    where = namespace(loss).where
    return where(loss > 0, gamma * where(loss > 0, loss, 1.0) ** (gamma - 1), 0.0)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogScore(Overlap):
    """-log q, the score q being at least eps, below which the derivative is 0."""

    eps: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        assign(self, eps=spec.number(self.eps, "eps"))
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {self.eps}")

    def _penalty(self, loss: Array) -> Array:
        xp = namespace(loss)
        return -xp.log1p(-xp.clip(loss, None, 1 - self.eps))

    def _slope(self, loss: Array) -> Array | None:
        return np.where(loss < 1 - self.eps, 1 / np.maximum(1 - loss, self.eps), 0.0)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogDice(LogScore, Dice):
    """-log q of each class's Dice score q.

    Source: Wong et al., 2018. Settings: `Overlap`.
    """


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogCoshDice(Dice):
    """log cosh (1 - q) of each class's Dice score q.

    Source: Jadon, 2020. Settings: `Overlap`.
    """

    def _penalty(self, loss: Array) -> Array:
        xp = namespace(loss)
        return xp.log(xp.cosh(loss))

    def _slope(self, loss: Array) -> Array | None:
        return np.tanh(loss)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GeneralizedDice(Dice):
    """1 - 2 sum_c w_c I_c / sum_c w_c (P_c + Y_c), w_c = 1 / Y_c^2 ("square"), 1 / Y_c ("simple")
    or 1 ("uniform"), times the weights.

    A class that no label has takes the largest w of its sample's others, 0 if there are none. pool:
    "classes", or "all" over samples too.

    Source: Sudre et al., 2017. Settings: `Overlap`.
    """

    pool: str = "classes"
    weighting: str = "square"

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.one_of(self.weighting, "weighting", ("square", "simple", "uniform"))
        spec.one_of(self.pool, "pool", ("classes", "all"))

    def _class_weights(self, target_sum: Array, kept: Array | None) -> Array:
        xp = namespace(target_sum)
        factors = super()._class_weights(target_sum, kept)
        if self.weighting == "uniform":
            return factors
        empty = target_sum == 0
        weight = 1 / xp.where(empty, 1.0, target_sum) ** (1 + (self.weighting == "square"))
        weight = xp.where(empty, 0.0, weight)
        # Of classes that are left out none gives its weight to others.
        largest = (weight if kept is None else weight * kept).max(-1)
        largest = largest if isinstance(largest, np.ndarray) else largest.values
        return xp.where(empty, largest[:, None], weight) * factors


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MCC(Overlap):
    """1 - q of Matthews' correlation coefficient, q = (I V - P Y) / sqrt(P Y (V - P) (V - Y)) with
    V = sum_c Y_c counted voxels. smooth is added above and below.

    Source: Abhishek & Hamarneh, 2021. Settings: `Overlap`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.one_of(self.pool, "pool", ("none", "batch"))
        if self.p != 1:
            raise ValueError(f"p must be 1 for {self.name}, got {self.p}")

    def _ratio(self, pooled: Sums) -> tuple[Array, Array]:
        i, p, y, v = self._counts(pooled)
        xp, (above, below) = namespace(i), self._smoothing
        square = xp.clip(p * y * (v - p) * (v - y), 0, None)
        # Where a factor is 0 the root has no derivative; the numerator is 0 there too.
        root = xp.where(square > 0, xp.where(square > 0, square, 1.0) ** 0.5, 0.0)
        den = root + below
        if self.floor:
            den = xp.clip(den, self.floor, None)
        nothing = den == 0
        loss = 1 - (i * v - p * y + above) / xp.where(nothing, 1.0, den)
        return xp.where(nothing, self._of_nothing(i, p, y), loss), den

    @staticmethod
    def _of_nothing(i: Array, p: Array, y: Array) -> Array:
        """The loss where q is 0/0."""
        return namespace(i).where(p == y, 0.0, 1.0)

    @staticmethod
    def _counts(pooled: Sums) -> tuple[Array, Array, Array, Array]:
        i, p, y = pooled[:3]
        return i, p, y, pooled.voxels[:, None]

    def _ratio_slopes(self, pooled: Sums, loss: Array, den: Array, share: Array) -> Array:
        _, p, y, v = self._counts(pooled)
        square = p * y * (v - p) * (v - y)
        root = np.sqrt(np.where(square > 0, square, np.inf))
        of_root = np.where(square > 0, y * (v - y) * (v - 2 * p) / (2 * root), 0.0)
        if self.floor:
            of_root = np.where(den > self.floor, of_root, 0.0)
        share = share / np.where(den == 0, np.inf, den)
        of_p = (y + (1 - loss) * of_root) * share
        return np.stack([-v * share, of_p, np.zeros_like(of_p)])  # labels have no gradient
