"""Helpers of the modules of `compat`: class labels as integers, and masks as an ignored label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks


def number(value: Any, name: str, signed: bool = False) -> float:
    """A finite number, at least 0 unless `signed`. Refuses tensors, which might change later."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")
    if signed and value < 0:
        return -checks.number(-value, name)
    return checks.number(value, name)


def refuse_gradient(target: Tensor, name: str) -> None:
    """Raises NotImplementedError for a target, or a mask, that requires grad."""
    if target.requires_grad:
        raise NotImplementedError(
            f"{name} requires grad, but dice_core computes no gradient for it: pass {name}.detach()"
        )


def class_labels(target: Tensor) -> Tensor:
    """The class labels as integers; floating-point labels are copied and truncated."""
    return target.int() if target.is_floating_point() else target


# The ignored labels of `masked`: one for uint8 copies of bool targets, one for all other targets.
MASK_LABELS = (254, -32768)


def masked(y: Tensor, valid: Tensor, classes: int = 1) -> tuple[Tensor, int]:
    """A copy of class labels below `classes`, or of soft targets, with an ignored label wherever
    `valid` is 0; and that label.

    Where `valid` is neither 0 nor 1 the copy has an out-of-range label, which a call refuses.
    """
    label, refused = MASK_LABELS[1], -1
    if y.dtype == torch.bool and classes < MASK_LABELS[0]:
        y, (label, refused) = y.to(torch.uint8), (MASK_LABELS[0], 255)
    elif y.dtype in (torch.bool, torch.uint8, torch.int8):  # any value may occur in the data
        y = y.to(torch.int16)
    elif y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no negative numbers
        y = y.to(torch.int64)
    if valid.dtype == torch.bool:
        return torch.where(valid, y, label), label
    ignored = torch.full((), label, dtype=y.dtype, device=y.device)
    return torch.where(valid == 1, y, torch.where(valid == 0, ignored, refused)), label
