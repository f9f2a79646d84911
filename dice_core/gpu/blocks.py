"""The start and the end of a block of a kernel over voxels: loads the cotangent into
shared memory; stores the sums of the block's threads as its partial.

numba inlines these functions whole (`ops.inlined`), since functions called from a kernel could not
be compiled without a driver.
"""

from __future__ import annotations

from typing import Any

from . import plan as plans
from .plan import COUNTER_BYTES, WARP, Plan


def factor_loader(plan: Plan, ops: Any) -> Any:
    """(factor, cotangent, scale, scale_n, scaled, samples, sample, thread): loads the cotangent of
    a sample, times its scale, into the shared array `factor`: `factor_rows` rows, without that of
    target_sum, padded to `factor_width` with zeros.

    The row of P is multiplied by p, and that of I added to it: the derivative with respect to the
    probability of a voxel's own class where that is 1. It may be small beside its two parts.
    """
    cuda, real, int32, int64, float64 = ops.cuda, ops.real, ops.int32, ops.int64, ops.float64
    load_double, load_real = ops.load_double, ops.load_real
    THREADS, CLASSES, WIDTH = plans.THREADS, plan.classes, plan.factor_width
    SIZE = plan.factor_rows * WIDTH
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


def partial_writer(plan: Plan, ops: Any) -> Any:
    """(out, sums, out_of_range, block, thread, first_class): adds the sums of a block's threads,
    (fields, lane_classes) each, and stores the partial. Block 0 zeroes the counter before them.
    `sums` has `summands(plan)` elements.

    A warp adds its sums by halves: of two lanes, each passes one half of them to the other and adds
    the half that it keeps, so that the number of shuffles is that of the sums, not five times it.
    """
    cuda, real, int32, int64, shuffle = ops.cuda, ops.real, ops.int32, ops.int64, ops.shuffle
    store_real, store_int, SIZE = ops.store_real, ops.store_int, ops.size
    THREADS, TABLES, COLUMNS = plans.THREADS, plan.tables, plan.columns
    LANES, CLASSES, FIELDS, PART = plan.lanes, plan.classes, plan.fields, plan.lane_classes
    SUMS, TURNS, TABLE = FIELDS * PART, plans.WARPS // TABLES, TABLES * COLUMNS
    SHUFFLES, WARP_SHUFFLES = LANES.bit_length() - 1, WARP.bit_length() - 1
    COUNT, HALVINGS = summands(plan), _halvings(plan)
    KEPT = COUNT >> HALVINGS  # sums of a lane in the end
    OTHERS = (WARP >> HALVINGS) - LANES  # bits of a lane's number; lanes that differ there agree
    FULL_MASK = 0xFFFFFFFF

    @ops.inlined
    def store(  # type: ignore[no-untyped-def]
        out, sums, out_of_range, block, thread, first_class
    ):
        sums[SUMS] = real(out_of_range)
        for i in range(SUMS + 1, COUNT):
            sums[i] = real(0)
        first_sum = int32(0)
        for k in range(HALVINGS):
            half = COUNT >> (k + 1)
            distance = int32(1 << (WARP_SHUFFLES - 1 - k))
            upper = thread & distance != int32(0)
            first_sum += int32(half) if upper else int32(0)
            for i in range(half):
                low, high = sums[i], sums[half + i]
                kept = high if upper else low
                sums[i] = kept + shuffle(FULL_MASK, low if upper else high, distance)
        for k in range(HALVINGS, WARP_SHUFFLES - SHUFFLES):
            for i in range(KEPT):
                sums[i] += shuffle(FULL_MASK, sums[i], 1 << (WARP_SHUFFLES - 1 - k))
        count = sums[SUMS % KEPT]  # of labels out of range, in the lanes that have that sum
        for k in range(SHUFFLES):
            count += shuffle(FULL_MASK, count, 1 << k)

        table = cuda.shared.array(TABLE, real)
        warp = thread // int32(WARP)
        row = warp % int32(TABLES) * int32(COLUMNS)
        for turn in range(TURNS):
            if turn > 0:
                cuda.syncthreads()
            if warp // int32(TABLES) == int32(turn) and thread & int32(OTHERS) == int32(0):
                for i in range(KEPT):
                    at = int32(first_sum + int32(i))
                    k = at // int32(PART)
                    c = first_class + at - k * int32(PART)
                    column = row + k * int32(CLASSES) + c
                    number = sums[i]
                    exists = at < int32(SUMS) and c < int32(CLASSES)
                    if at == int32(SUMS) and first_class == int32(0):
                        column, number, exists = row + int32(COLUMNS - 1), count, True
                    if exists:
                        table[column] = number if turn == 0 else table[column] + number
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


def summands(plan: Plan) -> int:
    """How many sums a thread adds up: its own, the number of out-of-range labels, and zeros, so
    that they can be halved.
    """
    multiple = 1 << _halvings(plan)
    return -(-(plan.fields * plan.lane_classes + 1) // multiple) * multiple


def _halvings(plan: Plan) -> int:
    """How often a warp halves its sums: until each lane has one, or all lanes of a class have
    added theirs.
    """
    sums = plan.fields * plan.lane_classes
    return min(sums.bit_length(), (WARP // plan.lanes).bit_length() - 1)
