"""The cuda backend: which kernels a call needs, and with which arguments.

Everything is queued on the logits' stream and nothing waits for the device. Bad labels are not
reported: they make their sample's statistics NaN. The kernels are in `_gpu_kernels`; beside them
`_gpu_intrinsics` has what they are written in, `_gpu_compile` makes machine code, `_gpu_cache`
keeps it and `_gpu_driver` launches it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import threading
from typing import Any

from . import _gpu_cache, _gpu_driver
from . import _gpu_kernels as kernels
from ._gpu_kernels import Plan

CAPABILITY = (8, 0)  # the least, which converts to bfloat16
INSTALL = 'pip install "dice_core[gpu]"'
POOLED, EACH = "batch", "none"  # reductions
NO_LOSS = (*[0] * 7, *[0.0] * 9)  # in place of its arguments


def unavailable() -> list[str]:
    """Why it does not run on this machine; empty if it does."""
    reasons = _gpu_driver.unavailable()
    try:
        importlib.metadata.version("numba-cuda")
    except importlib.metadata.PackageNotFoundError:
        reasons.append(f"needs numba-cuda, beside or instead of numba's own CUDA target: {INSTALL}")
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
    for what, layout, axis in (("x", signature.logits, 2), ("y", signature.labels, 1)):
        if _voxel_step(layout, axis) is None:
            reasons.append(
                f"{what}'s voxels are not equally far apart (strides {layout.strides} bytes); "
                f"call .contiguous() on it"
            )
    if signature.logits.shape[1] > kernels.MAX_CHANNELS:
        reasons.append(f"takes up to {kernels.MAX_CHANNELS} channels")
    return reasons


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """The sums, NaN for a sample with bad labels; 0."""
    _total(_Job(logits, labels, spec), sums.address)
    return 0


def loss(
    logits: Any, labels: Any, value: Any, derivative: Any, spec: Any, dice: Any, weight: Any
) -> None:
    """The value of a `losses.Dice`, its weights on the device or None, and, (3, N, C), the
    derivative of each sample's loss for its sums.
    """
    job = _Job(logits, labels, spec)
    share, start = 1.0 if weight else 1 / job.classes, 0.0
    if dice.reduction == "mean":
        share, start = share / max(job.samples, 1), 0.0 if job.samples else math.nan
    of_num, of_den = dice.ratio.slopes.reshape(2, 3).tolist()
    _total(
        job,
        None,
        *(value.address, derivative.address, weight.address if weight else 0),
        *(int(dice.reduction == POOLED), int(dice.reduction == EACH), int(weight is not None)),
        dice.ignore_channel if 0 <= dice.ignore_channel < job.classes else -1,
        *(share, start, dice.smooth, *of_num, *of_den),
    )


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
    job = _Job(logits, labels, spec, grad)
    if job.samples and job.voxels:
        steps = scale.strides if scale else ()
        job.launch(
            "gradient",
            job.samples * job.runs,
            *(logits.address, labels.address, grad.address, cotangent.address),
            *(scale.address if scale else 0, steps[0] if steps else 0),
            *(*job.geometry, int(scale is not None), *job.ignored),
        )
    return 0


def precompile(logits: Any, labels: Any, spec: Any) -> None:
    """Loads what calls with such arrays launch, compiled now if it never was."""
    job = _Job(logits, labels, spec, logits)
    for kind in kernels.KINDS:
        job.kernel(kind)


def _total(job: _Job, sums: int | None, *of_loss: Any) -> None:
    """Sums and, given its arguments, a loss of them, in two launches."""
    logits, labels, blocks = job.logits, job.labels, max(job.samples * job.runs, 1)
    size = kernels.COUNTER_BYTES + blocks * job.plan.columns * kernels.ITEMSIZE[job.real]
    size += -size % kernels.COUNTER_BYTES
    scratch = logits.scratch(size if sums else size + 24 * job.samples * job.classes)
    job.launch(
        "statistics",
        blocks,
        *(logits.address, labels.address, scratch.address, 0, 0, 0),
        *(*job.geometry, 0, *job.ignored),
    )
    groups = -(-3 * job.classes // kernels.WARP)
    job.launch(
        "loss" if of_loss else "total",
        max(job.samples, 1) * groups,
        *(scratch.address, sums or scratch.address + size),
        *(job.samples, job.runs, job.classes, groups),
        *(of_loss or NO_LOSS),
    )


class _Job:
    """What the launches of a call have in common."""

    def __init__(self, logits: Any, labels: Any, spec: Any, grad: Any = None) -> None:
        grad = grad or logits
        self.logits, self.labels = logits, labels
        self.device = _index(logits.layout)
        self.stream = logits.stream or 0
        _gpu_driver.wait(self.device, self.stream, labels.stream or 0)
        offsets = tuple(b.address % kernels.WORD_BYTES for b in (logits, labels, grad))
        found = _job(logits.layout, labels.layout, grad.layout, spec, offsets)
        self.plan, self.samples, self.runs, self.voxels, self.geometry, self.ignored = found
        self.classes = self.plan.classes
        self.real = "float64" if self.plan.logits == "float64" else "float32"

    def kernel(self, kind: str) -> _gpu_driver.Kernel:
        """Of KINDS, compiled for the device."""
        plan = self.plan if kind in kernels.OF_VOXELS else Plan(self.real, "uint8", 1)
        return _kernel(kind, plan, _gpu_driver.capability(self.device))

    def launch(self, kind: str, blocks: int, *arguments: Any) -> None:
        """Queues a kernel."""
        kernel = self.kernel(kind)
        kernel.launch(self.device, self.stream, blocks, kernels.THREADS, arguments)


_lock = threading.Lock()


@functools.cache
def _kernel(kind: str, plan: Plan, capability: tuple[int, int]) -> _gpu_driver.Kernel:
    with _lock:  # compilers are not made for several threads
        return _gpu_driver.load(_gpu_cache.cubin(kind, plan, capability), kernels.ENTRY)


@functools.lru_cache(1024)
def _job(x: Any, y: Any, dx: Any, spec: Any, offsets: tuple[int, ...]) -> tuple[Any, ...]:
    """(plan, samples, runs of a sample, voxels, the kernels' geometry, which labels to ignore) for
    arrays of these layouts, which lie so many bytes behind a whole word.
    """
    samples, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:]) if samples else 0
    x_v, y_v, dx_v = _voxel_step(x, 2), _voxel_step(y, 1), _voxel_step(dx, 2)
    if dx_v is None:
        raise ValueError(
            f"out's voxels are not equally far apart (strides {dx.strides} bytes), "
            f"which the cuda backend cannot write"
        )
    x_n, x_c, dx_n, dx_c = (
        array.strides[axis] if array.shape[axis] > 1 else 0 for array in (x, dx) for axis in (0, 1)
    )
    y_n = y.strides[0] if samples > 1 else 0

    together = 1
    if (x_v, y_v, dx_v) == (x.itemsize, y.itemsize, dx.itemsize):
        together = kernels.WORD_BYTES // x.itemsize
    odd = (
        (x.itemsize, offsets[0], x_n, x_c),
        (y.itemsize, offsets[1], y_n),
        (dx.itemsize, offsets[2], dx_n, dx_c),
    )
    while together > 1 and (
        voxels % together
        or any(
            byte % min(together * itemsize, kernels.WORD_BYTES)
            for itemsize, *bytes_ in odd
            for byte in bytes_
        )
    ):
        together //= 2

    plan = kernels.plan(x.dtype, y.dtype, channels, spec.power, together)
    run = plan.run(samples, voxels)
    runs = max(1, -(-voxels // run))
    geometry = (samples, runs, run, voxels, x_n, x_c, x_v, y_n, y_v, dx_n, dx_c, dx_v)
    return plan, samples, runs, voxels, geometry, _ignored(y.dtype, spec.ignore_label)


def _ignored(dtype: str, label: int | None) -> tuple[int, int]:
    """The label to leave out and the one that is not bad, if labels of this dtype can be it.

    None is left out by -1, which is bad anyway, and excused by 0, which is not.
    """
    bits = 8 if dtype == "bool" else int(dtype.lstrip("uint"))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype.startswith("int") else (0, 2**bits)
    if label is None or not low <= label < high:
        return -1, 0
    word = max(bits, 32)  # as the kernels hold it, unsigned ones in the same bits
    label = label - 2**word if label >= 2 ** (word - 1) else label
    return label, label


@functools.lru_cache(1024)
def _voxel_step(layout: Any, first: int) -> int | None:
    """How many bytes apart neighbouring voxels are, the axes from `first` on being one; None where
    they are not equally far apart.
    """
    step, beyond = layout.itemsize, None
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


def _index(layout: Any) -> int:
    return int(layout.device.partition(":")[2] or 0)
