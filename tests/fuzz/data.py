"""Logits and targets of any shape, dtype and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
from layouts import Array

from .arrays import FLOATS, INTEGERS, presented
from .cases import INF, NAN, Case, V


class Data:
    """Valid logits and targets in memory, and their values for the oracle."""

    @oracle.quiet
    def __init__(self, case: Case, face: str, activations: tuple[str, ...]) -> None:
        self.case, self.face = case, face
        self.activation = case.value("activation", *activations)
        self.x: Any
        known = self.activation if self.activation in activations else "softmax"
        big = case.may(0.004)
        channels = case.one(1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 8, 9, case.one(17, 20))
        samples = case.one(1, 1, 2, 2, 3, case.one(0, 1, 5)) if channels < 17 else 1
        voxels = case.one(
            1, 2, 7, 15, 16, 17, 33, 65, case.random.randrange(1, 300), case.one(0, 1025)
        )
        if big:
            samples, channels, voxels = case.one((1, 2, 40000), (2, 3, 25000), (1, 5, 30011))
        self.shape = (samples, channels, *self._space(voxels))
        self.dtype = case.one("float32", "float32", "float32", "float16", "bfloat16", "float64")
        self.classes = max(2, channels) if known == "softmax" else channels
        single = known != "softmax" and channels == 1
        self.soft = single or (channels > 1 and case.may(0.35))
        self.ignore_label = self._ignore_label()
        y = self._targets()
        x = self._logits(known, y)
        if self.soft and known == "none" and case.may(0.5):
            x = np.clip(np.abs(x.astype(np.float32)), 0, 1).astype(x.dtype)
        if case.may(0.05) and x.ndim > 2 and x.size:  # an axis of stride 0
            axis = case.random.randrange(x.ndim)
            x = np.broadcast_to(np.take(x, [0], axis), x.shape) if axis != 1 else x
        self.x_values, self.y_values = x, y
        if face != "torch" and x.strides and 0 in x.strides and x.size and "x" not in case.wrong:
            self.x = x
            case.keep("x", x)
            case.note(f"x: broadcast {x.dtype} {x.shape}")
        else:
            self.x = presented(case, x, "x", face)
        self.y = presented(case, y, "y", face)
        case.note(f"activation={self.activation!r}, ignore_label={self.ignore_label!r}")

    @property
    def eps(self) -> float:
        """The rounding error of a loss."""
        return 2.0**-53 if self.dtype == "float64" else 2.0**-24

    def _space(self, voxels: int) -> tuple[int, ...]:
        rank = self.case.one(0, 1, 1, 2, 2, 3, 3, 4)
        if rank == 0:
            return ()
        sides = [1] * rank
        for axis in range(rank - 1):
            sides[axis] = self.case.one(1, 2, 3, 4)
            voxels = -(-voxels // sides[axis])
        sides[-1] = voxels
        self.case.random.shuffle(sides)
        return tuple(sides)

    def _ignore_label(self) -> Any:
        case = self.case
        label = case.one(
            -1, -1, None, 0, 1, 255, 2, np.int64(1), np.uint8(255), -(2**40), 2**63 - 1
        )
        if case.may(0.03):
            label = case.one(2**63, 2**64 - 1, 10**30, -(2**70))
        return case.value("ignore_label", label)

    def _known_ignored(self) -> int | None:
        label = self.ignore_label
        return (
            int(label)
            if isinstance(label, (int, np.integer)) and not isinstance(label, bool)
            else None
        )

    def _targets(self) -> Array:
        y: Array
        case, ignored = self.case, self._known_ignored()
        if self.soft:
            dtype = case.one("float32", "float32", "float64", "float16", "bool", *INTEGERS[:6])
            if case.may(0.1):
                dtype = "bfloat16"
            numbers = FLOATS.get(dtype, np.dtype(dtype))
            if numbers.kind in "fV" and case.may(0.7):
                y = case.rng.random(self.shape)
                y[case.rng.random(self.shape) < 0.2] = 0
                y[case.rng.random(self.shape) < 0.2] = 1
            else:
                y = case.rng.integers(0, 2, self.shape)
            y = y.astype(numbers)
        else:
            dtype = case.one("uint8", "int64", *INTEGERS, "bool")
            numbers = np.dtype(dtype)
            space = (self.shape[0], *self.shape[2:])
            if self.case.may(0.3):
                space = (self.shape[0], 1, *self.shape[2:])
            y = case.rng.integers(0, min(self.classes, 2 if dtype == "bool" else 100), space)
            if case.may(0.3):
                y[...] = np.minimum(y, case.random.randrange(self.classes))  # absent classes
            y = y.astype(numbers)
        info = np.iinfo(numbers) if numbers.kind in "iu" else None
        if ignored is not None and y.size and case.may(0.7):
            fits = info is not None and info.min <= ignored <= info.max
            if fits or (numbers.kind in "fV" and ignored in (-1, 0, 1, 2, 255)):
                y[case.rng.random(y.shape) < 0.3] = ignored
            if case.may(0.05) and (y == y.reshape(-1)[0]).any():
                y[...] = y.reshape(-1)[0]
        if case.may(0.07) and y.size:
            self._put_out_of_range(y, ignored)
        return y

    def _put_out_of_range(self, y: Array, ignored: int | None) -> None:
        case = self.case
        place = tuple(case.random.randrange(n) for n in y.shape)
        if y.dtype == bool:
            value = case.one(2, 3, 127, 128, 255)
            if value == ignored:
                return
            y.view(np.uint8)[place] = value
        elif y.dtype.kind in "iu":
            info, top = np.iinfo(y.dtype), 2 if self.soft else self.classes
            value = case.one(top, info.max, info.min, top + 1, -1, -2, 2**32, 2**40)
            if not info.min <= value <= info.max or 0 <= value < top or value == ignored:
                return
        else:
            value = case.one(NAN, -0.5, 1.5, INF, -INF, 2, -1e-3, 1.01)
            if float(np.asarray(value, y.dtype)) == ignored:
                return
        if y.dtype != bool:
            y[place] = value
        case.refuse(V, "y")
        case.note(f"y{list(place)} = {value}")

    def _logits(self, activation: str, y: Array) -> Array:
        case, rng, shape = self.case, self.case.rng, self.shape
        kind = case.one(
            *["normal"] * 6, "wide", "far", "zero", "sure", "sure", "huge", "tiny", "ordered"
        )
        x = rng.standard_normal(shape)
        if activation == "none" and kind in ("normal", "far", "sure", "ordered"):
            x = rng.random(shape)
        elif kind == "wide":
            x *= 10
        elif kind == "far":
            x = x * case.one(30, 100, 1000) + case.one(0, 0, 1e4)
        elif kind == "zero":
            x *= 0
        elif kind == "sure":  # right, by a gap
            gap = case.random.uniform(0, 80)
            if self.soft:
                x = x * 0.1 + gap * (y.astype(np.float64) - 0.5)
            else:
                own = y.reshape(shape[0], 1, *shape[2:]).astype(np.float64)
                x = x * 0.1 + gap * (
                    own == np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
                )
        elif kind == "huge":
            x *= case.one(1e30, 1e4, 3e37)
        elif kind == "tiny":
            x *= case.one(1e-40, 1e-7, 1e-310)
        elif kind == "ordered" and shape[1] > 1:  # a class that nothing predicts
            x[:, case.random.randrange(shape[1])] -= case.one(20, 48, 90, 120, 400)
        limit = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38}.get(self.dtype, 1e308)
        x = np.clip(x, -limit, limit)
        case.note(f"logits {kind}")
        if x.size and case.may(0.08):
            chosen = rng.random(shape) < case.one(0.02, 0.3)
            x = np.where(chosen, rng.choice([NAN, INF, -INF], shape), x)
        elif x.size and not self.soft and case.may(0.15):  # NaN where it must not matter
            ignored = self._known_ignored()
            if ignored is not None and y.dtype != bool:
                info = np.iinfo(y.dtype)
                if info.min <= ignored <= info.max:
                    off = (y == ignored).reshape(shape[0], 1, *shape[2:])
                    x = np.where(off, rng.choice([NAN, INF, -INF, 7.0], shape), x)
        return np.ascontiguousarray(x.astype(FLOATS[self.dtype]))

    def voxels(self, **needs: Any) -> oracle.Voxels:
        """What the oracle sums."""
        x = self.x_values
        x = x.astype(np.float32) if self.dtype == "bfloat16" else x
        y = self.y_values
        y = y.astype(np.float32) if y.dtype.name == "bfloat16" else y
        count = int(np.prod(self.shape[2:], dtype=np.int64))
        x = x.astype(oracle.Real).reshape(*self.shape[:2], count)
        y = y.astype(oracle.Real)
        y = y.reshape(x.shape) if self.soft else y.reshape(self.shape[0], 1, count)
        options = {
            "p": 1, "gamma": None, "nll": False, "binary_gamma": None, "target_square": False,
            **needs, "activation": self.activation, "ignore_label": self._known_ignored(),
            "soft": self.soft,
        }  # fmt: skip
        return oracle.Voxels(x, y, self.dtype, options)

    def pooled(self, a: Array) -> Array:
        """(N, channels, V)."""
        return a.reshape(*self.shape[:2], int(np.prod(self.shape[2:], dtype=np.int64)))
