"""The truth in extended precision, and how far from it a computation in a given precision may be.

Written in plain NumPy from the documentation; shares nothing with dice_core. Derivatives of losses
come from complex steps, so no formula for them is written down here.

The bounds are those of naive code in the same precision (rounding error `eps`): a probability is
off by a relative 48 eps (a softmax without a maximum is allowed 2e-6 in float32), a -log s by
40 eps, a sum of positive numbers by 8 eps and half an eps for each addition in a row; all else
follows from these by first-order propagation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Real, Complex = np.longdouble, np.clongdouble
Array = np.ndarray[Any, Any]
quiet = np.errstate(all="ignore")  # as a decorator: infinities and NaN are meant
# The step of complex differentiation: its square is still above the smallest number.
STEP = Real(10) ** (-2000 if np.finfo(Real).maxexp > 10000 else -150)
OF_LOGITS = ("I", "P", "H", "L", "B+", "B-")  # the sums that depend on the logits


@dataclass
class Precision:
    """Rounding error and smallest normal number of the arithmetic, and the same of the result."""

    eps: float
    tiny: float
    out_eps: float
    out_tiny: float
    out_max: float


PRECISIONS = {
    "float16": Precision(2.0**-24, 2.0**-126, 2.0**-11, 2.0**-24, 65504.0),
    "bfloat16": Precision(2.0**-24, 2.0**-126, 2.0**-8, 2.0**-126, 3.3e38),
    "float32": Precision(2.0**-24, 2.0**-126, 2.0**-24, 2.0**-126, 3.4e38),
    "float64": Precision(2.0**-53, 2.0**-1022, 2.0**-53, 2.0**-1022, 1.79e308),
}


class Voxels:
    """Logits and targets of every class and voxel, (N, C, V), and what is summed over them.

    `x` (N, channels, V) and `y`, class labels (N, 1, V) or targets like x, are extended precision.
    """

    @quiet
    def __init__(self, x: Array, y: Array, dtype: str, options: dict[str, Any]) -> None:
        self.precision = p = PRECISIONS[dtype]
        self.options = options
        activation, ignored = options["activation"], options["ignore_label"]
        self.two_of_one = activation == "softmax" and x.shape[1] == 1
        classes = 2 if self.two_of_one else x.shape[1]
        self.soft = y.shape == x.shape and not self.two_of_one and options["soft"]
        known = ignored is not None and abs(ignored) < 2**64
        valid = y != Real(ignored) if known else np.ones(y.shape, bool)
        one_hot = y == np.arange(classes).reshape(1, -1, 1)
        self.t = np.where(valid, y if self.soft else one_hot, 0).astype(Real)
        self.any_valid = valid.any(1, keepdims=True)
        x = np.where(self.any_valid, x, 0).astype(Real)
        self.own = np.concatenate([-x, x], 1) if self.two_of_one else x  # against all else
        if self.two_of_one:
            x = np.concatenate([np.zeros_like(x), x], 1)
        self.m = np.broadcast_to(valid, x.shape)
        self.b, self.not_b = 1 / (1 + np.exp(-self.own)), 1 / (1 + np.exp(self.own))
        self.plus, self.minus = _softplus(-self.own), _softplus(self.own)
        if self.two_of_one:
            self.q, self.nll = self.b, self.plus
        else:
            z = x - x.max(1, keepdims=True)
            total = np.exp(z).sum(1, keepdims=True)
            self.q = np.exp(z) / total
            self.nll = np.where(np.isnan(total), np.nan, np.log(total) - z)
        self.s = {"softmax": self.q, "sigmoid": self.b, "none": x}[activation]
        self.q_error = self._probability_error(self.q)
        self.b_error = self._probability_error(self.b)
        self.s_error = (
            2 * p.eps * np.abs(x) if activation == "none" else self._probability_error(self.s)
        )

    def _probability_error(self, s: Array) -> Array:
        log = np.where(s > 0, -np.log(np.where(s > 0, s, 1)), 0)
        return self.precision.eps * s * (48 + log) + self.precision.tiny

    def _nll_error(self, nll: Array) -> Array:
        return self.precision.eps * (40 + 4 * nll)

    @quiet
    def sums(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """The sums by name, (N, C) each, and the bounds of their errors."""
        o, eps, m, t, s = self.options, self.precision.eps, self.m, self.t, self.s
        rows = {"I": (t * s, t * self.s_error)}
        low, high = _power(s - self.s_error, o["p"]), _power(s + self.s_error, o["p"])
        power = _power(s, o["p"])
        change = np.maximum(np.abs(high - power), np.abs(low - power))
        rows["P"] = power, change + o["p"] * eps * np.abs(power)
        rows["Y"] = t, (eps * t if self.soft else 0 * t)
        if o["gamma"] is not None:
            value, error = self._focal(self.nll, o["gamma"])
            # Where t is 0 an infinite -log s counts as 0, but NaN stays NaN.
            rows["H"] = (
                np.where((t > 0) | np.isnan(value), t * value, 0),
                np.where(t > 0, t * error, 0),
            )
        if o["nll"]:
            rows["L"] = self.nll, self._nll_error(self.nll)
        if o["binary_gamma"] is not None:
            value, error = self._focal(self.plus, o["binary_gamma"])
            rows["B+"] = np.where(t > 0, t * value, 0), np.where(t > 0, t * error, 0)
            value, error = self._focal(self.minus, o["binary_gamma"])
            rows["B-"] = (
                np.where(t < 1, (1 - t) * value, 0),
                np.where(t < 1, (1 - t) * error + (self.soft * eps) * value, 0),
            )
        if o["target_square"] and self.soft:
            rows["T2"] = t**2, 3 * eps * t**2
        if self.soft:
            rows["V"] = np.ones_like(t), 0 * t
        # Equal numbers have equal rounding errors: of up to 512 of them in 8 lanes in float32, of
        # up to 4096 in float64, before their sum is added to others.
        run = min(self.m.shape[2], 512) / 8 if eps > 1e-10 else min(self.m.shape[2], 4096) / 2
        adding = 8 + run
        values, bounds = {}, {}
        for name, (value, bound) in rows.items():
            value = np.where(m, value, 0)
            values[name] = value.sum(2)
            exact = name == "V" or (name == "Y" and not self.soft)
            bound = np.where(m, bound + adding * eps * np.abs(value) + self.precision.tiny, 0)
            bounds[name] = 0 * values[name] if exact else bound.sum(2)
        return values, bounds

    def _focal(self, nll: Array, gamma: float) -> tuple[Array, Array]:
        """(1 - s)^gamma (-log s), which increases with -log s, and its error."""

        def value(n: Array) -> Array:
            return (-np.expm1(-n)) ** Real(gamma) * n

        error, middle = self._nll_error(nll), value(nll)
        change = np.maximum(value(nll + error) - middle, middle - value(np.maximum(nll - error, 0)))
        return middle, change + (32 + 8 * gamma) * self.precision.eps * middle

    @quiet
    def gradient(self, cotangent: dict[str, Array], error: dict[str, Array]) -> tuple[Array, Array]:
        """The gradient, (N, channels, V), of the sums times a cotangent, and the bound of its error
        where that of the cotangent is `error`.
        """
        o, p, m, t, s = self.options, self.precision, self.m, self.t, self.s
        eps = p.eps
        of = {name: value[..., None] for name, value in cotangent.items()}
        off = {name: error[name][..., None] + 2 * eps * np.abs(of[name]) for name in of}
        slope = o["p"] * _power(s, o["p"] - 1)
        low, high = (_power(s + k * self.s_error, o["p"] - 1) for k in (-1, 1))
        change = (
            o["p"] * np.maximum(np.abs(high - slope / o["p"]), np.abs(low - slope / o["p"]))
            + (4 + o["p"]) * eps * np.abs(slope)
            + o["p"] * p.tiny
        )
        d = np.where(m, of["I"] * t + of["P"] * slope, 0)
        size = np.where(m, np.abs(of["I"]) * t + np.abs(of["P"] * slope), 0)
        d_off = off["I"] * t + off["P"] * np.abs(slope) + np.abs(of["P"]) * change
        d_off = np.where(m, d_off, 0) + 4 * eps * size
        if o["activation"] == "softmax":
            mean, mean_size = _sum(d * s), _sum(size * s)
            dx = s * (d - mean)
            dx_off = self.s_error * (size + mean_size)
            dx_off += s * (d_off + _sum(d_off * s + size * self.s_error))
            dx_off += 8 * eps * s * (size + mean_size)
        elif o["activation"] == "sigmoid":
            dx = d * s * self.not_b
            dx_off = d_off * s * self.not_b + size * self.s_error + 8 * eps * np.abs(dx)
        else:
            dx, dx_off = d, d_off
        if "H" in of or "L" in of:
            u, u_off = np.zeros_like(s), np.zeros_like(s)
            if "H" in of:
                w, w_off = self._slope(self.nll, o["gamma"])
                u = np.where(t > 0, of["H"] * t * w, 0)
                u_off = np.where(t > 0, off["H"] * t * w + np.abs(of["H"]) * t * w_off, 0)
            if "L" in of:
                u, u_off = u + of["L"], u_off + off["L"]
            u, u_off = np.where(m, u, 0), np.where(m, u_off, 0) + 4 * eps * np.abs(u)
            dx = dx + self.q * _sum(u) - u
            dx_off = dx_off + self.q_error * _sum(np.abs(u)) + self.q * _sum(u_off) + u_off
            dx_off += 8 * eps * (self.q * _sum(np.abs(u)) + np.abs(u))
        if "B+" in of:
            w, w_off = self._slope(self.plus, o["binary_gamma"])
            v, v_off = self._slope(self.minus, o["binary_gamma"])
            up, down = t * self.not_b, (1 - t) * self.b
            binary = of["B-"] * down * v - of["B+"] * up * w
            at_one = 48 * eps  # 1 - b, from a rounded b
            binary_off = off["B-"] * down * v + off["B+"] * up * w
            binary_off += np.abs(of["B-"]) * (down * v_off + (self.b_error + at_one) * v)
            binary_off += np.abs(of["B+"]) * (up * w_off + (self.b_error + at_one) * t * w)
            binary, binary_off = np.where(m, binary, 0), np.where(m, binary_off, 0)
            if self.two_of_one:  # the first class's own logit is -x
                binary = np.stack([0 * binary[:, 0], binary[:, 1] - binary[:, 0]], 1)
                binary_off = np.stack([0 * binary_off[:, 0], binary_off.sum(1)], 1)
            dx, dx_off = dx + binary, dx_off + binary_off
        if self.two_of_one:
            dx, dx_off = dx[:, 1:], dx_off[:, 1:]
        dx_off = dx_off + p.out_eps * np.abs(dx) + 2 * p.out_tiny
        return np.where(self.any_valid, dx, 0), np.where(self.any_valid, dx_off, 0)

    def _slope(self, nll: Array, gamma: float) -> tuple[Array, Array]:
        """The derivative of `_focal` with respect to -log s, and its error."""

        def value(n: Array) -> Array:
            rest = -np.expm1(-n)
            ratio = np.where(rest > 0, n / np.where(rest > 0, rest, 1), 1)
            ratio = np.where(np.isinf(n), 0, np.exp(-n) * ratio)
            return rest ** Real(gamma) * (1 + gamma * ratio)

        error, middle = self._nll_error(nll), value(nll)
        change = [np.abs(value(np.maximum(nll + k * error, 0)) - middle) for k in (-1, 1)]
        return middle, np.maximum(*change) + (32 + 8 * gamma) * self.precision.eps * middle

    @quiet
    def decisions(self) -> tuple[Array, Array]:
        """Dice and IoU, (N, C), of hard decisions; NaN ranks as +inf, and ties go to the first."""
        x = np.where(np.isnan(self.own), np.inf, self.own)
        if self.options["activation"] == "softmax":
            rank = np.concatenate([0 * x[:, :1], x[:, 1:]], 1) if self.two_of_one else x
            rank = np.where(np.isnan(rank), 0, rank)  # 0 * inf
            decided = rank.argmax(1)[:, None] == np.arange(x.shape[1]).reshape(1, -1, 1)
        else:
            decided = self.own > 0
        decided = np.where(self.m, decided, 0).astype(Real)
        both = (decided * self.t).sum(2)
        return both, decided.sum(2) + self.t.sum(2)


def _sum(a: Array) -> Array:
    return a.sum(1, keepdims=True)


def _power(s: Array, p: int) -> Array:
    return s ** Real(p) if p > 64 else s**p


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


# ---- losses of the sums ------------------------------------------------------------------------

Sums = dict[str, Array]  # (B, N, C) by name: B copies of the sums, perturbed; maybe complex

SHARED = {"weight": None, "reduction": "mean", "pool": "none"}
OVERLAP = {
    **SHARED,
    "p": 1,
    "smooth": 0.0,
    "absent": "count",
    "ignore_channel": -1,
    "divisor": None,
    "floor": 0.0,
    "target_square": False,
    "empty": "perfect",
}
VOXEL = {**SHARED, "pool": "batch", "divisor": "voxels", "empty": "perfect"}
BINARY = {**VOXEL, "pos_weight": None, "ignore_channel": -1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Dice": OVERLAP,
    "Jaccard": OVERLAP,
    "Tversky": {**OVERLAP, "alpha": 0.5, "beta": 0.5},
    "FocalTversky": {**OVERLAP, "alpha": 0.3, "beta": 0.7, "gamma": 0.75, "of_mean": False},
    "LogDice": {**OVERLAP, "eps": 1e-7},
    "LogCoshDice": OVERLAP,
    "GeneralizedDice": {**OVERLAP, "pool": "classes", "weighting": "square"},
    "MCC": OVERLAP,
    "CrossEntropy": {**VOXEL, "divisor": "weights", "label_smoothing": 0.0},
    "Focal": {**VOXEL, "gamma": 2.0},
    "BinaryCrossEntropy": BINARY,
    "SigmoidFocal": {**BINARY, "gamma": 2.0, "alpha": None},
}
POOLED = {"none": "batch", "classes": "all"}  # what reduction "batch" makes of a pool


@dataclass
class Term:
    """A loss by name with all its settings; the weights of classes are lists of numbers."""

    name: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.settings = s = {**DEFAULTS[self.name], **self.settings}
        if s["reduction"] == "batch":
            s["reduction"], s["pool"] = "mean", POOLED.get(s["pool"], s["pool"])

    @property
    def needs(self) -> dict[str, Any]:
        """The options of the sums."""
        s = self.settings
        if self.name in ("BinaryCrossEntropy", "SigmoidFocal"):
            return {"binary_gamma": s.get("gamma", 0.0)}
        if self.name == "CrossEntropy":
            return {"gamma": 0.0} | ({"nll": True} if s["label_smoothing"] else {})
        if self.name == "Focal":
            return {"gamma": s["gamma"]}
        return {"p": s["p"]} | ({"target_square": True} if s["target_square"] else {})

    def shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """The shape of its value."""
        s = self.settings
        rows = 1 if s["pool"] in ("batch", "all") else samples
        return {"none": (rows,), "classes": (rows, classes)}.get(s["reduction"], ())

    def scale(self, classes: int) -> float:
        """The loss where every class has 1, if rounding errors of that size are in its nature."""
        weights = _weights(self.settings, "weight", classes)
        if self.name not in ("MCC", "LogCoshDice") and weights.min() >= 0:
            return 0.0
        return float(np.abs(weights).max())

    def value(self, sums: Sums) -> Array:
        """(B, *) losses."""
        return (_overlap if "smooth" in self.settings else _voxel_loss)(self, sums)


def _kept(settings: dict[str, Any], classes: int) -> Array:
    out = settings.get("ignore_channel", -1)
    out = out if isinstance(out, tuple) else (out,)
    return np.array([c not in out for c in range(classes)])


def _weights(settings: dict[str, Any], name: str, classes: int) -> Array:
    given = settings.get(name)
    return np.ones(classes, Real) if given is None else np.asarray(given, Real)


def _overlap(term: Term, sums: Sums) -> Array:
    s = term.settings
    classes = sums["I"].shape[2]
    kept, weight = _kept(s, classes), _weights(s, "weight", classes)
    i, p, labels = sums["I"], sums["P"], sums["Y"]
    y = sums.get("T2", labels) if s["target_square"] else labels
    v = sums["V"].mean(-1, keepdims=True) if "V" in sums else labels.sum(-1, keepdims=True)
    rows = [np.where(kept, row, 1) for row in (i, p, y, labels)] + [v]
    if s["pool"] in ("batch", "all"):
        rows = [row.sum(1, keepdims=True) for row in rows]
    classes_pooled = s["pool"] in ("classes", "all")
    if classes_pooled:
        factor = weight * kept
        if term.name == "GeneralizedDice" and s["weighting"] != "uniform":
            present = rows[3]
            each = np.where(present == 0, 0, 1 / np.where(present == 0, 1, present))
            each = each ** (2 if s["weighting"] == "square" else 1)
            rank = np.where(kept, each.real, 0)
            largest = np.take_along_axis(each, rank.argmax(-1)[..., None], -1)
            factor = np.where(present == 0, np.where(rank.max(-1)[..., None] > 0, largest, 0), each)
            factor = factor * weight * kept
        rows = [(factor * row).sum(-1, keepdims=True) for row in rows[:4]] + rows[4:]
        kept, weight = np.ones(1, bool), np.ones(1, Real)
    loss = _score(term, rows)
    present = rows[2] != 0
    if s["absent"] in ("zero", "one"):
        loss = np.where(present, loss, loss * 0 + (s["absent"] == "one"))
    counted = np.where(present, kept, False) if s["absent"] == "skip" else kept
    loss = np.where(counted, loss, 0 * loss)  # NaN stays NaN where labels are absent
    value = np.where(kept, loss * weight, 0)
    if s["reduction"] == "classes":
        return value
    divisor = s["divisor"]
    if divisor is None:
        divisor = "one" if s["weight"] is not None and not classes_pooled else "classes"
    each = np.broadcast_to(counted, loss.shape)
    number = {
        "one": np.ones(loss.shape[:-1]),
        "classes": each.sum(-1)
        if s["absent"] == "skip"
        else np.full(loss.shape[:-1], each.shape[-1]),
        "kept": each.sum(-1),
        "weights": (each * weight).sum(-1),
    }[divisor]
    if divisor == "weights" and (s["weight"] is None or classes_pooled):
        number = each.sum(-1) if not kept.all() or s["absent"] == "skip" else number
    value = value.sum(-1) * _inverse(number, s["empty"])
    if term.name == "FocalTversky" and s["of_mean"]:
        value = _positive_power(value, s["gamma"])
    return _reduced(value, s["reduction"])


def _inverse(number: Array, empty: str) -> Array:
    zero = number == 0
    return np.where(zero, 0 if empty == "perfect" else np.nan, 1 / np.where(zero, 1, number))


def _reduced(value: Array, reduction: str) -> Array:
    if reduction == "none":
        return value
    total, samples = value.sum(1), value.shape[1]
    if reduction == "sum":
        return total
    return total / samples if samples else total + np.nan


def _log1p(z: Array) -> Array:
    """log(1 + z) of a tiny imaginary part; NumPy's loses the digits of small complex z."""
    if not np.iscomplexobj(z):
        return np.log1p(z)
    return np.log1p(z.real) + 1j * (z.imag / (1 + z.real))


def _positive_power(loss: Array, gamma: float) -> Array:
    positive = ~(loss.real <= 0)
    return np.where(positive, np.where(positive, loss, 1) ** Real(gamma), 0)


def _score(term: Term, rows: list[Array]) -> Array:
    """1 - q, or the penalty of it."""
    s, (i, p, y, _, v) = term.settings, rows
    smooth = s["smooth"]
    above, below = smooth if isinstance(smooth, tuple) else (smooth, smooth)
    if term.name == "MCC":
        square = p * y * (v - p) * (v - y)
        positive = square.real > 0
        num, den = i * v - p * y, np.where(positive, np.where(positive, square, 1) ** 0.5, 0)
        den = np.where(np.isnan(square), np.nan, den)
        lost = den - num
    elif term.name == "Jaccard":
        num, den, lost = i, p + y - i, p + y - 2 * i
    elif "alpha" in s:
        lost = s["alpha"] * (p - i) + s["beta"] * (y - i)
        num, den = i, i + lost
    else:
        num, den, lost = 2 * i, p + y, p + y - 2 * i
    num, den, lost = num + above, den + below, lost + (below - above)
    if s["floor"]:
        low = den.real < s["floor"]
        lost = np.where(low, s["floor"] - num, lost)
        den = np.where(low, s["floor"], den)
    zero = den == 0
    loss = lost / np.where(zero, 1, den)  # 1 - num / den would lose digits
    # Of nothing but true or nothing but false decisions, MCC is 0/0 too.
    perfect = np.where(p == y, 0, 1) if term.name == "MCC" else np.zeros(())
    if s["empty"] == "nan" and term.name != "MCC":
        ratio = np.where(num == 0, np.nan, -np.inf)  # 0/0, or 1 - smooth/0
        loss = np.where(zero, ratio, loss)
    else:
        loss = np.where(zero, np.nan if s["empty"] == "nan" else perfect, loss)
    if term.name == "FocalTversky" and not s["of_mean"]:
        return _positive_power(loss, s["gamma"])
    if term.name == "LogDice":
        q = np.where(loss == 0, 1, num / np.where(zero, 1, den))
        cut = -np.log(np.where(q.real < s["eps"], s["eps"], q))
        return np.where((np.abs(loss) < 0.5) | np.isnan(loss), -_log1p(-loss), cut)
    if term.name == "LogCoshDice":
        size = np.where(loss.real < 0, -loss, loss)
        small = _log1p(2 * np.sinh(np.where(size.real < 1, size, 1) / 2) ** 2)
        return np.where(size.real < 1, small, size + _log1p(np.exp(-2 * size)) - np.log(Real(2)))
    return loss


def _voxel_loss(term: Term, sums: Sums) -> Array:
    s = term.settings
    soft, classes = "V" in sums, sums["Y"].shape[-1]
    kept, weight = _kept(s, classes), _weights(s, "weight", classes)
    if s["pool"] == "batch":
        sums = {name: row.sum(1, keepdims=True) for name, row in sums.items()}
    voxels = sums["V"].mean(-1) if soft else sums["Y"].sum(-1)
    if term.name == "CrossEntropy":
        e = Real(s["label_smoothing"])
        total: Array = (1 - e) * weight * sums["H"]
        if e:
            total = total + e * weight * sums["L"] / classes
        if s["divisor"] == "weights" and not soft:
            voxels = (weight * sums["Y"]).sum(-1)
    elif term.name == "Focal":
        total = weight * sums["H"]
    else:
        alpha = s.get("alpha")
        positive = _weights(s, "pos_weight", classes) * (1 if alpha is None else Real(alpha))
        negative = 1 if alpha is None else 1 - Real(alpha)
        each = np.where(kept, positive * sums["B+"] + negative * sums["B-"], 0)
        total = np.asarray(weight * each / (max(kept.sum(), 1) if s["divisor"] != "one" else 1))
    count: Array = np.ones_like(voxels) if s["divisor"] == "one" else voxels
    total = total * _inverse(count, s["empty"])[..., None]
    if s["reduction"] == "classes":
        return total
    return _reduced(total.sum(-1), s["reduction"])


@dataclass
class Truth:
    """A loss, the bound of its error, its derivative with respect to the sums times `upstream`, the
    bound of that, and where first-order propagation does not hold.
    """

    value: Array
    value_error: Array
    cotangent: Sums
    cotangent_error: Sums
    sensitive: Array  # like value: the loss is not linear over the error of the sums
    sensitive_sums: Array  # (N, C): nor is the derivative


@quiet
def evaluate(
    parts: list[tuple[float, Term]],
    sums: dict[str, Array],
    bounds: dict[str, Array],
    upstream: Array,
    eps: float,
    rng: np.random.Generator,
    probes: int = 3,
) -> Truth:
    """The truth about a sum of terms."""
    names = list(sums)
    base = np.stack([sums[name] for name in names])  # (K, N, C)
    error = np.stack([bounds[name] for name in names]) + 1e-19 * np.abs(base)
    moved = np.array([k for k, name in enumerate(names) if name in OF_LOGITS])
    samples, classes = base.shape[1:]
    opposite = np.array([1.0 if name == "I" else -1.0 for name in names])[:, None, None]
    signs = [opposite, -opposite, rng.choice([-1.0, 1.0], base.shape)][:probes]
    whole = np.where(np.abs(np.rint(base) - base) <= error, np.rint(base), base)
    points = np.stack([base, whole, *(base + sign * error for sign in signs)]).astype(Real)
    steps = np.zeros((base.size + 1, *base.shape), Real)
    steps[1:] = (np.eye(base.size) * STEP).reshape(base.size, *base.shape)
    batch = points[:, None].astype(Complex) + 1j * steps[None]
    flat = batch.reshape(-1, *base.shape)
    rows = {name: flat[:, k] for k, name in enumerate(names)}
    loss: Any = sum(Real(factor) * term.value(rows) for factor, term in parts)
    loss = np.asarray(loss).reshape(*batch.shape[:2], *np.shape(loss)[1:])
    value = loss[0, 0].real
    if np.isnan(value).any():  # products of complex infinities are NaN
        value = value_only(parts, sums)
    slope = loss[:, 1:].imag / STEP  # (points, K N C, *)
    first_order = np.tensordot(error.reshape(-1), np.abs(slope[0]), 1)
    probed = np.abs(loss[:, 0].real - value).max(0)
    rounding = np.tensordot(np.abs(base).reshape(-1), np.abs(slope[0]), 1)
    # Naive code subtracts from 1, and takes the logarithm of nearly 1.
    scale = sum(abs(factor) * term.scale(classes) for factor, term in parts)
    power = max(float(term.settings.get("gamma", 1)) for _, term in parts)
    relative = 8 * eps + 1e-15 * power
    value_error = 2 * first_order + 2e-15 * rounding + relative * np.abs(value) + 2e-15 * scale
    value_error += 2.0**-148 if eps > 1e-10 else 2.0**-1073
    sensitive = ~(probed <= 3 * first_order + 1e-15 * (np.abs(value) + rounding))
    axes, shape = tuple(range(2, slope.ndim)), (len(points), *base.shape)
    cotangents = (slope * upstream).sum(axes).reshape(shape)
    size = np.abs(slope * upstream).sum(axes).reshape(shape)[0]
    change = np.abs(cotangents[1:] - cotangents[0]).max(0)
    cotangent_error = 4 * change + 1e-13 * size
    # That of P is a score, which 1 minus it, even in this precision, has lost below 1e-19.
    cotangent_error[names.index("P")] += 2e-19 * size[names.index("I")]
    doubtful = (~(change <= 0.1 * size) & (size > 0))[moved].any(0) | sensitive_classes(
        sensitive, samples, classes
    )
    return Truth(
        value,
        value_error,
        {names[k]: cotangents[0, k] for k in moved},
        {names[k]: cotangent_error[k] for k in moved},
        sensitive,
        doubtful,
    )


def sensitive_classes(sensitive: Array, samples: int, classes: int) -> Array:
    """(N, C): whether a sensitive loss depends on the class's sums."""
    each = sensitive if sensitive.ndim == 2 else sensitive[..., None]
    return np.broadcast_to(each, (samples, classes)).copy()


@quiet
def value_only(parts: list[tuple[float, Term]], sums: dict[str, Array]) -> Array:
    """The loss of sums that need not be finite."""
    rows = {name: row[None].astype(Real) for name, row in sums.items()}
    return np.asarray(sum(Real(factor) * term.value(rows) for factor, term in parts))[0]


def is_finite(sums: dict[str, Array]) -> bool:
    """Whether all sums are finite and far from overflow."""
    return all(math.isfinite(float(np.abs(row).max(initial=0))) for row in sums.values())
