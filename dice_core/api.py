"""The losses of plain arrays: `loss`, `loss_and_grad`, `statistics`, `gradient`, `score`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import numpy as np

from . import allocators, calls, checks, losses, spec
from .losses import Term
from .sums import Statistics

Array = Any  # NumPy's, or of a device
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Any:
    """The Dice loss of logits and labels, softmax and one-hot included, or another loss of
    `dice_core.losses`.

    Replaces, without allocating anything of x's size::

        s = softmax(x, axis=1)
        t = (y[:, None] == arange(C).reshape(1, C, 1, ...)) & (y != ignore_label)[:, None]
        loss_nc = 1 - (2 * sum(s * t) + smooth) / (sum(s**p) + sum(t) + smooth)
        loss = mean(sum(weight * loss_nc, axis=1))

    where sum runs over the valid voxels of a sample. With p = 2 this is the loss of Milletari et
    al., V-Net (2016), per class: 0/1 labels are their own squares. The options are those of the C++
    extension nslay/diceloss_cpp.

    Parameters
    ----------
    x : array (N, C, d1, d2, ...)
        Logits, float16, bfloat16, float32 or float64, any strides, any number of spatial axes from
        0 up. C = 1 is a two-class problem: foreground sigmoid(x), background 1 - sigmoid(x).
    y : array (N, d1, d2, ...) or (N, 1, d1, d2, ...), or like x
        Class labels, any integer dtype or bool, read in place. An array of x's shape is a soft or
        multi-label target: how much of each class a voxel is, from 0 to 1, of any dtype; the ignore
        label then ignores a voxel for that class alone.
    term : a loss of `dice_core.losses`, optional
        What to compute in place of Dice, `Dice(smooth=1) + 0.5 * CrossEntropy()` for example. It
        has its own weight, ignore_channel, smooth, p and reduction, which cannot be combined with
        it here.
    weight : (C,) numbers, optional
        The loss of a sample is sum_c weight_c loss_c, not normalised; None stands for 1/C each.
        C = 1 takes two numbers.
    ignore_channel : int, or several
        This class is left out of the sum, in value and gradient; it still counts in the 1/C above,
        and its voxels still count for every other class. Outside [0, C): no effect.
    ignore_label : int or None
        Voxels with this label are ignored: they contribute exactly nothing, whatever their logits.
        None: every label must be a class.
    smooth : float
        Added to numerator and denominator, >= 0. With 0, a class neither predicted nor present has
        loss 0 and gradient 0.
    p : int
        Exponent of the probabilities in the denominator, >= 1.
    reduction : {"mean", "sum", "none", "classes", "batch"}
        Over samples; "none" gives (N,), "classes" (N, C), not divided by C. "batch" adds up the
        batch's sums before the ratio. The mean of no samples is NaN.
    activation : {"softmax", "sigmoid", "none"}
        Probabilities are the softmax over channels, the sigmoid of each channel, or x as it is.
        With the latter two a single channel is a single class, and y has x's shape.
    backend : str, optional
        A name from `python -m dice_core`; else the environment variable DICE_CORE_BACKEND, else the
        first that takes the call.
    num_threads : int, optional
        Else OMP_NUM_THREADS, else the cores this process may use. The result is bitwise
        reproducible for any number.
    check_labels : bool, optional
        On a GPU the call does not synchronize, and a label outside [0, C) makes the loss NaN. True
        synchronizes and raises ValueError, as in host memory always. None: as the environment
        variable DICE_CORE_CHECK says, 0 or 1.

    Returns
    -------
    A NumPy scalar, or an array (N,) for reduction "none", (N, C) for "classes"; float64 for float64
    logits, else float32. For arrays on a GPU an array of their kind there; losses that are more
    than a ratio of sums synchronize.

    Raises
    ------
    TypeError, ValueError
        For what does not fit, labels outside [0, C) included, with their number, the first one and
        its position.
    BackendError
        If no backend takes the call, with each one's reasons.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
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
    smooth: float = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
    grad_loss: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """The loss and its gradient for x; see `loss` for the other arguments and errors.

    Parameters
    ----------
    grad_loss : number or array of the loss's shape, optional
        The incoming gradient; None stands for ones. An array on x's GPU has the loss's dtype.
    out : array, optional
        Takes the gradient: any writable array of x's shape, dtype and device, x itself included
        (the gradient then overwrites the logits in place). Otherwise it must not overlap x or y.

    Returns
    -------
    (loss, dx), dx in x's dtype; `out` if it was given, else a new array of x's kind (NumPy for host
    memory of other kinds than torch's) with x's strides where x is dense.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
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
    """
    asked = spec.checked(
        activation=activation,
        p=p,
        ignore_label=ignore_label,
        gamma=gamma,
        nll=nll,
        binary_gamma=binary_gamma,
        target_square=target_square,
    )
    _check_plain(x)
    return calls.call(x, y, asked, backend, num_threads, check_labels).statistics()


def gradient(
    x: Any,
    y: Any,
    statistics: Statistics,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    smooth: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
    num_threads: int | None = None,
    grad_loss: Any = None,
    out: Any = None,
) -> Any:
    """The gradient for x of the loss of these statistics, to which x and y contributed: a tile of
    the volume, say. See `loss` and `loss_and_grad` for the arguments, result and errors.

    Replaces, without allocating anything of x's size but the gradient, the backward pass of the
    loss of the whole volume, restricted to this tile. Labels out of range raise ValueError after
    `out` was written.
    """
    asked = statistics.spec
    term = losses.of(
        term, weight, ignore_channel, smooth, asked.p if term is None else 1, reduction
    )
    _check_plain(x)
    call = calls.call(x, y, asked, backend, num_threads, None)
    there = tuple(statistics.array.shape), statistics.spec, statistics.dtype
    tile = call.shape, call.spec, call.logits.dtype
    if tile != there:
        raise ValueError(
            f"x is not part of what these statistics sum: (K, N, C), sums and dtype are "
            f"{', '.join(map(str, tile))}, not {', '.join(map(str, there))}"
        )
    term.check_statistics(statistics)
    grad_loss = call.checked_grad_loss(grad_loss, term.shape(*call.shape[1:]))
    grad, out = call.gradient_buffer(x, out)
    _, derivative = term.with_derivative(statistics.to_host())
    if call.logits.device != "cpu":
        derivative = allocators.from_host(derivative, call.logits)
    call.gradient(derivative, grad_loss, grad)
    return out


class Score(NamedTuple):
    """How well hard decisions fit labels, (N, C) each, NaN for a class in neither."""

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
    """The Dice score and IoU (Jaccard index) of each class, of the hard decision for each voxel.

    Replaces, without allocating anything of x's or y's size::

        decision = x.argmax(1)
        i = ((decision == c) & (y == c) & (y != ignore_label)).sum()
        dice_c = 2 * i / ((decision == c).sum() + (y == c).sum())  # of valid voxels
        iou_c = i / ((decision == c).sum() + (y == c).sum() - i)

    With activation "sigmoid" each channel decides by itself, for logits above 0. pool "batch" adds
    up the samples' counts first, for arrays (1, C). See `loss` for the other arguments. The result
    is NumPy's; arrays on a GPU synchronize.
    """
    checks.one_of(pool, "pool", ("none", "batch"))
    _check_plain(x)
    asked = decision_spec(activation, ignore_label)
    sums = calls.call(x, y, asked, backend, num_threads, check_labels).statistics().to_host()
    if pool == "batch":
        sums = sums.pooled()
    both, total = sums.intersection, sums.pred_sum + sums.target_sum
    with np.errstate(invalid="ignore"):
        return Score(2 * both / total, both / (total - both))


def decision_spec(activation: Any, ignore_label: Any) -> spec.Spec:
    """The sums of hard decisions instead of probabilities."""
    checks.one_of(activation, "activation", tuple(spec.DECISIONS))
    return spec.Spec(spec.DECISIONS[activation], ignore_label=checks.ignore_label(ignore_label))


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
    """Compiles ahead of time, on a GPU, what the loss of such arrays and its gradient need: of
    their dtypes, number of channels, layout and device. See `loss` for the arguments.

    Else the first call does so, which takes seconds where nobody on this machine has called for the
    same before, and must not happen while a CUDA graph is captured.
    """
    asked = losses.of(term, p=p) if term is None else losses.of(term)
    call = _call(x, y, asked, ignore_label, activation, backend, None, None)
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
    _check_plain(x)
    call = calls.call(x, y, term.spec(activation, ignore_label), backend, num_threads, check_labels)
    if term.weights:
        term.check(call.shape[2])
    return call


def _check_plain(x: Any) -> None:
    """Raises TypeError for a tensor whose gradient would be lost."""
    if getattr(x, "requires_grad", False):
        raise TypeError(
            "x requires grad, and dice_core.loss and its like give plain values: "
            "use dice_core.torch.loss, or pass x.detach()"
        )
