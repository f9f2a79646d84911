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
   its warps, one partial per block; the blocks' in float64, in order, by `total_kernel`, whose last
   block may go on to the loss. No floating-point atomics: the same bits on every run.
5. Ignored voxels and bad labels are selected away, never multiplied by zero. Bad labels are counted
   beside the sums, and make their sample's sums NaN.
6. Offsets are bytes, of 64 bits.

`cuda` and the operations on numbers are handed in, so that a simulator can hand in its own. Every
loop over a thread's classes and voxels is unrolled, which keeps its arrays in registers. Device
functions would need a driver to be compiled: statistics and gradient share one body instead, and
`GRADIENT` says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

THREADS = 256
WARP = 32
WARPS = THREADS // WARP
ROUNDS = 64  # of loads that a thread makes at most, so that its sums stay exact enough,
BLOCKS = 1024  # fewer if there are not so many blocks,
RUN = 256  # but as many as make a block's sums small beside its logits
TABLE_BYTES = 40960  # of shared memory for a block's sums
BAD = 1  # columns of a partial beside the sums: how many bad labels
COUNTER_BYTES = 16  # before the partials: how many blocks of `total_kernel` are done


@dataclass(frozen=True)
class Plan:
    """The constants of a kernel.

    - logits, labels: dtypes.
    - channels: of the logits; one is scored as two classes.
    - power: P sums score**power.
    - gamma: H sums (1 - score)**gamma (-log score); None for no such sum.
    - voxels: neighbouring ones of a thread, read together; 1 where they are not side by side.
    - lanes: of a warp, that share a voxel's channels.
    """

    logits: str
    labels: str
    channels: int
    power: int = 1
    gamma: float | None = None
    voxels: int = 1
    lanes: int = 1

    @property
    def classes(self) -> int:
        """C of the statistics."""
        return max(2, self.channels)

    @property
    def sums(self) -> int:
        """K of the statistics: I, P, Y and, if it is asked for, H."""
        return 3 if self.gamma is None else 4

    @property
    def share(self) -> int:
        """The most channels of one lane."""
        return -(-self.channels // self.lanes)

    @property
    def columns(self) -> int:
        """Numbers of a block's partial: the sums of every class, and the bad labels."""
        return self.sums * self.classes + BAD

    @property
    def step(self) -> int:
        """Voxels that a block reads at a time."""
        return THREADS // self.lanes * self.voxels

    def run(self, samples: int, voxels: int) -> int:
        """Voxels of a block, of so many samples of so many voxels."""
        rounds = samples * voxels // (self.step * BLOCKS)
        return self.step * max(1, min(rounds, ROUNDS), RUN // self.step)


LANE_CLASSES, MORE = 16, 20  # that a lane has at most; from so many lanes on a few more
MORE_LANES = 8
HELD = 40  # words of scores of a thread: of more the compiler leaves loops, and arrays in memory
FOCAL_CLASSES = 2  # whose scores stand for what it unrolls besides where gamma is above 0
MAX_CHANNELS = 1024  # whose share of a lane still fits in them
WORD_BYTES = 16  # of the widest load
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
OF_VOXELS, OF_TOTALS = ("statistics", "gradient"), ("total", "loss")
KINDS = OF_VOXELS + OF_TOTALS
# Of each kind, as `struct` calls them: 64 bits all, addresses, integers and flags q, numbers d.
ARGUMENTS = dict.fromkeys(OF_VOXELS, "21q") | dict.fromkeys(OF_TOTALS, "13q9d")
ENTRY = "kernel"  # the name of every one in its cubin


def plan(
    logits: str, labels: str, channels: int, power: int, gamma: float | None, side_by_side: int
) -> Plan:
    """The plan for logits and labels of these dtypes.

    `side_by_side`: so many voxels, a power of two, can be read and written as whole words.
    """
    itemsize, lanes = ITEMSIZE[logits], 1
    while lanes < WARP and channels > lanes * (LANE_CLASSES if lanes < MORE_LANES else MORE):
        lanes *= 2
    share = -(-max(2, channels) // lanes) + (FOCAL_CLASSES if gamma else 0)
    held = share * max(1, itemsize // 4)  # words, of each voxel
    voxels = min(side_by_side, WORD_BYTES // itemsize)
    while voxels > 1 and held * voxels > HELD:
        voxels //= 2
    return Plan(logits, labels, channels, power, gamma, voxels, lanes)


def voxel_kernel(made_for: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """The kernel of a plan: statistics of a block's voxels into its partial, or their gradient.

    Arguments, integers but for the flags:

    - addresses of x, of y, and of out: counter and partials, (samples, runs, columns), or gradient;
    - addresses of the cotangent, (K, samples, classes) float64, and of what each sample's is
      multiplied by, if `scaled`, and the byte stride of that;
    - samples, runs of a sample, voxels of a run and of a sample;
    - byte strides of x for sample, channel and voxel, of y for sample and voxel, of the gradient as
      of x;
    - the label to leave out, -1 for none, and the one that is not bad, 0 for none.
    """
    cuda, real, int32, int64 = ops.cuda, ops.real, ops.int32, ops.int64
    load_logits, load_labels, load_double = ops.load_logits, ops.load_labels, ops.load_double
    load_real, store_grad, store_real = ops.load_real, ops.store_grad, ops.store_real
    store_int, power, power_slope = ops.store_int, ops.power, ops.power_slope
    exp, reciprocal, shuffle, label_type = ops.exp, ops.reciprocal, ops.shuffle, ops.label
    larger, log, focus, focus_slope = ops.larger, ops.log, ops.focus, ops.focus_slope
    V, LANES, CLASSES, GRADIENT = made_for.voxels, made_for.lanes, made_for.classes, gradient
    ENTROPY, FOCAL = made_for.gamma is not None, bool(made_for.gamma)
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


def total_kernel(made_for: Plan, loss: bool, ops: Any) -> Callable[..., None]:
    """Adds the partials of every run in order, in float64: sums, NaN where a sample has bad labels.
    With `loss`, its last block goes on to a loss of I, P and Y and the derivative of that.

    A block is a sample's next WARP columns, its warps take the runs in turn. Arguments, integers
    but for what `losses.Dice` has as float64, and the flags:

    - addresses of counter and partials, and of sums, (K, samples, classes) float64;
    - samples, runs of a sample, classes, blocks of a sample;
    - addresses of the loss, one number or one per sample, of the derivative, like sums, and of
      the classes' weights, (classes,) float64;
    - whether the samples' sums are pooled, each sample has a loss, there are weights;
    - the class left out;
    - what a class's loss counts, what the total starts from, what is added to the denominator, and
      what I, P and Y count in the numerator and in the denominator.
    """
    cuda, int32, int64, float64 = ops.cuda, ops.int32, ops.int64, ops.float64
    load_real, store_real, load_fresh = ops.load_real, ops.store_real, ops.load_fresh
    load_double, store_double, count_up = ops.load_double, ops.store_double, ops.count_up
    divide, real, shuffle, SIZE, LOSS = ops.divide, ops.real, ops.shuffle, ops.size, loss
    SUMS, NAN, INFINITY = made_for.sums, float("nan"), float("inf")
    MASK, WARP_SHUFFLES = 0xFFFFFFFF, WARP.bit_length() - 1

    def kernel(  # type: ignore[no-untyped-def]
        partials,
        sums,
        samples,
        runs,
        classes,
        groups,
        value,
        derivative,
        weights,
        pooled,
        each,
        weighted,
        left_out,
        share,
        start,
        smooth,
        num_i,
        num_p,
        num_y,
        den_i,
        den_p,
        den_y,
    ):
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread % int32(WARP), thread // int32(WARP)
        block = int64(cuda.blockIdx.x)
        sample = block // groups
        column = (block - sample * groups) * int64(WARP) + int64(lane)
        columns = int64(SUMS) * classes + int64(BAD)
        numbers = cuda.shared.array(THREADS, float64)
        flags = cuda.shared.array(1, int32)
        bad, total = float64(0), float64(0)
        if sample < samples and column < columns - int64(BAD):
            r = int64(warp)
            while r < runs:
                entry = (sample * runs + r) * columns
                of_bad = int64(COUNTER_BYTES) + (entry + columns - int64(1)) * int64(SIZE)
                bad += float64(load_real(partials, of_bad)[0])
                at = int64(COUNTER_BYTES) + (entry + column) * int64(SIZE)
                total += float64(load_real(partials, at)[0])
                r += int64(WARPS)
            if bad > float64(0):
                total = float64(NAN)
        numbers[thread] = total
        cuda.syncthreads()
        if warp == int32(0) and sample < samples and column < columns - int64(BAD):
            for k in range(1, WARPS):
                total += numbers[int32(k * WARP) + lane]
            k = column // classes
            entry = (k * samples + sample) * classes + column - k * classes
            store_double(sums, entry * int64(8), total)

        if LOSS:
            cuda.threadfence()
            cuda.syncthreads()
            if thread == int32(0):
                flags[0] = count_up(partials)
            cuda.syncthreads()
            if flags[0] == int32(cuda.gridDim.x) - int32(1):  # all other blocks' sums are there
                cuda.threadfence()
                # Where each sample has a loss a warp takes it, else the block takes all terms.
                step = samples * classes
                rows, width, first, stride = int64(1), step, int64(thread), int64(THREADS)
                if pooled != int64(0):
                    width = classes
                if each != int64(0):
                    rows, width, first, stride = samples, classes, int64(lane), int64(WARP)
                row, sum_of_terms = int64(0), float64(0)
                while row < rows:
                    n = row + int64(warp) if each != int64(0) else row
                    term = first if n < rows else width
                    while term < width:
                        m = n + term // classes
                        c = term - term // classes * classes
                        beyond = (samples if pooled != int64(0) else m + int64(1)) * classes
                        of_i, of_p, of_y = float64(0), float64(0), float64(0)
                        entry = m * classes + c
                        while entry < beyond:
                            of_i += load_fresh(sums, entry * int64(8))
                            of_p += load_fresh(sums, (entry + step) * int64(8))
                            of_y += load_fresh(sums, (entry + step + step) * int64(8))
                            entry += classes
                        num = num_i * of_i + num_p * of_p + num_y * of_y
                        den = den_i * of_i + den_p * of_p + den_y * of_y + smooth
                        if den == float64(0):
                            den = float64(INFINITY)  # 0/0 is 0, with derivative 0
                        quotient = divide(num, den)
                        counts = share
                        if weighted != int64(0):
                            counts *= load_double(weights, c * int64(8))[0]
                        if c == left_out:
                            counts = float64(0)
                        sum_of_terms += quotient * counts
                        slope = divide(counts, den)
                        of_i = (num_i - quotient * den_i) * slope
                        of_p = (num_p - quotient * den_p) * slope
                        of_y = (num_y - quotient * den_y) * slope
                        entry = m * classes + c
                        while entry < beyond:
                            store_double(derivative, entry * int64(8), of_i)
                            store_double(derivative, (entry + step) * int64(8), of_p)
                            store_double(derivative, (entry + step + step) * int64(8), of_y)
                            entry += classes
                        term += stride
                    if each != int64(0):
                        for k in range(WARP_SHUFFLES):
                            sum_of_terms += shuffle(MASK, sum_of_terms, 1 << k)
                        if lane == int32(0) and n < rows:
                            store_real(value, n * int64(SIZE), real(start + sum_of_terms))
                        sum_of_terms = float64(0)
                        row += int64(WARPS)
                    else:
                        row += int64(1)
                if each == int64(0):
                    numbers[thread] = sum_of_terms
                    cuda.syncthreads()
                    if thread == int32(0):
                        total = start
                        k = int32(0)
                        while k < int32(THREADS) and int64(k) < width:
                            total += numbers[k]
                            k += int32(1)
                        store_real(value, int64(0), real(total))

    return kernel


def kernel(kind: str, made_for: Plan, ops: Any) -> Callable[..., None]:
    """The kernel of this kind, of KINDS."""
    if kind in OF_VOXELS:
        return voxel_kernel(made_for, kind == "gradient", ops)
    return total_kernel(made_for, kind == "loss", ops)
