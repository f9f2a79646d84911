"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ..losses import Term
from ..sums import Statistics


def check(process_group: Any) -> None:
    """Raises TypeError unless this is a process group or "world"."""
    if isinstance(process_group, str) and process_group == "world":
        return
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, 'world' or None, "
            f"got {process_group!r}"
        )


def total(sums: Statistics, term: Term, process_group: Any) -> Statistics:
    """The sums added over the ranks; first over the samples, whose number may then differ between
    ranks, if the term pools them.
    """
    if term.pools_samples:
        sums = sums.pooled()
    return Statistics(added(sums.array, process_group), sums.spec, sums.dtype)


def added(array: Tensor, process_group: Any) -> Tensor:
    """The sum of the ranks' arrays, differentiable."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "process_group needs torch.distributed.init_process_group to be called first"
        )
    group = None if isinstance(process_group, str) else process_group
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError("process_group does not contain this process")
    result: Tensor = _Sum.apply(array, group, size)  # type: ignore[no-untyped-call]
    return result


class _Sum(torch.autograd.Function):
    """The sum over ranks. Every rank computes the same loss of it, so that the gradient of the sum
    of their losses needs no communication.
    """

    @staticmethod
    def forward(ctx: Any, array: Tensor, group: Any, size: int) -> Tensor:
        ctx.size = size
        array = array.contiguous().clone()
        distributed.all_reduce(array, group=group)
        return array

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.size * grad, None, None
