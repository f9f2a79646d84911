"""The loss of plain arrays: `loss`, `loss_and_grad`, `statistics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import backends, buffers, losses, spec, threads

Array = Any  # NumPy's, or of a device


def loss(
    x: Any,
    y: Any,
    *,
    loss: losses.Term | None = None,
    weight: Any = None,
    ignore_channel: int = -1,
    ignore_label: int | None = -1,
    smooth: float = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Any:
    """The Dice loss of logits and labels, softmax and one-hot included, or another of
    `dice_core.losses`.

    Replaces, without allocating anything of x's size::

        s = softmax(x, axis=1)
        t = (y[:, None] == arange(C).reshape(1, C, 1, ...)) & (y != ignore_label)[:, None]
        loss_nc = 1 - (2 * sum(s * t) + smooth) / (sum(s**p) + sum(t) + smooth)
        loss = mean(sum(weight * loss_nc, axis=1))

    where sum runs over the voxels of a sample that count. With p = 2 this is the loss of Milletari
    et al., V-Net (2016), per class: 0/1 labels are their own squares. The options are those of the
    C++ extension nslay/diceloss_cpp.

    Parameters
    ----------
    x : array (N, C, d1, d2, ...)
        Logits, float16, bfloat16, float32 or float64, any strides, any number of spatial axes from
        0 up. C = 1 is a two-class problem: foreground sigmoid(x), background 1 - sigmoid(x).
    y : array (N, d1, d2, ...) or (N, 1, d1, d2, ...), or like x
        Class labels, any integer dtype or bool, read in place. An array of x's shape says how much
        of each class a voxel is, from 0 to 1, of any dtype: one-hot, several classes at once, soft;
        then [y=c] is y_c, and the ignore label leaves out a voxel for that class alone.
    loss : a term of `dice_core.losses`, optional
        What to compute in place of Dice, `Dice(smooth=1) + 0.5 * CrossEntropy()` for example; it
        then has its own weight, ignore_channel, smooth, p and reduction.
    weight : (C,) numbers, optional
        The classes are combined as sum_c weight_c loss_c; None stands for 1/C each. C = 1 takes two
        numbers.
    ignore_channel : int
        This class's term is left out, of the value and of the gradient; it still counts in the 1/C
        above, and its voxels still count for every other class. Outside [0, C): no effect.
    ignore_label : int or None
        Voxels so labelled contribute to nothing, whatever their logits. None: every label must be a
        class.
    smooth : float
        Added above and below, >= 0. With 0, a class neither predicted nor present has loss 0 and
        gradient 0.
    p : int
        Exponent of the scores in the denominator, >= 1.
    reduction : {"mean", "sum", "none", "batch"}
        Over samples; "none" gives (N,), "batch" pools the sums over the batch before the ratio. The
        mean of no samples is NaN.
    activation : {"softmax", "sigmoid", "none"}
        The scores are the softmax over channels, the sigmoid of each channel by itself, or the
        logits as they are. With the latter two a single channel is a single class, and y like x.
    backend : str, optional
        A name from `python -m dice_core`; else the environment's DICE_CORE_BACKEND, else the first
        that takes the call.
    num_threads : int, optional
        Else OMP_NUM_THREADS, else the cores this process may use. The result has the same bits for
        every number.
    check_labels : bool, optional
        On a GPU nothing waits for the device, so that a label outside [0, C) makes the loss NaN;
        True waits and raises ValueError, as in host memory always. None: as the environment's
        DICE_CORE_CHECK says, 0 or 1.

    Returns
    -------
    A NumPy scalar, or an array (N,) for reduction "none", (N, C) for a term's "classes"; float64
    for float64 logits, else float32. For arrays on a GPU an array of their kind there; losses that
    are more than a ratio of sums wait for it.

    Raises
    ------
    TypeError, ValueError
        For what does not fit, labels outside [0, C) included, with their number, the first one and
        its position.
    BackendError
        If no backend takes the call, with each one's reasons.
    """
    term = _term(
        loss, weight=weight, ignore_channel=ignore_channel, smooth=smooth, p=p, reduction=reduction
    )
    at = _call(x, y, ignore_label, activation, term)
    kernels, count = backends.select(at.signature, backend), threads.resolve(num_threads)
    if _on_device(at):
        return _device_loss(at, term, kernels, check_labels)[0]
    return _rounded(term(_sums(at, kernels, count, check_labels), at.spec.statistics), at)


def loss_and_grad(
    x: Any,
    y: Any,
    *,
    loss: losses.Term | None = None,
    weight: Any = None,
    ignore_channel: int = -1,
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
    """The Dice loss and its gradient for x; see `loss` for the other arguments.

    Parameters
    ----------
    grad_loss : number or array of the loss's shape, optional
        The incoming gradient; None stands for ones. An array on x's GPU has the loss's dtype.
    out : array, optional
        Takes the gradient: any writable array of x's shape, dtype and device, x itself included
        (the gradient then overwrites the logits). Otherwise it must not overlap x or y.

    Returns
    -------
    (loss, dx), dx in x's dtype; `out` if it was given, else a new array of x's kind (NumPy for host
    memory of other kinds than torch's) with x's strides where x is dense.
    """
    term = _term(
        loss, weight=weight, ignore_channel=ignore_channel, smooth=smooth, p=p, reduction=reduction
    )
    at = _call(x, y, ignore_label, activation, term)
    upstream = _upstream(grad_loss, term, at)
    kernels, count = backends.select(at.signature, backend), threads.resolve(num_threads)
    grad, out = _gradient_buffer(x, out, at)
    if _on_device(at):
        value, derivative = _device_loss(at, term, kernels, check_labels)
    else:
        sums = _sums(at, kernels, count, check_labels)
        value, derivative = term.with_derivative(sums, at.spec.statistics)
        value = _rounded(value, at)
    _gradient(at, derivative, upstream, grad, kernels, count)
    return value, out


def statistics(
    x: Any,
    y: Any,
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
) -> Statistics:
    """The sums over voxels that a Dice loss needs; see `loss` for the arguments.

    More of them, for softmax s, where asked for:

    - gamma >= 0: the cross-entropy of each class's voxels, sum (1 - s)**gamma * -log(s), plain for
      0, else focal (Lin et al., Focal Loss, 2017);
    - smoothing: sum -log(s) over all counted voxels, which label smoothing needs;
    - binary_gamma >= 0: with s the sigmoid, whatever the activation, sum (1 - s)**binary_gamma *
      -log(s) over each class's voxels and s**binary_gamma * -log(1 - s) over the others.

    For volumes that do not fit in memory: take the statistics of every tile and add them, take the
    loss of the total, then ask the total for each tile's gradient.
    """
    asked = spec.asked(
        p=p,
        ignore_label=ignore_label,
        gamma=gamma,
        smoothing=smoothing,
        binary_gamma=binary_gamma,
        activation=activation,
    )
    at = _summed(x, y, asked)
    kernels, count = backends.select(at.signature, backend), threads.resolve(num_threads)
    sums = _sums(at, kernels, count, check_labels)
    return Statistics(sums, at.spec, at.logits.dtype, backend, num_threads)


class Score(NamedTuple):
    """How well decisions fit labels, (N, C) each, NaN for a class in neither."""

    dice: Array
    iou: Array


def score(
    x: Any,
    y: Any,
    *,
    ignore_label: int | None = -1,
    pool: bool = False,
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = None,
) -> Score:
    """The Dice and IoU (Jaccard index) of each class, of what the logits decide for.

    Replaces, without allocating anything of x's or y's size::

        decided = x.argmax(1)
        i = ((decided == c) & (y == c) & (y != ignore_label)).sum()
        dice_c = 2 * i / ((decided == c).sum() + (y == c).sum())  # over what is not ignored
        iou_c = i / ((decided == c).sum() + (y == c).sum() - i)

    With activation "sigmoid" each channel decides by itself, for logits above 0. `pool` adds the
    samples' counts first, for arrays (1, C). See `loss` for the other arguments. The result is
    NumPy's; of arrays on a GPU it is waited for.
    """
    spec.one_of(activation, "activation", tuple(spec.HARD))
    asked = spec.Spec(spec.HARD[activation], 1, spec.label(ignore_label))
    at = _summed(x, y, asked)
    kernels, count = backends.select(at.signature, backend), threads.resolve(num_threads)
    return scores(buffers.to_host(buffers.of(_sums(at, kernels, count, None), "sums")), pool)


def scores(sums: Array, pool: bool = False) -> Score:
    """Dice and IoU of sums (K, N, C) of decisions."""
    both, decided, there = sums[:3].sum(1, keepdims=True) if pool else sums[:3]
    total = decided + there
    with np.errstate(invalid="ignore"):
        return Score(2 * both / total, both / (total - both))


def precompile(
    x: Any,
    y: Any,
    *,
    loss: losses.Term | None = None,
    ignore_label: int | None = -1,
    p: int = 1,
    activation: str = "softmax",
    backend: str | None = None,
) -> None:
    """Makes ready what the loss of such arrays and its gradient need, on a GPU: of their dtypes,
    number of channels, layout and device.

    Else the first call does so, which takes seconds where nobody on this machine has called for the
    same before, and must not happen while a CUDA graph is captured. See `loss` for the arguments.
    """
    options = {**losses.UNASKED, "p": p}
    at = _call(x, y, ignore_label, activation, _term(loss, **options))
    kernels = backends.select(at.signature, backend)
    if _on_device(at):
        kernels.precompile(at.logits, at.labels, at.spec)


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Sums over voxels, per sample and class: `intersection`, `pred_sum`, `target_sum`, and by name
    those that were asked for, `cross_entropy_sum`, `smoothing_sum`, `positive_sum` and
    `negative_sum`; of dense targets `voxel_sum` too.

    Made by `statistics`; two of the same kind add up with `+`. Those of arrays on a GPU are arrays
    there; a loss or gradient of them waits for it.
    """

    sums: Array  # (K, N, C) float64
    spec: spec.Spec
    dtype: str  # of the logits
    backend: str | None
    num_threads: int | None

    @property
    def intersection(self) -> Array:
        """(N, C): I = sum of the class's score over its own voxels."""
        return self.sums[0]

    @property
    def pred_sum(self) -> Array:
        """(N, C): P = sum of score**p over the counted voxels."""
        return self.sums[1]

    @property
    def target_sum(self) -> Array:
        """(N, C): Y = how many voxels have the class's label."""
        return self.sums[2]

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_") or name == "spec":  # while it is made
            raise AttributeError(name)
        names = self.spec.statistics
        if name in names:
            return self.sums[names.index(name)]
        there = ", ".join(names)
        raise AttributeError(f"{name!r} is not one of these statistics, which are {there}")

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of voxels. Raises ValueError unless both sum the same."""
        if not isinstance(other, Statistics):
            return NotImplemented
        for mine, theirs in (
            (self.spec, other.spec),
            (self.dtype, other.dtype),
            (self.sums.shape[1:], other.sums.shape[1:]),
        ):
            if mine != theirs:
                raise ValueError(f"statistics of different calls do not add: {mine} and {theirs}")
        if hasattr(self.sums, "__add__"):
            sums = self.sums + other.sums
        else:  # numba's arrays have no arithmetic
            mine, theirs = (buffers.of(each, "sums") for each in (self.sums, other.sums))
            sums = buffers.from_host(buffers.to_host(mine) + buffers.to_host(theirs), mine)
        return Statistics(sums, self.spec, self.dtype, self.backend, self.num_threads)

    def __repr__(self) -> str:
        samples, classes = self.sums.shape[1:]
        return f"<Statistics of {samples} samples, {classes} classes: {self.spec}>"

    def loss(
        self,
        *,
        loss: losses.Term | None = None,
        weight: Any = None,
        ignore_channel: int = -1,
        smooth: float = 0.0,
        reduction: str = "mean",
    ) -> Any:
        """The loss of these sums, Dice unless a term is given; see `dice_core.loss` for arguments
        and result.
        """
        term = self._term(
            loss, weight=weight, ignore_channel=ignore_channel, smooth=smooth, reduction=reduction
        )
        at = buffers.of(self.sums, "sums")
        value = _real(term(buffers.to_host(at), self.spec.statistics), self.dtype)
        return value[()] if at.device == "cpu" else buffers.from_host(value, at)

    def gradient(
        self,
        x: Any,
        y: Any,
        *,
        loss: losses.Term | None = None,
        weight: Any = None,
        ignore_channel: int = -1,
        smooth: float = 0.0,
        reduction: str = "mean",
        grad_loss: Any = None,
        out: Any = None,
    ) -> Any:
        """The gradient for x of the loss of these sums, x and y being one of the tiles they were
        summed over.

        See `dice_core.loss_and_grad` for arguments, result and errors. The labels were checked when
        the statistics were taken: other labels that are bad raise only after `out` was written.
        """
        at = _summed(x, y, self.spec)
        tile, mine = (
            f"{at.sums_shape}, {at.spec}, {at.logits.dtype}",
            f"{self.sums.shape}, {self.spec}, {self.dtype}",
        )
        if tile != mine:
            raise ValueError(
                f"x is not a tile of these statistics: "
                f"(K, N, C), sums and dtype are {tile}, not {mine}"
            )
        term = self._term(
            loss, weight=weight, ignore_channel=ignore_channel, smooth=smooth, reduction=reduction
        )
        upstream = _upstream(grad_loss, term, at)
        kernels = backends.select(at.signature, self.backend)
        count = threads.resolve(self.num_threads)
        grad, out = _gradient_buffer(x, out, at)
        sums = buffers.to_host(buffers.of(self.sums, "sums"))
        _, derivative = term.with_derivative(sums, self.spec.statistics)
        _gradient(at, derivative, upstream, grad, kernels, count)
        return out

    def _term(self, loss: Any, **options: Any) -> losses.Term:
        term = _term(loss, p=1 if loss is not None else self.spec.power, **options)
        for field, needed in term.needs.items():
            there = getattr(self.spec, field)
            if there != needed:
                name = spec.OPTIONS[field]
                raise ValueError(
                    f"{term.name} needs sums with {name} = {needed}, and these have {there}; "
                    f"take the statistics with {name}={needed}"
                )
        term.check(self.sums.shape[2])
        return term


def _term(loss: Any, **options: Any) -> losses.Term:
    """What is asked for, Dice if nothing is."""
    return losses.dice(**options) if loss is None else losses.term(loss, **options)


def _call(x: Any, y: Any, ignore_label: Any, activation: Any, term: losses.Term) -> spec.Call:
    needs = {spec.OPTIONS[field]: value for field, value in term.needs.items()}
    at = _summed(x, y, spec.asked(ignore_label=ignore_label, activation=activation, **needs))
    term.check(at.classes)
    return at


def _summed(x: Any, y: Any, asked: spec.Spec) -> spec.Call:
    if getattr(x, "requires_grad", False):
        raise TypeError(
            "x requires grad, and dice_core.loss and its like give plain values: "
            "use dice_core.torch.dice_loss, or pass x.detach()"
        )
    return spec.call(buffers.of(x, "x"), buffers.of(y, "y"), asked)


def _on_device(at: spec.Call) -> bool:
    return at.logits.device != "cpu"


def _sums(at: spec.Call, kernels: Any, count: int, check_labels: bool | None) -> Array:
    if _on_device(at):
        sums = buffers.empty(at.logits, at.sums_shape, "float64")
    else:
        sums = np.empty(at.sums_shape)
    backends.statistics(kernels, at, buffers.of(sums, "sums"), count, check_labels)
    _settle(at, kernels)
    return sums


def _device_loss(
    at: spec.Call, term: losses.Term, kernels: Any, check_labels: bool | None
) -> tuple[Array, Array]:
    """The loss and its derivative for the sums, neither of them waited for if it is a ratio."""
    dtype = _loss_dtype(at.logits.dtype)
    ratio = term.ratio(at.logits.shape[0], at.classes)
    if ratio is None:
        sums = buffers.to_host(buffers.of(_sums(at, kernels, 1, check_labels), "sums"))
        value, derivative = term.with_derivative(sums, at.spec.statistics)
        value = buffers.from_host(np.asarray(value).astype(dtype), at.logits)
        return value, buffers.from_host(derivative, at.logits)
    value = buffers.empty(at.logits, term.shape(*at.sums_shape[1:]), dtype)
    derivative = buffers.empty(at.logits, at.sums_shape, "float64")
    weight = None
    if term.weights:
        weight = buffers.of(buffers.from_host(term.weights[0], at.logits), "weight")
    filled = buffers.of(value, "loss"), buffers.of(derivative, "derivative")
    backends.loss(kernels, at, *filled, ratio, weight, check_labels)
    _settle(at, kernels)
    return value, derivative


def _settle(at: spec.Call, kernels: Any) -> None:
    """Waits for a device where the arrays' library would not know that it has to."""
    if _on_device(at) and not buffers.is_ordered(at.logits):
        kernels.wait(at.logits)


def _gradient_buffer(x: Any, out: Any, at: spec.Call) -> tuple[buffers.Buffer, Any]:
    if out is None:
        out = buffers.empty_like(x, "x")
        return buffers.of(out, "out"), out
    grad = buffers.of(out, "out")
    spec.check_out(grad, at)
    return grad, out


def _gradient(
    at: spec.Call,
    derivative: Array,
    upstream: Array | None,
    grad: buffers.Buffer,
    kernels: Any,
    count: int,
) -> None:
    """Of the derivative, on the device or not, times the incoming gradient of that kind."""
    scale = None
    if _on_device(at):
        if upstream is not None and len(upstream.shape) == 2:  # one for each sample and class
            each, derivative = (
                buffers.to_host(buffers.of(a, "grad_loss")) for a in (upstream, derivative)
            )
            derivative, upstream = losses.times(each, derivative), None
        if isinstance(derivative, np.ndarray):
            derivative = buffers.from_host(derivative, at.logits)
        if upstream is not None:
            scale = buffers.of(upstream, "grad_loss")
    else:
        if upstream is not None:
            derivative = losses.times(upstream, derivative)
        derivative = np.ascontiguousarray(derivative)
    backends.gradient(kernels, at, buffers.of(derivative, "cotangent"), grad, count, scale)
    _settle(at, kernels)


def _upstream(grad_loss: Any, term: losses.Term, at: spec.Call) -> Array | None:
    """None stands for ones."""
    if grad_loss is None:
        return None
    shape = term.shape(*at.sums_shape[1:])
    if not _on_device(at):
        return spec.upstream(grad_loss, shape)
    dtype = _loss_dtype(at.logits.dtype)
    if buffers.is_on_host(grad_loss):
        return buffers.from_host(spec.upstream(grad_loss, shape).astype(dtype), at.logits)
    spec.check_upstream(buffers.of(grad_loss, "grad_loss"), shape, dtype, at)
    return grad_loss


def _loss_dtype(logits_dtype: str) -> str:
    return "float64" if logits_dtype == "float64" else "float32"


def _rounded(value: Any, at: spec.Call) -> Any:
    return _real(value, at.logits.dtype)[()]


def _real(value: Any, logits_dtype: str) -> np.ndarray[Any, Any]:
    return np.asarray(value).astype(_loss_dtype(logits_dtype))
