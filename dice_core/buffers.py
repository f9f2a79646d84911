"""Buffer: where an array of any library lies in memory.

A library is looked up only if the caller has already imported it; nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_HUGE_PAGE = 2 << 20  # bytes


@dataclass(slots=True)  # frozen, it would take twice as long to make
class Buffer:
    """An array's memory: what a kernel needs to read or write it in place."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str  # "float32", "bfloat16", "int64", "bool", ...
    itemsize: int  # bytes
    device: str  # "cpu", "cuda:0", ...
    readonly: bool
    owner: Any  # keeps the memory alive
    stream: int | None = None  # of a device whose work is queued

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

    def without_axis(self, axis: int) -> Buffer:
        """The same memory without an axis of length 1."""
        keep = [i for i in range(len(self.shape)) if i != axis]
        return replace(
            self,
            shape=tuple(self.shape[i] for i in keep),
            strides=tuple(self.strides[i] for i in keep),
        )

    def __str__(self) -> str:
        steps = tuple(stride // self.itemsize for stride in self.strides)
        return f"{self.dtype} {self.shape} on {self.device}, strides {steps}"


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
        if empty.device.type == "cpu":
            _advise_huge_pages(empty.data_ptr(), empty.numel() * empty.element_size())
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
    if a.device != "cpu":
        (a_low, a_high), (b_low, b_high) = _bounds(a), _bounds(b)
        return a_low < b_high and b_low < a_high
    try:
        # NumPy's stub knows only two of the numbers that max_work takes.
        return np.shares_memory(_bytes(a), _bytes(b), max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def may_overlap_itself(a: Buffer) -> bool:
    """Whether two elements may lie at one address, as in a broadcast array."""
    if 0 in a.shape:
        return False
    axes = sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1)
    spans = [a.itemsize]
    for step, n in axes:
        spans.append(spans[-1] + step * (n - 1))
    return any(step < span for (step, _), span in zip(axes, spans, strict=False))


def _bytes(a: Buffer) -> Any:
    """Memory of any dtype, for NumPy, which lacks some."""
    return np.asarray(replace(a, dtype=f"V{a.itemsize}"))


def _bounds(a: Buffer) -> tuple[int, int]:
    reach = [step * (n - 1) for step, n in zip(a.strides, a.shape, strict=True)]
    low = a.address + sum(r for r in reach if r < 0)
    return low, a.address + sum(r for r in reach if r > 0) + a.itemsize


def _of_numpy(array: np.ndarray[Any, Any], name: str) -> Buffer:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array and its mask would be ignored; "
            f"give the plain array and mark masked voxels in the labels with ignore_label"
        )
    if not array.dtype.isnative:
        raise TypeError(f"{name} is in another byte order ({array.dtype.str})")
    itemsize, flags = array.itemsize, array.flags
    in_step = flags.c_contiguous or not itemsize or not any(s % itemsize for s in array.strides)
    if not (flags.aligned and in_step):
        raise TypeError(f"{name}'s elements are not aligned to their {itemsize} bytes")
    return Buffer(
        address=array.__array_interface__["data"][0] if array.size else 0,
        shape=array.shape,
        strides=array.strides,
        dtype=_name(array.dtype),
        itemsize=itemsize,
        device="cpu",
        readonly=not flags.writeable,
        owner=array,
    )


@functools.cache
def _name(dtype: Any) -> str:
    """Of either library, which compose it anew each time, in microseconds."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _of_torch(tensor: Any, name: str, torch: Any) -> Buffer:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} is a {str(tensor.layout)[6:]} tensor; call .to_dense() on it")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazily negated view; call .resolve_neg() on it")
    itemsize = tensor.element_size()
    device = tensor.device
    return Buffer(
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(step * itemsize for step in tensor.stride()),
        dtype=_name(tensor.dtype),
        itemsize=itemsize,
        device="cpu" if device.type == "cpu" else str(device),
        readonly=False,
        owner=tensor,
        stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None,
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
    return Buffer(
        address=address,
        shape=shape,
        strides=tuple(strides),
        dtype=dtype.name,
        itemsize=dtype.itemsize,
        device=f"cuda:{device}",
        readonly=readonly,
        owner=array,
        stream=interface.get("stream"),
    )


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
