"""Device arrays of libraries other than torch, as arguments and results."""

import operator

import emulated
import numpy as np
import pytest
import torch
from emulated.arrays import DeviceArray
from gpu.volumes import Volume, assert_gradient, assert_sums, true_loss, true_sums

import dice_core

pytestmark = pytest.mark.gpu


class CuPy:
    """CuPy's arrays."""

    def __init__(self):
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        self.kind, self.to_device, self.to_host = cupy.ndarray, cupy.asarray, cupy.asnumpy


class Numba:
    """numba's device arrays."""

    def __init__(self):
        cuda = pytest.importorskip("numba.cuda", reason="numba is not installed")
        self.kind, self.to_device = cuda.cudadrv.devicearray.DeviceNDArray, cuda.to_device
        self.to_host = self.kind.copy_to_host


class Emulated:
    """Arrays on the emulated device."""

    def __init__(self):
        self.kind, self.to_device = DeviceArray, DeviceArray.holding
        self.to_host = operator.attrgetter("host")


@pytest.fixture(params=[CuPy, Numba, Emulated])
def library(gpu, request):
    if (request.param is Emulated) != emulated.active:
        where = "on a real device" if emulated.active else "on the emulated device"
        pytest.skip(f"{request.param.__name__}'s arrays are {where}")
    return request.param()


@pytest.fixture(params=["float16", "float32", "float64"])
def arrays(request):
    """x and y as NumPy arrays."""
    return tuple(t.cpu().numpy() for t in Volume(4, (32, 33), request.param).tensors())


def back(library, *arrays):
    """The library's arrays as torch tensors on the host."""
    assert all(isinstance(array, library.kind) for array in arrays)
    return [torch.from_numpy(np.array(library.to_host(array))) for array in arrays]


def test_loss_and_gradient(library, arrays):
    x, y = map(library.to_device, arrays)
    loss, grad = back(library, *dice_core.loss_and_grad(x, y, grad_loss=1000.0))
    (alone,) = back(library, dice_core.loss(x, y))
    expected, expected_grad = true_loss(*map(torch.from_numpy, arrays))
    assert_sums(loss, expected, grad.dtype, "loss")
    assert_gradient(grad, 1000 * expected_grad)
    assert alone == loss


def test_gradient_in_place(library, arrays):
    x, y = map(library.to_device, arrays)
    loss, out = dice_core.loss_and_grad(x, y, grad_loss=1000.0, out=x)
    assert out is x
    _, grad = back(library, loss, out)
    assert_gradient(grad, 1000 * true_loss(*map(torch.from_numpy, arrays))[1])


def test_statistics(library, arrays):
    x, y = map(library.to_device, arrays)
    (sums,) = back(library, dice_core.statistics(x, y).array)
    x, y = map(torch.from_numpy, arrays)
    assert_sums(sums, true_sums(x, y, torch.ones_like(sums))[0], x.dtype)
