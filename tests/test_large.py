"""More than 2^31 numbers, more than 2^31 voxels, and strides beyond 2^32 bytes: counts and offsets
have 64 bits.

Those marked `large` take gigabytes, and are run by `pytest -n 0 -m large`.
"""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, kernel_rows

import dice_core
from dice_core.losses import CrossEntropy, Dice

GIB = 2**30
LEVELS = [row.name for row in kernel_rows()]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's mmap and /proc")

# ---- strides -------------------------------------------------------------------------------------


def spread(a, steps):
    """A copy of `a` with strides of so many bytes, in memory that is taken only where touched."""
    size = sum(abs(step) * (n - 1) for step, n in zip(steps, a.shape, strict=True)) + a.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    room = mmap.mmap(-1, size, flags)
    room.madvise(15)  # MADV_NOHUGEPAGE
    first = sum(-step * (n - 1) for step, n in zip(steps, a.shape, strict=True) if step < 0)
    view = np.ndarray(a.shape, a.dtype, room, first, steps)
    view[...] = a
    return view


FAR = {
    "channels beyond 2^31 bytes": ((0, 2**31 + 64, 2), (0, 1)),
    "channels beyond 2^32 bytes": ((2, 2**32 + 64, 4), (37, 1)),
    "samples beyond 2^32 bytes": ((2**32 + 64, 128, 2), (2**32 + 64, 1)),
    "voxels beyond 2^32 bytes": ((2, 4, 2**27 + 64), (1, 2**27)),
    "backwards": ((2, 4, -(2**27) - 64), (1, -(2**27))),
}


@linux
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FAR)
def test_far_strides(name, level):
    of_x, of_y = FAR[name]
    n = 2 if of_x[0] else 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 3, 37)).astype(np.float16)
    y = rng.integers(0, 3, (n, 37), np.uint8)
    expected = dice_core.loss_and_grad(x, y, backend="reference")
    far_x, far_y = spread(x, of_x if n > 1 else (2, *of_x[1:])), spread(y, of_y)
    value, grad = dice_core.loss_and_grad(far_x, far_y, out=far_x, backend=level)
    assert_close(value, expected[0], rtol=2e-6)
    assert_close(grad, expected[1].astype(np.float64), rtol=2.0**-10, atol=1e-7)


# ---- sizes ---------------------------------------------------------------------------------------


def needs(gib):
    """Skips where less memory is available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if found < gib * GIB:
        pytest.skip(f"needs {gib} GiB of memory, and {found / GIB:.1f} GiB are available")


@linux
@pytest.mark.large
def test_more_than_2_31_logits_in_place():
    """A block of random logits, repeated: its sums are known, and its gradient repeats as well."""
    needs(7)
    block, repeats, rest = 2**20, 2**10 + 1, 7
    rng = np.random.default_rng(0)
    part = rng.standard_normal((2, block), np.float32).astype(np.float16)
    labels = rng.choice(np.array([0, 1, 255], np.uint8), block)
    x = np.empty((1, 2, repeats * block + rest), np.float16)
    y = np.empty((1, x.shape[2]), np.uint8)
    assert x.size > 2**31
    assert x.strides[1] > 2**31
    for start in range(0, x.shape[2], block):
        here = x[0, :, start : start + block]
        here[...] = part[:, : here.shape[1]]
        y[0, start : start + block] = labels[: here.shape[1]]

    options = {"ignore_label": 255, "backend": "reference"}
    term = Dice(smooth=1) + CrossEntropy()
    once, end = (
        dice_core.statistics(part[None, :, :n], labels[None, :n], gamma=0, **options)
        for n in (block, rest)
    )
    expected = repeats * once.array + end.array
    total = dice_core.statistics(x, y, gamma=0, ignore_label=255)
    assert (total.target_sum == expected[2]).all()
    assert_close(total.array, expected, rtol=1e-6)

    total.array[...] = expected
    scale = 2.0**30  # keeps the gradient within the range of float16
    slope = dice_core.gradient(
        part[None], labels[None], total, term, grad_loss=scale, backend="reference"
    )
    value, grad = dice_core.loss_and_grad(x, y, term, ignore_label=255, grad_loss=scale, out=x)
    assert grad is x
    assert_close(value, term(total), rtol=1e-6)
    assert_close(x[..., :block], slope.astype(np.float64), rtol=2.0**-10, atol=1e-6)
    bits = x.view(np.uint16)[0]
    first = bits[:, :block].copy()
    for start in range(0, x.shape[2], block):
        here = bits[:, start : start + block]
        assert (here == first[:, : here.shape[1]]).all(), start


@linux
@pytest.mark.large
def test_more_than_2_31_voxels():
    """All logits are one number in memory, the labels pages of zeros, and the sums exact."""
    needs(4)
    voxels = 2**31 + 9
    x = np.broadcast_to(np.zeros(1, np.float16), (1, 2, voxels))
    y = np.zeros((1, voxels), np.uint8)
    y[0, -1] = 1
    sums = dice_core.statistics(x, y)
    assert sums.target_sum.tolist() == [[voxels - 1, 1]]
    assert sums.intersection.tolist() == [[(voxels - 1) / 2, 0.5]]
    assert sums.pred_sum.tolist() == [[voxels / 2, voxels / 2]]
