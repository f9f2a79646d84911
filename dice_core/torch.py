"""The loss with autograd, on torch tensors.

Two torch operators, `dice_core::statistics` and its vector-Jacobian product
`dice_core::statistics_grad`, are all that touch voxels; the losses are ordinary torch arithmetic on
(3, N, C) numbers. On plain tensors that arithmetic would take longer than many images: there
`dice_loss` is a single node of the graph, its arithmetic NumPy's or, on a GPU, part of the kernels.
Between forward and backward only x, y and numbers of that size are kept.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, buffers, losses, spec, threads

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
    asked, options = _options(x, y, asked, backend, num_threads, check_labels)
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
    asked, options = _options(x, y, asked, backend, num_threads, check_labels)
    samples, classes = x.shape[0], asked.classes(x.shape[1])
    term = term.with_weights(functools.partial(_weight, x=x))
    term.check(classes)
    plain = _plain(x, y, *term.weights) and not any(w.requires_grad for w in term.weights)
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


class Loss(torch.nn.Module):
    """`loss` of a term as a module; the weights of its classes are buffers.

    >>> import torch, dice_core.torch
    >>> from dice_core.losses import CrossEntropy, Dice
    >>> criterion = dice_core.torch.Loss(Dice(smooth=1) + 0.5 * CrossEntropy())
    >>> x = torch.zeros(1, 2, 8, 8, requires_grad=True)
    >>> y = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> criterion(x, y)
    tensor(0.9964, grad_fn=<_LossBackward>)
    """

    def __init__(
        self,
        term: losses.Term,
        ignore_label: int | None = -1,
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        self.term = losses.term(term)
        self.ignore_label = spec.label(ignore_label)
        spec.one_of(activation, "activation", spec.ACTIVATIONS)
        self.activation = activation
        self._names = [f"weight{i}" if i else "weight" for i in range(len(self.term.weights))]
        for name, weight in zip(self._names, self.term.weights, strict=True):
            if isinstance(weight, Tensor):
                spec.weights(weight.detach().double().cpu())
            self.register_buffer(name, torch.as_tensor(weight))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (N, C, *) and labels (N, *) or (N, 1, *) -> the loss."""
        return loss(
            x, y, self._weighted(), ignore_label=self.ignore_label, activation=self.activation
        )

    def extra_repr(self) -> str:
        """The term, its settings and the weights that the buffers hold."""
        activation = "" if self.activation == "softmax" else f", activation={self.activation!r}"
        return f"{self._weighted()!r}, ignore_label={self.ignore_label}{activation}"

    def _weighted(self) -> losses.Term:
        weights = iter([getattr(self, name) for name in self._names])
        return self.term.with_weights(lambda _: next(weights))


class DiceLoss(Loss):
    """`dice_loss` as a module; `weight` is a buffer.

    >>> import torch, dice_core.torch
    >>> criterion = dice_core.torch.DiceLoss(smooth=1)
    >>> x = torch.zeros(1, 2, 8, 8, requires_grad=True)
    >>> y = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> criterion(x, y)
    tensor(0.6498, grad_fn=<_LossBackward>)
    """

    def __init__(
        self,
        weight: Any = None,
        ignore_channel: int = -1,
        ignore_label: int | None = -1,
        smooth: float = 0,
        p: int = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            losses.dice(weight, ignore_channel, smooth, p, reduction), ignore_label=ignore_label
        )


class JaccardLoss(Loss):
    """`dice_core.losses.Jaccard`, whose settings it takes, as a module."""

    def __init__(self, *, ignore_label: int | None = -1, **settings: Any) -> None:
        super().__init__(losses.Jaccard(**settings), ignore_label)


class TverskyLoss(Loss):
    """`dice_core.losses.Tversky`, whose settings it takes, as a module."""

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        *,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        super().__init__(losses.Tversky(alpha=alpha, beta=beta, **settings), ignore_label)


class FocalTverskyLoss(Loss):
    """`dice_core.losses.FocalTversky`, whose settings it takes, as a module."""

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        *,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        term = losses.FocalTversky(alpha=alpha, beta=beta, gamma=gamma, **settings)
        super().__init__(term, ignore_label)


class GeneralizedDiceLoss(Loss):
    """`dice_core.losses.GeneralizedDice`, whose settings it takes, as a module."""

    def __init__(
        self, weighting: str = "square", *, ignore_label: int | None = -1, **settings: Any
    ) -> None:
        super().__init__(losses.GeneralizedDice(weighting=weighting, **settings), ignore_label)


class DiceCELoss(Loss):
    """lambda_dice Dice + lambda_ce CrossEntropy as a module, in one pass over the voxels.

    `weight`, (C,) numbers, weighs the classes of both, whose means it normalises; the other
    settings are those of `dice_core.losses.Dice`.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        *,
        weight: Any = None,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        entropy = losses.CrossEntropy(weight=weight)
        super().__init__(
            lambda_dice * _weighted_dice(weight, settings) + lambda_ce * entropy, ignore_label
        )


class DiceFocalLoss(Loss):
    """lambda_dice Dice + lambda_focal Focal(gamma) as a module, in one pass over the voxels.

    `weight`, (C,) numbers, weighs the classes of both; the other settings are those of
    `dice_core.losses.Dice`.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        gamma: float = 2.0,
        *,
        weight: Any = None,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        focal = losses.Focal(gamma=gamma, weight=weight)
        super().__init__(
            lambda_dice * _weighted_dice(weight, settings) + lambda_focal * focal, ignore_label
        )


def _weighted_dice(weight: Any, settings: dict[str, Any]) -> losses.Dice:
    if weight is not None:
        settings = {"divisor": "weights", **settings}
    return losses.Dice(weight=weight, **settings)


class DiceScore(torch.nn.Module):
    """The Dice of each class of what logits decide for, over all that it was given: update, compute
    and reset, as torchmetrics has them.

    `compute` gives (C,), NaN for a class in neither decisions nor labels: the Dice of all voxels
    together, or with `per_sample` the mean of the samples', of those that have one. `iou` gives the
    IoU instead. Called, it updates and gives that of the batch.

    >>> import torch, dice_core.torch
    >>> score = dice_core.torch.DiceScore()
    >>> score.update(torch.eye(3)[None], torch.tensor([[0, 1, 1]]))
    >>> score.compute()
    tensor([1.0000, 0.6667, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        ignore_label: int | None = -1,
        activation: str = "softmax",
        per_sample: bool = False,
        iou: bool = False,
    ) -> None:
        super().__init__()
        spec.one_of(activation, "activation", tuple(spec.HARD))
        self.ignore_label, self.activation = spec.label(ignore_label), activation
        self.per_sample, self.iou = per_sample, iou
        self.reset()

    def reset(self) -> None:
        """Forgets what it was given."""
        self.total: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Takes logits (N, C, *) and labels (N, *), (N, 1, *) or like x."""
        sums = self._sums(x, y)
        self.total = sums if self.total is None else self.total + sums

    def compute(self) -> Tensor:
        """(C,) of all that it was given. Raises RuntimeError if that is nothing."""
        if self.total is None:
            raise RuntimeError("DiceScore.compute was called before update")
        return self._score(self.total)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Updates; (C,) of these alone."""
        sums = self._sums(x, y)
        self.total = sums if self.total is None else self.total + sums
        return self._score(sums)

    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """Numerator and denominator of each class, (2, C)."""
        asked = spec.Spec(spec.HARD[self.activation], 1, self.ignore_label)
        asked, options = _options(x.detach(), y, asked, None, None, None)
        both, decided, there = torch.ops.dice_core.statistics(x.detach(), y, *options)[:3]
        num, den = both, decided + there - both if self.iou else (decided + there) / 2
        if self.per_sample:
            num, den = (num / den).nan_to_num(0), (den > 0).to(den)
        return torch.stack([num.sum(0), den.sum(0)])

    @staticmethod
    def _score(sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


class DeepSupervision(torch.nn.Module):
    """A loss summed over the outputs of several resolutions, finest first, times their weights.

    Labels of a lower resolution are strided views of the labels, every second voxel for example: no
    copies. `weights` is a number for each output; None halves from output to output and sums to 1.

    >>> import torch, dice_core.torch
    >>> criterion = dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss(smooth=1))
    >>> outputs = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)]
    >>> criterion(outputs, torch.zeros(1, 8, 8, dtype=torch.uint8))
    tensor(0.6347)
    """

    def __init__(self, loss: torch.nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.weights = None if weights is None else [float(weight) for weight in weights]

    def forward(self, outputs: Sequence[Tensor], y: Tensor) -> Tensor:
        """Logits (N, C, *) of each resolution and labels (N, *) or (N, 1, *) -> the loss.

        Raises ValueError where the labels' sides are not whole multiples of an output's.
        """
        if isinstance(outputs, Tensor) or not outputs:
            raise ValueError("outputs must be a sequence of logits, one for each resolution")
        weights = self.weights
        if weights is None:
            weights = [2.0**-i / (2 - 2.0 ** (1 - len(outputs))) for i in range(len(outputs))]
        if len(weights) != len(outputs):
            raise ValueError(f"there are {len(weights)} weights for {len(outputs)} outputs")
        pairs = zip(weights, outputs, strict=True)
        terms = [weight * self.loss(x, _nearest(y, x)) for weight, x in pairs if weight]
        return torch.stack(terms).sum(0)


def _nearest(y: Tensor, x: Tensor) -> Tensor:
    """The labels of every so many voxels, as a view."""
    fine, coarse = y.shape[y.ndim - x.ndim + 2 :], x.shape[2:]
    if any(not b or a % b for a, b in zip(fine, coarse, strict=True)):
        raise ValueError(
            f"labels of {tuple(fine)} voxels cannot be taken at a resolution of {tuple(coarse)}: "
            f"each side must be a whole multiple"
        )
    for axis, (a, b) in enumerate(zip(fine, coarse, strict=True), y.ndim - len(fine)):
        y = y[(slice(None),) * axis + (slice(None, None, a // b),)]
    return y


def _weight(weight: Any, x: Tensor) -> Tensor:
    """In float64 and where x is; the host's numbers are copied to a GPU once, not at every call."""
    if isinstance(weight, Tensor):
        if not (weight.is_cpu and x.is_cuda and _plain(weight) and not weight.requires_grad):
            return weight.to(x.device, torch.float64)
        weight = weight.double().numpy()
    if x.is_cuda and _plain(x):
        return _copied(weight.tobytes(), weight.shape, x.device)
    return torch.as_tensor(weight, device=x.device)


@functools.lru_cache(64)
def _copied(numbers: bytes, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(numbers).reshape(shape).copy()).to(device)


# A Spec's first fields, and backend, num_threads, check_labels.
_Options = tuple[Any, ...]
_SUMMED = 6


def _options(
    x: Tensor,
    y: Tensor,
    asked: spec.Spec,
    backend: str | None,
    num_threads: int | None,
    check_labels: bool | None,
) -> tuple[spec.Spec, _Options]:
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


def _plain(x: Tensor, *others: Tensor | None) -> bool:
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


class _Loss(torch.autograd.Function):
    """A loss of plain tensors as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, term: losses.Term, asked: spec.Spec, options: _Options
    ) -> Tensor:
        value, ctx.derivative = _value(x, y, term, asked, options)
        ctx.save_for_backward(x, y)
        ctx.options = options
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        derivative = ctx.derivative
        if not _plain(x, y, grad) or torch.is_grad_enabled():
            # The operator, unlike its kernel, can be traced and refuses a second derivative.
            if not isinstance(derivative, Tensor):
                derivative = torch.from_numpy(derivative)
            cotangent = losses.times(grad, derivative)
            of_x = torch.ops.dice_core.statistics_grad(x, y, cotangent, *ctx.options)
        elif x.is_cpu:
            cotangent = losses.times(grad.numpy(), derivative)
            of_x = _statistics_grad(x, y, cotangent, *ctx.options)
        else:
            of_x = _statistics_grad(x, y, derivative, *ctx.options, scale=grad)
        return of_x, None, None, None, None


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _value(
    x: Tensor, y: Tensor, term: losses.Term, asked: spec.Spec, options: _Options
) -> tuple[Tensor, Any]:
    """The loss of plain tensors and its derivative for the sums: NumPy's, or on a GPU, where it is
    a ratio, torch's.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_cpu:
        term = term.with_weights(Tensor.numpy)
        sums = _statistics(x, y, *options).numpy()
        value, derivative = term.with_derivative(sums, asked.statistics)
        return torch.from_numpy(np.asarray(value, _NUMPY[dtype])), derivative
    at, kernels, _, check_labels = _request(x, y, options)
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


# The operators, defined through torch.library so that torch.compile and export see them whole.

_library = torch.library.Library("dice_core", "DEF")
_OPTIONS = (
    "str activation, int p, int? ignore_label, float? gamma, bool smoothing, float? binary_gamma, "
    "str? backend, int? num_threads, bool? check_labels"
)
_library.define(f"statistics(Tensor x, Tensor y, {_OPTIONS}) -> Tensor")
_library.define(f"statistics_grad(Tensor x, Tensor y, Tensor cotangent, {_OPTIONS}) -> Tensor")


def _request(x: Tensor, y: Tensor, options: _Options) -> tuple[spec.Call, Any, int, bool | None]:
    """The call, its kernels, how many threads and whether to check labels."""
    backend, num_threads, check_labels = options[_SUMMED:]
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), spec.Spec(*options[:_SUMMED]))
    kernels = backends.select(at.signature, backend)
    return at, kernels, num_threads or torch.get_num_threads(), check_labels


def _statistics(x: Tensor, y: Tensor, *options: Any) -> Tensor:
    """(K, N, C) float64 on x's device."""
    at, kernels, count, check_labels = _request(x, y, options)
    sums = x.new_empty(at.sums_shape, dtype=torch.float64)
    backends.statistics(kernels, at, buffers.of(sums, "sums"), count, check_labels)
    return sums


def _statistics_grad(
    x: Tensor, y: Tensor, cotangent: Any, *options: Any, scale: Tensor | None = None
) -> Tensor:
    """The gradient for x of sum(cotangent * statistics); cotangent may be a NumPy array.

    On a GPU each sample's cotangent is multiplied by its entry of scale, () or (N,).
    """
    if isinstance(cotangent, Tensor):
        cotangent = cotangent.contiguous()
    at, kernels, count, _ = _request(x, y, options)
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
    ("statistics", _statistics, _fake_statistics, _save, _backward),
    ("statistics_grad", _statistics_grad, _fake_statistics_grad, None, _no_second_derivative),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dice_core::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"dice_core::{_name}", _vjp, setup_context=_setup, lib=_library)
