"""MONAI's Dice losses, `monai.losses`, by their names and arguments, each in one pass.

    from dice_core.compat.monai import DiceCELoss  # in place of monai.losses

Constructor arguments, defaults, values, gradients, shapes, warnings and keys of the state_dict are
those of MONAI 1.6. `input` is (B, C, *) with at least one spatial axis; `target` is (B, 1, *) with
`to_onehot_y`, labels of any dtype (of floating-point ones an integer copy is made), else (B, C, *),
values in [0, 1] of any dtype. Neither a softmax nor a one-hot encoding is made: beside the gradient
nothing is of input's size, except a copy of a dense target where a mask or `ignore_index` leaves
out some of it, and what `other_act` returns.

What differs:

- The loss is float32 for half and float32 input, float64 for float64; MONAI sums halfs in half.
- 0/0, a class that is neither predicted nor there with smooth_nr = smooth_dr = 0, is a perfect
  score, not NaN.
- Labels outside [0, C), dense targets outside [0, 1], which MONAI takes as they are, and what else
  fails there inside torch with a RuntimeError raise ValueError; such labels and targets on a GPU
  make the loss NaN. Negative weights and smoothing raise it when the loss is made.
- A scalar `weight` stays a scalar in the state_dict, where MONAI expands it at the first call.
- `ignore_index` that is a class takes that class out of the mean too, MONAI counts it as one that
  is never found; masked voxels do not count as background in `MaskedDiceLoss`.
- Second derivatives raise RuntimeError, and torch.jit.script does not take these modules.

What is not a function of the sums that one pass takes raises NotImplementedError, naming the
argument: see each loss. All refuse targets that require grad, and input without spatial axes.
Settings that need targets of 0 and 1 alone look through dense floating-point ones at each call, for
which a GPU waits; not through integer and bool ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses, spec
from ..torch import loss
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

_SOFT_LABEL = "soft_label=True"  # the sums of min(s, t), of 0/1 targets and scores in [0, 1] I


class _Seen(NamedTuple):
    """A call, as `dice_core.torch.loss` takes it."""

    x: Tensor
    y: Tensor
    activation: str
    ignore_label: int | None


class _Overlap(torch.nn.Module):
    """The arguments that all have, and what they mean to `dice_core.torch.loss`."""

    def __init__(
        self,
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
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction = _one_of(reduction, "reduction", ("none", "mean", "sum"))
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable, got {type(other_act).__name__}")
        if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
            raise ValueError(
                "Incompatible values: more than 1 of sigmoid=True, softmax=True and other_act"
            )
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.smooth_nr = spec.number(smooth_nr, "smooth_nr")
        self.smooth_dr = spec.number(smooth_dr, "smooth_dr")
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = spec.label(ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        return self._loss(self._read(input, target))

    def _term(self, classes: int) -> losses.Term:
        """The loss of so many classes, with a value for each where nothing is reduced."""
        raise NotImplementedError

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        """The value of the term in the shape of reduction "none" for input of so many axes."""
        raise NotImplementedError

    def _loss(self, seen: _Seen) -> Tensor:
        x, y, activation, ignore_label = seen
        term = self._term(x.shape[1])
        value = loss(x, y, term, activation=activation, ignore_label=ignore_label)
        return self._shaped(value, x.ndim) if self.reduction == "none" else value

    # the call

    def _read(self, input: Tensor, target: Tensor) -> _Seen:
        single = input.shape[1] == 1
        for given, name in (
            (self.softmax, "softmax=True"),
            (self.to_onehot_y, "to_onehot_y=True"),
            (not self.include_background, "include_background=False"),
        ):
            if single and given:
                warnings.warn(f"single channel prediction: `{name}` is ignored", stacklevel=3)
        activation = "sigmoid" if self.sigmoid else "none"
        if self.softmax and not single:
            activation = "softmax"
        x = input if self.other_act is None else self.other_act(input)
        labels = self.to_onehot_y and not single
        _check_shapes(x, target, labels)
        if target.requires_grad:
            raise _refusal("target that requires grad", "detach it")
        needs = self._needs_hard()
        if needs == _SOFT_LABEL and activation == "none":
            raise _refusal(f"{needs} without sigmoid=True or softmax=True", "leave it out")
        if needs and not labels and _shared.soft(target):
            raise _refusal(f"{needs} with targets between 0 and 1", "leave it out")
        return self._without_ignored(_Seen(x, target, activation, None), labels)

    def _needs_hard(self) -> str:
        """The argument that is served only where targets are 0 or 1; "" if none is."""
        return _SOFT_LABEL if self.soft_label else ""

    def _without_ignored(self, seen: _Seen, labels: bool) -> _Seen:
        """With ignore_index as a label that the target has where it is to be left out."""
        index, y = self.ignore_index, seen.y
        if labels or index is None or y.shape[1] == 1:
            return seen._replace(y=_shared.class_labels(y) if labels else y, ignore_label=index)
        if 0 <= index < y.shape[1]:
            of_index = y[:, index : index + 1]
            if _shared.soft(of_index):
                raise _refusal(
                    f"ignore_index={index} of a class with targets between 0 and 1",
                    "give that channel in zeros and ones",
                )
            counted = of_index == 0
        else:
            counted = y.any(1, keepdim=True).bool()  # of uint8 torch's any is uint8
        y, label = _shared.masked(y, counted)
        return seen._replace(y=y, ignore_label=label)

    # the classes

    def _kept(self, classes: int) -> int:
        """How many classes are left without the background."""
        return classes if self.include_background or classes == 1 else classes - 1

    def _average(self, classes: int) -> dict[str, Any]:
        """A term's settings for reduction, batch, background and ignored class."""
        out = [0] if self._kept(classes) < classes else []
        index = self.ignore_index
        if index is not None and 0 <= index < classes > 1 and index not in out:
            out.append(index)
        each = self.reduction == "none"
        return {
            "reduction": "classes" if each else self.reduction,
            "divisor": "one" if self.reduction == "sum" else "kept" if out else "classes",
            "pool": "batch" if self.batch else "none",
            "ignore_channel": out if len(out) > 1 else out[0] if out else -1,
        }

    def _of_classes(self, value: Tensor) -> Tensor:
        """(B, K), or (K,) of a batch, without the background."""
        classes = value.shape[1]
        value = value[:, classes - self._kept(classes) :]
        return value[0] if self.batch else value


class DiceLoss(_Overlap):
    """1 - (2 I + smooth_nr) / (P + Y + smooth_dr), of the Jaccard index 2 (P + Y - I) below.

    With `squared_pred` P sums squares. `weight` multiplies the classes' losses, whose plain mean is
    taken. Reduction "none" gives (B, K, 1, ..), of a batch (K, 1, ..), K classes, 0 for one that is
    ignored.

    Raises NotImplementedError for `squared_pred` and `soft_label` of targets between 0 and 1, for
    `soft_label` of scores that are not a sigmoid or softmax, and for an `ignore_index` whose own
    dense channel has values between 0 and 1.
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
    ) -> None:
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
            ignore_index,
        )
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.register_buffer("class_weight", _weight(weight))

    def _term(self, classes: int) -> losses.Term:
        kind, share = (losses.Jaccard, 0.5) if self.jaccard else (losses.Dice, 1.0)
        weight, kept = self.class_weight, self._kept(classes)
        return kind(
            p=2 if self.squared_pred else 1,
            smooth=(share * self.smooth_nr, share * self.smooth_dr),
            weight=None if weight is None or kept == 1 else _of_all(weight, kept, classes),
            **self._average(classes),
        )

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        value = self._of_classes(value)
        return value.reshape(*value.shape, *[1] * (ndim - 2))

    def _needs_hard(self) -> str:
        return "squared_pred=True" if self.squared_pred else super()._needs_hard()

    def _plus(self, more: losses.Term, factor: float, seen: _Seen, input: Tensor) -> Tensor:
        """Factor times this loss, of what was seen, plus a term of the logits."""
        x, y, activation, ignore_label = seen
        own = factor * self._term(x.shape[1])
        if self.other_act is None:
            return loss(x, y, own + more, activation=activation, ignore_label=ignore_label)
        own_value = loss(x, y, own, activation="none", ignore_label=ignore_label)
        activation = "softmax" if input.shape[1] > 1 else "sigmoid"
        return own_value + loss(input, y, more, activation=activation, ignore_label=ignore_label)


class MaskedDiceLoss(DiceLoss):
    """`DiceLoss` of the voxels where `mask` is 1.

    The mask is (B, 1, *) or (1, 1, *), of any dtype; other than of a bool one its values are looked
    at. Labels are copied, in their own dtype, to ignore those where it is 0. With `to_onehot_y`
    MONAI gives these the label 0 instead, voxels of the background that nothing found; here they do
    not count.

    Raises NotImplementedError for masks with other values than 0 and 1, and as `DiceLoss` does.
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
    ) -> None:
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            squared_pred,
            jaccard,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            weight,
            soft_label,
        )

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *), (B, 1, *) or (B, C, *), and (B, 1, *) or (1, 1, *) -> the loss."""
        seen = self._read(input, target)
        if mask is None:
            warnings.warn("No mask value specified: all voxels count", stacklevel=2)
            return self._loss(seen)
        shapes = f"{tuple(input.shape)} and that of mask, {tuple(mask.shape)}"
        if mask.ndim != input.ndim:
            warnings.warn(f"Dim of input, {shapes}, differ", stacklevel=2)
        if mask.shape[0] not in (1, input.shape[0]):
            raise ValueError(f"Batch size of mask must be 1 or input's, got {shapes}")
        if mask.shape[1] != 1:
            raise ValueError(f"mask must have only one channel, got {tuple(mask.shape)}")
        if mask.shape[2:] != input.shape[2:]:
            warnings.warn(f"Spatial size of input, {shapes}, differ", stacklevel=2)
        if mask.requires_grad:
            raise _refusal("mask that requires grad", "detach it")
        counted = mask.bool()
        if mask.dtype != torch.bool and not torch.equal(counted.to(mask), mask):
            raise _refusal("mask with values other than 0 and 1", "threshold it")
        counted = counted.expand(len(input), 1, *input.shape[2:])
        y, label = _shared.masked(seen.y, counted, input.shape[1])
        return self._loss(seen._replace(y=y, ignore_label=label))


class GeneralizedDiceLoss(_Overlap):
    """1 - (2 sum_c w_c I_c + smooth_nr) / (sum_c w_c (P_c + Y_c) + smooth_dr), where w is 1 / Y^2,
    1 / Y or 1 (`w_type` "square", "simple", "uniform").

    A class that no label has takes the largest w of its sample's others. With "square" and large
    structures w is so small that smooth_nr and smooth_dr outweigh the sums, and the loss tends to 0
    whatever is predicted, as in MONAI. Reduction "none" gives (B, 1, ..), of a batch one axis less.

    Raises NotImplementedError for `soft_label` as `DiceLoss` does.
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
    ) -> None:
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
        )
        self.w_type = _one_of(w_type, "w_type", ("square", "simple", "uniform"))

    def _term(self, classes: int) -> losses.Term:
        return losses.GeneralizedDice(
            weighting=self.w_type,
            smooth=(self.smooth_nr, self.smooth_dr),
            pool="all" if self.batch else "classes",
            reduction="sum" if self.batch else self.reduction,
            ignore_channel=-1 if self._kept(classes) == classes else 0,
        )

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return value.reshape(*value.shape, *[1] * (ndim - 1))


class TverskyLoss(_Overlap):
    """1 - (I + smooth_nr) / (I + alpha (P - I) + beta (Y - I) + smooth_dr): `alpha` weighs false
    positives, `beta` false negatives.

    Reduction "none" gives (B, K), of a batch (K,), 0 for a class that is ignored.

    Raises NotImplementedError for `soft_label` and `ignore_index` as `DiceLoss` does.
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
    ) -> None:
        super().__init__(
            include_background,
            to_onehot_y,
            sigmoid,
            softmax,
            other_act,
            reduction,
            smooth_nr,
            smooth_dr,
            batch,
            soft_label,
            ignore_index,
        )
        self.alpha = alpha
        self.beta = beta

    def _term(self, classes: int) -> losses.Term:
        return losses.Tversky(
            alpha=self.alpha,
            beta=self.beta,
            smooth=(self.smooth_nr, self.smooth_dr),
            **self._average(classes),
        )

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return self._of_classes(value)


class DiceCELoss(torch.nn.Module):
    """lambda_dice `DiceLoss` + lambda_ce cross-entropy of the logits, of all classes.

    The cross-entropy is torch's: its mean is divided by the sum of the voxels' weights, of a dense
    target by their number. Of a single channel it is the binary one, with `weight`, one number, as
    pos_weight and without label_smoothing. `weight`, a tensor of C numbers, is for both losses;
    without background the Dice loss has its last C - 1.

    Raises NotImplementedError as `DiceLoss` does, and for several weights of a single channel. With
    `other_act` the Dice loss and the cross-entropy take a pass each.
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
    ) -> None:
        super().__init__()
        reduction = _one_of(reduction, "reduction", ("mean", "sum"))
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
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
        )
        # These hold their settings, under MONAI's names, and are not called.
        self.cross_entropy = torch.nn.CrossEntropyLoss(
            weight, reduction=reduction, label_smoothing=label_smoothing
        )
        self.binary_cross_entropy = torch.nn.BCEWithLogitsLoss(
            reduction=reduction, pos_weight=weight
        )
        self.reduction = "mean"  # whatever it is, as in MONAI
        self.lambda_dice = _factor(lambda_dice, "lambda_dice")
        self.lambda_ce = _factor(lambda_ce, "lambda_ce")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        _check_channels(input, target)
        seen = self.dice._read(input, target)
        entropy = self._entropy(input.shape[1], target.shape[1])
        return self.dice._plus(self.lambda_ce * entropy, self.lambda_dice, seen, input)

    def _entropy(self, classes: int, channels: int) -> losses.Term:
        """For a target of so many channels."""
        settings, binary = self.cross_entropy, self.binary_cross_entropy
        mean = settings.reduction == "mean"
        if classes > 1:
            divisor = "weights" if channels == 1 else "voxels"
            return losses.CrossEntropy(
                weight=settings.weight,
                label_smoothing=settings.label_smoothing,
                reduction=settings.reduction,
                divisor=divisor if mean else "one",
            )
        weight = binary.pos_weight
        if weight is not None and weight.numel() != 1:
            raise _refusal("weight of several numbers for a single channel", "give one number")
        return losses.BinaryCrossEntropy(
            pos_weight=None if weight is None else weight.reshape(1),
            reduction=binary.reduction,
            divisor="voxels" if mean else "one",
        )


class _FocalSettings(torch.nn.Module):
    """What the focal loss is given, under MONAI's names."""

    class_weight: Tensor | None

    def __init__(self, gamma: float, weight: Weight | None, alpha: Any) -> None:
        super().__init__()
        self.gamma = gamma
        one = alpha is None or isinstance(alpha, (int, float))
        self.alpha: Any = alpha if one else torch.as_tensor(alpha)
        self.register_buffer("class_weight", _weight(weight))


class DiceFocalLoss(torch.nn.Module):
    """lambda_dice `DiceLoss` + lambda_focal focal loss of each channel's sigmoid.

    The focal loss, mean w (a+ B+ + a- B-) of (1 - s)^gamma (-log s) over a class's voxels and
    s^gamma (-log(1 - s)) over the others, is that of the sigmoid even with `softmax`. `alpha` gives
    (a+, a-) = (alpha, 1 - alpha), one number for each class (alpha, 1). Reduction "sum" sums over
    samples and classes, and is the mean over voxels still.

    Raises NotImplementedError as `DiceLoss` does, for reduction "none", and for targets between 0
    and 1 unless gamma is 0 and alpha None. With `other_act` both losses take a pass each.
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
    ) -> None:
        super().__init__()
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
            weight=weight,
        )
        if self.dice.reduction == "none":
            raise _refusal('reduction="none", a loss of each voxel,', 'use "mean" or "sum"')
        self.focal = _FocalSettings(gamma, weight, alpha)
        self.reduction = "mean"  # whatever it is, as in MONAI
        self.to_onehot_y = to_onehot_y
        self.lambda_dice = _factor(lambda_dice, "lambda_dice")
        self.lambda_focal = _factor(lambda_focal, "lambda_focal")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(B, C, *) and (B, 1, *) or (B, C, *) -> the loss."""
        _check_channels(input, target)
        seen = self.dice._read(input, target)
        focal = self.focal
        dense = target.shape[1] == input.shape[1]
        if dense and (focal.gamma or focal.alpha is not None) and _shared.soft(target):
            name = "gamma" if focal.gamma else "alpha"
            raise _refusal(f"{name} with targets between 0 and 1", "use gamma=0, alpha=None")
        kept = self.dice._kept(input.shape[1])
        factor = self.lambda_focal * (kept if self.dice.reduction == "sum" else 1)
        term = factor * self._focal(kept, input.shape[1])
        return self.dice._plus(term, self.lambda_dice, seen, input)

    def _focal(self, kept: int, classes: int) -> losses.Term:
        """Its mean over voxels and classes, and mean or sum over samples."""
        weight, alpha = self.focal.class_weight, self.focal.alpha
        if weight is not None and weight.ndim and kept == 1:
            raise ValueError("Per-class weight is not supported for a single class: give a number")
        of_class = isinstance(alpha, Tensor)
        reduction = self.dice.reduction
        return losses.SigmoidFocal(
            gamma=self.focal.gamma,
            alpha=None if of_class else alpha,
            pos_weight=_of_all(alpha, kept, classes, "alpha") if of_class else None,
            weight=None if weight is None else _of_all(weight, kept, classes),
            pool="batch" if reduction == "mean" else "none",
            reduction=reduction,
            ignore_channel=-1 if kept == classes else 0,
        )


def _one_of(value: Any, name: str, allowed: Sequence[str]) -> str:
    """A string, or the one that an enumeration's member stands for."""
    value = getattr(value, "value", value)
    spec.one_of(value, name, allowed)
    return str(value)


def _factor(value: float, name: str) -> float:
    if value < 0.0:
        raise ValueError(f"{name} should be no less than 0.0, got {value}")
    return value


def _weight(weight: Weight | None) -> Tensor | None:
    """As a tensor of numbers >= 0."""
    if weight is None:
        return None
    weight = torch.as_tensor(weight)
    if bool((weight < 0).any()):
        raise ValueError(f"the values of `weight` should be no less than 0, got {weight.tolist()}")
    return weight


def _of_all(weight: Tensor, kept: int, classes: int, name: str = "weight") -> Tensor:
    """(C,) of one number, or of one for each class that is kept: 0 for the background else."""
    if weight.ndim == 0:
        weight = weight.expand(kept)
    elif len(weight) != kept:
        raise ValueError(
            f"The length of {name} should be the number of classes, {kept}, without the background "
            f"if include_background=False; got {len(weight)}"
        )
    return torch.nn.functional.pad(weight.double(), (classes - kept, 0))


def _check_shapes(x: Tensor, target: Tensor, labels: bool) -> None:
    """Raises AssertionError, as MONAI does, where the target does not fit the scores."""
    if x.ndim < 3:
        raise _refusal(f"input of shape {tuple(x.shape)}, without spatial axes,", "give it one")
    if labels and (target.ndim < 2 or target.shape[1] != 1):
        raise AssertionError(
            f"labels should have a channel with length equal to one, got {tuple(target.shape)}"
        )
    wanted = (x.shape[0], 1 if labels else x.shape[1], *x.shape[2:])
    if target.shape != wanted:
        raise AssertionError(
            f"ground truth has different shape {tuple(target.shape)} from input, "
            f"{tuple(x.shape)}: {wanted} is needed"
        )


def _check_channels(input: Tensor, target: Tensor) -> None:
    """Raises ValueError, as MONAI's compounds do, where the target has neither 1 channel nor C."""
    shapes = f"got shape {tuple(input.shape)} and {tuple(target.shape)}"
    if input.ndim != target.ndim:
        raise ValueError(f"the number of dimensions of input and target should be one, {shapes}")
    if target.shape[1] not in (1, input.shape[1]):
        raise ValueError(f"the number of channels for target is neither 1 nor input's, {shapes}")


def _refusal(what: str, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} is not computed in one pass over the voxels: {instead}, or use monai.losses"
    )
