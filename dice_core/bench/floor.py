"""The floor: how fast any code could be on this machine, were its arithmetic free.

A loss must read the logits x and the labels y once; a step must read both, read them again for the
gradient, and write the gradient dx. With the seconds measured in the same rounds, by the same
threads, as everything else::

    forward = read x + read y
    step    = read x + read y + read y + copy x -> dx

`read` is the fastest of a few plain torch reductions over an array's bytes, `copy` is torch's own
into memory that is already mapped. Where x stays in a cache between its two passes, or stores
bypass the caches, a step can be faster than its floor. On a GPU the labels alone may fit in its
cache, which lowers the floor a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .implementations import Inputs, Step

READERS: dict[str, Callable[[Tensor], Any]] = {
    "float32 sum": lambda flat: flat.view(torch.float32).sum(),
    "int64 sum": lambda flat: flat.view(torch.int64).sum(),
    "uint8 max": lambda flat: flat.max(),
}


@dataclass(frozen=True)
class Floor:
    """Seconds, medians."""

    read_x: float
    read_y: float
    copy_x: float

    @property
    def forward(self) -> float:
        """Of the loss alone."""
        return self.read_x + self.read_y

    @property
    def step(self) -> float:
        """Of the loss and its gradient, into mapped memory."""
        return self.forward + self.read_y + self.copy_x


def steps(inputs: Inputs) -> dict[str, Step]:
    """What is to be timed beside the implementations."""
    flat_x, flat_y = ([_bytes(array) for array in arrays] for arrays in zip(*inputs, strict=True))
    dx = flat_x[0].clone()
    readers = {
        f"read {name}, {how}": _one_phase(read, flat)
        for how, read in READERS.items()
        for name, flat in (("x", flat_x), ("y", flat_y))
    }
    return readers | {"copy x": _one_phase(dx.copy_, flat_x)}


def of(seconds: Mapping[str, float]) -> Floor:
    """The floor of the medians of `steps`."""
    read_x, read_y = (min(seconds[f"read {name}, {how}"] for how in READERS) for name in "xy")
    return Floor(read_x, read_y, seconds["copy x"])


def _one_phase(function: Callable[[Tensor], Any], arguments: list[Tensor]) -> Step:
    turns = cycle(arguments)

    def step() -> Iterator[Any]:
        argument = next(turns)
        yield
        yield function(argument)

    return step


def _bytes(array: Tensor) -> Tensor:
    """A flat view of the memory of a dense tensor, in whole words of 8 bytes."""
    flat = torch.empty(0, dtype=torch.uint8, device=array.device).set_(array.untyped_storage())
    return flat[: flat.numel() // 8 * 8]
