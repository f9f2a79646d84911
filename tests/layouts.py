"""The same numbers in memory with other strides."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def _axis_last(a: Array, axis: int) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, axis, -1)), -1, axis)


def _inside(a: Array, room: Callable[[int], int], where: slice) -> Array:
    """A copy of `a` in the part of a larger array that `where` selects on every axis."""
    view: Array = np.zeros([room(n) for n in a.shape], a.dtype)[(where,) * a.ndim]
    view[...] = a
    return view


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": np.ascontiguousarray,
    "channels-last": lambda a: _axis_last(a, 1) if a.ndim > 1 else a.copy(),
    "batch-last": lambda a: _axis_last(a, 0),
    "fortran": np.asfortranarray,
    "crop": lambda a: _inside(a, lambda n: n + 3, slice(1, -2)),
    "stride-2": lambda a: _inside(a, lambda n: 2 * n, slice(None, None, 2)),
    "reversed": lambda a: _inside(a, lambda n: n, slice(None, None, -1)),
}
