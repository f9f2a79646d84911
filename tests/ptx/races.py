"""Which accesses of different threads are ordered, and whether any race.

Threads of a block are ordered by barriers. What a block wrote, others may read after the release
and acquire of a reduction over blocks: all threads that wrote pass a fence, then a barrier unless
the same thread goes on; an atomic operation; another block's atomic operation on the same memory;
a barrier, likewise; a fence. The read has to be `ld.relaxed`, which no compiler may move or turn
into one of read-only memory; PTX itself would allow a plain one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .rounding import Array

# A stamp names the segment of a thread in which it accessed a byte: block + 1, segment, lane.
# Segments of a block end at its barriers and fences.
LANES, SEGMENTS = 16, 24  # bits
LANE_MASK, SEGMENT_MASK = (1 << LANES) - 1, (1 << SEGMENTS) - 1
SEVERAL_LANES = LANE_MASK
SEVERAL_BLOCKS = (1 << 62) - 1
Released = dict[int, Array]  # block -> for each of its lanes, the first segment not yet released


class Race(Exception):
    """What an access of the lane at this position among the active ones conflicts with."""

    def __init__(self, position: int, text: str) -> None:
        super().__init__(text)
        self.position = position


class Order:
    """The segments of a block's threads, and what they released and acquired."""

    def __init__(self, block: int, threads: int) -> None:
        self.block, self.lanes = block, np.arange(threads)
        self.epoch = 0  # the first segment after the last barrier
        self.fenced = np.zeros(threads, np.int64)  # own segments before are fenced by each lane,
        self.fenced_others = np.zeros(threads, np.int64)  # and those of all other lanes,
        self.fenced_before = np.zeros(threads, np.int64)  # and the former up to the last barrier
        self.observed = np.zeros(threads, np.int64)  # by atomic operations: an index of `views`
        self.acquired = np.zeros(threads, np.int64)  # by a fence after it
        self.views: list[Released] = [{}]
        self._begin(0)

    def _begin(self, segment: int) -> None:
        self.segment = segment
        first = (self.block + 1) << (LANES + SEGMENTS) | segment << LANES
        self.stamps = (first | self.lanes).astype(np.int64)

    def barrier(self) -> None:
        self.fenced_before = np.maximum(self.fenced, self.fenced_others.max())
        self.observed[:] = self.observed.max()
        self.acquired[:] = self.acquired.max()
        self._begin(self.segment + 1)
        self.epoch = self.segment

    def fence(self, lanes: Array) -> None:
        self._begin(self.segment + 1)
        self.fenced[lanes] = self.segment
        self.fenced_others[lanes] = self.epoch
        self.acquired[lanes] = self.observed[lanes]

    def atomic(self, lane: int, location: Released) -> None:
        """Acquires what the location's earlier operations released, and releases there."""
        self.views.append(_merged(self.views[-1], location))
        self.observed[lane] = len(self.views) - 1
        released = np.maximum(self.fenced_before, self.fenced_others[lane])
        released[lane] = max(released[lane], self.fenced[lane])
        location.update(_merged(location, {self.block: released}))

    def sees(self, lane: int, stamp: int) -> bool:
        """Whether a write of another block is ordered before what this lane does now."""
        block, segment, writer = _parts(stamp)
        released = self.views[self.acquired[lane]].get(block)
        return released is not None and segment < int(released[writer])


class Shadow:
    """The last writer and reader of each `unit` of bytes."""

    def __init__(self, size: int) -> None:
        self.unit = 16
        self.writer = np.zeros(size // self.unit, np.int64)
        self.reader = np.zeros(size // self.unit, np.int64)
        self.written = False
        self.reads: list[Any] = []  # until the first write
        self.atomics: dict[int, Released] = {}  # by the index of their first byte
        self.atomic = np.zeros(size, bool)

    def read(self, first: Array, width: int, order: Order, lanes: Any, strong: bool) -> None:
        """A read of `width` bytes from `first` on, by each of these lanes of a block."""
        own = order.stamps[lanes][:, None]
        if self.atomics:
            self._check_atomics(first, width)
        if not self.written:
            self.reads.append((first, width, own, order.epoch))
            return
        cells = self._cells(first, width)
        last = self.writer[cells]
        if last.any():
            near, far = _conflicts(last, own, order.epoch)
            if near.any():
                raise _race(near, last, "a read of what another thread writes")
            if far.any():
                _check_acquired(far, last, order, order.lanes[lanes], strong)
        self._note_read(cells, own, order.epoch)

    def write(self, first: Array, width: int, order: Order, lanes: Any) -> None:
        own = order.stamps[lanes][:, None]
        if self.atomics:
            self._check_atomics(first, width)
        cells = self._check_write(first, width, order, own)
        self.writer[cells] = own
        twice = self.writer[cells] != own
        if twice.any():
            raise _race(twice, self.writer[cells], "two writes by one instruction")

    def update(self, first: int, width: int, order: Order, lane: int) -> None:
        """An atomic operation."""
        where = np.array([first])
        self._check_write(where, width, order, order.stamps[[lane]][:, None])
        if first not in self.atomics:
            self.atomics[first] = {}
            self.atomic[first : first + width] = True
        order.atomic(lane, self.atomics[first])

    def unwritten(self, first: Array, width: int) -> Array:
        """Of which accesses a byte was not written before."""
        cells = self._cells(first, width)  # which may replace `writer`
        return (self.writer[cells] == 0).any(axis=1)

    def _check_write(self, first: Array, width: int, order: Order, own: Array) -> Array:
        if not self.written:
            self.written = True
            for earlier, its_width, stamps, epoch in self.reads:
                self._note_read(self._cells(earlier, its_width), stamps, epoch)
            self.reads.clear()
        cells = self._cells(first, width)
        for last, what in ((self.writer[cells], "writes"), (self.reader[cells], "reads")):
            if last.any():
                near, far = _conflicts(last, own, order.epoch)
                if (near | far).any():
                    raise _race(near | far, last, f"a write of what another thread {what}")
        return cells

    def _note_read(self, cells: Array, own: Array, epoch: int) -> None:
        last = self.reader[cells]
        near, far = _conflicts(last, own, epoch)
        several = own | SEVERAL_LANES
        stamps = np.where(near, several, np.where(far, SEVERAL_BLOCKS, own))
        self.reader[cells] = stamps
        again = (self.reader[cells] != stamps) & ~far
        if again.any():
            self.reader[cells[again]] = np.broadcast_to(several, cells.shape)[again]

    def _check_atomics(self, first: Array, width: int) -> None:
        touched = self.atomic[first[:, None] + np.arange(width)].any(axis=1)
        if touched.any():
            raise Race(int(np.argmax(touched)), "a plain access to what is accessed atomically")

    def _cells(self, first: Array, width: int) -> Array:
        """The indices of all units of each access; the units shrink to the narrowest one."""
        if width < self.unit:
            times = self.unit // width
            self.writer, self.reader = np.repeat(self.writer, times), np.repeat(self.reader, times)
            self.unit = width
        cells = (first // self.unit)[:, None]
        return cells + np.arange(width // self.unit) if width > self.unit else cells


def _conflicts(last: Array, own: Array, epoch: int) -> tuple[Array, Array]:
    """Where the last access was by another lane of the block since its last barrier, and where by
    another block.
    """
    changed = last ^ own
    same_block = changed < 1 << (LANES + SEGMENTS)
    since = ((last >> LANES) & SEGMENT_MASK) >= epoch
    return same_block & since & ((changed & LANE_MASK) != 0), ~same_block & (last != 0)


def _check_acquired(far: Array, last: Array, order: Order, lanes: Array, strong: bool) -> None:
    checked = set()
    for position, unit in zip(*np.nonzero(far), strict=True):
        case = int(lanes[position]), int(last[position, unit])
        if case in checked:
            continue
        checked.add(case)
        if not strong:
            raise Race(int(position), _named(case[1], "a plain read of what another block writes"))
        if not order.sees(*case):
            text = "a read that is not ordered after the write"
            raise Race(int(position), _named(case[1], text))


def _race(where: Array, last: Array, what: str) -> Race:
    position, unit = (int(each) for each in np.argwhere(where)[0])
    return Race(position, _named(int(last[position, unit]), what))


def _named(stamp: int, what: str) -> str:
    block, _, lane = _parts(stamp)
    if stamp == SEVERAL_BLOCKS:
        return f"{what}: several blocks"
    return f"{what}: block {block}, {'several' if lane == SEVERAL_LANES else f'thread {lane}'}"


def _parts(stamp: int) -> tuple[int, int, int]:
    block = (stamp >> (LANES + SEGMENTS)) - 1
    return block, (stamp >> LANES) & SEGMENT_MASK, stamp & LANE_MASK


def _merged(a: Released, b: Released) -> Released:
    return {
        block: np.maximum(a[block], b[block]) if block in a and block in b else (a | b)[block]
        for block in (*a, *(block for block in b if block not in a))
    }
