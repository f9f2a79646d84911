"""The relative error of gradients beside that of the naive code, from random to near-perfect
predictions: `python -m tests.precision` prints the table.

The truth has 400 digits: the difference quotient of the loss as written, in mpmath.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import naive

import dice_core
from dice_core import losses

Array = np.ndarray[Any, Any]

GAPS = (0, 2, 5, 8, 10, 15, 20, 40, 80)  # of the logit of the labelled class above the others
SMOOTH = 1e-5


class Loss(NamedTuple):
    """A loss as dice_core's term, and as a function of the sums I, P, Y and those that follow, for
    each class: of tensors, or of mpmath's numbers.
    """

    term: Callable[[int], losses.Term]  # of p
    of_sums: Callable[..., Any]
    options: dict[str, Any]  # of the sums


def dice(i: Any, p: Any, y: Any, *others: Any) -> Any:
    """The mean of 1 - (2 I + smooth) / (P + Y + smooth)."""
    ratios = [(2 * a + SMOOTH) / (b + c + SMOOTH) for a, b, c in zip(i, p, y, strict=True)]
    return 1 - sum(ratios) / len(ratios)


def tversky(i: Any, p: Any, y: Any, *others: Any) -> Any:
    """The mean of 1 - (I + smooth) / (0.3 P + 0.7 Y + smooth)."""
    ratios = [(a + SMOOTH) / (0.3 * b + 0.7 * c + SMOOTH) for a, b, c in zip(i, p, y, strict=True)]
    return 1 - sum(ratios) / len(ratios)


def dice_and_cross_entropy(i: Any, p: Any, y: Any, h: Any, *others: Any) -> Any:
    """Dice plus the mean of -log s."""
    return dice(i, p, y) + sum(h) / sum(y)


def dice_and_binary(i: Any, p: Any, y: Any, positive: Any, negative: Any, *others: Any) -> Any:
    """Dice plus the mean of the binary cross-entropy of each class."""
    return dice(i, p, y) + (sum(positive) + sum(negative)) / (len(y) * sum(y))


LOSSES = {
    "Dice": Loss(lambda p: losses.Dice(p=p, smooth=SMOOTH), dice, {}),
    "Tversky": Loss(lambda p: losses.Tversky(p=p, smooth=SMOOTH, alpha=0.3, beta=0.7), tversky, {}),
    "Dice + CE": Loss(
        lambda p: losses.Dice(p=p, smooth=SMOOTH) + losses.CrossEntropy(),
        dice_and_cross_entropy,
        {"gamma": 0},
    ),
    "Dice + focal": Loss(
        lambda p: losses.Dice(p=p, smooth=SMOOTH) + losses.Focal(gamma=2),
        dice_and_cross_entropy,
        {"gamma": 2},
    ),
    "Dice + BCE": Loss(
        lambda p: losses.Dice(p=p, smooth=SMOOTH) + losses.BinaryCrossEntropy(),
        dice_and_binary,
        {"binary_gamma": 0},
    ),
}


def example(gap: float, classes: int, *, absent: bool = False, dtype: str = "float32") -> Any:
    """Logits (1, C, 12) with the labelled class `gap` above the others, and their labels (1, 12);
    `absent`: the last class occurs nowhere.
    """
    labels = np.arange(12) % (classes - absent)
    noise = np.sin(np.arange(classes * 12.0)).reshape(classes, 12) / 4
    x = np.where(np.arange(classes)[:, None] == labels, gap, 0.0) + noise
    return x[None].astype(dtype), labels[None]


def one_hot(x: Array, y: Array) -> Array:
    """Targets of x's shape."""
    return (y[:, None] == np.arange(x.shape[1]).reshape(-1, 1)).astype(np.uint8)


def exact(loss: Loss, x: Array, y: Array, p: int, activation: str) -> Array:
    """The gradient of a loss of labels (1, V) for the logits (1, C, V)."""
    with mpmath.workdps(400):
        columns = [[mpmath.mpf(float(v)) for v in column] for column in x[0].T]
        parts = [
            _sums(column, int(label), p, activation, loss.options)
            for column, label in zip(columns, y[0], strict=True)
        ]
        total = [
            [mpmath.fsum(row) for row in zip(*rows, strict=True)]
            for rows in zip(*parts, strict=True)
        ]
        step = mpmath.mpf(10) ** -100
        grad = np.zeros(x.shape)
        for v, column in enumerate(columns):
            for c in range(len(column)):
                values = []
                for moved in (step, -step):
                    there = [*column[:c], column[c] + moved, *column[c + 1 :]]
                    changed = _sums(there, int(y[0, v]), p, activation, loss.options)
                    values.append(
                        loss.of_sums(
                            *(
                                [a + (b - d) for a, b, d in zip(*rows, strict=True)]
                                for rows in zip(total, changed, parts[v], strict=True)
                            )
                        )
                    )
                grad[0, c, v] = (values[0] - values[1]) / (2 * step)
    return grad


def _sums(x: list[Any], label: int, p: int, activation: str, options: dict[str, Any]) -> list[Any]:
    """One voxel's part of each sum, a list with a number for each class."""
    powers = [mpmath.exp(v) for v in x]
    softmax = [e / sum(powers) for e in powers]
    sigmoid = [1 / (1 + mpmath.exp(-v)) for v in x]
    s = softmax if activation == "softmax" else sigmoid
    t = [int(c == label) for c in range(len(x))]
    rows = [[a * b for a, b in zip(s, t, strict=True)], [a**p for a in s], t]
    if "gamma" in options:
        rows.append(
            [
                -((1 - q) ** options["gamma"]) * mpmath.log(q) if own else mpmath.mpf(0)
                for q, own in zip(softmax, t, strict=True)
            ]
        )
    if "binary_gamma" in options:
        rows.append([-own * mpmath.log(q) for q, own in zip(sigmoid, t, strict=True)])
        rows.append(
            [-(1 - own) * mpmath.log(1 / (1 + mpmath.exp(v))) for v, own in zip(x, t, strict=True)]
        )
    return rows


def by_naive_code(loss: Loss, x: Array, y: Array, p: int, activation: str) -> Array:
    """The gradient by torch's autograd in x's precision."""
    logits = torch.from_numpy(x).requires_grad_()
    targets = torch.from_numpy(y if activation == "softmax" else one_hot(x, y))
    sums = naive.statistics(logits, targets, p=p, activation=activation, **loss.options)
    loss.of_sums(*(row[0] for row in sums)).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def by_dice_core(
    loss: Loss, x: Array, y: Array, p: int, activation: str, dense: bool, backend: str | None = None
) -> Array:
    """The gradient by dice_core, with `dense` of one-hot targets."""
    targets = one_hot(x, y) if dense else y
    term = loss.term(p)
    _, grad = dice_core.loss_and_grad(x, targets, term, activation=activation, backend=backend)
    return grad


def relative_error(grad: Array, truth: Array) -> float:
    """The largest relative error; of numbers below the smallest normal one, relative to that."""
    tiny = np.finfo(grad.dtype).tiny
    error = np.abs(grad.astype(np.float64) - truth) / np.maximum(np.abs(truth), tiny)
    return float(np.where(np.isnan(error), np.inf, error).max())


def peers(name: str, p: int) -> Iterator[tuple[str, Callable[[torch.Tensor, torch.Tensor], Any]]]:
    """The other libraries' losses for a softmax and labels that are equal to this one."""
    with contextlib.suppress(ImportError):
        from monai.losses import DiceCELoss, DiceLoss

        options: dict[str, Any] = {"softmax": True, "to_onehot_y": True, "squared_pred": p == 2}
        options |= {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH}
        kind = {"Dice": DiceLoss, "Dice + CE": DiceCELoss}.get(name)
        if kind and p < 3:
            yield "MONAI", kind(**options)
    with contextlib.suppress(ImportError):
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        options = {"batch_dice": False, "do_bg": True, "smooth": SMOOTH, "ddp": False}
        if p == 1 and name == "Dice":
            yield "nnU-Net", MemoryEfficientSoftDiceLoss(lambda x: x.softmax(1), **options)
        if p == 1 and name == "Dice + CE":
            yield (
                "nnU-Net",
                DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss),
            )


def by_peer(loss: Callable[[torch.Tensor, torch.Tensor], Any], x: Array, y: Array) -> Array:
    """The gradient by another library."""
    logits = torch.from_numpy(x).requires_grad_()
    loss(logits, torch.from_numpy(y)[:, None]).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def main() -> None:
    """Prints the largest relative error of the gradient for each loss and gap."""
    print(f"{'':40}" + "".join(f"{gap:>9}" for gap in GAPS))
    for name, loss in LOSSES.items():
        for activation in ("softmax", "sigmoid"):
            for p in (1, 2, 3):
                rows: dict[str, list[float]] = {}
                for gap in GAPS:
                    x, y = example(gap, 3)
                    truth = exact(loss, x, y, p, activation)
                    grads = {"naive torch": by_naive_code(loss, x, y, p, activation)}
                    if activation == "softmax":
                        grads |= {peer: by_peer(its, x, y) for peer, its in peers(name, p)}
                        grads["labels"] = by_dice_core(loss, x, y, p, activation, False)
                    grads["one-hot"] = by_dice_core(loss, x, y, p, activation, True)
                    for kind, grad in grads.items():
                        rows.setdefault(kind, []).append(relative_error(grad, truth))
                for kind, errors in rows.items():
                    head = f"{name}, {activation}, p = {p}, {kind}"
                    print(f"{head:40}" + "".join(f"{error:9.1e}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
