"""The oracle: softmax, one-hot and their sums in NumPy and float64, slow but plain to read."""

from __future__ import annotations

from typing import Any

import numpy as np


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """I = sum s [y=c], P = sum s^p, Y = sum [y=c] and, unless gamma is None,
    H = sum [y=c] (1-s)^gamma (-log s) over the counted voxels, into sums (K, N, C).
    """
    score, entropy, onehot, _, bad = _voxels(logits, labels, spec)
    rows = [(score * onehot).sum(-1), (score**spec.power).sum(-1), onehot.sum(-1)]
    if spec.gamma is not None:
        own = np.where(onehot, entropy, 0)
        rows.append((_rest(own) ** spec.gamma * own).sum(-1))
    np.asarray(sums)[:] = rows
    return bad


def gradient(logits: Any, labels: Any, cotangent: Any, grad: Any, spec: Any, threads: int) -> int:
    """dx_k = s_k (t_k - sum_c t_c s_c) + h_y w (s_k - [y=k]) for (a, b, -, h) of (I, P, Y, H), with
    t_c = a_c [y=c] + b_c p s_c^(p-1) and w = r^gamma (1 + gamma s_y (-log s_y) / r), r = 1 - s_y.
    """
    score, entropy, onehot, counted, bad = _voxels(logits, labels, spec)
    a, b, _, *others = np.asarray(cotangent)[..., None]
    t = a * onehot + b * spec.power * score ** (spec.power - 1)
    dx = score * (t - (t * score).sum(1, keepdims=True))
    if spec.gamma is not None:
        own, (h,) = np.where(onehot, entropy, 0).sum(1, keepdims=True), others
        rest = _rest(own)
        slope = np.divide(own, rest, out=np.ones_like(own), where=(rest > 0) & (rest < 1))
        weight = rest**spec.gamma * (1 + spec.gamma * (1 - rest) * slope)
        dx = dx + weight * (h * onehot).sum(1, keepdims=True) * (score - onehot)
    dx = np.where(counted, dx, 0)
    if spec.activation == "sigmoid":
        dx = dx[:, 1:]
    np.asarray(grad)[:] = dx.reshape(logits.shape)
    return bad


def unsupported(signature: Any) -> list[str]:
    """Reasons why this backend does not take such calls."""
    if signature.logits.dtype == "bfloat16":
        return ["NumPy has no bfloat16"]
    return []


def _rest(entropy: Any) -> Any:
    """1 - s of -log s."""
    return -np.expm1(-entropy)


def _voxels(logits: Any, labels: Any, spec: Any) -> tuple[Any, Any, Any, Any, int]:
    """Scores s, -log s and one-hot labels (N, C, V), 0 if not counted; what is counted; how many
    are bad.
    """
    x = np.asarray(logits).astype(np.float64)
    x = x.reshape(*x.shape[:2], -1) if x.size else x.reshape(*x.shape[:2], 0)
    y = np.asarray(labels).reshape(x.shape[0], 1, x.shape[2])
    y = y.view(np.uint8) if y.dtype == bool else y  # bool does not compare with every integer
    if spec.activation == "sigmoid":
        x = np.concatenate([np.zeros_like(x), x], axis=1)
    classes = np.arange(x.shape[1]).reshape(1, -1, 1)
    ignored = np.zeros(y.shape, bool) if spec.ignore_label is None else y == spec.ignore_label
    onehot = (y == classes) & ~ignored
    counted = onehot.any(1, keepdims=True)

    x = np.where(counted, x, 0)
    largest = np.finfo(np.float64).max
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = x.max(1, keepdims=True)
        below = np.minimum(x - np.clip(top, -largest, largest), 0)
        below = np.where((top == np.inf) & (x < np.inf), -np.inf, below)
        score = np.exp(below)
        others = score.copy()  # than the largest, which is 1
        np.put_along_axis(others, x.argmax(1, keepdims=True), 0, axis=1)
        entropy = np.log1p(others.sum(1, keepdims=True)) - below
        score = score / score.sum(1, keepdims=True)
    bad = int(counted.size - (counted | ignored).sum())
    score, entropy = (np.where(counted, numbers, 0) for numbers in (score, entropy))
    return score, entropy, onehot.astype(np.float64), counted, bad
