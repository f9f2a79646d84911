"""The reference: softmax, one-hot encoding and the sums in NumPy and float64; slow, but simple."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


@np.errstate(all="ignore")
def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """Fills sums, (K, N, C), over the valid voxels m:

    I = sum m s t, P = sum m s^p, Y = sum m t, with s the probabilities and t the targets;
    H = sum m t (1-q)^gamma (-log q), L = sum m (-log q), with q the softmax;
    B+ = sum m t (1-b)^g (-log b), B- = sum m (1-t) b^g (-log(1-b)), with b the sigmoid;
    sum m t^2; sum m.
    """
    v = _voxels(logits, labels, spec)
    m, s, t = v.valid, v.probability, v.target
    rows = [s * t, np.where(m, s, 0) ** spec.p, t]
    if spec.gamma is not None:
        # Where t is 0, an infinite nll must contribute 0, but NaN must propagate.
        nll = np.where((t > 0) | np.isnan(v.nll), v.nll, 0)
        rows.append(t * _complement(nll) ** spec.gamma * nll)
    if spec.nll:
        rows.append(v.nll)
    if spec.binary_gamma is not None:
        positive, negative = _binary_nll(v)
        # torch's (1 - t) x + log(1 + exp(-x)) has 0 * inf for t = 1, and inf - inf for x = -inf.
        nan_if_infinite = np.where(np.isinf(v.logit), np.nan, 0)
        positive = positive + np.where(t == 1, nan_if_infinite, 0)
        negative = negative + np.where((t < 1) & (v.logit < 0), nan_if_infinite, 0)
        rows.append(t * _complement(positive) ** spec.binary_gamma * positive)
        rows.append((1 - t) * _complement(negative) ** spec.binary_gamma * negative)
    if spec.target_square and spec.soft_targets:
        rows.append(t**2)
    if spec.soft_targets:
        rows.append(np.ones_like(t))
    np.asarray(sums)[:] = [np.where(m, row, 0).sum(-1) for row in rows]
    return v.out_of_range


@np.errstate(all="ignore")
def gradient(logits: Any, labels: Any, cotangent: Any, grad: Any, spec: Any, threads: int) -> int:
    """Fills grad with dx, for a cotangent (a, b, _, h, l, b+, b-, ...) of the sums.

    Through the probabilities, with d = a t + b p s^(p-1): s (d - sum d s) for the softmax,
    d s (1-s) for the sigmoid, d for neither.
    Through the softmax q of the nll, with u = h t w + l: q sum u - u, where
    w = (1-q)^gamma (1 + gamma q (-log q) / (1-q)).
    Through the sigmoid b: -b+ t (1-b) w(b) + b- (1-t) b w(1-b), with g for gamma in w.
    """
    v = _voxels(logits, labels, spec)
    of = dict(zip(spec.fields, np.asarray(cotangent)[..., None], strict=True))
    m, s, t = v.valid, v.probability, v.target
    # A factor may be infinite, such as 2 / den of a class without targets.
    d = of["pred_sum"] * spec.p * s ** (spec.p - 1)
    d = d + np.multiply(of["intersection"], t, out=np.zeros_like(t), where=t > 0)
    d = np.where(m, d, 0)
    if spec.activation == "softmax":
        dx = s * (d - (d * s).sum(1, keepdims=True))
    else:
        dx = np.where(m, d * s * (1 - s), 0) if spec.activation == "sigmoid" else d
    if spec.gamma is not None or spec.nll:
        u = np.zeros_like(s)
        if spec.gamma is not None:
            slope = np.where(t > 0, t * _modulated_slope(v.nll, spec.gamma), 0)
            u += of["cross_entropy_sum"] * slope
        if spec.nll:
            u += of["nll_sum"]
        u = np.where(m, u, 0)
        dx = dx + v.softmax * u.sum(1, keepdims=True) - u
    if spec.binary_gamma is not None:
        positive, negative = _binary_nll(v)
        up = t * _modulated_slope(positive, spec.binary_gamma) * _complement(positive)
        down = (1 - t) * _modulated_slope(negative, spec.binary_gamma) * _complement(negative)
        binary = np.where(m, of["negative_sum"] * down - of["positive_sum"] * up, 0)
        if v.two_of_one:  # the logit of the first class is minus that of the second
            binary[:, 1] -= binary[:, 0]
            binary[:, 0] = 0
        dx = dx + binary
    if v.two_of_one:
        dx = dx[:, 1:]
    np.asarray(grad)[:] = np.where(v.any_valid, dx, 0).reshape(logits.shape)
    return v.out_of_range


def unsupported(signature: Any) -> list[str]:
    """The reasons why this backend does not support such calls."""
    if "bfloat16" in (signature.logits.dtype, signature.labels.dtype):
        return ["NumPy has no bfloat16"]
    return []


class Voxels(NamedTuple):
    """Values of each class and voxel, (N, C, V). Where no class is valid the logit is 0."""

    logit: Any  # of the class against all others, for the sigmoid
    probability: Any
    softmax: Any
    nll: Any  # -log softmax
    target: Any  # 0 where not valid
    valid: Any
    any_valid: Any  # (N, 1, V)
    out_of_range: int  # labels or targets
    two_of_one: bool  # one channel is two classes


def _voxels(logits: Any, labels: Any, spec: Any) -> Voxels:
    x = np.asarray(logits).astype(np.float64)
    x = x.reshape(*x.shape[:2], -1) if x.size else x.reshape(*x.shape[:2], 0)
    samples, channels, voxels = x.shape
    classes = spec.classes(channels)
    two_of_one = classes != channels
    index = np.arange(classes).reshape(1, -1, 1)

    y, limit, ignore = np.asarray(labels), classes, spec.ignore_label
    if y.dtype == bool:  # a byte other than 0 and 1 is out of range
        y, limit = y.view(np.uint8), min(classes, 2)
        ignore = ignore if ignore in (0, 1) else None
    y = y.astype(np.float64) if y.dtype.kind not in "iu" else y  # exactly, to be compared
    y = y.reshape(x.shape if spec.soft_targets else (samples, 1, voxels))
    ignored = np.zeros(y.shape, bool) if ignore is None else y == ignore
    if not spec.soft_targets:
        allowed = (y >= 0) & (y < limit)
    elif spec.targets == "binary":
        allowed = (y == 0) | (y == 1)
    else:
        allowed = (y >= 0) & (y <= 1)
    valid = allowed & ~ignored
    out_of_range = int((~allowed & ~ignored).sum())
    target = np.where(valid, y if spec.soft_targets else y == index, 0).astype(np.float64)
    any_valid = valid.any(1, keepdims=True)

    x = np.where(any_valid, x, 0)
    rank = np.where(np.isnan(x), np.inf, x)
    if two_of_one:  # the logit of the first class is 0
        rank = np.concatenate([np.zeros_like(x), rank], 1)
        x = np.concatenate([-x, x], 1)  # each class against the other
        softmax, nll = _sigmoid(x), _softplus(-x)
    else:
        softmax, nll = _softmax(x)
    probability = {
        "softmax": softmax,
        "sigmoid": _sigmoid(x),
        "none": x,
        "argmax": rank.argmax(1, keepdims=True) == index,
        "threshold": x > 0,
    }[spec.activation].astype(np.float64)
    valid = np.broadcast_to(valid, x.shape)
    return Voxels(x, probability, softmax, nll, target, valid, any_valid, out_of_range, two_of_one)


def _softmax(x: Any) -> tuple[Any, Any]:
    """The softmax over axis 1 and its -log. Both are NaN if the largest logit is infinite."""
    with np.errstate(invalid="ignore"):
        shifted = x - x.max(1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(1, keepdims=True)
    others = e.copy()  # all but the largest, which is 1, so that log1p loses nothing
    np.put_along_axis(others, x.argmax(1, keepdims=True), 0, axis=1)
    nll = np.log1p(others.sum(1, keepdims=True)) - shifted
    return e / total, np.where(np.isnan(total), np.nan, nll)


def _binary_nll(v: Voxels) -> tuple[Any, Any]:
    """-log b where t > 0 and -log(1 - b) where t < 1; 0 elsewhere, even if that is infinite."""
    positive = np.where(v.target > 0, _softplus(-v.logit), 0)
    return positive, np.where(v.target < 1, _softplus(v.logit), 0)


def _softplus(x: Any) -> Any:
    """log(1 + exp(x)), which is -log(sigmoid(-x))."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sigmoid(x: Any) -> Any:
    return np.exp(-_softplus(-x))


def _complement(nll: Any) -> Any:
    """1 - s, given -log s."""
    return -np.expm1(-nll)


def _modulated_slope(nll: Any, gamma: float) -> Any:
    """The derivative of (1-s)^gamma (-log s) with respect to -log s."""
    rest = _complement(nll)
    inside = (rest > 0) & (rest < 1)
    ratio = np.divide(nll, rest, out=np.ones_like(nll), where=inside)
    return rest**gamma * (1 + gamma * (1 - rest) * ratio)
