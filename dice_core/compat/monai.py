"""Drop-in replacements for MONAI's Dice losses, `monai.losses`, each in one pass::

    from dice_core.compat.monai import DiceCELoss  # in place of monai.losses

Constructor arguments, defaults, values, gradients, shapes, warnings and state_dict keys are those
of MONAI 1.6, including NaN where smooth_nr = smooth_dr = 0 gives 0/0. `input` is (B, C, *) with at
least one spatial axis; `target` is (B, 1, *) with `to_onehot_y`, labels of any dtype
(floating-point labels are copied to integers), else (B, C, *), values in [0, 1] of any dtype. No
softmax or one-hot encoding is stored: apart from the gradient nothing has input's size, except the
copy of a target (B, C, *) of which a mask or `ignore_index` excludes a part, and what `other_act`
returns.

The only differences from MONAI:

- Sums are added in float64 and half input is computed in float32: the loss is float32 for half and
  float32 input, float64 for float64. MONAI rounds the generalized Dice loss's class weights, the
  focal loss and one-hot encodings to float32, whatever the input.
- Labels outside [0, C) and other targets outside [0, 1] raise ValueError; on a GPU they make the
  loss NaN, unless `check_labels` requests the check.
- MONAI excludes voxels by multiplying with 0, which gives NaN where they are infinite or NaN. Here
  ignored and masked voxels contribute nothing and have gradient 0 whatever their input and loss,
  and the infinite loss of a class with target 0 contributes nothing either. Conversely, a NaN in an
  excluded background may have gradient NaN instead of 0.
- Second derivatives raise RuntimeError, and torch.jit.script does not take these modules.
- The keyword-only arguments `backend`, `num_threads`, `check_labels` and `inplace` are those of
  `dice_core.torch.loss`; with other_act, `inplace` has no effect.
- Integer and bool targets are accepted everywhere.

Anything that is not a function of the sums computed in one pass is refused, with a
NotImplementedError naming the argument, or with ValueError where it depends on the values of the
targets; see each loss. All losses refuse targets that require grad, and input without spatial axes,
with NotImplementedError; negative or infinite settings (smooth_nr, weight, gamma and so on) with
ValueError, and flags other than True and False with TypeError, on construction.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import checks, losses
from ..spec import Spec
from ..sums import Statistics
from ..torch import operators
from ..torch.functional import Options, evaluate, options
from ..torch.functional import sums as sums_of
from . import _shared

__all__ = [
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "GeneralizedDiceLoss",
    "MaskedDiceLoss",
    "TverskyLoss",
]

Activation = Callable[[Tensor], Tensor]
Weight = Sequence[float] | float | Tensor

# Labels for copies of targets: of a voxel to ignore, and of one to refuse as out of range.
_IGNORED, _REFUSED = -(2**15), -1
_SOFT_LABEL = "soft_label=True requires targets of 0 or 1"


class _Read(NamedTuple):
    """Checked input and target of a call."""

    x: Tensor  # input, or what other_act made of it
    y: Tensor
    labels: bool  # (B, 1, *) class labels, or targets of x's shape
    dropped: bool  # whether the background is excluded
    spec_arguments: tuple[str, int | None, str]  # activation, ignore_label, targets
    reason: str  # why values other than 0 and 1 are refused, if they are


class _Overlap(torch.nn.Module):
    """The arguments common to all losses, and the checks of input and target."""

    def __init__(
        self,
        *,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Activation | None,
        reduction: str,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        soft_label: bool,
        ignore_index: int | None,
        backend: str | None,
        num_threads: int | None,
        check_labels: bool | None,
        inplace: bool,
    ) -> None:
        super().__init__()
        self.reduction = _one_of(reduction, "reduction", ("none", "mean", "sum"))
        _shared.check_callable(other_act, "other_act")
        self.include_background = checks.flag(include_background, "include_background")
        self.to_onehot_y = checks.flag(to_onehot_y, "to_onehot_y")
        self.sigmoid = checks.flag(sigmoid, "sigmoid")
        self.softmax = checks.flag(softmax, "softmax")
        self.other_act = other_act
        self.smooth_nr = _number(smooth_nr, "smooth_nr")
        self.smooth_dr = _number(smooth_dr, "smooth_dr")
        self.batch = checks.flag(batch, "batch")
        self.soft_label = checks.flag(soft_label, "soft_label")
        if ignore_index is not None:
            ignore_index = checks.integer(ignore_index, "ignore_index")
        self.ignore_index = ignore_index
        self._options = options(backend, num_threads, check_labels, inplace)
        if other_act is not None:  # which may have saved its output
            self._options = self._options._replace(inplace=False)
        _check_activation(sigmoid, softmax, other_act)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        return self._loss(self._read(input, target))

    def _loss(self, call: _Read) -> Tensor:
        raise NotImplementedError

    def _read(self, input: Tensor, target: Tensor, to_onehot_y: bool | None = None) -> _Read:
        """The checked call; `to_onehot_y` defaults to that of the loss."""
        to_onehot_y = self.to_onehot_y if to_onehot_y is None else to_onehot_y
        _check_tensors(input, target)
        sigmoid, softmax, other_act = self.sigmoid, self.softmax, self.other_act
        single = input.shape[1] == 1
        if single:
            _warn_of_single(softmax, to_onehot_y, not self.include_background)
        if sigmoid + softmax + (other_act is not None) > 1:
            _check_activation(sigmoid, softmax, other_act)
        x = input if other_act is None else other_act(input)
        labels = to_onehot_y and not single
        wanted = (x.shape[0], 1, *x.shape[2:]) if labels else x.shape
        if target.shape != wanted or x.shape != input.shape:
            _refuse_shapes(input, x, target, labels)
        if target.requires_grad:
            raise _refusal("a target that requires grad", "detach it")
        activation = "sigmoid" if sigmoid else "softmax" if softmax and not single else "none"
        # With squared_pred, soft_label changes nothing.
        minimum = self.soft_label and not getattr(self, "squared_pred", False)
        reason = _SOFT_LABEL if minimum else ""
        if reason and activation == "none":
            raise _refusal("soft_label=True without sigmoid=True or softmax=True", "leave it out")
        y, index, targets = target, self.ignore_index, "labels" if labels else "soft"
        if reason and not labels and target.is_floating_point():
            targets = "binary"
        if index is not None:
            y, index, of_class = _with_ignored_index(target, index, labels)
            reason = reason or of_class
        elif labels and target.is_floating_point():
            y = target.int()
        dropped = not (self.include_background or single)
        return _Read(x, y, labels, dropped, (activation, index, targets), reason)


class DiceLoss(_Overlap):
    """The Dice loss, monai.losses.DiceLoss.

    With I = sum s t, P = sum s and Y = sum t for a class, where s are the probabilities, or input
    itself, and t the targets::

        1 - (2 I + smooth_nr) / (P + Y + smooth_dr)
        1 - (2 I + smooth_nr) / (2 (P + Y - I) + smooth_dr)   # jaccard=True

    for each sample and class, or with `batch` for each class over all samples. With `squared_pred`,
    P = sum s^2 and Y = sum t^2. `weight` multiplies the classes' losses, of which "mean" takes the
    unweighted mean; a scalar is expanded to one number per class at the first call.
    include_background=False excludes class 0.

    `ignore_index` excludes voxels: those with this label; for targets (B, C, *), those of this
    class or, if it is not a class, those without any class. An ignored class stays in the mean, as
    an absent one. For a single channel it is a value of the target.

    Shapes: input (B, C, *), target (B, 1, *) with `to_onehot_y`, else (B, C, *). The loss is a
    scalar, or with reduction "none" (B, K, 1, ...), with `batch` (K, 1, ...) of one axis less,
    where K is the number of included classes.

    Raises AssertionError for a target of another shape, ValueError for targets out of range and for
    a `weight` of another length than K, NotImplementedError for `soft_label` of input that is
    neither a sigmoid nor a softmax. Targets strictly between 0 and 1 are refused as out of range
    with `soft_label`, unless `squared_pred` is set, and in the channel of an `ignore_index`.

    Differences from MONAI: those listed in the module's docstring.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=ignore_index,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        self.squared_pred = checks.flag(squared_pred, "squared_pred")
        self.jaccard = checks.flag(jaccard, "jaccard")
        self.register_buffer("class_weight", _weight(weight))

    def _loss(self, call: _Read) -> Tensor:
        part, weights = self._part(call)
        return self._shaped(_evaluate(call, (part,), weights, self._options), call)

    def _part(self, call: _Read, factor: float = 1.0) -> tuple[Any, list[Tensor]]:
        """Factor times this loss, as a part for `_evaluate`, and its weights."""
        weight, weights = self.class_weight, []
        if weight is not None and call.x.shape[1] - call.dropped != 1:
            if weight.ndim == 0:  # visible in the state_dict from now on, as in MONAI
                weight = self.class_weight = weight.repeat(call.x.shape[1] - call.dropped)
            weights = [_per_class(weight, call.x.shape[1], call.dropped)]
        square = self.squared_pred and not call.labels and call.y.is_floating_point()
        settings = (
            self.jaccard,
            self.squared_pred,
            square,
            self.smooth_nr,
            self.smooth_dr,
            self.reduction,
            self.batch,
            call.dropped,
            bool(weights),
        )
        return (factor, _dice, settings), weights

    def _shaped(self, value: Tensor, call: _Read) -> Tensor:
        if self.reduction != "none":
            return value
        return _class_losses(value, call.dropped, self.batch, call.x.ndim - 2)

    def _plus(self, call: _Read, input: Tensor, factor: float, more: Any, weights: Any) -> Tensor:
        """Factor times this loss, plus another part that is computed from the logits."""
        part, own = self._part(call, factor)
        if self.other_act is None:
            return _evaluate(call, (part, more), [*own, *weights], self._options)
        activation = "softmax" if input.shape[1] > 1 else "sigmoid"
        of_logits = call._replace(x=input, spec_arguments=(activation, *call.spec_arguments[1:]))
        value = _evaluate(call, (part,), own, self._options)
        return value + _evaluate(of_logits, (more,), weights, self._options)


class MaskedDiceLoss(DiceLoss):
    """`DiceLoss` of masked probabilities and targets, monai.losses.MaskedDiceLoss::

        1 - (2 I + smooth_nr) / (P + Y + smooth_dr), I = sum m s t, P = sum m s, Y = sum m t

    Only voxels with mask m = 1 count; but with `to_onehot_y` MONAI multiplies the labels by the
    mask, and voxels with m = 0 are voxels of class 0 with probability 0: their number is added to
    Y of class 0. Use targets (B, C, *) or `include_background=False` where that is not wanted.

    Shapes: as `DiceLoss`, and mask (B, 1, *) or (1, 1, *) of any dtype. Of labels, and of targets
    (B, C, *), a copy is made.

    Raises what `DiceLoss` does; ValueError for masks that do not fit, and for values other than 0
    and 1, which count as targets out of range; NotImplementedError for a mask that requires grad.

    Differences from MONAI: those listed in the module's docstring.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Weight | None = None,
        soft_label: bool = False,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *), (B, 1, *) or (B, C, *), and (B, 1, *) or (1, 1, *) -> the loss."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self._loss(self._read(input, target))
        _check_tensors(input, target)
        _check_mask(input, mask)
        call = self._read(input, target)
        mask = mask.expand(len(input), 1, *input.shape[2:])
        call = _masked(call, mask)
        if not call.labels or call.dropped:
            return self._loss(call)
        part, weights = self._part(call)
        term, request = _built((part,), call.spec_arguments)
        sums = _with_background(call, mask, request, self._options)
        if weights:
            weights = [weight.to(sums.array) for weight in weights]
            term = term.with_weights(weights)
        value: Tensor = term.value(sums)
        return self._shaped(value if call.x.dtype == torch.float64 else value.float(), call)


class GeneralizedDiceLoss(_Overlap):
    """The generalized Dice loss, monai.losses.GeneralizedDiceLoss::

        1 - (2 sum_c w_c I_c + smooth_nr) / (sum_c w_c (P_c + Y_c) + smooth_dr)

    for each sample, or with `batch` for all samples together, where w is 1 / Y^2, 1 / Y or 1
    (`w_type` "square", "simple", "uniform"); a class without labels gets the largest w of the other
    classes of its sample. With "square" and large structures w is so small that smooth_nr and
    smooth_dr outweigh the sums, and the loss tends to 0 whatever is predicted.

    Shapes: as `DiceLoss`; the loss is a scalar, or with reduction "none" (B, 1, 1, ...), with
    `batch` (1, 1, ...) of one axis less.

    Raises what `DiceLoss` does.

    Differences from MONAI: those listed in the module's docstring.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=None,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        self.w_type = _one_of(w_type, "w_type", ("square", "simple", "uniform"))

    def _loss(self, call: _Read) -> Tensor:
        settings = (
            self.w_type,
            self.smooth_nr,
            self.smooth_dr,
            self.reduction,
            self.batch,
            call.dropped,
        )
        value = _evaluate(call, ((1.0, _generalized_dice, settings),), [], self._options)
        if self.reduction == "none":
            return value.reshape(*value.shape, *[1] * (call.x.ndim - 1))
        return value


class TverskyLoss(_Overlap):
    """The Tversky loss, monai.losses.TverskyLoss::

        1 - (I + smooth_nr) / (I + alpha (P - I) + beta (Y - I) + smooth_dr)

    for each sample and class, or with `batch` for each class over all samples: `alpha` weights
    false positives, `beta` false negatives. The other arguments are those of `DiceLoss`.

    Shapes: as `DiceLoss`; the loss is a scalar, or with reduction "none" (B, K), with `batch` (K,).

    Raises what `DiceLoss` does.

    Differences from MONAI: those listed in the module's docstring.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=ignore_index,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        self.alpha = _number(alpha, "alpha")
        self.beta = _number(beta, "beta")

    def _loss(self, call: _Read) -> Tensor:
        settings = (
            self.alpha,
            self.beta,
            self.smooth_nr,
            self.smooth_dr,
            self.reduction,
            self.batch,
            call.dropped,
        )
        value = _evaluate(call, ((1.0, _tversky, settings),), [], self._options)
        if self.reduction == "none":
            return _class_losses(value, call.dropped, self.batch, 0)
        return value


class DiceCELoss(torch.nn.Module):
    """Dice loss plus cross-entropy, monai.losses.DiceCELoss::

        lambda_dice * DiceLoss(input, target) + lambda_ce * CrossEntropyLoss(input, target)

    The cross-entropy is torch's, of the logits and of all classes: for labels its mean is divided
    by the sum of the voxels' weights, for targets (B, C, *) by the number of voxels. For a single
    channel it is the binary cross-entropy, with `weight`, one number, as pos_weight, and without
    `label_smoothing`. `weight`, a tensor of C numbers, applies to both losses; without background
    the Dice loss uses its last C - 1.

    Shapes: as `DiceLoss`; the loss is a scalar. With `other_act` the Dice loss and the
    cross-entropy take a pass each.

    Raises what `DiceLoss` does; ValueError if target has neither 1 nor C channels;
    NotImplementedError for several weights of a single channel.

    Differences from MONAI: those listed in the module's docstring.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        reduction = _one_of(reduction, "reduction", ("mean", "sum"))
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
        include_background = checks.flag(include_background, "include_background")
        if weight is not None and not (include_background or weight.ndim):
            raise ValueError("weight must be one number per class with include_background=False")
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight if weight is None or include_background else weight[1:],
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        # These only hold settings, under MONAI's names, and are never called.
        smoothing = checks.number(label_smoothing, "label_smoothing", largest=1)
        self.cross_entropy = torch.nn.CrossEntropyLoss(
            _weight(weight), reduction=reduction, label_smoothing=smoothing
        )
        self.binary_cross_entropy = torch.nn.BCEWithLogitsLoss(
            reduction=reduction, pos_weight=weight
        )
        self.reduction = "mean"  # for any reduction, as in MONAI
        self.lambda_dice = _factor(lambda_dice, "lambda_dice")
        self.lambda_ce = _factor(lambda_ce, "lambda_ce")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        _check_tensors(input, target)
        if input.ndim != target.ndim or target.shape[1] not in (1, input.shape[1]):
            _refuse_channels(input, target)
        dice, weights = self.dice, []
        call = dice._read(input, target)
        if input.shape[1] > 1:
            entropy = self.cross_entropy
            weight = entropy.weight
            settings = (
                entropy.label_smoothing,
                entropy.reduction,
                entropy.ignore_index,
                call.labels,
                weight is not None,
            )
            part: Any = self.lambda_ce, _cross_entropy, settings
        else:
            binary = self.binary_cross_entropy
            weight = binary.pos_weight
            if weight is not None:
                if weight.numel() != 1:
                    what = "a weight of several numbers for a single channel"
                    raise _refusal(what, "give one number")
                weight = weight.reshape(1)
            part = self.lambda_ce, _binary_cross_entropy, (binary.reduction, weight is not None)
        if weight is not None:
            weights = [weight]
        return dice._plus(call, input, self.lambda_dice, part, weights)


class DiceFocalLoss(torch.nn.Module):
    """Dice loss plus focal loss of each channel's sigmoid, monai.losses.DiceFocalLoss::

        lambda_dice * DiceLoss(input, target) + lambda_focal * FocalLoss(input, target)

    The focal loss is the mean over voxels, samples and classes of (1 - s)^gamma (-log s) for a
    class's voxels and s^gamma (-log(1 - s)) for the others, where s is the sigmoid of input even
    with `softmax`. A scalar `alpha` multiplies the former and 1 - alpha the latter; one number per
    class multiplies the former only. `weight` multiplies the classes' losses. With reduction "sum"
    it is summed over samples and classes, and still the mean over voxels.

    Shapes: as `DiceLoss`; the loss is a scalar. With `other_act` both losses take a pass each.

    Raises what `DiceLoss` does; ValueError if target has neither 1 nor C channels;
    NotImplementedError for reduction "none", a loss of each voxel. Targets strictly between 0 and 1
    are refused as out of range unless gamma is 0 and alpha None.

    Differences from MONAI: those listed in the module's docstring.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Activation | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Weight | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | Sequence[float] | None = None,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=False,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        self.focal = _FocalSettings(
            include_background=include_background,
            gamma=gamma,
            weight=weight,
            alpha=alpha,
            reduction=self.dice.reduction,
        )
        self.reduction = "mean"  # for any reduction, as in MONAI
        self.to_onehot_y = checks.flag(to_onehot_y, "to_onehot_y")
        self.lambda_dice = _factor(lambda_dice, "lambda_dice")
        self.lambda_focal = _factor(lambda_focal, "lambda_focal")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        _check_tensors(input, target)
        if input.ndim != target.ndim or target.shape[1] not in (1, input.shape[1]):
            _refuse_channels(input, target)
        dice, focal = self.dice, self.focal
        call = dice._read(input, target, self.to_onehot_y)
        gamma, alpha = focal.gamma, focal.alpha
        if not call.labels and (gamma or alpha is not None) and call.y.is_floating_point():
            activation, ignore_label, _ = call.spec_arguments
            reason = f"{'gamma' if gamma else 'alpha'} requires targets of 0 or 1"
            call = call._replace(spec_arguments=(activation, ignore_label, "binary"), reason=reason)
        classes = input.shape[1]
        dropped = classes > 1 and not focal.include_background
        weight, weights = focal.class_weight, []
        if weight is not None:
            weights.append(_per_class(weight, classes, dropped, single=False))
        several = isinstance(alpha, Tensor) and alpha.ndim > 0
        if several:
            weights.append(_per_class(alpha, classes, dropped, "alpha"))
        settings = (
            gamma,
            None if several else alpha,
            focal.reduction,
            classes - dropped,
            dropped,
            weight is not None,
            several,
        )
        part = self.lambda_focal, _sigmoid_focal, settings
        return dice._plus(call, input, self.lambda_dice, part, weights)


class _FocalSettings(torch.nn.Module):
    """The settings of the focal loss, under MONAI's names."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        include_background: bool,
        gamma: float,
        weight: Weight | None,
        alpha: Any,
        reduction: str,
    ) -> None:
        super().__init__()
        self.include_background = include_background
        self.gamma = _number(gamma, "gamma")
        several = alpha is not None and _shared.as_tensor(alpha, "alpha").ndim > 0
        if alpha is not None and not several:
            alpha = checks.number(_number(alpha, "alpha"), "alpha", largest=1)
        self.alpha: Any = _weight(alpha, "alpha") if several else alpha
        self.weight = weight
        self.register_buffer("class_weight", _weight(weight))
        self.reduction = reduction
        _sigmoid_focal(self.gamma, None, reduction, 1, False, False, False)  # checks the settings


# ---- the losses as terms ------------------------------------------------------------------------


def _built(parts: tuple[Any, ...], spec_arguments: tuple[Any, ...]) -> tuple[losses.Term, Spec]:
    """The sum of factor * make(*settings), and the Spec of its sums. Cached.

    Class weights are placeholders: `Term.with_weights` replaces them.
    """
    if torch.compiler.is_dynamo_compiling():
        parts = tuple(
            (_constant(factor), make, tuple(_constant(value) for value in settings))
            for factor, make, settings in parts
        )
        built: tuple[losses.Term, Spec] = getattr(_traced, _name_traced(parts, spec_arguments))
        return built
    return _build(parts, spec_arguments)


def _constant(value: Any) -> Any:
    """A number as a constant of the graph: hashing it makes dynamo recompile when it changes."""
    return next(iter({value}))


class _Traced:
    """The terms of compiled graphs as attributes; dynamo would trace through a cache."""


_traced = _Traced()


def _name_traced(parts: tuple[Any, ...], spec_arguments: tuple[Any, ...]) -> str:
    """Builds a term outside the trace and returns its attribute name."""
    built = _build(parts, spec_arguments)
    name = f"term{id(built)}"
    setattr(_traced, name, built)  # keeps the object alive, so its id stays unique
    return name


torch.compiler.assume_constant_result(_name_traced)


@functools.lru_cache(1024)
def _build(parts: tuple[Any, ...], spec_arguments: tuple[Any, ...]) -> tuple[losses.Term, Spec]:
    terms: list[losses.Term] = []
    for factor, make, settings in parts:
        for value in (factor, *settings):
            if isinstance(value, Tensor):  # hashed by identity, although its value may change
                raise TypeError(f"settings of a loss must be numbers, got the tensor {value}")
        term = make(*settings)
        terms.append(term if factor == 1 else factor * term)
    term = functools.reduce(lambda a, b: a + b, terms)
    return term, term.spec(*spec_arguments)


def _dice(
    jaccard: bool,
    squared_pred: bool,
    target_square: bool,
    smooth_nr: float,
    smooth_dr: float,
    reduction: str,
    batch: bool,
    dropped: bool,
    weighted: bool,
) -> losses.Term:
    kind, share = (losses.Jaccard, 0.5) if jaccard else (losses.Dice, 1.0)
    return kind(
        p=2 if squared_pred else 1,
        target_square=target_square,
        smooth=(share * smooth_nr, share * smooth_dr),
        weight=(1.0,) if weighted else None,
        **_average(reduction, batch, dropped),
    )


def _tversky(
    alpha: float,
    beta: float,
    smooth_nr: float,
    smooth_dr: float,
    reduction: str,
    batch: bool,
    dropped: bool,
) -> losses.Term:
    smooth = smooth_nr, smooth_dr
    settings = _average(reduction, batch, dropped)
    return losses.Tversky(alpha=alpha, beta=beta, smooth=smooth, **settings)


def _average(reduction: str, batch: bool, dropped: bool) -> dict[str, Any]:
    """The settings that average (B, K) losses, or with `batch` (K,)."""
    checks.one_of(reduction, "reduction", ("none", "mean", "sum"))
    return {
        "reduction": "classes" if reduction == "none" else reduction,
        "divisor": "one" if reduction == "sum" else "kept",
        "pool": "batch" if batch else "none",
        "ignore_channel": 0 if dropped else -1,
        "empty": "nan",
    }


def _generalized_dice(
    w_type: str, smooth_nr: float, smooth_dr: float, reduction: str, batch: bool, dropped: bool
) -> losses.Term:
    checks.one_of(reduction, "reduction", ("none", "mean", "sum"))
    return losses.GeneralizedDice(
        weighting=w_type,
        smooth=(smooth_nr, smooth_dr),
        pool="all" if batch else "classes",
        reduction="sum" if batch else reduction,
        ignore_channel=0 if dropped else -1,
        empty="nan",
    )


def _cross_entropy(
    label_smoothing: float, reduction: str, ignore_index: int, labels: bool, weighted: bool
) -> losses.Term:
    if ignore_index != -100:
        raise _refusal(f"cross_entropy.ignore_index={ignore_index}", "leave it at -100")
    checks.one_of(reduction, "reduction", ("mean", "sum"))
    divisor = "one" if reduction == "sum" else "weights" if labels else "voxels"
    return losses.CrossEntropy(
        weight=(1.0,) if weighted else None,
        label_smoothing=label_smoothing,
        reduction=reduction,
        divisor=divisor,
        empty="nan",
    )


def _binary_cross_entropy(reduction: str, weighted: bool) -> losses.Term:
    checks.one_of(reduction, "reduction", ("mean", "sum"))
    return losses.BinaryCrossEntropy(
        pos_weight=(1.0,) if weighted else None,
        reduction=reduction,
        divisor="one" if reduction == "sum" else "voxels",
        empty="nan",
    )


def _sigmoid_focal(
    gamma: float,
    alpha: float | None,
    reduction: str,
    kept: int,
    dropped: bool,
    weighted: bool,
    several: bool,
) -> losses.Term:
    if reduction == "none":
        raise _refusal('reduction="none", a loss of each voxel,', 'use "mean" or "sum"')
    term = losses.SigmoidFocal(
        gamma=gamma,
        alpha=alpha,
        weight=(1.0,) if weighted else None,
        pos_weight=(1.0,) if several else None,
        reduction=reduction,
        pool="none" if reduction == "sum" else "batch",
        ignore_channel=0 if dropped else -1,
        empty="nan",
    )
    return kept * term if reduction == "sum" else term  # the sum of the classes' means


# ---- the call -----------------------------------------------------------------------------------


def _evaluate(
    call: _Read, parts: tuple[Any, ...], weights: list[Tensor], options: Options
) -> Tensor:
    """The sum of these parts, see `_built`."""
    term, request = _built(parts, call.spec_arguments)
    if weights:
        term = term.with_weights(weights)
    try:
        return evaluate(call.x, call.y, term, request, options)
    except ValueError as error:
        raise _explained(error, call.reason) from None


def _with_background(call: _Read, mask: Tensor, request: Spec, options: Options) -> Statistics:
    """The sums of unmasked voxels, with the number of masked voxels added to Y of class 0."""
    operators.check(call.x, call.y, request)
    try:
        sums = sums_of(call.x, call.y, request, options)
    except ValueError as error:
        raise _explained(error, call.reason) from None
    more = torch.zeros_like(sums.array)
    more[2, :, 0] = (mask == 0).flatten(1).sum(1)
    return Statistics(sums.array + more, sums.spec, sums.dtype)


def _with_ignored_index(y: Tensor, index: int, labels: bool) -> tuple[Tensor, int, str]:
    """A target with an ignored label where `ignore_index` excludes voxels; that label; and the
    reason why other values of the target are refused, if they are.
    """
    if labels or y.shape[1] == 1:
        if y.dtype == torch.uint8:
            index %= 256  # as in torch's comparison, where -1 equals 255
        if labels and y.is_floating_point():
            return torch.where(y == index, _IGNORED, y.int()), _IGNORED, ""
        return y, index, ""
    copy = _widened(y)
    if not 0 <= index < y.shape[1]:
        return torch.where(y.any(1, keepdim=True).bool(), copy, _IGNORED), _IGNORED, ""
    of_index = y[:, index : index + 1]
    marks = torch.where(of_index == 1, copy.new_full((), _IGNORED), copy.new_full((), _REFUSED))
    reason = f"ignore_index={index} requires zeros and ones in that channel"
    return torch.where(of_index == 0, copy, marks), _IGNORED, reason


def _masked(call: _Read, mask: Tensor) -> _Read:
    """The call with the voxels ignored where the mask is 0."""
    y, reason = _widened(call.y), call.reason
    if mask.dtype == torch.bool:
        y = torch.where(mask, y, _IGNORED)
    else:
        marks = torch.where(mask == 0, y.new_full((), _IGNORED), y.new_full((), _REFUSED))
        y = torch.where(mask == 1, y, marks)
        reason = "; ".join(filter(None, (reason, "mask must hold only zeros and ones")))
    activation, _, targets = call.spec_arguments
    return call._replace(y=y, spec_arguments=(activation, _IGNORED, targets), reason=reason)


def _widened(y: Tensor) -> Tensor:
    """The target in a dtype that can hold _IGNORED."""
    if y.dtype in (torch.bool, torch.uint8, torch.int8):
        return y.to(torch.int16)
    return y.to(torch.int64) if y.dtype in (torch.uint16, torch.uint32, torch.uint64) else y


def _class_losses(value: Tensor, dropped: bool, batch: bool, axes: int) -> Tensor:
    """(B, K) losses, or (K,) of a batch, without an excluded background, with `axes` axes of 1."""
    value = value[:, int(dropped) :]
    value = value[0] if batch else value
    return value.reshape(*value.shape, *[1] * axes)


# ---- arguments ----------------------------------------------------------------------------------


def _one_of(value: Any, name: str, allowed: Sequence[str]) -> str:
    """A string, or the value of a member of an enumeration."""
    value = getattr(value, "value", value)
    checks.one_of(value, name, allowed)
    return str(value)


def _number(value: Any, name: str) -> float:
    """A finite number >= 0, or the only element of a tensor that does not require grad."""
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1:
            raise _refusal(f"{name} that is a tensor", "give a number")
        value = value.item()
    return checks.number(value, name)


def _factor(value: Any, name: str) -> float:
    if isinstance(value, (int, float)) and value < 0.0:
        raise ValueError(f"{name} should be no less than 0.0, got {value}")
    return _number(value, name)


def _weight(weight: Any, name: str = "weight") -> Tensor | None:
    """The class weights as a tensor of numbers >= 0."""
    if weight is None:
        return None
    weight = _shared.as_tensor(weight, name)
    numbers = weight.detach()
    if weight.ndim > 1 or not bool(((numbers >= 0) & numbers.isfinite()).all()):
        raise ValueError(
            f"the values of {name} should be finite numbers no less than 0, one for each class, "
            f"got {numbers.tolist()}"
        )
    return weight


def _per_class(
    weight: Tensor, classes: int, dropped: bool, name: str = "weight", single: bool = True
) -> Tensor:
    """(C,) numbers from one, or from one per included class; 0 for an excluded background."""
    kept = classes - dropped
    if weight.ndim == 0:
        weight = weight.expand(kept)
    elif kept == 1 and not single:
        raise ValueError(f"Per-class {name} is not supported for a single class: give a number")
    elif len(weight) != kept:
        raise ValueError(
            f"The length of {name} should be the number of classes, {kept}, without the background "
            f"if include_background=False; got {len(weight)}"
        )
    return functional.pad(weight.double(), (1, 0)) if dropped else weight


def _warn_of_single(softmax: bool, to_onehot_y: bool, no_background: bool) -> None:
    for given, name in (
        (softmax, "softmax=True"),
        (to_onehot_y, "to_onehot_y=True"),
        (no_background, "include_background=False"),
    ):
        if given:
            warnings.warn(f"single channel prediction, `{name}` ignored.", stacklevel=4)


def _check_activation(sigmoid: bool, softmax: bool, other_act: Activation | None) -> None:
    if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
        raise ValueError(
            "Incompatible values: more than 1 of sigmoid=True, softmax=True and other_act"
        )


def _check_tensors(input: Any, target: Any) -> None:
    _shared.check_tensors(input, target, "input", "target")
    if input.ndim < 3:
        what = f"input of shape {tuple(input.shape)}, without spatial axes,"
        raise _refusal(what, "give it one")


def _refuse_shapes(input: Tensor, x: Tensor, target: Tensor, labels: bool) -> None:
    """Raises AssertionError, as MONAI does, for a target of a wrong shape; NotImplementedError for
    shapes that MONAI supports and this module does not.
    """
    if x.shape != input.shape:
        raise _refusal(
            f"other_act that changes the shape {tuple(input.shape)} to {tuple(x.shape)}",
            "apply it to the input",
        )
    if labels and (target.ndim < 2 or target.shape[1] != 1):
        raise AssertionError(
            f"labels should have a channel with length equal to one, got {tuple(target.shape)}"
        )
    wanted = (x.shape[0], 1 if labels else x.shape[1], *x.shape[2:])
    raise AssertionError(
        f"ground truth has different shape {tuple(target.shape)} from input, "
        f"{tuple(x.shape)}: {wanted} is needed"
    )


def _refuse_channels(input: Tensor, target: Tensor) -> None:
    """Raises ValueError, as MONAI's compounds do, if target has neither 1 nor C channels."""
    raise ValueError(
        f"the number of dimensions of input and target should be the same, and the number of "
        f"channels for target 1 or that of input: got shape {tuple(input.shape)} and "
        f"{tuple(target.shape)}"
    )


def _check_mask(input: Tensor, mask: Tensor) -> None:
    _shared.check_mask(mask, input, "mask", "input")
    shapes = f"of input {tuple(input.shape)} and mask {tuple(mask.shape)}"
    if mask.requires_grad:
        raise _refusal("a mask that requires grad", "detach it")
    if mask.ndim != input.ndim:
        warnings.warn(f"Dim of input is different from mask: shapes {shapes}.", stacklevel=3)
    if mask.shape[0] not in (1, input.shape[0]):
        raise ValueError(f"Batch size of mask must be one or equal to input: shapes {shapes}")
    if mask.shape[1] != 1:
        raise ValueError(f"Mask must have only one channel: shapes {shapes}")
    if mask.shape[2:] != input.shape[2:]:
        warnings.warn(
            f"Spatial size of input is different from mask: shapes {shapes}.", stacklevel=3
        )
    wanted = (input.shape[0], 1, *input.shape[2:])
    ends = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.ndim > input.ndim or any(m not in (1, n) for m, n in ends):
        raise ValueError(f"mask must broadcast to {wanted}: shapes {shapes}")


def _explained(error: ValueError, reason: str) -> ValueError:
    """The error of out-of-range targets, with the reason why only zeros and ones are valid."""
    return ValueError(f"{error}; {reason}") if reason and "outside" in str(error) else error


def _refusal(what: str, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} cannot be computed in one pass over the voxels: {instead}, or use monai.losses"
    )
