"""The floor: the time that the memory traffic takes on this machine, if arithmetic were free.

A loss must read the logits and the labels once; its gradient must read both again and be written.
So forward reads both, and backward reads the labels and copies the logits into memory that is
already mapped, with torch's own copy and a plain reduction over the bytes, the fastest of several.
Where a cache keeps the logits between the passes, or non-temporal stores bypass the caches, a step
can be faster than its floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .implementations import Inputs, Step

READERS: tuple[Callable[[Tensor], Any], ...] = (
    lambda flat: flat.view(torch.float32).sum(),
    lambda flat: flat.view(torch.int64).sum(),
    lambda flat: flat.max(),
)


def step(read: Callable[[Tensor], Any], inputs: Inputs) -> Step:
    """The step that is timed beside the implementations, for each of READERS."""
    pairs = cycle([(_bytes(x), _bytes(y)) for x, y in inputs])
    dx = _bytes(inputs[0][0].clone())

    def floor_step() -> Iterator[Any]:
        x, y = next(pairs)
        yield
        read(x)
        read(y)
        yield
        read(y)
        yield dx.copy_(x)

    return floor_step


def _bytes(array: Tensor) -> Tensor:
    """A flat view of the memory of a dense tensor, in whole words of 8 bytes."""
    flat = torch.empty(0, dtype=torch.uint8, device=array.device).set_(array.untyped_storage())
    return flat[: flat.numel() // 8 * 8]
