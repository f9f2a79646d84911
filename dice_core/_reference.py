"""The oracle: softmax, one-hot and their sums in NumPy and float64, slow but plain to read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """Fills sums, (K, N, C), over the counted voxels m:

    I = sum s t, P = sum s^p, Y = sum t, with s the scores and t the targets, one-hot or dense;
    H = sum t (1-q)^gamma (-log q), L = sum (-log q), with q the softmax;
    B+ = sum t (1-b)^g (-log b), B- = sum (1-t) b^g (-log(1-b)), with b the sigmoid; V = sum m.
    """
    v = _voxels(logits, labels, spec)
    t = v.target
    rows = [v.score * t, np.where(v.counted, v.score, 0) ** spec.power, t]
    if spec.gamma is not None:
        own = np.where(t > 0, v.entropy, 0)  # of the others it may be infinite
        rows.append(t * _rest(own) ** spec.gamma * own)
    if spec.smoothing:
        rows.append(v.entropy)
    if spec.binary_gamma is not None:
        positive, negative = _halves(v)
        rows.append(t * _rest(positive) ** spec.binary_gamma * positive)
        rows.append((1 - t) * _rest(negative) ** spec.binary_gamma * negative)
    if spec.dense:
        rows.append(np.ones_like(t))
    np.asarray(sums)[:] = [np.where(v.counted, row, 0).sum(-1) for row in rows]
    return v.bad


def gradient(logits: Any, labels: Any, cotangent: Any, grad: Any, spec: Any, threads: int) -> int:
    """Fills grad with dx, for (a, b, -, h, l, b+, b-) of (I, P, Y, H, L, B+, B-):

    d = a t + b p s^(p-1) through the scores, s (d - sum d s), d s (1-s) or d;
    q sum u - u with u = h t w + l and w = (1-q)^gamma (1 + gamma q (-log q) / (1-q));
    and through the sigmoid -b+ t (1-b) w(b) + b- (1-t) b w(1-b), w with g.
    """
    v = _voxels(logits, labels, spec)
    a, b, _, *others = np.asarray(cotangent)[..., None]
    s, t = v.score, v.target
    d = a * t + b * spec.power * s ** (spec.power - 1)
    d = np.where(v.counted, d, 0)
    if spec.activation == "softmax":
        dx = s * (d - (d * s).sum(1, keepdims=True))
    else:
        dx = np.where(v.counted, d * s * (1 - s), 0) if spec.activation == "sigmoid" else d
    u = np.zeros_like(s)
    if spec.gamma is not None:
        u += others.pop(0) * np.where(t > 0, t * _weight(v.entropy, spec.gamma), 0)
    if spec.smoothing:
        u += others.pop(0)
    if spec.gamma is not None or spec.smoothing:
        u = np.where(v.counted, u, 0)
        dx = dx + v.softmax * u.sum(1, keepdims=True) - u
    if spec.binary_gamma is not None:
        of_positive, of_negative, *_ = others
        positive, negative = _halves(v)
        up = of_positive * t * _weight(positive, spec.binary_gamma) * _rest(positive)
        down = of_negative * (1 - t) * _weight(negative, spec.binary_gamma) * _rest(negative)
        through = np.where(v.counted, down - up, 0)
        if v.single:  # the second logit is the first's negative
            through = through[:, 1:] - through[:, :1]
            dx = dx + np.concatenate([np.zeros_like(through), through], 1)
        else:
            dx = dx + through
    if v.single:
        dx = dx[:, 1:]
    np.asarray(grad)[:] = np.where(v.any_counted, dx, 0).reshape(logits.shape)
    return v.bad


def unsupported(signature: Any) -> list[str]:
    """Reasons why this backend does not take such calls."""
    if "bfloat16" in (signature.logits.dtype, signature.labels.dtype):
        return ["NumPy has no bfloat16"]
    return []


class Voxels(NamedTuple):
    """Numbers of each class and voxel, (N, C, V); scores and the like are finite where not counted,
    targets 0.
    """

    score: Any
    softmax: Any
    entropy: Any  # -log softmax
    binary: Any  # the logit of the class against all others
    target: Any
    counted: Any
    any_counted: Any  # (N, 1, V)
    bad: int
    single: bool  # one channel is two classes


def _voxels(logits: Any, labels: Any, spec: Any) -> Voxels:
    x = np.asarray(logits).astype(np.float64)
    x = x.reshape(*x.shape[:2], -1) if x.size else x.reshape(*x.shape[:2], 0)
    single = spec.classes(x.shape[1]) != x.shape[1]
    y = np.asarray(labels)
    y = y.view(np.uint8) if y.dtype == bool else y  # bool does not compare with every integer
    y = y.astype(np.float64) if y.dtype.kind not in "iu" else y  # exactly, to be compared
    y = y.reshape(x.shape if spec.dense else (x.shape[0], 1, x.shape[2]))
    ignored = np.zeros(y.shape, bool) if spec.ignore_label is None else y == spec.ignore_label
    if single:
        x = np.concatenate([np.zeros_like(x), x], axis=1)
    if spec.dense:
        counted = ~ignored & (y >= 0) & (y <= 1)
        target = np.where(counted, y, 0).astype(np.float64)
        any_counted = counted.any(1, keepdims=True)
    else:
        onehot = (y == np.arange(x.shape[1]).reshape(1, -1, 1)) & ~ignored
        counted = any_counted = onehot.any(1, keepdims=True)
        target = onehot.astype(np.float64)
    bad = int(counted.size - (counted | ignored).sum())

    x = np.where(any_counted, x, 0)
    largest = np.finfo(np.float64).max
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = x.max(1, keepdims=True)
        below = np.minimum(x - np.clip(top, -largest, largest), 0)
        below = np.where((top == np.inf) & (x < np.inf), -np.inf, below)
        softmax = np.exp(below)
        others = softmax.copy()  # than the largest, which is 1
        np.put_along_axis(others, x.argmax(1, keepdims=True), 0, axis=1)
        entropy = np.log1p(others.sum(1, keepdims=True)) - below
        entropy = np.where(top == -np.inf, np.nan, entropy)
        softmax = softmax / softmax.sum(1, keepdims=True)
    softmax, entropy = (np.where(any_counted, numbers, 0) for numbers in (softmax, entropy))
    winner = np.where(np.isnan(x), np.inf, x).argmax(1, keepdims=True)
    score = {
        "softmax": softmax,
        "sigmoid": np.exp(-_softplus(-x)),
        "none": x,
        "argmax": winner == np.arange(x.shape[1]).reshape(1, -1, 1),
        "threshold": x > 0,
    }[spec.activation].astype(np.float64)
    binary = np.concatenate([-x[:, 1:], x[:, 1:]], axis=1) if single else x
    counted = np.broadcast_to(counted, x.shape)
    return Voxels(score, softmax, entropy, binary, target, counted, any_counted, bad, single)


def _halves(v: Voxels) -> tuple[Any, Any]:
    """-log b where there is a target, -log(1-b) where it is not all; else 0, of what may be
    infinite.
    """
    positive = np.where(v.target > 0, _softplus(-v.binary), 0)
    return positive, np.where(v.target < 1, _softplus(v.binary), 0)


def _softplus(x: Any) -> Any:
    """log(1 + e^x), -log of the sigmoid of -x."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _rest(entropy: Any) -> Any:
    """1 - s of -log s."""
    return -np.expm1(-entropy)


def _weight(entropy: Any, gamma: float) -> Any:
    """What (1-s)^gamma (-log s) has for a slope where -log s has 1, s being -log s's own."""
    rest = _rest(entropy)
    inside = (rest > 0) & (rest < 1)
    slope = np.divide(entropy, rest, out=np.ones_like(entropy), where=inside)
    return rest**gamma * (1 + gamma * (1 - rest) * slope)
