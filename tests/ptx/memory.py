"""Address spaces: allocations, and where in them the aligned accesses of all lanes are."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .module import Variable
from .races import Shadow
from .rounding import Array

WORD = 16  # bytes of the widest access
SHARED_BASE, LOCAL_BASE = 1 << 20, 1 << 24  # not 0, which would hide a lost base address


class Invalid(Exception):
    """What is wrong with the access of the lane at this position among the active ones."""

    def __init__(self, position: int, text: str) -> None:
        super().__init__(text)
        self.position = position


class Region:
    """An allocation: its bytes, and who accessed them."""

    def __init__(self, start: int, size: int, host: bool) -> None:
        self.start, self.end = start, start + size
        self.base = start // WORD * WORD
        length = -(-self.end // WORD) * WORD - self.base
        # The whole words that the allocation is in: on the host they are on its pages.
        memory: Any = bytearray(length)
        if host:
            memory = (ctypes.c_uint8 * length).from_address(self.base)
        self.bytes: Array = np.frombuffer(memory, np.uint8)
        self.shadow = Shadow(length)

    def words(self, itemsize: int, count: int) -> Array:
        """All vectors of `count` unsigned integers of this size."""
        return self.bytes.view(f"u{itemsize}").reshape(-1, count)


class Space:
    """Allocations that do not overlap."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self.starts = [region.start for region in self.regions]
        self.ends = np.array([region.end for region in self.regions], np.int64)

    def located(self, addresses: Array, width: int) -> Iterator[tuple[Region, Any, Array]]:
        """(region, which of the addresses, their offsets from its base) for each region."""
        odd = addresses & (width - 1)
        if odd.any():
            raise Invalid(int(np.argmax(odd != 0)), f"misaligned: {width} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + width
        at = bisect.bisect_right(self.starts, low) - 1
        if at >= 0 and high <= self.regions[at].end:
            yield self.regions[at], slice(None), addresses - self.regions[at].base
            return
        which = np.searchsorted(self.starts, addresses, "right") - 1
        outside = which < 0
        if self.regions:
            outside |= addresses + width > self.ends[which]
        if outside.any():
            raise Invalid(int(np.argmax(outside)), f"out of bounds: {width} bytes")
        for at in np.unique(which):
            chosen = np.flatnonzero(which == at)
            yield self.regions[at], chosen, addresses[chosen] - self.regions[at].base


def host(allocations: Mapping[int, int]) -> Space:
    """Global memory: the host memory at these addresses, of these sizes."""
    return Space(Region(start, size, host=True) for start, size in allocations.items())


def placed(variables: Mapping[str, Variable], base: int) -> dict[str, int]:
    """The address of each variable, with a gap after it."""
    addresses = {}
    for name, variable in variables.items():
        alignment = max(variable.alignment, 1)
        base = -(-base // alignment) * alignment
        addresses[name] = base
        base += variable.size + WORD
    return addresses


def shared(variables: Mapping[str, Variable]) -> Space:
    """The shared memory of a block."""
    addresses = placed(variables, SHARED_BASE)
    return Space(Region(addresses[name], each.size, False) for name, each in variables.items())


class Local:
    """The local memory of a block's threads: rows of equal addresses."""

    def __init__(self, variables: Mapping[str, Variable], threads: int) -> None:
        addresses = placed(variables, LOCAL_BASE)
        ends = [addresses[name] + each.size for name, each in variables.items()]
        self.length = -(-(max(ends, default=LOCAL_BASE) - LOCAL_BASE) // WORD) * WORD
        self.bytes = np.zeros(threads * self.length, np.uint8)
        self.written = np.zeros(threads * self.length, bool)
        self.bounds = Space(
            Region(addresses[name], each.size, False) for name, each in variables.items()
        )

    def offsets(self, addresses: Array, width: int, lanes: Array) -> Array:
        """The offset of each lane's access in `bytes`."""
        for _ in self.bounds.located(addresses, width):
            pass
        return addresses - LOCAL_BASE + lanes * self.length

    def words(self, itemsize: int, count: int) -> Array:
        return self.bytes.view(f"u{itemsize}").reshape(-1, count)
