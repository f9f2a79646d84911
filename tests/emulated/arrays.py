"""An array in device memory, of a library other than torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from . import memory

Array = np.ndarray[Any, Any]
WORD = 16  # bytes of the widest load or store


def dtype_of(name: str) -> np.dtype[Any]:
    special: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "bool": np.uint8}
    return np.dtype(special.get(name, name))


class DeviceArray:
    """An array in device memory, `host`.

    Has the CUDA array interface, and of the array API standard what allocates and copies arrays.
    """

    stream: int | None = None

    def __init__(self, host: Array) -> None:
        self.host = host
        self.shape, self.dtype = host.shape, host.dtype
        self.device = SimpleNamespace(id=0)

    @classmethod
    def holding(cls, array: Array) -> DeviceArray:
        """A copy on the device, with the same strides and alignment."""
        host = allocate(array.shape, array.dtype, array.strides, array.ctypes.data % WORD)
        host[...] = array
        return cls(host)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.host.__array_interface__["data"][0] if self.host.size else 0
        typestr = "<V2" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str
        return {
            "version": 3,
            "shape": self.shape,
            "strides": self.host.strides,
            "typestr": typestr,
            "data": (address, False),
            "stream": self.stream,
        }

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(
            __name__="fake",
            empty=lambda shape, dtype, device: DeviceArray(allocate(shape, dtype)),
            asarray=lambda array, device: DeviceArray.holding(array),
            **{name: dtype_of(name) for name in ("float32", "float64", "uint8")},
        )

    def __dlpack__(self, dl_device: tuple[int, int], copy: bool) -> Any:
        assert dl_device == (1, 0)
        assert copy
        return self.host.copy().__dlpack__()

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self.host[index])

    def __add__(self, other: DeviceArray) -> DeviceArray:
        return DeviceArray.holding(self.host + other.host)


def allocate(
    shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None, offset: int = 0
) -> Array:
    """An uninitialized array, whose address is `offset` modulo a word."""
    dtype = np.dtype(dtype)
    size = max(1, int(np.prod(shape))) * dtype.itemsize
    if strides is not None and 0 not in shape:
        size = memory.span(shape, [s // dtype.itemsize for s in strides]) * dtype.itemsize
    return np.ndarray(shape, dtype, memory.allocate(size, offset), strides=strides)
