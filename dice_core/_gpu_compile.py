"""Kernels to machine code: numba-cuda to PTX, NVIDIA's linker to a cubin. No GPU is needed.

PTX is never given to the driver, which may be older than the compiler and refuse it; a cubin is
compatible with drivers of the same major version of CUDA.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numba
from cuda.bindings import nvjitlink
from numba import cuda, float64, int32, int64, types

from . import _gpu_intrinsics as intrinsics
from . import _gpu_kernels as kernels
from . import _gpu_plan as plans
from ._gpu_plan import Plan

# For later GPUs NVVM has another compiler, which leaves loops and so arrays in memory; the linker
# takes PTX of earlier ones.
NEWEST = (9, 0)
LARGEST = {types.float32: 3.4028234663852886e38, types.float64: 1.7976931348623157e308}
SMALLEST = {types.float32: 1.1754943508222875e-38, types.float64: 2.2250738585072014e-308}  # normal

_P, _L, _D = intrinsics.POINTER, types.int64, types.float64
_VOXELS = types.void(*[_P] * 5, *[_L] * 17)
_TOTALS = types.void(*[_P] * 2, *[_L] * 5, *[_P] * 3, *[_L] * 4, *[_D] * 10)
SIGNATURES = {"statistics": _VOXELS, "gradient": _VOXELS, "total": _TOTALS, "loss": _TOTALS}


def compile(kind: str, plan: Plan, capability: tuple[int, int]) -> bytes:
    """The cubin of a kernel for GPUs of this compute capability.

    Raises RuntimeError where `numba.cuda` is numba's own, deprecated one.
    """
    return link(ptx(kind, plan, capability), capability)[0]


def ptx(kind: str, plan: Plan, capability: tuple[int, int]) -> str:
    """Its portable assembly, the kernel being named `ENTRY`."""
    made_by = getattr(cuda, "implementation", "Built-in")
    if made_by != "NVIDIA":
        raise RuntimeError(
            f"numba.cuda is numba {numba.__version__}'s own ({made_by}), which is deprecated; "
            f'install NVIDIA\'s: pip install "dice_core[gpu]"'
        )
    text, _ = cuda.compile(
        kernels.kernel(kind, plan, operations(plan)),
        SIGNATURES[kind],
        output="ptx",
        device=False,
        abi="numba",
        fastmath=False,
        cc=min(capability, NEWEST),
        launch_bounds=plans.THREADS,
    )
    text = text.decode() if isinstance(text, bytes) else text
    (mangled,) = re.findall(r"\.visible \.entry (\w+)\(", text)
    return text.replace(mangled, kernels.ENTRY)


def link(text: str, capability: tuple[int, int]) -> tuple[bytes, str]:
    """PTX -> (cubin, what the assembler says of registers and memory)."""
    source = text.encode()
    handle = nvjitlink.create(3, [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose", "-O3"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, source, len(source), kernels.ENTRY)
        nvjitlink.complete(handle)
        cubin = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, cubin)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin), log.decode()


def operations(plan: Plan) -> Any:
    """What the kernels are written in, for the numbers of a plan."""
    real = intrinsics.REAL[plan.logits]
    gamma, binary_gamma = (
        min(number or 0.0, LARGEST[real]) for number in (plan.spec.gamma, plan.spec.binary_gamma)
    )
    return SimpleNamespace(
        cuda=cuda,
        real=real,
        int32=int32,
        int64=int64,
        float64=float64,
        load_logits=intrinsics.load_numbers(plan.logits, plan.voxels),
        load_targets=intrinsics.load_targets(plan.labels, plan.voxels),
        load_real=intrinsics.load_numbers(real.name, 1),
        load_double=intrinsics.load_numbers("float64", 1),
        load_fresh=intrinsics.load_fresh,
        store_grad=intrinsics.store_numbers(plan.logits, plan.voxels),
        store_real=intrinsics.store_number(real),
        store_double=intrinsics.store_number(float64),
        store_int=intrinsics.store_number(int32),
        count_up=intrinsics.count_up,
        exp=intrinsics.exp,
        log=intrinsics.log,
        sigmoid=intrinsics.sigmoid,
        softplus=intrinsics.softplus,
        power=intrinsics.times_power(1, plan.spec.power),
        power_slope=intrinsics.times_power(plan.spec.power, plan.spec.power - 1),
        focus=intrinsics.times_power(1, gamma),
        focus_slope=intrinsics.times_power(gamma, gamma - 1),
        binary_focus=intrinsics.times_power(1, binary_gamma),
        divide=intrinsics.divide,
        reciprocal=intrinsics.reciprocal,
        label=intrinsics.label_type(plan.labels),
        larger=intrinsics.larger,
        shuffle=cuda.shfl_xor_sync,
        largest=LARGEST[real],
        smallest=SMALLEST[real],
        size=real.bitwidth // 8,
    )
