"""How well decisions fit labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import spec
from . import operators


class DiceScore(torch.nn.Module):
    """The Dice of each class of what logits decide for, over all that it was given: update, compute
    and reset, as torchmetrics has them.

    `compute` gives (C,), NaN for a class in neither decisions nor labels: the Dice of all voxels
    together, or with `per_sample` the mean of the samples', of those that have one. `iou` gives the
    IoU instead. Called, it updates and gives that of the batch.

    >>> import torch, dice_core.torch
    >>> score = dice_core.torch.DiceScore()
    >>> score.update(torch.eye(3)[None], torch.tensor([[0, 1, 1]]))
    >>> score.compute()
    tensor([1.0000, 0.6667, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        ignore_label: int | None = -1,
        activation: str = "softmax",
        per_sample: bool = False,
        iou: bool = False,
    ) -> None:
        super().__init__()
        spec.one_of(activation, "activation", tuple(spec.HARD))
        self.ignore_label, self.activation = spec.label(ignore_label), activation
        self.per_sample, self.iou = per_sample, iou
        self.reset()

    def reset(self) -> None:
        """Forgets what it was given."""
        self.total: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Takes logits (N, C, *) and labels (N, *), (N, 1, *) or like x."""
        sums = self._sums(x, y)
        self.total = sums if self.total is None else self.total + sums

    def compute(self) -> Tensor:
        """(C,) of all that it was given. Raises RuntimeError if that is nothing."""
        if self.total is None:
            raise RuntimeError("DiceScore.compute was called before update")
        return self._score(self.total)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Updates; (C,) of these alone."""
        sums = self._sums(x, y)
        self.total = sums if self.total is None else self.total + sums
        return self._score(sums)

    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """Numerator and denominator of each class, (2, C)."""
        asked = spec.Spec(spec.HARD[self.activation], 1, self.ignore_label)
        asked, options = operators.checked(x.detach(), y, asked, None, None, None)
        both, decided, there = torch.ops.dice_core.statistics(x.detach(), y, *options)[:3]
        num, den = both, decided + there - both if self.iou else (decided + there) / 2
        if self.per_sample:
            num, den = (num / den).nan_to_num(0), (den > 0).to(den)
        return torch.stack([num.sum(0), den.sum(0)])

    @staticmethod
    def _score(sums: Tensor) -> Tensor:
        return sums[0] / sums[1]
