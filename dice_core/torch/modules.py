"""The losses as modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, losses
from ..losses.terms import refuse_unusual
from .functional import evaluate, options

Reduction = Literal["mean", "sum", "none", "classes", "batch"]
Activation = Literal["softmax", "sigmoid", "none"]
Absent = Literal["count", "skip", "zero", "one"]
Divisor = Literal["one", "classes", "kept", "weights"]


class Loss(torch.nn.Module):
    """A term of `dice_core.losses`, or a sum of terms, as a module: `dice_core.torch.loss`.

    Reduction, pool and class weights are those of the term. The weights become buffers, which
    `half()` and `to(dtype)` leave alone: in float16 1e5 would be infinite. Settings are checked
    once, on construction, and weights when they are loaded; a call only checks its tensors.

    >>> import torch, dice_core.torch
    >>> from dice_core.losses import CrossEntropy, Dice
    >>> criterion = dice_core.torch.Loss(Dice(smooth=1) + 0.5 * CrossEntropy())
    >>> x = torch.zeros(1, 2, 8, 8, requires_grad=True)
    >>> y = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> criterion(x, y)
    tensor(0.9964, grad_fn=<_LossBackward>)
    """

    output_type = Tensor  # of a network, as DeepSupervision passes it on

    def __init__(
        self,
        term: losses.Term,
        ignore_label: int | None = -1,
        activation: Activation = "softmax",
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if term is None:
            raise TypeError("term must be a loss such as dice_core.losses.Dice(), got None")
        self._term = losses.of(term)
        self._spec = self._term.spec(activation, ignore_label)
        self._options = options(backend, num_threads, check_labels, inplace, process_group)
        self._weight_names: list[str] = []
        for i, weight in enumerate(self._term.weights):
            self._register(f"weight{i}" if i else "weight", weight)

    def __setattr__(self, name: str, value: Any) -> None:
        kind: Any = type(self)
        given = vars(self).get("_weight_names")
        fixed = name in _settings(kind)
        if given is not None and name in _weights(kind):  # it can be neither lost nor added
            fixed = (value is None) == (name in given)
        if fixed:
            raise AttributeError(f"{name} cannot be changed: create another {kind.__name__}")
        super().__setattr__(name, value)

    @property
    def term(self) -> losses.Term:
        """The term with the current class weights."""
        if not self._weight_names:
            return self._term
        return self._term.with_weights([getattr(self, name) for name in self._weight_names])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (N, C, *) and labels (N, *) or (N, 1, *), or soft targets like x -> the loss."""
        return evaluate(x, y, self.term, self._spec, self._options)

    def extra_repr(self) -> str:
        """The term, its settings and the current class weights."""
        activation = self._spec.activation
        more = "" if activation == "softmax" else f", activation={activation!r}"
        return f"{self.term!r}, ignore_label={self._spec.ignore_label}{more}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        weights = [(name, getattr(self, name)) for name in self._weight_names]
        before = [(name, weight, weight.dtype) for name, weight in weights]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, weight, dtype in before:
            moved = getattr(self, name)
            if moved.dtype != dtype and isinstance(moved, torch.nn.Parameter):
                _check_weight(moved, name)
            elif moved.dtype != dtype:
                wider = torch.promote_types(moved.dtype, dtype)
                setattr(self, name, weight.to(moved.device, wider))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        for name in self._weight_names:
            _check_weight(state_dict.get(prefix + name), prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _register(self, name: str, weight: Any) -> None:
        _check_weight(weight, name)
        self._weight_names.append(name)
        if isinstance(weight, torch.nn.Parameter):
            self.register_parameter(name, weight)
        else:
            self.register_buffer(name, torch.as_tensor(weight))

    def _rename(self, *names: str) -> None:
        """Renames the class weights, in the order of the term's weights."""
        weights = [getattr(self, name) for name in self._weight_names]
        for name in self._weight_names:
            delattr(self, name)
        self._weight_names = []
        for name, weight in zip(names, weights, strict=True):
            self._register(name, weight)


def _check_weight(weight: Any, name: str) -> None:
    """Raises TypeError or ValueError for a tensor that is not finite numbers."""
    if type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta:
        refuse_unusual(weight, name)
        checks.weight(weight.detach().double().cpu(), name)


@functools.cache
def _settings(kind: Any) -> frozenset[str]:
    """The constructor parameters that cannot be changed afterwards: all but class weights."""
    return frozenset(inspect.signature(kind).parameters) - _weights(kind)


@functools.cache
def _weights(kind: Any) -> frozenset[str]:
    """The constructor parameters that are class weights, which can be changed if they are given."""
    names = inspect.signature(kind).parameters
    return frozenset({"weight", *(name for name in names if name.endswith("weight"))})


class DiceLoss(Loss):
    """The Dice loss of logits and labels, 1 - (2 I + smooth) / (P + Y + smooth) of each class.

    Replaces, in one pass forward and one backward, without allocating anything of x's size but the
    gradient::

        s, t = x.softmax(1), one_hot(y, C).movedim(-1, 1)
        i, p, t = (s * t).sum(spatial), s.sum(spatial), t.sum(spatial)
        loss = (1 - (2 * i + smooth) / (p + t + smooth)).mean()

    Parameters
    ----------
    weight : (C,) numbers or tensor, optional
        The loss of a sample is sum_c weight_c loss_c, not normalised; None means their mean. A
        buffer of the module.
    ignore_channel : int, or several
        Classes excluded from the loss; their voxels still count for the other classes.
    ignore_label : int or None
        Voxels with this label are ignored.
    smooth : float, or a pair
        Added to numerator and denominator, or the pair (numerator, denominator).
    p : int
        Exponent of the probabilities in P; 2 is the loss of V-Net.
    reduction : {"mean", "sum", "none", "classes", "batch"}
        Over samples. "none" gives (N,), "classes" (N, C); "batch" is the loss of the sums over all
        samples.
    pool : {"none", "batch", "classes", "all"}
        Which sums are added before the ratio is computed: over samples, over classes, or both.
    absent : {"count", "skip", "zero", "one"}
        How a class without labels is treated: like any other, left out of the mean, or given the
        constant loss 0 ("zero") or 1 ("one").
    divisor : {"classes", "kept", "weights", "one"}, optional
        Of the sum over classes: C, the number of classes left, the sum of their weights, or 1.
    floor : float
        The smallest denominator.
    activation : {"softmax", "sigmoid", "none"}
        With "sigmoid" y has x's shape, multi-label; with "none" x holds probabilities.
    backend, num_threads, check_labels, inplace, process_group
        As in `dice_core.torch.loss`.

    Shapes
    ------
    x (N, C, d1, d2, ...), float16, bfloat16, float32 or float64; y (N, d1, d2, ...) or
    (N, 1, d1, d2, ...) of any integer dtype or bool, or soft targets of x's shape.

    Notes
    -----
    Source: Milletari et al., V-Net, 2016.

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
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        *,
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        term = losses.Dice(
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )


class JaccardLoss(Loss):
    """The Jaccard (IoU) loss, 1 - (I + smooth) / (P + Y - I + smooth) of each class.

    Replaces `(1 - (i + smooth) / (p + t - i + smooth)).mean()` of the sums i, p, t of `DiceLoss`,
    whose parameters and shapes it shares.

    Source: Rahman & Wang, 2016.
    """

    def __init__(
        self,
        *,
        weight: Any = None,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        term = losses.Jaccard(
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )


class TverskyLoss(Loss):
    """The Tversky loss, 1 - (I + s) / (I + alpha (P - I) + beta (Y - I) + s) with s = smooth.

    alpha weights false positives, beta false negatives; 0.5 and 0.5 are Dice with twice the
    smoothing, 1 and 1 Jaccard.  The other parameters and the shapes are those
    of `DiceLoss`.

    Source: Salehi et al., 2017.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        *,
        weight: Any = None,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        term = losses.Tversky(
            alpha=alpha,
            beta=beta,
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )


class FocalTverskyLoss(Loss):
    """The focal Tversky loss, (1 - q)^gamma of each class's Tversky score q.

    alpha weights false positives, beta false negatives. gamma below 1 raises the gradient of
    classes that are nearly right, above 1 that of those that are not. With `of_mean` the power is
    that of the mean over classes, as in segmentation_models_pytorch. The other parameters and the
    shapes are those of `DiceLoss`.

    Source: Abraham & Khan, 2019.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        *,
        weight: Any = None,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        of_mean: bool = False,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        term = losses.FocalTversky(
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            of_mean=of_mean,
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )


class GeneralizedDiceLoss(Loss):
    """The generalized Dice loss, 1 - 2 sum_c w_c I_c / sum_c w_c (P_c + Y_c).

    `weighting` is "square" for w_c = 1 / Y_c^2, "simple" for 1 / Y_c, or "uniform" for 1. A class
    without labels gets the largest w of its sample. `pool` is "classes", or "all" for the sums of
    the whole batch. The other parameters and the shapes are those of `DiceLoss`.

    Source: Sudre et al., 2017.
    """

    def __init__(
        self,
        weighting: Literal["square", "simple", "uniform"] = "square",
        *,
        weight: Any = None,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["classes", "all"] = "classes",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        term = losses.GeneralizedDice(
            weighting=weighting,
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )


class DiceCELoss(Loss):
    """lambda_dice Dice + lambda_ce cross-entropy, in one pass forward and one backward.

    Replaces `lambda_dice * DiceLoss()(x, y) + lambda_ce * cross_entropy(x, y)`, which makes three
    to five copies of x, without allocating anything of x's size but the gradient. The other
    parameters and the shapes are those of `DiceLoss`.

    Parameters
    ----------
    weight : (C,) numbers or tensor, optional
        Of Dice, sum_c weight_c Dice_c.
    ce_weight : (C,) numbers or tensor, optional
        Of the cross-entropy, with torch's meaning: its mean is divided by the weights' sum. With
        "sigmoid" it multiplies each channel's part, and is not divided out.
    label_smoothing : float
        Of the cross-entropy, as in torch.
    activation : {"softmax", "sigmoid"}
        With "sigmoid" the cross-entropy is the binary one of each channel, multi-label.
    reduction : {"mean", "sum", "none", "classes", "batch"}
        With "mean" or "batch", or with pool "batch" or "all", the cross-entropy is the mean over
        all valid voxels of the batch; otherwise there is one mean per sample.

    Notes
    -----
    Sources: Milletari et al., V-Net, 2016; torch's CrossEntropyLoss and BCEWithLogitsLoss.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        *,
        weight: Any = None,
        ce_weight: Any = None,
        label_smoothing: float = 0.0,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        dice = losses.Dice(
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        average, voxels = dice.reduction, _voxel_pool(dice)
        checks.one_of(activation, "activation", ("softmax", "sigmoid"))
        entropy: losses.Term
        if activation == "softmax":
            entropy = losses.CrossEntropy(
                weight=ce_weight,
                label_smoothing=label_smoothing,
                reduction=average,
                pool=voxels,
            )
        elif label_smoothing:
            raise ValueError(f"label_smoothing needs activation 'softmax', got {activation!r}")
        else:
            entropy = losses.BinaryCrossEntropy(weight=ce_weight, reduction=average, pool=voxels)
        term = lambda_dice * dice + lambda_ce * entropy
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )
        self._rename(*_given(weight=weight, ce_weight=ce_weight))


class DiceFocalLoss(Loss):
    """lambda_dice Dice + lambda_focal Focal(gamma), in one pass forward and one backward.

    Replaces `lambda_dice * DiceLoss()(x, y) + lambda_focal * focal(x, y)`, which makes up to eight
    copies of x, without allocating anything of x's size but the gradient. The other parameters and
    the shapes are those of `DiceLoss`.

    Parameters
    ----------
    weight : (C,) numbers or tensor, optional
        Of Dice, sum_c weight_c Dice_c.
    focal_weight : (C,) numbers or tensor, optional
        Multiplies the classes' parts of the focal loss, which is divided by the number of valid
        voxels, not by the sum of the weights.
    gamma : float
        The exponent of 1 - s in the focal loss; 0 is cross-entropy.
    activation : {"softmax", "sigmoid"}
        With "sigmoid" the focal loss is that of each channel's sigmoid, multi-label.
    reduction : {"mean", "sum", "none", "classes", "batch"}
        With "mean" or "batch", or with pool "batch" or "all", the focal loss is the mean over all
        valid voxels of the batch; otherwise there is one mean per sample.

    Notes
    -----
    Sources: Milletari et al., V-Net, 2016; Lin et al., 2017.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        gamma: float = 2.0,
        *,
        weight: Any = None,
        focal_weight: Any = None,
        ignore_channel: int | Sequence[int] = -1,
        ignore_label: int | None = -1,
        smooth: float | tuple[float, float] = 0.0,
        p: int = 1,
        reduction: Reduction = "mean",
        pool: Literal["none", "batch", "classes", "all"] = "none",
        absent: Absent = "count",
        divisor: Divisor | None = None,
        floor: float = 0.0,
        activation: Activation = "softmax",
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
        process_group: Any = None,
    ) -> None:
        dice = losses.Dice(
            weight=weight,
            ignore_channel=ignore_channel,
            smooth=smooth,
            p=p,
            reduction=reduction,
            pool=pool,
            absent=absent,
            divisor=divisor,
            floor=floor,
        )
        average, voxels = dice.reduction, _voxel_pool(dice)
        checks.one_of(activation, "activation", ("softmax", "sigmoid"))
        kind = losses.Focal if activation == "softmax" else losses.SigmoidFocal
        focal = kind(gamma=gamma, weight=focal_weight, reduction=average, pool=voxels)
        term = lambda_dice * dice + lambda_focal * focal
        super().__init__(
            term,
            ignore_label,
            activation,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
            process_group=process_group,
        )
        self._rename(*_given(weight=weight, focal_weight=focal_weight))


def _voxel_pool(dice: losses.Dice) -> str:
    """How the other loss of a compound pools voxels: one mean over the batch where Dice is averaged
    or pooled over the batch, as in torch, else one mean per sample.
    """
    return "batch" if dice.reduction == "mean" or dice.pool in ("batch", "all") else "none"


def _given(**weights: Any) -> list[str]:
    return [name for name, weight in weights.items() if weight is not None]


class DeepSupervision(torch.nn.Module):
    """A loss summed over the outputs of several resolutions, finest first, times their weights.

    Replaces::

        sum(w * loss(x, nearest(y, x.shape[2:])) for w, x in zip(weights, outputs))

    `weights` has one number per output; None halves the weight from each output to the next, with
    sum 1. Outputs of weight 0 are skipped. With a `LinearLoss` each output is a tuple of features,
    weight and bias.

    >>> import torch, dice_core.torch
    >>> criterion = dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss(smooth=1))
    >>> outputs = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)]
    >>> criterion(outputs, torch.zeros(1, 8, 8, dtype=torch.uint8))
    tensor(0.6347)
    """

    def __init__(self, loss: torch.nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if isinstance(loss, losses.Term) or not callable(loss):
            raise TypeError(f"loss must be a module such as DiceLoss(), got {type(loss).__name__}")
        self.loss = loss
        if weights is not None:
            weights = checks.output_weights(weights)
        self.weights = weights

    def forward(
        self,
        outputs: Sequence[Tensor | tuple[Tensor, ...]],
        y: Tensor | Sequence[Tensor],
    ) -> Tensor:
        """Logits (N, C, *) of each resolution and their labels -> the loss. An output that is a
        tuple is passed to the loss as several arguments, the first of this shape.

        y is one label volume, which is downsampled by strided views (every second voxel, for
        example) without copies, or a list of one volume per output, as in nnU-Net.

        Raises ValueError if the sides of the labels are not integer multiples of those of an
        output.
        """
        if not isinstance(outputs, Sequence) or not outputs:
            raise ValueError("outputs must be a sequence of logits, one for each resolution")
        kind = getattr(self.loss, "output_type", None)
        if kind is not None:
            checks.all_are(kind, outputs, "outputs")
        inputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
        checks.all_are(Tensor, [each[0] if each else None for each in inputs], "outputs")
        weights = self.weights
        if weights is None:
            weights = [2.0**-i / (2 - 2.0 ** (1 - len(outputs))) for i in range(len(outputs))]
        if len(weights) != len(outputs):
            raise ValueError(f"there are {len(weights)} weights for {len(outputs)} outputs")
        if not isinstance(y, Tensor):
            checks.all_are(Tensor, y, "y")
            if len(y) != len(outputs):
                raise ValueError(f"there are {len(y)} label volumes for {len(outputs)} outputs")
        labels = [_nearest(y, x) for x, *_ in inputs] if isinstance(y, Tensor) else y
        terms = [w * self.loss(*x, t) for w, x, t in zip(weights, inputs, labels, strict=True) if w]
        if not terms:
            raise ValueError("all weights are 0: there is no loss")
        return torch.stack(terms).sum(0)


def _nearest(y: Tensor, x: Tensor) -> Tensor:
    """The labels downsampled to x's resolution, as a strided view."""
    if y.ndim not in (x.ndim - 1, x.ndim):
        raise ValueError(f"y has shape {tuple(y.shape)}, and an output {tuple(x.shape)}")
    fine, coarse = y.shape[y.ndim - x.ndim + 2 :], x.shape[2:]
    if any(not b or a % b for a, b in zip(fine, coarse, strict=True)):
        raise ValueError(
            f"labels of {tuple(fine)} voxels cannot be downsampled to {tuple(coarse)}: "
            f"each side must be an integer multiple"
        )
    for axis, (a, b) in enumerate(zip(fine, coarse, strict=True), y.ndim - len(fine)):
        y = y[(slice(None),) * axis + (slice(None, None, a // b),)]
    return y
