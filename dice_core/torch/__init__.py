"""The loss with autograd, on torch tensors.

Two torch operators are all that touches voxels, the losses are ordinary torch arithmetic on (N, C)
numbers. On plain tensors that arithmetic would take longer than many images: there a loss is a
single node of the graph, its arithmetic NumPy's or, on a GPU, part of the kernels. Between forward
and backward only x, y and numbers of that size are kept.
"""

from .functional import dice_loss, loss, statistics
from .metrics import DiceScore
from .modules import (
    DeepSupervision,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    Loss,
    TverskyLoss,
)

__all__ = [
    "DeepSupervision",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "DiceScore",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "Loss",
    "TverskyLoss",
    "dice_loss",
    "loss",
    "statistics",
]
