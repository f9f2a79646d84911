"""The measured implementations: dice_core and its peers, set up for the same loss if possible.

That loss is the average over samples and classes of Dice with smooth = 1e-5; if an implementation
computes another loss, its `formula` says which. With one channel the peers take the sigmoid and the
Dice of the foreground alone, which for dice_core is weight (0, 1).

A step is a generator function that yields once its input is ready and again after each phase,
forward and backward or both at once, so that the same step measures time and memory. It yields the
loss last, then cleans up. Successive steps use successive inputs.

A whole training step is the forward pass of a network with a loss of its logits, and the backward
pass to its weights, without an optimizer: the row's `network` names the cases that it belongs to.
As in the training loops of nnU-Net and MONAI, the network's output lives until the step ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast

from ..api import loss_and_grad
from ..losses import CrossEntropy, Dice, SigmoidFocal
from . import networks

if TYPE_CHECKING:  # torch and the peers are imported on use: --help needs none of them
    from torch import Tensor

Loss = Callable[[Any, "Tensor"], "Tensor"]
Inputs = Sequence[tuple["Tensor", "Tensor"]]  # logits (N, C, *) and labels (N, *), of one shape
Step = Callable[[], Iterator[Any]]

# ---- steps -------------------------------------------------------------------------------------


def _autograd(loss: Loss, inputs: Inputs) -> Step:
    """Forward, then backward into a fresh gradient."""
    pairs = cycle([(x.detach().requires_grad_(), y) for x, y in inputs])

    def step() -> Iterator[Any]:
        x, y = next(pairs)
        yield
        value = loss(x, y)
        yield
        value.backward()
        yield value.detach()
        x.grad = None

    return step


def _ours(term: Any, inputs: Inputs) -> Step:
    """`_autograd` of a term of dice_core."""
    from ..torch import loss

    return _autograd(lambda x, y: loss(x, y, term), inputs)


def _overwriting(term: Any, inputs: Inputs) -> Step:
    """Forward, then backward with inplace=True, over logits that an operation has just written."""
    import torch

    from ..torch import loss

    pairs = cycle([(x.detach().requires_grad_(), y) for x, y in inputs])

    def step() -> Iterator[Any]:
        x, y = next(pairs)
        logits = x * 1
        yield
        value = loss(logits, y, term, inplace=True)
        yield
        torch.autograd.grad(value, logits)
        yield value.detach()

    return step


def _at_once(term: Any, inputs: Inputs, in_place: bool = False) -> Step:
    """Loss and gradient in one call; the gradient goes to resident memory or over the logits."""
    import torch

    out = inputs[0][0].clone()
    triples = cycle([(x, x.clone(), y) if in_place else (x, x, y) for x, y in inputs])

    def step() -> Iterator[Any]:
        x, logits, y = next(triples)
        grad, threads = logits if in_place else out, torch.get_num_threads()
        yield
        yield loss_and_grad(logits, y, term, out=grad, num_threads=threads)[0]
        if in_place:
            logits.copy_(x)

    return step


def _training(parts: tuple[networks.Build, Loss], inputs: Inputs) -> Step:
    """A training step: forward with the loss, then backward into fresh gradients of the weights."""
    build, loss = parts
    image = inputs[0][0]
    net, pairs = build(image.shape[-1]).to(image.device), cycle(inputs)

    def step() -> Iterator[Any]:
        image, y = next(pairs)
        yield
        output = net(image)
        value = loss(output, y)
        yield
        value.backward()
        yield value.detach()
        net.zero_grad()

    return step


# ---- losses, by number of channels -------------------------------------------------------------


def _dice(channels: int) -> Any:
    return Dice(smooth=1e-5, weight=[0, 1] if channels == 1 else None)


def _dice_ce(channels: int) -> Any:
    return _dice(channels) + CrossEntropy()


def _dice_focal(channels: int) -> Any:
    return _dice(channels) + SigmoidFocal(ignore_channel=0 if channels == 1 else -1)


def _monai(name: str, channels: int) -> Loss:
    import monai.losses

    one = channels == 1
    loss = getattr(monai.losses, name)(sigmoid=one, softmax=not one, to_onehot_y=not one)
    if one and name != "DiceLoss":  # its binary cross-entropy needs floating-point targets
        return lambda x, y: loss(x, y.unsqueeze(1).to(x.dtype))
    return lambda x, y: loss(x, y.unsqueeze(1))


def _compat_monai(channels: int, inplace: bool = False) -> Loss:
    from ..compat.monai import DiceCELoss

    loss = DiceCELoss(softmax=True, to_onehot_y=True, inplace=inplace)
    return lambda x, y: loss(x, y.unsqueeze(1))


def _nnunet(channels: int) -> Loss:
    import torch
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    activation = torch.sigmoid if channels == 1 else partial(torch.softmax, dim=1)
    return MemoryEfficientSoftDiceLoss(activation, smooth=1e-5, ddp=False)


def _nnunet_ce(channels: int, do_bg: bool = True) -> Loss:
    from nnunetv2.training.loss import compound_losses, dice

    if channels == 1:
        raise ValueError("nnU-Net's DC_and_CE_loss has no sigmoid: softmax over one channel is 1")
    options = {"smooth": 1e-5, "ddp": False, "do_bg": do_bg}
    dice_class = dice.MemoryEfficientSoftDiceLoss
    loss = compound_losses.DC_and_CE_loss(options, {}, dice_class=dice_class)
    return lambda x, y: loss(x, y.unsqueeze(1).long())


def _compat_nnunet(channels: int, inplace: bool = False) -> Loss:
    from ..compat import nnunet

    options = {"smooth": 1e-5, "ddp": False, "do_bg": False}
    dice_class = nnunet.MemoryEfficientSoftDiceLoss
    loss = nnunet.DC_and_CE_loss(options, {}, dice_class=dice_class, inplace=inplace)
    return lambda x, y: cast("Tensor", loss(x, y.unsqueeze(1)))


def _smp(channels: int) -> Loss:
    from segmentation_models_pytorch.losses import DiceLoss

    return DiceLoss("binary" if channels == 1 else "multiclass")


def _kornia(channels: int) -> Loss:
    from kornia.losses import dice_loss

    if channels == 1:
        raise ValueError("kornia's dice_loss has no sigmoid: softmax over one channel is 1")
    # It needs 2-D images: a view stacks the slices of a volume into one.
    return lambda x, y: dice_loss(x.flatten(2, -2), y.flatten(1, -2), average="macro")


def _naive(name: str, channels: int) -> Loss:
    from . import formulas

    return getattr(formulas, name)


def _step(network: Callable[[int], Any], loss: Callable[[int], Loss], channels: int) -> Any:
    return network(channels), loss(channels)


# ---- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """A row of the tables."""

    title: str
    build: Callable[[int], Any]  # number of channels -> loss(x, y), or a term of dice_core
    formula: str = "dice"  # the function of `formulas` that it computes
    offset: int = 0  # a constant added to the formula
    start: Callable[[Any, Inputs], Step] = _autograd  # (what `build` returns, inputs) -> step
    compiled: bool = False  # by torch.compile, in the first step of a shape
    network: str = ""  # the network of the cases it belongs to

    def step(self, inputs: Inputs, channels: int) -> Step:
        """Its step on these inputs, whose logits have so many channels."""
        loss = self.build(channels)
        if self.compiled:
            import torch

            loss = torch.compile(loss, dynamic=False)
        return self.start(loss, inputs)

    def unavailable(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.build(2)
        except Exception as error:  # a broken peer must not stop the others
            return str(error) or repr(error)
        return None


_in_place = partial(_at_once, in_place=True)
_naive_dice, _equal = partial(_naive, "dice"), partial(_naive, "dice_by_comparison")
_monai_dice = partial(_monai, "DiceLoss")
_CE, _FOCAL = "dice_and_cross_entropy", "dice_and_focal"
_FOREGROUND = "foreground_dice_and_cross_entropy"
_naive_ce, _no_loss = partial(_naive, _CE), partial(_naive, "mean")
_foreground_ce = partial(_nnunet_ce, do_bg=False)
_fused_unet = partial(networks.plain_conv_unet, fused=True)
_Row = Implementation


def _of_nnunet(
    title: str, loss: Any, formula: str, offset: int = 0, network: Any = networks.plain_conv_unet
) -> Implementation:
    build = partial(_step, network, loss)
    return _Row(title, build, formula, offset, _training, network="nnunet-step")


def _of_monai(title: str, loss: Any, formula: str) -> Implementation:
    build = partial(_step, networks.monai_unet, loss)
    return _Row(title, build, formula, start=_training, network="monai-step")


IMPLEMENTATIONS = {
    "ours": _Row("dice_core", _dice, start=_ours),
    "ours-inplace": _Row("dice_core, inplace=True", _dice, start=_overwriting),
    "ours-out": _Row("dice_core, into out=", _dice, start=_at_once),
    "ours-over": _Row("dice_core, in place", _dice, start=_in_place),
    "ours-ce": _Row("dice_core, Dice + CE", _dice_ce, _CE, start=_ours),
    "ours-ce-inplace": _Row(
        "dice_core, Dice + CE, inplace=True", _dice_ce, _CE, start=_overwriting
    ),
    "ours-ce-out": _Row("dice_core, Dice + CE, into out=", _dice_ce, _CE, start=_at_once),
    "ours-focal": _Row("dice_core, Dice + focal", _dice_focal, _FOCAL, start=_ours),
    "ours-focal-out": _Row("dice_core, Dice + focal, out=", _dice_focal, _FOCAL, start=_at_once),
    "monai": _Row("MONAI DiceLoss", _monai_dice),
    "monai-ce": _Row("MONAI DiceCELoss", partial(_monai, "DiceCELoss"), _CE),
    "monai-focal": _Row("MONAI DiceFocalLoss", partial(_monai, "DiceFocalLoss"), _FOCAL),
    "nnunet": _Row("nnU-Net MemoryEfficientSoftDiceLoss", _nnunet, offset=-1),
    "nnunet-ce": _Row("nnU-Net DC_and_CE_loss", _nnunet_ce, _CE, offset=-1),
    "smp": _Row("SMP DiceLoss", _smp, "batch_dice"),
    "kornia": _Row("kornia dice_loss, macro", _kornia),
    "naive": _Row("torch, naive", _naive_dice),
    "naive-ce": _Row("torch, naive, Dice + CE", _naive_ce, _CE),
    "compile-naive": _Row("torch.compile, naive", _naive_dice, compiled=True),
    "compile-equal": _Row("torch.compile, naive with ==", _equal, compiled=True),
    "compile-monai": _Row("torch.compile, MONAI DiceLoss", _monai_dice, compiled=True),
    "nnunet-step-theirs": _of_nnunet("nnU-Net DC_and_CE_loss", _foreground_ce, _FOREGROUND, -1),
    "nnunet-step-ours": _of_nnunet("dice_core", _compat_nnunet, _FOREGROUND, -1),
    "nnunet-step-inplace": _of_nnunet(
        "dice_core, inplace=True", partial(_compat_nnunet, inplace=True), _FOREGROUND, -1
    ),
    "nnunet-step-fused": _of_nnunet(
        "dice_core, fused head", _compat_nnunet, _FOREGROUND, -1, network=_fused_unet
    ),
    "nnunet-step-none": _of_nnunet("no loss", _no_loss, "mean"),
    "monai-step-theirs": _of_monai("MONAI DiceCELoss", partial(_monai, "DiceCELoss"), _CE),
    "monai-step-ours": _of_monai("dice_core", _compat_monai, _CE),
    "monai-step-inplace": _of_monai(
        "dice_core, inplace=True", partial(_compat_monai, inplace=True), _CE
    ),
    "monai-step-none": _of_monai("no loss", _no_loss, "mean"),
}
