"""The sums under the transforms of torch.func: grad, vjp and jacrev in x, and vmap.

An operator with an autograd formula cannot be differentiated by torch.func; an autograd.Function
around it can. Samples are independent, so that a vmap of either pass is one pass over more samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_ONLY = "dice_core computes first derivatives only and cannot be differentiated twice"
REVERSE_ONLY = (
    "dice_core supports reverse-mode differentiation only, neither jvp nor jacfwd: use backward(), "
    "torch.autograd.grad, torch.func.grad or torch.func.jacrev"
)


def is_active() -> bool:
    """Whether a transform of torch.func is active; torch.compile handles its own."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active())


class Sums(torch.autograd.Function):
    """dice_core::statistics(x, y, *options) with rules for these transforms."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, options: tuple[Any, ...]) -> Tensor:
        sums: Tensor = torch.ops.dice_core.statistics(x, y, *options)
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.options = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        grad = Gradient.apply(x, y, cotangent, ctx.options)  # type: ignore[no-untyped-call]
        return grad, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(REVERSE_ONLY)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor, options: Any) -> Any:
        count = info.batch_size
        x, y = _batched(x, in_dims[0], count, 0), _batched(y, in_dims[1], count, 0)
        sums = Sums.apply(x.flatten(0, 1), y.flatten(0, 1), options)  # type: ignore[no-untyped-call]
        return sums.unflatten(1, x.shape[:2]), 1


class Gradient(torch.autograd.Function):
    """dice_core::statistics_grad(x, y, cotangent, *options) with such rules."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, cotangent: Tensor, options: tuple[Any, ...]) -> Tensor:
        grad: Tensor = torch.ops.dice_core.statistics_grad(x, y, cotangent, *options)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(FIRST_ONLY)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FIRST_ONLY)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, y: Tensor, cotangent: Tensor, options: Any
    ) -> Any:
        count = info.batch_size
        of_x, of_y, of_cotangent, _ = in_dims
        if of_x is None and of_y is None:  # jacrev: a pass per row, rather than copies of x
            rows = cotangent.movedim(of_cotangent, 0)
            grads = [Gradient.apply(x, y, row, options) for row in rows]  # type: ignore[no-untyped-call]
            return torch.stack(grads), 0
        x, y = _batched(x, of_x, count, 0), _batched(y, of_y, count, 0)
        cotangent = _batched(cotangent, of_cotangent, count, 1)
        arrays = x.flatten(0, 1), y.flatten(0, 1), cotangent.flatten(1, 2)
        grad = Gradient.apply(*arrays, options)  # type: ignore[no-untyped-call]
        return grad.unflatten(0, x.shape[:2]), 0


def _batched(array: Tensor, batch: int | None, count: int, samples: int) -> Tensor:
    """The array with the axis of vmap, `batch`, before that of the samples; without that axis,
    repeated `count` times.
    """
    if batch is not None:
        return array.movedim(batch, samples)
    return array.unsqueeze(samples).expand(*array.shape[:samples], count, *array.shape[samples:])
