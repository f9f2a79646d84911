"""Two torch operators, `dice_core::statistics` and its vector-Jacobian product
`dice_core::statistics_grad`. Only they access voxels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import allocators, buffers, calls, checks, spec
from ..losses.terms import is_traced
from ..spec import Spec
from ..sums import Statistics
from . import dtensors, transforms

# The operators' arguments after their tensors: the fields of a Spec, then options of the call. The
# ignored label is text, since labels may be uint64 and an operator's integers are int64.
_SPEC = (
    "str activation, int p, str? ignore_label, float? gamma, bool nll, float? binary_gamma, "
    "bool target_square, str targets"
)
_OPTIONS = f"{_SPEC}, str? backend, int? num_threads, bool? check_labels"
_SPEC_LENGTH = _SPEC.count(",") + 1


def check(x: Tensor, y: Tensor, request: Spec) -> None:
    """Raises TypeError, ValueError or NotImplementedError for unsupported tensors."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        name, value = ("y", y) if isinstance(x, Tensor) else ("x", x)
        raise TypeError(
            f"{name} must be a torch tensor, got {type(value).__name__}; "
            f"dice_core.loss takes other arrays"
        )
    if x.is_nested or y.is_nested:
        buffers.of(x if x.is_nested else y, "x" if x.is_nested else "y")
    if y.requires_grad:
        raise NotImplementedError(
            "y requires grad, but dice_core computes no gradient for targets: pass y.detach()"
        )
    if x.device != y.device:
        checks.same_device(str(x.device), str(y.device))
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(transforms.REVERSE_ONLY)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors on the host or on one GPU that nothing traces, transforms or
    intercepts, so that their memory may be accessed outside torch.
    """
    if is_traced(torch):
        return False
    device = tensors[0].device
    for t in tensors:
        if not (
            type(t) in (Tensor, torch.nn.Parameter)
            and (t.is_cpu or t.is_cuda)
            and t.device == device
            and not t.is_neg()
            and not torch._C._functorch.is_legacy_batchedtensor(t)
        ):
            return False
    return True


def statistics(
    x: Tensor,
    y: Tensor,
    request: Spec,
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Statistics:
    """The sums of checked tensors, differentiable in x."""
    if dtensors.is_one(x) or dtensors.is_one(y):
        given = request, backend, num_threads, check_labels
        return dtensors.statistics(x, y, request, lambda x, y: statistics(x, y, *given))
    checks.backend(backend)
    request = spec.for_shapes(x.shape, y.shape, request)
    options = (*_options(request), backend, num_threads, check_labels)
    if transforms.is_active():
        array = transforms.Sums.apply(x, y, options)  # type: ignore[no-untyped-call]
    else:
        array = torch.ops.dice_core.statistics(x, y, *options)
    return Statistics(array, request, str(x.dtype).removeprefix("torch."))


def statistics_grad(
    x: Tensor,
    y: Tensor,
    cotangent: Tensor,
    request: Spec,
    backend: str | None,
    num_threads: int | None,
) -> Tensor:
    """The gradient of sum(cotangent * statistics) with respect to x; can be traced."""
    grad: Tensor = torch.ops.dice_core.statistics_grad(
        x, y, cotangent, *_options(request), backend, num_threads, None
    )
    return grad


def _options(request: Spec) -> tuple[Any, ...]:
    return (
        request.activation,
        request.p,
        None if request.ignore_label is None else str(request.ignore_label),
        request.gamma,
        request.nll,
        request.binary_gamma,
        request.target_square,
        request.targets,
    )


# ---- the operators: in torch.library, so that torch.compile and export do not trace into them ----

_library = torch.library.Library("dice_core", "DEF")
_library.define(f"statistics(Tensor x, Tensor y, {_OPTIONS}) -> Tensor")
_library.define(f"statistics_grad(Tensor x, Tensor y, Tensor cotangent, {_OPTIONS}) -> Tensor")


def _spec(options: tuple[Any, ...]) -> Spec:
    activation, p, ignore_label, *others = options[:_SPEC_LENGTH]
    return Spec(activation, p, None if ignore_label is None else int(ignore_label), *others)


def _call(x: Tensor, y: Tensor, options: tuple[Any, ...]) -> calls.Call:
    backend, num_threads, check_labels = options[_SPEC_LENGTH:]
    request = _spec(options)
    return calls.call(x, y, request, backend, num_threads or torch.get_num_threads(), check_labels)


def _statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """(K, N, C) float64 on x's device."""
    return torch.as_tensor(_call(x, y, options).statistics().array)


def _statistics_grad(x: Tensor, y: Tensor, cotangent: Tensor, *options: Any) -> Tensor:
    grad: Tensor = allocators.empty_like(x, "x")
    cotangent = cotangent.detach().contiguous()
    numbers = cotangent.numpy() if x.is_cpu else cotangent
    _call(x, y, options).gradient(numbers, None, buffers.of(grad, "grad"))
    return grad


def _fake_statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    request = spec.for_shapes(x.shape, y.shape, _spec(options))
    return x.new_empty(request.sums_shape(x.shape), dtype=torch.float64)


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
    raise RuntimeError(transforms.FIRST_ONLY)


for _name, _kernel, _fake, _setup, _vjp in (
    ("statistics", _statistics, _fake_statistics, _save, _backward),
    ("statistics_grad", _statistics_grad, _fake_statistics_grad, None, _no_second_derivative),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dice_core::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"dice_core::{_name}", _vjp, setup_context=_setup, lib=_library)
