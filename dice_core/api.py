"""The losses on plain arrays: `loss`, `loss_and_grad`, `statistics`, `gradient`, `score`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import numpy as np

from . import allocators, calls, checks, losses, spec
from .losses import Term
from .sums import Statistics, check_is_statistics

Array = Any  # a NumPy array or a device array
Activation = Literal["softmax", "sigmoid", "none"]
Scalar = Literal["mean", "sum", "batch"]


@overload
def loss(
    x: np.ndarray[Any, Any],
    y: Any,
    term: None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: Scalar = "mean",
    activation: Activation = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> np.floating[Any]: ...
@overload
def loss(
    x: np.ndarray[Any, Any],
    y: Any,
    term: None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: Literal["none", "classes"],
    activation: Activation = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> np.ndarray[Any, np.dtype[np.floating[Any]]]: ...
@overload
def loss(
    x: Any,
    y: Any,
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
) -> Any: ...
def loss(
    x: Any,
    y: Any,
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
) -> Any:
    """The Dice loss of logits and labels, or another loss of `dice_core.losses`, with softmax and
    one-hot encoding built in.

    Replaces, without allocating anything of x's size::

        s = softmax(x, axis=1)
        t = (y[:, None] == arange(C).reshape(1, C, 1, ...)) & (y != ignore_label)[:, None]
        loss_nc = 1 - (2 * sum(s * t) + smooth) / (sum(s**p) + sum(t) + smooth)
        loss = mean(sum(weight * loss_nc, axis=1))

    where sum runs over the valid voxels of a sample. With p = 2 this is the loss of Milletari et
    al., V-Net (2016), for each class; 0/1 labels need no squaring. The options are those of the C++
    extension nslay/diceloss_cpp.

    Parameters
    ----------
    x : array (N, C, d1, d2, ...)
        Logits in float16, bfloat16, float32 or float64, with any strides and zero or more spatial
        axes. C = 1 is a two-class problem: foreground sigmoid(x), background 1 - sigmoid(x).
    y : array (N, d1, d2, ...) or (N, 1, d1, d2, ...), or like x
        Class labels, any integer dtype or bool, read in place. An array of x's shape is a soft or
        multi-label target of any dtype: the degree, from 0 to 1, to which each voxel belongs to
        each class. The ignore label then ignores a voxel for that class only.
    term : a loss of `dice_core.losses`, optional
        The loss to compute instead of Dice, for example `Dice(smooth=1) + 0.5 * CrossEntropy()`.
        Its weight, ignore_channel, smooth, p and reduction are set on the term itself and cannot be
        passed here.
    weight : (C,) numbers, optional
        The loss of a sample is sum_c weight_c loss_c, not normalised; None means 1/C for each
        class. For C = 1, two numbers.
    ignore_channel : int, or several
        The class or classes to exclude from the sum, in value and gradient. The default weight
        stays 1/C, and voxels of an excluded class still contribute to every other class. Values
        outside [0, C) have no effect.
    ignore_label : int or None
        Voxels with this label are ignored: they contribute exactly nothing, whatever their logits.
        None ignores no voxel, and every label must then be a class.
    smooth : float, or a pair
        Added to numerator and denominator, or the pair (numerator, denominator), >= 0. With 0, a
        class neither predicted nor present has loss 0 and gradient 0.
    p : int
        Exponent of the probabilities in the denominator, >= 1.
    reduction : {"mean", "sum", "none", "classes", "batch"}
        Over samples. "none" gives (N,); "classes" gives (N, C), not divided by C; "batch" adds the
        sums of all samples before taking the ratio. The mean of an empty batch is NaN.
    activation : {"softmax", "sigmoid", "none"}
        Probabilities are the softmax over channels, the sigmoid of each channel, or x itself. With
        the last two, a single channel is a single class and y must have x's shape.
    backend : str, optional
        A name listed by `python -m dice_core`. By default the value of the environment variable
        DICE_CORE_BACKEND, or if that is not set the first backend that supports the call.
    num_threads : int, optional
        By default OMP_NUM_THREADS, or if that is not set the number of cores this process may use.
        The result is bitwise reproducible for any number of threads. One where so many cannot be
        started, and in a process forked from one with several threads.
    check_labels : bool, optional
        On a GPU a call does not synchronize, and a label outside [0, C) makes the loss NaN; True
        synchronizes and raises ValueError instead. None follows the environment variable
        DICE_CORE_CHECK, 0 or 1. In host memory labels are always checked.

    Returns
    -------
    A NumPy scalar, or an array (N,) for reduction "none", (N, C) for "classes"; float64 for float64
    logits, else float32. For GPU arrays, an array of the same library on the same device; losses
    that are not a plain ratio of sums synchronize.

    Raises
    ------
    TypeError, ValueError
        For invalid arguments. For labels outside [0, C) the message gives their number, the first
        one and its position.
    BackendError
        If no backend supports the call; the message gives the reasons of each.
    """
    term = _term(term, weight, ignore_channel, smooth, p, reduction)
    call = _call(x, y, term, ignore_label, activation, backend, num_threads, check_labels)
    value = call.value(term)
    return value[()] if isinstance(value, np.ndarray) else value


@overload
def loss_and_grad(
    x: np.ndarray[Any, Any],
    y: Any,
    term: None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: Scalar = "mean",
    activation: Activation = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
    grad_loss: Any = None,
    out: Any = None,
) -> tuple[np.floating[Any], np.ndarray[Any, Any]]: ...
@overload
def loss_and_grad(
    x: np.ndarray[Any, Any],
    y: Any,
    term: None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: Literal["none", "classes"],
    activation: Activation = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
    grad_loss: Any = None,
    out: Any = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]: ...
@overload
def loss_and_grad(
    x: Any,
    y: Any,
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
    grad_loss: Any = None,
    out: Any = None,
) -> tuple[Any, Any]: ...
def loss_and_grad(
    x: Any,
    y: Any,
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
    grad_loss: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """The loss and its gradient with respect to x; see `loss` for the other arguments.

    Replaces, without allocating anything of x's size but dx, the naive code of `loss` and its
    backward pass.

    Parameters
    ----------
    grad_loss : number or array of the loss's shape, optional
        The incoming gradient; None means ones. An array on x's GPU must have the loss's dtype.
    out : array, optional
        Receives the gradient: any writable array of x's shape, dtype and device, including x itself
        (the gradient then overwrites the logits in place). Otherwise it must not overlap x or y.
        An exception, such as KeyboardInterrupt, may leave it partly written.

    Returns
    -------
    (loss, dx), dx in x's dtype; dx is `out` if given, otherwise a new array of x's library (NumPy
    for any host memory that is not torch's), with x's strides if x has no gaps in memory.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss` does, and for an `out` or `grad_loss` that does not fit. Nothing is written then.
    """
    term = _term(term, weight, ignore_channel, smooth, p, reduction)
    call = _call(x, y, term, ignore_label, activation, backend, num_threads, check_labels)
    grad_loss = call.checked_grad_loss(grad_loss, term.shape(*call.shape[1:]))
    grad, out = call.gradient_buffer(x, out)
    value, derivative = call.value_and_derivative(term)
    call.gradient(derivative, grad_loss, grad)
    return value[()] if isinstance(value, np.ndarray) else value, out


def statistics(
    x: Any,
    y: Any,
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
    """The sums over voxels from which losses are computed; see `loss` for the other arguments.

    Replaces, without allocating anything of x's size::

        s = softmax(x, axis=1)
        t = one_hot(y)  # 0 for ignored voxels
        intersection, pred_sum, target_sum = sum(s * t), sum(s**p), sum(t)

    For a volume that does not fit in memory: add up the statistics of its tiles, take the loss of
    the total, `Dice()(total)`, then the `gradient` of each tile.

    Parameters
    ----------
    gamma : float, optional
        Adds `cross_entropy_sum`, sum t (1 - s)**gamma * -log(s): cross-entropy for 0, focal loss
        (Lin et al., 2017) above. s is the softmax whatever the activation.
    nll : bool
        Adds `nll_sum`, sum -log(s) over all valid voxels, which label smoothing needs.
    binary_gamma : float, optional
        Adds `positive_sum`, sum t (1 - b)**binary_gamma * -log(b), and `negative_sum`,
        sum (1 - t) b**binary_gamma * -log(1 - b), b being the sigmoid whatever the activation.
    target_square : bool
        Adds `target_square_sum`, sum t**2, of soft targets.

    Returns
    -------
    Statistics, (N, C) float64 each, arrays on x's device.

    Raises
    ------
    TypeError, ValueError, BackendError
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
    _check_plain(x, y)
    return calls.call(x, y, request, backend, num_threads, check_labels).statistics()


def gradient(
    x: Any,
    y: Any,
    statistics: Statistics,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    smooth: float | tuple[float, float] = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
    num_threads: int | None = None,
    grad_loss: Any = None,
    out: Any = None,
) -> Any:
    """The gradient, with respect to x, of the loss of these statistics, which include the sums of x
    and y: of one tile of a volume, for example.

    Replaces, without allocating anything of x's size but the gradient, the backward pass of the
    loss of the whole volume, restricted to this tile.

    Parameters
    ----------
    x, y : arrays
        Logits (N, C, *) and labels or targets of the tile, as in `loss`.
    statistics : Statistics
        The sums of the whole volume, of `statistics` with the same options.
    term, weight, ignore_channel, smooth, reduction, backend, num_threads
        As in `loss`.
    grad_loss, out
        As in `loss_and_grad`.

    Returns
    -------
    dx, as from `loss_and_grad`.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss_and_grad` does, and if x and y do not match the statistics, or these lack a sum
        that the term needs. Out-of-range labels raise only after `out` has been written.
    """
    check_is_statistics(statistics)
    request = statistics.spec
    p = request.p if term is None else 1
    term = _term(term, weight, ignore_channel, smooth, p, reduction)
    _check_plain(x, y)
    call = calls.call(x, y, request, backend, num_threads, None)
    call.check_statistics(statistics)
    term.check_statistics(statistics)
    grad_loss = call.checked_grad_loss(grad_loss, term.shape(*call.shape[1:]))
    grad, out = call.gradient_buffer(x, out)
    _, derivative = call.evaluate(term, statistics)
    call.gradient(derivative, grad_loss, grad)
    return out


class Score(NamedTuple):
    """The overlap of hard decisions and labels, (N, C) each; NaN for a class found in neither."""

    dice: Array
    iou: Array


def score(
    x: Any,
    y: Any,
    *,
    ignore_label: int | None = -1,
    pool: Literal["none", "batch"] = "none",
    activation: Literal["softmax", "sigmoid"] = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Score:
    """The Dice score and IoU (Jaccard index) of each class, for a hard decision in each voxel.

    Replaces, without allocating anything of x's or y's size::

        decision = x.argmax(1)
        i = ((decision == c) & (y == c) & (y != ignore_label)).sum()
        dice_c = 2 * i / ((decision == c).sum() + (y == c).sum())  # of valid voxels
        iou_c = i / ((decision == c).sum() + (y == c).sum() - i)

    Parameters
    ----------
    x, y, ignore_label, backend, num_threads, check_labels
        As in `loss`.
    pool : {"none", "batch"}
        "batch" adds the counts of all samples first.
    activation : {"softmax", "sigmoid"}
        The decision is the class of the largest logit, or each channel by itself, positive where
        its logit is above 0.

    Returns
    -------
    Score, of NumPy arrays (N, C), with pool "batch" (1, C); arrays on a GPU synchronize.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss` does.
    """
    checks.one_of(pool, "pool", ("none", "batch"))
    _check_plain(x, y)
    request = spec.decision(activation, ignore_label)
    counts = calls.call(x, y, request, backend, num_threads, check_labels).statistics()
    return score_of(counts.to_host(), pool)


def score_of(counts: Statistics, pool: str) -> Score:
    """The Score of the sums of hard decisions, in host memory."""
    if pool == "batch":
        counts = counts.pooled()
    both, total = counts.intersection, counts.pred_sum + counts.target_sum
    with allocators.quiet(total):
        return Score(2 * both / total, both / (total - both))


def precompile(
    x: Any,
    y: Any,
    term: Term | None = None,
    *,
    ignore_label: int | None = -1,
    p: int = 1,
    activation: str = "softmax",
    backend: str | None = None,
) -> None:
    """Compiles the GPU kernels for the loss of such arrays and its gradient ahead of time: for
    their dtypes, number of channels, memory layout and device. See `loss` for the arguments.

    Otherwise the first call compiles them, which takes seconds unless they are cached on disk, and
    must not happen while a CUDA graph is being captured.
    """
    term = losses.of(term, p=p) if term is None else losses.of(term)
    call = _call(x, y, term, ignore_label, activation, backend, None, None)
    if isinstance(call, calls.DeviceCall):
        call.kernels.precompile(call.logits, call.labels, call.spec)


def _call(
    x: Any,
    y: Any,
    term: Term,
    ignore_label: Any,
    activation: Any,
    backend: str | None,
    num_threads: int | None,
    check_labels: bool | None,
) -> calls.Call:
    _check_plain(x, y)
    request = term.spec(activation, ignore_label)
    call = calls.call(x, y, request, backend, num_threads, check_labels)
    if term.weights:
        term.check(call.shape[2])
    return call


def _term(term: Any, weight: Any, ignore_channel: Any, smooth: Any, p: Any, reduction: Any) -> Term:
    """The checked term, with class weights as NumPy arrays."""
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
    return term.like(_NUMPY) if term.weights else term


_NUMPY = np.empty(0)


def _check_plain(x: Any, y: Any) -> None:
    """Raises TypeError for a tensor that requires grad, whose gradient would be lost."""
    for name, value in (("x", x), ("y", y)):
        if getattr(value, "requires_grad", False) is True:
            raise TypeError(
                f"{name} requires grad, but the functions of dice_core do not record gradients: "
                f"use dice_core.torch.loss, or pass {name}.detach()"
            )
