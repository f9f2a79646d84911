"""The first test on a new platform: it needs NumPy and pytest alone; torch, where there is one."""

import math
import sys
import threading

import numpy as np
import pytest
from compare import assert_bitwise_equal, assert_close, kernel_rows

import dice_core
from dice_core import losses

ROWS = [row.name for row in kernel_rows()]
generator = np.random.default_rng(0)
X = generator.standard_normal((2, 4, 9, 17, 33))
Y = generator.integers(0, 4, (2, 9, 17, 33))


def test_the_compiled_kernels_are_there():
    assert ROWS


def test_a_loss_computed_by_hand():
    """Two voxels, two classes, probabilities 3/4 and 1/4: the first right, the second wrong."""
    x, y = np.array([[[math.log(3), math.log(3)], [0, 0]]]), np.array([[0, 1]])
    # Dice of class 0: 2 (3/4) / (3/2 + 1), of class 1: 2 (1/4) / (1/2 + 1)
    assert dice_core.loss(x, y, losses.Dice()) == pytest.approx(1 - (3 / 5 + 1 / 3) / 2)


@pytest.mark.parametrize("term", [losses.Dice(), losses.Dice(p=2) + losses.CrossEntropy()], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("backend", ROWS)
def test_value_and_gradient_are_the_reference_s(backend, dtype, term):
    x = X.astype(dtype)
    expected, slope = dice_core.loss_and_grad(x, Y, term, backend="reference")
    value, grad = dice_core.loss_and_grad(x, Y, term, backend=backend)
    assert_close(value, expected, rtol=1e-12 if dtype == "float64" else 2e-6)
    largest = float(np.abs(slope).max())
    bound = {"float16": 2.0**-11, "float32": 2e-6, "float64": 1e-12}[dtype]
    assert_close(grad, slope, rtol=bound, atol=largest * bound, what="gradient")


@pytest.mark.parametrize("backend", ROWS)
def test_the_number_of_threads_changes_no_bit(backend):
    one, four = (dice_core.statistics(X, Y, backend=backend, num_threads=n) for n in (1, 4))
    assert_bitwise_equal(four.array, one.array)


def test_calls_from_several_python_threads():
    """At once where there is no GIL."""
    expected = dice_core.statistics(X, Y).array
    found = []

    def call():
        for _ in range(20):
            found.append(dice_core.statistics(X, Y, num_threads=2).array)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 80
    for array in found:
        assert_bitwise_equal(array, expected)


@pytest.mark.skipif(
    not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled(),
    reason="needs a free-threaded Python that runs without its GIL",
)
def test_the_import_of_the_kernels_leaves_the_gil_off():
    dice_core.statistics(X, Y)
    assert not sys._is_gil_enabled()


def test_torch_s_gradient_is_that_of_the_arrays():
    torch = pytest.importorskip("torch", reason="needs torch")
    x = torch.tensor(X, requires_grad=True)
    value = dice_core.torch.DiceLoss()(x, torch.tensor(Y))
    value.backward()
    expected, grad = dice_core.loss_and_grad(X, Y)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert_close(x.grad.numpy(), grad, rtol=1e-12, what="gradient")
