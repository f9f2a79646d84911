"""Drop-in replacements for losses of segmentation_models_pytorch: one pass over the logits and one
for their gradient, which is the only array of their size.

They replace those of `segmentation_models_pytorch.losses`. Each loss is a function of the Tversky
score ::

    q = (I + smooth) / max(I + alpha (P - I) + beta (Y - I) + smooth, eps)

of a class, where I = sum min(s, t), P = sum s and Y = sum t over the valid voxels of all samples, s
is the probability and t the target. The loss of a class is 1 - q, or -log max(q, eps) with
log_loss=True, and 0 where Y is 0. The result is the mean over classes, or over those in `classes`,
weighted by class_weights and divided by their sum. Voxels labelled ignore_index are ignored, in
mode "multilabel" for that channel alone.

Values and gradients are those of segmentation_models_pytorch 0.6, including its 0/0. The
differences:

- Sums are added in float64, class weights included, and half-precision logits are computed in
  float32: probabilities are not rounded to the logits' dtype first. The loss is float64 for float64
  logits, else float32.
- Out-of-range labels raise ValueError; on a GPU they make the loss NaN. So do soft targets, other
  than 0 and 1, in the modes "binary" and "multilabel": sum min(s, t) is a sum of products only for
  0 and 1.
- Logits of ignored voxels have no effect, not even NaN, which SMP multiplies by 0.
- There are no second derivatives, and no gradients for targets: one that requires grad raises
  NotImplementedError.
- Labels of mode "multiclass" may have any integer dtype, or be floating-point numbers, which are
  truncated before they are compared with ignore_index; without ignore_index SMP accepts int64 only.
- The keyword-only arguments backend, num_threads, check_labels and inplace are those of
  `dice_core.torch.loss`.

An error naming the argument is raised for everything else: from_logits=False (the derivative of
min(s, t) at a probability of exactly 0 or 1 is not a function of the sums), a negative smooth, eps,
alpha or beta, eps = 0 with log_loss (whether -log of a score of 0 is infinite there depends on how
SMP's sums are rounded), class weights that sum to 0 or are not one per class, an empty list of
classes, and scalars for classes or class_weights, which SMP treats as None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, losses
from ..losses.penalties import NegativeLog, RawPower
from ..losses.terms import assign
from ..spec import Spec
from ..torch.functional import evaluate, options
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
    """The loss; settings are prepared on construction, and again after one was changed."""

    alpha: float
    beta: float
    gamma: float = 1.0

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
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        if mode not in (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE):
            raise AssertionError(f"mode must be binary, multiclass or multilabel, got {mode!r}")
        if mode == BINARY_MODE and class_weights is not None:
            raise ValueError("class_weights are not supported with mode='binary'")
        if mode == BINARY_MODE and classes is not None:
            raise AssertionError("classes are not supported with mode='binary'")
        self.mode = mode
        self.classes = _numbers(classes, "classes", torch.long)
        self.from_logits = checks.flag(from_logits, "from_logits")
        self.smooth = smooth
        self.eps = eps
        self.log_loss = checks.flag(log_loss, "log_loss")
        self.ignore_index = ignore_index
        self.class_weights = _numbers(class_weights, "class_weights", torch.float)
        _check_weights(self.classes, self.class_weights)
        self._options = options(backend, num_threads, check_labels, inplace)
        self._prepare(self._settings())

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss, a scalar.

        Parameters
        ----------
        y_pred : (N, C, *) floating-point tensor
            Logits. In mode "binary" those of a single class, of any shape (N, ...).
        y_true : tensor
            "multiclass": labels (N, *) or (N, 1, *). "multilabel": 0 or 1 for each channel,
            (N, C, *). "binary": 0 or 1 for as many voxels as y_pred has.
        """
        settings = self._settings()
        if settings != self._prepared:
            self._prepare(settings)
        _shared.check_tensors(y_pred, y_true, "y_pred", "y_true")
        if y_true.requires_grad:
            _shared.refuse_gradient(y_true, "y_true")
        x = y_pred
        if y_true.shape[0] != x.shape[0]:
            raise AssertionError(f"y_true has {y_true.shape[0]} samples and y_pred {x.shape[0]}")
        if self.mode == BINARY_MODE and x.shape[1] != 1:  # one class, whatever the axes
            x = x.unsqueeze(1)
        shape = x.shape
        if self.mode == MULTICLASS_MODE:
            if shape[1] == 1:
                raise ValueError("y_pred must have at least two channels with mode='multiclass'")
            shape = shape[:1] + shape[2:]
        if y_true.numel() != math.prod(shape) or not y_true.numel():
            raise AssertionError(
                f"y_true has shape {tuple(y_true.shape)} and y_pred {tuple(y_pred.shape)}"
            )
        y = y_true if y_true.shape == shape else y_true.reshape(shape)
        if self.mode == MULTICLASS_MODE and y.is_floating_point():
            y = _shared.class_labels(y)
        term = self._term
        if self._weighted:
            weight = self._weight(x.shape[1])
            if weight is not term.weights[0]:
                term = term.with_weights([weight])
        return evaluate(x, y, term, self._request, self._options)

    def _settings(self) -> tuple[Any, ...]:
        """The settings from which the term and the request are derived."""
        return (
            self.mode,
            self.from_logits,
            self.ignore_index,
            self.alpha,
            self.beta,
            self.gamma,
            self.smooth,
            self.eps,
            self.log_loss,
            self.classes is not None or self.class_weights is not None,
        )

    def _prepare(self, settings: tuple[Any, ...]) -> None:
        self._prepared: tuple[Any, ...] = ()
        self._term, self._request = _term_and_request(*settings)
        self._prepared, self._weighted = settings, settings[-1]
        if self.class_weights is not None:
            self._term = self._term.with_weights([self.class_weights])

    def _weight(self, channels: int) -> Tensor:
        """(C,): the weight of each class in the mean."""
        classes, weights = self.classes, self.class_weights
        if classes is None:
            if weights is None or weights.shape != (channels,):
                raise ValueError(
                    f"class_weights must have {channels} entries, one per class, "
                    f"got {weights if weights is None else tuple(weights.shape)}"
                )
            return weights
        index = torch.arange(channels, device=classes.device)
        index = _picked(index, classes, "the channels of y_pred").reshape(-1)
        if weights is None:
            picked = torch.ones(index.shape, dtype=torch.float64, device=index.device)
        else:
            picked = weights.to(index.device, torch.float64)[classes].reshape(-1)
        return picked.new_zeros(channels).index_add(0, index, picked)


class DiceLoss(_OverlapLoss):
    """1 - (2 I + 2 smooth) / max(P + Y + 2 smooth, 2 eps) of each class, averaged: the module's
    loss with alpha = beta = 1/2.

    Parameters
    ----------
    mode : {"binary", "multiclass", "multilabel"}
        Probabilities are the softmax over channels in mode "multiclass", else the sigmoid of each
        channel.
    classes : sequence of int, optional
        The classes that are averaged; None for all. Not in mode "binary".
    log_loss : bool
        Whether to use -log max(q, eps) instead of 1 - q.
    from_logits : bool
        Must be True.
    smooth : float
        Added to the score's numerator and denominator, >= 0.
    ignore_index : int, optional
        Voxels with this label are ignored.
    eps : float
        The smallest denominator of the score and the smallest score of the logarithm, >= 0, > 0
        with log_loss.
    class_weights : (C,) numbers, optional
        The weights of the average. Not in mode "binary".
    backend, num_threads, check_labels, inplace : optional
        As in `dice_core.torch.loss`.

    Raises
    ------
    AssertionError, TypeError, ValueError, NotImplementedError
        For invalid arguments; the module's docstring lists the differences from SMP.
    """

    alpha = beta = 0.5


class JaccardLoss(_OverlapLoss):
    """1 - (I + smooth) / max(P + Y - I + smooth, eps) of each class, averaged: the module's loss
    with alpha = beta = 1.

    Parameters and errors are those of `DiceLoss`.
    """

    alpha = beta = 1.0


class TverskyLoss(DiceLoss):
    """The module's loss to the power of gamma: alpha weights false positives, beta false negatives.

    The power is applied to the mean over classes. Its derivative is NaN where that mean is 0 and
    gamma < 1, as SMP's is.

    Parameters
    ----------
    alpha, beta : float
        The weights, >= 0.
    gamma : float
        The exponent.

    The other parameters, and the errors, are those of `DiceLoss`.
    """

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
        *,
        backend: str | None = None,
        num_threads: int | None = None,
        check_labels: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            mode,
            classes,
            log_loss,
            from_logits,
            smooth,
            ignore_index,
            eps,
            class_weights,
            backend=backend,
            num_threads=num_threads,
            check_labels=check_labels,
            inplace=inplace,
        )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self._prepare(self._settings())


def _term_and_request(
    mode: str,
    from_logits: bool,
    ignore_index: int | None,
    alpha: float,
    beta: float,
    gamma: float,
    smooth: float,
    eps: float,
    log_loss: bool,
    weighted: bool,
) -> tuple[losses.Term, Spec]:
    """The term for these settings, with placeholders for class weights, and its request."""
    if not from_logits:
        raise NotImplementedError(
            "from_logits=False is not supported: pass logits, or probabilities to "
            "dice_core.torch.loss(..., activation='none')"
        )
    if ignore_index is not None:
        ignore_index = checks.integer(ignore_index, "ignore_index")
    eps, gamma = _shared.number(eps, "eps"), _shared.number(gamma, "gamma", signed=True)
    if log_loss and eps == 0:
        raise ValueError("eps must be greater than 0 with log_loss=True")
    term = losses.Tversky(
        alpha=_shared.number(alpha, "alpha"),
        beta=_shared.number(beta, "beta"),
        smooth=_shared.number(smooth, "smooth"),
        floor=eps,
        pool="batch",
        absent="zero",
        weight=(1.0,) if weighted else None,
        divisor="weights" if weighted else "classes",
        empty="nan",
    )
    if log_loss:
        assign(term, penalty=NegativeLog(eps))
    if gamma != 1:
        assign(term, mean_penalty=RawPower(gamma))
    if mode == MULTICLASS_MODE:
        return term, term.spec("softmax", ignore_index, "labels")
    return term, term.spec("sigmoid", ignore_index, "binary")


def _numbers(values: Any, name: str, dtype: torch.dtype) -> Tensor | None:
    if values is None:
        return None
    if not isinstance(values, (list, tuple, np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a list, got {values!r}")
    return _shared.as_tensor(values, name).to(dtype)


def _check_weights(classes: Tensor | None, weights: Tensor | None) -> None:
    if classes is not None and not classes.numel():
        raise ValueError("classes must name at least one class")
    if weights is not None:
        if weights.ndim != 1:
            raise ValueError(
                f"class_weights must have one entry per class, got shape {tuple(weights.shape)}"
            )
        total = weights.detach().double().cpu()
        if classes is not None:
            total = _picked(total, classes.cpu(), "the entries of class_weights")
        if total.sum() == 0:
            raise ValueError("the class_weights that are averaged with sum to 0")


def _picked(row: Tensor, classes: Tensor, what: str) -> Tensor:
    """The entries of these classes; raises ValueError for classes that have none."""
    try:
        return row[classes]
    except IndexError:
        raise ValueError(f"classes {classes.tolist()} are not among {what}, {len(row)}") from None
