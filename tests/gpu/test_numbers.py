"""The kernels' numbers, against the naive code in float64 on the host."""

import itertools
import math

import naive
import pytest
import torch
from compare import assert_close
from gpu.volumes import (
    DEVICE,
    LABELS,
    LAYOUTS,
    LOGITS,
    Volume,
    assert_bitwise_equal,
    assert_gradient,
    assert_sums,
    true_loss,
    true_sums,
)

import dice_core
from dice_core.torch import loss as dice_loss
from dice_core.torch import statistics

pytestmark = pytest.mark.gpu

CHANNELS = (1, 2, 3, 4, 5, 8, 16, 17, 20, 33, 105, 150, 1000)
GAMMAS = (None, 0.0, 0.5, 1.0, 2.0)
REDUCTIONS = ("mean", "sum", "none", "batch")
VOXELS = ((1,), (7,), (255,), (16, 16, 16), (3, 17, 23), (4099,), (8, 40))


def channels_by_dtypes():
    """Every number of channels with every dtype of logits. The other options cycle, with periods
    none of which is a multiple of another.
    """
    for i, (channels, logits) in enumerate(itertools.product(CHANNELS, LOGITS)):
        wide = channels > 99 or i % 3 == 0  # label dtypes that can represent all classes
        labels = LABELS[2 + i % 6 if wide else i % 8]
        ignore = (None, 127, 1)[i % 3] if labels.startswith("u") else (None, -1)[i % 2]
        layout = tuple(LAYOUTS)[i // 2 % 3]
        p, gamma = (1, 2, 1, 1, 3)[i % 5], GAMMAS[i // 3 % 5]
        yield Volume(channels, VOXELS[i % 7], logits, labels, p, gamma, ignore, layout)


def sweeps():
    """Every dtype of labels, shape in every layout, gamma with every dtype of logits."""
    for i, labels in enumerate(LABELS):
        yield Volume(2, (16, 17), LOGITS[i % 4], labels, ignore=(None, 1)[i % 2])
    for voxels, layout in itertools.product(VOXELS, LAYOUTS):
        yield Volume(5, voxels, "float16", layout=layout)
    for gamma, logits in itertools.product(GAMMAS[1:], LOGITS):
        yield Volume(4, (4099,), logits, gamma=gamma)


@pytest.mark.parametrize("volume", [*channels_by_dtypes(), *sweeps()], ids=str)
def test_sums_and_their_gradient(volume):
    """The gradient for a random cotangent: it is linear in it, and every loss has one."""
    x, y = volume.tensors()
    x.requires_grad_()
    sums = statistics(x, y, **volume.options).array
    cotangent = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).double()
    (grad,) = torch.autograd.grad(sums, x, cotangent.to(DEVICE))
    expected, expected_grad = true_sums(x, y, cotangent, **volume.options)
    assert (sums.dtype, sums.device) == (torch.float64, x.device)
    assert_sums(sums, expected, x.dtype)
    assert_gradient(grad, expected_grad)


SETTINGS = list(itertools.product([None, [0.2, 1.5, 0.7]], [-1, 1], [0.0, 1.0], REDUCTIONS))


@pytest.mark.parametrize("logits", ["float16", "float64"])
@pytest.mark.parametrize(("weight", "ignore_channel", "smooth", "reduction"), SETTINGS, ids=str)
def test_loss_and_its_gradient(logits, weight, ignore_channel, smooth, reduction):
    x, y = Volume(3, (40, 41), logits, "int16", ignore=-1).tensors()
    y[1] = -1  # 0/0 in every class of a sample where smooth is 0
    x.requires_grad_()
    options = {"weight": weight, "ignore_channel": ignore_channel}
    options |= {"smooth": smooth, "reduction": reduction}
    loss = dice_loss(x, y, **options)
    upstream = torch.tensor([3000.0, -500.0] if loss.ndim else 3000.0, device=DEVICE).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    expected, expected_grad = true_loss(x, y, upstream, **options)
    assert (loss.dtype, loss.device) == (upstream.dtype, x.device)
    assert_sums(loss, expected, x.dtype, "loss")
    assert_gradient(grad, expected_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [1, 5, 33])
def test_the_gradient_in_place_is_the_same(channels, logits, layout):
    x, y = Volume(channels, (4099,), logits, layout=layout).tensors()
    loss, grad = dice_core.loss_and_grad(x, y, grad_loss=1000.0)
    in_place_loss, out = dice_core.loss_and_grad(x, y, grad_loss=1000.0, out=x)
    assert out is x
    assert_bitwise_equal(in_place_loss, loss, "loss")
    assert_bitwise_equal(x, grad, "gradient")


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5), (2, 1, 1), (1, 3)], ids=str)
def test_tiny_shapes(shape):
    x, y = torch.ones(shape), torch.ones(shape[0], *shape[2:], dtype=torch.uint8)
    for reduction in REDUCTIONS:
        expected, expected_grad = dice_core.loss_and_grad(x, y, reduction=reduction)
        loss, grad = dice_core.loss_and_grad(x.to(DEVICE), y.to(DEVICE), reduction=reduction)
        assert_sums(loss, torch.as_tensor(expected), x.dtype, "loss")
        assert_gradient(grad, expected_grad)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])  # for others the autograd of a root is NaN
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_probabilities_of_0_have_a_finite_cross_entropy(channels, gamma):
    x, y = Volume(channels, (33, 37)).tensors()
    x = (1e4 * x).requires_grad_()
    sums = statistics(x, y, gamma=gamma).array
    cotangent = torch.ones_like(sums)
    (grad,) = torch.autograd.grad(sums, x, cotangent)
    expected, expected_grad = true_sums(x, y, cotangent, gamma=gamma)
    assert expected.isfinite().all()
    assert_sums(sums, expected, x.dtype)
    assert_gradient(grad, expected_grad)


@pytest.mark.parametrize("label", [0, 3])
def test_infinities_are_torchs(label):
    x = torch.zeros(5, 4, 1)
    x[0, 3], x[1, 2:], x[2, 3], x[3], x[4, 1] = math.inf, math.inf, -math.inf, -math.inf, math.nan
    found_x, exact_x = x.to(DEVICE).requires_grad_(), x.double().requires_grad_()
    found = statistics(found_x, torch.full((5, 1), label, device=DEVICE), gamma=0)
    nll = -exact_x.log_softmax(1)[:, label, 0]
    assert_sums(found.pred_sum, exact_x.softmax(1)[..., 0], x.dtype)
    assert_sums(found.cross_entropy_sum[:, label], nll, x.dtype)
    (grad,) = torch.autograd.grad(found.cross_entropy_sum.sum(), found_x)
    (exact_grad,) = torch.autograd.grad(nll.sum(), exact_x)
    assert_close(grad.cpu(), exact_grad, rtol=1e-5, atol=1e-6)


def test_a_single_channel_is_1_or_0_at_infinity():
    x = torch.tensor([math.inf, -math.inf], device=DEVICE).reshape(2, 1, 1)
    found = statistics(x, torch.ones(2, 1, dtype=torch.uint8, device=DEVICE), gamma=0)
    assert found.pred_sum.tolist() == [[0, 1], [1, 0]]
    assert found.cross_entropy_sum.tolist() == [[0, 0], [0, math.inf]]


# ---- ignored voxels, NaN and labels out of range -------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_ignored_voxels_contribute_nothing_whatever_their_logits(channels, logits, poison):
    x, y = Volume(channels, (33, 37), logits, "int8", ignore=-1).tensors()
    ignored = (y == -1)[:, None].expand_as(x)
    found = []
    for each in (x, x.masked_fill(ignored, poison)):
        loss, grad = dice_core.loss_and_grad(each, y)
        each.requires_grad_()
        sums = statistics(each, y, gamma=2.0).array
        (of_sums,) = torch.autograd.grad(sums.sum(), each)
        found.append({"loss": loss, "gradient": grad, "sums": sums, "their gradient": of_sums})
        assert not grad[ignored].any()
        assert not of_sums[ignored].any()
    for what, expected in found[0].items():
        assert_bitwise_equal(found[1][what], expected, what)


@pytest.mark.parametrize("channels", [1, 4, 33])
def test_nan_in_a_valid_voxel_is_not_hidden(channels):
    x, y = Volume(channels, (33, 37)).tensors()
    x[1, 0, 5, 6] = math.nan
    each = dice_core.loss(x, y, reduction="none")
    assert each.isnan().tolist() == [False, True]


def with_labels_out_of_range(channels):
    x, y = Volume(channels, (33, 37), labels="int64").tensors()
    y[1, 3, 4], y[1, 5, 6], y[1, 32, 36] = -7, max(2, channels), 2**40
    return x, y


@pytest.mark.parametrize("channels", [1, 4, 33])
def test_labels_out_of_range_make_their_sample_nan(channels):
    x, y = with_labels_out_of_range(channels)
    assert dice_loss(x, y, reduction="none").isnan().tolist() == [False, True]
    assert dice_loss(x, y).isnan()
    loss, _ = dice_core.loss_and_grad(x, y)
    assert loss.isnan()


@pytest.mark.parametrize(
    "function", [dice_loss, dice_core.loss, dice_core.loss_and_grad, statistics]
)
@pytest.mark.parametrize("ask", ["argument", "environment"])
def test_labels_out_of_range_raise_the_error_of_the_host_when_asked(function, ask, monkeypatch):
    x, y = with_labels_out_of_range(4)
    with pytest.raises(ValueError, match="3 labels outside") as expected:
        function(x.cpu(), y.cpu())
    if ask == "environment":
        monkeypatch.setenv("DICE_CORE_CHECK", "1")
    with pytest.raises(ValueError, match="3 labels outside") as error:
        function(x, y, **({"check_labels": True} if ask == "argument" else {}))
    assert str(error.value) == str(expected.value)
    function(x, y.clamp(0, 3))


# ---- more than 2**31 elements --------------------------------------------------------------------

TILE, TILES, GIGABYTES = 2**20, 1025, 8


def test_more_elements_than_31_bits_count():
    """A tile repeated many times: a multiple of its sums, and the same gradient in each copy."""
    free, _ = torch.cuda.mem_get_info()
    if free < GIGABYTES * 1e9:
        pytest.skip(f"needs {GIGABYTES} GB of the GPU's memory, {free / 1e9:.1f} are free")
    tile, labels = Volume(2, (TILE,), "float16").tensors()
    tile, labels = tile[:1], labels[:1]
    x, y = tile.repeat(1, 1, TILES), labels.repeat(1, TILES)
    assert x.numel() > 2**31

    exact = tile.cpu().double().requires_grad_()
    sums = [TILES * each for each in naive.statistics(exact, labels.cpu().long())]
    expected = naive.dice_of(*sums)
    (of_tiles,) = torch.autograd.grad(expected, exact)
    assert_sums(statistics(x, y).array, torch.stack(sums), x.dtype)

    scale = float(TILE * TILES)  # otherwise the gradient would underflow in float16
    loss, grad = dice_core.loss_and_grad(x, y, grad_loss=scale, out=x)
    assert_sums(loss, expected, x.dtype, "loss")
    first = grad[..., :TILE].clone()
    assert_gradient(first, of_tiles * (scale / TILES))
    for i in range(TILES):
        assert torch.equal(grad[..., i * TILE : (i + 1) * TILE], first), f"tile {i}"
