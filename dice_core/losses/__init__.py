"""The losses: small objects that can be added and scaled, computed from the sums over voxels.

    Dice(smooth=1) + 0.5 * CrossEntropy()

A loss here is a term: a function of `dice_core.Statistics`, the sums of each sample and class as
NumPy arrays or torch tensors. It never accesses voxels. Its value is written once for both
libraries; its derivative is written for NumPy only, since torch has autograd. `TERMS` lists every
loss with its formula, its source and its names in other libraries.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

from .. import checks
from .cross_entropy import BinaryCrossEntropy, CrossEntropy, Focal, SigmoidFocal, VoxelLoss
from .overlap import (
    MCC,
    Dice,
    FocalTversky,
    GeneralizedDice,
    Jaccard,
    LinearOverlap,
    LogCoshDice,
    LogDice,
    Overlap,
    Tversky,
)
from .terms import PLAIN, Ratio, Settings, Sum, Term, assign

__all__ = [
    "MCC",
    "TERMS",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dice",
    "Focal",
    "FocalTversky",
    "GeneralizedDice",
    "Jaccard",
    "LinearOverlap",
    "LogCoshDice",
    "LogDice",
    "Overlap",
    "Ratio",
    "Settings",
    "SigmoidFocal",
    "Sum",
    "Term",
    "Tversky",
    "VoxelLoss",
]


def __dir__() -> list[str]:
    return __all__


class Entry(NamedTuple):
    """A row of the table of losses."""

    term: type[Term]
    formula: str
    source: str
    peers: str  # its names in other libraries

    @property
    def statistics(self) -> str:
        """The sums that it needs, as letters."""
        letters = {"p": "I, P", "gamma": "H", "binary_gamma": "B+, B-"}
        return ", ".join([*(letters[option] for option, _ in self.term().needs), "Y"])


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


def of(
    term: Any,
    weight: Any = None,
    ignore_channel: Any = -1,
    smooth: Any = 0.0,
    p: Any = 1,
    reduction: Any = "mean",
) -> Term:
    """`term`, or if that is None, Dice with these options of `dice_core.loss`.

    Raises TypeError or ValueError for invalid options, and for options beside a term, which has its
    own.
    """
    if term is None:
        options = ignore_channel, smooth, p, reduction
        if (
            type(smooth) in PLAIN
            and type(p) is int
            and type(ignore_channel) is int
            and type(reduction) is str
        ):
            dice = _dice(*options)
        else:  # a tensor is hashed by identity, and may change
            dice = _dice.__wrapped__(*options)
        return dice if weight is None else _weighted(dice, weight)
    if not isinstance(term, Term):
        kind = f"the class {term.__name__}" if isinstance(term, type) else type(term).__name__
        raise TypeError(f"term must be a loss such as dice_core.losses.Dice(), got {kind}")
    for name, value, default in (
        ("weight", weight, None),
        ("ignore_channel", ignore_channel, -1),
        ("smooth", smooth, 0),
        ("p", p, 1),
        ("reduction", reduction, "mean"),
    ):
        if value is not default and not (isinstance(value, PLAIN) and value == default):
            raise TypeError(
                f"{name} cannot be combined with term=: give it to the term, "
                f"{term.name}({name}=...)"
            )
    return term


@functools.lru_cache(typed=True)
def _dice(ignore_channel: Any, smooth: Any, p: Any, reduction: Any) -> Dice:
    return Dice(ignore_channel=ignore_channel, smooth=smooth, p=p, reduction=reduction)


def _weighted(dice: Dice, weight: Any) -> Dice:
    dice = copy.copy(dice)  # its other settings are checked already
    weight = weight if hasattr(weight, "requires_grad") else checks.weight(weight)
    assign(dice, weight=weight, weights=(weight,), _ratios={})
    return dice
