"""The naive code: softmax, one-hot, torch autograd, in float64. Shares nothing with dice_core."""

import math

import torch


def statistics(x, y, *, ignore_label=-1, p=1, gamma=None):
    """I, P, Y and, unless gamma is None, H, each (N, classes)."""
    voxels = math.prod(x.shape[2:])
    x, y = x.reshape(*x.shape[:2], voxels), y.reshape(x.shape[0], voxels)
    binary = x.shape[1] == 1
    s = torch.cat([1 - x.sigmoid(), x.sigmoid()], 1) if binary else x.softmax(1)
    t = torch.stack([y == c for c in range(s.shape[1])], 1)
    counted = torch.ones_like(y, dtype=torch.bool) if ignore_label is None else y != ignore_label
    counted = counted[:, None]
    s = torch.where(counted, s, torch.zeros_like(s))
    t = (t & counted).to(s)
    sums = (s * t).sum(2), (s**p).sum(2), t.sum(2)
    if gamma is None:
        return sums
    x = torch.cat([torch.zeros_like(x), x], 1) if binary else x
    log_s = torch.where(counted, x, torch.zeros_like(x)).log_softmax(1)
    return *sums, (t * (1 - s) ** gamma * -log_s).sum(2)


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
