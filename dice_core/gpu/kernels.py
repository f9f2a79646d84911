"""The CUDA kernels, each a function made for the constants of a plan.

Design
------
1. A block processes one run of a sample's voxels, whose length depends only on plan and shape.
2. A thread processes `voxels` voxels at a time and keeps their values for all classes in registers.
   With many classes, `lanes` adjacent lanes of a warp share the voxels, each with its part of the
   classes, and reduce over the classes by shuffles.
3. Logits are read once, in words of up to 16 bytes, of adjacent voxels or adjacent channels. A
   thread's words are so far apart that those of a warp are adjacent. Loads and stores have a
   predicate: beyond the last voxel and the last channel nothing is accessed, so that a gradient
   may replace the logits. The softmax is shifted by each voxel's maximum and computed in float32
   (float64 logits: float64).
4. A thread adds up its sums in registers, a warp by shuffles, and a block in shared memory, in the
   order of its warps, to one partial per block. A second launch adds the partials in order, in
   float64; its last block may also compute the loss. There are no floating-point atomics: results
   are bitwise reproducible.
5. Ignored voxels and out-of-range labels are excluded by selection, never by a factor of zero. If
   a warp found labels out of range, its sums are NaN, and so are those of the sample.
6. Offsets are in bytes, 64 bits wide.

`voxel_kernel` is the frame of all: it loads logits and targets, and stores sums or gradients
(`blocks`). What is between is `plain` for a softmax and class labels (`Spec.plain`), which can
replace logits by exponentials in place, and `general` for everything else. `totals` adds the
partials.

`cuda` and the operations on numbers are parameters, so that a simulator can substitute its own.
Loops over a thread's classes and voxels are unrolled, which keeps its arrays in registers.
Statistics and gradient share one body with a constant GRADIENT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import factor_loader, partial_writer
from .general import general_voxels
from .plain import plain_voxels
from .plan import ADDRESS, INTEGER, Arguments, Plan, itemsize
from .totals import LOSS_ARGUMENTS, TOTALS_ARGUMENTS, totals_kernel

VOXEL_ARGUMENTS = Arguments(
    x=ADDRESS,
    y=ADDRESS,
    out=ADDRESS,  # the counter and the partials, (samples, runs, classes, K); or the gradient
    cotangent=ADDRESS,  # (K, samples, classes) float64
    scale=ADDRESS,  # a factor of each sample's cotangent, if `scaled`
    scale_n=INTEGER,  # its stride in bytes, as the other strides: per sample, channel and voxel
    samples=INTEGER,
    runs=INTEGER,  # of a sample
    run=INTEGER,  # voxels of a run
    voxels=INTEGER,  # of a sample
    x_n=INTEGER,
    x_c=INTEGER,
    x_v=INTEGER,
    y_n=INTEGER,
    y_c=INTEGER,  # 0 for labels
    y_v=INTEGER,
    out_n=INTEGER,
    out_c=INTEGER,
    out_v=INTEGER,
    scaled=INTEGER,
    # The ignored label, and the label that is never counted as out of range: both ignore_label.
    # Without one, the sentinels -1, which is out of range anyway, and 0, which is in range.
    ignored=INTEGER,
    excused=INTEGER,
)
OF_VOXELS, OF_TOTALS = ("statistics", "gradient"), ("total", "loss")
KINDS = OF_VOXELS + OF_TOTALS
ARGUMENTS = dict.fromkeys(OF_VOXELS, VOXEL_ARGUMENTS) | dict.fromkeys(OF_TOTALS, TOTALS_ARGUMENTS)
NO_LOSS = dict.fromkeys(LOSS_ARGUMENTS, 0)  # the loss arguments of "total"
ENTRY = "kernel"  # its name in the cubin


def kernel(kind: str, plan: Plan, ops: Any) -> Callable[..., None]:
    """The kernel of this kind, one of KINDS."""
    if kind in OF_TOTALS:
        return totals_kernel(kind == "loss", ops)
    return voxel_kernel(plan, kind == "gradient", ops)


def voxel_kernel(plan: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """Sums a block's voxels into its partial, or computes their gradient."""
    cuda, real, int32, int64, label_type = ops.cuda, ops.real, ops.int32, ops.int64, ops.label
    load_logits, load_targets, store_grad = ops.load_logits, ops.load_targets, ops.store_grad
    floor_divide = ops.floor_divide
    V, LANES, CHANNELS, GRADIENT = plan.voxels, plan.lanes, plan.channels, gradient
    SOFT, ZERO_OR_ONE = plan.spec.soft_targets, plan.spec.targets == "binary"
    BACKGROUND, PART, LANE_CHANNELS = plan.background, plan.lane_classes, plan.lane_channels
    FULL = CHANNELS - (LANES - 1) * LANE_CHANNELS  # channels that even the last lane has
    VOXELS, STRIDE, WORD, SPACING = plan.word_voxels, plan.word_channels, plan.word, plan.spacing
    WORDS, STEP = V // VOXELS, plan.step
    X_STEP, Y_STEP = itemsize(plan.logits), itemsize(plan.labels)
    VOXELS_ADJACENT, CHANNELS_ADJACENT = plan.contiguous == "voxels", plan.contiguous == "channels"
    VALUES, SUMS = PART * V, PART * plan.fields
    TARGETS, FACTORS = VALUES if SOFT else 1, plan.factor_rows * plan.factor_width
    load_factors, store_partial = factor_loader(plan, ops), partial_writer(plan, ops)
    of_plan = plain_voxels if plan.spec.plain else general_voxels
    own_factors, of_voxels, complete = of_plan(plan, gradient, ops)

    def kernel(  # type: ignore[no-untyped-def]
        x,
        y,
        out,
        cotangent,
        scale,
        scale_n,
        samples,
        runs,
        run,
        voxels,
        x_n,
        x_c,
        x_v,
        y_n,
        y_c,
        y_v,
        out_n,
        out_c,
        out_v,
        scaled,
        ignored,
        excused,
    ):
        # Steps that are known when the kernel is compiled cost no arithmetic.
        if VOXELS_ADJACENT:
            x_v, y_v, out_v = int64(X_STEP), int64(Y_STEP), int64(X_STEP)
        if CHANNELS_ADJACENT:
            x_c, out_c = int64(X_STEP), int64(X_STEP)
            if SOFT:
                y_c = int64(Y_STEP)
            else:
                y_v = int64(Y_STEP)
        thread = int32(cuda.threadIdx.x)
        block = int64(cuda.blockIdx.x)
        sample = int64(floor_divide(int32(block), int32(runs)))
        first_class = int32(thread % int32(LANES) * int32(PART))
        ignored, excused = label_type(ignored), label_type(excused)
        value = cuda.local.array(VALUES, real)
        label = cuda.local.array(V, label_type)
        target = cuda.local.array(TARGETS, real)  # soft targets; -1: ignored or out of range
        out_of_range = int32(0)
        if GRADIENT:
            factor = cuda.shared.array(FACTORS, real)
            load_factors(factor, cotangent, scale, scale_n, scaled, samples, sample, thread)
            own_factor = own_factors(factor, first_class)
            sums = own_factor
        else:
            sums = cuda.local.array(SUMS, real)
            for k in range(SUMS):
                sums[k] = real(0)
            factor = own_factor = sums

        first = (block - sample * runs) * run
        place = int32(thread // int32(LANES) * int32(VOXELS))
        voxel = first + int64(place)
        x_row = sample * x_n + int64(first_class) * x_c + voxel * x_v
        y_row = sample * y_n + int64(first_class) * y_c + voxel * y_v
        out_row = sample * out_n + int64(first_class) * out_c + voxel * out_v
        remaining = int32(min(run, voxels - first))
        while remaining > int32(0):  # the same for all threads, as shuffles need
            left = int32(remaining - place)  # voxels from the thread's first one on
            for i in range(BACKGROUND * V):
                value[i] = real(0)
            if not SOFT:
                for w in range(WORDS):
                    y_at = y_row + int64(w * SPACING) * y_v
                    loaded = load_targets(y, y_at, left > int32(w * SPACING))
                    for j in range(VOXELS):
                        label[w * VOXELS + j] = loaded[j]
            x_at, y_at = x_row, y_row
            for c in range(0, LANE_CHANNELS, STRIDE):
                exists = c < FULL or first_class < int32(CHANNELS - c)
                for w in range(WORDS):
                    inside = left > int32(w * SPACING)
                    logits = load_logits(x, x_at + int64(w * SPACING) * x_v, inside and exists)
                    for i in range(WORD):
                        at = (BACKGROUND + c + i % STRIDE) * V + w * VOXELS + i // STRIDE
                        value[at] = logits[i]
                    if SOFT:
                        targets = load_targets(
                            y, y_at + int64(w * SPACING) * y_v, inside and exists
                        )
                        for i in range(WORD):
                            at = (BACKGROUND + c + i % STRIDE) * V + w * VOXELS + i // STRIDE
                            t = targets[i]
                            if ZERO_OR_ONE:
                                in_range = (t == label_type(0)) | (t == label_type(1))
                            else:
                                in_range = (t >= label_type(0)) & (t <= label_type(1))
                            counts = inside and exists
                            valid = counts & in_range & (t != ignored)
                            target[at] = real(t) if valid else real(-1)
                            if not GRADIENT and counts and not in_range and t != excused:
                                out_of_range = int32(out_of_range + int32(1))
                x_at += int64(STRIDE) * x_c
                y_at += int64(STRIDE) * y_c
            out_of_range = of_voxels(
                value,
                target,
                label,
                sums,
                factor,
                own_factor,
                left,
                first_class,
                ignored,
                excused,
                out_of_range,
            )
            if GRADIENT:
                for w in range(WORDS):
                    inside = left > int32(w * SPACING)
                    at = out_row + int64(w * SPACING) * out_v
                    for c in range(0, LANE_CHANNELS, STRIDE):
                        exists = c < FULL or first_class < int32(CHANNELS - c)
                        first_value = (BACKGROUND + c) * V + w * VOXELS
                        store_grad(out, at, value, first_value, inside and exists)
                        at += int64(STRIDE) * out_c
            x_row += int64(STEP) * x_v
            y_row += int64(STEP) * y_v
            out_row += int64(STEP) * out_v
            remaining = int32(remaining - int32(STEP))

        if not GRADIENT:
            complete(sums)
            store_partial(out, sums, out_of_range, block, thread)

    return kernel
