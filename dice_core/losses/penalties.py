"""Penalties: functions of the loss 1 - q of a score q, and their derivatives.

Values are written for NumPy and torch alike, derivatives for NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .terms import Array, namespace


class Penalty(Protocol):
    """A function of 1 - q."""

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        ...

    def slope(self, loss: Array) -> Any:
        """Its derivative, a single number if it is constant."""
        ...


@dataclass(frozen=True)
class Power:
    """(1 - q)^gamma, with value and derivative 0 where 1 - q is 0."""

    gamma: float

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        where = namespace(loss).where
        return where(loss > 0, where(loss > 0, loss, 1.0) ** self.gamma, 0.0)

    def slope(self, loss: Array) -> Any:
        """Its derivative."""
        positive = np.where(loss > 0, loss, 1.0)
        return np.where(loss > 0, self.gamma * positive ** (self.gamma - 1), 0.0)


@dataclass(frozen=True)
class RawPower:
    """(1 - q)^gamma in plain floating-point arithmetic: the derivative at 0 is infinite for gamma <
    1, and a negative 1 - q gives NaN for a fractional gamma.
    """

    gamma: float

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        return loss**self.gamma

    def slope(self, loss: Array) -> Any:
        """Its derivative."""
        if self.gamma == 0:
            return np.zeros_like(loss)
        return self.gamma * loss ** (self.gamma - 1)


@dataclass(frozen=True)
class NegativeLog:
    """-log max(q, eps), with derivative 0 where q is below eps."""

    eps: float

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        xp = namespace(loss)
        return -xp.log1p(-xp.clip(loss, None, 1 - self.eps))

    def slope(self, loss: Array) -> Any:
        """Its derivative."""
        return np.where(loss <= 1 - self.eps, 1 / np.maximum(1 - loss, self.eps), 0.0)


@dataclass(frozen=True)
class LogCosh:
    """log cosh (1 - q)."""

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        xp = namespace(loss)
        return xp.log(xp.cosh(loss))

    def slope(self, loss: Array) -> Any:
        """Its derivative."""
        return np.tanh(loss)


@dataclass(frozen=True)
class NegativeScore:
    """-q, nnU-Net's Dice loss."""

    def value(self, loss: Array) -> Array:
        """The penalty of these losses."""
        return loss - 1

    def slope(self, loss: Array) -> Any:
        """Its derivative."""
        return 1.0
