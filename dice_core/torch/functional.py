"""The losses as functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import allocators, buffers, calls, losses, spec, threads
from ..losses import Term
from ..losses.terms import to_numpy
from ..spec import Spec
from ..sums import Statistics
from . import operators
from .operators import is_plain


def loss(
    x: Tensor,
    y: Tensor,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Tensor:
    """`dice_core.loss` on torch tensors, with autograd: the same arguments, formula and errors.

    Replaces, without allocating anything of x's size but the gradient::

        s, t = x.softmax(1), one_hot(y, C).movedim(-1, 1)
        i, p, t = (s * t).sum(spatial), s.sum(spatial), t.sum(spatial)
        loss = (1 - (2 * i + smooth) / (p + t + smooth)).mean()

    Gradients reach x, in its dtype, memory format and device, and class weights that are tensors
    and require grad. `num_threads` defaults to torch's own setting.

    Returns
    -------
    Tensor () for reduction "mean", "sum" and "batch", (N,) for "none", (N, C) for "classes", on x's
    device; float64 for float64 logits, otherwise float32.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `dice_core.loss` does.
    NotImplementedError
        For a y that requires grad, and for forward-mode derivatives.
    RuntimeError
        In a second derivative.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
    request = term.spec(activation, ignore_label)
    return evaluate(x, y, term, request, backend, num_threads, check_labels)


def statistics(
    x: Tensor,
    y: Tensor,
    *,
    ignore_label: int | None = -1,
    p: int = 1,
    gamma: float | None = None,
    nll: bool = False,
    binary_gamma: float | None = None,
    target_square: bool = False,
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Statistics:
    """`dice_core.statistics` as torch tensors, differentiable in x: any differentiable function of
    them is a loss whose backward pass is one pass over x.

    Replaces, without allocating anything of x's size::

        s = x.softmax(1)
        t = one_hot(y, C).movedim(-1, 1)
        (s * t).sum(spatial), (s**p).sum(spatial), t.sum(spatial)
        (t * (1 - s) ** gamma * -s.log()).sum(spatial)

    The parameters are those of `dice_core.statistics`; `num_threads` defaults to torch's own
    setting.

    Returns
    -------
    Statistics, (N, C) float64 tensors on x's device.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, RuntimeError, BackendError
        As `loss` does.
    """
    request = spec.checked(
        activation=activation,
        p=p,
        ignore_label=ignore_label,
        gamma=gamma,
        nll=nll,
        binary_gamma=binary_gamma,
        target_square=target_square,
    )
    operators.check(x, y, request)
    if num_threads is not None:
        num_threads = threads.resolve(num_threads)
    return operators.statistics(x, y, request, backend, num_threads, check_labels)


def evaluate(
    x: Tensor,
    y: Tensor,
    term: Term,
    request: Spec,
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Tensor:
    """The loss `term` of the tensors, computed from the sums `request`."""
    operators.check(x, y, request)
    if num_threads is not None:
        num_threads = threads.resolve(num_threads)
    fused = is_plain(x, y) and (x.is_cpu or _is_ratio(x, y, term, request))
    if term.weights:
        classes = spec.for_shapes(x.shape, y.shape, request).classes(x.shape[1])
        fused = fused and _are_constants(term.weights)
        term = _with_arrays(term, x) if fused else term.like(x)
        term.check(classes)
    if not fused:
        sums = operators.statistics(x, y, request, backend, num_threads, check_labels)
        value: Tensor = term.value(sums)
        return value if x.dtype == torch.float64 else value.float()
    evaluation = _Evaluation(term, request, backend, num_threads, check_labels)
    if x.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(x, y, evaluation)  # type: ignore[no-untyped-call]
    result = evaluation.call(x, y).value(term)
    return torch.from_numpy(result) if x.is_cpu else result


class _Evaluation(NamedTuple):
    """A loss and the options of its computation, without the tensors."""

    term: Term
    spec: Spec
    backend: str | None
    num_threads: int | None
    check_labels: bool | None

    def call(self, x: Tensor, y: Tensor) -> calls.Call:
        """The call for these tensors."""
        count = self.num_threads or torch.get_num_threads()
        return calls.call(x, y, self.spec, self.backend, count, self.check_labels)


class _Loss(torch.autograd.Function):
    """A loss of plain tensors as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, evaluation: _Evaluation) -> Tensor:
        call = evaluation.call(x, y)
        value, ctx.derivative = call.value_and_derivative(evaluation.term)
        ctx.save_for_backward(x, y)
        call.logits.owner = call.labels.owner = None  # only the saved tensors keep them alive
        ctx.call, ctx.evaluation, ctx.strides = call, evaluation, (x.stride(), y.stride())
        return torch.from_numpy(value) if x.is_cpu else value

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None, None]:
        x, y = ctx.saved_tensors
        call, evaluation = ctx.call, ctx.evaluation
        if torch.is_grad_enabled() or not is_plain(x, y, grad_loss):
            # The operator, unlike its kernel, can be traced and refuses a second derivative.
            cotangent = calls.cotangent(torch.as_tensor(ctx.derivative), grad_loss)
            grad = operators.statistics_grad(
                x, y, cotangent, call.spec, evaluation.backend, evaluation.num_threads
            )
            return grad, None, None
        if (
            x.is_cpu
            and (x.data_ptr(), y.data_ptr()) == (call.logits.address, call.labels.address)
            and (x.stride(), y.stride()) == ctx.strides
        ):
            call.logits.owner, call.labels.owner = x, y
        else:  # on a GPU, or after hooks have moved the saved tensors
            call = evaluation.call(x, y)
        grad = allocators.empty_like(x, "x")
        at = buffers.of(grad, "grad")
        call.gradient(ctx.derivative, grad_loss.numpy() if x.is_cpu else grad_loss, at)
        call.logits.owner = call.labels.owner = None
        return grad, None, None


def _is_ratio(x: Tensor, y: Tensor, term: Term, request: Spec) -> bool:
    """Whether the CUDA kernels compute the loss itself, as they do for a ratio of I, P and Y,
    rather than torch from the sums.
    """
    if x.ndim < 2 or (request.target_square and x.shape == y.shape):
        return False
    return term.ratio(x.shape[0], request.classes(x.shape[1])) is not None


def _are_constants(weights: tuple[Any, ...]) -> bool:
    """Whether these class weights are numbers or plain tensors that do not require grad."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    return all(is_plain(weight) and not weight.requires_grad for weight in tensors)


def _with_arrays(term: Term, x: Tensor) -> Term:
    """The term with its class weights as the fused loss needs them: tensors that are on x's GPU
    already, else NumPy arrays, of which each call finds a cached copy on the GPU.
    """
    weights = [
        weight.double().contiguous()
        if isinstance(weight, Tensor) and weight.is_cuda and x.is_cuda
        else to_numpy(weight)
        for weight in term.weights
    ]
    return term.with_weights(weights)
