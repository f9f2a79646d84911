"""The CUDA kernel that adds the partials of the others, and may compute a loss from the totals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import plan as plans
from .plan import ADDRESS, COUNTER_BYTES, INTEGER, NUMBER, WARP, Arguments

LOADS = 16  # of a thread at a time

LOSS_ARGUMENTS = {  # named as in `losses.Ratio`, which explains them
    "value": ADDRESS,  # one number, or one per sample
    "derivative": ADDRESS,  # like sums
    "weights": ADDRESS,  # (classes,) float64, if `weighted`
    "pooled": INTEGER,
    "per_sample": INTEGER,
    "weighted": INTEGER,
    "ignore_channel": INTEGER,
    "share": NUMBER,
    "start": NUMBER,
    "excess": NUMBER,
    "smooth": NUMBER,
    "num_i": NUMBER,  # the coefficients of I, P and Y in numerator and denominator
    "num_p": NUMBER,
    "num_y": NUMBER,
    "den_i": NUMBER,
    "den_p": NUMBER,
    "den_y": NUMBER,
}
TOTALS_ARGUMENTS = Arguments(
    partials=ADDRESS,  # (samples, runs, classes, K), with the counter before them
    sums=ADDRESS,  # (K, samples, classes) float64
    samples=INTEGER,
    runs=INTEGER,  # of a sample
    fields=INTEGER,  # K
    classes=INTEGER,
    groups=INTEGER,  # blocks of a sample
    **LOSS_ARGUMENTS,
)


def totals_kernel(loss: bool, ops: Any) -> Callable[..., None]:
    """Adds the partials of each sample in the order of its runs, in float64, to its sums. With
    `loss`, the last block to finish also computes a loss of I, P and Y and its derivative.

    A block processes WARP columns of a sample's partials, one per lane; the runs are distributed
    over the warps.
    """
    cuda, int32, int64, float64 = ops.cuda, ops.int32, ops.int64, ops.float64
    load_real, load_double, load_relaxed = ops.load_real, ops.load_double, ops.load_relaxed
    store_real, store_double = ops.store_real, ops.store_double
    divide, floor_divide = ops.divide, ops.floor_divide
    atomic_increment, shuffle = ops.atomic_increment, ops.shuffle
    real, SIZE, LOSS = ops.real, ops.size, loss
    INFINITY, THREADS, WARPS = float("inf"), plans.THREADS, plans.WARPS
    FULL_MASK, WARP_SHUFFLES = 0xFFFFFFFF, WARP.bit_length() - 1

    def kernel(  # type: ignore[no-untyped-def]
        partials,
        sums,
        samples,
        runs,
        fields,
        classes,
        groups,
        value,
        derivative,
        weights,
        pooled,
        per_sample,
        weighted,
        ignore_channel,
        share,
        start,
        excess,
        smooth,
        num_i,
        num_p,
        num_y,
        den_i,
        den_p,
        den_y,
    ):
        # The mask tells the compiler that it is not negative, and so that 32 bits are enough.
        thread = int32(int32(cuda.threadIdx.x) & int32(THREADS - 1))
        lane, warp = thread % int32(WARP), thread // int32(WARP)
        block = int64(cuda.blockIdx.x)
        sample = int64(floor_divide(int32(block), int32(groups)))
        columns = fields * classes
        column = (block - sample * groups) * int64(WARP) + int64(lane)
        numbers = cuda.shared.array(THREADS, float64)
        blocks_before = cuda.shared.array(1, int32)
        partial = cuda.local.array(LOADS, real)
        total = float64(0)
        if sample < samples and column < columns:
            r = int32(warp)
            at = ((sample * runs + int64(r)) * columns + column) * int64(SIZE)
            at += int64(COUNTER_BYTES)
            while r < int32(runs):
                for k in range(LOADS):  # none of them waits for another one
                    partial[k] = real(0)
                    if r < int32(int32(runs) - int32(k * WARPS)):
                        partial[k] = load_real(partials, at)
                    at += int64(WARPS * SIZE) * columns
                for k in range(LOADS):
                    total += float64(partial[k])
                r = int32(r + int32(LOADS * WARPS))
        numbers[thread] = total
        cuda.syncthreads()
        if warp == int32(0) and sample < samples and column < columns:
            for k in range(1, WARPS):
                total += numbers[int32(k * WARP) + lane]
            c = int64(floor_divide(int32(column), int32(fields)))
            k = column - c * fields
            entry = (k * samples + sample) * classes + c
            store_double(sums, entry * int64(8), total)

        if LOSS:
            # A block's sums come before its barrier, thread 0's fence and its count: a release
            # pattern of PTX's memory model. The last count, fence and barrier come before what the
            # last block reads: an acquire pattern. So cooperative groups synchronize a grid.
            cuda.syncthreads()
            if thread == int32(0):
                cuda.threadfence()
                blocks_before[0] = atomic_increment(partials)
                cuda.threadfence()
            cuda.syncthreads()
            if blocks_before[0] == int32(cuda.gridDim.x) - int32(1):
                # If each sample has a loss, each warp computes one at a time, with the classes
                # distributed over its lanes. Otherwise the block computes one loss, with the terms
                # distributed over its threads: (samples, classes) of them, or (classes,) if samples
                # are pooled.
                size = samples * classes
                rows, width, first, stride = int64(1), size, int64(thread), int64(THREADS)
                if pooled != int64(0):
                    width = classes
                if per_sample != int64(0):
                    rows, width, first, stride = samples, classes, int64(lane), int64(WARP)
                row, sum_of_terms = int64(0), float64(0)
                while row < rows:
                    n = row + int64(warp) if per_sample != int64(0) else row
                    term = first if n < rows else width
                    while term < width:
                        m = n + term // classes
                        c = term - term // classes * classes
                        end = (samples if pooled != int64(0) else m + int64(1)) * classes
                        of_i, of_p, of_y = float64(0), float64(0), float64(0)
                        entry = m * classes + c
                        while entry < end:
                            of_i += load_relaxed(sums, entry * int64(8))
                            of_p += load_relaxed(sums, (entry + size) * int64(8))
                            of_y += load_relaxed(sums, (entry + size + size) * int64(8))
                            entry += classes
                        num = num_i * of_i + num_p * of_p + num_y * of_y + excess
                        den = den_i * of_i + den_p * of_p + den_y * of_y + smooth
                        # 1 - num / den, from the sums, since the difference would lose its digits
                        score = (
                            (den_i - num_i) * of_i
                            + (den_p - num_p) * of_p
                            + (den_y - num_y) * of_y
                            + (smooth - excess)
                        )
                        if den == float64(0):
                            den = float64(INFINITY)  # 0/0 is 0, and so is its derivative
                        quotient, score = divide(num, den), divide(score, den)
                        factor = share
                        if weighted != int64(0):
                            factor *= load_double(weights, c * int64(8))
                        if c == ignore_channel:  # whatever its sums, NaN included
                            factor, den = float64(0), float64(INFINITY)
                            quotient, score = float64(0), float64(0)
                        sum_of_terms += quotient * factor
                        # From the score or 1 minus it, whichever is small: both are computed from
                        # the sums. Divided last, since factor / den may overflow.
                        if score < float64(0.5):
                            of_i = score * den_i - (den_i - num_i)
                            of_p = score * den_p - (den_p - num_p)
                            of_y = score * den_y - (den_y - num_y)
                        else:
                            of_i = num_i - quotient * den_i
                            of_p = num_p - quotient * den_p
                            of_y = num_y - quotient * den_y
                        of_i = divide(of_i * factor, den)
                        of_p = divide(of_p * factor, den)
                        of_y = divide(of_y * factor, den)
                        entry = m * classes + c
                        while entry < end:
                            store_double(derivative, entry * int64(8), of_i)
                            store_double(derivative, (entry + size) * int64(8), of_p)
                            store_double(derivative, (entry + size + size) * int64(8), of_y)
                            k = int64(3)
                            while k < fields:
                                store_double(derivative, (entry + k * size) * int64(8), float64(0))
                                k += int64(1)
                            entry += classes
                        term += stride
                    if per_sample != int64(0):
                        for k in range(WARP_SHUFFLES):
                            sum_of_terms += shuffle(FULL_MASK, sum_of_terms, 1 << k)
                        if lane == int32(0) and n < rows:
                            store_real(value, n * int64(SIZE), real(start + sum_of_terms))
                        sum_of_terms = float64(0)
                        row += int64(WARPS)
                    else:
                        row += int64(1)
                if per_sample == int64(0):
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
