"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from ..losses import Term
from ..sums import Statistics

_NOT_IN_GROUP = "process_group does not contain this process"


def check(process_group: Any) -> None:
    """Raises TypeError unless this is a process group or "world", ValueError for a group of others,
    which torch gives as a number.
    """
    if isinstance(process_group, str) and process_group == "world":
        return
    if (
        distributed.is_available()
        and isinstance(process_group, int)
        and process_group == distributed.GroupMember.NON_GROUP_MEMBER
    ):
        raise ValueError(_NOT_IN_GROUP)
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
    """The sum of the ranks' arrays, of the same shape, differentiable."""
    group = _group(process_group)
    size = distributed.get_world_size(group)
    result: Tensor = _Sum.apply(array, group, size)  # type: ignore[no-untyped-call]
    return result


def added_counts(counts: Tensor | None, process_group: Any) -> Tensor | None:
    """The sum of the ranks' (K, C) counts, which some of them may lack; None if all do.

    Raises ValueError on every rank if they have different numbers of classes.
    """
    group = _group(process_group)
    device = torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")
    classes = 0 if counts is None else counts.shape[1]
    extremes = torch.tensor([classes, -(classes or 2**31)], device=device)
    distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group)
    most, fewest = int(extremes[0]), -int(extremes[1])
    if not most:
        return None
    if most != fewest:
        raise ValueError(f"the ranks have different numbers of classes, {fewest} to {most}")
    if counts is None:
        counts = torch.zeros(2, most, dtype=torch.float64, device=device)
    return added(counts, process_group)


def _group(process_group: Any) -> Any:
    """The group as torch.distributed takes it, None for that of all ranks."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(
            "process_group needs torch.distributed.init_process_group to be called first"
        )
    group = None if isinstance(process_group, str) else process_group
    if distributed.get_rank(group) < 0:
        raise ValueError(_NOT_IN_GROUP)
    return group


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
