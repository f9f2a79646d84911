"""Buffer: where an array of any library lies in memory.

A library is looked up only if the caller has already imported it; nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import operator
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_HUGE_PAGE = 2 << 20  # bytes


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """How an array lies in memory, wherever that is.

    Arrays that lie alike share one, so that what follows from it is found out once.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str  # "float32", "bfloat16", "int64", "bool", ...
    itemsize: int  # bytes
    device: str  # "cpu", "cuda:0", ...

    def without_axis(self, axis: int) -> Layout:
        """The same without an axis of length 1."""
        shape, strides = list(self.shape), list(self.strides)
        del shape[axis], strides[axis]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def __str__(self) -> str:
        steps = tuple(stride // self.itemsize for stride in self.strides)
        return f"{self.dtype} {self.shape} on {self.device}, strides {steps}"


@dataclass(slots=True)  # frozen, it would take twice as long to make
class Buffer:
    """An array's memory: what a kernel needs to read or write it in place."""

    address: int
    layout: Layout
    owner: Any  # keeps the memory alive
    readonly: bool = False
    stream: int | None = None  # of a device whose work is queued

    shape = property(operator.attrgetter("layout.shape"))
    strides = property(operator.attrgetter("layout.strides"))
    dtype = property(operator.attrgetter("layout.dtype"))
    itemsize = property(operator.attrgetter("layout.itemsize"))
    device = property(operator.attrgetter("layout.device"))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Lets `np.asarray(buffer)` view host memory, copying nothing."""
        if self.device != "cpu":
            raise TypeError(f"memory on {self.device} cannot be viewed by NumPy")
        return {
            "version": 3,
            "shape": self.shape,
            "strides": self.strides,
            "typestr": np.dtype(self.dtype).str,
            # NumPy before 2.4 takes no address 0, which an empty array has.
            "data": (self.address or self.itemsize, self.readonly),
        }


def of(array: Any, name: str) -> Buffer:
    """The Buffer of an array.

    Takes NumPy arrays (memmap too), torch tensors, and objects with `__cuda_array_interface__`
    (CuPy, numba), `__dlpack__`, `__array_interface__` or the buffer protocol.

    Raises TypeError, calling the array `name`, for anything else, and for arrays whose elements
    cannot be read in place: masked, byte-swapped, misaligned, sparse.
    """
    if isinstance(array, np.ndarray):
        return _of_numpy(array, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_torch(array, name, torch)
    if hasattr(array, "__cuda_array_interface__"):
        return _of_cuda_array(array, name)
    if hasattr(array, "__dlpack__"):
        return _of_dlpack(array, name)
    if hasattr(array, "__array_interface__"):
        return _of_numpy(np.asarray(array), name)
    try:
        return _of_numpy(np.asarray(memoryview(array)), name)
    except TypeError:
        pass
    raise TypeError(
        f"{name} must be an array (NumPy, torch, CuPy, DLPack), got {type(array).__name__}; "
        f"lists and numbers are not converted, since that would copy"
    )


def empty_like(array: Any, name: str) -> Any:
    """An uninitialised array of the same kind, shape, dtype, device and, where dense, strides."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        empty = torch.empty_like(array, requires_grad=False)
        if empty.is_cpu:
            _advise_huge_pages(empty.data_ptr(), empty.nbytes)
        return empty
    return np.empty_like(np.asarray(of(array, name)), subok=False)


def _advise_huge_pages(address: int, size: int) -> None:
    """Asks Linux for huge pages for fresh memory, whose page faults cost more than a gradient.

    NumPy does so for its own arrays, from the same size; torch's allocator does not.
    """
    if size < 4 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first, stop = (
        -(-address // _HUGE_PAGE) * _HUGE_PAGE,
        (address + size) // _HUGE_PAGE * _HUGE_PAGE,
    )
    if first < stop:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def may_overlap(a: Buffer, b: Buffer) -> bool:
    """Whether the two share memory; True as well where that would take long to find out."""
    if a.device != b.device or 0 in a.shape or 0 in b.shape:
        return False
    (a_first, a_end), (b_first, b_end) = _extent(a.layout), _extent(b.layout)
    if a.address + a_end <= b.address + b_first or b.address + b_end <= a.address + a_first:
        return False
    if a.device != "cpu":
        return True
    try:
        # NumPy's stub knows only two of the numbers that max_work takes.
        return np.shares_memory(_bytes(a), _bytes(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


@functools.lru_cache(1024)
def may_overlap_itself(a: Layout) -> bool:
    """Whether two elements may lie at one address, as in a broadcast array."""
    if 0 in a.shape:
        return False
    axes = sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1)
    spans = [a.itemsize]
    for step, n in axes:
        spans.append(spans[-1] + step * (n - 1))
    return any(step < span for (step, _), span in zip(axes, spans, strict=False))


@functools.lru_cache(1024)
def _extent(a: Layout) -> tuple[int, int]:
    """Where its memory begins and ends, relative to its first element's address."""
    reach = [step * (n - 1) for step, n in zip(a.strides, a.shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + a.itemsize


def _bytes(a: Buffer) -> Any:
    """Memory of any dtype, for NumPy, which lacks some."""
    return np.asarray(replace(a, layout=replace(a.layout, dtype=f"V{a.itemsize}")))


def _of_numpy(array: np.ndarray[Any, Any], name: str) -> Buffer:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array and its mask would be ignored; "
            f"give the plain array and mark masked voxels in the labels with ignore_label"
        )
    flags = array.flags
    layout = _numpy_layout(array.shape, array.strides, array.dtype, name)
    if not flags.aligned:
        raise TypeError(_MISALIGNED.format(name, layout.itemsize))
    address = array.__array_interface__["data"][0] if array.size else 0
    return Buffer(address, layout, array, not flags.writeable)


@functools.lru_cache(1024)
def _numpy_layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], name: str
) -> Layout:
    if not dtype.isnative:
        raise TypeError(f"{name} is in another byte order ({dtype.str})")
    itemsize = dtype.itemsize
    if itemsize and any(step % itemsize for step, n in zip(strides, shape, strict=True) if n > 1):
        raise TypeError(_MISALIGNED.format(name, itemsize))
    return Layout(shape, strides, dtype.name, itemsize, "cpu")


_MISALIGNED = "{}'s elements are not aligned to their {} bytes"


def _of_torch(tensor: Any, name: str, torch: Any) -> Buffer:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} is a {str(tensor.layout)[6:]} tensor; call .to_dense() on it")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazily negated view; call .resolve_neg() on it")
    layout = _torch_layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    buffer = Buffer(tensor.data_ptr(), layout, tensor)
    if tensor.is_cuda:
        buffer.stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return buffer


@functools.lru_cache(1024)
def _torch_layout(shape: Any, steps: tuple[int, ...], dtype: Any, device: Any) -> Layout:
    return Layout(
        shape=tuple(shape),
        strides=tuple(step * dtype.itemsize for step in steps),
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        device="cpu" if device.type == "cpu" else str(device),
    )


def _of_cuda_array(array: Any, name: str) -> Buffer:
    interface = array.__cuda_array_interface__
    address, readonly = interface["data"]
    shape = tuple(interface["shape"])
    dtype = np.dtype(interface["typestr"])
    if not dtype.isnative:
        raise TypeError(f"{name} is in another byte order ({dtype.str})")
    strides = interface.get("strides") or _contiguous_strides(shape, dtype.itemsize)
    device = getattr(getattr(array, "device", None), "id", 0)
    layout = Layout(shape, tuple(strides), dtype.name, dtype.itemsize, f"cuda:{device}")
    return Buffer(address, layout, array, readonly, interface.get("stream"))


def _of_dlpack(array: Any, name: str) -> Buffer:
    kind, index = array.__dlpack_device__()
    if kind != 1:
        raise TypeError(
            f"{name} lies on DLPack device ({int(kind)}, {index}) and has no "
            f"__cuda_array_interface__; only host memory is read through DLPack"
        )
    try:
        view = np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be read through DLPack: {error}") from error
    return _of_numpy(view, name)


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides[: len(shape)])
