"""Buffer: address, shape, strides and dtype of an array of any library, read in place.

No library is imported that the caller has not imported already, and nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HOST, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
STREAMS = 3  # the version of the CUDA array interface that added streams


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Shape, strides, dtype and device of an array, without its address.

    Instances are cached and compared by identity, so that anything derived from one is computed
    once for all arrays with that layout.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str  # "float32", "bfloat16", "int64", "bool", ...
    itemsize: int  # bytes
    device: str  # "cpu", "cuda:0", ...

    def without_axis(self, axis: int) -> Layout:
        """The layout without an axis of length 1."""
        shape, strides = list(self.shape), list(self.strides)
        del shape[axis], strides[axis]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def __str__(self) -> str:
        steps = tuple(stride // self.itemsize for stride in self.strides)
        return f"{self.dtype} {self.shape} on {self.device}, strides {steps}"


@dataclass(slots=True)  # not frozen, which would double the time to construct it
class Buffer:
    """An array's memory: what a kernel needs to read or write it in place."""

    address: int
    layout: Layout
    owner: Any  # the caller's array, or NumPy's view of it; keeps the memory alive
    readonly: bool = False
    stream: int | None = (
        None  # the CUDA stream that the array is used on, if any; 0 is the default stream
    )
    keep: Any = None  # anything else that keeps the memory alive

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
    (CuPy, numba), `__dlpack__` (JAX), `__array_interface__` or the buffer protocol. Versions of the
    CUDA array interface below 3 do not say when the memory may be read; DLPack, where there is
    both, makes the default stream wait until then.

    Raises TypeError, with `name` in the message, for anything else, and for arrays whose elements
    cannot be read in place: masked, byte-swapped, misaligned, sparse.
    """
    if isinstance(array, np.ndarray):
        return _of_numpy(array, name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_torch(array, name, torch)
    if isinstance(array, type):
        raise TypeError(f"{name} must be an array, got the class {array.__name__}")
    if hasattr(array, "__dask_graph__"):
        raise TypeError(f"{name} is a dask {type(array).__name__}; use dice_core.dask")
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is not None and (
        interface.get("version", 0) >= STREAMS or not hasattr(array, "__dlpack__")
    ):
        return _of_cuda_array(array, interface, name)
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


def may_overlap(a: Buffer, b: Buffer) -> bool:
    """Whether the two share memory; also True where an exact answer would take too long."""
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
    """Whether two elements may share an address, as in a broadcast array."""
    if 0 in a.shape:
        return False
    axes = sorted((abs(step), n) for step, n in zip(a.strides, a.shape, strict=True) if n > 1)
    spans = [a.itemsize]
    for step, n in axes:
        spans.append(spans[-1] + step * (n - 1))
    return any(step < span for (step, _), span in zip(axes, spans, strict=False))


@functools.lru_cache(1024)
def _extent(a: Layout) -> tuple[int, int]:
    """Start and end of its memory in bytes, relative to its first element's address."""
    reach = [step * (n - 1) for step, n in zip(a.strides, a.shape, strict=True)]
    return sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + a.itemsize


def _bytes(a: Buffer) -> Any:
    """The memory as raw elements for NumPy, which lacks some dtypes."""
    return np.asarray(replace(a, layout=replace(a.layout, dtype=f"V{a.itemsize}")))


def _of_numpy(array: np.ndarray[Any, Any], name: str) -> Buffer:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(_MASKED.format(name))
    flags = array.flags
    layout = _layout(array.shape, array.strides, array.dtype, "cpu", name)
    if not flags.aligned:
        raise TypeError(_MISALIGNED.format(name, layout.itemsize))
    address = 0
    if array.size:
        try:  # a quarter of the time of array.ctypes.data
            memory: Any = array  # an ndarray is a buffer to type checkers from Python 3.12 on only
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        except (ValueError, TypeError, BufferError):  # read-only, strided, or no dtype of Python's
            address = array.ctypes.data
    return Buffer(address, layout, array, not flags.writeable)


@functools.lru_cache(1024)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any], device: str, name: str
) -> Layout:
    if not dtype.isnative:
        raise TypeError(f"{name} is not in native byte order ({dtype.str})")
    itemsize = dtype.itemsize
    if itemsize and any(step % itemsize for step, n in zip(strides, shape, strict=True) if n > 1):
        raise TypeError(_MISALIGNED.format(name, itemsize))
    return Layout(shape, strides, dtype.name, itemsize, device)


_MASKED = (
    "{} is a masked array, whose mask would be ignored; "
    "pass the plain array and mark masked voxels in the labels with ignore_label"
)
_MISALIGNED = "{}'s elements are not aligned to {} bytes"


def _of_torch(tensor: Any, name: str, torch: Any) -> Buffer:
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; torch.nested.to_padded_tensor gives a plain one"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} is a {str(tensor.layout)[6:]} tensor; call .to_dense() on it")
    if tensor.is_neg():
        raise TypeError(f"{name} is a lazily negated view; call .resolve_neg() on it")
    layout = _torch_layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a tensor that torch.func transforms
        address = 0
    if not address and not tensor.is_meta and 0 not in layout.shape:
        raise TypeError(
            f"{name} is a {type(tensor).__name__} without memory: torch traces or transforms it "
            f"(dice_core.torch takes such tensors), or its storage was freed"
        )
    buffer = Buffer(address, layout, tensor)
    if tensor.is_cuda:
        buffer.stream = _torch_stream(torch, tensor.device)
    return buffer


def _torch_stream(torch: Any, device: Any) -> int:
    try:
        return torch._C._cuda_getCurrentRawStream(device.index)  # the public function takes 3 us
    except AttributeError:
        return torch.cuda.current_stream(device).cuda_stream


@functools.lru_cache(1024)
def _torch_layout(shape: Any, steps: tuple[int, ...], dtype: Any, device: Any) -> Layout:
    return Layout(
        shape=tuple(shape),
        strides=tuple(step * dtype.itemsize for step in steps),
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        device="cpu" if device.type == "cpu" else str(device),
    )


def _of_cuda_array(array: Any, interface: dict[str, Any], name: str) -> Buffer:
    """Reads the CUDA array interface, whose streams 1 and 2 are valid CUDA handles; without a
    stream there is nothing to wait for.
    """
    if interface.get("mask") is not None:
        raise TypeError(_MASKED.format(name))
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if dtype.kind == "V" and getattr(getattr(array, "dtype", None), "name", "") == "bfloat16":
        dtype = array.dtype  # the interface describes bfloat16 as two raw bytes
    strides = interface.get("strides") or _contiguous_strides(shape, dtype.itemsize)
    layout = _layout(shape, tuple(strides), dtype, f"cuda:{_cuda_index(array)}", name)
    address, readonly = interface["data"]
    address = 0 if 0 in shape else address
    if layout.itemsize and address % layout.itemsize:
        raise TypeError(_MISALIGNED.format(name, layout.itemsize))
    return Buffer(address, layout, array, readonly, interface.get("stream"))


def _cuda_index(array: Any) -> int:
    """The device index, which is not in the interface; 0 if the library does not give it either."""
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])  # JAX's device.id counts other hosts' devices too
    for where in ("device.id", "gpu_data.context.device.id"):  # the second is numba's
        try:
            return operator.attrgetter(where)(array)
        except AttributeError:
            pass
    return 0


def _of_dlpack(array: Any, name: str) -> Buffer:
    kind, index = array.__dlpack_device__()
    if kind not in (HOST, CUDA, CUDA_MANAGED):
        raise TypeError(
            f"{name} is on DLPack device ({int(kind)}, {index}) and has no "
            f"__cuda_array_interface__; only host and CUDA memory is read through DLPack"
        )
    try:
        if kind != HOST:
            return _of_capsule(array, array.__dlpack__(stream=1), name)
        view = np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"{name} cannot be read through DLPack: {error}") from error
    return _of_numpy(view, name)


class _DLTensor(ctypes.Structure):
    """The first fields of the struct that an unversioned DLPack capsule points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


# Our own prototype: argument types set on ctypes.pythonapi are shared with all other users.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _of_capsule(array: Any, capsule: Any, name: str) -> Buffer:
    """CUDA memory of a capsule that was requested for the default stream.

    The capsule is kept and never marked as consumed, so that its destructor releases the exporter's
    memory when the Buffer is deleted.
    """
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    steps = tensor.strides[: tensor.ndim] if tensor.strides else _contiguous_strides(shape, 1)
    dtype = tensor.code, tensor.bits, tensor.lanes
    layout = _dlpack_layout(shape, tuple(steps), dtype, f"cuda:{tensor.device_id}", name)
    address = 0 if 0 in shape else tensor.data + tensor.byte_offset
    if address % layout.itemsize:
        raise TypeError(_MISALIGNED.format(name, layout.itemsize))
    return Buffer(address, layout, array, stream=0, keep=capsule)


@functools.lru_cache(1024)
def _dlpack_layout(
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    dtype: tuple[int, int, int],
    device: str,
    name: str,
) -> Layout:
    code, bits, lanes = dtype
    kind = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}.get(code)
    if kind is None or lanes != 1 or bits not in (8, 16, 32, 64):
        raise TypeError(
            f"{name} has an element type that cannot be read through DLPack "
            f"(type code {code}, {bits} bits, {lanes} lanes)"
        )
    itemsize = bits // 8
    strides = tuple(step * itemsize for step in steps)
    return Layout(shape, strides, f"{kind}{bits}".replace("bool8", "bool"), itemsize, device)


@functools.lru_cache(1024)
def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides[: len(shape)])
