"""Metrics of hard decisions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks, spec, threads
from . import operators, processes


class DiceScore(torch.nn.Module):
    """The Dice score of each class for hard decisions, accumulated over batches: update, compute
    and reset, as in torchmetrics.

    `compute` returns (C,), NaN for a class found in neither decisions nor labels.

    Parameters
    ----------
    ignore_label : int or None
        Voxels with this label are ignored.
    activation : {"softmax", "sigmoid"}
        A voxel has the class of its largest logit ("softmax"), or every class whose logit is above
        0 ("sigmoid").
    pool : {"batch", "none"}
        "batch": the score of all voxels together. "none": the mean over the samples whose score is
        defined.
    iou : bool
        Whether to compute the IoU (Jaccard index) instead.
    backend, num_threads, check_labels
        As in `dice_core.loss`.
    process_group : torch.distributed.ProcessGroup or "world", optional
        `compute` adds the batches of the ranks of this group, or of all ranks, which must all call
        it; a rank may have had none. What is accumulated, and what a call returns, stays local.

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
        process_group: Any = None,
    ) -> None:
        super().__init__()
        checks.one_of(pool, "pool", ("batch", "none"))
        self.spec = spec.decision(activation, ignore_label)
        self.pool, self.iou = pool, checks.flag(iou, "iou")
        thread_count = None if num_threads is None else threads.resolve(num_threads)
        self.options = backend, thread_count, check_labels
        if process_group is not None:
            processes.check(process_group)
        self.process_group = process_group
        self.reset()

    def reset(self) -> None:
        """Discards all accumulated batches."""
        self.total: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch: logits (N, C, *); labels (N, *) or (N, 1, *), or targets like x."""
        self._add(self._sums(x, y))

    def compute(self) -> Tensor:
        """The scores of all accumulated batches, (C,). Raises RuntimeError before the first."""
        total = self.total
        if self.process_group is not None:
            total = processes.added_counts(total, self.process_group)
        if total is None:
            raise RuntimeError("DiceScore.compute was called before update")
        return total[0] / total[1]

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds a batch and returns the scores of that batch alone, (C,)."""
        sums = self._sums(x, y)
        self._add(sums)
        return sums[0] / sums[1]

    def _add(self, sums: Tensor) -> None:
        if self.total is not None and self.total.shape != sums.shape:
            raise ValueError(
                f"x has {sums.shape[1]} classes, but the batches before had "
                f"{self.total.shape[1]}; call reset() in between"
            )
        self.total = sums if self.total is None else self.total + sums

    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """Numerator and denominator of each class, (2, C)."""
        operators.check(x, y, self.spec)
        sums = operators.statistics(x.detach(), y, self.spec, *self.options)
        both, cardinality = sums.intersection, sums.pred_sum + sums.target_sum
        num, den = both, cardinality - both if self.iou else cardinality / 2
        if self.pool == "none":
            num, den = (num / den).nan_to_num(0), (den > 0).to(den)
        return torch.stack([num.sum(0), den.sum(0)])
