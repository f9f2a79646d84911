"""The losses: plain arithmetic on statistics, small values that add and scale.

    Dice(smooth=1) + 0.5 * CrossEntropy()

A term sees the sums of each sample and class, (K, N, C) in float64, a NumPy array or a torch
tensor, and never a voxel. Values are written once for both libraries; their derivative, of NumPy
arrays, is written beside them, and torch finds its own. `TERMS` lists them all, with formula,
source and what others call them.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import numpy as np

from .. import spec
from .entropy import BinaryCrossEntropy, CrossEntropy, Entropy, Focal, SigmoidFocal
from .overlap import (
    MCC,
    Dice,
    FocalTversky,
    GeneralizedDice,
    Jaccard,
    LogCoshDice,
    LogDice,
    Overlap,
    Tversky,
)
from .terms import Ratio, Sum, Sums, Term, assign, times

__all__ = [
    "MCC",
    "TERMS",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dice",
    "Entropy",
    "Entry",
    "Focal",
    "FocalTversky",
    "GeneralizedDice",
    "Jaccard",
    "LogCoshDice",
    "LogDice",
    "Overlap",
    "Ratio",
    "SigmoidFocal",
    "Sum",
    "Sums",
    "Term",
    "Tversky",
    "dice",
    "term",
    "times",
]


class Entry(NamedTuple):
    """A term of the family."""

    term: type[Term]
    formula: str
    source: str
    elsewhere: str  # what other libraries call it

    @property
    def statistics(self) -> str:
        """The sums that it needs, by letter."""
        letters = {"power": "I, P", "gamma": "H", "binary_gamma": "B+, B-"}
        return ", ".join([*(letters[field] for field in self.term().needs), "Y"])


TERMS = (
    Entry(
        Dice,
        "1 - 2 I / (P + Y)",
        "Milletari et al., V-Net, 2016 (p = 2)",
        "MONAI DiceLoss, nnU-Net SoftDiceLoss, SMP DiceLoss",
    ),
    Entry(
        Jaccard,
        "1 - I / (P + Y - I)",
        "Rahman & Wang, 2016",
        "MONAI DiceLoss(jaccard=True), SMP JaccardLoss",
    ),
    Entry(
        Tversky,
        "1 - I / (I + alpha (P - I) + beta (Y - I))",
        "Salehi et al., 2017",
        "MONAI TverskyLoss, SMP TverskyLoss",
    ),
    Entry(
        FocalTversky,
        "(1 - Tversky score)^gamma",
        "Abraham & Khan, 2019",
        "SMP TverskyLoss(gamma=), of the mean",
    ),
    Entry(LogDice, "-log(2 I / (P + Y))", "Wong et al., 2018", "SMP DiceLoss(log_loss=True)"),
    Entry(LogCoshDice, "log cosh(1 - 2 I / (P + Y))", "Jadon, 2020", ""),
    Entry(
        GeneralizedDice,
        "1 - 2 sum w I / sum w (P + Y), w = 1 / Y^2",
        "Sudre et al., 2017",
        "MONAI GeneralizedDiceLoss",
    ),
    Entry(
        MCC,
        "1 - (I V - P Y) / sqrt(P Y (V - P) (V - Y))",
        "Abhishek & Hamarneh, 2021",
        "MONAI MCCLoss, SMP MCCLoss",
    ),
    Entry(CrossEntropy, "sum w H / sum w Y", "torch", "torch CrossEntropyLoss"),
    Entry(Focal, "sum w H / V", "Lin et al., 2017", "MONAI FocalLoss(use_softmax=True)"),
    Entry(BinaryCrossEntropy, "sum w (u B+ + B-) / (C V)", "torch", "torch BCEWithLogitsLoss"),
    Entry(SigmoidFocal, "sum w (B+ + B-) / (C V)", "Lin et al., 2017", "MONAI FocalLoss"),
)


def dice(weight: Any, ignore_channel: Any, smooth: Any, p: Any, reduction: Any) -> Dice:
    """Dice with the options of `dice_core.loss`; reduction "batch" is that of the pooled batch."""
    try:
        term = _dice(ignore_channel, smooth, p, reduction)
    except TypeError:  # of what does not hash, and of what does not fit
        term = _dice.__wrapped__(ignore_channel, smooth, p, reduction)
    if weight is None:
        return term
    term = copy.copy(term)
    assign(term, weight=weight if hasattr(weight, "requires_grad") else spec.weights(weight))
    return term


@functools.lru_cache(typed=True)
def _dice(ignore_channel: Any, smooth: Any, p: Any, reduction: Any) -> Dice:
    pool = "none"
    if spec.reduction(reduction) == "batch":
        pool, reduction = "batch", "sum"
    return Dice(ignore_channel=ignore_channel, smooth=smooth, p=p, pool=pool, reduction=reduction)


def term(loss: Any, **options: Any) -> Term:
    """`loss` itself, if it is a term and the options of `dice` beside it are as they are unasked.

    Raises TypeError naming what does not fit.
    """
    if not isinstance(loss, Term):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"loss must be a term such as dice_core.losses.Dice(), got {kind}")
    for name, value in options.items():
        if value is not UNASKED[name] and not (np.ndim(value) == 0 and value == UNASKED[name]):
            raise TypeError(f"{name} goes to the term, if there is one: {loss.name}({name}=...)")
    return loss


UNASKED = {"weight": None, "ignore_channel": -1, "smooth": 0, "p": 1, "reduction": "mean"}
