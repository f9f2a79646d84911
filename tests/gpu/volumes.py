"""Logits and labels on the GPU, and what they give by the naive code, in float64 on the host."""

from dataclasses import dataclass

import naive
import numpy as np
import torch
from compare import assert_close

DEVICE = "cuda"
LOGITS = ("float16", "bfloat16", "float32", "float64")
LABELS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "bool")

# Relative to the numbers themselves; a gradient moreover to the largest, which it is a difference
# of. The arithmetic is float32 for half-precision logits too, and the gradient is rounded once.
SUMS = {"float16": 5e-6, "bfloat16": 5e-6, "float32": 5e-6, "float64": 1e-13}
ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}


def _misaligned(array):
    """One voxel behind the beginning of a larger buffer, whose other elements nobody may read."""
    room = array.new_full((*array.shape[:-1], array.shape[-1] + 1), _poison(array.dtype))
    room[..., 1:] = array
    return room.to(DEVICE)[..., 1:]


def _poison(dtype):
    return float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else 100


LAYOUTS = {  # logits (N, C, *) and labels (N, *) of the host -> on the GPU
    "first": lambda x, y: (x.to(DEVICE), y.to(DEVICE)),
    "last": lambda x, y: (x.movedim(1, -1).contiguous().to(DEVICE).movedim(-1, 1), y.to(DEVICE)),
    "misaligned": lambda x, y: (_misaligned(x.flatten(2)), _misaligned(y.flatten(1))),
}


@dataclass(frozen=True)
class Volume:
    """Random logits (2, C, *) of one dtype and labels (2, *) of another."""

    channels: int
    voxels: tuple[int, ...] = (4099,)
    logits: str = "float32"
    labels: str = "uint8"
    p: int = 1
    gamma: float | None = None
    ignore: int | None = None  # a fifth of the voxels have this label
    layout: str = "first"

    def __str__(self):
        ignore = "" if self.ignore is None else f"-ignore{self.ignore}"
        gamma = "" if self.gamma is None else f"-gamma{self.gamma:g}"
        voxels = "x".join(map(str, self.voxels))
        return (
            f"{self.channels}x{voxels}-{self.logits}-{self.labels}-{self.layout}"
            f"-p{self.p}{gamma}{ignore}"
        )

    @property
    def options(self):
        """Of the statistics."""
        return {"p": self.p, "gamma": self.gamma, "ignore_label": self.ignore}

    def tensors(self, seed=0):
        """x and y."""
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


def on_host(x, y):
    """The same numbers there, x in float64 and with a gradient to come."""
    return x.detach().cpu().double().requires_grad_(), y.cpu().long()


def true_sums(x, y, cotangent, **options):
    """(K, N, C) statistics and their vector-Jacobian product."""
    x, y = on_host(x, y)
    sums = torch.stack(naive.statistics(x, y, **options))
    return sums.detach(), torch.autograd.grad(sums, x, cotangent.cpu())[0]


def true_loss(x, y, upstream=None, **options):
    """The loss and its gradient."""
    x, y = on_host(x, y)
    loss = naive.dice_loss(x, y, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.cpu().double()
    return loss.detach(), torch.autograd.grad(loss, x, upstream)[0]


def assert_sums(actual, expected, dtype, what="sums"):
    """Sums, or a loss, of logits of this dtype."""
    tolerance = SUMS[_name(dtype)]
    assert_close(_numpy(actual), _numpy(expected), rtol=tolerance, atol=tolerance, what=what)


def assert_gradient(actual, expected, what="gradient"):
    """A gradient in the logits' dtype."""
    name, expected = _name(actual.dtype), _numpy(expected)
    atol = SUMS[name] * np.abs(expected).max(initial=0)
    assert_close(_numpy(actual), expected, rtol=1.01 * ROUNDING[name], atol=atol, what=what)


def assert_same_bits(actual, expected, what="tensor"):
    """The same dtype, shape and bytes, NaN included."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    ours, theirs = (
        t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected)
    )
    differ = (ours != theirs).sum().item()
    assert not differ, f"{what}: {differ} of {theirs.numel()} bytes differ"


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _numpy(array):
    return array.detach().cpu().double().numpy()
