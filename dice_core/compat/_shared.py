"""What the modules of `compat` share: class labels as integers, and masks as a label that is
ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, threads


def options(backend: Any, num_threads: Any, check_labels: Any) -> tuple[Any, Any, Any]:
    """How to call dice_core, with a checked number of threads."""
    return backend, None if num_threads is None else threads.resolve(num_threads), check_labels


def number(value: Any, name: str, signed: bool = False) -> float:
    """A finite number, at least 0 unless `signed`; no tensor, which would be read only once."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor")
    if signed and value < 0:
        return -checks.number(-value, name)
    return checks.number(value, name)


def refuse_gradient(target: Tensor, name: str) -> None:
    """Raises NotImplementedError for a target, or a mask, that requires grad."""
    if target.requires_grad:
        raise NotImplementedError(
            f"{name} requires grad, and dice_core computes no gradient for it: pass {name}.detach()"
        )


def class_labels(target: Tensor) -> Tensor:
    """The class labels as integers, truncated copies where they are floating-point numbers."""
    return target.int() if target.is_floating_point() else target


# What `masked` marks ignored voxels with: one for uint8 copies of bool targets, one for the rest.
MASK_LABELS = (254, -32768)


def masked(y: Tensor, counted: Tensor, classes: int = 1) -> tuple[Tensor, int]:
    """A copy of class labels below `classes`, or of soft targets, in which an ignored label stands
    wherever `counted` is 0; and that label.

    Where `counted` is neither 0 nor 1 stands an out-of-range label, which a call refuses.
    """
    label, refused = MASK_LABELS[1], -1
    if y.dtype == torch.bool and classes < MASK_LABELS[0]:
        y, (label, refused) = y.to(torch.uint8), (MASK_LABELS[0], 255)
    elif y.dtype in (torch.bool, torch.uint8, torch.int8):  # whose every number may be in the data
        y = y.to(torch.int16)
    elif y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no negative numbers
        y = y.to(torch.int64)
    if counted.dtype == torch.bool:
        return torch.where(counted, y, label), label
    ignored = torch.full((), label, dtype=y.dtype, device=y.device)
    return torch.where(counted == 1, y, torch.where(counted == 0, ignored, refused)), label
