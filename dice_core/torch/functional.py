"""The losses as functions."""

from __future__ import annotations

import collections
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import backends, buffers, losses, spec
from . import operators
from .operators import Options, is_plain

# Differentiable sums over voxels, (N, C) float64 each, as a tuple with their names.
_STATISTICS: dict[tuple[str, ...], Any] = {
    asked.statistics: collections.namedtuple("Statistics", asked.statistics)
    for asked in (
        spec.Spec(gamma=gamma, smoothing=smoothing, binary_gamma=binary_gamma, dense=dense)
        for gamma in (None, 0.0)
        for smoothing in (False, True)
        for binary_gamma in (None, 0.0)
        for dense in (False, True)
    )
}


def statistics(
    x: Tensor,
    y: Tensor,
    *,
    ignore_label: int | None = -1,
    p: int = 1,
    gamma: float | None = None,
    smoothing: bool = False,
    binary_gamma: float | None = None,
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Any:
    """Intersection, pred_sum, target_sum and what else is asked for of logits and labels, a named
    tuple of (N, C) float64 tensors, differentiable in x.

    Replaces, without allocating anything of x's size::

        s = x.softmax(1)
        t = one_hot(y, C).movedim(-1, 1)
        (s * t).sum(spatial), (s**p).sum(spatial), t.sum(spatial)
        (t * (1 - s) ** gamma * -s.log()).sum(spatial)

    Any differentiable function of them is a loss whose backward pass is one pass over x. For the
    arguments see `dice_core.statistics`; `num_threads` is by default torch's own setting.
    """
    asked = spec.asked(
        p=p,
        ignore_label=ignore_label,
        gamma=gamma,
        smoothing=smoothing,
        binary_gamma=binary_gamma,
        activation=activation,
    )
    asked, options = operators.checked(x, y, asked, backend, num_threads, check_labels)
    return _STATISTICS[asked.statistics](*torch.ops.dice_core.statistics(x, y, *options))


def loss(
    x: Tensor,
    y: Tensor,
    term: losses.Term,
    *,
    ignore_label: int | None = -1,
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Tensor:
    """A term of `dice_core.losses`, or a sum of terms, of logits and labels, with autograd.

    Its weights may be tensors, on any device; gradients reach x and those that require grad. For
    the other arguments see `dice_core.loss`.
    """
    needs = {spec.OPTIONS[field]: value for field, value in term.needs.items()}
    asked = spec.asked(ignore_label=ignore_label, activation=activation, **needs)
    asked, options = operators.checked(x, y, asked, backend, num_threads, check_labels)
    samples, classes = x.shape[0], asked.classes(x.shape[1])
    term = term.with_weights(functools.partial(_weight, x=x))
    term.check(classes)
    plain = is_plain(x, y, *term.weights) and not any(w.requires_grad for w in term.weights)
    if plain and (x.is_cpu or term.ratio(samples, classes)):
        if x.requires_grad and torch.is_grad_enabled():
            return _Loss.apply(x, y, term, asked, options)  # type: ignore[no-untyped-call]
        return _value(x, y, term, asked, options)[0]
    value: Tensor = term(torch.ops.dice_core.statistics(x, y, *options), asked.statistics)
    return value if x.dtype == torch.float64 else value.float()


def dice_loss(
    x: Tensor,
    y: Tensor,
    *,
    weight: Any = None,
    ignore_channel: int = -1,
    ignore_label: int | None = -1,
    smooth: float = 0.0,
    p: int = 1,
    reduction: str = "mean",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Tensor:
    """`dice_core.loss` with autograd: the same arguments, formula and errors, in and out as torch
    tensors.

    Gradients reach x, in its dtype, memory format and device, and `weight` if it is a tensor that
    requires grad; y has none. `num_threads` is by default torch's own setting.
    """
    return loss(
        x,
        y,
        losses.dice(weight, ignore_channel, smooth, p, reduction),
        ignore_label=ignore_label,
        backend=backend,
        num_threads=num_threads,
        check_labels=check_labels,
    )


class _Loss(torch.autograd.Function):
    """A loss of plain tensors as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, term: losses.Term, asked: spec.Spec, options: Options
    ) -> Tensor:
        value, ctx.derivative = _value(x, y, term, asked, options)
        ctx.save_for_backward(x, y)
        ctx.options = options
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        derivative = ctx.derivative
        if not is_plain(x, y, grad) or torch.is_grad_enabled():
            # The operator, unlike its kernel, can be traced and refuses a second derivative.
            if not isinstance(derivative, Tensor):
                derivative = torch.from_numpy(derivative)
            cotangent = losses.times(grad, derivative)
            of_x = torch.ops.dice_core.statistics_grad(x, y, cotangent, *ctx.options)
        elif x.is_cpu:
            cotangent = losses.times(grad.numpy(), derivative)
            of_x = operators.statistics_grad(x, y, cotangent, *ctx.options)
        else:
            of_x = operators.statistics_grad(x, y, derivative, *ctx.options, scale=grad)
        return of_x, None, None, None, None


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _value(
    x: Tensor, y: Tensor, term: losses.Term, asked: spec.Spec, options: Options
) -> tuple[Tensor, Any]:
    """The loss of plain tensors and its derivative for the sums: NumPy's, or on a GPU, where it is
    a ratio, torch's.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_cpu:
        term = term.with_weights(Tensor.numpy)
        sums = operators.statistics(x, y, *options).numpy()
        value, derivative = term.with_derivative(sums, asked.statistics)
        return torch.from_numpy(np.asarray(value, _NUMPY[dtype])), derivative
    at, kernels, _, check_labels = operators.request(x, y, options)
    value = x.new_empty(term.shape(*at.sums_shape[1:]), dtype=dtype)
    derivative = x.new_empty(at.sums_shape, dtype=torch.float64)
    backends.loss(
        kernels,
        at,
        buffers.of(value, "loss"),
        buffers.of(derivative, "derivative"),
        term.ratio(*at.sums_shape[1:]),
        buffers.of(term.weights[0].contiguous(), "weight") if term.weights else None,
        check_labels,
    )
    return value, derivative


def _weight(weight: Any, x: Tensor) -> Tensor:
    """In float64 and where x is; the host's numbers are copied to a GPU once, not at every call."""
    if isinstance(weight, Tensor):
        if not (weight.is_cpu and x.is_cuda and is_plain(weight) and not weight.requires_grad):
            return weight.to(x.device, torch.float64)
        weight = weight.double().numpy()
    if x.is_cuda and is_plain(x):
        return _copied(weight.tobytes(), weight.shape, x.device)
    return torch.as_tensor(weight, device=x.device)


@functools.lru_cache(64)
def _copied(numbers: bytes, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(numbers).reshape(shape).copy()).to(device)
