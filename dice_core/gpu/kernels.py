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
5. Ignored voxels and out-of-range labels are excluded by selection, never by a factor of zero.
   Out-of-range labels are counted beside the sums; if there are any, the sums of their sample are
   NaN.
6. Offsets are in bytes, 64 bits wide.

`plain_kernel` computes the sums of a softmax and class labels (`Spec.plain`), `general` all others,
with the same design and the same `blocks`; their loops over voxels differ, since only that of the
former can replace logits by exponentials in place. `totals` adds the partials of either.

`cuda` and the operations on numbers are parameters, so that a simulator can substitute its own.
Loops over a thread's classes and voxels are unrolled, which keeps its arrays in registers.
Statistics and gradient share one body with a constant GRADIENT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .blocks import factor_loader, partial_writer, summands
from .general import general_kernel
from .plan import ADDRESS, INTEGER, Arguments, Plan
from .totals import LOSS_ARGUMENTS, TOTALS_ARGUMENTS, totals_kernel

VOXEL_ARGUMENTS = Arguments(
    x=ADDRESS,
    y=ADDRESS,
    out=ADDRESS,  # the counter and the partials, (samples, runs, columns); or the gradient
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
    of_voxels = plain_kernel if plan.spec.plain else general_kernel
    return of_voxels(plan, kind == "gradient", ops)


def plain_kernel(plan: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """Sums a block's voxels into its partial, or computes their gradient."""
    cuda, real, int32, int64 = ops.cuda, ops.real, ops.int32, ops.int64
    load_logits, load_targets, store_grad = ops.load_logits, ops.load_targets, ops.store_grad
    power, lower_power, power_complement = ops.power, ops.lower_power, ops.power_complement
    exp, log, reciprocal, fma, fmax = ops.exp, ops.log, ops.reciprocal, ops.fma, ops.fmax
    shuffle, label_type = ops.shuffle, ops.label
    modulation, modulation_slope = ops.modulation, ops.modulation_slope
    V, LANES, CLASSES, GRADIENT = plan.voxels, plan.lanes, plan.classes, gradient
    LABELS = plan.label_limit
    CROSS_ENTROPY, FOCAL = plan.spec.gamma is not None, bool(plan.spec.gamma)
    NLL = FOCAL or (CROSS_ENTROPY and not GRADIENT)  # needs -log of the label's probability,
    REST = FOCAL or GRADIENT  # and those of all other classes together
    LINEAR = plan.spec.p == 1
    BACKGROUND = CLASSES - plan.channels  # 1: a single channel has a class 0 with logit 0 before it
    PART = plan.lane_channels + BACKGROUND  # classes per lane,
    FULL = CLASSES - (LANES - 1) * PART  # and those that even the last lane has
    VALUES, SUMS, STEP = PART * V, summands(plan, PART), plan.step
    ROWS = plan.fields - 1  # of the cotangent, without target_sum's
    FACTORS = ROWS * CLASSES
    SHUFFLES, FULL_MASK = LANES.bit_length() - 1, 0xFFFFFFFF
    LOWEST, SMALLEST = float("-inf"), ops.smallest
    load_factors = factor_loader(plan, CLASSES, ROWS, ops)
    store_partial = partial_writer(plan, PART, ops)

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
        sample = block // runs
        first_class = int32(thread % int32(LANES) * int32(PART))
        # In place of classes beyond the last one, a lane loads the last: that takes no branch.
        first_row = first_class if FULL > 0 else int32(min(first_class, int32(CLASSES - 1)))
        ignored, excused = label_type(ignored), label_type(excused)
        value = cuda.local.array(VALUES, real)  # logits, exponentials, probabilities, gradient
        if NLL:
            label_logit = cuda.local.array(V, real)
        if GRADIENT:
            factor = cuda.shared.array(FACTORS, real)
            load_factors(factor, cotangent, scale, scale_n, scaled, samples, sample, thread)
            pred_factor = cuda.local.array(PART, real)
            for c in range(PART):
                pred_factor[c] = real(0)
                if c < FULL or first_class + int32(c) < int32(CLASSES):
                    pred_factor[c] = factor[int32(CLASSES) + first_class + int32(c)]
        else:
            sums = cuda.local.array(SUMS, real)
            for k in range(SUMS):
                sums[k] = real(0)
            out_of_range = int32(0)

        first = (block - sample * runs) * run
        stop = min(first + run, voxels)
        while first < stop:  # the same for all threads, as shuffles need
            voxel = first + int64(thread // int32(LANES)) * int64(V)
            inside = voxel < stop
            at = min(voxel, voxels - int64(V))
            labels = load_targets(y, sample * y_n + at * y_v)
            where = sample * x_n + int64(first_row) * x_c + at * x_v
            for c in range(PART):
                if c < BACKGROUND:
                    for j in range(V):
                        value[c * V + j] = real(0)
                else:
                    exists = c < FULL or first_class < int32(CLASSES - c)
                    if c > BACKGROUND:
                        where += x_c if exists else int64(0)
                    logits = load_logits(x, where)
                    for j in range(V):
                        value[c * V + j] = logits[j] if exists else real(LOWEST)

            if NLL:  # a separate loop: the compiler would not unroll the next one otherwise
                for j in range(V):
                    logit = real(0)
                    for c in range(PART):
                        if int32(int32(labels[j]) - first_class) == int32(c):
                            logit = value[c * V + j]
                    for k in range(SHUFFLES):
                        logit += shuffle(FULL_MASK, logit, 1 << k)
                    label_logit[j] = logit
            for j in range(V):
                label = labels[j]
                in_range = (label >= label_type(0)) & (label < label_type(LABELS))
                valid = inside & in_range & (label != ignored)
                lane_label = int32(int32(label) - first_class)
                top = value[j]
                for c in range(1, PART):
                    top = fmax(top, value[c * V + j])
                for k in range(SHUFFLES):
                    top = fmax(top, shuffle(FULL_MASK, top, 1 << k))
                # -0.0: the additive identity, so that the first addition is elided
                total, own, rest, dot = real(-0.0), real(0), real(-0.0), real(-0.0)
                for c in range(PART):
                    below = value[c * V + j] - top
                    if BACKGROUND and c > 0:  # a logit of +inf has probability 1 beside the logit 0
                        below = real(0) if value[c * V + j] >= top else below
                    e = exp(below)
                    value[c * V + j] = e
                    if not REST:
                        total += e
                    elif lane_label == int32(c):
                        own = e
                    else:
                        rest += e
                        if GRADIENT and LINEAR:
                            dot += e * pred_factor[c]
                if REST:
                    for k in range(SHUFFLES):
                        own += shuffle(FULL_MASK, own, 1 << k)
                        rest += shuffle(FULL_MASK, rest, 1 << k)
                    total = own + rest
                else:
                    for k in range(SHUFFLES):
                        total += shuffle(FULL_MASK, total, 1 << k)
                inverse = reciprocal(total)

                if NLL:
                    below = label_logit[j] - top
                    if BACKGROUND:
                        below = real(0) if label_logit[j] >= top else below
                    nll = log(total) - below  # finite even if the probability underflows
                if FOCAL:
                    nll += (rest - (total - own)) * inverse  # the rounding error of total
                own *= inverse
                rest *= inverse
                if FOCAL:  # kept above 0, where every power of it is finite
                    complement = fmax(rest, real(SMALLEST))

                # With d_c the derivative with respect to s_c, o the label's class, r the sum of all
                # s but s_o, and D = sum s_c (d_c - d_o), the gradient is s_c (d_c - sum s d + h),
                # but for o: -s_o D - h r. Of a near-perfect prediction, D and r are small, and
                # would be lost in differences from d_o and from 1.
                if GRADIENT:
                    index = int32(label) if in_range else int32(0)
                    own_slope = factor[index]
                    if not LINEAR:
                        own_slope -= factor[int32(CLASSES) + index] * power_complement(rest)
                    if LINEAR:
                        dot *= inverse
                    else:
                        for c in range(PART):
                            s = value[c * V + j] * inverse
                            if lane_label != int32(c):
                                dot += s * (pred_factor[c] * lower_power(s))
                    for k in range(SHUFFLES):
                        dot += shuffle(FULL_MASK, dot, 1 << k)
                    own_dx = own * (own_slope * rest - dot)
                    dot += own * own_slope
                    if CROSS_ENTROPY:
                        nll_factor = factor[int32(2 * CLASSES) + index]
                        if FOCAL:
                            product = own * nll if own > real(0) else real(0)
                            nll_factor *= (
                                modulation(complement) + modulation_slope(complement) * product
                            )
                        own_dx -= nll_factor * rest
                        dot -= nll_factor
                    for c in range(BACKGROUND, PART):
                        s = value[c * V + j] * inverse
                        dx = s * (pred_factor[c] * lower_power(s) - dot)
                        dx = own_dx if lane_label == int32(c) else dx
                        value[c * V + j] = dx if valid else real(0)
                elif valid:
                    if FOCAL:
                        nll *= modulation(complement)
                    for c in range(PART):
                        e = value[c * V + j]
                        if lane_label == int32(c):
                            sums[c] = fma(e, inverse, sums[c])
                            sums[2 * PART + c] += real(1)
                            if CROSS_ENTROPY:
                                sums[3 * PART + c] += nll
                        if LINEAR:
                            sums[PART + c] = fma(e, inverse, sums[PART + c])
                        else:
                            sums[PART + c] += power(e * inverse)
                elif inside and not in_range and label != excused:
                    out_of_range = int32(out_of_range + int32(1))

            if GRADIENT:
                where = sample * out_n + int64(first_class) * out_c + at * out_v
                for c in range(BACKGROUND, PART):
                    exists = c < FULL or first_class < int32(CLASSES - c)
                    store_grad(out, where, value, c * V, inside and exists)
                    where += out_c
            first += int64(STEP)

        if not GRADIENT:
            for c in range(PART):  # where the probabilities are NaN, s [y=c] is so for every class
                sums[c] += sums[PART + c] * real(0)
                if CROSS_ENTROPY:
                    sums[3 * PART + c] += sums[PART + c] * real(0)
            store_partial(out, sums, out_of_range, block, thread, first_class)

    return kernel
