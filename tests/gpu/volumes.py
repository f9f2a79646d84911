"""Random logits and labels on the GPU, the exact results, which are those of the naive code in
float64 on the host, and comparisons with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import emulated
import naive
import numpy as np
import torch
from compare import assert_close
from torch import Tensor

DEVICE = "cuda"
LOGITS = ("float16", "bfloat16", "float32", "float64")
LABELS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool")

# Tolerances by the logits' dtype. Statistics and losses: relative and absolute. A gradient is
# computed in float32 (float64 logits: float64) and rounded to the dtype once: its relative
# tolerance is the unit roundoff; the absolute one is TOLERANCE times the largest entry, since an
# entry is a difference of numbers of that size.
TOLERANCE = {"float16": 5e-6, "bfloat16": 5e-6, "float32": 5e-6, "float64": 1e-13}
UNIT_ROUNDOFF = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}


def _misaligned(array: Tensor) -> Tensor:
    """A view that starts at the second voxel of a larger array, whose first must not be read."""
    padded = array.new_full((*array.shape[:-1], array.shape[-1] + 1), _poison(array.dtype))
    padded[..., 1:] = array
    return padded.to(DEVICE)[..., 1:]


def _poison(dtype: torch.dtype) -> float:
    """A value that changes the results of a kernel that reads it."""
    return float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else 100


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().to(DEVICE).movedim(-1, 1)


# Copies logits (N, C, *) and labels (N, *) from the host to the GPU.
LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda x, y: (x.to(DEVICE), y.to(DEVICE)),
    "channels-last": lambda x, y: (_channels_last(x), y.to(DEVICE)),
    "misaligned": lambda x, y: (_misaligned(x.flatten(2)), _misaligned(y.flatten(1))),
}


@dataclass(frozen=True)
class Volume:
    """Random logits (2, C, *) and labels (2, *), and the options of their statistics.

    - channels, voxels: the shape of the logits, C and *.
    - logits, labels: dtypes.
    - p, gamma, ignore: options; a fifth of the voxels have the label `ignore`.
    - layout: of LAYOUTS.
    """

    channels: int
    voxels: tuple[int, ...] = (4099,)
    logits: str = "float32"
    labels: str = "uint8"
    p: int = 1
    gamma: float | None = None
    ignore: int | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        ignore = "" if self.ignore is None else f"-ignore{self.ignore}"
        gamma = "" if self.gamma is None else f"-gamma{self.gamma:g}"
        voxels = "x".join(map(str, self.voxels))
        return (
            f"{self.channels}x{voxels}-{self.logits}-{self.labels}-{self.layout}"
            f"-p{self.p}{gamma}{ignore}"
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `statistics`."""
        return {"p": self.p, "gamma": self.gamma, "ignore_label": self.ignore}

    def tensors(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(logits, labels) on the GPU."""
        generator = torch.Generator().manual_seed(seed)
        classes = min(
            max(2, self.channels), {"bool": 2, "int8": 99, "uint8": 199}.get(self.labels, 9999)
        )
        x = 3 * torch.randn(2, self.channels, *self.voxels, generator=generator)
        y = torch.randint(classes, (2, *self.voxels), generator=generator)
        if self.ignore is not None:
            y[torch.rand(y.shape, generator=generator) < 0.2] = self.ignore
        x, y = x.to(getattr(torch, self.logits)), y.to(getattr(torch, self.labels))
        return LAYOUTS[self.layout](x, y)


def large(*voxels: int) -> tuple[int, ...]:
    """A shape of many voxels; on the emulated device, of a quarter along each axis."""
    return tuple(-(-n // 4) for n in voxels) if emulated.active else voxels


def on_host(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Copies on the host: x in float64 and requiring a gradient, y in int64."""
    return x.detach().cpu().double().requires_grad_(), y.cpu().long()


def true_sums(x: Tensor, y: Tensor, cotangent: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The exact statistics, (K, N, C), and their vector-Jacobian product with `cotangent`."""
    x, y = on_host(x, y)
    sums = torch.stack(naive.statistics(x, y, **options))
    return sums.detach(), torch.autograd.grad(sums, x, cotangent.cpu())[0]


def true_loss(
    x: Tensor, y: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The exact loss and its gradient, for the incoming gradient `upstream`, 1 by default."""
    x, y = on_host(x, y)
    loss = naive.dice_loss(x, y, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.cpu().double()
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


def assert_sums(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "sums") -> None:
    """Statistics, or a loss, of logits of this dtype are close to the exact ones."""
    tolerance = TOLERANCE[_name(dtype)]
    assert_close(_numpy(actual), _numpy(expected), rtol=tolerance, atol=tolerance, what=what)


def assert_gradient(actual: Tensor, expected: Tensor, what: str = "gradient") -> None:
    """A gradient, in the logits' dtype, is close to the exact one."""
    name, exact = _name(actual.dtype), _numpy(expected)
    atol = TOLERANCE[name] * np.abs(exact).max(initial=0)
    assert_close(_numpy(actual), exact, rtol=1.01 * UNIT_ROUNDOFF[name], atol=atol, what=what)


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """The same dtype, shape and bytes, NaN included."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    ours, theirs = (
        t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)
    )
    differ = (ours != theirs).sum().item()
    assert not differ, f"{what}: {differ} of {theirs.numel()} bytes differ"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numpy(array: Tensor) -> np.ndarray[Any, Any]:
    return array.detach().cpu().double().numpy()
