"""The losses as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import losses, spec
from .functional import loss


class Loss(torch.nn.Module):
    """`loss` of a term as a module; the weights of its classes are buffers.

    >>> import torch, dice_core.torch
    >>> from dice_core.losses import CrossEntropy, Dice
    >>> criterion = dice_core.torch.Loss(Dice(smooth=1) + 0.5 * CrossEntropy())
    >>> x = torch.zeros(1, 2, 8, 8, requires_grad=True)
    >>> y = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> criterion(x, y)
    tensor(0.9964, grad_fn=<_LossBackward>)
    """

    def __init__(
        self,
        term: losses.Term,
        ignore_label: int | None = -1,
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        self.term = losses.term(term)
        self.ignore_label = spec.label(ignore_label)
        spec.one_of(activation, "activation", spec.ACTIVATIONS)
        self.activation = activation
        self._names = [f"weight{i}" if i else "weight" for i in range(len(self.term.weights))]
        for name, weight in zip(self._names, self.term.weights, strict=True):
            if isinstance(weight, Tensor):
                spec.weights(weight.detach().double().cpu())
            self.register_buffer(name, torch.as_tensor(weight))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (N, C, *) and labels (N, *) or (N, 1, *) -> the loss."""
        return loss(
            x, y, self._weighted(), ignore_label=self.ignore_label, activation=self.activation
        )

    def extra_repr(self) -> str:
        """The term, its settings and the weights that the buffers hold."""
        activation = "" if self.activation == "softmax" else f", activation={self.activation!r}"
        return f"{self._weighted()!r}, ignore_label={self.ignore_label}{activation}"

    def _weighted(self) -> losses.Term:
        weights = iter([getattr(self, name) for name in self._names])
        return self.term.with_weights(lambda _: next(weights))


class DiceLoss(Loss):
    """`dice_loss` as a module; `weight` is a buffer.

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
        ignore_channel: int = -1,
        ignore_label: int | None = -1,
        smooth: float = 0,
        p: int = 1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            losses.dice(weight, ignore_channel, smooth, p, reduction), ignore_label=ignore_label
        )


class JaccardLoss(Loss):
    """`dice_core.losses.Jaccard`, whose settings it takes, as a module."""

    def __init__(self, *, ignore_label: int | None = -1, **settings: Any) -> None:
        super().__init__(losses.Jaccard(**settings), ignore_label)


class TverskyLoss(Loss):
    """`dice_core.losses.Tversky`, whose settings it takes, as a module."""

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        *,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        super().__init__(losses.Tversky(alpha=alpha, beta=beta, **settings), ignore_label)


class FocalTverskyLoss(Loss):
    """`dice_core.losses.FocalTversky`, whose settings it takes, as a module."""

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 0.75,
        *,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        term = losses.FocalTversky(alpha=alpha, beta=beta, gamma=gamma, **settings)
        super().__init__(term, ignore_label)


class GeneralizedDiceLoss(Loss):
    """`dice_core.losses.GeneralizedDice`, whose settings it takes, as a module."""

    def __init__(
        self, weighting: str = "square", *, ignore_label: int | None = -1, **settings: Any
    ) -> None:
        super().__init__(losses.GeneralizedDice(weighting=weighting, **settings), ignore_label)


class DiceCELoss(Loss):
    """lambda_dice Dice + lambda_ce CrossEntropy as a module, in one pass over the voxels.

    `weight`, (C,) numbers, weighs the classes of both, whose means it normalises; the other
    settings are those of `dice_core.losses.Dice`.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        *,
        weight: Any = None,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        entropy = losses.CrossEntropy(weight=weight)
        super().__init__(
            lambda_dice * _weighted_dice(weight, settings) + lambda_ce * entropy, ignore_label
        )


class DiceFocalLoss(Loss):
    """lambda_dice Dice + lambda_focal Focal(gamma) as a module, in one pass over the voxels.

    `weight`, (C,) numbers, weighs the classes of both; the other settings are those of
    `dice_core.losses.Dice`.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        gamma: float = 2.0,
        *,
        weight: Any = None,
        ignore_label: int | None = -1,
        **settings: Any,
    ) -> None:
        focal = losses.Focal(gamma=gamma, weight=weight)
        super().__init__(
            lambda_dice * _weighted_dice(weight, settings) + lambda_focal * focal, ignore_label
        )


def _weighted_dice(weight: Any, settings: dict[str, Any]) -> losses.Dice:
    if weight is not None:
        settings = {"divisor": "weights", **settings}
    return losses.Dice(weight=weight, **settings)


class DeepSupervision(torch.nn.Module):
    """A loss summed over the outputs of several resolutions, finest first, times their weights.

    Labels of a lower resolution are strided views of the labels, every second voxel for example: no
    copies. `weights` is a number for each output; None halves from output to output and sums to 1.

    >>> import torch, dice_core.torch
    >>> criterion = dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss(smooth=1))
    >>> outputs = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4, 4)]
    >>> criterion(outputs, torch.zeros(1, 8, 8, dtype=torch.uint8))
    tensor(0.6347)
    """

    def __init__(self, loss: torch.nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.weights = None if weights is None else [float(weight) for weight in weights]

    def forward(self, outputs: Sequence[Tensor], y: Tensor) -> Tensor:
        """Logits (N, C, *) of each resolution and labels (N, *) or (N, 1, *) -> the loss.

        Raises ValueError where the labels' sides are not whole multiples of an output's.
        """
        if isinstance(outputs, Tensor) or not outputs:
            raise ValueError("outputs must be a sequence of logits, one for each resolution")
        weights = self.weights
        if weights is None:
            weights = [2.0**-i / (2 - 2.0 ** (1 - len(outputs))) for i in range(len(outputs))]
        if len(weights) != len(outputs):
            raise ValueError(f"there are {len(weights)} weights for {len(outputs)} outputs")
        pairs = zip(weights, outputs, strict=True)
        terms = [weight * self.loss(x, _nearest(y, x)) for weight, x in pairs if weight]
        return torch.stack(terms).sum(0)


def _nearest(y: Tensor, x: Tensor) -> Tensor:
    """The labels of every so many voxels, as a view."""
    fine, coarse = y.shape[y.ndim - x.ndim + 2 :], x.shape[2:]
    if any(not b or a % b for a, b in zip(fine, coarse, strict=True)):
        raise ValueError(
            f"labels of {tuple(fine)} voxels cannot be taken at a resolution of {tuple(coarse)}: "
            f"each side must be a whole multiple"
        )
    for axis, (a, b) in enumerate(zip(fine, coarse, strict=True), y.ndim - len(fine)):
        y = y[(slice(None),) * axis + (slice(None, None, a // b),)]
    return y
