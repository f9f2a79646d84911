"""dice_core: the Dice loss and its family on the fly.

`loss`, `loss_and_grad` and `statistics` take NumPy arrays and whatever shares their memory (torch
tensors, DLPack), or arrays on a GPU (CuPy, numba); `dice_core.torch` has the same losses with
autograd, as functions and as an `nn.Module`. Which losses there are is in `dice_core.losses`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import losses
from .api import Score, Statistics, loss, loss_and_grad, precompile, score, statistics
from .backends import BackendError

if TYPE_CHECKING:
    from . import torch

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Score",
    "Statistics",
    "loss",
    "loss_and_grad",
    "losses",
    "precompile",
    "score",
    "statistics",
    "torch",
]


def __getattr__(name: str) -> Any:
    # torch is imported when it is asked for, not before (PEP 562).
    if name == "torch":
        return importlib.import_module(f"{__name__}.torch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
