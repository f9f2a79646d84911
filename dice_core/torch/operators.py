"""Two torch operators, `dice_core::statistics` and its vector-Jacobian product
`dice_core::statistics_grad`. Only they, and those of `linear.py`, access voxels.
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
OPTIONS = f"{_SPEC}, str? backend, int? num_threads, bool? check_labels"
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
    refuse_grad(y)
    if x.device != y.device:
        checks.same_device(str(x.device), str(y.device))
    refuse_tangent(x)


def refuse_grad(y: Tensor) -> None:
    """Raises NotImplementedError for targets that require grad."""
    if y.requires_grad:
        raise NotImplementedError(
            "y requires grad, but dice_core computes no gradient for targets: pass y.detach()"
        )


def refuse_tangent(x: Tensor) -> None:
    """Raises NotImplementedError in forward-mode differentiation with respect to x."""
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
    options = (*spec_options(request), backend, num_threads, check_labels)
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
        x, y, cotangent, *spec_options(request), backend, num_threads, None
    )
    return grad


def spec_options(request: Spec) -> tuple[Any, ...]:
    """The first of the operators' OPTIONS: those of the Spec."""
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


def register(schema: str, kernel: Any, fake: Any, vjp: Any, save: Any = None) -> None:
    """Defines an operator: its kernel, for all devices; the shapes of its result, `fake`; its
    vector-Jacobian product, and what it saves for that.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dice_core::{name}", fake, lib=_library)
    torch.library.register_autograd(f"dice_core::{name}", vjp, setup_context=save, lib=_library)


def spec_of(options: tuple[Any, ...]) -> Spec:
    """The Spec of an operator's OPTIONS."""
    activation, p, ignore_label, *others = options[:_SPEC_LENGTH]
    return Spec(activation, p, None if ignore_label is None else int(ignore_label), *others)


def call(x: Tensor, y: Tensor, options: tuple[Any, ...]) -> calls.Call:
    """The call of an operator's OPTIONS on these tensors."""
    backend, num_threads, check_labels = options[_SPEC_LENGTH:]
    request = spec_of(options)
    return calls.call(x, y, request, backend, num_threads or torch.get_num_threads(), check_labels)


def _statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """(K, N, C) float64 on x's device."""
    return torch.as_tensor(call(x, y, options).statistics().array)


def _statistics_grad(x: Tensor, y: Tensor, cotangent: Tensor, *options: Any) -> Tensor:
    grad: Tensor = allocators.empty_like(x, "x")
    cotangent = cotangent.detach().contiguous()
    numbers = cotangent.numpy() if x.is_cpu else cotangent
    call(x, y, options).gradient(numbers, None, buffers.of(grad, "grad"))
    return grad


def _fake_statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    request = spec.for_shapes(x.shape, y.shape, spec_of(options))
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


def no_second_derivative(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    """Raises RuntimeError: the derivative of an operator that is a derivative."""
    raise RuntimeError(transforms.FIRST_ONLY)


register(
    f"statistics(Tensor x, Tensor y, {OPTIONS}) -> Tensor",
    _statistics,
    _fake_statistics,
    _backward,
    _save,
)
register(
    f"statistics_grad(Tensor x, Tensor y, Tensor cotangent, {OPTIONS}) -> Tensor",
    _statistics_grad,
    _fake_statistics_grad,
    no_second_derivative,
)
