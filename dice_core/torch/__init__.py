"""The losses with autograd, on torch tensors.

Only two torch operators access voxels, and two more those of a fused head (`LinearLoss`); a loss is
ordinary torch arithmetic on their (N, C) sums. For many images that arithmetic would take longer
than the passes over the voxels. On plain tensors a loss is therefore a single node of the autograd
graph, computed by NumPy or, on a GPU, by the kernels. Between forward and backward only x, y and
arrays of the size of the sums are kept.
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
from .linear import LinearHead, LinearLoss
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
    "LinearHead",
    "LinearLoss",
    "Loss",
    "TverskyLoss",
    "loss",
    "statistics",
]
