"""The naive code: softmax, one-hot, torch autograd, in float64. Shares nothing with dice_core."""

import math

import torch
from torch.nn.functional import one_hot, softplus


def statistics(
    x,
    y,
    *,
    ignore_label=-1,
    p=1,
    gamma=None,
    smoothing=False,
    binary_gamma=None,
    activation="softmax",
):
    """I, P, Y and what else is asked for, each (N, classes)."""
    dense = y.shape == x.shape and (x.shape[1] > 1 or activation != "softmax")
    voxels = math.prod(x.shape[2:])
    x = x.reshape(*x.shape[:2], voxels)
    logit = x
    if activation == "softmax" and x.shape[1] == 1:
        x, logit = torch.cat([torch.zeros_like(x), x], 1), torch.cat([-x, x], 1)
    if dense:
        t = y.reshape(x.shape).to(x)
        counted = all_but(ignore_label, t)
    else:
        y = y.reshape(x.shape[0], 1, voxels)
        counted = all_but(ignore_label, y)
        t = (y == torch.arange(x.shape[1]).reshape(1, -1, 1)).to(x)
        x, logit = torch.where(counted, x, 0), torch.where(counted, logit, 0)
    m = counted.to(x).expand_as(t)
    t = torch.where(counted, t, 0)
    s = {"softmax": x.softmax(1), "sigmoid": x.sigmoid(), "none": x}[activation]
    sums = [m * s * t, m * s**p, t]
    log_q = x.log_softmax(1)
    if gamma is not None:
        sums.append(t * (1 - log_q.exp()) ** gamma * -log_q)
    if smoothing:
        sums.append(m * -log_q)
    if binary_gamma is not None:
        b = logit.sigmoid()
        sums.append(t * (1 - b) ** binary_gamma * softplus(-logit))
        sums.append(m * (1 - t) * b**binary_gamma * softplus(logit))
    return tuple(term.sum(2) for term in (*sums, *([m] if dense else [])))


def score(x, y, *, ignore_label=-1, activation="softmax"):
    """Dice and IoU, (N, C), of decisions; y are class indices, or like x."""
    if activation != "softmax":
        decided = (x > 0).flatten(2)
    else:
        if x.shape[1] == 1:
            x = torch.cat([torch.zeros_like(x), x], 1)
        decided = one_hot(x.argmax(1).flatten(1), x.shape[1]).movedim(-1, 1).bool()
    y = y.reshape(decided.shape) if y.numel() == decided.numel() else y.reshape(len(x), 1, -1)
    counted = all_but(ignore_label, y)
    dense = y.shape == decided.shape
    there = y == 1 if dense else y == torch.arange(decided.shape[1]).reshape(1, -1, 1)
    both = (decided & there & counted).sum(2).double()
    total = (decided & counted).sum(2) + (there & counted).sum(2)
    return 2 * both / total, both / (total - both)


def all_but(label, y):
    return torch.ones_like(y, dtype=torch.bool) if label is None else y != label


def dice_loss(x, y, *, ignore_label=-1, p=1, **options):
    """The loss exactly as the documentation states it."""
    return dice_of(*statistics(x, y, ignore_label=ignore_label, p=p), **options)


def dice_of(i, q, t, *, weight=None, ignore_channel=-1, smooth=0.0, reduction="mean"):
    """The loss of the sums."""
    if reduction == "batch":
        i, q, t = i.sum(0, keepdim=True), q.sum(0, keepdim=True), t.sum(0, keepdim=True)
    classes = i.shape[1]
    weight = [1 / classes] * classes if weight is None else list(weight)
    loss = 0
    for c in range(classes):
        den = q[:, c] + t[:, c] + smooth
        empty = den == 0
        term = 1 - (2 * i[:, c] + smooth) / torch.where(empty, torch.ones_like(den), den)
        if c != ignore_channel:
            loss = loss + weight[c] * torch.where(empty, torch.zeros_like(term), term)
    if reduction == "none":
        return loss
    if reduction == "batch":
        return loss[0]
    return loss.mean() if reduction == "mean" else loss.sum()
