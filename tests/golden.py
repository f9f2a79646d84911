"""Stored values that no release may leave: inputs, exact in every dtype, and the naive code's sums,
losses and digests of gradients for them, in float64.

`python tests/golden.py --write` computes `golden.json` anew, from `naive.py` and the formulas below
alone. Do so when a case is added, never to make a test pass.
"""

import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import naive
import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
POSITIONS = 8  # of a gradient, stored as they are

# ---- inputs --------------------------------------------------------------------------------------


def integers(count: int, below: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Knuth's linear congruential generator, which depends on no library."""
    state, numbers = seed, []
    for _ in range(count):
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        numbers.append((state >> 33) % below)
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class Case:
    """Logits that are multiples of 1/8 up to 6 times `scale`, and labels or targets."""

    shape: tuple[int, ...]
    terms: tuple[str, ...]
    sums: dict[str, Any] = field(default_factory=dict)  # options of `statistics`
    kind: str = "labels"  # or "soft", "binary": targets like x
    labels: int = 0  # how many different ones; 0 means as many as classes
    scale: float = 1

    def x(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Numbers with at most seven significant bits."""
        numbers = integers(math.prod(self.shape), 97, 1).reshape(self.shape)
        if self.sums.get("activation") == "none":
            return numbers / 128
        return (numbers - 48) / 8 * self.scale

    def y(self) -> np.ndarray[Any, Any]:
        """Labels (uint8), soft targets in quarters (float32) or binary ones (bool)."""
        if self.kind == "labels":
            shape = (self.shape[0], *self.shape[2:])
            below = self.labels or max(2, self.shape[1])
            return integers(math.prod(shape), below, 2).reshape(shape).astype(np.uint8)
        numbers = integers(math.prod(self.shape), 5, 2).reshape(self.shape)
        return numbers > 2 if self.kind == "binary" else (numbers / 4).astype(np.float32)

    @property
    def checksum(self) -> int:
        """Of the inputs."""
        return zlib.crc32(self.x().tobytes() + self.y().tobytes())

    @property
    def grad_loss(self) -> float:
        """The incoming gradient, which keeps that of a voxel within the range of float16."""
        return 2.0 ** round(math.log2(math.prod((self.shape[0], *self.shape[2:]))))


EVERY = {"gamma": 0.0, "nll": True, "binary_gamma": 0.0}
OVERLAPS = ("Dice()", "Jaccard(smooth=1)", "Tversky(alpha=0.3, beta=0.7)", "MCC()")
OF_DICE = ("LogDice()", "LogCoshDice()", "FocalTversky()", "GeneralizedDice()")
ENTROPIES = ("CrossEntropy()", "Focal(gamma=2)", "Dice(smooth=1) + 0.5 * CrossEntropy()")
TERMS = (*OVERLAPS, *OF_DICE, *ENTROPIES)
SIGMOID = ("BinaryCrossEntropy()", "SigmoidFocal(gamma=2)", "Dice(smooth=1)")
CASES = {
    "small": Case((2, 3, 7, 9), TERMS, EVERY),
    "one channel": Case((3, 1, 35), (*OVERLAPS, "CrossEntropy()"), EVERY),
    "ignored label": Case((1, 5, 4, 5, 6), TERMS, {**EVERY, "ignore_label": 5}, labels=6),
    "many classes": Case((1, 33, 130), ("Dice()", "GeneralizedDice()", "CrossEntropy()"), EVERY),
    "squares": Case((2, 4, 61), ("Dice(p=2)", "Dice(p=2, smooth=1)"), {"p": 2}),
    "cubes": Case((2, 2, 65), ("Dice(p=3)",), {"p": 3}),
    "soft targets": Case((2, 3, 70), ("Dice()", "CrossEntropy()"), EVERY, kind="soft"),
    "regions": Case((2, 4, 37), SIGMOID, {**EVERY, "activation": "sigmoid"}, kind="binary"),
    "soft regions": Case((1, 2, 129), SIGMOID, {**EVERY, "activation": "sigmoid"}, kind="soft"),
    "probabilities": Case((2, 3, 50), ("Dice()", "Jaccard()"), {"activation": "none"}),
    "confident": Case((2, 3, 300), ("Dice()", "CrossEntropy()"), EVERY, scale=8),
    "absent classes": Case((2, 4, 90), ("Dice(smooth=1)", "Focal(gamma=2)"), EVERY, labels=2),
    "several blocks": Case((1, 2, 9001), ("Dice()", "Focal(gamma=2)"), EVERY),
}

# ---- the naive code ------------------------------------------------------------------------------


def ratio(num: Tensor, den: Tensor) -> Tensor:
    """The mean over samples and classes of 1 - num / den."""
    return (1 - num / den).mean()


def generalized(i: Tensor, p: Tensor, t: Tensor) -> Tensor:
    """Sudre's loss, of samples with labels of every class."""
    w = 1 / t**2
    return (1 - 2 * (w * i).sum(1) / (w * (p + t)).sum(1)).mean()


def cross_entropy(i: Tensor, p: Tensor, t: Tensor, h: Tensor, *m: Tensor) -> Tensor:
    """The mean over voxels; m is the number of voxels for soft targets."""
    return h.sum() / (m[0].mean(1).sum() if m else t.sum())


def binary(i: Tensor, p: Tensor, t: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """The mean over voxels and classes."""
    return (a + b).sum() / m.sum()


def mcc(i: Tensor, p: Tensor, t: Tensor) -> Tensor:
    """Matthews correlation coefficient."""
    v = t.sum(1, keepdim=True)
    return (1 - (i * v - p * t) / (p * t * (v - p) * (v - t)).sqrt()).mean()


# Each with the options of `naive.statistics` that it needs.
FORMULAS: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "Dice()": ({}, lambda i, p, t, *m: ratio(2 * i, p + t)),
    "Dice(smooth=1)": ({}, lambda i, p, t, *m: ratio(2 * i + 1, p + t + 1)),
    "Dice(p=2)": ({"p": 2}, lambda i, p, t: ratio(2 * i, p + t)),
    "Dice(p=2, smooth=1)": ({"p": 2}, lambda i, p, t: ratio(2 * i + 1, p + t + 1)),
    "Dice(p=3)": ({"p": 3}, lambda i, p, t: ratio(2 * i, p + t)),
    "Jaccard()": ({}, lambda i, p, t: ratio(i, p + t - i)),
    "Jaccard(smooth=1)": ({}, lambda i, p, t: ratio(i + 1, p + t - i + 1)),
    "Tversky(alpha=0.3, beta=0.7)": ({}, lambda i, p, t: ratio(i, 0.3 * p + 0.7 * t)),
    "MCC()": ({}, mcc),
    "LogDice()": ({}, lambda i, p, t: -(2 * i / (p + t)).log().mean()),
    "LogCoshDice()": ({}, lambda i, p, t: (1 - 2 * i / (p + t)).cosh().log().mean()),
    "FocalTversky()": ({}, lambda i, p, t: ((1 - i / (0.3 * p + 0.7 * t)) ** 0.75).mean()),
    "GeneralizedDice()": ({}, generalized),
    "CrossEntropy()": ({"gamma": 0.0}, cross_entropy),
    "Focal(gamma=2)": ({"gamma": 2.0}, cross_entropy),
    "Dice(smooth=1) + 0.5 * CrossEntropy()": (
        {"gamma": 0.0},
        lambda i, p, t, h: ratio(2 * i + 1, p + t + 1) + 0.5 * cross_entropy(i, p, t, h),
    ),
    "BinaryCrossEntropy()": ({"binary_gamma": 0.0}, binary),
    "SigmoidFocal(gamma=2)": ({"binary_gamma": 2.0}, binary),
}


def digest(grad: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A gradient in a few numbers. Its sum is no use: over the classes, softmax makes it 0."""
    flat = grad.astype(np.float64).ravel()
    vector = integers(flat.size, 129, 3) / 64 - 1  # in [-1, 1]
    where = integers(POSITIONS, flat.size, 4)
    return {
        "largest": float(np.abs(flat).max()),
        "absolute": math.fsum(np.abs(flat)),
        "squares": math.fsum(flat * flat),
        "dot": math.fsum(flat * vector),
        "at": flat[where].tolist(),
    }


def expected(case: Case) -> dict[str, Any]:
    """What the file holds for a case."""
    x = torch.from_numpy(case.x())
    y = torch.from_numpy(case.y())
    shared = {name: case.sums[name] for name in ("activation", "ignore_label") if name in case.sums}
    result: dict[str, Any] = {
        "inputs": case.checksum,
        "statistics": [s.tolist() for s in naive.statistics(x, y, **case.sums)],
    }
    for term in case.terms:
        options, formula = FORMULAS[term]
        leaf = x.clone().requires_grad_()
        value = formula(*naive.statistics(leaf, y, **options, **shared))
        (grad,) = torch.autograd.grad(value, leaf, torch.tensor(case.grad_loss).to(value))
        result[term] = {"value": value.item(), **digest(grad.numpy())}
    return result


def text(content: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each entry of a case. Floats are read back as they were."""
    cases = []
    for name, entries in content.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        cases.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(cases) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {sys.argv[0]} --write")
    FILE.write_text(text({name: expected(case) for name, case in CASES.items()}))
