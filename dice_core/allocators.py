"""New arrays in another array's library and on its device; copies between host and device; NumPy's
arithmetic without warnings.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import buffers
from .buffers import HOST, Buffer, Layout

HUGE_PAGE_BYTES = 2 << 20


def empty(near: Buffer, shape: Sequence[int], dtype: str) -> Any:
    """An uninitialised C-contiguous array in the library and on the device of `near.owner`.

    The memory therefore comes from the caller's allocator. Raises TypeError if the library is
    unknown or lacks the dtype.
    """
    owner, shape = near.owner, tuple(shape)
    library, module = _library(near)
    if library == "torch":
        return module.empty(shape, dtype=getattr(module, dtype), device=owner.device)
    if library == "numpy":
        return np.empty(shape, dtype)
    if library == "cupy":
        with module.cuda.Device(_index(near)):
            return module.empty(shape, dtype)
    if library == "numba":
        with module.gpus[_index(near)]:
            return module.device_array(shape, dtype, stream=owner.stream)
    if library == "array API":
        new = module.empty(shape, dtype=getattr(module, dtype, None), device=owner.device)
        if buffers.of(new, "new").dtype != dtype:  # JAX has 64-bit dtypes only if enabled
            raise TypeError(f"{module.__name__} does not support {dtype} arrays; {_REMEDY}")
        return new
    raise TypeError(f"cannot allocate arrays of type {type(owner).__name__}; {_REMEDY}")


def empty_like(array: Any, name: str) -> Any:
    """An uninitialised array of the same library, shape, dtype, device and, if it has no gaps,
    strides.

    The array API standard has no way to request strides; arrays of such libraries are C-contiguous.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        empty = torch.empty_like(array, requires_grad=False)
        if empty.is_cpu:
            _advise_huge_pages(empty.data_ptr(), empty.nbytes)
        return empty
    like = buffers.of(array, name)
    library, module = _library(like)
    if library == "numpy":
        return np.empty_like(like.owner, subok=False)
    if library == "cupy":
        with module.cuda.Device(_index(like)):
            return module.empty_like(array)
    if library == "numba":
        strides = like.strides if _dense(like.layout) else None
        with module.gpus[_index(like)]:
            return module.device_array(
                like.shape, array.dtype, strides=strides, stream=array.stream
            )
    if library == "array API":
        return module.empty(like.shape, dtype=array.dtype, device=array.device)
    raise TypeError(
        f"cannot allocate an array like {name}, of type {type(array).__name__}; {_REMEDY}"
    )


def from_host(array: np.ndarray[Any, Any], near: Buffer) -> Any:
    """A copy in the library and on the device of `near.owner`. Raises TypeError as `empty` does."""
    owner = near.owner
    library, module = _library(near)
    if library == "torch":
        return module.tensor(array, device=owner.device)  # from_numpy warns of read-only arrays
    if library == "cupy":
        with module.cuda.Device(_index(near)):
            return module.asarray(array)
    if library == "numba":
        with module.gpus[_index(near)]:
            return module.to_device(array, stream=owner.stream)
    if library == "array API":
        new = module.asarray(array, device=owner.device)
        if buffers.of(new, "new").dtype != array.dtype.name:
            raise TypeError(
                f"{module.__name__} does not support {array.dtype.name} arrays; {_REMEDY}"
            )
        return new
    raise TypeError(f"cannot allocate arrays of type {type(owner).__name__}; {_REMEDY}")


def mark_changed(array: Any) -> None:
    """Tells torch that a tensor is about to be overwritten, so that a backward pass which has saved
    it raises, as after torch's own operations in place.
    """
    if hasattr(array, "requires_grad") and not array.is_inference():
        sys.modules["torch"].autograd.graph.increment_version(array)


def is_ordered(buffer: Buffer) -> bool:
    """Whether its library orders its own work on the device, including the reuse of freed memory,
    after the work queued on `buffer.stream`.
    """
    return _library(buffer)[0] in ("numpy", "torch", "cupy", "numba")


def is_on_host(array: Any) -> bool:
    """Whether it is in host memory, or is not an array at all."""
    if hasattr(array, "__cuda_array_interface__"):
        return False
    return not hasattr(array, "__dlpack_device__") or array.__dlpack_device__()[0] == HOST


def to_host(buffer: Buffer) -> np.ndarray[Any, Any]:
    """A NumPy array: a view of host memory, a copy of device memory. bfloat16, which NumPy lacks,
    is uint16.

    The copy waits for kernels on `buffer.stream` if the library knows that stream, as torch, CuPy
    and numba do. Libraries that are read through DLPack do not know it: wait for the kernels first.
    """
    bfloat16 = buffer.dtype == "bfloat16"
    if buffer.device == "cpu":
        if bfloat16:
            buffer = replace(buffer, layout=replace(buffer.layout, dtype="uint16"))
        return np.asarray(buffer)
    owner = buffer.owner
    library, module = _library(buffer)
    if library == "torch":
        array = owner.detach().cpu()
        array = array.view(module.uint16).numpy() if bfloat16 else array.numpy()
    elif library == "cupy":
        array = owner.get()
    elif library == "numba":
        array = owner.copy_to_host()
        if owner.stream:  # on the default stream the copy has already waited
            owner.stream.synchronize()
    else:
        try:
            array = np.from_dlpack(_OnHost(owner))
        except (AttributeError, TypeError, ValueError, BufferError, RuntimeError) as error:
            raise TypeError(
                f"a {type(owner).__name__} cannot be copied to the host ({error}); {_REMEDY}"
            ) from error
    return array.reshape(buffer.shape)  # labels (N, 1, *) have the layout (N, *)


_REMEDY = "view it as torch or CuPy first: torch.as_tensor(x), cupy.asarray(x)"


class _OnHost:
    """A DLPack exporter whose capsule is a copy in host memory, made by the array's library."""

    def __init__(self, array: Any):
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return HOST, 0

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__(dl_device=(HOST, 0), copy=True)


def _library(buffer: Buffer) -> tuple[str, Any]:
    """The library that allocates and copies such arrays: its name, and its module."""
    owner = buffer.owner
    roots = {kind.__module__.partition(".")[0] for kind in type(owner).__mro__}
    if "torch" in roots:
        return "torch", sys.modules["torch"]
    if buffer.device == "cpu":
        return "numpy", np
    if "cupy" in roots:
        return "cupy", sys.modules["cupy"]
    if "numba" in roots:
        return "numba", sys.modules["numba.cuda"]
    if hasattr(owner, "__array_namespace__"):
        return "array API", owner.__array_namespace__()
    return "", None


def _index(buffer: Buffer) -> int:
    """The device's number."""
    return int(buffer.device.partition(":")[2])


def _dense(a: Layout) -> bool:
    """Whether its elements are contiguous in memory for some order of the axes."""
    span = a.itemsize
    for step, n in sorted((step, n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step != span:
            return False
        span *= n
    return True


def _advise_huge_pages(address: int, size: int) -> None:
    """Requests huge pages for fresh memory, whose page faults cost more than computing a gradient.

    NumPy does this for its own arrays, from the same size; torch's allocator does not.
    """
    if size < 4 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first, stop = (
        -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES,
        (address + size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES,
    )
    if first < stop:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def quiet(array: Any) -> contextlib.AbstractContextManager[Any]:
    """The context for arithmetic on sums, losses and weights: what overflows is infinite, 0/0 is
    NaN, as in the kernels, without NumPy's warnings. torch has none, and could not trace this.
    """
    if hasattr(array, "requires_grad"):
        return contextlib.nullcontext()
    return np.errstate(all="ignore")


def add(a: Any, b: Any) -> Any:
    """a + b; numba's device arrays, which have no arithmetic, are added on the host."""
    if hasattr(a, "__add__"):
        return a + b
    first, second = buffers.of(a, "a"), buffers.of(b, "b")
    return from_host(to_host(first) + to_host(second), first)


def on_device(numbers: Any, near: Buffer) -> Any:
    """(C,) numbers in float64 on the device of `near`, to be read by kernels on its stream. For
    torch, the copies of NumPy arrays are cached.

    Numbers that are not a NumPy array are on the device already.
    """
    if not isinstance(numbers, np.ndarray):
        return numbers
    library, module = _library(near)
    if library != "torch":
        return from_host(numbers, near)
    key = numbers.tobytes(), near.owner.device
    copy, stream = _copied(*key)
    if stream is not None:
        if stream != near.stream:  # that of the copy: torch reuses its memory on that one
            copy.record_stream(module.cuda.current_stream(near.owner.device))
        if module.cuda.is_current_stream_capturing():
            _captured[key] = copy
    return copy


# Copies that CUDA graphs read whenever they are replayed, which torch cannot know
_captured: dict[tuple[bytes, Any], Any] = {}


@functools.lru_cache(64)
def _copied(numbers: bytes, device: Any) -> tuple[Any, int | None]:
    """The copy, and the CUDA stream that it was made on. The host waits for it, so that any stream
    may read it.
    """
    copy = sys.modules["torch"].from_numpy(np.frombuffer(numbers).copy()).to(device)
    return copy, buffers.of(copy, "weight").stream
