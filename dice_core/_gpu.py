"""The cuda backend: which kernels a call needs, and their launch arguments.

Everything is queued on the logits' stream and nothing synchronizes, so labels out of range are not
reported: they make their sample's sums NaN. `dice_core.gpu` has the kernels, and how they are
compiled, cached and launched.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import replace
from typing import Any, NamedTuple

from . import allocators, buffers
from .gpu import cache, driver, kernels, toolkit
from .gpu import plan as plans
from .gpu.plan import Plan
from .spec import BASIC, VOXELS

CAPABILITY = (8, 0)  # minimum: required by conversions to bfloat16
NEWEST_CUDA = 13  # the extra `gpu`, for any later driver too
SIGNIFICANT_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def unavailable() -> list[str]:
    """The reasons why it does not run on this machine; empty if it does."""
    reasons = driver.unavailable()
    cuda = driver.version() if not reasons else NEWEST_CUDA
    if toolkit.version("numba-cuda") is None:
        return [
            *reasons,
            f"needs numba-cuda, which replaces numba's built-in CUDA target: "
            f"{toolkit.install(cuda)}",
        ]
    if reasons:
        return reasons
    linker = toolkit.linker()
    if linker is None:
        return [f"finds no nvJitLink of a CUDA toolkit: {toolkit.install(cuda)}"]
    if cuda < linker[0]:
        return [
            f"the NVIDIA driver supports CUDA {cuda}, the compiler (nvJitLink "
            f"{linker[0]}.{linker[1]}) needs one for CUDA {linker[0]}; update the driver, or "
            f"{toolkit.replace(cuda)}"
        ]
    return []


def unsupported(signature: Any) -> list[str]:
    """The reasons why it does not support such calls; empty if it does."""
    reasons = []
    device = _index(signature.logits)
    found = driver.capability(device)
    if found < CAPABILITY:
        has, needs = (".".join(map(str, number)) for number in (found, CAPABILITY))
        reasons.append(
            f"{signature.logits.device} ({driver.name(device)}) has compute capability {has}, "
            f"at least {needs} is needed"
        )
    first = 2 if signature.spec.soft_targets else 1  # of y's axes over voxels
    for what, layout, axis in (("x", signature.logits, 2), ("y", signature.labels, first)):
        if _voxel_step(layout, axis) is None:
            reasons.append(
                f"{what}'s voxels are not equally spaced in memory (strides {layout.strides} "
                f"bytes); call .contiguous() on it"
            )
    most = plans.most_channels(signature.logits.dtype, signature.spec)
    if signature.logits.shape[1] > most:
        reasons.append(f"supports at most {most} channels")
    return reasons


def statistics(logits: Any, labels: Any, sums: Any, spec: Any, threads: int) -> int:
    """The sums, NaN for a sample with labels out of range; returns 0."""
    _sum(logits, labels, spec, "total", sums.address, kernels.NO_LOSS, ())
    return 0


def loss(
    logits: Any,
    labels: Any,
    value: Any,
    derivative: Any,
    spec: Any,
    ratio: Any,
    weight: Any,
    threads: int,
) -> int:
    """The value of a `losses.Ratio`, whose class weights are on the device or None, and the
    derivative of each sample's loss with respect to its sums, (K, N, C); returns 0.
    """
    loss_arguments = {
        "value": value.address,
        "derivative": derivative.address,
        "weights": weight.address if weight else 0,
        "pooled": ratio.pooled,
        "per_sample": ratio.per_sample,
        "weighted": weight is not None,
        "ignore_channel": ratio.ignore_channel,
        "share": ratio.share,
        "start": ratio.start,
        "excess": ratio.excess,
        "smooth": ratio.smooth,
        **dict(zip(("num_i", "num_p", "num_y"), ratio.num, strict=True)),
        **dict(zip(("den_i", "den_p", "den_y"), ratio.den, strict=True)),
    }
    _sum(logits, labels, spec, "loss", None, loss_arguments, (weight,))
    return 0


def gradient(
    logits: Any,
    labels: Any,
    cotangent: Any,
    grad: Any,
    spec: Any,
    threads: int,
    scale: Any = None,
) -> int:
    """The gradient for the cotangent, each sample's times its entry of `scale`, () or (N,) numbers
    of the loss's dtype; returns 0. Raises ValueError for strides of `grad` that the kernels cannot
    write.
    """
    job, stream = _prepared(logits, labels, spec, grad, (grad, cotangent, scale))
    if job.samples and job.voxels:
        job.launch(
            "gradient",
            stream,
            job.blocks,
            **job.geometry,
            x=logits.address,
            y=labels.address,
            out=grad.address,
            cotangent=cotangent.address,
            scale=scale.address if scale else 0,
            scale_n=scale.strides[0] if scale and scale.shape else 0,
            scaled=scale is not None,
        )
    return 0


def precompile(logits: Any, labels: Any, spec: Any) -> None:
    """Compiles the kernels that calls with such arrays launch, and loads them on the device."""
    job, _ = _prepared(logits, labels, spec)
    for kind in kernels.KINDS:
        if kind != "loss" or {*BASIC, VOXELS}.issuperset(spec.fields):
            job.kernel(kind).load_on(job.device)


def wait(logits: Any) -> None:
    """Waits for the work queued on the logits' stream."""
    driver.synchronize(_index(logits.layout), logits.stream or 0)


def _sum(
    logits: Any,
    labels: Any,
    spec: Any,
    kind: str,
    sums: int | None,
    loss_arguments: dict[str, Any],
    others: tuple[Any, ...],
) -> None:
    """Two launches: the partial sums of all blocks, then their totals, at the address `sums` or, if
    that is None, in scratch memory for the loss, which also reads `others`.
    """
    job, stream = _prepared(logits, labels, spec, None, others)
    size = job.partials_size + (job.sums_size if sums is None else 0)
    scratch = buffers.of(allocators.empty(logits, (size,), "uint8"), "scratch")
    job.launch(
        "statistics",
        stream,
        job.blocks,
        **job.geometry,
        x=logits.address,
        y=labels.address,
        out=scratch.address,
        **dict.fromkeys(("cotangent", "scale", "scale_n", "scaled"), 0),
    )
    groups = -(-job.plan.fields * job.plan.classes // plans.WARP)
    job.launch(
        kind,
        stream,
        max(job.samples, 1) * groups,
        partials=scratch.address,
        sums=scratch.address + job.partials_size if sums is None else sums,
        samples=job.samples,
        runs=job.runs,
        fields=job.plan.fields,
        classes=job.plan.classes,
        groups=groups,
        **loss_arguments,
    )
    if not allocators.is_ordered(logits):
        wait(logits)  # otherwise the library may reuse the scratch memory while the kernels run


def _prepared(
    logits: Any, labels: Any, spec: Any, grad: Any = None, others: tuple[Any, ...] = ()
) -> tuple[_Job, int]:
    """The job, and its stream: that of the logits, which waits for those of all other arrays. An
    array that dice_core made is on it already, so that it can be freed while the kernels run.
    """
    grad = grad or logits
    offsets = tuple(b.address % plans.WORD_BYTES for b in (logits, labels, grad))
    job = _job(logits.layout, labels.layout, grad.layout, spec, offsets)
    stream = logits.stream or 0
    for array in (labels, *others):
        if array is not None and (array.stream or 0) != stream:
            driver.wait(job.device, stream, array.stream or 0)
    return job, stream


class _Job:
    """The launch parameters shared by all calls whose arrays have the same layouts.

    `offsets`: the addresses of logits, labels and gradient modulo a word.
    """

    def __init__(self, x: Any, y: Any, dx: Any, spec: Any, offsets: tuple[int, ...]) -> None:
        self.device = _index(x)
        self.samples, channels = x.shape[:2]
        self.voxels = voxels = math.prod(x.shape[2:]) if self.samples else 0
        soft = spec.soft_targets
        if _voxel_step(dx, 2) is None:
            raise ValueError(
                f"out's voxels are not equally spaced in memory (strides {dx.strides} bytes), "
                f"which the cuda backend cannot write"
            )
        arrays = zip((x, y, dx), offsets, (True, soft, True), strict=True)
        logits, targets, grad = (_steps(*each) for each in arrays)
        contiguous, adjacent = _contiguous(logits, targets, grad, soft, channels, voxels)
        kernel_spec = replace(spec, ignore_label=None)
        self.plan = plans.plan(
            x.dtype, y.dtype, channels, kernel_spec, voxels, contiguous, adjacent
        )
        run = self.plan.run(self.samples, voxels)
        self.runs = max(1, -(-voxels // run))
        self.blocks = max(1, self.samples * self.runs)
        ignored, excused = _ignored(y.dtype, spec.ignore_label)
        self.geometry = {
            "samples": self.samples,
            "runs": self.runs,
            "run": run,
            "voxels": voxels,
            "x_n": logits.sample,
            "x_c": logits.channel,
            "x_v": logits.voxel,
            "y_n": targets.sample,
            "y_c": targets.channel,
            "y_v": targets.voxel,
            "out_n": grad.sample,
            "out_c": grad.channel,
            "out_v": grad.voxel,
            "ignored": ignored,
            "excused": excused,
        }
        real = "float64" if x.dtype == "float64" else "float32"
        self.totals_plan = Plan(real, "uint8", 1)  # these depend only on the partials' dtype
        partials = self.blocks * self.plan.columns * plans.ITEMSIZE[real]
        words = -(-(plans.COUNTER_BYTES + partials) // plans.WORD_BYTES)
        self.partials_size = words * plans.WORD_BYTES  # bytes, with the counter
        self.sums_size = 8 * self.plan.fields * self.samples * self.plan.classes  # bytes
        self.kernels: dict[str, driver.Kernel] = {}

    def kernel(self, kind: str) -> driver.Kernel:
        """The kernel of this kind, compiled for the device."""
        if kind not in self.kernels:
            plan = self.plan if kind in kernels.OF_VOXELS else self.totals_plan
            self.kernels[kind] = _kernel(kind, plan, driver.capability(self.device))
        return self.kernels[kind]

    def launch(self, kind: str, stream: int, blocks: int, **arguments: Any) -> None:
        """Queues a kernel."""
        parameters = kernels.ARGUMENTS[kind].pack(arguments)
        self.kernel(kind).launch(self.device, stream, blocks, plans.THREADS, parameters)


_job = functools.lru_cache(1024)(_Job)
_lock = threading.Lock()


@functools.cache
def _kernel(kind: str, plan: Plan, capability: tuple[int, int]) -> driver.Kernel:
    with _lock:  # numba's compiler is not thread-safe
        return driver.load(cache.cubin(kind, plan, capability), kernels.ENTRY)


class _Steps(NamedTuple):
    """Bytes from an array's sample, channel and voxel to the next, and to each of its numbers.

    `offset`: of the first number from a word.
    """

    sample: int
    channel: int
    voxel: int
    itemsize: int
    offset: int

    def adjacent(self, size: int, *others: int) -> int:
        """How many adjacent numbers of rows of this size can be accessed as whole words, at every
        multiple of that number. `others`: the steps between rows.
        """
        count = plans.WORD_BYTES // min(plans.ITEMSIZE.values())
        while size % count or any(
            step % min(count * self.itemsize, plans.WORD_BYTES) for step in (*others, self.offset)
        ):
            count //= 2
        return count


def _steps(layout: Any, offset: int, has_channels: bool) -> _Steps:
    voxel = _voxel_step(layout, 2 if has_channels else 1)
    assert voxel is not None  # or `unsupported` refuses the call
    channel = _step(layout, 1) if has_channels else 0
    return _Steps(_step(layout, 0), channel, voxel, layout.itemsize, offset)


def _contiguous(
    logits: _Steps, targets: _Steps, grad: _Steps, soft: bool, channels: int, voxels: int
) -> tuple[str, int]:
    """The axis along which the numbers of all arrays are adjacent, as plans name it, and how many
    of them can be accessed as whole words.
    """
    everything = (logits, grad, targets)
    if all(each.voxel == each.itemsize for each in everything):
        return "voxels", min(each.adjacent(voxels, *each[:2]) for each in everything)
    with_channels = everything if soft else (logits, grad)
    if all(each.channel == each.itemsize for each in with_channels) and (
        soft or targets.voxel == targets.itemsize
    ):
        steps = ((each, each.sample, each.voxel) for each in with_channels)
        return "channels", min(each.adjacent(channels, *others) for each, *others in steps)
    return "", 1


def _ignored(dtype: str, label: int | None) -> tuple[int, int]:
    """The kernels' `ignored` and `excused`: the sentinels -1 and 0 without an ignore label, or for
    one that this dtype cannot represent.
    """
    if dtype in SIGNIFICANT_BITS:
        return (label, label) if label is not None and _is_float(label, dtype) else (-1, 0)
    bits = 1 if dtype == "bool" else int(dtype.lstrip("uint"))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype.startswith("int") else (0, 2**bits)
    if label is None or not low <= label < high:
        return -1, 0
    word = max(bits, 32)  # kernels compare labels as signed integers of this many bits
    label = label - 2**word if label >= 2 ** (word - 1) else label
    return label, label


def _is_float(label: int, dtype: str) -> bool:
    """Whether this dtype represents it exactly, and so does int64, the type of the argument."""
    odd_part = abs(label) // (label & -label or 1)
    bits = 16 if dtype == "float16" else 63
    return odd_part.bit_length() <= SIGNIFICANT_BITS[dtype] and label.bit_length() <= bits


@functools.lru_cache(1024)
def _voxel_step(layout: Any, first: int) -> int | None:
    """Bytes from one voxel to the next, over the merged axes from `first` on; None if that differs
    between voxels.
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


def _step(layout: Any, axis: int) -> int:
    """The stride in bytes; 0 for an axis of one element, whose stride is arbitrary."""
    return layout.strides[axis] if layout.shape[axis] > 1 else 0


def _index(layout: Any) -> int:
    return int(layout.device.partition(":")[2] or 0)
