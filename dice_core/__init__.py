"""dice_core: the Dice loss and its family, fused with softmax and one-hot encoding.

`loss`, `loss_and_grad`, `statistics`, `gradient` and `score` accept NumPy arrays, anything that
shares memory with them (torch tensors, DLPack), and GPU arrays (CuPy, numba). `dice_core.torch`
provides the same losses with autograd, as functions and as modules, `dice_core.jax` for JAX,
`dice_core.dask` for dask arrays, larger than memory; `dice_core.losses` lists all of them;
`dice_core.compat` provides drop-in replacements for the losses of MONAI, nnU-Net and
segmentation_models_pytorch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import losses
from .api import Score, gradient, loss, loss_and_grad, precompile, score, statistics
from .backends import BackendError
from .diagnosis import diagnose
from .sums import Statistics

if TYPE_CHECKING:
    from . import compat as compat
    from . import dask as dask
    from . import jax as jax
    from . import torch as torch

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "Score",
    "Statistics",
    "diagnose",
    "gradient",
    "loss",
    "loss_and_grad",
    "losses",
    "precompile",
    "score",
    "statistics",
]

_LAZY = ("compat", "dask", "jax", "torch")  # imported on first access (PEP 562)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ImportError as error:  # hasattr and inspect expect an AttributeError
            raise AttributeError(str(error), name=name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Without the adapters for JAX and dask, which help() would import, with all that they need."""
    lazy = [name for name in ("compat", "torch") if importlib.util.find_spec("torch")]
    return sorted({*globals(), *lazy})
