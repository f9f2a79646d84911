"""What translations share: a look at targets, and masks as a label that is ignored."""

from __future__ import annotations

import torch
from torch import Tensor


def class_labels(target: Tensor) -> Tensor:
    """The class labels as integers, a copy where they are floating-point numbers."""
    return target.int() if target.is_floating_point() else target


def soft(target: Tensor) -> bool:
    """Whether a dense target has values between 0 and 1.

    Looks at floating-point targets only, a channel at a time; on a GPU that waits for the answer.
    """
    if not target.is_floating_point():
        return False
    between = [((t > 0) & (t < 1)).any() for t in target.unbind(1)]
    return bool(torch.stack(between).any())


def masked(y: Tensor, counted: Tensor, classes: int = 1) -> tuple[Tensor, int]:
    """A copy of class labels below `classes`, or of dense targets, in which a label that neither
    has stands wherever `counted`, bool, is False; and that label.
    """
    if y.dtype == torch.bool:
        y = y.to(torch.uint8)
    elif y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no negative numbers
        y = y.to(torch.int64)
    # Not -1 or 255, which data may hold: those are to be refused where they are counted.
    label = 254
    if y.dtype == torch.uint8 and classes > label:
        y = y.to(torch.int16)
    if y.dtype != torch.uint8:
        label = -128  # exact in every floating-point dtype
    return torch.where(counted, y, label), label
