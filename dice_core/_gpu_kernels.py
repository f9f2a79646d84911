"""The CUDA kernels, each a function made for the constants of a plan.

Design
------
1. A block owns one run of a sample's voxels, its length a function of the plan alone.
2. A thread holds the scores of `voxels` neighbouring voxels in registers, all their classes or, of
   many, a share: `lanes` neighbouring lanes of a warp then have the same voxels and meet in
   shuffles.
3. Logits are read once, in words of up to 16 bytes; softmax is computed from each voxel's maximum,
   in float32 (float64 logits: float64).
4. Sums: a thread's in registers, a warp's by shuffles, a block's in shared memory in the order of
   its warps, one partial per block; the blocks' in float64, in order, by `total_kernel`. No
   atomics: the same bits on every run and GPU.
5. Ignored voxels and bad labels are selected away, never multiplied by zero. Bad labels are counted
   beside the sums.
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
ROUNDS = 16  # of loads that a thread makes
BAD = 1  # columns of a partial beside I, P and Y: how many bad labels


@dataclass(frozen=True)
class Plan:
    """The constants of a kernel.

    - logits, labels: dtypes.
    - channels: of the logits; one is scored as two classes.
    - power: P sums score**power.
    - voxels: neighbouring ones of a thread, read together; 1 where they are not side by side.
    - lanes: of a warp, that share a voxel's channels.
    """

    logits: str
    labels: str
    channels: int
    power: int = 1
    voxels: int = 1
    lanes: int = 1

    @property
    def classes(self) -> int:
        """C of the statistics."""
        return max(2, self.channels)

    @property
    def share(self) -> int:
        """The most channels of one lane."""
        return -(-self.channels // self.lanes)

    @property
    def columns(self) -> int:
        """Numbers of a block's partial: I, P and Y of every class, and the bad labels."""
        return 3 * self.classes + BAD

    @property
    def step(self) -> int:
        """Voxels that a block reads at a time."""
        return THREADS // self.lanes * self.voxels

    @property
    def run(self) -> int:
        """Voxels of a block."""
        return ROUNDS * self.step


LANE_CLASSES = 16  # that a lane has at most, if lanes suffice
HELD_SCORES = 32  # in a thread's registers
WORD_BYTES = 16  # of the widest load
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def plan(logits: str, labels: str, channels: int, power: int, together: bool) -> Plan:
    """The plan for logits and labels of these dtypes.

    `together`: voxels lie side by side in memory, rows of them on whole words.
    """
    lanes = 1
    while lanes < WARP and channels > LANE_CLASSES * lanes:
        lanes *= 2
    share = -(-max(2, channels) // lanes)
    voxels = WORD_BYTES // ITEMSIZE[logits] if together else 1
    while voxels > 1 and share * voxels > HELD_SCORES:
        voxels //= 2
    return Plan(logits, labels, channels, power, voxels, lanes)


def voxel_kernel(made_for: Plan, gradient: bool, ops: Any) -> Callable[..., None]:
    """The kernel of a plan: statistics of a block's voxels into its partial, or their gradient.

    Arguments, integers but for the flag: addresses of x, y, of out, the (samples, runs, columns)
    partials or the gradient, and of the cotangent, (3, samples, classes) float64; samples; voxels
    of a sample; byte strides of x for sample, channel and voxel, of y for sample and voxel, of the
    gradient as of x; whether there is an ignore label, and which.
    """
    cuda, real, int32, int64 = ops.cuda, ops.real, ops.int32, ops.int64
    load_logits, load_labels, load_cotangent = ops.load_logits, ops.load_labels, ops.load_cotangent
    store_grad, store_sum = ops.store_grad, ops.store_sum
    exp, divide, at_most_zero, shuffle = ops.exp, ops.divide, ops.at_most_zero, ops.shuffle
    V, LANES, CLASSES, POWER, GRADIENT = (
        made_for.voxels,
        made_for.lanes,
        made_for.classes,
        made_for.power,
        gradient,
    )
    BACKGROUND = (
        CLASSES - made_for.channels
    )  # a single channel has a class before it, whose logit is 0
    SHARE = made_for.share + BACKGROUND
    FULL = CLASSES - (LANES - 1) * SHARE  # so many classes every lane has
    HELD, STEP, RUN, COLUMNS = SHARE * V, made_for.step, made_for.run, made_for.columns
    TABLE = 2 * CLASSES
    SHUFFLES, WARP_SHUFFLES = LANES.bit_length() - 1, 5
    MASK, LARGEST, SIZE = 0xFFFFFFFF, ops.largest, ops.size
    LOWEST = float("-inf")

    def kernel(  # type: ignore[no-untyped-def]
        x,
        y,
        out,
        cotangent,
        samples,
        voxels,
        x_n,
        x_c,
        x_v,
        y_n,
        y_v,
        g_n,
        g_c,
        g_v,
        has_ignore,
        ignore,
    ):
        thread = int32(cuda.threadIdx.x)
        sample = int64(cuda.blockIdx.y)
        run = int64(cuda.blockIdx.x)
        own = thread % int32(LANES) * int32(SHARE)  # the first of this lane's classes
        score = cuda.local.array(HELD, real)
        if GRADIENT:
            factor = cuda.shared.array(TABLE, real)
            c = thread
            while c < int32(TABLE):
                k = c // int32(CLASSES)
                entry = (int64(k) * samples + sample) * int64(CLASSES) + int64(
                    c - k * int32(CLASSES)
                )
                value = load_cotangent(cotangent, entry * int64(8))
                factor[c] = real(value[0])
                c += int32(THREADS)
            cuda.syncthreads()
        else:
            intersection = cuda.local.array(SHARE, real)
            pred_sum = cuda.local.array(SHARE, real)
            target_sum = cuda.local.array(SHARE, int32)
            bad = int32(0)
            for c in range(SHARE):
                intersection[c] = real(0)
                pred_sum[c] = real(0)
                target_sum[c] = int32(0)

        first = run * int64(RUN)
        stop = min(first + int64(RUN), voxels)
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

            for j in range(V):
                top = score[j]
                for c in range(1, SHARE):
                    top = max(top, score[c * V + j])
                for k in range(SHUFFLES):
                    top = max(top, shuffle(MASK, top, 1 << k))
                top = max(min(top, real(LARGEST)), real(-LARGEST))  # finite: +inf scores 1
                total = real(0)
                for c in range(SHARE):
                    e = exp(at_most_zero(score[c * V + j] - top))
                    score[c * V + j] = e
                    total += e
                for k in range(SHUFFLES):
                    total += shuffle(MASK, total, 1 << k)
                scale = divide(real(1), total)

                label = labels[j]
                ignored = has_ignore and label == ignore
                known = label >= int64(0) and label < int64(CLASSES)
                counted = inside and known and not ignored
                own_label = int32(label) - own
                if GRADIENT:
                    dot = real(0)
                    for c in range(SHARE):
                        s = score[c * V + j] * scale if counted else real(0)
                        score[c * V + j] = s
                        if c < FULL or own + int32(c) < int32(CLASSES):
                            slope = factor[int32(CLASSES) + own + int32(c)]
                            for _ in range(POWER - 1):
                                slope *= s
                            if POWER != 1:
                                slope *= real(POWER)
                            if counted and own_label == int32(c):
                                slope += factor[own + int32(c)]
                            dot += s * slope
                    for k in range(SHUFFLES):
                        dot += shuffle(MASK, dot, 1 << k)
                    for c in range(BACKGROUND, SHARE):
                        if c < FULL or own + int32(c) < int32(CLASSES):
                            s = score[c * V + j]
                            slope = factor[int32(CLASSES) + own + int32(c)]
                            for _ in range(POWER - 1):
                                slope *= s
                            if POWER != 1:
                                slope *= real(POWER)
                            if counted and own_label == int32(c):
                                slope += factor[own + int32(c)]
                            score[c * V + j] = s * (slope - dot)
                else:
                    if inside and not ignored and not known and own == int32(0):
                        bad += int32(1)
                    for c in range(SHARE):
                        s = score[c * V + j] * scale if counted else real(0)
                        if counted and own_label == int32(c):
                            intersection[c] += s
                            target_sum[c] += int32(1)
                        power = s
                        for _ in range(POWER - 1):
                            power *= s
                        pred_sum[c] += power

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
            table = cuda.shared.array(COLUMNS, real)
            column = thread
            while column < int32(COLUMNS):
                table[column] = real(0)
                column += int32(THREADS)
            for warp in range(WARPS):  # one after another
                cuda.syncthreads()
                if thread // int32(WARP) == int32(warp) and thread % int32(WARP) < int32(LANES):
                    if own == int32(0):
                        table[COLUMNS - 1] += real(bad)
                    for c in range(SHARE):
                        if c < FULL or own + int32(c) < int32(CLASSES):
                            table[own + int32(c)] += intersection[c]
                            table[int32(CLASSES) + own + int32(c)] += pred_sum[c]
                            table[int32(2 * CLASSES) + own + int32(c)] += real(target_sum[c])
            cuda.syncthreads()
            column = thread
            while column < int32(COLUMNS):
                entry = (sample * int64(cuda.gridDim.x) + run) * int64(COLUMNS) + int64(column)
                store_sum(out, entry * int64(SIZE), table[column])
                column += int32(THREADS)

    return kernel


def total_kernel(made_for: Plan, ops: Any) -> Callable[..., None]:
    """Adds the partials of every run in order, in float64: sums (3, samples, classes), NaN where a
    sample has bad labels.

    Arguments: addresses of the partials, of the sums and of int64 counts of bad labels, (samples,);
    samples; runs. A block is a sample.
    """
    cuda, int32, int64, float64 = ops.cuda, ops.int32, ops.int64, ops.float64
    load_sum, store_total, store_count = ops.load_sum, ops.store_total, ops.store_count
    COLUMNS, CLASSES, SIZE = made_for.columns, made_for.classes, ops.size
    NAN = float("nan")

    def kernel(partials, sums, counts, samples, runs):  # type: ignore[no-untyped-def]
        sample = int64(cuda.blockIdx.x)
        bad = float64(0)
        for r in range(runs):
            entry = (sample * runs + int64(r)) * int64(COLUMNS) + int64(COLUMNS - 1)
            bad += float64(load_sum(partials, entry * int64(SIZE))[0])
        column = int32(cuda.threadIdx.x)
        while column < int32(COLUMNS - 1):
            total = float64(NAN) if bad > float64(0) else float64(0)
            for r in range(runs):
                entry = (sample * runs + int64(r)) * int64(COLUMNS) + int64(column)
                total += float64(load_sum(partials, entry * int64(SIZE))[0])
            k = column // int32(CLASSES)
            entry = (int64(k) * samples + sample) * int64(CLASSES) + int64(
                column - k * int32(CLASSES)
            )
            store_total(sums, entry * int64(8), total)
            column += int32(THREADS)
        if cuda.threadIdx.x == 0:
            store_count(counts, sample * int64(8), int64(bad))

    return kernel
