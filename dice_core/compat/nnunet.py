"""Drop-in replacements for nnU-Net's losses: one pass over the logits and one for their gradient,
which is the only array of their size.

They replace those of `nnunetv2.training.loss.dice` and `.compound_losses`. For training with them
there is `nnUNetTrainerDiceCore`, which needs nnunetv2 and is created on first access. A .py file
holding ::

    from dice_core.compat.nnunet import nnUNetTrainerDiceCore

in a folder of nnUNet_extTrainer (nnU-Net 2.8.0 and later; before, in its own folder
nnunetv2/training/nnUNetTrainer/variants) lets `nnUNetv2_train ... -tr nnUNetTrainerDiceCore` find
it, and `nnUNetv2_predict` too, which also needs it.

Values and gradients are those of nnU-Net 2.8, including its 0/0. The differences:

- Sums are added in float64, not float32, and half-precision logits are computed in float32. The
  loss is float64 for float64 logits, else float32.
- Out-of-range labels, and soft targets outside [0, 1], raise ValueError; on a GPU they make the
  loss NaN. So do voxels whose loss_mask is neither 0 nor 1, which are treated as labelled -1.
  Floating-point labels are truncated before they are compared with ignore_label.
- Logits of ignored voxels have no effect, not even NaN, which nnU-Net multiplies by 0.
- There are no second derivatives, and no gradients for targets and masks: if they require grad they
  raise NotImplementedError.
- DC_and_CE_loss without a Dice part returns a tensor 0, not the int 0, if all voxels are ignored.
- The compound losses also take the output of a `dice_core.torch.LinearHead`, without ever holding
  the logits; nnUNetTrainerDiceCoreFusedHead gives the networks of nnU-Net such heads.
- backend, num_threads, check_labels and inplace, all by keyword, are those of
  `dice_core.torch.loss`; inplace has no effect where apply_nonlin, or a second pass, needs memory
  of the size of the logits.

An error naming the argument is raised for anything that is not a function of sums over voxels: loss
maps (reduction="none"), masks of several channels, weights of individual voxels, other Dice
classes. The same holds for a target whose spatial shape differs from the logits', for a one-hot
target of DC_and_CE_loss, whose first channel nnU-Net's cross-entropy would read as labels, for
do_bg=False with a single channel, whose loss would be NaN, for a negative smooth, and for flags
other than True and False.

`apply_nonlin` is part of the pass if it is None, torch.sigmoid, nn.Sigmoid(), nn.Softmax(1),
partial(torch.softmax, dim=1) or softmax_helper_dim1, nnU-Net's or this module's. The output of any
other callable, and the softmax of a single channel, take memory of the size of the logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, losses
from ..losses.penalties import NegativeScore, Penalty
from ..losses.terms import namespace
from ..spec import ACTIVATIONS, Spec
from ..sums import Statistics
from ..torch import linear, operators
from ..torch.functional import Options, evaluate, of_sums, options
from ..torch.functional import sums as sums_of
from . import _shared

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "MemoryEfficientSoftDiceLoss",
    "SoftDiceLoss",
    "softmax_helper_dim1",
    "trainer",
]


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """The softmax over channels."""
    return torch.softmax(x, 1)


class _DiceLoss(nn.Module):
    """-q; settings are prepared on construction, and again after one was changed."""

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None,
        batch_dice: bool,
        do_bg: bool,
        smooth: float,
        ddp: bool,
        clip_tp: float | None,
        options: Options,
    ) -> None:
        super().__init__()
        _shared.check_callable(apply_nonlin, "apply_nonlin")
        self.do_bg = checks.flag(do_bg, "do_bg")
        self.batch_dice = checks.flag(batch_dice, "batch_dice")
        self.apply_nonlin = apply_nonlin
        self.smooth = smooth
        self.clip_tp = clip_tp
        self.ddp = checks.flag(ddp, "ddp")
        self._options = options
        self._prepare(self._settings())

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Parameters
        ----------
        x : (N, C, *) floating-point tensor
            The input of apply_nonlin, which makes it probabilities.
        y : tensor
            Labels (N, *) or (N, 1, *) of any dtype, or one-hot or soft targets of x's shape.
        loss_mask : (N, 1, *) tensor, optional
            1 for valid voxels, 0 for ignored ones.
        """
        settings = self._settings()
        if settings != self._prepared:
            self._prepare(settings)
        _shared.check_tensors(x, y, "x", "y")
        logits, options = x, self._options
        x, activation = _probabilities(logits, self.apply_nonlin)
        if x is not logits:
            options = options._replace(inplace=False)  # apply_nonlin may have saved its output
        y, targets = _targets(x, y, "y")
        _check_channels(self, x)
        ignored = None
        if loss_mask is not None:
            _shared.check_mask(loss_mask, x, "loss_mask", "x")
            y, ignored = _masked(y, loss_mask, x.shape[1])
        term, requests = self._plan
        pooled = self.ddp and self.batch_dice
        return _evaluate(x, y, term, requests[activation, ignored, targets], pooled, options)

    def _settings(self) -> tuple[Any, ...]:
        """The settings from which the term is derived."""
        return self.batch_dice, self.do_bg, self.smooth, self.clip_tp

    def _prepare(self, settings: tuple[Any, ...]) -> None:
        self._prepared: tuple[Any, ...] = ()
        self._plan = _planned(_dice(*settings), (None, *_shared.MASK_LABELS))
        self._prepared = settings


class MemoryEfficientSoftDiceLoss(_DiceLoss):
    """-mean (2 I + smooth) / max(P + Y + smooth, 1e-8) over samples and classes, where I = sum s t,
    P = sum s and Y = sum t are sums over voxels of probabilities s and targets t.

    Parameters
    ----------
    apply_nonlin : callable, optional
        Makes probabilities of the logits; None if they are probabilities already.
    batch_dice : bool
        The sums of all samples are added first.
    do_bg : bool
        False excludes class 0.
    smooth : float
        Added to numerator and denominator, >= 0.
    ddp : bool
        With batch_dice the sums of all ranks are added too, which needs a process group.
    backend, num_threads, check_labels, inplace : optional
        As in `dice_core.torch.loss`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        For invalid arguments; the module's docstring lists the differences from nnU-Net.
    """

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        given = options(backend, num_threads, check_labels, inplace)
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp, None, given)


class SoftDiceLoss(_DiceLoss):
    """`MemoryEfficientSoftDiceLoss`, with P + Y = 2 I + (P - I) + (Y - I) and I raised to clip_tp.

    Parameters
    ----------
    clip_tp : float, optional
        The lower bound of I, in numerator and denominator; P - I and Y - I are unchanged. Where I
        is clipped it has no derivative.

    The other parameters, and the errors, are those of `MemoryEfficientSoftDiceLoss`.
    """

    def __init__(
        self,
        apply_nonlin: Callable[[Tensor], Tensor] | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        given = options(backend, num_threads, check_labels, inplace)
        super().__init__(apply_nonlin, batch_dice, do_bg, smooth, ddp, clip_tp, given)


class DC_and_CE_loss(nn.Module):
    """weight_ce CE + weight_dice Dice of the softmax, in one pass over the voxels.

    CE is `torch.nn.CrossEntropyLoss` of the labels, Dice this module's loss of them.

    Parameters
    ----------
    soft_dice_kwargs : dict
        The arguments of dice_class but apply_nonlin, which is the softmax.
    ce_kwargs : dict
        The arguments of torch.nn.CrossEntropyLoss; reduction is "mean" or "sum". ignore_label is
        written into it as its ignore_index, as nnU-Net does. An ignore_index given here applies to
        CE only; if it is one of the classes, CE is computed in a second pass.
    weight_ce, weight_dice : float
        The factors. A part with factor 0 is not computed; if both are 0 the loss is the number 0,
        not a tensor.
    ignore_label : int, optional
        Voxels with this label are ignored in both parts. If no voxel is valid, CE is 0; without
        an ignore_label a mean over no voxels is NaN.
    dice_class : class
        SoftDiceLoss or MemoryEfficientSoftDiceLoss; nnU-Net's are replaced by this module's.
    backend, num_threads, check_labels, inplace : optional
        As in `dice_core.torch.loss`.

    Raises
    ------
    AssertionError, TypeError, ValueError, NotImplementedError
        For invalid arguments; the module's docstring lists the differences from nnU-Net.
    """

    def __init__(
        self,
        soft_dice_kwargs: Mapping[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: Callable[..., nn.Module] = SoftDiceLoss,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_mapping(ce_kwargs, "ce_kwargs")
        _check_mapping(soft_dice_kwargs, "soft_dice_kwargs")
        if ignore_label is not None:
            ce_kwargs["ignore_index"] = ignore_label
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.ignore_label = ignore_label
        self.ce = nn.CrossEntropyLoss(**ce_kwargs)
        self.dc = _dice_class(dice_class)(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs)
        self._options = options(backend, num_threads, check_labels, inplace)
        self._prepare(self._settings(self.dc, self.ce), self.ce.weight)

    def forward(self, net_output: Any, target: Tensor) -> Tensor | float:
        """The loss, a scalar.

        Parameters
        ----------
        net_output : (N, C, *) floating-point tensor
            Logits; or what a `dice_core.torch.LinearHead` returns in training.
        target : (N, 1, *) tensor
            Labels of any dtype. With weight_ce = 0, any target that dice_class accepts.
        """
        if self.weight_ce == 0 and self.weight_dice == 0:
            return self.weight_ce * 0 + self.weight_dice * 0
        net_output = _logits(net_output, target)
        dice, entropy = self.dc, self.ce
        settings, weight = self._settings(dice, entropy), entropy.weight
        if settings != self._prepared:
            self._prepare(settings, weight)
        x, ignored, index = net_output, self.ignore_label, entropy.ignore_index
        if ignored is not None and target.shape[1:2] != (1,):
            raise AssertionError(
                f"with an ignore_label target must be labels (N, 1, *), got {tuple(target.shape)}"
            )
        y, targets = _targets(x, target, "target")
        # One entry per pass: input, plan, activation, ignored label, whether ranks are pooled.
        parts: list[tuple[Tensor, _Plan, str, int | None, bool]] = []
        of_dice, of_entropy, of_both = self._plans
        if self.weight_dice != 0:
            _check_channels(dice, x)
            scores, activation = _probabilities(x, dice.apply_nonlin)
            pooled = dice.ddp and dice.batch_dice
            parts.append((scores, of_dice, activation, ignored, pooled))
        if self.weight_ce != 0:
            if x.shape[1] == 1:
                raise ValueError(
                    f"net_output must have at least two channels, got {tuple(x.shape)}"
                )
            if targets != "labels" or target.ndim != x.ndim:
                raise ValueError(
                    f"target must be labels {(x.shape[0], 1, *x.shape[2:])}, "
                    f"got {tuple(target.shape)}"
                )
            # One pass computes both, unless CE has another input or ignores a class of Dice.
            one_pass = index == ignored or (ignored is None and not 0 <= index < x.shape[1])
            if parts and scores is x and one_pass:
                parts[0] = x, of_both, activation, ignored, pooled
            else:
                parts.append((x, of_entropy, "softmax", index, False))
        values, options = [], self._options
        if len(parts) > 1 or parts[0][0] is not net_output:
            options = options._replace(inplace=False)
        for x, (term, requests), activation, ignored, pooled in parts:
            if term.weights and term.weights[0] is not weight:  # moved to a device, for example
                term = term.with_weights([weight])
            request = requests[activation, ignored, targets]
            values.append(_evaluate(x, y, term, request, pooled, options))
        return values[0] if len(values) == 1 else values[0] + values[1]

    def _settings(self, dice: Any, entropy: nn.CrossEntropyLoss) -> tuple[Any, ...]:
        """The settings from which terms and requests are derived."""
        return (
            dice._settings(),
            self.weight_dice,
            self.weight_ce,
            entropy.reduction,
            entropy.label_smoothing,
            entropy.weight is not None,
            self.ignore_label,
            entropy.ignore_index,
        )

    def _prepare(self, settings: tuple[Any, ...], weight: Tensor | None) -> None:
        self._prepared: tuple[Any, ...] = ()
        self._plans = _dice_and_ce(weight, *settings)
        self._prepared = settings


class DC_and_BCE_loss(nn.Module):
    """weight_ce BCE + weight_dice Dice of each channel's sigmoid, in one pass over the voxels.

    BCE is `torch.nn.BCEWithLogitsLoss`, Dice this module's loss of the targets.

    Parameters
    ----------
    bce_kwargs : dict
        The arguments of torch.nn.BCEWithLogitsLoss: weight and pos_weight are one number for each
        class, (C, 1, ...), reduction is "mean" or "sum".
    soft_dice_kwargs : dict
        The arguments of dice_class but apply_nonlin, which is the sigmoid.
    weight_ce, weight_dice : float
        The factors.
    use_ignore_label : bool
        The target has an extra last channel, 1 for voxels that both parts ignore. BCE is then the
        sum over classes of the mean over voxels, C times its value without, and 0 if no voxel is
        valid; "none" is written into bce_kwargs as its reduction, as nnU-Net does.
    dice_class : class
        SoftDiceLoss or MemoryEfficientSoftDiceLoss; nnU-Net's are replaced by this module's.
    backend, num_threads, check_labels, inplace : optional
        As in `dice_core.torch.loss`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        For invalid arguments; the module's docstring lists the differences from nnU-Net.
    """

    def __init__(
        self,
        bce_kwargs: dict[str, Any],
        soft_dice_kwargs: Mapping[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: Callable[..., nn.Module] = MemoryEfficientSoftDiceLoss,
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_mapping(bce_kwargs, "bce_kwargs")
        _check_mapping(soft_dice_kwargs, "soft_dice_kwargs")
        use_ignore_label = checks.flag(use_ignore_label, "use_ignore_label")
        if use_ignore_label:
            bce_kwargs["reduction"] = "none"
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.use_ignore_label = use_ignore_label
        self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
        self.dc = _dice_class(dice_class)(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)
        self._options = options(backend, num_threads, check_labels, inplace)
        self._prepare(self._settings(self.dc, self.ce))

    def forward(self, net_output: Any, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Parameters
        ----------
        net_output : (N, C, *) floating-point tensor
            Logits; or what a `dice_core.torch.LinearHead` returns in training.
        target : (N, C, *) tensor, with use_ignore_label (N, C + 1, *)
            One-hot or soft targets of any dtype.
        """
        net_output = _logits(net_output, target)
        dice, entropy = self.dc, self.ce
        settings = self._settings(dice, entropy)
        if settings != self._prepared:
            self._prepare(settings)
        x, y, ignored = net_output, target, None
        if self.use_ignore_label:
            y = target[:, :-1]
        if y.shape != x.shape:
            raise ValueError(
                f"target must have shape {tuple(x.shape)}, and with use_ignore_label a channel "
                f"more, got {tuple(target.shape)}"
            )
        if y.requires_grad:
            _shared.refuse_gradient(y, "target")
        _check_channels(dice, x)
        if self.use_ignore_label:
            y, ignored = _shared.masked(y, target[:, -1:] != 1)
        scores, activation = _probabilities(x, dice.apply_nonlin)
        of_dice, of_entropy, of_both = self._plans
        pooled, weights = dice.ddp and dice.batch_dice, []
        for name, weight in (("weight", entropy.weight), ("pos_weight", entropy.pos_weight)):
            if weight is not None:
                weights.append(_per_class(weight, x, name))
        both, alone = (of_both if scores is x else of_dice), of_entropy
        term = both.term.with_weights(weights) if both.term.weights else both.term
        request = both.requests[activation, ignored, "soft"]
        if scores is x:
            return _evaluate(x, y, term, request, pooled, self._options)
        options = self._options._replace(inplace=False)
        value = _evaluate(scores, y, term, request, pooled, options)
        term = alone.term.with_weights(weights)
        request = alone.requests["sigmoid", ignored, "soft"]
        return value + _evaluate(x, y, term, request, False, options)

    def _settings(self, dice: Any, entropy: nn.BCEWithLogitsLoss) -> tuple[Any, ...]:
        """The settings from which terms and requests are derived."""
        return (
            dice._settings(),
            self.weight_dice,
            self.weight_ce,
            entropy.reduction,
            entropy.weight is not None,
            entropy.pos_weight is not None,
            self.use_ignore_label,
        )

    def _prepare(self, settings: tuple[Any, ...]) -> None:
        self._prepared: tuple[Any, ...] = ()
        self._plans = _dice_and_bce(*settings)
        self._prepared = settings


@functools.cache
def fused_head_trainer() -> type:
    """The class nnUNetTrainerDiceCoreFusedHead: `trainer` with networks whose segmentation layers
    are `LinearHead`s, so that the logits of a training step are never held.

    Checkpoints fit both trainers, and nnU-Net's. Raises what `trainer` does.
    """
    base = trainer()
    build = base.build_network_architecture  # type: ignore[attr-defined]

    class nnUNetTrainerDiceCoreFusedHead(base):  # type: ignore[misc, valid-type]
        """nnUNetTrainerDiceCore without logits in training."""

        @staticmethod
        @functools.wraps(build)  # nnU-Net passes what the signature asks for
        def build_network_architecture(*args: Any, **kwargs: Any) -> nn.Module:
            net: nn.Module = build(*args, **kwargs)
            layers = getattr(getattr(net, "decoder", None), "seg_layers", None)
            if layers is None:
                raise NotImplementedError(
                    f"nnUNetTrainerDiceCoreFusedHead needs a network with decoder.seg_layers, got "
                    f"{type(net).__name__}: use nnUNetTrainerDiceCore"
                )
            for i, layer in enumerate(layers):
                layers[i] = linear.LinearHead(layer)
            return net

    nnUNetTrainerDiceCoreFusedHead.__module__ = __name__
    nnUNetTrainerDiceCoreFusedHead.__qualname__ = nnUNetTrainerDiceCoreFusedHead.__name__
    return nnUNetTrainerDiceCoreFusedHead


@functools.cache
def trainer() -> type:
    """The class nnUNetTrainerDiceCore: nnUNetTrainer with the losses of this module, never
    compiled.

    Its settings and the weights of deep supervision are nnU-Net's; the weight of a single scale,
    for which nnU-Net computes 0/0, is 1. Raises ImportError if nnunetv2 cannot be imported.
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
            if not all(map(math.isfinite, built.weight_factors)):
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
    if name == "nnUNetTrainerDiceCoreFusedHead":
        return fused_head_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- arguments -----------------------------------------------------------------------------------


def _check_mapping(value: Any, name: str) -> None:
    """Raises TypeError unless these are keyword arguments."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of arguments, got {type(value).__name__}")


def _dice_class(dice_class: Any) -> Any:
    """A Dice class of this module, also for nnU-Net's class of the same name."""
    ours = {each.__name__: each for each in (MemoryEfficientSoftDiceLoss, SoftDiceLoss)}
    name = getattr(dice_class, "__name__", "")
    if getattr(dice_class, "__module__", None) == "nnunetv2.training.loss.dice":
        dice_class = ours.get(name, dice_class)
    if dice_class not in ours.values():
        raise NotImplementedError(
            f"dice_class must be one of {', '.join(ours)}, got {name or dice_class!r}"
        )
    return dice_class


_SIGMOIDS = (torch.sigmoid, torch.special.expit, nn.functional.sigmoid, Tensor.sigmoid)
_SOFTMAXES = (torch.softmax, torch.special.softmax, nn.functional.softmax, Tensor.softmax)


class _Logits:
    """Stands for the logits of a head (features, weight, bias), which are never held."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        linear.check(features, weight, bias, y)
        self.head = features, weight, bias
        self.shape = torch.Size(linear.logits_shape(features, weight))
        self.ndim, self.device = len(self.shape), features.device


def _logits(output: Any, target: Any) -> Any:
    """The checked output of a network."""
    if not isinstance(output, tuple):
        _shared.check_tensors(output, target, "net_output", "target")
        return output
    if len(output) != 3:
        raise TypeError(
            f"net_output must be logits, or features, weight and bias of a LinearHead, got a tuple "
            f"of {len(output)}"
        )
    _shared.check_tensors(output[0], target, "net_output", "target")
    return _Logits(*output, target)


def _probabilities(x: Any, nonlin: Any) -> tuple[Any, str]:
    """The input of the pass, and the activation that the pass applies."""
    if nonlin is None:
        return x, "none"
    if nonlin is torch.sigmoid or nonlin in _SIGMOIDS or type(nonlin) is nn.Sigmoid:
        return x, "sigmoid"
    if _is_softmax(nonlin) and x.shape[1] > 1:
        return x, "softmax"
    if isinstance(x, _Logits):
        raise NotImplementedError(
            "the output of a LinearHead needs an apply_nonlin that is part of the pass, and a "
            "softmax of several channels"
        )
    return nonlin(x), "none"


def _is_softmax(nonlin: Any) -> bool:
    """Whether this is the softmax over channels."""
    if nonlin is softmax_helper_dim1 or (type(nonlin) is nn.Softmax and nonlin.dim == 1):
        return True
    if isinstance(nonlin, functools.partial):
        return nonlin.func in _SOFTMAXES and not nonlin.args and nonlin.keywords == {"dim": 1}
    name = getattr(nonlin, "__module__", None), getattr(nonlin, "__name__", None)
    return name == ("nnunetv2.utilities.helpers", "softmax_helper_dim1")


def _targets(x: Any, y: Tensor, name: str) -> tuple[Tensor, str]:
    """Labels (N, 1, *) as integers, or soft targets like x, and which of the two they are."""
    if y.requires_grad:
        _shared.refuse_gradient(y, name)
    if y.ndim == x.ndim - 1:
        y = y.unsqueeze(1)
    if y.shape == x.shape:
        return y, "soft"
    if y.shape != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(
            f"{name} must have shape {(x.shape[0], 1, *x.shape[2:])} or {tuple(x.shape)}, "
            f"got {tuple(y.shape)}"
        )
    return (_shared.class_labels(y) if y.is_floating_point() else y), "labels"


def _check_channels(dice: Any, x: Any) -> None:
    if x.shape[1] == 1 and not dice.do_bg:
        raise ValueError("do_bg=False leaves no class of a single channel")


def _masked(y: Tensor, mask: Tensor, classes: int) -> tuple[Tensor, int]:
    """y with an ignored label where the mask is 0, and that label."""
    if mask.ndim != y.ndim or mask.shape[1] != 1:
        raise NotImplementedError(
            f"loss_mask must have shape (N, 1, *), got {tuple(mask.shape)} for a target of "
            f"{tuple(y.shape)}"
        )
    if any(m not in (1, n) for m, n in zip(mask.shape, y.shape, strict=True)):
        raise ValueError(
            f"loss_mask of shape {tuple(mask.shape)} does not fit a target of {tuple(y.shape)}"
        )
    if mask.requires_grad:
        _shared.refuse_gradient(mask, "loss_mask")
    return _shared.masked(y, mask, classes)


def _per_class(weight: Tensor, x: Any, name: str) -> Tensor:
    """(C,) numbers of a weight that broadcasts to x with one number per class."""
    shape = (1,) * (x.ndim - weight.ndim) + tuple(weight.shape)
    if len(shape) != x.ndim or shape != (1, shape[1]) + (1,) * (x.ndim - 2):
        raise NotImplementedError(
            f"bce_kwargs: {name} must be one number per class, of shape "
            f"{(x.shape[1],) + (1,) * (x.ndim - 2)}, got {tuple(weight.shape)}"
        )
    return weight.reshape(-1).expand(x.shape[1])


# ---- terms ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _SoftDice(losses.Dice):
    """-q of the Dice score q, with I clipped at `clip_tp`; P - I and Y - I are unchanged."""

    clip_tp: float | None = None

    penalty: ClassVar[Penalty | None] = NegativeScore()

    def score(self, xp: Any, rows: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        return super().score(xp, self._raised(xp, rows))

    def slopes(self, rows: tuple[Any, ...], score: Any, loss: Any, den: Any, share: Any) -> Any:
        slopes = super().slopes(self._raised(np, rows), score, loss, den, share)
        if self.clip_tp is not None:
            raised = rows[0] < self.clip_tp
            slopes[0] = np.where(raised, -slopes[1] - slopes[2], slopes[0])
        return slopes

    def _raised(self, xp: Any, rows: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.clip_tp is None:
            return rows
        i, p, y = rows
        more = xp.clip(i, self.clip_tp, None) - i
        return i + more, p + more, y + more


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _MaskedCrossEntropy(losses.CrossEntropy):
    """CrossEntropy; 0 if no voxel is valid, NaN if all valid voxels have weight 0."""

    def count(self, sums: Statistics) -> Any:
        count, where = super().count(sums), namespace(sums.array).where
        return where((count == 0) & (sums.voxels > 0), math.nan, count)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _SummedBinaryCrossEntropy(losses.BinaryCrossEntropy):
    """BinaryCrossEntropy summed over the classes, not their mean."""

    def factors(self, xp: Any, like: Any) -> dict[str, Any]:
        return {name: like.shape[1] * each for name, each in super().factors(xp, like).items()}


class _Plan(NamedTuple):
    """A term, whose weights may be placeholders, and the Spec of its sums by activation, ignored
    label and targets ("labels" or "soft").
    """

    term: losses.Term
    requests: dict[tuple[str, int | None, str], Spec]


def _planned(term: losses.Term, ignored: Iterable[int | None]) -> _Plan:
    """All requests of a term in advance, since none can be built while torch.compile traces."""
    requests = {
        (activation, label, targets): term.spec(activation, label, targets)
        for activation in ACTIVATIONS
        for label in ignored
        for targets in ("labels", "soft")
    }
    return _Plan(term, requests)


def _dice(batch_dice: bool, do_bg: bool, smooth: float, clip_tp: float | None) -> _SoftDice:
    return _SoftDice(
        smooth=_shared.number(smooth, "smooth"),
        floor=1e-8,
        pool="batch" if batch_dice else "none",
        ignore_channel=-1 if do_bg else 0,
        divisor="kept",
        clip_tp=None if clip_tp is None else _shared.number(clip_tp, "clip_tp", signed=True),
    )


def _dice_and_ce(
    weight: Tensor | None,
    of_dice: tuple[Any, ...],
    weight_dice: float,
    weight_ce: float,
    reduction: str,
    label_smoothing: float,
    weighted: bool,
    ignore_label: int | None,
    ignore_index: int,
) -> tuple[_Plan, _Plan, _Plan]:
    """Dice, cross-entropy and their sum, times the factors."""
    if reduction not in ("mean", "sum"):
        raise NotImplementedError(
            f"ce_kwargs: reduction must be 'mean' or 'sum', got {reduction!r}"
        )
    masked = ignore_label is not None
    entropy = (_MaskedCrossEntropy if masked else losses.CrossEntropy)(
        weight=weight if weighted else None,
        label_smoothing=_shared.number(label_smoothing, "label_smoothing"),
        divisor="weights" if reduction == "mean" else "one",
        empty="perfect" if masked else "nan",
    )
    ignored = (None, ignore_label, ignore_index)
    return _plans(_dice(*of_dice), weight_dice, entropy, weight_ce, ignored)


def _dice_and_bce(
    of_dice: tuple[Any, ...],
    weight_dice: float,
    weight_ce: float,
    reduction: str,
    weighted: bool,
    pos_weighted: bool,
    use_ignore_label: bool,
) -> tuple[_Plan, _Plan, _Plan]:
    """Dice, binary cross-entropy and their sum, times the factors."""
    if not use_ignore_label and reduction not in ("mean", "sum"):
        raise NotImplementedError(
            f"bce_kwargs: reduction must be 'mean' or 'sum', got {reduction!r}"
        )
    kind = _SummedBinaryCrossEntropy if use_ignore_label else losses.BinaryCrossEntropy
    entropy = kind(
        weight=(1.0,) if weighted else None,
        pos_weight=(1.0,) if pos_weighted else None,
        divisor="one" if reduction == "sum" else "voxels",
        empty="perfect" if use_ignore_label else "nan",
    )
    ignored = (None, *_shared.MASK_LABELS)
    return _plans(_dice(*of_dice), weight_dice, entropy, weight_ce, ignored)


def _plans(
    dice: losses.Term,
    weight_dice: float,
    entropy: losses.Term,
    weight_ce: float,
    ignored: tuple[int | None, ...],
) -> tuple[_Plan, _Plan, _Plan]:
    parts = (
        (_shared.number(weight_dice, "weight_dice", signed=True), dice),
        (_shared.number(weight_ce, "weight_ce", signed=True), entropy),
    )
    of_dice, of_entropy, both = (losses.Sum(each) for each in (parts[:1], parts[1:], parts))
    return _planned(of_dice, ignored), _planned(of_entropy, ignored), _planned(both, ignored)


# ---- evaluation ----------------------------------------------------------------------------------


def _evaluate(
    x: Any, y: Tensor, term: losses.Term, request: Spec, pooled: bool, options: Options
) -> Tensor:
    """The loss; if `pooled`, its Dice part is that of the sums over the batch and all ranks."""
    if isinstance(x, _Logits):
        sums = linear.linear_statistics(*x.head, y, request, *options.of_sums)
    elif not pooled:
        return evaluate(x, y, term, request, options)
    else:
        operators.check(x, y, request)
        sums = sums_of(x, y, request, options)
    if term.weights:
        weights = [weight.to(x.device, torch.float64) for weight in term.weights]
        term = term.with_weights(weights)
        term.check(x.shape[1])
    if not pooled:
        return of_sums(sums, term, options)
    added = _SumOfRanks.apply(sums.array[:3].sum(1, keepdim=True))  # type: ignore[no-untyped-call]
    of_ranks = Statistics(added, request, sums.dtype)
    parts = term.parts if isinstance(term, losses.Sum) else ((1.0, term),)
    values = [
        factor * part.value(of_ranks if isinstance(part, _SoftDice) else sums)
        for factor, part in parts
    ]
    value: Tensor = torch.stack(values).sum()
    return value if sums.dtype == "float64" else value.float()


class _SumOfRanks(torch.autograd.Function):
    """The sum over all processes of the default group, in forward and in backward."""

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
