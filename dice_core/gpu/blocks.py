"""The start and the end of a block, shared by both kernels over voxels: loads the cotangent into
shared memory; stores the sums of the block's threads as its partial.

numba inlines these functions whole (`ops.inlined`), since functions called from a kernel could not
be compiled without a driver.
"""

from __future__ import annotations

from typing import Any

from . import plan as plans
from .plan import COUNTER_BYTES, WARP, Plan


def factor_loader(plan: Plan, width: int, rows: int, ops: Any) -> Any:
    """(factor, cotangent, scale, scale_n, scaled, samples, sample, thread): loads the cotangent of
    a sample, times its scale, into the shared array `factor`: `rows` rows, without that of
    target_sum, padded to `width` with zeros.

    The row of P is multiplied by p, and that of I added to it: the derivative with respect to the
    probability of a voxel's own class where that is 1. It may be small beside its two parts.
    """
    cuda, real, int32, int64, float64 = ops.cuda, ops.real, ops.int32, ops.int64, ops.float64
    load_double, load_real = ops.load_double, ops.load_real
    THREADS, CLASSES, WIDTH, SIZE = plans.THREADS, plan.classes, width, rows * width
    P = float(plan.spec.p)

    @ops.inlined
    def load(  # type: ignore[no-untyped-def]
        factor, cotangent, scale, scale_n, scaled, samples, sample, thread
    ):
        i = thread
        while i < int32(SIZE):
            k = i // int32(WIDTH)
            c = i - k * int32(WIDTH)
            factor[i] = real(0)
            if c < int32(CLASSES):
                row = k + int32(1) if k > int32(1) else k  # skip that of target_sum
                entry = (int64(row) * samples + sample) * int64(CLASSES) + int64(c)
                number = load_double(cotangent, entry * int64(8))[0]
                if k == int32(0):
                    entry += samples * int64(CLASSES)
                    number += float64(P) * load_double(cotangent, entry * int64(8))[0]
                elif k == int32(1):
                    number *= float64(P)
                if scaled != int64(0):
                    number *= load_real(scale, sample * scale_n)[0]
                factor[i] = real(number)
            i += int32(THREADS)
        cuda.syncthreads()

    return load


def partial_writer(plan: Plan, part: int, ops: Any) -> Any:
    """(out, sums, out_of_range, block, thread, first_class): adds the sums of a block's threads,
    (fields, part) each, and stores the partial. Block 0 zeroes the counter before them.
    """
    cuda, real, int32, int64, shuffle = ops.cuda, ops.real, ops.int32, ops.int64, ops.shuffle
    store_real, store_int, SIZE = ops.store_real, ops.store_int, ops.size
    THREADS, WARPS, TABLES, COLUMNS = plans.THREADS, plans.WARPS, plan.tables, plan.columns
    LANES, CLASSES, FIELDS, PART = plan.lanes, plan.classes, plan.fields, part
    FULL, SUMS = CLASSES - (LANES - 1) * PART, FIELDS * PART
    TURNS, TABLE = WARPS // TABLES, TABLES * COLUMNS
    SHUFFLES, WARP_SHUFFLES = LANES.bit_length() - 1, WARP.bit_length() - 1
    FULL_MASK = 0xFFFFFFFF

    @ops.inlined
    def store(  # type: ignore[no-untyped-def]
        out, sums, out_of_range, block, thread, first_class
    ):
        for k in range(WARP_SHUFFLES):
            out_of_range += shuffle(FULL_MASK, out_of_range, 1 << k)
        for i in range(SUMS):
            for k in range(SHUFFLES, WARP_SHUFFLES):
                sums[i] += shuffle(FULL_MASK, sums[i], 1 << k)
        table = cuda.shared.array(TABLE, real)
        column = thread
        while column < int32(TABLE):
            table[column] = real(0)
            column += int32(THREADS)
        warp = thread // int32(WARP)
        row = warp % int32(TABLES) * int32(COLUMNS)
        for turn in range(TURNS):
            cuda.syncthreads()
            if warp // int32(TABLES) == int32(turn) and thread % int32(WARP) < int32(LANES):
                if first_class == int32(0):
                    table[row + int32(COLUMNS - 1)] += real(out_of_range)
                for c in range(PART):
                    if c < FULL or first_class + int32(c) < int32(CLASSES):
                        for k in range(FIELDS):
                            column = row + int32(k * CLASSES + c) + first_class
                            table[column] += sums[k * PART + c]
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

    return store
