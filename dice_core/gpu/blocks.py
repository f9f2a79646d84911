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
        # As in `partial_writer`, the mask tells the compiler that 32 bits are enough.
        thread = int32(thread & int32(THREADS - 1))
        for start in range(0, SIZE, THREADS):
            i = int32(thread + int32(start))
            if i < int32(SIZE):
                k = i // int32(WIDTH)
                c = int32(i - k * int32(WIDTH))
                number = float64(0)
                if c < int32(CLASSES):
                    row = k + int32(1) if k > int32(1) else k  # skip that of target_sum
                    entry = (int64(row) * samples + sample) * int64(CLASSES) + int64(c)
                    number = load_double(cotangent, entry * int64(8))
                    if k == int32(0):
                        entry += samples * int64(CLASSES)
                        number += float64(P) * load_double(cotangent, entry * int64(8))
                    elif k == int32(1):
                        number *= float64(P)
                    if scaled != int64(0):
                        number *= load_real(scale, sample * scale_n)
                factor[i] = real(number)
        cuda.syncthreads()

    return load


def partial_writer(plan: Plan, ops: Any) -> Any:
    """(out, sums, out_of_range, block, thread): adds the sums of a block's threads,
    (fields, lane_classes) each, and stores the partial, (classes, fields). The sums of a warp that
    found labels out of range are NaN. Block 0 zeroes the counter before the partials.

    A warp adds its sums by halves: of two lanes, one keeps those with an even number and the other
    those with an odd one, so that the number of shuffles is that of the sums, not five times it.
    """
    cuda, real, int32, int64, shuffle = ops.cuda, ops.real, ops.int32, ops.int64, ops.shuffle
    store_real, store_int, SIZE = ops.store_real, ops.store_int, ops.size
    THREADS, TABLES, TABLE, COLUMNS = plans.THREADS, plan.tables, plan.table, plan.columns
    LANES, FIELDS, PART = plan.lanes, plan.fields, plan.lane_classes
    SUMS, TURNS, TABLES_SIZE = FIELDS * PART, plans.WARPS // TABLES, TABLES * TABLE
    PADDED = SUMS + 1  # the last of an odd number of sums has a partner
    # A warp halves its sums until each lane has one, or all lanes of a class have added theirs.
    SHUFFLES = (WARP // LANES).bit_length() - 1
    HALVINGS = min((SUMS - 1).bit_length(), SHUFFLES)
    PARTS = 1 << HALVINGS  # of the sums; a lane has one in the end
    KEPT = -(-SUMS // PARTS)
    OTHERS = WARP - LANES * PARTS  # bits of a lane's number; lanes that differ there agree
    FULL_MASK, NAN = 0xFFFFFFFF, float("nan")

    @ops.inlined
    def store(  # type: ignore[no-untyped-def]
        out, sums, out_of_range, block, thread
    ):
        # The mask tells the compiler that it is not negative, and so that 32 bits are enough.
        thread = int32(thread & int32(THREADS - 1))
        own = cuda.local.array(PADDED, real)
        for c in range(PART):
            for k in range(FIELDS):
                own[c * FIELDS + k] = sums[k * PART + c]
        own[SUMS] = real(0)
        for k in range(HALVINGS):
            odd = int32(thread & int32(LANES << k))
            for i in range((SUMS + (2 << k) - 1) >> (k + 1)):
                first, second = own[2 * i], own[2 * i + 1]
                passed = first if odd != int32(0) else second
                kept = second if odd != int32(0) else first
                own[i] = kept + shuffle(FULL_MASK, passed, LANES << k)
        for k in range(HALVINGS, SHUFFLES):
            for i in range(KEPT):
                own[i] += shuffle(FULL_MASK, own[i], LANES << k)
        any_out_of_range = cuda.any_sync(FULL_MASK, out_of_range != int32(0))

        table = cuda.shared.array(TABLES_SIZE, real)
        warp = thread // int32(WARP)
        lane, part = thread % int32(LANES), thread // int32(LANES) % int32(PARTS)
        base = int32(warp % int32(TABLES) * int32(TABLE) + lane * int32(SUMS) + part)
        for turn in range(TURNS):
            if turn > 0:
                cuda.syncthreads()
            if warp // int32(TABLES) == int32(turn) and thread & int32(OTHERS) == int32(0):
                for i in range(KEPT):
                    number = real(NAN) if any_out_of_range else own[i]
                    at = int32(base + int32(i * PARTS))
                    if part < int32(SUMS - i * PARTS):
                        table[at] = number if turn == 0 else table[at] + number
        cuda.syncthreads()
        for start in range(0, COLUMNS, THREADS):
            column = int32(thread + int32(start))
            if column < int32(COLUMNS):
                total = table[column]
                for k in range(1, TABLES):
                    total += table[int32(k * TABLE) + column]
                entry = block * int64(COLUMNS) + int64(column)
                store_real(out, int64(COUNTER_BYTES) + entry * int64(SIZE), total)
        if block == int64(0) and thread == int32(0):
            store_int(out, int64(0), int32(0))

    return store
