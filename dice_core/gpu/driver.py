"""NVIDIA's driver library: devices, loading a cubin, launching its kernel.

Called through ctypes, since a launch through numba-cuda takes ten times as long. Nothing here
allocates device memory, and only `synchronize` synchronizes. Kernels run in a device's primary
context, the one that torch, CuPy and numba share.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from ctypes import addressof, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# Constants of cuda.h
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
BUFFER_POINTER, BUFFER_SIZE, END = 1, 2, 0  # CU_LAUNCH_PARAM_*
OS_ABI, CUDA_13_ABI = 7, 0x41  # e_ident[EI_OSABI] of a cubin; CUDA 12's is 0x33
BLACKWELL = (10, 0)
DEFAULT_STREAMS = {0, 1}  # 0 and CU_STREAM_LEGACY are the same stream

_Extra = c_void_p * 5

# Symbols of the library; cuda.h maps the names without _v2 to these.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDriverGetVersion": (c_void_p,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuLibraryLoadData": (c_void_p, c_char_p, *[c_void_p] * 2, c_uint, *[c_void_p] * 2, c_uint),
    "cuLibraryGetKernel": (c_void_p, c_void_p, c_char_p),
    "cuKernelGetFunction": (c_void_p, c_void_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
}


class DriverError(RuntimeError):
    """A call of the driver failed."""


def unavailable() -> list[str]:
    """Why no device can be used; empty if one can."""
    try:
        count = c_int()
        _call("cuDeviceGetCount", byref(count))
    except OSError:
        return [
            f"no NVIDIA driver was found (cannot load {LIBRARY}); "
            f"install it from your system's packages or nvidia.com/drivers"
        ]
    except AttributeError as error:
        return [f"the NVIDIA driver is older than CUDA 12 ({error}); update it"]
    except DriverError as error:
        return [str(error)]
    return [] if count.value else ["the NVIDIA driver sees no GPU (see CUDA_VISIBLE_DEVICES)"]


def version() -> int:
    """The major version of CUDA that the driver supports."""
    number = c_int()
    _call("cuDriverGetVersion", byref(number))
    return number.value // 1000


def accepts(cubin: bytes, capability: tuple[int, int]) -> bool:
    """Whether the driver can load a cubin for this compute capability, by its ELF header: a driver
    for CUDA 12 knows CUDA 13's ABI only from Blackwell on, for which CUDA 12's linker has it, too.
    """
    new = cubin[OS_ABI : OS_ABI + 1] == bytes([CUDA_13_ABI])
    return not new or capability >= BLACKWELL or version() >= 13


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Its compute capability, (9, 0) for example."""
    major, minor = c_int(), c_int()
    _call("cuDeviceGetAttribute", byref(major), CAPABILITY_MAJOR, _handle(device))
    _call("cuDeviceGetAttribute", byref(minor), CAPABILITY_MINOR, _handle(device))
    return major.value, minor.value


@functools.cache
def name(device: int) -> str:
    """Its name."""
    text = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", text, len(text), _handle(device))
    return text.value.decode()


class Kernel:
    """A kernel of a loaded cubin, for every device of its compute capability."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def load_on(self, device: int) -> None:
        """Loads it now. Otherwise its first launch would, which is not allowed during the capture
        of a CUDA graph.
        """
        with _Current(device):
            _call("cuKernelGetFunction", byref(c_void_p()), self.handle)

    def launch(
        self, device: int, stream: int, blocks: int, threads: int, parameters: bytes
    ) -> None:
        """Queues it, with its packed parameters."""
        packed, size = c_char_p(parameters), c_size_t(len(parameters))
        extra = _Extra(
            *(BUFFER_POINTER, ctypes.cast(packed, c_void_p), BUFFER_SIZE, addressof(size), END)
        )
        with _Current(device):
            _call(
                "cuLaunchKernel", self.handle, blocks, 1, 1, threads, 1, 1, 0, stream, None, extra
            )


def load(cubin: bytes, entry: str) -> Kernel:
    """The kernel of this name; it stays loaded."""
    library, kernel = c_void_p(), c_void_p()
    _call("cuLibraryLoadData", byref(library), cubin, None, None, 0, None, None, 0)
    _call("cuLibraryGetKernel", byref(kernel), library, entry.encode())
    assert kernel.value is not None
    return Kernel(kernel.value)


def synchronize(device: int, stream: int) -> None:
    """Waits for everything queued on `stream`."""
    with _Current(device):
        _call("cuStreamSynchronize", stream)


def wait(device: int, stream: int, other: int) -> None:
    """Makes `stream` wait for the work now queued on `other`. The host does not wait."""
    if {stream, other} <= DEFAULT_STREAMS or stream == other:
        return
    with _Current(device):
        event = c_void_p()
        _call("cuEventCreate", byref(event), DISABLE_TIMING)
        try:
            _call("cuEventRecord", event, other)
            _call("cuStreamWaitEvent", stream, event, 0)
        finally:
            _call("cuEventDestroy_v2", event)


class _Current:
    """Makes the device's primary context current, and restores the previous one."""

    def __init__(self, device: int) -> None:
        self.context = _context(device)

    def __enter__(self) -> None:
        current = c_void_p()
        _call("cuCtxGetCurrent", byref(current))
        self.pushed = current.value != self.context
        if self.pushed:
            _call("cuCtxPushCurrent_v2", self.context)

    def __exit__(self, *error: Any) -> None:
        if self.pushed:
            _call("cuCtxPopCurrent_v2", byref(c_void_p()))


@functools.cache
def _context(device: int) -> int | None:
    context = c_void_p()
    _call("cuDevicePrimaryCtxRetain", byref(context), _handle(device))
    return context.value


@functools.cache
def _handle(device: int) -> int:
    handle = c_int()
    _call("cuDeviceGet", byref(handle), device)
    return handle.value


_lock = threading.Lock()


@functools.cache
def _driver() -> dict[str, Any]:
    """The functions of the driver, initialized."""
    with _lock:
        library = ctypes.CDLL(LIBRARY)
        functions = {}
        for function, types in _FUNCTIONS.items():
            functions[function] = getattr(library, function)
            functions[function].argtypes = types
        _check(functions, "cuInit", functions["cuInit"](0))
        return functions


def _call(function: str, *arguments: Any) -> None:
    functions = _driver()
    _check(functions, function, functions[function](*arguments))


def _check(functions: dict[str, Any], function: str, code: int) -> None:
    if not code:
        return
    texts = []
    for of_error in ("cuGetErrorName", "cuGetErrorString"):
        text = c_char_p()
        functions[of_error](code, byref(text))
        texts.append((text.value or b"unknown").decode())
    raise DriverError(f"{function}: {': '.join(texts)} (CUDA error {code})")
