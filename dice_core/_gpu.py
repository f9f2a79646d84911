"""The cuda backend: which kernels a call needs, and with which arguments.

Everything is queued on the logits' stream and nothing waits for the device. Bad labels are not
reported: they make their sample's statistics NaN. The kernels are in `_gpu_kernels`; beside them
`_gpu_intrinsics` has what they are written in, `_gpu_compile` makes machine code, `_gpu_cache`
keeps it and `_gpu_driver` launches it.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import replace
from typing import Any

from . import _gpu_cache, _gpu_driver
from . import _gpu_kernels as kernels
from . import _gpu_plan as plans
from ._gpu_plan import Plan
from .spec import STATISTICS, VOXELS

CAPABILITY = (8, 0)  # the least, which converts to bfloat16
INSTALL = 'pip install "dice_core[gpu]"'
DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}  # binary, of whole numbers
NO_LOSS = (*[0] * 7, *[0.0] * 10)  # in place of its arguments


def unavailable() -> list[str]:
    """Why it does not run on this machine; empty if it does."""
    reasons = _gpu_driver.unavailable()
    if _gpu_cache.version("numba-cuda") is None:
        reasons.append(f"needs numba-cuda, beside or instead of numba's own CUDA target: {INSTALL}")
    linker = _gpu_cache.version("nvidia-nvjitlink")
    if not reasons and linker and _gpu_driver.version() < int(linker.split(".")[0]):
        reasons.append(
            f"the NVIDIA driver is made for CUDA {_gpu_driver.version()}, the compiler "
            f"(nvidia-nvjitlink {linker}) for a later one; update the driver, or install a "
            f"compiler of its version: pip install numba-cuda[cu12]"
        )
    return reasons


def unsupported(signature: Any) -> list[str]:
    """Why it does not take such calls; empty if it does."""
    reasons = []
    device = _index(signature.logits)
    found = _gpu_driver.capability(device)
    if found < CAPABILITY:
        has, needs = (".".join(map(str, number)) for number in (found, CAPABILITY))
        reasons.append(
            f"{signature.logits.device} ({_gpu_driver.name(device)}) has compute capability {has}, "
            f"at least {needs} is needed"
        )
    first = 2 if signature.spec.dense else 1  # of y's axes over voxels
    for what, layout, axis in (("x", signature.logits, 2), ("y", signature.labels, first)):
        if _voxel_step(layout, axis) is None:
            reasons.append(
                f"{what}'s voxels are not equally far apart (strides {layout.strides} bytes); "
                f"call .contiguous() on it"
            )
    most = plans.most_channels(signature.logits.dtype, signature.spec)
    if signature.logits.shape[1] > most:
        reasons.append(f"takes up to {most} channels")
    return reasons


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """The sums, NaN for a sample with bad labels; 0."""
    _total(logits, labels, spec, sums.address, NO_LOSS)
    return 0


def loss(
    logits: Any, labels: Any, value: Any, derivative: Any, spec: Any, ratio: Any, weight: Any
) -> None:
    """The value of a `losses.Ratio`, its weights on the device or None, and, (K, N, C), the
    derivative of each sample's loss for its sums.
    """
    of_loss = (
        *(value.address, derivative.address, weight.address if weight else 0),
        *(int(ratio.pooled), int(ratio.each), int(weight is not None)),
        *(ratio.left_out, ratio.share, ratio.start, ratio.excess, ratio.smooth),
        *(*ratio.num, *ratio.den),
    )
    _total(logits, labels, spec, None, of_loss)


def gradient(
    logits: Any,
    labels: Any,
    cotangent: Any,
    grad: Any,
    spec: Any,
    threads: int,
    scale: Any = None,
) -> int:
    """The gradient for the cotangent, each sample's times its entry of `scale`, numbers () or (N,)
    of the loss's dtype; 0. Raises ValueError for strides of `grad` that it cannot write.
    """
    job, stream = _prepared(logits, labels, spec, grad)
    for other in (grad, scale):
        if other is not None:
            _follow(job, stream, other)
    if job.samples and job.voxels:
        job.launch(
            "gradient",
            stream,
            job.blocks,
            *(logits.address, labels.address, grad.address, cotangent.address),
            scale.address if scale else 0,
            scale.strides[0] if scale and scale.shape else 0,
            *(*job.geometry, int(scale is not None), *job.ignored),
        )
    return 0


def precompile(logits: Any, labels: Any, spec: Any) -> None:
    """Makes ready what calls with such arrays launch, compiled now if it never was."""
    job, _ = _prepared(logits, labels, spec)
    for kind in kernels.KINDS:
        if kind != "loss" or {*STATISTICS, VOXELS}.issuperset(spec.statistics):
            job.kernel(kind).make_ready(job.device)


def wait(logits: Any) -> None:
    """Waits until what was queued for such logits is done."""
    _gpu_driver.synchronize(_index(logits.layout), logits.stream or 0)


def _total(logits: Any, labels: Any, spec: Any, sums: int | None, of_loss: Any) -> None:
    """Sums to this address or, without one, the loss of them, in two launches."""
    job, stream = _prepared(logits, labels, spec)
    kind, size = ("total", 0) if of_loss is NO_LOSS else ("loss", job.sums)
    scratch = logits.scratch(job.partials + size)
    if sums is None:
        sums = scratch.address + job.partials
    job.launch(
        "statistics",
        stream,
        job.blocks,
        *(logits.address, labels.address, scratch.address, 0, 0, 0),
        *(*job.geometry, 0, *job.ignored),
    )
    groups = -(-job.plan.sums * job.classes // plans.WARP)
    job.launch(
        kind,
        stream,
        max(job.samples, 1) * groups,
        *(scratch.address, sums),
        *(job.samples, job.runs, job.plan.sums, job.classes, groups, *of_loss),
    )


def _prepared(logits: Any, labels: Any, spec: Any, grad: Any = None) -> tuple[_Job, int]:
    """What to launch, and on which stream: the logits', which then waits for the labels'."""
    grad = grad or logits
    offsets = tuple(b.address % plans.WORD_BYTES for b in (logits, labels, grad))
    job = _job(logits.layout, labels.layout, grad.layout, spec, offsets)
    stream = logits.stream or 0
    _follow(job, stream, labels)
    return job, stream


def _follow(job: _Job, stream: int, array: Any) -> None:
    """What is queued from now on finds in the array what its own stream has written."""
    if (array.stream or 0) != stream:
        _gpu_driver.wait(job.device, stream, array.stream or 0)


class _Job:
    """What calls with arrays that lie alike have in common, found out once.

    `offsets`: how many bytes behind a whole word logits, labels and gradient begin.
    """

    def __init__(self, x: Any, y: Any, dx: Any, spec: Any, offsets: tuple[int, ...]) -> None:
        self.device = _index(x)
        self.samples, channels = x.shape[:2]
        self.voxels = voxels = math.prod(x.shape[2:]) if self.samples else 0
        x_v, y_v, dx_v = _voxel_step(x, 2), _voxel_step(y, 1 + spec.dense), _voxel_step(dx, 2)
        if dx_v is None:
            raise ValueError(
                f"out's voxels are not equally far apart (strides {dx.strides} bytes), "
                f"which the cuda backend cannot write"
            )
        rows = (x_n, x_c), (y_n, y_c), (dx_n, dx_c) = (
            (_stride(x, 0), _stride(x, 1)),
            (_stride(y, 0), _stride(y, 1) if spec.dense else 0),
            (_stride(dx, 0), _stride(dx, 1)),
        )
        side_by_side = 1
        if (x_v, y_v, dx_v) == (x.itemsize, y.itemsize, dx.itemsize):
            side_by_side = min(
                _side_by_side(voxels, array.itemsize, offset, *steps)
                for array, offset, steps in zip((x, y, dx), offsets, rows, strict=True)
            )
        of_kernel = replace(spec, ignore_label=None)
        self.plan = plans.plan(x.dtype, y.dtype, channels, of_kernel, side_by_side)
        self.classes = self.plan.classes
        run = self.plan.run(self.samples, voxels)
        self.runs = max(1, -(-voxels // run))
        self.blocks = max(1, self.samples * self.runs)
        self.geometry = (
            *(self.samples, self.runs, run, voxels),
            *(x_n, x_c, x_v, y_n, y_c, y_v, dx_n, dx_c, dx_v),
        )
        self.ignored = _ignored(y.dtype, spec.ignore_label)
        self.real = "float64" if x.dtype == "float64" else "float32"
        self.of_totals = Plan(self.real, "uint8", 1)  # of which only the first matters
        partials = self.blocks * self.plan.columns * plans.ITEMSIZE[self.real]
        words = -(-(plans.COUNTER_BYTES + partials) // plans.WORD_BYTES)
        self.partials = words * plans.WORD_BYTES  # bytes, the counter included
        self.sums = 8 * self.plan.sums * self.samples * self.classes  # bytes
        self.kernels: dict[str, _gpu_driver.Kernel] = {}

    def kernel(self, kind: str) -> _gpu_driver.Kernel:
        """Of KINDS, compiled for the device."""
        if kind not in self.kernels:
            plan = self.plan if kind in kernels.OF_VOXELS else self.of_totals
            self.kernels[kind] = _kernel(kind, plan, _gpu_driver.capability(self.device))
        return self.kernels[kind]

    def launch(self, kind: str, stream: int, blocks: int, *arguments: Any) -> None:
        """Queues a kernel."""
        self.kernel(kind).launch(self.device, stream, blocks, plans.THREADS, *arguments)


_job = functools.lru_cache(1024)(_Job)
_lock = threading.Lock()


@functools.cache
def _kernel(kind: str, plan: Plan, capability: tuple[int, int]) -> _gpu_driver.Kernel:
    with _lock:  # compilers are not made for several threads
        cubin = _gpu_cache.cubin(kind, plan, capability)
        return _gpu_driver.load(cubin, kernels.ENTRY, kernels.ARGUMENTS[kind])


def _side_by_side(voxels: int, itemsize: int, *bytes_apart: int) -> int:
    """How many neighbouring voxels are whole words wherever a multiple of them begins."""
    count = plans.WORD_BYTES // min(plans.ITEMSIZE.values())
    while voxels % count or any(
        step % min(count * itemsize, plans.WORD_BYTES) for step in bytes_apart
    ):
        count //= 2
    return count


def _ignored(dtype: str, label: int | None) -> tuple[int, int]:
    """The label to leave out and the one that is not bad, if labels of this dtype can be it.

    None is left out by -1, which is bad anyway, and excused by 0, which is not.
    """
    if dtype in DIGITS:
        return (label, label) if label is not None and _is_float(label, dtype) else (-1, 0)
    bits = 8 if dtype == "bool" else int(dtype.lstrip("uint"))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype.startswith("int") else (0, 2**bits)
    if label is None or not low <= label < high:
        return -1, 0
    word = max(bits, 32)  # as the kernels hold it, unsigned ones in the same bits
    label = label - 2**word if label >= 2 ** (word - 1) else label
    return label, label


def _is_float(label: int, dtype: str) -> bool:
    """Whether it is a number of this dtype and, as kernels take it, of 64 bits."""
    odd = abs(label) // (label & -label or 1)
    room = 16 if dtype == "float16" else 63
    return odd.bit_length() <= DIGITS[dtype] and label.bit_length() <= room


@functools.lru_cache(1024)
def _voxel_step(layout: Any, first: int) -> int | None:
    """How many bytes apart neighbouring voxels are, the axes from `first` on being one; None where
    they are not equally far apart.
    """
    step, beyond = layout.itemsize, None
    if 0 in layout.shape:
        return step
    for n, stride in zip(
        layout.shape[: first - 1 : -1], layout.strides[: first - 1 : -1], strict=True
    ):
        if n == 1:
            continue
        if beyond is None:
            step = stride
        elif stride != beyond:
            return None
        beyond = n * stride
    return step


def _stride(layout: Any, axis: int) -> int:
    """In bytes; 0 along a single element."""
    return layout.strides[axis] if layout.shape[axis] > 1 else 0


def _index(layout: Any) -> int:
    return int(layout.device.partition(":")[2] or 0)
