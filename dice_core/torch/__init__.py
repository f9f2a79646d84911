"""The losses with autograd, on torch tensors.

Two torch operators are all that touches voxels; a loss is ordinary torch arithmetic on (N, C) sums.
For plain tensors that arithmetic would take longer than many images: there a loss is a single node
of the graph, its arithmetic NumPy's or, on a GPU, part of the kernels. Between forward and backward
only x, y and numbers of that size are kept.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "dice_core.torch and dice_core.compat need PyTorch, which is not installed: "
        "pip install torch, or see pytorch.org"
    ) from None

from .functional import loss, statistics
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
    "loss",
    "statistics",
]
