"""Losses of segmentation_models_pytorch by its names and arguments, one pass over the logits.

In place of `segmentation_models_pytorch.losses`. Each is the mean over classes of 1 - q, or with
log_loss of -log max(q, eps), with

    q = (I + smooth) / max(I + alpha (P - I) + beta (Y - I) + smooth, eps)

of the sums over all samples; a class that no label has counts 0. Scores are the softmax of the
logits (mode "multiclass") or each channel's sigmoid ("binary", "multilabel"), or y_pred itself
with from_logits=False. `classes` are those in the mean, which class_weights, (C,) numbers, weigh.
Voxels labelled ignore_index do not count, in "multilabel" for that channel alone.

Values and gradients are SMP's, with these differences:

- Sums are added in float64. The loss is float64 for float64 logits, else float32, for half too.
- Labels of any integer dtype, and floats that hold such, not int64 alone. Labels that are no class,
  and what else does not fit, raise ValueError; on a GPU such labels make the loss NaN, as
  everywhere in dice_core.
- The derivative of 0**gamma is 0, not NaN. Class weights that sum to 0 raise ValueError.
- A number for classes or class_weights, which SMP takes for None, raises TypeError; a list of one
  weight for several classes ValueError. "multiclass" needs two channels at least,
  and log_loss an eps between 0 and 1.
- With from_logits=False scores must lie in [0, 1], and where one is exactly 0 or 1 and right its
  derivative is that of the product, not of the minimum, of score and label.

NotImplementedError, naming the argument, stands for soft targets (SMP sums min(score, target),
which only for targets of 0 and 1 is the product) and for targets that require grad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import losses
from ..losses.overlap import LogScore
from ..torch import loss
from . import _shared

__all__ = [
    "BINARY_MODE",
    "MULTICLASS_MODE",
    "MULTILABEL_MODE",
    "DiceLoss",
    "JaccardLoss",
    "TverskyLoss",
]

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"


class _OverlapLoss(nn.Module):
    alpha: float
    beta: float
    gamma = 1.0

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if mode not in (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE):
            raise AssertionError(f"mode must be binary, multiclass or multilabel, got {mode!r}")
        if mode == BINARY_MODE and class_weights is not None:
            raise ValueError("class_weights are of several classes, and mode='binary' has one")
        if mode == BINARY_MODE and classes is not None:
            raise AssertionError("classes are some of several, and mode='binary' has one")
        self.mode = mode
        self.classes = _numbers(classes, "classes", torch.long)
        self.from_logits = from_logits
        self.smooth = smooth
        self.eps = eps
        self.log_loss = log_loss
        self.ignore_index = ignore_index
        self.class_weights = _numbers(class_weights, "class_weights", torch.float)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Logits (N, C, *), or for "binary" (N, *), and labels (N, *), (N, 1, *), or for
        "multilabel" (N, C, *) -> the loss.
        """
        x, y, activation = y_pred, y_true, "none"
        if len(y) != len(x):
            raise AssertionError(f"y_true has {len(y)} samples and y_pred {len(x)}")
        if y.requires_grad:
            raise NotImplementedError("y_true requires grad, and dice_core has none for it")
        if self.mode == BINARY_MODE:  # one class, whatever the axes
            x = x if x.shape[1] == 1 else x.unsqueeze(1)
        elif self.mode == MULTICLASS_MODE and x.shape[1] == 1:
            raise ValueError("mode='multiclass' needs at least two channels; one is 'binary'")
        shape = (len(x), *x.shape[2:]) if self.mode == MULTICLASS_MODE else x.shape
        if self.mode != MULTILABEL_MODE and y.numel() != math.prod(shape):
            raise AssertionError(f"y_true has shape {tuple(y.shape)}, y_pred {tuple(x.shape)}")
        y = y.reshape(shape)
        if self.mode == MULTICLASS_MODE:
            y = _shared.class_labels(y)
        elif _shared.soft(y):
            raise NotImplementedError("y_true must hold 0 and 1: minima with soft ones are no sums")
        if self.from_logits:
            activation = "softmax" if self.mode == MULTICLASS_MODE else "sigmoid"
        return loss(
            x, y, self._term(x.shape[1]), ignore_label=self.ignore_index, activation=activation
        )

    def _term(self, channels: int) -> losses.Term:
        weight = self._weight(channels)
        settings: dict[str, Any] = {
            "alpha": self.alpha,
            "beta": self.beta,
            "smooth": self.smooth,
            "floor": self.eps,
            "pool": "batch",
            "absent": "zero",
            "weight": weight,
            "divisor": "classes" if weight is None else "weights",
        }
        kinds = (losses.Tversky, losses.FocalTversky), (_LogTversky, _LogFocalTversky)
        plain, focal = kinds[bool(self.log_loss)]
        if self.log_loss:
            settings["eps"] = self.eps
        if self.gamma == 1:
            return plain(**settings)
        return focal(**settings, gamma=self.gamma, of_mean=True)

    def _weight(self, channels: int) -> Any:
        """(C,): how much each class counts in the mean; None for all alike."""
        if self.classes is None and self.class_weights is None:
            return None
        weight = np.ones(channels)
        if self.class_weights is not None:
            weight = self.class_weights.double().cpu().numpy()
        if self.classes is not None:  # some of them, maybe several times
            times = np.zeros(len(weight))
            np.add.at(times, self.classes.cpu().numpy(), 1)
            weight = weight * times
        if weight.sum() == 0:
            name = "classes" if self.class_weights is None else "class_weights"
            raise ValueError(f"the {name} leave nothing: their weights sum to 0")
        return weight


class DiceLoss(_OverlapLoss):
    """The module's loss with alpha = beta = 1/2."""

    alpha = beta = 0.5


class JaccardLoss(_OverlapLoss):
    """The module's loss with alpha = beta = 1."""

    alpha = beta = 1.0


class TverskyLoss(DiceLoss):
    """The module's loss to the power of gamma."""

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights
        )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _LogTversky(LogScore, losses.Tversky):
    """-log q of each class's Tversky score q."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _LogFocalTversky(LogScore, losses.FocalTversky):
    """(mean of -log q)^gamma."""


def _numbers(values: Any, name: str, dtype: torch.dtype) -> Tensor | None:
    if values is None:
        return None
    if not isinstance(values, (list, tuple, np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a list, got {values!r}")
    return torch.as_tensor(values).to(dtype)
