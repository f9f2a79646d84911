"""Peak memory: the gradient, and nothing else of the size of the logits."""

import mmap
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import kernel_rows

import dice_core
from dice_core import allocators

SHAPE = (2, 5, 64, 64, 64)
SMALL = 1 << 18  # bytes: sums, cotangents, Python's own


@pytest.fixture
def volume():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE, np.float32)
    return x, rng.integers(0, 5, (SHAPE[0], *SHAPE[2:]), np.uint8)


def peak_of(function):
    function()  # imports and caches
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("backend", [row.name for row in kernel_rows()])
def test_arrays_allocate_one_gradient(volume, backend):
    x, y = volume
    assert peak_of(lambda: dice_core.loss(x, y, backend=backend)) < SMALL
    assert peak_of(lambda: dice_core.loss_and_grad(x, y, backend=backend)) < x.nbytes + SMALL
    assert peak_of(lambda: dice_core.loss_and_grad(x, y, backend=backend, out=x)) < SMALL


def test_the_naive_code_exceeds_the_limit(volume):
    x, y = volume
    assert peak_of(lambda: dice_core.loss(x, y, backend="reference")) > x.nbytes


RESIDENT = """
import torch
import dice_core.torch

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

def step(x, y):
    dice_core.torch.loss(x, y).backward()

step(torch.randn(1, {c}, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, dtype=torch.uint8))
x = torch.randn({shape}).requires_grad_()
y = torch.zeros({labels}, dtype=torch.uint8)
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # the peak starts again from the present
before = status("VmRSS")
step(x, y)
print((status("VmHWM") - before) / (x.numel() * x.element_size()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc/self")
@pytest.mark.parametrize("shape", [(1, 4, 160, 160, 160), (1, 40, 80, 80, 80)], ids=str)
def test_torch_step_grows_by_one_gradient(shape):
    program = RESIDENT.format(c=shape[1], shape=shape, labels=(shape[0], *shape[2:]))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    growth = float(done.stdout)
    assert 0.9 < growth < 1.05, f"the step grew by {growth:.2f} times the logits"


def test_large_fresh_gradients_are_advised_huge_pages(monkeypatch):
    """The whole 2 MiB pages inside a fresh torch gradient, and nothing of small ones."""
    advised = []
    libc = SimpleNamespace(madvise=lambda address, size, advice: advised.append((address, size)))
    monkeypatch.setattr(allocators, "_libc", lambda: libc)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    small = allocators.empty_like(torch.empty(1000), "x")
    assert small.shape == (1000,)
    assert not advised
    large = allocators.empty_like(torch.empty(3 << 20), "x")  # 12 MiB
    ((address, size),) = advised
    first, stop = address.value, address.value + size.value
    assert first % (2 << 20) == stop % (2 << 20) == 0
    assert large.data_ptr() <= first < stop <= large.data_ptr() + large.nbytes
    assert size.value >= 8 << 20
