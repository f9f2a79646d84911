"""Overlap losses: pool the sums, compute a score, apply a penalty, average."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .. import checks
from ..sums import Statistics
from .penalties import LogCosh, NegativeLog, Penalty, Power
from .terms import Array, Ratio, Settings, assign, ignored_channels, namespace

ABSENT = ("count", "skip", "zero", "one")
DIVISORS = ("one", "classes", "kept", "weights")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Overlap(Settings):
    """The average over classes and samples of 1 - q, or of a penalty of it, where q is a score of
    the pooled sums I = sum s t, P = sum s^p and Y = sum t.

    - p: exponent of the probabilities in P, an integer from 1.
    - smooth: added to the score's numerator and denominator, or the pair (numerator, denominator);
      >= 0.
    - pool: which sums are added before the score is computed: "none"; "batch", over samples;
      "classes", over classes, times their weights; "all", both.
    - absent: how a class without labels is treated: "count", like any other; "skip", excluded from
      the mean; "zero" and "one", as this loss, without a derivative.
    - weight: (C,) numbers that multiply the classes' losses: sum_c weight_c loss_c, not normalised.
      None: their mean.
    - ignore_channel: the class or classes excluded; no effect outside [0, C).
    - divisor: of the sum over classes: "classes", C, or with absent="skip" the number of classes
      left; "kept", always the number of classes left; "weights", the sum of their weights; "one",
      no division. None: "one" if there are weights, else "classes".
    - reduction: over samples, "mean", "sum", or "none" -> (N,); or "classes" -> (N, C), times the
      weights, 0 for excluded classes, and not divided. "batch" is pool "batch" with "mean".
    - floor: the smallest denominator of the score.
    - target_square: soft targets enter the denominator as sum t^2, for p = 2.
    - empty: a score of 0/0, of a class neither predicted nor present, is "perfect" (loss and
      derivative are 0) or "nan"; the same holds for an average whose divisor is 0.
    """

    p: int = 1
    smooth: Any = 0.0
    absent: str = "count"
    ignore_channel: Any = -1
    divisor: str | None = None
    floor: float = 0.0
    target_square: bool = False
    empty: str = "perfect"

    # Derived by the constructor: smooth of numerator and denominator; whether classes are pooled.
    _smoothing: tuple[float, float] = field(init=False, default=(0.0, 0.0))
    _pools_classes: bool = field(init=False, default=False)

    pools: ClassVar[tuple[str, ...]] = ("none", "batch", "classes", "all")
    # Functions of each class's q, and of each sample's mean; None for 1 - q.
    penalty: ClassVar[Penalty | None] = None
    mean_penalty: ClassVar[Penalty | None] = None

    def score(self, xp: Any, rows: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        """q and 1 - q of the pooled sums I, P and Y, each without cancellation where it is small,
        and the denominator of q.
        """
        raise NotImplementedError

    def slopes(
        self, rows: tuple[Array, ...], score: Array, loss: Array, den: Array, share: Array
    ) -> Array:
        """(3, N, C): share times the derivative of 1 - q with respect to I, P and Y."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of(self.absent, "absent", ABSENT)
        checks.one_of(self.empty, "empty", ("perfect", "nan"))
        if self.divisor is not None:
            checks.one_of(self.divisor, "divisor", DIVISORS)
        smooth = self.smooth
        if isinstance(smooth, (tuple, list)):
            if len(smooth) != 2:
                raise ValueError(f"smooth must be a number or a pair, got {smooth!r}")
            smooth = tuple(checks.number(each, "smooth") for each in smooth)
            above, below = smooth
        else:
            smooth = above = below = checks.number(smooth, "smooth")
        p = checks.power(self.p)
        needs = {"p": p, "target_square": True} if self.target_square else {"p": p}
        self.settle(
            needs,
            p=p,
            smooth=smooth,
            ignore_channel=checks.ignore_channel(self.ignore_channel),
            floor=checks.number(self.floor, "floor"),
            _smoothing=(above, below),
            _pools_classes=self.pool in ("classes", "all"),
        )

    def value(self, sums: Statistics) -> Array:
        return self._evaluate(sums)[0]

    def with_derivative(self, sums: Statistics) -> tuple[Array, Array]:
        value, share, rows, entered, score, loss, den = self._evaluate(sums)
        if entered is not None:
            share = share * entered
        if self.penalty is not None:
            slope = self.penalty.slope(score, loss)  # 0 times an infinite share must be 0
            share = np.where(slope == 0, 0.0, share) * slope
        slopes = self.slopes(rows, score, loss, den, share)
        if self.ignore_channel != -1:  # as in _evaluate
            kept = self._kept(np, sums.array)
            slopes = slopes if kept is None else np.where(kept > 0, slopes, 0.0)
        if slopes.shape == sums.array.shape:
            return value, slopes
        derivative = np.zeros(sums.array.shape)
        derivative[:3] = slopes
        return value, derivative

    def _evaluate(self, sums: Statistics) -> tuple[Any, ...]:
        """The loss; the weight of each class's 1 - q in it; the pooled sums; the factors with which
        each class entered them; q, 1 - q, and the denominator of q.
        """
        xp = namespace(sums.array)
        kept = None if self.ignore_channel == -1 else self._kept(xp, sums.array)
        if self.pool in ("batch", "all"):
            sums = sums.pooled()
        rows, target_sum, entered = self._rows(sums), sums.target_sum, None
        if kept is not None:  # 0 times the NaN of an excluded class would be NaN
            rows = tuple(xp.where(kept > 0, row, 1.0) for row in rows)
            target_sum = xp.where(kept > 0, target_sum, 1.0)
        if self._pools_classes:
            entered = self._class_weights(xp, target_sum, kept)
            rows = tuple((entered * row).sum(-1)[:, None] for row in rows)
        score, loss, den = self.score(xp, rows)
        penalty = loss if self.penalty is None else self.penalty.value(score, loss)
        if kept is not None and entered is None:
            penalty = xp.where(kept > 0, penalty, 0.0)
        value, share = self._average(xp, penalty, rows[2], kept)
        return value, share, rows, entered, score, loss, den

    def _rows(self, sums: Statistics) -> tuple[Array, ...]:
        i, p, y = sums.array[:3]
        return i, p, (sums.target_square_sum if self.target_square else y)

    # pool

    def _kept(self, xp: Any, array: Array) -> Array | None:
        """(C,): 0 for excluded classes, 1 for the others; None if no class is excluded."""
        out = ignored_channels(self.ignore_channel, array.shape[2])
        if not out:
            return None
        kept = xp.ones_like(array[0].sum(0))
        kept[out] = 0
        return kept

    def _class_weights(self, xp: Any, target_sum: Array, kept: Array | None) -> Array:
        """The factors with which the classes' sums are added up."""
        weight = xp.ones_like(target_sum[:1].sum(0))
        for factor in (self.weight, kept):
            if factor is not None:
                weight = weight * factor
        return weight

    # average

    def _average(
        self, xp: Any, losses: Array, target_sum: Array, kept: Array | None
    ) -> tuple[Array, Array]:
        """The loss, and the weight of each class's loss in it, (N, C)."""
        weight, absent = self.weight, None
        if self._pools_classes:
            kept = weight = None  # they entered the pooled sums
        if self.absent != "count":
            absent = target_sum == 0
            if self.absent == "skip":
                kept = xp.where(absent, 0.0, xp.ones_like(losses) if kept is None else kept)
            else:
                # Times 0, so that the NaN of a valid voxel propagates.
                losses = xp.where(absent, losses * 0.0 + float(self.absent == "one"), losses)
        share: Any = 1.0 if weight is None else weight
        if kept is not None:
            share = kept * share
        if self.reduction != "classes":
            if weight is None and kept is None and self.divisor != "one":
                share = share / losses.shape[1]
            else:
                share = share / self._divisor(xp, losses, weight, kept)
        samples = losses.shape[0]
        if self.reduction == "mean" and samples > 1 and self.mean_penalty is None:
            share = share / samples
        value = losses * share
        if absent is not None:
            share = xp.where(absent, 0.0, share)
        if self.mean_penalty is not None:
            means = value.sum(-1)
            value = self.mean_penalty.value(1 - means, means)
            if xp is np:
                share = self.mean_penalty.slope(1 - means, means)[:, None] * share
            if self.reduction == "mean" and samples > 1:
                value, share = value / samples, share / samples
        if self.reduction == "none" and self.mean_penalty is None:
            value = value.sum(-1)
        elif self.reduction in ("mean", "sum"):
            value = value.sum()
            if self.reduction == "mean" and not samples:
                value = value + math.nan  # the mean of an empty batch
        return value, share

    def _divisor(self, xp: Any, losses: Array, weight: Array | None, kept: Array | None) -> Any:
        divisor = self.divisor or ("classes" if weight is None else "one")
        classes = losses.shape[1]
        if divisor == "one":
            return 1.0
        if divisor == "classes" and (kept is None or kept.ndim == 1):
            return classes
        if divisor == "weights" and weight is not None:
            included = weight if kept is None else weight * kept
        elif kept is None:
            return classes
        else:
            included = kept
        total = included.sum(-1)
        if total.ndim:
            total = total[:, None]
        return xp.where(total == 0, math.inf if self.empty == "perfect" else math.nan, total)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LinearOverlap(Overlap):
    """1 - q of a score q = (a + smooth) / (b + smooth), a and b being linear in I, P and Y.

    Settings: `Overlap`.
    """

    # Coefficients of I, P and Y in the numerator of q, that of 1 - q and the denominator.
    _of_score: tuple[float, ...] = field(init=False, default=())
    _of_rest: tuple[float, ...] = field(init=False, default=())
    _of_den: tuple[float, ...] = field(init=False, default=())
    _ratios: dict[tuple[int, int], Ratio | None] = field(init=False, default_factory=dict)

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """b - a and b, numerator and denominator of 1 - q."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        super().__post_init__()
        rest, den = self.linear(*np.eye(3))
        of_score = tuple((den - rest).tolist())
        assign(self, _of_score=of_score, _of_rest=tuple(rest.tolist()), _of_den=tuple(den.tolist()))

    def score(self, xp: Any, rows: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        rest, den = self.linear(*rows)  # rest: the numerator of 1 - q
        above, below = self._smoothing
        num = above
        for row, coefficient in zip(rows, self._of_score, strict=True):
            if coefficient:
                num = num + coefficient * row
        if below:
            den = den + below
        if below != above:
            rest = rest + (below - above)
        if self.floor:
            raised = den < self.floor
            rest = xp.where(raised, self.floor - num, rest)
            den = xp.where(raised, self.floor, den)
        if not below and not self.floor and self.empty == "perfect":
            perfect = den == 0
            den = xp.where(perfect, math.inf, den)  # whose derivative is 0
            score = xp.where(perfect, 1.0, num / den)
        else:
            score = num / den
        low = score < 0.5
        # torch differentiates both branches, and 0 times an infinite derivative is NaN.
        return score, xp.where(low, 1 - score, rest / xp.where(low, 1.0, den)), den

    def slopes(
        self, rows: tuple[Array, ...], score: Array, loss: Array, den: Array, share: Array
    ) -> Array:
        of_score, of_rest, of_den = (
            np.reshape(of, (3, 1, 1)) for of in (self._of_score, self._of_rest, self._of_den)
        )
        if self.floor:  # below the floor, only the numerator of q varies
            raised = self.linear(*rows)[1] + self._smoothing[1] < self.floor
            score, loss = np.where(raised, 0, score), np.where(raised, 1, loss)
        if self.empty == "nan":
            den = np.where(den == 0, math.nan, den)
        slopes = np.where(score < 0.5, score * of_den - of_score, of_rest - loss * of_den)
        return slopes * share / den  # share / den may overflow where the derivative is 0

    def ratio(self, samples: int, classes: int) -> Ratio | None:
        if (samples, classes) not in self._ratios:
            self._ratios[samples, classes] = _ratio(self, samples, classes)
        return self._ratios[samples, classes]


def _ratio(term: LinearOverlap, samples: int, classes: int) -> Ratio | None:
    """The term as a Ratio, if it is one."""
    above, below = term._smoothing
    if (
        term.penalty is not None
        or term.mean_penalty is not None
        or term._pools_classes
        or term.reduction == "classes"
        or term.absent != "count"
        or term.divisor == "weights"
        or isinstance(term.ignore_channel, tuple)
        or term.floor
        or (term.empty == "nan" and not below)
    ):
        return None
    pooled = term.pool == "batch"
    rows, out = 1 if pooled else samples, ignored_channels(term.ignore_channel, classes)
    divisor, share = term.divisor or ("classes" if term.weight is None else "one"), 1.0
    if divisor != "one":
        kept = classes - len(out) if divisor == "kept" else classes
        share = share / kept if kept else 0.0
    if term.reduction == "mean":
        share = share / max(rows, 1)
    start = math.nan if term.reduction == "mean" and not rows else 0.0
    per_sample, ignored = term.reduction == "none", out[0] if out else -1
    excess, num, den = below - above, term._of_rest, term._of_den
    return Ratio(pooled, per_sample, ignored, share, start, excess, below, num, den)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dice(LinearOverlap):
    """1 - (2 I + smooth) / (P + Y + smooth).

    Source: Milletari et al., V-Net, 2016 (p = 2). Settings: `Overlap`.
    """

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q."""
        den = p + y
        return den - (i + i), den


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Jaccard(LinearOverlap):
    """1 - (I + smooth) / (P + Y - I + smooth).

    Source: Rahman & Wang, 2016. Settings: `Overlap`.
    """

    def linear(self, i: Array, p: Array, y: Array) -> tuple[Array, Array]:
        """Numerator and denominator of 1 - q."""
        den = p + y - i
        return den - i, den


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tversky(LinearOverlap):
    """1 - (I + smooth) / (I + alpha (P - I) + beta (Y - I) + smooth): alpha weights false
    positives, beta false negatives.

    Source: Salehi et al., 2017. Settings: `Overlap`.
    """

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        alpha, beta = checks.number(self.alpha, "alpha"), checks.number(self.beta, "beta")
        assign(self, alpha=alpha, beta=beta)
        super().__post_init__()

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
        gamma = checks.number(self.gamma, "gamma")
        assign(self, gamma=gamma, **{"mean_penalty" if self.of_mean else "penalty": Power(gamma)})
        if self.of_mean and self.reduction == "classes":
            raise ValueError("of_mean=True leaves no loss per class for reduction='classes'")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogDice(Dice):
    """-log max(q, eps) of each class's Dice score q, with derivative 0 below eps.

    Source: Wong et al., 2018. Settings: `Overlap`.
    """

    eps: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        eps = checks.number(self.eps, "eps")
        if not 0 < eps < 1:
            raise ValueError(f"eps must lie between 0 and 1, got {eps}")
        assign(self, eps=eps, penalty=NegativeLog(eps))


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogCoshDice(Dice):
    """log cosh (1 - q) of each class's Dice score q.

    Source: Jadon, 2020. Settings: `Overlap`.
    """

    penalty: ClassVar[Penalty | None] = LogCosh()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class GeneralizedDice(Dice):
    """1 - 2 sum_c w_c I_c / sum_c w_c (P_c + Y_c), w_c = 1 / Y_c^2 ("square"), 1 / Y_c ("simple")
    or 1 ("uniform"), times the weights.

    A class without labels gets the largest w of the other classes of its sample, or 0 if there is
    none. pool: "classes", or "all" over samples too.

    Source: Sudre et al., 2017. Settings: `Overlap`.
    """

    pool: str = "classes"
    weighting: str = "square"

    pools: ClassVar[tuple[str, ...]] = ("classes", "all")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of(self.weighting, "weighting", ("square", "simple", "uniform"))

    def _class_weights(self, xp: Any, target_sum: Array, kept: Array | None) -> Array:
        factors = super()._class_weights(xp, target_sum, kept)
        if self.weighting == "uniform":
            return factors
        empty = target_sum == 0
        weight = 1 / xp.where(empty, 1.0, target_sum) ** (1 + (self.weighting == "square"))
        weight = xp.where(empty, 0.0, weight)
        # An excluded class must not lend its weight to the others.
        largest = xp.amax(weight if kept is None else weight * kept, -1)
        return xp.where(empty, largest[:, None], weight) * factors


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MCC(Overlap):
    """1 - q for the Matthews correlation coefficient q = (I V - P Y) / sqrt(P Y (V - P) (V - Y)),
    with V = sum_c Y_c the number of valid voxels.

    Source: Abhishek & Hamarneh, 2021. Settings: `Overlap`, with p = 1.
    """

    pools: ClassVar[tuple[str, ...]] = ("none", "batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p != 1:
            raise ValueError(f"p must be 1 for {self.name}, got {self.p}")
        if self.target_square:
            raise ValueError(f"target_square must be False for {self.name}")

    def _rows(self, sums: Statistics) -> tuple[Array, ...]:
        return (*sums.array[:3], sums.voxels[:, None])

    def score(self, xp: Any, rows: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        i, p, y, v = rows
        above, below = self._smoothing
        square = xp.clip(p * y * (v - p) * (v - y), 0, None)
        # Where a factor is 0 the root has no derivative; the numerator is 0 there too.
        root = xp.where(square <= 0, 0.0, xp.where(square <= 0, 1.0, square) ** 0.5)
        den = root + below
        if self.floor:
            den = xp.clip(den, self.floor, None)
        zero = den == 0
        score = (i * v - p * y + above) / xp.where(zero, 1.0, den)
        undefined = math.nan if self.empty == "nan" else xp.where(p == y, 1.0, 0.0)
        score = xp.where(zero, undefined, score)
        return score, 1 - score, den

    def slopes(
        self, rows: tuple[Array, ...], score: Array, loss: Array, den: Array, share: Array
    ) -> Array:
        _, p, y, v = rows
        square = p * y * (v - p) * (v - y)
        root = np.sqrt(np.where(square > 0, square, np.inf))
        of_root = np.where(square > 0, y * (v - y) * (v - 2 * p) / (2 * root), 0.0)
        if self.floor:
            of_root = np.where(den > self.floor, of_root, 0.0)
        share = share / np.where(den == 0, np.inf, den)
        of_p = (y + score * of_root) * share
        return np.stack([-v * share, of_p, np.zeros_like(of_p)])  # labels have no gradient
