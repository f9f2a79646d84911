"""The CUDA kernel that adds up what the blocks of the others have summed, and goes on to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _gpu_plan as plans
from ._gpu_plan import BAD, COUNTER_BYTES, WARP


def total_kernel(loss: bool, ops: Any) -> Callable[..., None]:
    """Adds the partials of every run in order, in float64: sums, NaN where a sample has bad labels.
    With `loss`, its last block goes on to a loss of I, P and Y and the derivative of that.

    A block is a sample's next WARP columns, its warps take the runs in turn. Arguments, integers
    but for what `losses.Ratio` has as float64, and the flags:

    - addresses of counter and partials, and of sums, (K, samples, classes) float64;
    - samples, runs of a sample, K, classes, blocks of a sample;
    - addresses of the loss, one number or one per sample, of the derivative, like sums, and of
      the classes' weights, (classes,) float64;
    - whether the samples' sums are pooled, each sample has a loss, there are weights;
    - the class left out;
    - what a class's loss counts, what the total starts from, what is added to numerator and
      denominator, and what I, P and Y count in the one and in the other.
    """
    cuda, int32, int64, float64 = ops.cuda, ops.int32, ops.int64, ops.float64
    load_real, store_real, load_fresh = ops.load_real, ops.store_real, ops.load_fresh
    load_double, store_double, count_up = ops.load_double, ops.store_double, ops.count_up
    divide, real, shuffle, SIZE, LOSS = ops.divide, ops.real, ops.shuffle, ops.size, loss
    NAN, INFINITY, THREADS, WARPS = float("nan"), float("inf"), plans.THREADS, plans.WARPS
    MASK, WARP_SHUFFLES = 0xFFFFFFFF, WARP.bit_length() - 1

    def kernel(  # type: ignore[no-untyped-def]
        partials,
        sums,
        samples,
        runs,
        kinds,
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
        excess,
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
        columns = kinds * classes + int64(BAD)
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
                        num = num_i * of_i + num_p * of_p + num_y * of_y + excess
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
                            k = int64(3)
                            while k < kinds:
                                store_double(derivative, (entry + k * step) * int64(8), float64(0))
                                k += int64(1)
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
