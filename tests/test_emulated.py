"""The emulated GPU: what a real one, its driver or torch would refuse is refused."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
from emulated import device, memory
from emulated.tensors import DeviceTensor

from dice_core import allocators, buffers
from dice_core.gpu import cache, driver, kernels
from dice_core.gpu import compile as compiler
from dice_core.gpu.plan import Plan

PLAN = Plan("float32", "uint8", 1)
RUNS, CLASSES = 5, 3
COLUMNS = 3 * CLASSES


@pytest.fixture
def gpu(tmp_path_factory):
    with device.installed(tmp_path_factory.getbasetemp() / "kernels") as library:
        yield library


@pytest.fixture
def kernel(gpu):
    return driver.load(cache.cubin("total", PLAN, (9, 0)), kernels.ENTRY)


def arguments(**changed):
    """Of a launch that adds the partials, all 1, of one sample."""
    partials = memory.allocate(16 + 4 * RUNS * COLUMNS)
    partials[16:].view(np.float32)[:] = 1
    sums = memory.allocate(8 * 3 * CLASSES)
    values = dict.fromkeys(kernels.ARGUMENTS["total"].kinds, 0)
    values |= {"samples": 1, "runs": RUNS, "fields": 3, "classes": CLASSES, "groups": 1}
    values |= {"partials": partials.ctypes.data, "sums": sums.ctypes.data} | changed
    return kernels.ARGUMENTS["total"].pack(values), partials, sums


def test_a_launch_runs_the_kernel(gpu, kernel):
    packed, _, sums = arguments()
    before = gpu.executed["bar.sync"]
    kernel.launch(0, 0, 1, 256, packed)
    assert sums.view(np.float64).tolist() == [RUNS] * 3 * CLASSES
    assert gpu.executed["bar.sync"] == before + 256


def test_a_fault_of_the_kernel_is_an_error_of_the_launch(kernel):
    packed, *_ = arguments(runs=RUNS + 1)
    with pytest.raises(driver.DriverError, match=r"LAUNCH_FAILED: .*thread \d+.*out of bounds"):
        kernel.launch(0, 0, 1, 256, packed)


def test_freed_memory_is_out_of_bounds(kernel):
    packed, partials, sums = arguments()
    del sums
    with pytest.raises(driver.DriverError, match="out of bounds"):
        kernel.launch(0, 0, 1, 256, packed)
    assert memory.is_live(partials.ctypes.data)


@pytest.mark.parametrize(
    ("blocks", "threads", "cut"), [(0, 256, 0), (1, 257, 0), (1, 0, 0), (1, 256, 8)]
)
def test_a_launch_that_the_driver_refuses(kernel, blocks, threads, cut):
    packed, *_ = arguments()
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel.launch(0, 0, blocks, threads, packed[: len(packed) - cut])


def test_a_kernel_that_is_not_there(kernel):
    code = cache.cubin("total", PLAN, (9, 0))
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_NOT_FOUND"):
        driver.load(code, "other")
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_HANDLE"):
        driver.Kernel(10**6).launch(0, 0, 1, 256, b"")


def test_a_launch_needs_a_context(kernel, monkeypatch):
    packed, *_ = arguments()
    monkeypatch.setattr(driver._Current, "__enter__", lambda self: None)
    monkeypatch.setattr(driver._Current, "__exit__", lambda self, *error: None)
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        kernel.launch(0, 0, 1, 256, packed)


def test_code_for_another_architecture_is_refused(kernel):
    code, _ = compiler.link(compiler.ptx("total", PLAN, (9, 0)), (9, 0))
    at = struct.calcsize("<16sHHIQQQ")  # the flags of the ELF header
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
        driver.load(code[:at] + bytes(4) + code[at + 4 :], kernels.ENTRY)
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_IMAGE"):
        driver.load(bytes(64) + code, kernels.ENTRY)


def test_only_device_0_is_there(gpu):
    with pytest.raises(driver.DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        driver.name(1)


# ---- tensors -------------------------------------------------------------------------------------


def test_tensors_are_on_the_device(gpu):
    x = torch.arange(6.0, device="cuda").reshape(2, 3)
    assert (x.device, x.is_cuda, x.is_cpu) == (torch.device("cuda:0"), True, False)
    assert memory.is_live(x.data_ptr())
    assert type(x.cpu()) is torch.Tensor
    assert x.cpu().data_ptr() != x.data_ptr()
    assert x.to("cuda") is x
    x[1, :2] = 7
    assert x.tolist() == [[0, 1, 2], [7, 7, 5]]
    assert x.T.data_ptr() == x.data_ptr()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


def test_tensors_of_two_devices_are_not_mixed(gpu):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        x.to("cuda") + x


def test_new_memory_is_poisoned_and_returned(gpu):
    before = len(memory.LIVE)
    x = torch.empty(5, device="cuda")
    assert x.isnan().all()
    assert len(memory.LIVE) == before + 1
    del x
    assert len(memory.LIVE) == before


def test_gradients_pass_between_devices(gpu):
    leaf = torch.ones(3, requires_grad=True)
    on_device = leaf.to("cuda")
    (3 * on_device).cpu().sum().backward()
    assert type(on_device) is DeviceTensor
    assert type(leaf.grad) is torch.Tensor
    assert leaf.grad.tolist() == [3, 3, 3]


def test_a_read_only_array_is_copied_to_the_device_without_a_warning(gpu):
    numbers = np.broadcast_to(np.float32(3), 4)
    near = buffers.of(torch.zeros(1, device="cuda"), "x")
    copy = allocators.from_host(numbers, near)
    assert (copy.device, copy.dtype, copy.tolist()) == (near.owner.device, torch.float32, [3] * 4)
