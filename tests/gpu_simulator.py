"""Runs a CUDA kernel's Python thread by thread: a greenlet each, in which a barrier is a switch.

Finds reads and writes out of bounds or off their words, barriers that threads do not all reach,
and, since threads run in random order, results that depend on it. Uninitialised memory is NaN.
"""

from functools import partial
from types import SimpleNamespace

import greenlet
import ml_dtypes
import numpy as np

WORD = 16  # bytes of the widest access


def dtype_of(name):
    special = {"bfloat16": ml_dtypes.bfloat16, "bool": np.uint8}
    return np.dtype(special.get(name, name))


def run(kernel, *args):
    with np.errstate(all="ignore"):  # each greenlet has its own
        kernel(*args)


class Simulator:
    """What numba.cuda is to a kernel: indices, arrays, barriers, shuffles."""

    def __init__(self, seed=0):
        self.local = SimpleNamespace(array=uninitialised)
        self.shared = SimpleNamespace(array=self._shared_array)
        self.order = np.random.default_rng(seed)

    @property
    def threadIdx(self):
        return SimpleNamespace(x=self.thread.index)

    def syncthreads(self):
        self.scheduler.switch("syncthreads")

    def shuffle(self, mask, value, distance):
        """Of the lane whose index differs in this bit."""
        index = self.thread.index
        self.exchange[index] = value
        self.scheduler.switch("shuffle")
        other = self.exchange[index ^ distance]
        self.scheduler.switch("shuffle")
        return other

    def launch(self, kernel, grid, threads, *args):
        """Every block of a (x, y) grid, one after another."""
        self.scheduler = greenlet.getcurrent()
        self.gridDim = SimpleNamespace(x=grid[0], y=grid[1])
        for y in range(grid[1]):
            for x in range(grid[0]):
                self.blockIdx = SimpleNamespace(x=x, y=y)
                self._block(partial(run, kernel, *args), threads)

    def _block(self, run, threads):
        self.shared_arrays, self.exchange = {}, [None] * threads
        team = [greenlet.greenlet(run) for _ in range(threads)]
        for index, thread in enumerate(team):
            thread.index, thread.arrays = index, 0
        while team:
            stops = set()
            for i in self.order.permutation(len(team)):
                self.thread = team[i]
                stops.add(team[i].switch())
            alive = [thread for thread in team if not thread.dead]
            assert len(stops) == 1, f"threads stop at different places: {stops}"
            assert len(alive) in (0, len(team)), "some threads ended before a barrier"
            team = alive

    def _shared_array(self, shape, dtype):
        number = self.thread.arrays
        self.thread.arrays += 1
        if number not in self.shared_arrays:
            self.shared_arrays[number] = uninitialised(shape, dtype)
        return self.shared_arrays[number]


def uninitialised(shape, dtype):
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype)


def operations(plan, cuda):
    """The kernels' operations on bytes, (n,) uint8 arrays that stand for addresses."""
    real = np.float64 if plan.logits == "float64" else np.float32

    def load(dtype, count, to):
        return lambda memory, at: tuple(elements(memory, at, dtype, count).astype(to))

    def store(dtype):
        def one(memory, at, value):
            elements(memory, at, dtype, 1)[:] = value

        return one

    def store_grad(memory, at, numbers, first):
        grad = elements(memory, at, plan.logits, plan.voxels)
        grad[:] = numbers[first : first + plan.voxels].astype(grad.dtype)

    return SimpleNamespace(
        cuda=cuda,
        real=real,
        int32=np.int32,
        int64=np.int64,
        float64=np.float64,
        load_logits=load(plan.logits, plan.voxels, real),
        load_labels=load(plan.labels, plan.voxels, np.int64),
        load_cotangent=load("float64", 1, np.float64),
        load_sum=load(real, 1, real),
        store_grad=store_grad,
        store_sum=store(real),
        store_total=store("float64"),
        store_count=store("int64"),
        exp=lambda x: real(np.exp(x)),
        divide=lambda a, b: real(a) / real(b),
        at_most_zero=lambda x: real(0) if x > 0 else x,
        shuffle=cuda.shuffle,
        largest=float(np.finfo(real).max),
        size=np.dtype(real).itemsize,
    )


def elements(memory, at, dtype, count):
    """A view of neighbouring elements, as one access reads or writes them."""
    dtype, at = dtype_of(dtype), int(at)
    stop = at + count * dtype.itemsize
    assert 0 <= at < stop <= memory.size, f"[{at}, {stop}) of {memory.size} bytes"
    assert at % min(stop - at, WORD) == 0, f"{stop - at} bytes at {at}"
    return memory[at:stop].view(dtype)
