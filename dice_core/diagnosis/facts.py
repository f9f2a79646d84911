"""Facts: what one pass over logits and targets finds, in blocks of bounded size."""

from __future__ import annotations

import collections
import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 1 << 19  # numbers of x in a block
DISTINCT = 1000  # out-of-range labels that are told apart


class Hits:
    """How many such numbers there are, the first one and its position."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Any = None
        self.position: tuple[int, ...] = ()

    def add(self, mask: Array, values: Array, place: Any) -> None:
        """Those of `values` where the mask is True; `place` makes a position of an index."""
        if not mask.any():
            return
        if not self.count:
            index = tuple(map(int, np.unravel_index(np.argmax(mask), mask.shape)))
            self.first, self.position = values[index].item(), place(index)
        self.count += int(mask.sum())

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return f"the first is {self.first:g} at {self.position}"


class Facts:
    """Of x (N, C, *), and y (N, *) with labels, or soft, (N, C, *). Ignored voxels are left out of
    what is said of logits that are not finite.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        classes: int,
        soft: bool,
        softmax: bool,
        ignore_label: int | None,
    ) -> None:
        samples, channels = x.shape[:2]
        self.samples, self.channels, self.classes, self.soft = samples, channels, classes, soft
        self.space = x.shape[2:]
        is_bool = y.dtype == bool  # whose bytes may be others than 0 and 1
        self.ignore_label = None if is_bool and ignore_label not in (0, 1) else ignore_label
        self.end_of_labels = 2 if is_bool else classes
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)  # if finite
        self.nan, self.infinite, self.masked = Hits(), Hits(), Hits()
        self.half_range, self.outside = Hits(), Hits()
        self.sums_to_one = channels > 1
        self.ignored = np.zeros(samples, np.int64)
        self.targets = np.zeros((samples, classes))  # labels of each class, or sums of targets
        self.wrong, self.fractional, self.not_one = Hits(), Hits(), Hits()
        self.wrong_values: collections.Counter[float] = collections.Counter()
        self.repeated = soft and channels > 1  # the same in each channel
        size = int(np.prod(self.space))
        together = max(1, BLOCK // max(1, channels * size))  # whole samples, or parts of one
        step = size if together > 1 else max(1, BLOCK // channels)
        with np.errstate(all="ignore"):
            for n in range(0, samples if size else 0, together):
                some = slice(n, n + together)
                logits = x[some].reshape(-1, channels, size)
                targets = y[some].reshape(-1, channels, size) if soft else y[some].reshape(-1, size)
                for start in range(0, size, step):
                    part = slice(start, start + step)
                    place = functools.partial(self._place, n, start)
                    target = _numbers(targets[..., part], whole=not soft)
                    valid: Any
                    if soft:
                        valid = self._add_soft(some, target, place)
                        valid = valid.any(1, keepdims=True) if softmax else valid
                    else:
                        valid = self._add_labels(some, target, place)[:, None]
                    self._add_logits(_numbers(logits[..., part]), valid, place)

    @property
    def voxels(self) -> int:
        """The number of voxels of a sample."""
        return int(np.prod(self.space))

    def _place(self, n: int, start: int, index: tuple[int, ...]) -> tuple[int, ...]:
        first, *middle, last = index
        return (n + first, *middle, *map(int, np.unravel_index(start + last, self.space or (1,))))[
            : 1 + len(middle) + len(self.space)
        ]

    def _add_logits(self, x: Array, valid: Array, place: Any) -> None:
        finite = np.isfinite(x)
        self.low = np.minimum(self.low, x.min((0, 2), where=finite, initial=np.inf))
        self.high = np.maximum(self.high, x.max((0, 2), where=finite, initial=-np.inf))
        self.outside.add(~((x >= -1e-3) & (x <= 1 + 1e-3)) & valid, x, place)
        self.half_range.add(finite & (np.abs(x) > 32752), x, place)
        if not finite.all():
            counted = np.broadcast_to(valid, x.shape)
            self.nan.add(np.isnan(x) & counted, x, place)
            self.infinite.add((x == np.inf) & counted, x, place)
            masked = (x == -np.inf).all(1, keepdims=True) & valid.any(1, keepdims=True)
            self.masked.add(masked, x[:, :1], place)
        if self.sums_to_one:
            self.sums_to_one = bool((np.abs(x.sum(1) - 1) < 0.01).all())

    def _add_labels(self, some: slice, y: Array, place: Any) -> Array:
        """Counts labels, and returns where they are not ignored."""
        valid = np.ones(y.shape, bool) if self.ignore_label is None else y != self.ignore_label
        self.ignored[some] += np.sum(~valid, 1)
        inside = valid & (y >= 0) & (y < self.end_of_labels)
        if y.dtype.kind == "f":
            fractional = inside & (y != np.floor(y))
            self.fractional.add(fractional, y, place)
            inside &= ~fractional
        else:
            fractional = np.zeros(y.shape, bool)
        self._add_wrong(valid & ~inside & ~fractional, y, place)
        row = np.broadcast_to(np.arange(len(y))[:, None] * self.classes, y.shape)
        keys = row[inside] + y[inside].astype(np.intp)
        counts = np.bincount(keys, minlength=len(y) * self.classes)
        self.targets[some] += counts.reshape(len(y), self.classes)
        return valid

    def _add_soft(self, some: slice, y: Array, place: Any) -> Array:
        """Adds up targets, and returns where they are not ignored."""
        valid = np.ones(y.shape, bool) if self.ignore_label is None else y != self.ignore_label
        self.ignored[some] += np.sum(~valid.any(1), 1)
        inside = valid & (y >= 0) & (y <= 1)
        self._add_wrong(valid & ~inside, y, place)
        self.targets[some] += y.sum(2, where=inside)
        self.repeated = self.repeated and bool((y == y[:, :1]).all())
        total = y.sum(1)
        self.not_one.add(inside.all(1) & (np.abs(total - 1) > 0.02), total, place)
        return valid

    def _add_wrong(self, wrong: Array, y: Array, place: Any) -> None:
        self.wrong.add(wrong, y, place)
        if wrong.any() and len(self.wrong_values) < DISTINCT:
            values, counts = np.unique(y[wrong], return_counts=True)
            self.wrong_values.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _numbers(array: Array, whole: bool = False) -> Array:
    """As float32 or float64; integers as they are if `whole`. uint16 of bfloat16 is widened."""
    if array.dtype == _BFLOAT16:
        return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)
    if array.dtype == bool:
        array = array.view(np.uint8)
    if whole and array.dtype.kind in "iu":
        return array
    return array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)


_BFLOAT16 = np.dtype([("bfloat16", np.uint16)])


def numpy_of(array: Array, dtype: str) -> Array:
    """The array, of which `_numbers` knows that it holds bfloat16, which NumPy lacks."""
    return array.view(_BFLOAT16) if dtype == "bfloat16" and array.dtype == np.uint16 else array
