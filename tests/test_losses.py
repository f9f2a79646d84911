"""The arithmetic on (K, N, C): values by hand, derivatives by two other ways, theory."""

import numpy as np
import pytest
import torch
from compare import assert_close, assert_same_bits

from dice_core import losses
from dice_core.spec import REDUCTIONS

SETTINGS = [
    losses.Dice(weight, ignore_channel, smooth, reduction)
    for weight in (None, (0.2, 1.5, 0.7))
    for ignore_channel in (-1, 1, 3)
    for smooth in (0.0, 1.0)
    for reduction in REDUCTIONS
]


def with_weight(dice, convert):
    """The same setting with its weight as an array of a library."""
    weight = None if dice.weight is None else convert(dice.weight)
    return losses.Dice(weight, dice.ignore_channel, dice.smooth, dice.reduction)


def random_sums(seed=0):
    """(3, 4, 3) with 0 <= I <= min(P, Y), one class empty and predicted empty."""
    rng = np.random.default_rng(seed)
    pred, target = rng.random((2, 4, 3)) * 10
    sums = np.stack([np.minimum(pred, target) * rng.random((4, 3)), pred, target])
    sums[:, 2, 0] = 0
    return sums


def upstream_for(value, seed=1):
    return np.random.default_rng(seed).standard_normal(np.shape(value))


@pytest.mark.parametrize("dice", SETTINGS, ids=str)
def test_derivative_is_torch_autograd(dice):
    sums = random_sums()
    mine = with_weight(dice, np.array)
    value, derivative = mine.with_derivative(sums)
    assert_same_bits(value, mine(sums))
    upstream = upstream_for(value)
    tensor = torch.tensor(sums, requires_grad=True)
    theirs = with_weight(dice, torch.DoubleTensor)(tensor)
    assert_close(value, theirs.detach(), rtol=1e-15)
    (grad,) = torch.autograd.grad(theirs, tensor, torch.as_tensor(upstream))
    assert_close(upstream[..., None] * derivative, grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dice", SETTINGS, ids=str)
def test_derivative_is_finite_differences(dice):
    sums = random_sums()
    dice = with_weight(dice, np.array)
    value, derivative = dice.with_derivative(sums)
    upstream = upstream_for(value)
    cotangent = upstream[..., None] * derivative
    for index in np.ndindex(sums.shape):
        if dice.smooth == 0 and dice.reduction != "batch" and not sums[:, index[1], index[2]].any():
            assert cotangent[index] == 0  # at 0/0 the derivative is defined, not differentiated
            continue
        step = np.zeros_like(sums)
        step[index] = 1e-5
        difference = np.sum(upstream * (dice(sums + step) - dice(sums - step))) / 2e-5
        assert_close(cotangent[index], difference, rtol=1e-6, atol=1e-9, what=str(index))


def test_by_hand():
    sums = np.array([[[3.0, 1.0]], [[4.0, 2.0]], [[4.0, 3.0]]])  # one sample, two classes
    assert losses.DICE(sums, 0.0)[0].tolist() == [[0.25, 0.6]]
    assert losses.Dice()(sums) == pytest.approx((0.25 + 0.6) / 2)
    assert losses.Dice(np.array([2.0, 1.0]))(sums) == pytest.approx(2 * 0.25 + 0.6)
    assert losses.Dice(ignore_channel=1)(sums) == pytest.approx(0.25 / 2)
    assert losses.Dice(smooth=1.0)(sums) == pytest.approx((2 / 9 + 0.5) / 2)


def test_perfect_is_zero():
    sums = np.array([[[5.0, 0.0]], [[5.0, 0.0]], [[5.0, 0.0]]])
    value, derivative = losses.Dice().with_derivative(sums)
    assert value == 0
    assert derivative[:, 0, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_permute(reduction):
    sums, order = random_sums(), [2, 0, 1]
    weight = np.array([0.2, 1.5, 0.7])
    before = losses.Dice(weight, ignore_channel=2, reduction=reduction)(sums)
    after = losses.Dice(weight[order], ignore_channel=0, reduction=reduction)(sums[..., order])
    assert_close(after, before, rtol=1e-14)


def test_batch_is_one_large_sample():
    sums = random_sums()
    pooled = losses.Dice(reduction="batch")(sums)
    assert_close(pooled, losses.Dice()(sums.sum(1, keepdims=True)), rtol=1e-14)
    assert np.shape(pooled) == ()


def test_reductions_agree():
    sums = random_sums()
    each = losses.Dice(reduction="none")(sums)
    assert each.shape == (4,)
    assert_close(losses.Dice(reduction="sum")(sums), each.sum(), rtol=1e-14)
    assert_close(losses.Dice(reduction="mean")(sums), each.mean(), rtol=1e-14)


def test_nan_stays_in_its_sample():
    sums = random_sums()
    sums[0, 1, 1] = np.nan
    assert np.isnan(losses.Dice(reduction="none")(sums)).tolist() == [False, True, False, False]
