"""Helpers of the modules of `compat`: class labels as integers, and masks as an ignored label."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from .. import checks


def number(value: Any, name: str, signed: bool = False) -> float:
    """A finite number, at least 0 unless `signed`. Refuses tensors, which might change later."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")
    if signed and isinstance(value, numbers.Real) and value < 0:
        return -checks.number(-value, name)
    return checks.number(value, name)


def check_tensors(x: Any, y: Any, x_name: str, y_name: str) -> None:
    """Raises TypeError unless both are dense tensors; ValueError if they are on two devices, or one
    has no axis of samples, or x none of channels.
    """
    for value, name, axes in ((x, x_name, 2), (y, y_name, 1)):
        check_tensor(value, name)
        if value.ndim < axes:
            raise ValueError(f"{name} has too few axes, got shape {tuple(value.shape)}")
    check_device(y, x, y_name, x_name)


def check_tensor(value: Any, name: str) -> None:
    """Raises TypeError unless this is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got one that is {layout}")


def check_mask(mask: Any, x: Tensor, name: str, x_name: str) -> None:
    """Raises TypeError or ValueError unless this is a dense tensor on the logits' device."""
    check_tensor(mask, name)
    check_device(mask, x, name, x_name)


def check_device(tensor: Tensor, x: Tensor, name: str, x_name: str) -> None:
    """Raises ValueError unless this tensor is on the logits' device."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but {x_name} is on {x.device}")


def as_tensor(values: Any, name: str) -> Tensor:
    """Class weights, or classes, as a tensor of numbers."""
    try:
        result = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers, one per class, got {values!r}") from None
    if result.is_complex():
        raise TypeError(f"{name} must be real numbers, got {result.dtype}")
    return result


def check_callable(value: Any, name: str) -> None:
    """Raises TypeError unless this is a function of a tensor, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be None or callable, got {type(value).__name__}")


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
