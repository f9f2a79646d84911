"""The oracle: softmax, one-hot and their sums in NumPy and float64, slow but plain to read."""

from __future__ import annotations

from typing import Any

import numpy as np


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """I = sum s [y=c], P = sum s^p, Y = sum [y=c] over the counted voxels, into sums (3, N, C)."""
    score, onehot, _, bad = _voxels(logits, labels, spec)
    np.asarray(sums)[:] = [
        (score * onehot).sum(-1),
        (score**spec.power).sum(-1),
        onehot.sum(-1),
    ]
    return bad


def gradient(logits: Any, labels: Any, cotangent: Any, grad: Any, spec: Any, threads: int) -> int:
    """dx_k = s_k (t_k - sum_c t_c s_c), t_c = a_c [y=c] + b_c p s_c^(p-1) for (a, b) of (I, P)."""
    score, onehot, counted, bad = _voxels(logits, labels, spec)
    a, b, _ = np.asarray(cotangent)[..., None]
    t = a * onehot + b * spec.power * score ** (spec.power - 1)
    dx = score * (t - (t * score).sum(1, keepdims=True))
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


def _voxels(logits: Any, labels: Any, spec: Any) -> tuple[Any, Any, Any, int]:
    """Scores and one-hot labels (N, C, V), 0 if not counted; what is counted; how many are bad."""
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
        score = np.exp(np.minimum(x - np.clip(x.max(1, keepdims=True), -largest, largest), 0))
        score = score / score.sum(1, keepdims=True)
    bad = int(counted.size - (counted | ignored).sum())
    return np.where(counted, score, 0), onehot.astype(np.float64), counted, bad
