"""What is measured: dice_core and its peers, each set up for the same loss as far as it has it.

That loss is the Dice loss per sample and class with smooth = 1e-5, averaged; where a peer computes
another, `formula` says which. One channel is sigmoid and, as the peers have it, a Dice of the
foreground alone: ours is told so with weight (0, 1).

An implementation makes a step: a generator function that yields when its input is ready and again
after each phase, so that the same step can be timed and weighed. What it yields last is the loss.
Steps take the inputs that there are in turns: one, or as many as it takes to get round a cache.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every library is imported where it is used: the table below is for all to read
    from torch import Tensor

Loss = Callable[["Tensor", "Tensor"], "Tensor"]
Inputs = Sequence[tuple["Tensor", "Tensor"]]
Step = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Implementation:
    """A row of the tables.

    - name: on the command line.
    - module: what it needs, a peer's module of losses.
    - prepare: pairs of logits (N, C, *) and labels (N, *), all of one shape -> its step.
    - formula: the function of `formulas` that it computes.
    - compiled: its first step of a shape compiles.
    - device: the only one that it is measured on; None for every one.
    """

    name: str
    title: str
    module: str
    prepare: Callable[[Inputs], Step]
    formula: str = "dice"
    compiled: bool = False
    device: str | None = None

    def unavailable(self) -> str | None:
        """Why it cannot be measured here, None if it can."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            absent = error.name == self.module.split(".")[0]
            return "not installed" if absent else f"needs {error.name}, which is not installed"
        except Exception as error:  # whatever is broken in a peer, the others are measured
            return f"does not import: {error}"
        return None


# ---- steps -------------------------------------------------------------------------------------


def _autograd(build: Callable[[int], Loss], inputs: Inputs) -> Step:
    """Forward, then backward into a fresh gradient; `build` takes the number of channels."""
    loss = build(_channels(inputs))
    turns = cycle([(x.detach().requires_grad_(), y) for x, y in inputs])

    def step() -> Iterator[Any]:
        x, y = next(turns)
        yield
        value = loss(x, y)
        yield
        value.backward()
        yield value.detach()
        x.grad = None

    return step


def _into_out(inputs: Inputs, term: Callable[[int], Any] | None = None) -> Step:
    """Both in one call, the gradient into memory that is already mapped; `term` takes the number of
    channels.
    """
    from .. import api

    channels = _channels(inputs)
    options = _options(channels) if term is None else {"loss": term(channels)}
    out, turns = inputs[0][0].clone(), cycle(inputs)

    def step() -> Iterator[Any]:
        x, y = next(turns)
        yield
        yield api.loss_and_grad(x, y, out=out, num_threads=_threads(), **options)[0]

    return step


def _over_logits(inputs: Inputs) -> Step:
    """Both in one call, the gradient over the logits; the last step's are put back before it."""
    from .. import api

    options = _options(_channels(inputs))
    own = [(x.clone(), x, y) for x, y in inputs]
    turns, spent = cycle(own), own[-1]

    def step() -> Iterator[Any]:
        nonlocal spent
        logits, x, _ = spent
        logits.copy_(x)
        spent = logits, _, y = next(turns)
        yield
        yield api.loss_and_grad(logits, y, out=logits, num_threads=_threads(), **options)[0]

    return step


def _channels(inputs: Inputs) -> int:
    return inputs[0][0].shape[1]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


# ---- losses, by number of channels -------------------------------------------------------------


def _options(channels: int) -> dict[str, Any]:
    return {"smooth": 1e-5} | ({"weight": [0, 1]} if channels == 1 else {})


def _ours(channels: int) -> Loss:
    from ..torch import dice_loss

    return partial(dice_loss, **_options(channels))


def _ours_of(channels: int, term: Callable[[int], Any]) -> Loss:
    from ..torch import Loss as Module

    return Module(term(channels))


def _dice_and_entropy(channels: int) -> Any:
    from ..losses import CrossEntropy, Dice

    return Dice(**_options(channels)) + CrossEntropy()


def _dice_and_focal(channels: int) -> Any:
    from ..losses import Dice, SigmoidFocal

    focal = SigmoidFocal(ignore_channel=0 if channels == 1 else -1)
    return Dice(**_options(channels)) + focal


def _monai(channels: int, name: str = "DiceLoss") -> Loss:
    import monai.losses

    one = channels == 1
    loss = getattr(monai.losses, name)(sigmoid=one, softmax=not one, to_onehot_y=not one)
    if one and name != "DiceLoss":  # its binary cross-entropy takes no integers
        return lambda x, y: loss(x, y.unsqueeze(1).to(x.dtype))
    return lambda x, y: loss(x, y.unsqueeze(1))


def _nnunet(channels: int) -> Loss:
    import torch
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    activation = torch.sigmoid if channels == 1 else partial(torch.softmax, dim=1)
    return MemoryEfficientSoftDiceLoss(activation, smooth=1e-5, ddp=False)


def _nnunet_and_entropy(channels: int) -> Loss:
    import torch
    from nnunetv2.training.loss import compound_losses, dice

    if channels == 1:
        raise ValueError("nnU-Net's DC_and_CE_loss has no sigmoid: softmax over one channel is 1")
    loss = compound_losses.DC_and_CE_loss(
        {"smooth": 1e-5, "ddp": False}, {}, dice_class=dice.MemoryEfficientSoftDiceLoss
    )
    return lambda x, y: loss(x, y.unsqueeze(1).to(torch.int64))


def _smp(channels: int) -> Loss:
    from segmentation_models_pytorch.losses import DiceLoss

    return DiceLoss("binary" if channels == 1 else "multiclass")


def _kornia(channels: int) -> Loss:
    from kornia.losses import dice_loss

    if channels == 1:
        raise ValueError("kornia's dice_loss has no sigmoid: softmax over one channel is 1")
    # It takes images, so a volume's slices are put below one another: a view.
    return lambda x, y: dice_loss(x.flatten(2, -2), y.flatten(1, -2), average="macro")


def _exacta(channels: int) -> Loss:
    losses = importlib.import_module("exacta.losses")
    if channels == 1:  # its class labels are below the number of channels
        loss = losses.DiceLoss(activation="sigmoid", target_format="one-hot", backend="triton")
        return lambda x, y: loss(x, y.unsqueeze(1))
    return losses.DiceLoss(backend="triton")


def _naive(channels: int, name: str = "dice") -> Loss:
    from . import formulas

    return getattr(formulas, name)


def _compiled(build: Callable[[int], Loss], channels: int) -> Loss:
    import torch

    return torch.compile(build(channels), dynamic=False)


# ---- the table ---------------------------------------------------------------------------------

OURS, OUT, OVER, MONAI, EXACTA = "ours", "ours-out", "ours-over", "monai", "exacta"

_MONAI, _NNUNET, _SMP = (
    "monai.losses",
    "nnunetv2.training.loss.dice",
    "segmentation_models_pytorch.losses",
)
_by_comparison = partial(_naive, name="dice_by_comparison")

IMPLEMENTATIONS = {
    row.name: row
    for row in (
        Implementation(OURS, "dice_core", "torch", partial(_autograd, _ours)),
        Implementation(OUT, "dice_core, into out=", "torch", _into_out),
        Implementation(OVER, "dice_core, over the logits", "torch", _over_logits),
        Implementation(MONAI, "MONAI DiceLoss", _MONAI, partial(_autograd, _monai)),
        Implementation(
            "monai-ce",
            "MONAI DiceCELoss",
            _MONAI,
            partial(_autograd, partial(_monai, name="DiceCELoss")),
            formula="dice_and_cross_entropy",
        ),
        Implementation(
            "ours-ce",
            "dice_core, Dice + CrossEntropy",
            "torch",
            partial(_autograd, partial(_ours_of, term=_dice_and_entropy)),
            formula="dice_and_cross_entropy",
        ),
        Implementation(
            "ours-ce-out",
            "dice_core, Dice + CrossEntropy, into out=",
            "torch",
            partial(_into_out, term=_dice_and_entropy),
            formula="dice_and_cross_entropy",
        ),
        Implementation(
            "ours-focal",
            "dice_core, Dice + SigmoidFocal",
            "torch",
            partial(_autograd, partial(_ours_of, term=_dice_and_focal)),
            formula="dice_and_focal",
        ),
        Implementation(
            "ours-focal-out",
            "dice_core, Dice + SigmoidFocal, into out=",
            "torch",
            partial(_into_out, term=_dice_and_focal),
            formula="dice_and_focal",
        ),
        Implementation(
            "monai-focal",
            "MONAI DiceFocalLoss",
            _MONAI,
            partial(_autograd, partial(_monai, name="DiceFocalLoss")),
            formula="dice_and_focal",
        ),
        Implementation(
            "nnunet-ce",
            "nnU-Net DC_and_CE_loss",
            "nnunetv2.training.loss.compound_losses",
            partial(_autograd, _nnunet_and_entropy),
            formula="negative_dice_and_cross_entropy",
        ),
        Implementation(
            "nnunet",
            "nnU-Net MemoryEfficientSoftDiceLoss",
            _NNUNET,
            partial(_autograd, _nnunet),
            formula="negative_dice",
        ),
        Implementation("smp", "SMP DiceLoss", _SMP, partial(_autograd, _smp), formula="batch_dice"),
        Implementation(
            "kornia", "kornia dice_loss, macro", "kornia.losses", partial(_autograd, _kornia)
        ),
        Implementation(
            EXACTA,
            "exacta DiceLoss, Triton",
            "exacta.losses",
            partial(_autograd, _exacta),
            device="cuda",
        ),
        Implementation("naive", "torch, naive", "torch", partial(_autograd, _naive)),
        Implementation(
            "compile-naive",
            "torch.compile, naive",
            "torch",
            partial(_autograd, partial(_compiled, _naive)),
            compiled=True,
        ),
        Implementation(
            "compile-equal",
            "torch.compile, naive with ==",
            "torch",
            partial(_autograd, partial(_compiled, _by_comparison)),
            compiled=True,
        ),
        Implementation(
            "compile-monai",
            "torch.compile, MONAI DiceLoss",
            _MONAI,
            partial(_autograd, partial(_compiled, _monai)),
            compiled=True,
        ),
    )
}


def of(device: str) -> list[str]:
    """The names of those that are measured on a device."""
    return [row.name for row in IMPLEMENTATIONS.values() if row.device in (None, device)]


def named(names: Collection[str]) -> list[Implementation]:
    """The rows of these names. Raises ValueError for others, listing those there are."""
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        there = "\n".join(f"  {row.name:<14} {row.title}" for row in IMPLEMENTATIONS.values())
        raise ValueError(f"there is no implementation {', '.join(unknown)}; there are\n{there}")
    return [IMPLEMENTATIONS[name] for name in dict.fromkeys(names)]
