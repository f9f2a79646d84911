"""NVIDIA's driver library, libcuda, on host memory: it executes the PTX of the kernels.

Its functions are called through C, with the prototypes of cuda.h. A launch has ended when the call
returns. As cubins cannot be executed, each is followed by the PTX that it was linked from; of the
cubin itself it is checked what the driver needs: architecture, kernel, size of the parameters,
threads of a block.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ptx

from . import memory

CAPABILITY, NAME, VERSION = (9, 0), b"emulated", 13000
COMPUTE_CAPABILITY = (75, 76)  # attributes of a device: major, minor
DEVICES = 1
CONTEXT, DEVICE = 0x1000, 0x2000  # handles; an index is added
NEW_ABI = 0x41  # of CUDA 13's cubins, in which the architecture is elsewhere
EM_CUDA, ELF64_HEADER, ELF64_SECTION = 190, "<16sHHIQQQIHHHHHH", "<IIQQQQIIQQ"
PARAMETERS_SIZE, MAX_THREADS = 0x1903, 0x0504  # attributes in the section .nv.info.NAME
ERRORS = {
    1: "CUDA_ERROR_INVALID_VALUE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    200: "CUDA_ERROR_INVALID_IMAGE",
    201: "CUDA_ERROR_INVALID_CONTEXT",
    209: "CUDA_ERROR_NO_BINARY_FOR_GPU",
    400: "CUDA_ERROR_INVALID_HANDLE",
    500: "CUDA_ERROR_NOT_FOUND",
    719: "CUDA_ERROR_LAUNCH_FAILED",
}
PROTOTYPES: dict[str, tuple[Any, ...]] = {  # of cuda.h; pointers and handles are void*
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
    "cuDriverGetVersion": (c_void_p,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuLibraryLoadData": (*[c_void_p] * 4, c_uint, *[c_void_p] * 2, c_uint),
    "cuLibraryGetKernel": (c_void_p, c_void_p, c_void_p),
    "cuKernelGetFunction": (c_void_p, c_void_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, *[c_void_p] * 3),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (c_void_p, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventDestroy_v2": (c_void_p,),
}


class Error(Exception):
    """A call fails with this code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Kernel:
    """A kernel of a cubin: what the cubin says of it, and its PTX."""

    parameters_size: int
    max_threads: int
    code: ptx.Kernel


class Library:
    """The loaded library: an object whose attributes are C functions, as of a `ctypes.CDLL`."""

    def __init__(self) -> None:
        self._libraries: list[tuple[bytes, str]] = []
        self._kernels: list[Kernel] = []
        self._thread = threading.local()
        self._texts: list[bytes] = []  # given to the caller
        self._message = ""
        self._events: set[int] = set()
        self._made = 0
        self.launches = 0
        self.executed: Counter[str] = Counter()  # instructions by opcode and lane
        for name, types in PROTOTYPES.items():
            function = getattr(self, "_" + name.removeprefix("cu").removesuffix("_v2"))
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *types)(self._reporting(function)))

    @property
    def leaked_events(self) -> int:
        return len(self._events)

    def _reporting(self, function: Callable[..., None]) -> Callable[..., int]:
        """The function with its exceptions as codes, since C has none."""

        def call(*arguments: Any) -> int:
            try:
                function(*arguments)
            except Error as error:
                self._message = str(error)
                return error.code
            except Exception as error:  # of a kernel
                self._message = f"{type(error).__name__}: {error}"
                return 719
            return 0

        return call

    # ---- errors, devices, contexts ---------------------------------------------------------------

    def _Init(self, flags: int) -> None:
        _check(flags == 0, 1, "flags")

    def _GetErrorName(self, code: int, out: int) -> None:
        self._give(out, ERRORS[code])

    def _GetErrorString(self, code: int, out: int) -> None:
        self._give(out, self._message)

    def _give(self, out: int, text: str) -> None:
        self._texts.append(text.encode())
        c_char_p.from_address(out).value = self._texts[-1]

    def _DriverGetVersion(self, out: int) -> None:
        c_int.from_address(out).value = VERSION

    def _DeviceGetCount(self, out: int) -> None:
        c_int.from_address(out).value = DEVICES

    def _DeviceGet(self, out: int, ordinal: int) -> None:
        _check(0 <= ordinal < DEVICES, 101, f"device {ordinal}")
        c_int.from_address(out).value = DEVICE + ordinal

    def _DeviceGetName(self, out: int, size: int, device: int) -> None:
        _check(DEVICE <= device < DEVICE + DEVICES, 101, f"device {device}")
        ctypes.memmove(out, NAME + b"\0", min(size, len(NAME) + 1))

    def _DeviceGetAttribute(self, out: int, attribute: int, device: int) -> None:
        _check(DEVICE <= device < DEVICE + DEVICES, 101, f"device {device}")
        _check(attribute in COMPUTE_CAPABILITY, 1, f"attribute {attribute}")
        c_int.from_address(out).value = CAPABILITY[COMPUTE_CAPABILITY.index(attribute)]

    def _DevicePrimaryCtxRetain(self, out: int, device: int) -> None:
        _check(DEVICE <= device < DEVICE + DEVICES, 101, f"device {device}")
        c_void_p.from_address(out).value = CONTEXT + device - DEVICE

    @property
    def _contexts(self) -> list[int]:
        """The stack of this thread's contexts."""
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = []
        contexts: list[int] = self._thread.contexts
        return contexts

    def _CtxGetCurrent(self, out: int) -> None:
        c_void_p.from_address(out).value = self._contexts[-1] if self._contexts else None

    def _CtxPushCurrent(self, context: int) -> None:
        _check(context is not None and 0 <= context - CONTEXT < DEVICES, 201, f"{context}")
        self._contexts.append(context)

    def _CtxPopCurrent(self, out: int) -> None:
        _check(bool(self._contexts), 201, "no context is current")
        c_void_p.from_address(out).value = self._contexts.pop()

    # ---- kernels ---------------------------------------------------------------------------------

    def _LoadData(self, cubin: bytes, source: str) -> int:
        self._libraries.append((cubin, source))
        return len(self._libraries)

    def _LibraryLoadData(self, out: int, image: int, *options: Any) -> None:
        _check(not any(options), 1, "options")
        size = elf_size(ctypes.string_at(image, struct.calcsize(ELF64_HEADER)))
        source = ctypes.string_at(image + size).decode()
        _check(".entry" in source, 200, "no PTX follows the cubin")
        c_void_p.from_address(out).value = self._LoadData(ctypes.string_at(image, size), source)

    def _LibraryGetKernel(self, out: int, library: int, name: int) -> None:
        _check(library in range(1, len(self._libraries) + 1), 400, f"library {library}")
        cubin, source = self._libraries[library - 1]
        entry = ctypes.string_at(name).decode()
        attributes = attributes_of(cubin, entry)
        code = executable(source)
        _check(code.module.name == entry, 500, f"the PTX has no {entry}")
        size = attributes[PARAMETERS_SIZE]
        _check(size == code.module.arguments_size, 200, f"{size} bytes of parameters")
        self._kernels.append(Kernel(size, attributes[MAX_THREADS], code))
        c_void_p.from_address(out).value = len(self._kernels)

    def _kernel(self, handle: int) -> Kernel:
        _check(handle in range(1, len(self._kernels) + 1), 400, f"kernel {handle}")
        return self._kernels[handle - 1]

    def _KernelGetFunction(self, out: int, handle: int) -> None:
        self._kernel(handle)
        _check(bool(self._contexts), 201, "no context is current")
        c_void_p.from_address(out).value = handle

    def _LaunchKernel(self, handle: int, *arguments: Any) -> None:
        blocks, y, z, threads, *others, shared, _, parameters, extra = arguments
        kernel = self._kernel(handle)
        _check(bool(self._contexts), 201, "no context is current")
        _check([y, z, *others, shared] == [1, 1, 1, 1, 0], 1, f"{arguments}")
        _check(0 < blocks < 2**31, 1, f"{blocks} blocks")
        _check(0 < threads <= kernel.max_threads, 1, f"{threads} threads")
        _check(not parameters and extra, 1, "parameters are not packed")
        packed = packed_parameters(extra)
        _check(len(packed) == kernel.parameters_size, 1, f"{len(packed)} bytes of parameters")
        self.launches += 1
        self.executed += ptx.launch(
            kernel.code,
            blocks,
            threads,
            packed,
            dict(memory.LIVE),
            seed=self.launches,
        )

    # ---- streams and events ----------------------------------------------------------------------

    def _StreamSynchronize(self, stream: int) -> None:
        _check(bool(self._contexts), 201, "no context is current")

    def _EventCreate(self, out: int, flags: int) -> None:
        self._made += 1
        self._events.add(self._made)
        c_void_p.from_address(out).value = self._made

    def _EventRecord(self, event: int, stream: int) -> None:
        _check(event in self._events, 400, f"event {event}")

    def _StreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        _check(event in self._events, 400, f"event {event}")

    def _EventDestroy(self, event: int) -> None:
        _check(event in self._events, 400, f"event {event}")
        self._events.remove(event)


def _check(condition: bool, code: int, text: str) -> None:
    if not condition:
        raise Error(code, text)


@functools.cache
def executable(source: str) -> ptx.Kernel:
    return ptx.Kernel(source)


def packed_parameters(extra: int) -> bytes:
    """The block that `extra` describes: CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE, in this order."""
    keys_and_values = [word or 0 for word in (c_void_p * 5).from_address(extra)]
    _check(keys_and_values[::2] == [1, 2, 0], 1, "keys of the packed parameters")
    _, pointer, _, size, _ = keys_and_values
    return ctypes.string_at(pointer, c_size_t.from_address(size).value)


def with_source(link: Callable[..., tuple[bytes, str]]) -> Callable[..., tuple[bytes, str]]:
    """The linker `dice_core.gpu.compile.link`, with the PTX after the cubin."""

    def linked(text: str, capability: tuple[int, int]) -> tuple[bytes, str]:
        cubin, report = link(text, capability)
        assert elf_size(cubin) == len(cubin)
        return cubin + text.encode(), report

    return linked


def elf_size(image: bytes) -> int:
    """The size of an ELF file for the emulated device, of which this is the start."""
    header = struct.unpack_from(ELF64_HEADER, image)
    identity, flags = header[0], header[7]
    _check(identity[:6] == b"\x7fELF\2\1" and header[2] == EM_CUDA, 200, "no ELF file of CUDA")
    architecture = (flags >> 8 if identity[7] == NEW_ABI else flags) & 0xFF
    _check(divmod(architecture, 10) == CAPABILITY, 209, f"code for sm_{architecture}")
    segments, sections = header[5], header[6]
    return max(segments + header[9] * header[10], sections + header[11] * header[12])


def attributes_of(cubin: bytes, entry: str) -> dict[int, int]:
    """Attributes of a kernel, of those that are one number or begin with it, by format and code."""
    sections = dict(_sections(cubin))
    _check(f".text.{entry}" in sections, 500, f"the cubin has no {entry}")
    information, at, found = sections[f".nv.info.{entry}"], 0, {}
    while at < len(information):
        key, value = struct.unpack_from("<HH", information, at)
        at += 4
        kind, code = key & 0xFF, key >> 8
        if kind == 4:  # followed by `value` bytes
            if value >= 4:
                found[code << 8 | kind] = struct.unpack_from("<I", information, at)[0]
            at += value
        else:
            found[code << 8 | kind] = value
    return found


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    header = struct.unpack_from(ELF64_HEADER, cubin)
    start, size, count, names_index = header[6], header[11], header[12], header[13]
    rows = [struct.unpack_from(ELF64_SECTION, cubin, start + i * size) for i in range(count)]
    names = cubin[rows[names_index][4] :]
    for row in rows:
        name = names[row[0] : names.index(b"\0", row[0])].decode()
        yield name, b"" if row[1] == 8 else cubin[row[4] : row[4] + row[5]]


def ctypes_with(library: Library) -> Any:
    """The module ctypes, whose CDLL loads this library."""
    return SimpleNamespace(**{**vars(ctypes), "CDLL": lambda name: library})
