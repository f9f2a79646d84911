"""Logits and targets that are DTensors, sharded in samples or in space."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spec import Spec
from ..sums import Statistics


def is_one(tensor: Any) -> bool:
    """Whether this is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def statistics(x: Any, y: Any, request: Spec, compute: Callable[..., Statistics]) -> Statistics:
    """The sums of all shards, on every rank, as plain tensors differentiable in x. `compute` makes
    those of a local shard.

    Raises TypeError unless both are DTensors, ValueError unless they are sharded alike.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    for name, value in (("x", x), ("y", y)):
        if not is_one(value):
            raise TypeError(
                f"{name} must be a DTensor like {'y' if name == 'x' else 'x'}, got "
                f"{type(value).__name__}; torch.distributed.tensor.distribute_tensor makes one"
            )
    mesh = x.device_mesh
    of_sums: list[Any] = []
    expected = tuple(_of_targets(each, y.ndim - x.ndim) for each in x.placements)
    if y.device_mesh != mesh or tuple(y.placements) != expected:
        raise ValueError(
            f"y must be sharded like x, over the same mesh and placed {expected}, got "
            f"{tuple(y.placements)}"
        )
    for placement in x.placements:
        if placement.is_replicate():
            of_sums.append(Replicate())
        else:
            of_sums.append(Shard(1) if placement.is_shard(0) else Partial())
    local = compute(x.to_local(), y.to_local())
    shape = len(local.spec.fields), x.shape[0], local.array.shape[2]
    strides = shape[1] * shape[2], shape[2], 1
    shards = DTensor.from_local(
        local.array, mesh, of_sums, run_check=False, shape=torch.Size(shape), stride=strides
    )
    array: Tensor = shards.full_tensor()
    return Statistics(array, local.spec, local.dtype)


def _of_targets(placement: Any, axes_less: int) -> Any:
    """The placement of the targets for one of the logits."""
    from torch.distributed.tensor import Shard

    if (
        placement.is_partial()
        or placement.is_shard(1)
        or not (placement.is_replicate() or type(placement) is Shard)
    ):
        raise ValueError(
            f"x is placed {placement}, but only logits that are replicated, or sharded in samples "
            f"or in space, are supported: redistribute them"
        )
    if placement.is_replicate() or placement.is_shard(0):
        return placement
    return Shard(placement.dim + axes_less)
