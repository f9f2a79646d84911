"""Device memory, which is host memory: uninitialized, between bytes that no kernel may access."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIGNMENT = 256  # of an allocation, as cudaMalloc promises
POISON = 255  # each byte; NaN, read as any floating-point dtype
LIVE: dict[int, int] = {}  # allocations: address -> size in bytes


def allocate(size: int, offset: int = 0) -> np.ndarray[Any, Any]:
    """The bytes of a new allocation, `offset` bytes after an aligned address; it lives as long as
    any view of them.
    """
    padded = np.full(size + 3 * ALIGNMENT, POISON, np.uint8)
    first = -padded.ctypes.data % ALIGNMENT + ALIGNMENT + offset
    LIVE[padded.ctypes.data + first] = size
    weakref.finalize(padded, LIVE.pop, padded.ctypes.data + first)
    return padded[first : first + size]


def is_live(address: int) -> bool:
    """Whether it is in an allocation."""
    return any(start <= address < start + size for start, size in LIVE.items())


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to the last of an array with these strides, which are
    not negative.
    """
    if 0 in shape:
        return 0
    return 1 + sum(step * (n - 1) for step, n in zip(strides, shape, strict=True))
