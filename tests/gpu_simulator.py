"""A GPU for tests: its memory lies in the host's, its kernels run as Python, thread by thread.

A thread is a greenlet, in which a barrier is a switch. Finds reads and writes out of bounds, after
release or off their words, barriers that threads do not all reach, and, since threads and blocks
run in random order, results that depend on it. Uninitialised memory is NaN.
"""

import ctypes
import functools
import weakref
from functools import partial
from types import SimpleNamespace

import greenlet
import ml_dtypes
import numpy as np

from dice_core import _gpu, _gpu_driver, _gpu_kernels, _gpu_plan

WORD = 16  # bytes of the widest access
ALLOCATED = {}  # address -> bytes


def dtype_of(name):
    special = {"bfloat16": ml_dtypes.bfloat16, "bool": np.uint8}
    return np.dtype(special.get(name, name))


class DeviceArray:
    """An array on the GPU as other libraries have them: the CUDA array interface and as much of the
    array API standard as makes new ones.
    """

    stream = None

    def __init__(self, host):
        self.host = host
        self.shape, self.dtype = host.shape, host.dtype
        self.device = SimpleNamespace(id=0)

    @classmethod
    def holding(cls, array):
        """A copy on the GPU, of the same strides and as far behind a whole word."""
        host = allocate(array.shape, array.dtype, array.strides, array.ctypes.data % WORD)
        host[...] = array
        return cls(host)

    @property
    def __cuda_array_interface__(self):
        address = self.host.__array_interface__["data"][0] if self.host.size else 0
        special = "<V2" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str
        return {
            "version": 3,
            "shape": self.shape,
            "strides": self.host.strides,
            "typestr": special,
            "data": (address, False),
            "stream": self.stream,
        }

    def __array_namespace__(self):
        return SimpleNamespace(
            __name__="fake",
            empty=lambda shape, dtype, device: DeviceArray(allocate(shape, dtype)),
            asarray=lambda array, device: DeviceArray.holding(array),
            **{name: dtype_of(name) for name in ("float32", "float64", "uint8")},
        )

    def __dlpack__(self, dl_device, copy):
        assert dl_device == (1, 0)
        assert copy
        return self.host.copy().__dlpack__()

    def __getitem__(self, index):
        return DeviceArray(self.host[index])

    def __add__(self, other):
        return DeviceArray.holding(self.host + other.host)


def allocate(shape, dtype, strides=None, offset=0):
    """Uninitialised memory; each allocation begins so many bytes behind a whole word."""
    dtype = np.dtype(dtype)
    size = max(1, int(np.prod(shape))) * dtype.itemsize
    if strides is not None and 0 not in shape:
        size = sum(s * (n - 1) for s, n in zip(strides, shape, strict=True)) + dtype.itemsize
    whole = np.full(size + 5 * WORD, 255, np.uint8)
    first = -whole.ctypes.data % WORD + 2 * WORD + offset
    address = whole.ctypes.data + first
    ALLOCATED[address] = size
    weakref.finalize(whole, ALLOCATED.pop, address)
    return np.ndarray(shape, dtype, whole[first:], strides=strides)


class Kernel:
    """What `_gpu_driver.Kernel` is, in the simulator."""

    launched = ()  # kinds, since a test emptied it
    waited = staticmethod(lambda: None)  # a test's

    def __init__(self, kind, plan, capability):
        self.kind, self.plan = kind, plan

    def make_ready(self, device):
        assert device == 0

    def launch(self, device, stream, blocks, threads, *arguments):
        Kernel.launched += (self.kind,)
        simulator = Simulator(seed=len(Kernel.launched))
        kernel = _gpu_kernels.kernel(self.kind, self.plan, operations(self.plan, simulator))
        numbers = [np.float64(a) if type(a) is float else np.int64(a) for a in arguments]
        simulator.launch(kernel, blocks, threads, *numbers)


def install(monkeypatch, kernel=Kernel, warps=2):
    """The simulator in the place of NVIDIA's driver, with small blocks, which take less time."""
    monkeypatch.setattr(_gpu_plan, "WARPS", warps)
    monkeypatch.setattr(_gpu_plan, "THREADS", warps * _gpu_plan.WARP)
    monkeypatch.setattr(_gpu, "_job", functools.lru_cache(_gpu._Job))
    Kernel.launched = ()
    monkeypatch.setattr(_gpu, "_kernel", kernel)
    monkeypatch.setattr(_gpu, "unavailable", list)
    monkeypatch.setattr(_gpu_driver, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_gpu_driver, "wait", lambda device, stream, other: None)
    monkeypatch.setattr(_gpu_driver, "synchronize", lambda device, stream: Kernel.waited())


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

    def threadfence(self):
        """Nothing: here every thread sees what another wrote."""

    def launch(self, kernel, blocks, threads, *args):
        """One block after another, in random order."""
        self.scheduler = greenlet.getcurrent()
        self.gridDim = SimpleNamespace(x=blocks)
        for block in self.order.permutation(blocks):
            self.blockIdx = SimpleNamespace(x=int(block))
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
            assert sum(a.nbytes for a in self.shared_arrays.values()) <= _gpu_plan.SHARED_BYTES
        return self.shared_arrays[number]


def uninitialised(shape, dtype):
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 77, dtype)


def operations(plan, cuda):
    """The kernels' operations."""
    real = np.float64 if plan.logits == "float64" else np.float32
    gamma, binary_gamma = (
        min(number or 0.0, float(np.finfo(real).max))
        for number in (plan.spec.gamma, plan.spec.binary_gamma)
    )
    p = plan.spec.power
    if plan.labels in _gpu_plan.ITEMSIZE:
        label = np.float64 if plan.labels == "float64" else np.float32
    else:
        label = np.int64 if plan.labels.endswith("64") else np.int32

    def load(dtype, count, to):
        return lambda address, at: tuple(elements(address, at, dtype, count).astype(to))

    def store(dtype):
        def one(address, at, value):
            elements(address, at, dtype, 1)[:] = value

        return one

    def store_grad(address, at, numbers, first):
        grad = elements(address, at, plan.logits, plan.voxels)
        grad[:] = numbers[first : first + plan.voxels].astype(grad.dtype)

    def count_up(address):
        counter = elements(address, 0, "int32", 1)
        counter[0] += 1
        return counter[0] - np.int32(1)

    return SimpleNamespace(
        cuda=cuda,
        real=real,
        int32=np.int32,
        int64=np.int64,
        float64=np.float64,
        load_logits=load(plan.logits, plan.voxels, real),
        load_targets=load(plan.labels, plan.voxels, label),
        load_real=load(real, 1, real),
        load_double=load("float64", 1, np.float64),
        load_fresh=lambda address, at: elements(address, at, "float64", 1)[0],
        store_grad=store_grad,
        store_real=store(real),
        store_double=store("float64"),
        store_int=store("int32"),
        count_up=count_up,
        exp=lambda x: real(np.exp(x)),
        log=lambda x: real(np.log(x)),
        sigmoid=lambda x: real(1 / (1 + np.exp(-np.float64(x)))),
        softplus=lambda x: real(np.logaddexp(0, np.float64(x))),
        power=lambda x: real(x**p),
        power_slope=lambda x: real(p * x ** (p - 1)),
        focus=lambda x: real(x**gamma),
        focus_slope=lambda x: real(gamma * x ** (gamma - 1)),
        binary_focus=lambda x: real(x**binary_gamma),
        divide=lambda a, b: a / b,
        reciprocal=lambda x: real(1) / x,
        label=label,
        larger=lambda a, b: b if np.isnan(a) or b > a else a,
        shuffle=cuda.shuffle,
        largest=float(np.finfo(real).max),
        smallest=float(np.finfo(real).smallest_normal),
        size=np.dtype(real).itemsize,
    )


def elements(address, at, dtype, count):
    """A view of neighbouring elements, as one access reads or writes them."""
    dtype = dtype_of(dtype)
    first = int(address) + int(at)
    size = count * dtype.itemsize
    assert any(
        start <= first and first + size <= start + there for start, there in ALLOCATED.items()
    ), f"{size} bytes at {first - int(address)} of what lies at {address}"
    assert first % min(size, WORD) == 0, f"{size} bytes at {first}"
    return np.frombuffer((ctypes.c_uint8 * size).from_address(first), dtype)
