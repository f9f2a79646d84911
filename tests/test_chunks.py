"""Chunks, the work items of threads, share nothing: neither voxels nor partial sums."""

import numpy as np
import pytest
from compare import assert_bitwise_equal, kernel_rows

import dice_core

CHANNELS = 3
CHUNK = -(-(65536 // CHANNELS) // 256) * 256  # voxels; `describe` in _cpu.pyx
VOXELS = 4 * CHUNK + 77

backend = pytest.mark.parametrize("backend", [row.name for row in kernel_rows()])
threads = pytest.mark.parametrize("threads", [1, 2, 5])


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, CHANNELS, VOXELS))
    return x, rng.integers(0, CHANNELS, (2, VOXELS), np.uint8)


@backend
@threads
def test_each_partial_sum_has_one_chunk(volume, backend, threads):
    """The sums are those of the chunks, one call for each, added in order: if a partial sum were
    that of two chunks, or of none, float64 addition would round differently.
    """
    x, y = volume
    total = np.zeros((3, 2, CHANNELS))
    for first in range(0, VOXELS, CHUNK):
        part = slice(first, first + CHUNK)
        total += dice_core.statistics(x[..., part], y[..., part], backend=backend).array
    sums = dice_core.statistics(x, y, backend=backend, num_threads=threads).array
    assert_bitwise_equal(sums, total)


@backend
@threads
def test_each_voxel_has_one_chunk(volume, backend, threads):
    """Over the logits, a chunk that reads a voxel after another chunk wrote it would see a gradient
    in place of logits. Every voxel is written, and nothing between the rows of a crop.
    """
    x, y = volume
    options = {"backend": backend, "num_threads": threads}
    room = np.full((2, CHANNELS, VOXELS + 9), np.nan)
    _, grad = dice_core.loss_and_grad(x, y, **options, out=room[..., 5:-4])
    assert not np.isnan(grad).any()
    assert np.isnan(room[..., :5]).all()
    assert np.isnan(room[..., -4:]).all()
    over = x.copy()
    dice_core.loss_and_grad(over, y, **options, out=over)
    assert_bitwise_equal(over, np.ascontiguousarray(grad))


@backend
def test_more_threads_than_shares(backend):
    """The parallel loop divides its chunks, here one for each sample, into at most 64 shares."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((70, 2, 128, 128), np.float32), np.zeros((70, 128, 128), np.uint8)
    one = dice_core.loss_and_grad(x, y, backend=backend, num_threads=1)
    many = dice_core.loss_and_grad(x, y, backend=backend, num_threads=70)
    assert_bitwise_equal(many[1], one[1])
    assert many[0] == one[0]
