"""The inputs of the benchmark, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .networks import NETWORKS, TITLES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Random logits (N, C, *) and class labels (N, *); one channel means sigmoid.

    With a network it is a whole training step: the input is a random image (N, 1, *), and the
    network makes the logits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    channels_last: bool = False
    network: str = ""  # a key of NETWORKS

    def with_sides(self, longest: int) -> Case:
        """The same case with no side longer than this."""
        sides = (min(side, longest) for side in self.shape[2:])
        return replace(self, shape=(*self.shape[:2], *sides))

    def with_side(self, side: int) -> Case:
        """The same case with all sides of this length."""
        return replace(self, shape=(*self.shape[:2], *[side] * len(self.shape[2:])))

    def tensors(self, labels: str) -> tuple[Tensor, Tensor]:
        """Logits, or the image, and labels, the same numbers on every call."""
        import torch

        generator = torch.Generator().manual_seed(0)
        samples, channels, *sides = self.shape
        shape = (samples, 1, *sides) if self.network else self.shape
        x = torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))
        if self.channels_last:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            x = x.contiguous(memory_format=formats[x.ndim])
        y = torch.randint(max(2, channels), (samples, *sides), generator=generator)
        return x, y.to(getattr(torch, labels))

    def logits(self, x: Tensor) -> Tensor:
        """The logits of these logits, or of this image."""
        if not self.network:
            return x
        return NETWORKS[self.network](self.shape[1])(x.shape[-1]).to(x.device)(x)

    def logits_bytes(self) -> int:
        """The size of the logits."""
        import torch

        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        if self.network:
            return f"training step of {TITLES[self.network]}, logits[{shape}] {self.dtype}"
        activation = ", sigmoid" if self.shape[1] == 1 else ""
        layout = ", channels last" if self.channels_last else ""
        return f"x[{shape}] {self.dtype}{activation}{layout}"


CASES = {
    case.name: case
    for case in (
        Case("a", (2, 5, 64, 128, 128)),
        Case("b", (2, 3, 128, 128, 128)),
        Case("c", (8, 20, 256, 256)),
        Case("d", (2, 1, 128, 128, 128)),
        Case("e", (1, 105, 64, 64, 64)),
        Case("f", (2, 5, 64, 128, 128), dtype="bfloat16"),
        Case("g", (4, 4, 64, 64)),
        Case("h", (2, 5, 64, 128, 128), channels_last=True),
        Case("i", (2, 5, 64, 128, 128), dtype="float16"),
        Case("j", (2, 4, 128, 128, 128), dtype="float16"),
        Case("k", (1, 4, 256, 256, 256), dtype="float16"),
        Case("l", (2, 14, 128, 128, 128), dtype="bfloat16"),
        Case("m", (2, 2, 128, 128, 128)),
        Case("nnunet-step-14", (1, 14, 64, 64, 64), network="nnunet-step"),
        Case("nnunet-step-105", (1, 105, 64, 64, 64), network="nnunet-step"),
        Case("monai-step-105", (1, 105, 64, 64, 64), network="monai-step"),
    )
}
GPU_SIZED = ("j", "k", "l")  # measured on a CPU only if named
STEPS = tuple(case.name for case in CASES.values() if case.network)  # only if named, or by --step
