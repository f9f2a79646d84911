"""Penalties: functions of a score q and of 1 - q, and their derivatives.

Both are given, since one cannot be computed from the other without cancellation where it is small.

Values are written for NumPy and torch alike, derivatives for NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .terms import Array, namespace


class Penalty(Protocol):
    """A function of a score q, given as q and 1 - q."""

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        ...

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative with respect to 1 - q, a single number if it is constant."""
        ...


@dataclass(frozen=True)
class Power:
    """(1 - q)^gamma, with value and derivative 0 where 1 - q is 0."""

    gamma: float

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        where = namespace(loss).where
        return where(loss <= 0, 0.0, where(loss <= 0, 1.0, loss) ** self.gamma)

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative."""
        positive = np.where(loss <= 0, 1.0, loss)
        return np.where(loss <= 0, 0.0, self.gamma * positive ** (self.gamma - 1))


@dataclass(frozen=True)
class RawPower:
    """(1 - q)^gamma in plain floating-point arithmetic: the derivative at 0 is infinite for gamma <
    1, and a negative 1 - q gives NaN for a fractional gamma.
    """

    gamma: float

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        return loss**self.gamma

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative."""
        if self.gamma == 0:
            return np.zeros_like(loss)
        return self.gamma * loss ** (self.gamma - 1)


@dataclass(frozen=True)
class NegativeLog:
    """-log max(q, eps), with derivative 0 where q is below eps."""

    eps: float

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        xp = namespace(loss)
        high = -xp.log1p(-xp.clip(loss, None, min(0.5, 1 - self.eps)))
        return xp.where(score < 0.5, -xp.log(xp.clip(score, self.eps, None)), high)

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative."""
        return np.where(score >= self.eps, 1 / np.maximum(score, self.eps), 0.0)


@dataclass(frozen=True)
class LogCosh:
    """log cosh (1 - q)."""

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        xp = namespace(loss)
        size = abs(loss)
        # cosh x = 1 + 2 sinh(x/2)^2, and log cosh x = x - log 2 + log(1 + exp(-2 x)).
        small = xp.log1p(2 * xp.sinh(xp.clip(size, None, 1.0) / 2) ** 2)
        return xp.where(size < 1, small, size + (xp.log1p(xp.exp(-2 * size)) - math.log(2)))

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative."""
        return np.tanh(loss)


@dataclass(frozen=True)
class NegativeScore:
    """-q, nnU-Net's Dice loss."""

    def value(self, score: Array, loss: Array) -> Array:
        """The penalty of these scores."""
        return -score

    def slope(self, score: Array, loss: Array) -> Any:
        """Its derivative."""
        return 1.0
