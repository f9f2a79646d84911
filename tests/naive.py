"""The naive code: softmax, one-hot, torch autograd, in float64. Shares nothing with dice_core."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot


def statistics(
    x: Tensor,
    y: Tensor,
    *,
    ignore_label: int | None = -1,
    p: int = 1,
    gamma: float | None = None,
    nll: bool = False,
    binary_gamma: float | None = None,
    target_square: bool = False,
    activation: str = "softmax",
    targets: str = "soft",
) -> tuple[Tensor, ...]:
    """I, P, Y and the requested optional sums, each (N, classes).

    `targets` may be "binary", which changes no sum.
    """
    assert targets in ("soft", "binary")
    soft = y.shape == x.shape and (x.shape[1] > 1 or activation != "softmax")
    voxels = math.prod(x.shape[2:])
    x = x.reshape(*x.shape[:2], voxels)
    logit = x
    if activation == "softmax" and x.shape[1] == 1:
        x, logit = torch.cat([torch.zeros_like(x), x], 1), torch.cat([-x, x], 1)
    if soft:
        t = y.reshape(x.shape).to(x)
        valid = all_but(ignore_label, t)
    else:
        y = y.reshape(x.shape[0], 1, voxels)
        valid = all_but(ignore_label, y)
        t = (y == torch.arange(x.shape[1]).reshape(1, -1, 1)).to(x)
        x, logit = torch.where(valid, x, 0), torch.where(valid, logit, 0)
    m = valid.to(x).expand_as(t)
    t = torch.where(valid, t, 0)
    s = {"softmax": x.softmax(1), "sigmoid": x.sigmoid(), "none": x}[activation]
    sums = [m * s * t, m * s**p, t]
    log_q = x.log_softmax(1)
    if gamma is not None:
        sums.append(t * (1 - log_q.exp()) ** gamma * -log_q)
    if nll:
        sums.append(m * -log_q)
    if binary_gamma is not None:
        b = logit.sigmoid()
        sums.append(t * (1 - b) ** binary_gamma * -logsigmoid(logit))
        sums.append(m * (1 - t) * b**binary_gamma * -logsigmoid(-logit))
    if soft and target_square:
        sums.append(m * t**2)
    return tuple(term.sum(2) for term in (*sums, *([m] if soft else [])))


def score(
    x: Tensor, y: Tensor, *, ignore_label: int | None = -1, activation: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Dice and IoU, (N, C), of decisions; y are class indices, or like x."""
    if activation != "softmax":
        decided = (x > 0).flatten(2)
    else:
        if x.shape[1] == 1:
            x = torch.cat([torch.zeros_like(x), x], 1)
        decided = one_hot(x.argmax(1).flatten(1), x.shape[1]).movedim(-1, 1).bool()
    y = y.reshape(decided.shape) if y.numel() == decided.numel() else y.reshape(len(x), 1, -1)
    valid = all_but(ignore_label, y)
    soft = y.shape == decided.shape
    there = y == 1 if soft else y == torch.arange(decided.shape[1]).reshape(1, -1, 1)
    both = (decided & there & valid).sum(2).double()
    total = (decided & valid).sum(2) + (there & valid).sum(2)
    return 2 * both / total, both / (total - both)


def all_but(label: int | None, y: Tensor) -> Tensor:
    return torch.ones_like(y, dtype=torch.bool) if label is None else y != label


def dice_loss(
    x: Tensor, y: Tensor, *, ignore_label: int | None = -1, p: int = 1, **options: Any
) -> Tensor:
    """The loss exactly as the documentation states it."""
    i, q, t = statistics(x, y, ignore_label=ignore_label, p=p)
    return dice_of(i, q, t, **options)


def dice_of(
    i: Tensor,
    q: Tensor,
    t: Tensor,
    *,
    weight: Any = None,
    ignore_channel: int = -1,
    smooth: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of the sums."""
    if reduction == "batch":
        i, q, t = i.sum(0, keepdim=True), q.sum(0, keepdim=True), t.sum(0, keepdim=True)
    classes = i.shape[1]
    each = 1 if reduction == "classes" else 1 / classes
    weight = [each] * classes if weight is None else list(weight)
    terms = []
    for c in range(classes):
        den = q[:, c] + t[:, c] + smooth
        empty = den == 0
        term = 1 - (2 * i[:, c] + smooth) / torch.where(empty, torch.ones_like(den), den)
        kept = 0 if c == ignore_channel else weight[c]
        terms.append(kept * torch.where(empty, torch.zeros_like(term), term))
    if reduction == "classes":
        return torch.stack(terms, 1)
    loss = torch.stack(terms).sum(0)
    if reduction == "none":
        return loss
    if reduction == "batch":
        return loss[0]
    return loss.mean() if reduction == "mean" else loss.sum()
