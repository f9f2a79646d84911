"""The losses as functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import allocators, buffers, calls, checks, losses, spec, threads
from ..losses import Term
from ..losses.terms import to_numpy
from ..spec import Spec
from ..sums import Statistics
from . import dtensors, operators, processes
from .operators import is_plain


class Options(NamedTuple):
    """How a loss is computed; see `loss`."""

    backend: str | None = None
    num_threads: int | None = None
    check_labels: bool | None = None
    inplace: bool = False
    process_group: Any = None

    @property
    def of_sums(self) -> tuple[str | None, int | None, bool | None]:
        """Those of the operators."""
        return self[:3]


def options(
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
    inplace: bool = False,
    process_group: Any = None,
) -> Options:
    """Options, checked but for the backend, which may be registered later."""
    if num_threads is not None:
        num_threads = threads.resolve(num_threads)
    if check_labels is not None:
        checks.flag(check_labels, "check_labels")
    if inplace is not False:
        inplace = checks.flag(inplace, "inplace")
    if process_group is not None:
        processes.check(process_group)
    return Options(backend, num_threads, check_labels, inplace, process_group)


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
    inplace: bool = False,
    process_group: Any = None,
) -> Tensor:
    """`dice_core.loss` on torch tensors, with autograd: the same arguments, formula and errors.

    Replaces, without allocating anything of x's size but the gradient::

        s, t = x.softmax(1), one_hot(y, C).movedim(-1, 1)
        i, p, t = (s * t).sum(spatial), s.sum(spatial), t.sum(spatial)
        loss = (1 - (2 * i + smooth) / (p + t + smooth)).mean()

    Gradients reach x, in its dtype, memory format and device, and class weights that are tensors
    and require grad. `num_threads` defaults to torch's own setting. These parameters are added to
    those of `dice_core.loss`:

    Parameters
    ----------
    inplace : bool
        The backward pass overwrites x with its gradient, which takes no memory and saves the page
        faults of a new array. Afterwards x holds its gradient and not logits, for whoever reads it
        later, and a backward pass that has saved x as well, as of another loss of it, raises
        torch's error. A new gradient is allocated after all where saved tensors are moved or
        recomputed, as in activation checkpointing, and with create_graph=True.
    process_group : torch.distributed.ProcessGroup or "world", optional
        Sums are added over the ranks of this group, or of all ranks, before the loss is computed,
        in one collective call per loss. With a loss that pools samples, batches of any size give
        the loss of a single process on every rank, and so does any loss of volumes split in space,
        where sample n of every rank is a part of the same volume; the ranks must then have equally
        many samples (TORCH_DISTRIBUTED_DEBUG=DETAIL names those that have not). Gradients of x are
        those of the sum of the ranks' equal losses, W times those of a single process for W ranks,
        so that the mean over ranks that DistributedDataParallel and FSDP take is exact; those of
        class weights are the same on every rank. A module that holds a ProcessGroup can be neither
        copied nor pickled, one that holds "world" can.

    Returns
    -------
    Tensor () for reduction "mean", "sum" and "batch", (N,) for "none", (N, C) for "classes", on x's
    device; float64 for float64 logits, otherwise float32.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `dice_core.loss` does. With inplace, ValueError for an x that is a leaf, or a view of
        one, or has elements that share memory.
    NotImplementedError
        For a y that requires grad, and for forward-mode derivatives; with inplace, for tensors that
        are traced or transformed, as in torch.compile.
    RuntimeError
        In a second derivative.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
    request = term.spec(activation, ignore_label)
    given = options(backend, num_threads, check_labels, inplace, process_group)
    return evaluate(x, y, term, request, given)


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
    given = options(backend, num_threads, check_labels)
    operators.check(x, y, request)
    return operators.statistics(x, y, request, *given.of_sums)


def evaluate(x: Tensor, y: Tensor, term: Term, request: Spec, options: Options) -> Tensor:
    """The loss `term` of the tensors, computed from the sums `request`."""
    operators.check(x, y, request)
    fused = (
        is_plain(x, y)
        and term.has_derivative
        and options.process_group is None
        and (x.is_cpu or _is_ratio(x, y, term, request))
    )
    if term.weights:
        classes = spec.for_shapes(x.shape, y.shape, request).classes(x.shape[1])
        fused = fused and _are_constants(term.weights)
        term = _with_arrays(term, x) if fused else term.like(x)
        term.check(classes)
    if options.process_group is not None and dtensors.is_one(x):
        raise ValueError(
            "process_group was given, but x is a DTensor, whose mesh has the ranks to be added"
        )
    if not fused:
        return of_sums(sums(x, y, request, options), term, options)
    evaluation = _Evaluation(term, request, options)
    if x.requires_grad and torch.is_grad_enabled():
        if options.inplace:
            _check_inplace(x, y)
        return _Loss.apply(x, y, evaluation)  # type: ignore[no-untyped-call]
    result = evaluation.call(x, y).value(term)
    return torch.from_numpy(result) if x.is_cpu else result


def of_sums(sums: Statistics, term: Term, options: Options) -> Tensor:
    """The loss `term` of these sums of one process, in torch arithmetic."""
    if options.process_group is not None:
        sums = processes.total(sums, term, options.process_group)
    value: Tensor = term.value(sums)
    return value if sums.dtype == "float64" else value.float()


def sums(x: Tensor, y: Tensor, request: Spec, options: Options) -> Statistics:
    """The sums of checked tensors, differentiable in x; with options.inplace, their gradient
    overwrites x.
    """
    if not (options.inplace and x.requires_grad and torch.is_grad_enabled()):
        return operators.statistics(x, y, request, *options.of_sums)
    _check_inplace(x, y)
    array = _Loss.apply(x, y, _Evaluation(None, request, options))  # type: ignore[no-untyped-call]
    request = spec.for_shapes(x.shape, y.shape, request)
    return Statistics(array, request, str(x.dtype).removeprefix("torch."))


def _check_inplace(x: Tensor, y: Tensor) -> None:
    """Raises unless the gradient of x may overwrite it in the backward pass."""
    if not is_plain(x, y):
        raise NotImplementedError(
            "inplace=True needs plain tensors on one device; it cannot be used within "
            "torch.compile, torch.export or torch.func, or with subclasses of Tensor"
        )
    base = x if x._base is None else x._base
    if base.is_leaf:
        what = "x is a leaf tensor" if base is x else "x is a view of a leaf tensor"
        raise ValueError(
            f"inplace=True would overwrite x with its gradient, but {what}: pass the output of a "
            f"network, or leave inplace=True out"
        )
    if buffers.may_overlap_itself(buffers.of(x, "x").layout):
        raise ValueError(
            f"inplace=True needs an x without elements that share memory, got strides {x.stride()}"
        )


class _Evaluation(NamedTuple):
    """A loss, or None for the sums themselves, and its options, without the tensors."""

    term: Term | None
    spec: Spec
    options: Options

    def call(self, x: Tensor, y: Tensor) -> calls.Call:
        """The call for these tensors."""
        backend, num_threads, check_labels = self.options.of_sums
        count = num_threads or torch.get_num_threads()
        return calls.call(x, y, self.spec, backend, count, check_labels)


class _Loss(torch.autograd.Function):
    """A loss of plain tensors, or their sums, as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, evaluation: _Evaluation) -> Tensor:
        call = evaluation.call(x, y)
        if evaluation.term is None:
            value, ctx.derivative = call.statistics().array, None
        else:
            value, ctx.derivative = call.value_and_derivative(evaluation.term)
        ctx.save_for_backward(x, y)
        call.logits.owner = call.labels.owner = None  # only the saved tensors keep them alive
        ctx.call, ctx.evaluation, ctx.strides = call, evaluation, (x.stride(), y.stride())
        if evaluation.options.inplace:
            ctx.storage, ctx.version = StorageWeakRef(x.untyped_storage()), x._version
        return torch.from_numpy(value) if x.is_cpu else value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        x, y = ctx.saved_tensors
        call, options = ctx.call, ctx.evaluation.options
        if torch.is_grad_enabled() or not is_plain(x, y, grad_output):
            # The operator, unlike its kernel, can be traced and refuses a second derivative.
            cotangent = grad_output
            if ctx.derivative is not None:
                cotangent = calls.cotangent(torch.as_tensor(ctx.derivative), grad_output)
            grad = operators.statistics_grad(
                x, y, cotangent, call.spec, options.backend, options.num_threads
            )
            return grad, None, None
        if (
            x.is_cpu
            and (x.data_ptr(), y.data_ptr()) == (call.logits.address, call.labels.address)
            and (x.stride(), y.stride()) == ctx.strides
        ):
            call.logits.owner, call.labels.owner = x, y
        else:  # on a GPU, or after hooks have moved the saved tensors
            call = ctx.evaluation.call(x, y)
        if options.inplace and ctx.storage == StorageWeakRef(x.untyped_storage()):
            grad = _overwritten(x, ctx.version)
        else:
            grad = allocators.empty_like(x, "x")
        scale: Any = grad_output.numpy() if x.is_cpu else grad_output.contiguous()
        derivative, scale = (scale, None) if ctx.derivative is None else (ctx.derivative, scale)
        call.gradient(derivative, scale, buffers.of(grad, "grad"))
        call.logits.owner = call.labels.owner = None
        return grad, None, None


def _overwritten(x: Tensor, version: int) -> Tensor:
    """The memory of x, of this version, as the tensor for its gradient."""
    if x._version != version:  # torch does not check it where saved tensors have hooks
        raise RuntimeError(
            f"x, whose gradient inplace=True would write over it, has been modified since the "
            f"loss was computed: it is at version {x._version}, expected {version}"
        )
    allocators.mark_changed(x)
    return x.detach()


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
