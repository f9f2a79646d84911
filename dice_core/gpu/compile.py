"""Compiles kernels: numba-cuda to PTX, NVIDIA's linker to a cubin. Needs no GPU.

PTX is never given to the driver, which may be older than the compiler and refuse it; a cubin runs
with any driver of the same major version of CUDA.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numba
from cuda.bindings import nvjitlink
from numba import cuda, float64, int32, int64, types

from . import intrinsics, kernels
from . import plan as plans
from .plan import ADDRESS, INTEGER, NUMBER, Plan

# For later GPUs NVVM uses another compiler, which does not unroll the loops and so puts arrays into
# local memory. The linker accepts the PTX of earlier GPUs.
NEWEST = (9, 0)
LARGEST = {types.float32: 3.4028234663852886e38, types.float64: 1.7976931348623157e308}
SMALLEST = {types.float32: 1.1754943508222875e-38, types.float64: 2.2250738585072014e-308}  # normal
TYPES = {ADDRESS: intrinsics.POINTER, INTEGER: int64, NUMBER: float64}  # of arguments


def compile(kind: str, plan: Plan, capability: tuple[int, int]) -> bytes:
    """The cubin of a kernel for GPUs of this compute capability.

    Raises RuntimeError if `numba.cuda` is numba's built-in, deprecated target.
    """
    return link(ptx(kind, plan, capability), capability)[0]


def ptx(kind: str, plan: Plan, capability: tuple[int, int]) -> str:
    """The PTX of a kernel, in which it is named `ENTRY`."""
    made_by = getattr(cuda, "implementation", "Built-in")
    if made_by != "NVIDIA":
        raise RuntimeError(
            f"numba.cuda is numba {numba.__version__}'s own ({made_by}), which is deprecated; "
            f'install NVIDIA\'s: pip install "dice_core[gpu]"'
        )
    text, _ = cuda.compile(
        kernels.kernel(kind, plan, operations(plan)),
        signature(kind),
        output="ptx",
        device=False,
        abi="numba",
        fastmath=False,
        cc=min(capability, NEWEST),
        launch_bounds=(plans.THREADS, plan.resident_blocks(kind)),
    )
    text = text.decode() if isinstance(text, bytes) else text
    (mangled,) = re.findall(r"\.visible \.entry (\w+)\(", text)
    return text.replace(mangled, kernels.ENTRY)


def signature(kind: str) -> Any:
    """The numba signature of the kernels of this kind."""
    return types.void(*(TYPES[each] for each in kernels.ARGUMENTS[kind].kinds.values()))


def link(text: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """Links PTX to a cubin; also returns the assembler's report of registers and memory.

    Raises RuntimeError with the linker's errors if it fails.
    """
    source = text.encode()
    handle, errors = None, ""
    try:
        architecture = f"-arch=sm_{capability[0]}{capability[1]}"
        handle = nvjitlink.create(3, [architecture, "-verbose", "-O3"])
        try:
            nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), kernels.ENTRY)
            nvjitlink.complete(handle)
        except nvjitlink.nvJitLinkError:
            errors = _log(handle, nvjitlink.get_error_log_size, nvjitlink.get_error_log)
            raise
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        return bytes(cubin), _log(handle, nvjitlink.get_info_log_size, nvjitlink.get_info_log)
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(_failure(error, errors, capability)) from error
    finally:
        if handle is not None:
            nvjitlink.destroy(handle)


def _log(handle: int, size: Any, get: Any) -> str:
    """One of the linker's two logs."""
    log = bytearray(size(handle))
    get(handle, log)
    return log.decode(errors="replace").rstrip("\0").strip()


def _failure(error: Exception, errors: str, capability: tuple[int, int]) -> str:
    """The message for a failure of the linker."""
    linker = ".".join(map(str, nvjitlink.version()))
    text = (
        f"nvJitLink {linker} failed for compute capability {capability[0]}.{capability[1]} "
        f"({error}){f': {errors}' if errors else ''}"
    )
    if "Unsupported .version" in errors:
        text += (
            "\nThe linker is of an earlier CUDA toolkit than the compiler, NVVM: that of torch is "
            "used where torch is imported. Install the extra of its version of CUDA, gpu-cu12 or "
            "gpu-cu13, in a new environment."
        )
    return text


def operations(plan: Plan) -> Any:
    """The operations that the kernels of a plan are written in."""
    real, spec = intrinsics.REAL[plan.logits], plan.spec
    gamma, binary_gamma = (
        min(number or 0.0, LARGEST[real]) for number in (spec.gamma, spec.binary_gamma)
    )
    return SimpleNamespace(
        cuda=cuda,
        inlined=cuda.jit(device=True, inline="always"),
        real=real,
        int32=int32,
        int64=int64,
        float64=float64,
        label=intrinsics.label_type(plan.labels),
        load_logits=intrinsics.load_numbers(plan.logits, plan.word, float("-inf")),
        load_targets=intrinsics.load_targets(plan.labels, plan.word_targets),
        load_real=intrinsics.load_number(real.name),
        load_double=intrinsics.load_number("float64"),
        load_relaxed=intrinsics.load_relaxed,
        store_grad=intrinsics.store_numbers(plan.logits, plan.word, plan.word_step),
        store_real=intrinsics.store_number(real),
        store_double=intrinsics.store_number(float64),
        store_int=intrinsics.store_number(int32),
        atomic_increment=intrinsics.atomic_increment,
        exp=intrinsics.exp,
        log=intrinsics.log,
        sigmoids=intrinsics.sigmoids,
        # s^p and s^(p-1), and 1 - s^(p-1) of 1 - s; (1 - s)^gamma, the focal modulation, and its
        # derivative
        power=intrinsics.scaled_power(1, spec.p),
        lower_power=intrinsics.scaled_power(1, spec.p - 1),
        power_complement=intrinsics.power_complement(spec.p - 1),
        modulation=intrinsics.scaled_power(1, gamma),
        modulation_slope=intrinsics.scaled_power(gamma, gamma - 1),
        binary_modulation=intrinsics.probability_power(binary_gamma),
        floor_divide=intrinsics.floor_divide,
        divide=intrinsics.divide,
        reciprocal=intrinsics.reciprocal,
        fma=intrinsics.fma,
        fmax=intrinsics.fmax,
        shuffle=cuda.shfl_xor_sync,
        largest=LARGEST[real],
        smallest=SMALLEST[real],
        size=real.bitwidth // 8,
    )
