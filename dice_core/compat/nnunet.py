"""nnU-Net's losses by its names and arguments, one pass over the logits and their gradient alone.

In place of `nnunetv2.training.loss.dice` and `.compound_losses`; for training with them there is
`nnUNetTrainerDiceCore`, which needs nnunetv2 and is made when it is asked for. A .py file holding

    from dice_core.compat.nnunet import nnUNetTrainerDiceCore

in a folder of nnUNet_extTrainer lets `nnUNetv2_train ... -tr nnUNetTrainerDiceCore` find it.

Values and gradients are nnU-Net's, with these differences:

- Sums are added in float64, not float32. The loss is float64 for float64 logits, else float32.
- Labels (N, *) or (N, 1, *) of any dtype and targets (N, C, *) with values in [0, 1] must have the
  logits' spatial shape. Labels that are no class, and what else does not fit, raise ValueError; on
  a GPU such labels make the loss NaN, as everywhere in dice_core.
- A cross-entropy of no voxels is 0, never NaN. The result is a tensor always. No argument is
  written to.
- In DC_and_CE_loss both terms take a one-hot target for the labels that it encodes.
- The softmax of a single channel, and do_bg=False of one, raise ValueError: nothing is left.

NotImplementedError, naming the argument, stands for what is no function of sums over voxels: maps
of losses (reduction="none"), masks with values between 0 and 1 or several channels, weights of
single voxels, and for targets that require grad.

`apply_nonlin` is part of the pass if it is None, torch.sigmoid, nn.Sigmoid(), nn.Softmax(1),
partial(torch.softmax, dim=1) or nnU-Net's softmax_helper_dim1; what another callable returns is of
image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import losses, spec
from ..torch import loss, statistics
from . import _shared

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "MemoryEfficientSoftDiceLoss",
    "SoftDiceLoss",
    "trainer",
]


class MemoryEfficientSoftDiceLoss(nn.Module):
    """-mean (2 I + smooth) / max(P + Y + smooth, 1e-8) over samples and classes.

    With batch_dice the sums of all samples, with ddp of all ranks too, are added first. do_bg=False
    leaves out class 0. loss_mask, (N, 1, *) of 0 and 1, tells which voxels count.
    """

    clip_tp: float | None = None

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__()
        self.apply_nonlin = apply_nonlin
        self.batch_dice = batch_dice
        self.do_bg = do_bg
        self.smooth = smooth
        self.ddp = ddp

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Logits (N, C, *), labels or a target like x, and a mask -> the loss."""
        x, activation = _scores(x, self.apply_nonlin)
        y, masked = _counted(_target(x, y), loss_mask, x.shape[1])
        parts = [(1.0, _term(self, x.shape[1]))]
        return _evaluate(x, y, parts, self.ddp, ignore_label=masked, activation=activation)


class SoftDiceLoss(MemoryEfficientSoftDiceLoss):
    """`MemoryEfficientSoftDiceLoss`; I is at least clip_tp, with P - I and Y - I as they are."""

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
    ) -> None:
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp)
        self.clip_tp = clip_tp


class DC_and_CE_loss(nn.Module):
    """weight_ce CE + weight_dice Dice of the softmax, in one pass.

    CE is torch.nn.CrossEntropyLoss(**ce_kwargs), reduction "mean" or "sum"; Dice is
    dice_class(**soft_dice_kwargs). Voxels labelled ignore_label count in neither; those labelled
    ce_kwargs' ignore_index are left out of CE alone. A part of weight 0 is not computed.
    """

    def __init__(
        self,
        soft_dice_kwargs: Mapping[str, Any],
        ce_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: Callable[..., nn.Module] = SoftDiceLoss,
    ) -> None:
        super().__init__()
        if ignore_label is not None:  # nnU-Net writes it into the caller's ce_kwargs
            ce_kwargs = {**ce_kwargs, "ignore_index": ignore_label}
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.ignore_label = ignore_label
        self.ce = nn.CrossEntropyLoss(**ce_kwargs)
        self.dc = _dice_class(dice_class)(apply_nonlin=nn.Softmax(1), **soft_dice_kwargs)
        _check_reduction(self.ce, "ce_kwargs")

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, *) and labels (N, 1, *) -> the loss."""
        if self.ignore_label is not None and target.shape[1] != 1:
            raise AssertionError(
                f"with an ignore_label target must be labels (N, 1, *), got {tuple(target.shape)}"
            )
        x, activation = _scores(net_output, self.dc.apply_nonlin)
        y = _target(x, target)
        ignored, weight = self.ignore_label, self.ce.weight
        if ignored is None and self.weight_ce:
            if not self.weight_dice and y.shape != x.shape:
                ignored = self.ce.ignore_index
            else:
                weight = self._weight(x.shape[1])
        parts: list[tuple[float, losses.Term]] = []
        # nnU-Net returns the int 0 if both weights are 0.
        if self.weight_dice or not self.weight_ce:
            parts.append((self.weight_dice, _term(self.dc, x.shape[1])))
        if self.weight_ce:
            divisor = "weights" if self.ce.reduction == "mean" else "one"
            smoothing = self.ce.label_smoothing
            entropy = losses.CrossEntropy(
                weight=weight, label_smoothing=smoothing, divisor=divisor, pool="batch"
            )
            parts.append((self.weight_ce, entropy))
        return _evaluate(x, y, parts, self.dc.ddp, ignore_label=ignored, activation=activation)

    def _weight(self, classes: int) -> Tensor | None:
        """CE's weights, 0 for a class that CE alone ignores."""
        weight, index = self.ce.weight, self.ce.ignore_index
        if not 0 <= index < classes:
            return weight
        if self.ce.label_smoothing:
            raise NotImplementedError(
                "ce_kwargs: a class as ignore_index together with label_smoothing; "
                "ignore_label ignores it in both parts"
            )
        weight = torch.ones(classes) if weight is None else weight.clone()
        weight[index] = 0
        return weight


class DC_and_BCE_loss(nn.Module):
    """weight_ce BCE + weight_dice Dice of each channel's sigmoid, in one pass.

    BCE is torch.nn.BCEWithLogitsLoss(**bce_kwargs), weight and pos_weight one number per class,
    (C, 1, ...); Dice is dice_class(**soft_dice_kwargs). With use_ignore_label the target has a last
    channel more, whose voxels count in neither, and BCE is the sum over the classes of the mean
    over the voxels, C times the mean that it is without.
    """

    def __init__(
        self,
        bce_kwargs: Mapping[str, Any],
        soft_dice_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: Callable[..., nn.Module] = MemoryEfficientSoftDiceLoss,
    ) -> None:
        super().__init__()
        if use_ignore_label:  # nnU-Net writes "none" into the caller's bce_kwargs
            bce_kwargs = {**bce_kwargs, "reduction": "mean"}
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.use_ignore_label = use_ignore_label
        self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
        self.dc = _dice_class(dice_class)(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)
        _check_reduction(self.ce, "bce_kwargs")

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, *) and a target like them, or with a channel more -> the loss."""
        mask, factor = None, self.weight_ce
        if self.use_ignore_label:
            target, mask = target[:, :-1], target[:, -1:] != 1
            factor = factor * net_output.shape[1]
        if target.shape != net_output.shape:
            raise ValueError(
                f"target must have shape {tuple(net_output.shape)}, and with use_ignore_label a "
                f"channel more, got {tuple(target.shape)} without it"
            )
        x, activation = _scores(net_output, self.dc.apply_nonlin)
        y, masked = _counted(_target(x, target), mask, x.shape[1])
        entropy = losses.BinaryCrossEntropy(
            weight=_per_class(self.ce.weight, x, "weight"),
            pos_weight=_per_class(self.ce.pos_weight, x, "pos_weight"),
            divisor="voxels" if self.ce.reduction == "mean" else "one",
            pool="batch",
        )
        parts = [(self.weight_dice, _term(self.dc, x.shape[1])), (factor, entropy)]
        return _evaluate(x, y, parts, self.dc.ddp, ignore_label=masked, activation=activation)


@functools.cache
def trainer() -> type:
    """nnUNetTrainerDiceCore: nnUNetTrainer with the losses of this module, never compiled.

    Its settings, and deep supervision's weights, are what nnU-Net chooses. Raises ImportError if
    nnunetv2 cannot be imported.
    """
    try:
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    except ImportError as error:
        raise ImportError(
            f"nnUNetTrainerDiceCore is a trainer of nnU-Net, which cannot be imported ({error}); "
            f"pip install nnunetv2"
        ) from error

    class nnUNetTrainerDiceCore(nnUNetTrainer):  # type: ignore[misc]
        """nnUNetTrainer with dice_core's losses."""

        def _build_loss(self) -> nn.Module:
            built = super()._build_loss()
            if not isinstance(built, DeepSupervisionWrapper):
                return self._fused_loss()
            built.loss = self._fused_loss()
            if not all(map(math.isfinite, built.weight_factors)):  # nnU-Net's, of a single scale
                built.weight_factors = (1.0,) * len(built.weight_factors)
            return built

        def _fused_loss(self) -> nn.Module:
            labels = self.label_manager
            ignored = labels.ignore_label
            settings = {
                "batch_dice": self.configuration_manager.batch_dice,
                "do_bg": labels.has_regions,
                "smooth": 1e-5,
                "ddp": self.is_ddp,
            }
            if labels.has_regions:
                return DC_and_BCE_loss({}, settings, use_ignore_label=ignored is not None)
            return DC_and_CE_loss(
                settings, {}, ignore_label=ignored, dice_class=MemoryEfficientSoftDiceLoss
            )

    nnUNetTrainerDiceCore.__module__ = __name__
    nnUNetTrainerDiceCore.__qualname__ = nnUNetTrainerDiceCore.__name__
    return nnUNetTrainerDiceCore


def __getattr__(name: str) -> Any:
    if name == "nnUNetTrainerDiceCore":
        return trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Arguments


def _dice_class(dice_class: Any) -> Any:
    """One of this module's; nnU-Net's own stand for them."""
    ours = {each.__name__: each for each in (MemoryEfficientSoftDiceLoss, SoftDiceLoss)}
    name = getattr(dice_class, "__name__", "")
    if getattr(dice_class, "__module__", None) == "nnunetv2.training.loss.dice":
        dice_class = ours.get(name, dice_class)
    if dice_class not in ours.values():
        raise NotImplementedError(
            f"dice_class must be one of {', '.join(ours)}, got {name or dice_class!r}"
        )
    return dice_class


def _check_reduction(entropy: Any, name: str) -> None:
    if entropy.reduction not in ("mean", "sum"):
        raise NotImplementedError(
            f"{name}: reduction must be 'mean' or 'sum', got {entropy.reduction!r}"
        )


_SIGMOIDS = (torch.sigmoid, torch.special.expit, nn.functional.sigmoid, Tensor.sigmoid)
_SOFTMAXES = (torch.softmax, torch.special.softmax, nn.functional.softmax, Tensor.softmax)


def _scores(x: Tensor, nonlin: Any) -> tuple[Tensor, str]:
    """What to read, and the activation that makes scores of it."""
    if nonlin is None:
        return x, "none"
    if type(nonlin) is nn.Sigmoid or nonlin in _SIGMOIDS:
        return x, "sigmoid"
    partial = isinstance(nonlin, functools.partial) and nonlin.func in _SOFTMAXES
    if (
        (type(nonlin) is nn.Softmax and nonlin.dim == 1)
        or (partial and not nonlin.args and nonlin.keywords == {"dim": 1})
        or getattr(nonlin, "__name__", None) == "softmax_helper_dim1"
    ):
        if x.shape[1] == 1:
            raise ValueError("the softmax of a single channel is 1 everywhere; it has a sigmoid")
        return x, "softmax"
    return nonlin(x), "none"


def _target(x: Tensor, y: Tensor) -> Tensor:
    """With an axis for channels, and labels as integers."""
    if y.requires_grad:
        raise NotImplementedError("the target requires grad, and dice_core has none for it")
    if y.ndim == x.ndim - 1:
        y = y.unsqueeze(1)
    return y if y.shape == x.shape else _shared.class_labels(y)


def _counted(y: Tensor, mask: Tensor | None, classes: int) -> tuple[Tensor, int | None]:
    """y with an ignored label where the mask is 0, and that label."""
    if mask is None:
        return y, None
    if mask.ndim != y.ndim or mask.shape[1] != 1:
        raise NotImplementedError(
            f"loss_mask must have shape (N, 1, *), got {tuple(mask.shape)} for a target of "
            f"{tuple(y.shape)}"
        )
    if mask.requires_grad:
        raise NotImplementedError("loss_mask requires grad, and dice_core has none for it")
    if mask.dtype != torch.bool:
        if ((mask != 0) & (mask != 1)).any():
            raise NotImplementedError("loss_mask must hold 0 and 1 only")
        mask = mask != 0
    return _shared.masked(y, mask, classes)


def _per_class(weight: Tensor | None, x: Tensor, name: str) -> Tensor | None:
    """(C,) of what broadcasts to x, if it has one number per class."""
    if weight is None:
        return None
    shape = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
    if len(shape) != x.ndim or shape != (1, shape[1]) + (1,) * (x.ndim - 2):
        raise NotImplementedError(
            f"bce_kwargs: {name} must be one number per class, of shape "
            f"{(x.shape[1],) + (1,) * (x.ndim - 2)}, got {tuple(weight.shape)}"
        )
    return weight.reshape(-1).expand(x.shape[1])


# Terms


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _SoftDice(losses.Dice):
    """-q of Dice's score q, I being at least `clip` and P - I and Y - I as they are."""

    clip: float | None = None

    def _penalty(self, loss: Any) -> Any:
        return loss - 1

    def _ratio(self, pooled: losses.Sums) -> tuple[Any, Any]:
        if self.clip is not None:
            i, p, y = pooled[:3]
            more = i.clip(self.clip, None) - i
            pooled = losses.Sums(i + more, p + more, y + more)
        return super()._ratio(pooled)

    def _ratio_slopes(self, pooled: losses.Sums, loss: Any, den: Any, share: Any) -> Any:
        slopes = super()._ratio_slopes(pooled, loss, den, share)
        if self.clip is not None:
            clipped = pooled.intersection < self.clip
            slopes[0] = np.where(clipped, -slopes[1] - slopes[2], slopes[0])
        return slopes


def _term(dice: Any, classes: int) -> _SoftDice:
    """Of a Dice module's settings."""
    if not dice.do_bg and classes == 1:
        raise ValueError("do_bg=False leaves no class of a single channel")
    return _SoftDice(
        smooth=dice.smooth,
        floor=1e-8,
        pool="batch" if dice.batch_dice else "none",
        ignore_channel=-1 if dice.do_bg else 0,
        divisor="kept",
        clip=dice.clip_tp,
    )


# Evaluation

_Parts = Sequence[tuple[float, losses.Term]]


def _evaluate(x: Tensor, y: Tensor, parts: _Parts, ddp: bool, **options: Any) -> Tensor:
    """The sum of factors times terms; with ddp, Dice that pools takes the sums of all ranks."""
    term = losses.Sum(tuple(parts))
    of_ranks = [ddp and part.pool == "batch" and isinstance(part, _SoftDice) for _, part in parts]
    if not any(of_ranks):
        return loss(x, y, term, **options)
    needs = {spec.OPTIONS[field]: value for field, value in term.needs.items()}
    sums = losses.Sums(**statistics(x, y, **needs, **options)._asdict())
    term = term.with_weights(lambda weight: torch.as_tensor(weight).to(x.device, torch.float64))
    term.check(x.shape[1])
    added = torch.stack(sums[:3]).sum(1, keepdim=True)
    pooled = losses.Sums(*_SumOfRanks.apply(added))  # type: ignore[no-untyped-call]
    values = [
        factor * part.value(pooled if ranks else sums)
        for (factor, part), ranks in zip(term.parts, of_ranks, strict=True)
    ]
    value: Tensor = torch.stack(values).sum()
    return value if x.dtype == torch.float64 else value.float()


class _SumOfRanks(torch.autograd.Function):
    """Added over the processes of the default group; so is the gradient, of every rank's loss."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor) -> Tensor:
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad
