"""How well hard decisions fit labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import checks, spec, threads
from . import operators


class DiceScore(torch.nn.Module):
    """The Dice score of each class, of the hard decision for each voxel, over all that it was
    given: update, compute and reset, as torchmetrics has them.

    `compute` gives (C,), NaN for a class in neither decisions nor labels.

    Parameters
    ----------
    ignore_label : int or None
        Voxels with this label are ignored.
    activation : {"softmax", "sigmoid"}
        A voxel is the class of its largest logit, or of each channel whose logit is above 0.
    pool : {"batch", "none"}
        "batch": the score of all voxels together. "none": the mean of the samples' scores, of those
        that have one.
    iou : bool
        The IoU (Jaccard index) instead.
    backend, num_threads, check_labels
        As `dice_core.loss` has them.

    >>> import torch, dice_core.torch
    >>> score = dice_core.torch.DiceScore()
    >>> score.update(torch.eye(3)[None], torch.tensor([[0, 1, 1]]))
    >>> score.compute()
    tensor([1.0000, 0.6667, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        ignore_label: int | None = -1,
        *,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        pool: Literal["batch", "none"] = "batch",
        iou: bool = False,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
    ) -> None:
        super().__init__()
        checks.one_of(activation, "activation", tuple(spec.DECISIONS))
        checks.one_of(pool, "pool", ("batch", "none"))
        decision = spec.DECISIONS[activation]
        self.spec = spec.Spec(decision, ignore_label=checks.ignore_label(ignore_label))
        self.pool, self.iou = pool, iou
        threads_asked = None if num_threads is None else threads.resolve(num_threads)
        self.options = backend, threads_asked, check_labels
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
        return self.total[0] / self.total[1]

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Updates; (C,) of these alone."""
        sums = self._sums(x, y)
        self.total = sums if self.total is None else self.total + sums
        return sums[0] / sums[1]

    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """Numerator and denominator of each class, (2, C)."""
        operators.check(x, y, self.spec)
        sums = operators.statistics(x.detach(), y, self.spec, *self.options)
        both, cardinality = sums.intersection, sums.pred_sum + sums.target_sum
        num, den = both, cardinality - both if self.iou else cardinality / 2
        if self.pool == "none":
            num, den = (num / den).nan_to_num(0), (den > 0).to(den)
        return torch.stack([num.sum(0), den.sum(0)])
