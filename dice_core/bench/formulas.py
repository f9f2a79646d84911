"""Every measured loss in naive torch: expected values, and peers to be measured.

Logits (N, C, *) and labels (N, *) give a scalar. One channel means sigmoid and the loss of the
foreground alone, as in the peers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5  # MONAI's default and nnU-Net's choice


def dice(x: Tensor, y: Tensor) -> Tensor:
    """1 - (2 I + SMOOTH) / (P + Y + SMOOTH), mean over samples and classes."""
    return _dice(x, _one_hot(x, y))


def dice_by_comparison(x: Tensor, y: Tensor) -> Tensor:
    """`dice` with the one-hot labels as `y == c`, which a compiler can fuse."""
    if x.shape[1] == 1:
        return dice(x, y)
    classes = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (x.ndim - 2))
    return _dice(x, (y.unsqueeze(1) == classes).to(x.dtype))


def batch_dice(x: Tensor, y: Tensor) -> Tensor:
    """`dice` of sums over the whole batch, as in segmentation-models-pytorch."""
    return _dice(x, _one_hot(x, y), batch=True)


def dice_and_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """`dice` plus the mean cross-entropy, as in MONAI's DiceCELoss."""
    if x.shape[1] == 1:
        return dice(x, y) + F.binary_cross_entropy_with_logits(x, _one_hot(x, y))
    return dice(x, y) + F.cross_entropy(x, y.long())


def foreground_dice_and_cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """`dice_and_cross_entropy`, its Dice without class 0, as in nnU-Net's training."""
    return _dice(x, _one_hot(x, y), first=1) + F.cross_entropy(x, y.long())


def mean(x: Tensor, y: Tensor) -> Tensor:
    """No loss: it reads the logits, and its gradient has their size."""
    return x.mean()


def dice_and_focal(x: Tensor, y: Tensor) -> Tensor:
    """`dice` plus the focal loss of each channel's sigmoid, gamma 2: MONAI's DiceFocalLoss."""
    nll = F.binary_cross_entropy_with_logits(x, _one_hot(x, y), reduction="none")
    return dice(x, y) + ((1 - (-nll).exp()) ** 2 * nll).mean()


def _dice(x: Tensor, target: Tensor, batch: bool = False, first: int = 0) -> Tensor:
    probability = x.sigmoid() if x.shape[1] == 1 else x.softmax(1)
    probability, target = probability[:, first:], target[:, first:]
    axes = [0, *range(2, x.ndim)] if batch else [*range(2, x.ndim)]
    intersection = (probability * target).sum(axes)
    total = probability.sum(axes) + target.sum(axes)
    return (1 - (2 * intersection + SMOOTH) / (total + SMOOTH)).mean()


def _one_hot(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return y.unsqueeze(1).to(x.dtype)
    return F.one_hot(y.long(), x.shape[1]).movedim(-1, 1).to(x.dtype)
