"""The accuracy of gradients: near-perfect predictions, and classes that are absent."""

import functools
import math

import numpy as np
import precision
import pytest
import torch
from compare import assert_bitwise_equal, assert_close, kernel_rows
from precision import LOSSES, exact, example, one_hot, relative_error

import dice_core
import dice_core.torch
from dice_core import buffers, calls, losses, spec

BACKENDS = [row.name for row in kernel_rows()]

truth = functools.cache(
    lambda name, gap, activation, p: exact(LOSSES[name], *example(gap, 3), p, activation)
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["labels", "one-hot", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("gap", [-20, -8, 0, 5, 10, 20, 80])
def test_the_error_is_at_most_twice_that_of_the_naive_code(gap, p, name, kind, backend):
    loss, activation = LOSSES[name], "sigmoid" if kind == "sigmoid" else "softmax"
    expected = truth(name, gap, activation, p)
    for dtype, largest in (("float32", 1e-4), ("float64", 1e-7)):
        x, y = example(gap, 3)
        x, eps = x.astype(dtype), np.finfo(dtype).eps
        naive = precision.by_naive_code(loss, x, y, p, activation)
        ours = precision.by_dice_core(loss, x, y, p, activation, kind != "labels", backend)
        if gap < 0:  # relative to the largest, as differences of likely classes nearly cancel
            error, largest = np.abs(ours - expected).max(), np.abs(expected).max()
            assert error <= 2 * np.abs(naive - expected).max() + 64 * eps * largest
            continue
        error = relative_error(ours, expected)
        assert error <= 2 * relative_error(naive, expected) + 8 * eps
        assert error <= largest  # whatever that of the naive code; e^20 eps is 1e-7 in float64


def absent_class(dtype, below, onehot):
    """Logits of three classes of which the last is far below the others and occurs nowhere."""
    x, y = example(1, 3, absent=True, dtype=dtype)
    x[:, 2] = -below
    return x, one_hot(x, y) if onehot else y


TERMS = {
    "Dice": losses.Dice,
    "Jaccard": losses.Jaccard,
    "Tversky + CE": lambda **options: losses.Tversky(**options) + losses.CrossEntropy(),
    "Dice + BCE": lambda **options: losses.Dice(**options) + losses.BinaryCrossEntropy(),
    "LogDice": losses.LogDice,
}
CALLS = [
    *((term, "softmax", onehot) for term in TERMS for onehot in (False, True)),
    ("Dice", "sigmoid", True),
    ("LogDice", "sigmoid", True),
]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("name", "activation", "onehot"), CALLS)
@pytest.mark.parametrize(
    ("dtype", "p", "below"),
    [("float32", 2, 48), ("float32", 3, 32), ("float64", 2, 360), ("float64", 2, 365)],
)
def test_a_class_neither_present_nor_predicted_has_no_gradient(
    name, activation, onehot, dtype, p, below, backend
):
    """Its sum of s^p may be so small that 2 over it is infinite."""
    term = TERMS[name]
    x, y = absent_class(dtype, below, onehot)
    options = {"activation": activation, "backend": backend}
    value, grad = dice_core.loss_and_grad(x, y, term(p=p), **options)
    _, expected = dice_core.loss_and_grad(x, y, term(p=p, ignore_channel=2), **options)
    assert math.isfinite(value)
    tiny = float(np.finfo(dtype).tiny)
    assert_close(grad, expected, rtol=8 * np.finfo(dtype).eps, atol=tiny, what="gradient")
    if backend == "reference":
        return
    tensor = torch.from_numpy(x).requires_grad_()
    found = dice_core.torch.loss(tensor, torch.from_numpy(y), term(p=p), **options)
    found.backward()
    assert_bitwise_equal(tensor.grad, grad)
    tensor.grad = None  # and by torch's derivative of the term
    sums = dice_core.torch.statistics(
        tensor, torch.from_numpy(y), activation=activation, backend=backend, **dict(term(p=p).needs)
    )
    term(p=p)(sums).backward()
    assert_close(tensor.grad, expected, rtol=8 * np.finfo(dtype).eps, atol=tiny, what="by torch")


def test_the_same_in_a_volume():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 64, 64, 64)).astype(np.float32)
    x[:, 2] = -48
    y = np.stack([x[:, 0] > 0, x[:, 0] <= 0, np.zeros_like(x[:, 0], bool)], 1)
    value, grad = dice_core.loss_and_grad(x, y, losses.Dice(p=2))
    _, expected = dice_core.loss_and_grad(x, y, losses.Dice(p=2, ignore_channel=2))
    assert math.isfinite(value)
    assert_close(grad, expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("smooth", [1e-11, 1e-5, 1.0])
@pytest.mark.parametrize(
    ("term", "score"),
    [
        (losses.Dice, lambda p, smooth: (smooth / (p + smooth), -smooth / (p + smooth) ** 2)),
        (losses.Jaccard, lambda p, smooth: (smooth / (p + smooth), -smooth / (p + smooth) ** 2)),
        (
            losses.Tversky,
            lambda p, smooth: (smooth / (p / 2 + smooth), -smooth / 2 / (p / 2 + smooth) ** 2),
        ),
    ],
)
def test_the_derivative_of_an_absent_class_has_all_digits(term, score, smooth):
    """It is that of the score, which is small, not of 1 minus it."""
    x = np.zeros((1, 2, 40))
    y = np.zeros((1, 40), np.int64)
    _, slope = score(20.0, smooth)
    sums = dice_core.statistics(x, y)
    _, derivative = term(smooth=smooth).with_derivative(sums)
    assert_close(derivative[1, 0, 1], -slope / 2, rtol=1e-14, what="NumPy")
    tensor = torch.tensor(sums.array, requires_grad=True)
    term(smooth=smooth)(dice_core.Statistics(tensor, sums.spec, sums.dtype)).backward()
    assert_close(tensor.grad[1, 0, 1], -slope / 2, rtol=1e-14, what="torch")
    for backend in BACKENDS:
        grad = dice_core.loss_and_grad(x, y, term(smooth=smooth), backend=backend)[1]
        of_own, of_rest = derivative[0, 0, 0] + derivative[1, 0, 0], derivative[1, 0, 1]
        assert_close(grad[0, 1], np.full(40, (of_rest - of_own) / 4), rtol=1e-14, what=backend)
        only = term(smooth=smooth, ignore_channel=0)
        grad = dice_core.loss_and_grad(x, y, only, backend=backend)[1]
        assert_close(grad[0, 1], np.full(40, -slope / 8), rtol=1e-14, what=backend)


def test_the_derivative_of_a_nearly_perfect_tversky_score_has_all_digits():
    """Its denominator is nearly I if alpha and beta are small."""
    sums = np.array([3.0, 4.0, 5.0]).reshape(3, 1, 1)
    term = losses.Tversky(alpha=1e-9, beta=0)
    spec = term.spec("softmax", -1)
    _, derivative = term.with_derivative(dice_core.Statistics(sums, spec, "float64"))
    den = 3 + 1e-9
    assert_close(derivative[0, 0, 0], -1e-9 * 4 / den**2, rtol=1e-14)
    assert_close(derivative[1, 0, 0], 3e-9 / den**2, rtol=1e-14)


def test_the_logarithm_of_a_tiny_score_has_all_digits():
    sums = np.zeros((3, 1, 1))
    sums[1] = 20
    spec = losses.LogDice().spec("softmax", -1)
    term = losses.LogDice(smooth=1e-11, eps=1e-30)
    value, derivative = term.with_derivative(dice_core.Statistics(sums, spec, "float64"))
    assert_close(value, math.log1p(20 / 1e-11), rtol=1e-14)
    assert_close(derivative[1, 0, 0], 1 / 20, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("p", [3, 17, 33])
def test_large_powers_of_any_probability(p, activation, backend):
    """Between 1/2 and 1, s^(p-1) goes from nearly nothing to 1: no form of a + b s^(p-1) may lose
    the digits of either end.
    """
    s = np.linspace(0.02, 0.98, 193)
    z = np.log(s / (1 - s))
    x = np.stack({"softmax": [z, 0 * z], "sigmoid": [z, -z], "none": [s, 1 - s]}[activation])
    x, y = x[None].astype("float32"), np.zeros((1, 193), "uint8")
    if activation != "softmax":
        y = np.stack([y + 1, y], 1).astype("float32")
    request = spec.for_shapes(x.shape, y.shape, spec.checked(activation=activation, p=p))
    cotangent = np.zeros(request.sums_shape(x.shape))
    cotangent[0], cotangent[1] = -0.05, -0.5  # of I, of P
    grads = []
    for name, logits in ((backend, x), ("reference", x.astype("float64"))):
        grad = np.empty_like(logits)
        call = calls.call(logits, y, request, name)
        call.gradient(cotangent, None, buffers.of(grad, "grad"))
        grads.append(grad[0, 0].astype("float64"))
    size = 0.05 + 0.5 * p * s ** (p - 1)  # of what is added up
    if activation == "softmax":
        size = size + 0.5 * p * (1 - s) ** (p - 1)
    if activation != "none":
        size = size * s * (1 - s)
    error = np.abs(grads[0] - grads[1])
    np.testing.assert_array_less(error, (8 + 2 * p) * 2.0**-24 * size)
