"""The CUDA kernels for whatever `_gpu_kernels` does not sum itself: other scores than softmax,
dense targets, label smoothing and binary cross-entropy.

Of the same design, but logits stay as they are until the gradient takes their place: what follows
from one is computed where it is needed, and again in the gradient's second turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _gpu_plan as plans
from ._gpu_plan import COUNTER_BYTES, TABLE_BYTES, WARP, Plan


def general_kernel(made_for: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """As `_gpu_kernels.voxel_kernel`, for every `Spec`."""
    cuda, real, int32, int64 = ops.cuda, ops.real, ops.int32, ops.int64
    load_logits, load_targets, load_double = ops.load_logits, ops.load_targets, ops.load_double
    load_real, store_grad, store_real = ops.load_real, ops.store_grad, ops.store_real
    store_int, power, power_slope = ops.store_int, ops.power, ops.power_slope
    exp, log, reciprocal, shuffle = ops.exp, ops.log, ops.reciprocal, ops.shuffle
    label_type, larger = ops.label, ops.larger
    focus, focus_slope = ops.focus, ops.focus_slope
    sigmoid, softplus, binary_focus = ops.sigmoid, ops.softplus, ops.binary_focus
    THREADS, WARPS, spec = plans.THREADS, plans.WARPS, made_for.spec
    V, LANES, CLASSES, GRADIENT = made_for.voxels, made_for.lanes, made_for.classes, gradient
    DENSE, BINARY, SMOOTHING = spec.dense, spec.binary_gamma is not None, spec.smoothing
    OWN, FOCAL = spec.gamma is not None, bool(spec.gamma)
    ENTROPY = OWN or SMOOTHING
    SCORED, SIGMOID = spec.activation == "softmax", spec.activation == "sigmoid"
    LARGEST_WINS, ABOVE = spec.activation == "argmax", spec.activation == "threshold"
    SOFTMAX = spec.softmax
    TURN = 0 if GRADIENT and SOFTMAX else 1  # the first finds what depends on all classes
    # A single channel has a class before it, whose logit is 0.
    BACKGROUND = CLASSES - made_for.channels
    SHARE = made_for.share + BACKGROUND
    FULL = CLASSES - (LANES - 1) * SHARE  # so many classes every lane has
    WIDTH, HELD, STEP, COLUMNS = LANES * SHARE, SHARE * V, made_for.step, made_for.columns
    SUMS, FACTORS = made_for.sums, made_for.sums - 1 - DENSE  # the cotangent but for Y's and V's
    SUMS_HELD, FACTORS_HELD = SUMS * SHARE, FACTORS * WIDTH
    ROW_L = 3 + OWN
    ROW_B = ROW_L + SMOOTHING
    BINARY_GAMMA = min(spec.binary_gamma or 0.0, ops.largest)
    TABLES = WARPS  # of sums in shared memory, which the warps share if they are large
    while TABLES > 1 and TABLES * COLUMNS * ops.size > TABLE_BYTES:
        TABLES //= 2
    PASSES, TABLE = WARPS // TABLES, TABLES * COLUMNS
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
        logit = cuda.local.array(HELD, real)
        if DENSE:
            target = cuda.local.array(HELD, real)
        if GRADIENT:
            factor = cuda.shared.array(FACTORS_HELD, real)
            at = thread
            while at < int32(FACTORS_HELD):
                k = at // int32(WIDTH)
                c = at - k * int32(WIDTH)
                factor[at] = real(0)
                if c < int32(CLASSES):
                    if k > int32(1):
                        k += int32(1)  # past Y's
                    entry = (int64(k) * samples + sample) * int64(CLASSES) + int64(c)
                    value = load_double(cotangent, entry * int64(8))[0]
                    if scaled != int64(0):
                        value *= load_real(scale, sample * scale_n)[0]
                    factor[at] = real(value)
                at += int32(THREADS)
            cuda.syncthreads()
        else:
            sums = cuda.local.array(SUMS_HELD, real)
            for k in range(SUMS_HELD):
                sums[k] = real(0)
            bad = int32(0)

        first = (block - sample * runs) * run
        stop = min(first + run, voxels)
        while first < stop:  # the same for all threads, which meet in shuffles
            mine = first + int64(thread // int32(LANES)) * int64(V)
            inside = mine < stop
            at = min(mine, voxels - int64(V))
            if not DENSE:
                labels = load_targets(y, sample * y_n + at * y_v)
            for c in range(SHARE):
                if c < BACKGROUND:
                    for j in range(V):
                        logit[c * V + j] = real(0)
                elif c < FULL or own + int32(c) < int32(CLASSES):
                    channel = int64(own + int32(c - BACKGROUND))
                    numbers = load_logits(x, sample * x_n + channel * x_c + at * x_v)
                    for j in range(V):
                        logit[c * V + j] = numbers[j]
                    if DENSE:
                        targets = load_targets(y, sample * y_n + channel * y_c + at * y_v)
                        for j in range(V):
                            t = targets[j]
                            known = (t >= label_type(0)) & (t <= label_type(1))
                            counts = inside & known & (t != ignore)
                            target[c * V + j] = real(t) if counts else real(-1)
                            if not GRADIENT and inside and not known and t != harmless:
                                bad += int32(1)
                else:
                    for j in range(V):
                        logit[c * V + j] = real(LOWEST)
                        if DENSE:
                            target[c * V + j] = real(-1)

            for j in range(V):
                if not DENSE:
                    label = labels[j]
                    known = (label >= label_type(0)) & (label < label_type(CLASSES))
                    counts = inside & known & (label != ignore)
                    own_label = int32(label) - own if counts else int32(-1)
                    if not GRADIENT and inside and not known and label != harmless:
                        bad += int32(1)
                if SOFTMAX:
                    top = logit[j]
                    for c in range(1, SHARE):
                        top = larger(top, logit[c * V + j])
                    for k in range(SHUFFLES):
                        top = larger(top, shuffle(MASK, top, 1 << k))
                    infinite = top > real(LARGEST)  # +inf scores 1, as in the limit
                    total = real(-0.0)
                    for c in range(SHARE):
                        below = logit[c * V + j] - top
                        if infinite:  # NaN stays NaN
                            far = logit[c * V + j] > real(LARGEST)
                            below = real(0) if far else logit[c * V + j] + real(LOWEST)
                        total += exp(below)
                    for k in range(SHUFFLES):
                        total += shuffle(MASK, total, 1 << k)
                    part = reciprocal(total)
                if ENTROPY:
                    log_total = log(total)
                if LARGEST_WINS:  # the first of equals, NaN as +inf
                    top = real(LOWEST)
                    winner = own
                    for c in range(SHARE):
                        v = logit[c * V + j]
                        v = v if v <= real(LARGEST) else real(-LOWEST)
                        if v > top:
                            top = v
                            winner = own + int32(c)
                    for k in range(SHUFFLES):
                        other = shuffle(MASK, top, 1 << k)
                        index = shuffle(MASK, winner, 1 << k)
                        if other > top or (other == top and index < winner):
                            top = other
                            winner = index

                if DENSE and SOFTMAX:
                    some = int32(0)  # of the voxel's classes that count
                    for c in range(SHARE):
                        some += int32(1) if target[c * V + j] >= real(0) else int32(0)
                    for k in range(SHUFFLES):
                        some += shuffle(MASK, some, 1 << k)
                # The gradient is s (slope - dot) of softmax scores and q pull - of_entropy of
                # their entropies: dot the sum of s slope, pull of of_entropy, over the classes.
                dot, pull = real(0), real(0)
                for turn in range(TURN, 2):
                    for c in range(SHARE):
                        v = logit[c * V + j]
                        if DENSE:
                            counts = target[c * V + j] >= real(0)
                            t = larger(target[c * V + j], real(0))
                        else:
                            t = real(1) if own_label == int32(c) else real(0)
                        if SOFTMAX:
                            below = v - top
                            if infinite:
                                below = real(0) if v > real(LARGEST) else v + real(LOWEST)
                            e = exp(below)
                        if SCORED:
                            s = e * part
                        elif SIGMOID:
                            s = sigmoid(v)
                        elif LARGEST_WINS:
                            s = real(1) if winner == own + int32(c) else real(0)
                        elif ABOVE:
                            s = real(1) if v > real(0) else real(0)
                        else:
                            s = v
                        if ENTROPY:
                            entropy = log_total - below
                        if FOCAL:  # 1 - s, above 0, of which every power is finite
                            rest = larger((total - e) * part, real(SMALLEST))

                        if BINARY:
                            z = -logit[V + j] if c < BACKGROUND else v
                            chance, other = sigmoid(z), sigmoid(-z)
                            positive, negative = softplus(-z), softplus(z)
                            of_positive = binary_focus(larger(other, real(SMALLEST)))
                            of_negative = binary_focus(larger(chance, real(SMALLEST)))

                        if not GRADIENT:
                            if counts:
                                sums[c] += s * t
                                sums[SHARE + c] += power(s)
                                sums[2 * SHARE + c] += t
                                if SMOOTHING:
                                    sums[ROW_L * SHARE + c] += entropy
                                if DENSE:
                                    sums[(SUMS - 1) * SHARE + c] += real(1)
                                if BINARY and t < real(1):
                                    sums[(ROW_B + 1) * SHARE + c] += (real(1) - t) * (
                                        of_negative * negative
                                    )
                            if t > real(0):
                                if BINARY:
                                    sums[ROW_B * SHARE + c] += t * (of_positive * positive)
                                if FOCAL:
                                    entropy *= focus(rest)
                                if OWN:
                                    sums[3 * SHARE + c] += t * entropy
                            continue

                        at_class = own + int32(c)
                        slope = real(0)
                        if counts:
                            slope = factor[at_class] * t
                            slope += factor[int32(WIDTH) + at_class] * power_slope(s)
                        of_entropy = real(0)
                        if OWN and t > real(0):
                            of_entropy = factor[int32(2 * WIDTH) + at_class] * t
                            if FOCAL:
                                product = e * part * entropy if e > real(0) else real(0)
                                of_entropy *= focus(rest) + focus_slope(rest) * product
                        if SMOOTHING and counts:
                            of_entropy += factor[int32((ROW_L - 1) * WIDTH) + at_class]
                        if turn == 0:
                            dot += s * slope
                            pull += of_entropy
                            continue

                        dx = real(0)
                        if SCORED:
                            dx = s * (slope - dot)
                        elif counts:
                            dx = slope * (s * sigmoid(-v)) if SIGMOID else slope
                        if ENTROPY:
                            dx += e * part * pull - of_entropy
                        if BINARY:
                            up = factor[int32((ROW_B - 1) * WIDTH) + at_class]
                            down = factor[int32(ROW_B * WIDTH) + at_class]
                            # -t w(1-b) (1-b + g b (-log b)) up and (1-t) w(b) (b + g (1-b)
                            # (-log(1-b))) down, of b and w(r) = r^g
                            through = real(0)
                            if t > real(0):
                                bound = real(LARGEST) if positive > real(LARGEST) else positive
                                bound *= real(BINARY_GAMMA) * chance
                                through -= t * of_positive * (other + bound) * up
                            if counts and t < real(1):
                                bound = real(LARGEST) if negative > real(LARGEST) else negative
                                bound *= real(BINARY_GAMMA) * other
                                through += (real(1) - t) * of_negative * (chance + bound) * down
                            if c < BACKGROUND:  # whose logit is the other's negative
                                carried = through
                            elif BACKGROUND:
                                dx += through - carried
                            else:
                                dx += through
                        keep = some > int32(0) if DENSE and SOFTMAX else counts
                        logit[c * V + j] = dx if keep else real(0)

                    if turn == 0:
                        for k in range(SHUFFLES):
                            dot += shuffle(MASK, dot, 1 << k)
                            pull += shuffle(MASK, pull, 1 << k)

            if GRADIENT and inside:
                for c in range(BACKGROUND, SHARE):
                    if c < FULL or own + int32(c) < int32(CLASSES):
                        where = sample * g_n + int64(own + int32(c - BACKGROUND)) * g_c + at * g_v
                        store_grad(out, where, logit, c * V)
            first += int64(STEP)

        if not GRADIENT:
            for k in range(WARP_SHUFFLES):
                bad += shuffle(MASK, bad, 1 << k)
            for k in range(SUMS_HELD):
                for b in range(SHUFFLES, WARP_SHUFFLES):
                    sums[k] += shuffle(MASK, sums[k], 1 << b)
            table = cuda.shared.array(TABLE, real)
            column = thread
            while column < int32(TABLE):
                table[column] = real(0)
                column += int32(THREADS)
            warp = thread // int32(WARP)
            mine = warp % int32(TABLES) * int32(COLUMNS)
            for wave in range(PASSES):
                cuda.syncthreads()
                if warp // int32(TABLES) == int32(wave) and thread % int32(WARP) < int32(LANES):
                    if own == int32(0):
                        table[mine + int32(COLUMNS - 1)] += real(bad)
                    for c in range(SHARE):
                        if c < FULL or own + int32(c) < int32(CLASSES):
                            for k in range(SUMS):
                                place = mine + int32(k * CLASSES + c) + own
                                table[place] += sums[k * SHARE + c]
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
