"""The CUDA kernels, each a function made for the constants of a plan.

Design
------
1. A block processes one run of a sample's voxels, whose length depends only on plan and shape.
2. A thread processes `voxels` adjacent voxels and keeps their values for all classes in registers.
   With many classes, `lanes` adjacent lanes of a warp share the voxels, each with its part of the
   classes, and reduce over the classes by shuffles.
3. Logits are read once, in words of up to 16 bytes. The softmax is shifted by each voxel's maximum
   and computed in float32 (float64 logits: float64).
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
from .plan import ADDRESS, INTEGER, Arguments, Plan
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
    quotient = ops.quotient
    V, LANES, CLASSES, GRADIENT = plan.voxels, plan.lanes, plan.classes, gradient
    SOFT, ZERO_OR_ONE = plan.spec.soft_targets, plan.spec.targets == "binary"
    BACKGROUND, PART = plan.background, plan.lane_classes
    FULL = CLASSES - (LANES - 1) * PART  # classes that even the last lane has
    VALUES, SUMS, STEP = PART * V, PART * plan.fields, plan.step
    TARGETS, FACTORS = VALUES if SOFT else 1, plan.factor_rows * plan.factor_width
    LOWEST = float("-inf")
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
        thread = int32(cuda.threadIdx.x)
        block = int64(cuda.blockIdx.x)
        sample = int64(quotient(int32(block), int32(runs)))
        first_class = int32(thread % int32(LANES) * int32(PART))
        # In place of classes beyond the last one, a lane loads the last: that takes no branch.
        first_row = first_class if FULL > 0 else int32(min(first_class, int32(CLASSES - 1)))
        ignored, excused = label_type(ignored), label_type(excused)
        value = cuda.local.array(VALUES, real)
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
        stop = min(first + run, voxels)
        while first < stop:  # the same for all threads, as shuffles need
            voxel = first + int64(thread // int32(LANES)) * int64(V)
            inside = voxel < stop
            at = min(voxel, voxels - int64(V))
            x_row = sample * x_n + int64(first_row) * x_c + at * x_v
            y_row = sample * y_n + int64(first_row) * y_c + at * y_v
            labels = load_targets(y, y_row)
            for c in range(PART):
                if c < BACKGROUND:
                    for j in range(V):
                        value[c * V + j] = real(0)
                else:
                    exists = c < FULL or first_class < int32(CLASSES - c)
                    if c > BACKGROUND:
                        x_row += x_c if exists else int64(0)
                        y_row += y_c if exists else int64(0)
                    logits = load_logits(x, x_row)
                    for j in range(V):
                        value[c * V + j] = logits[j] if exists else real(LOWEST)
                    if SOFT:
                        targets = load_targets(y, y_row)
                        for j in range(V):
                            t = targets[j]
                            if ZERO_OR_ONE:
                                in_range = (t == label_type(0)) | (t == label_type(1))
                            else:
                                in_range = (t >= label_type(0)) & (t <= label_type(1))
                            counts = inside and exists
                            valid = counts & in_range & (t != ignored)
                            target[c * V + j] = real(t) if valid else real(-1)
                            if not GRADIENT and counts and not in_range and t != excused:
                                out_of_range = int32(out_of_range + int32(1))
            out_of_range = of_voxels(
                value,
                target,
                labels,
                sums,
                factor,
                own_factor,
                inside,
                first_class,
                ignored,
                excused,
                out_of_range,
            )
            if GRADIENT:
                where = sample * out_n + int64(first_class) * out_c + at * out_v
                for c in range(BACKGROUND, PART):
                    exists = c < FULL or first_class < int32(CLASSES - c)
                    store_grad(out, where, value, c * V, inside and exists)
                    where += out_c
            first += int64(STEP)

        if not GRADIENT:
            complete(sums)
            store_partial(out, sums, out_of_range, block, thread)

    return kernel
