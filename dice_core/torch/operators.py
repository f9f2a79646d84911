"""Two torch operators, `dice_core::statistics` and its vector-Jacobian product
`dice_core::statistics_grad`: all that touches voxels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, buffers, spec, threads

# A Spec's first fields, and backend, num_threads, check_labels.
Options = tuple[Any, ...]
_SUMMED = 6


def checked(
    x: Tensor,
    y: Tensor,
    asked: spec.Spec,
    backend: str | None,
    num_threads: int | None,
    check_labels: bool | None,
) -> tuple[spec.Spec, Options]:
    """What to sum, for y's kind, and the operators' options after x and y, checked."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, got {type(value).__name__}; "
                f"dice_core.loss takes other arrays"
            )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("dice_core computes gradients in reverse mode only")
    label = asked.ignore_label
    if label is not None and not -(2**63) <= label < 2**63:
        raise ValueError(f"ignore_label must fit in torch's int64, got {label}")
    if num_threads is not None:
        num_threads = threads.resolve(num_threads)
    asked = spec.of_shapes(x.shape, y.shape, asked)
    summed = asked.activation, asked.power, label, asked.gamma, asked.smoothing, asked.binary_gamma
    return asked, (*summed, backend, num_threads, check_labels)


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these are tensors of the memory of the host or of one GPU that nothing traces,
    transforms or intercepts: their numbers may be read and written outside torch.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    for t in (x, *others):
        if t is not None and not (
            type(t) in (Tensor, torch.nn.Parameter)
            and (t.is_cpu or t.is_cuda)
            and t.device == x.device
            and not t.is_neg()
            and not torch._C._functorch.is_legacy_batchedtensor(t)
        ):
            return False
    return True


# Defined through torch.library so that torch.compile and export see them whole.

_library = torch.library.Library("dice_core", "DEF")
_OPTIONS = (
    "str activation, int p, int? ignore_label, float? gamma, bool smoothing, float? binary_gamma, "
    "str? backend, int? num_threads, bool? check_labels"
)
_library.define(f"statistics(Tensor x, Tensor y, {_OPTIONS}) -> Tensor")
_library.define(f"statistics_grad(Tensor x, Tensor y, Tensor cotangent, {_OPTIONS}) -> Tensor")


def request(x: Tensor, y: Tensor, options: Options) -> tuple[spec.Call, Any, int, bool | None]:
    """The call, its kernels, how many threads and whether to check labels."""
    backend, num_threads, check_labels = options[_SUMMED:]
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), spec.Spec(*options[:_SUMMED]))
    kernels = backends.select(at.signature, backend)
    return at, kernels, num_threads or torch.get_num_threads(), check_labels


def statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """(K, N, C) float64 on x's device."""
    at, kernels, count, check_labels = request(x, y, options)
    sums = x.new_empty(at.sums_shape, dtype=torch.float64)
    backends.statistics(kernels, at, buffers.of(sums, "sums"), count, check_labels)
    return sums


def statistics_grad(
    x: Tensor, y: Tensor, cotangent: Any, *options: Any, scale: Tensor | None = None
) -> Tensor:
    """The gradient for x of sum(cotangent * statistics); cotangent may be a NumPy array.

    On a GPU each sample's cotangent is multiplied by its entry of scale, () or (N,).
    """
    if isinstance(cotangent, Tensor):
        cotangent = cotangent.contiguous()
    at, kernels, count, _ = request(x, y, options)
    grad: Tensor = buffers.empty_like(x, "x")
    backends.gradient(
        kernels,
        at,
        buffers.of(cotangent, "cotangent"),
        buffers.of(grad, "grad"),
        count,
        None if scale is None else buffers.of(scale, "grad_loss"),
    )
    return grad


def _fake_statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    asked = spec.of_shapes(x.shape, y.shape, spec.Spec(*options[:_SUMMED]))
    return x.new_empty(asked.sums_shape(x.shape), dtype=torch.float64)


def _fake_statistics_grad(x: Tensor, y: Tensor, cotangent: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    grad = torch.ops.dice_core.statistics_grad(x, y, cotangent, *ctx.options)
    return grad, None, *(None for _ in ctx.options)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "dice_core computes first derivatives only: it cannot be differentiated twice"
    )


for _name, _kernel, _fake, _setup, _vjp in (
    ("statistics", statistics, _fake_statistics, _save, _backward),
    ("statistics_grad", statistics_grad, _fake_statistics_grad, None, _no_second_derivative),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dice_core::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"dice_core::{_name}", _vjp, setup_context=_setup, lib=_library)
