"""The CUDA kernels, each a function made for the constants of a plan.

Design
------
1. A block owns one run of a sample's voxels, its length a function of plan and shape alone.
2. A thread holds the scores of `voxels` neighbouring voxels in registers, all their classes or, of
   many, a share: `lanes` neighbouring lanes of a warp then have the same voxels and meet in
   shuffles.
3. Logits are read once, in words of up to 16 bytes; softmax is computed from each voxel's maximum,
   in float32 (float64 logits: float64).
4. Sums: a thread's in registers, a warp's by shuffles, a block's in shared memory in the order of
   its warps, one partial per block; the blocks' in float64, in order, by a launch of its own, whose
   last block may go on to the loss. No floating-point atomics: the same bits on every run.
5. Ignored voxels and bad labels are selected away, never multiplied by zero. Bad labels are counted
   beside the sums, and make their sample's sums NaN.
6. Offsets are bytes, of 64 bits.

I, P, Y and H of softmax scores and class labels are summed here, whatever else is asked for in
`_gpu_general`, of the same design; `_gpu_totals` adds up what the blocks of either have summed.

`cuda` and the operations on numbers are handed in, so that a simulator can hand in its own. Every
loop over a thread's classes and voxels is unrolled, which keeps its arrays in registers. Device
functions would need a driver to be compiled: statistics and gradient share one body instead, and
`GRADIENT` says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _gpu_plan as plans
from ._gpu_general import general_kernel
from ._gpu_plan import COUNTER_BYTES, TABLE_BYTES, WARP, Plan
from ._gpu_totals import total_kernel

OF_VOXELS, OF_TOTALS = ("statistics", "gradient"), ("total", "loss")
KINDS = OF_VOXELS + OF_TOTALS
# Of each kind, as `struct` calls them: 64 bits all, addresses, integers and flags q, numbers d.
ARGUMENTS = dict.fromkeys(OF_VOXELS, "22q") | dict.fromkeys(OF_TOTALS, "14q10d")
ENTRY = "kernel"  # the name of every one in its cubin


def kernel(kind: str, made_for: Plan, ops: Any) -> Callable[..., None]:
    """The kernel of this kind, of KINDS."""
    if kind in OF_TOTALS:
        return total_kernel(kind == "loss", ops)
    of_voxels = voxel_kernel if made_for.spec.plain else general_kernel
    return of_voxels(made_for, kind == "gradient", ops)


def voxel_kernel(made_for: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """The kernel of a plan: statistics of a block's voxels into its partial, or their gradient.

    Arguments, integers but for the flags:

    - addresses of x, of y, and of out: counter and partials, (samples, runs, columns), or gradient;
    - addresses of the cotangent, (K, samples, classes) float64, and of what each sample's is
      multiplied by, if `scaled`, and the byte stride of that;
    - samples, runs of a sample, voxels of a run and of a sample;
    - byte strides of x for sample, channel and voxel, of y (a channel's is that of dense targets,
      else 0) and of the gradient likewise;
    - the label, or target, to leave out, -1 for none, and the one that is not bad, 0 for none.
    """
    cuda, real, int32, int64 = ops.cuda, ops.real, ops.int32, ops.int64
    load_logits, load_labels, load_double = ops.load_logits, ops.load_targets, ops.load_double
    load_real, store_grad, store_real = ops.load_real, ops.store_grad, ops.store_real
    store_int, power, power_slope = ops.store_int, ops.power, ops.power_slope
    exp, reciprocal, shuffle, label_type = ops.exp, ops.reciprocal, ops.shuffle, ops.label
    larger, log, focus, focus_slope = ops.larger, ops.log, ops.focus, ops.focus_slope
    THREADS, WARPS = plans.THREADS, plans.WARPS
    V, LANES, CLASSES, GRADIENT = made_for.voxels, made_for.lanes, made_for.classes, gradient
    ENTROPY, FOCAL = made_for.spec.gamma is not None, bool(made_for.spec.gamma)
    LOG = FOCAL or (ENTROPY and not GRADIENT)  # -log s of a voxel's class is needed
    # A single channel has a class before it, whose logit is 0.
    BACKGROUND = CLASSES - made_for.channels
    SHARE = made_for.share + BACKGROUND
    FULL = CLASSES - (LANES - 1) * SHARE  # so many classes every lane has
    HELD, STEP, COLUMNS = SHARE * V, made_for.step, made_for.columns
    FACTORS = (made_for.sums - 1) * CLASSES  # the cotangent but for Y's
    TABLES = WARPS  # of sums in shared memory, which the warps share if they are large
    while TABLES > 1 and TABLES * COLUMNS * ops.size > TABLE_BYTES:
        TABLES //= 2
    TURNS, TABLE = WARPS // TABLES, TABLES * COLUMNS
    SHUFFLES, WARP_SHUFFLES = LANES.bit_length() - 1, WARP.bit_length() - 1
    MASK, LARGEST, SIZE = 0xFFFFFFFF, ops.largest, ops.size
    LOWEST, SMALLEST = float("-inf"), ops.smallest

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
        g_n,
        g_c,
        g_v,
        scaled,
        ignore,
        harmless,
    ):
        thread = int32(cuda.threadIdx.x)
        block = int64(cuda.blockIdx.x)
        sample = block // runs
        own = thread % int32(LANES) * int32(SHARE)  # the first of this lane's classes
        ignore, harmless = label_type(ignore), label_type(harmless)
        score = cuda.local.array(HELD, real)
        if LOG:
            own_logit = cuda.local.array(V, real)
        if GRADIENT:
            factor = cuda.shared.array(FACTORS, real)
            c = thread
            while c < int32(FACTORS):
                k = c // int32(CLASSES)
                row = k + k // int32(2) if ENTROPY else k  # Y's has no part in it
                entry = (int64(row) * samples + sample) * int64(CLASSES) + int64(
                    c - k * int32(CLASSES)
                )
                value = load_double(cotangent, entry * int64(8))[0]
                if scaled != int64(0):
                    value *= load_real(scale, sample * scale_n)[0]
                factor[c] = real(value)
                c += int32(THREADS)
            cuda.syncthreads()
            of_pred = cuda.local.array(SHARE, real)
            for c in range(SHARE):
                of_pred[c] = real(0)
                if c < FULL or own + int32(c) < int32(CLASSES):
                    of_pred[c] = factor[int32(CLASSES) + own + int32(c)]
        else:
            intersection = cuda.local.array(SHARE, real)
            pred_sum = cuda.local.array(SHARE, real)
            target_sum = cuda.local.array(SHARE, real)
            if ENTROPY:
                entropy_sum = cuda.local.array(SHARE, real)
            bad = int32(0)
            for c in range(SHARE):
                intersection[c] = real(0)
                pred_sum[c] = real(0)
                target_sum[c] = real(0)
                if ENTROPY:
                    entropy_sum[c] = real(0)

        first = (block - sample * runs) * run
        stop = min(first + run, voxels)
        while first < stop:  # the same for all threads, which meet in shuffles
            mine = first + int64(thread // int32(LANES)) * int64(V)
            inside = mine < stop
            at = min(mine, voxels - int64(V))
            labels = load_labels(y, sample * y_n + at * y_v)
            for c in range(SHARE):
                if c < BACKGROUND:
                    for j in range(V):
                        score[c * V + j] = real(0)
                elif c < FULL or own + int32(c) < int32(CLASSES):
                    numbers = load_logits(
                        x, sample * x_n + int64(own + int32(c - BACKGROUND)) * x_c + at * x_v
                    )
                    for j in range(V):
                        score[c * V + j] = numbers[j]
                else:
                    for j in range(V):
                        score[c * V + j] = real(LOWEST)

            if LOG:  # in a loop of its own, or the compiler would not unroll the next
                for j in range(V):
                    logit = real(0)
                    for c in range(SHARE):
                        if int32(labels[j]) - own == int32(c):
                            logit = score[c * V + j]
                    for k in range(SHUFFLES):
                        logit += shuffle(MASK, logit, 1 << k)
                    own_logit[j] = logit
            for j in range(V):
                top = score[j]
                for c in range(1, SHARE):
                    top = larger(top, score[c * V + j])
                for k in range(SHUFFLES):
                    top = larger(top, shuffle(MASK, top, 1 << k))
                if top > real(LARGEST):  # +inf scores 1, as in the limit
                    for c in range(SHARE):
                        far = score[c * V + j] - real(LARGEST)
                        score[c * V + j] = real(0) if far > real(0) else far
                    top = real(0)
                    if LOG:
                        infinite = own_logit[j] > real(LARGEST)
                        own_logit[j] = real(0) if infinite else real(LOWEST)
                total = real(-0.0)  # to which the first is added by doing nothing
                for c in range(SHARE):
                    e = exp(score[c * V + j] - top)
                    score[c * V + j] = e
                    total += e
                for k in range(SHUFFLES):
                    total += shuffle(MASK, total, 1 << k)
                part = reciprocal(total)

                if LOG:
                    below = own_logit[j] - top
                    entropy = log(total) - below  # finite where s is 0
                if FOCAL:  # 1 - s, above 0, of which every power is finite
                    e = exp(below)
                    rest = larger((total - e) * part, real(SMALLEST))

                label = labels[j]
                known = (label >= label_type(0)) & (label < label_type(CLASSES))
                counted = inside & known & (label != ignore)
                own_label = int32(label) - own
                if GRADIENT:
                    index = int32(label) if known else int32(0)
                    of_label = factor[index]
                    dot = real(0)
                    for c in range(SHARE):
                        s = score[c * V + j] * part
                        score[c * V + j] = s
                        dot += s * (of_pred[c] * power_slope(s))
                        if own_label == int32(c):
                            dot += s * of_label
                    for k in range(SHUFFLES):
                        dot += shuffle(MASK, dot, 1 << k)
                    if ENTROPY:
                        of_entropy = factor[int32(2 * CLASSES) + index]
                        if FOCAL:
                            product = e * part * entropy if e > real(0) else real(0)
                            of_entropy *= focus(rest) + focus_slope(rest) * product
                        dot -= of_entropy
                    for c in range(BACKGROUND, SHARE):
                        s = score[c * V + j]
                        slope = of_pred[c] * power_slope(s) - dot
                        if own_label == int32(c):
                            slope += of_label
                        dx = s * slope
                        if ENTROPY and own_label == int32(c):
                            dx -= of_entropy
                        score[c * V + j] = dx if counted else real(0)
                elif counted:
                    if FOCAL:
                        entropy *= focus(rest)
                    for c in range(SHARE):
                        s = score[c * V + j] * part
                        if own_label == int32(c):
                            intersection[c] += s
                            target_sum[c] += real(1)
                            if ENTROPY:
                                entropy_sum[c] += entropy
                        pred_sum[c] += power(s)
                elif inside and not known and label != harmless:
                    bad += int32(1)

            if GRADIENT and inside:
                for c in range(BACKGROUND, SHARE):
                    if c < FULL or own + int32(c) < int32(CLASSES):
                        where = sample * g_n + int64(own + int32(c - BACKGROUND)) * g_c + at * g_v
                        store_grad(out, where, score, c * V)
            first += int64(STEP)

        if not GRADIENT:
            for k in range(WARP_SHUFFLES):
                bad += shuffle(MASK, bad, 1 << k)
            for c in range(SHARE):
                for k in range(SHUFFLES, WARP_SHUFFLES):
                    intersection[c] += shuffle(MASK, intersection[c], 1 << k)
                    pred_sum[c] += shuffle(MASK, pred_sum[c], 1 << k)
                    target_sum[c] += shuffle(MASK, target_sum[c], 1 << k)
                    if ENTROPY:
                        entropy_sum[c] += shuffle(MASK, entropy_sum[c], 1 << k)
            table = cuda.shared.array(TABLE, real)
            column = thread
            while column < int32(TABLE):
                table[column] = real(0)
                column += int32(THREADS)
            warp = thread // int32(WARP)
            mine = warp % int32(TABLES) * int32(COLUMNS)
            for turn in range(TURNS):
                cuda.syncthreads()
                if warp // int32(TABLES) == int32(turn) and thread % int32(WARP) < int32(LANES):
                    if own == int32(0):
                        table[mine + int32(COLUMNS - 1)] += real(bad)
                    for c in range(SHARE):
                        if c < FULL or own + int32(c) < int32(CLASSES):
                            at_class = mine + own + int32(c)
                            table[at_class] += intersection[c]
                            table[int32(CLASSES) + at_class] += pred_sum[c]
                            table[int32(2 * CLASSES) + at_class] += target_sum[c]
                            if ENTROPY:
                                table[int32(3 * CLASSES) + at_class] += entropy_sum[c]
            cuda.syncthreads()
            column = thread
            while column < int32(COLUMNS):
                total = real(0)
                for k in range(TABLES):
                    total += table[int32(k * COLUMNS) + column]
                entry = block * int64(COLUMNS) + int64(column)
                store_real(out, int64(COUNTER_BYTES) + entry * int64(SIZE), total)
                column += int32(THREADS)
            if block == int64(0) and thread == int32(0):
                store_int(out, int64(0), int32(0))

    return kernel
