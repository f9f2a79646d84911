"""A simulated GPU for tests: device memory is host memory, kernels run as Python functions.

Each thread is a greenlet, which yields to the scheduler at a barrier. Every access is asserted to
be aligned and within one live allocation, and all threads of a block to reach the same barrier.
Threads and blocks run in random order, so that results that depend on it fail a comparison.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import greenlet
import numpy as np
import pytest
from emulated import memory
from emulated.arrays import dtype_of

from dice_core import _gpu, backends
from dice_core.gpu import driver, kernels
from dice_core.gpu import plan as plans
from dice_core.gpu.plan import Plan

Array = np.ndarray[Any, Any]

WORD = 16  # bytes of the widest load or store


class Kernel:
    """Replaces `driver.Kernel`; its launches run in the simulator, before they return."""

    launched: ClassVar[tuple[str, ...]] = ()  # the kinds of the launches since `install`
    # Called by `driver.synchronize`; a test may replace it.
    synchronized: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, kind: str, plan: Plan, capability: tuple[int, int]) -> None:
        self.kind, self.plan = kind, plan

    def load_on(self, device: int) -> None:
        assert device == 0

    def launch(
        self, device: int, stream: int, blocks: int, threads: int, parameters: bytes
    ) -> None:
        Kernel.launched += (self.kind,)
        simulator = Simulator(seed=len(Kernel.launched))
        kernel = kernels.kernel(self.kind, self.plan, operations(self.plan, simulator))
        arguments = struct.unpack(kernels.ARGUMENTS[self.kind].format, parameters)
        numbers: list[Any] = [np.float64(a) if type(a) is float else np.int64(a) for a in arguments]
        simulator.launch(kernel, blocks, threads, *numbers)


def install(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any] = Kernel, warps: int = 2
) -> None:
    """Replaces the driver by the simulator. Blocks are of few warps, which is faster."""
    monkeypatch.setattr(plans, "WARPS", warps)
    monkeypatch.setattr(plans, "THREADS", warps * plans.WARP)
    monkeypatch.setattr(_gpu, "_job", functools.lru_cache(_gpu._Job))  # depends on THREADS
    Kernel.launched = ()
    monkeypatch.setattr(_gpu, "_kernel", kernel)
    monkeypatch.setattr(_gpu, "unavailable", list)
    for name in ("_unavailable", "_named", "_first"):  # caches, which remember that there is no GPU
        monkeypatch.setattr(backends, name, functools.cache(getattr(backends, name).__wrapped__))
    monkeypatch.setattr(driver, "capability", lambda device: (9, 0))
    monkeypatch.setattr(driver, "wait", lambda device, stream, other: None)
    monkeypatch.setattr(driver, "synchronize", lambda device, stream: Kernel.synchronized())


def run(kernel: Callable[..., None], *args: Any) -> None:
    with np.errstate(all="ignore"):  # each greenlet has an error state of its own
        kernel(*args)


class Simulator:
    """The part of `numba.cuda` that kernels use: indices, arrays, barriers, shuffles."""

    def __init__(self, seed: int = 0) -> None:
        self.local = SimpleNamespace(array=uninitialized)
        self.shared = SimpleNamespace(array=self._shared_array)
        self.order = np.random.default_rng(seed)
        self.scheduler: Any = None  # the greenlet that switches to the threads
        self.thread: Any = None  # the greenlet that runs
        self.shared_arrays: dict[int, Array] = {}  # of the block, in the order of their allocation
        self.exchange: list[Any] = []  # what each thread passes to a shuffle

    @property
    def threadIdx(self) -> Any:
        return SimpleNamespace(x=self.thread.index)

    def syncthreads(self) -> None:
        self.scheduler.switch("syncthreads")

    def shuffle(self, mask: int, value: Any, distance: int) -> Any:
        """The `value` of the lane whose index is this one's XOR `distance`."""
        index = self.thread.index
        self.exchange[index] = value
        self.scheduler.switch("shuffle")
        other = self.exchange[index ^ distance]
        self.scheduler.switch("shuffle")
        return other

    def any_sync(self, mask: int, value: Any) -> bool:
        """Whether the `value` of any lane of the warp is true."""
        self.exchange[self.thread.index] = value
        self.scheduler.switch("any_sync")
        first = self.thread.index // plans.WARP * plans.WARP
        found = any(self.exchange[first : first + plans.WARP])
        self.scheduler.switch("any_sync")
        return found

    def threadfence(self) -> None:
        """No operation: all threads see every write at once."""

    def launch(self, kernel: Callable[..., None], blocks: int, threads: int, *args: Any) -> None:
        """One block after another, in random order."""
        self.scheduler = greenlet.getcurrent()
        self.gridDim = SimpleNamespace(x=blocks)
        for block in self.order.permutation(blocks):
            self.blockIdx = SimpleNamespace(x=int(block))
            self._block(partial(run, kernel, *args), threads)

    def _block(self, body: Callable[[], None], threads: int) -> None:
        self.shared_arrays, self.exchange = {}, [None] * threads
        running: list[Any] = [greenlet.greenlet(body) for _ in range(threads)]
        for index, thread in enumerate(running):
            thread.index, thread.arrays = index, 0
        while running:
            barriers = set()  # None: the end of the kernel
            for i in self.order.permutation(len(running)):
                self.thread = running[i]
                barriers.add(running[i].switch())
            alive = [thread for thread in running if not thread.dead]
            assert len(barriers) == 1, f"threads wait at different barriers: {barriers}"
            assert len(alive) in (0, len(running)), "some threads ended before a barrier"
            running = alive

    def _shared_array(self, shape: Any, dtype: Any) -> Array:
        number = self.thread.arrays
        self.thread.arrays += 1
        if number not in self.shared_arrays:
            self.shared_arrays[number] = uninitialized(shape, dtype)
            assert sum(a.nbytes for a in self.shared_arrays.values()) <= plans.SHARED_BYTES
        return self.shared_arrays[number]


def uninitialized(shape: Any, dtype: Any) -> Array:
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype)


def operations(plan: Plan, cuda: Simulator) -> Any:
    """`gpu.compile.operations` in NumPy."""
    real: Any = np.float64 if plan.logits == "float64" else np.float32
    gamma, binary_gamma = (
        min(number or 0.0, float(np.finfo(real).max))
        for number in (plan.spec.gamma, plan.spec.binary_gamma)
    )
    p = plan.spec.p
    label: Any
    if plan.labels in plans.ITEMSIZE:
        label = np.float64 if plan.labels == "float64" else np.float32
    else:
        label = np.int64 if plan.labels.endswith("64") else np.int32

    def load(dtype: str, count: int, to: Any, absent: float = 0) -> Callable[..., tuple[Any, ...]]:
        def load_if(address: Any, at: Any, condition: Any) -> tuple[Any, ...]:
            if not condition:
                return (to(absent),) * count
            return tuple(elements(address, at, dtype, count).astype(to))

        return load_if

    def load_one(dtype: str, to: Any) -> Callable[..., Any]:
        return lambda address, at: to(elements(address, at, dtype, 1)[0])

    def store(dtype: str) -> Callable[..., None]:
        def store_one(address: Any, at: Any, value: Any) -> None:
            elements(address, at, dtype, 1)[:] = value

        return store_one

    def store_grad(address: Any, at: Any, numbers: Array, first: int, condition: Any) -> None:
        if not condition:
            return
        step = plan.word_step
        grad = elements(address, at, plan.logits, plan.word)
        grad[:] = numbers[first : first + plan.word * step : step].astype(grad.dtype)

    def atomic_increment(address: Any) -> Any:
        counter = elements(address, 0, "int32", 1)
        counter[0] += 1
        return counter[0] - np.int32(1)

    def sigmoids(x: Any) -> tuple[Any, ...]:
        nll, other_nll = np.logaddexp(0, -np.float64(x)), np.logaddexp(0, np.float64(x))
        return real(np.exp(-nll)), real(np.exp(-other_nll)), real(nll), real(other_nll)

    return SimpleNamespace(
        cuda=cuda,
        inlined=lambda function: function,
        real=real,
        int32=np.int32,
        int64=np.int64,
        float64=np.float64,
        load_logits=load(plan.logits, plan.word, real, -np.inf),
        load_targets=load(plan.labels, plan.word_targets, label),
        load_real=load_one(real.__name__, real),
        load_double=load_one("float64", np.float64),
        load_relaxed=lambda address, at: elements(address, at, "float64", 1)[0],
        store_grad=store_grad,
        store_real=store(real.__name__),
        store_double=store("float64"),
        store_int=store("int32"),
        atomic_increment=atomic_increment,
        exp=lambda x: real(np.exp(x)),
        log=lambda x: real(np.log(x)),
        sigmoids=sigmoids,
        power=lambda x: real(x**p),
        lower_power=lambda x: real(x ** (p - 1)),
        power_complement=lambda x: real(x * sum((1 - np.float64(x)) ** k for k in range(p - 1))),
        modulation=lambda x: real(x**gamma),
        modulation_slope=lambda x: real(gamma * x ** (gamma - 1)),
        binary_modulation=lambda x, nll: real(x**binary_gamma),
        floor_divide=lambda a, b: a // b,
        divide=lambda a, b: a / b,
        reciprocal=lambda x: real(1) / x,
        label=label,
        fma=lambda a, b, c: real(np.float64(a) * b + c),
        fmax=lambda a, b: b if np.isnan(a) or b > a else a,
        shuffle=cuda.shuffle,
        largest=float(np.finfo(real).max),
        smallest=float(np.finfo(real).smallest_normal),
        size=np.dtype(real).itemsize,
    )


def elements(address: Any, offset: Any, name: str, count: int) -> Array:
    """A view of adjacent elements of this dtype, which a single instruction loads or stores."""
    dtype = dtype_of(name)
    first = int(address) + int(offset)
    size = count * dtype.itemsize
    assert any(
        start <= first and first + size <= start + length for start, length in memory.LIVE.items()
    ), f"out of bounds: {size} bytes at {address} + {offset} are not within one allocation"
    assert first % min(size, WORD) == 0, f"misaligned: {size} bytes at {address} + {offset}"
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(first)), dtype)
