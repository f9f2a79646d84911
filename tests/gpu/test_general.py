"""Other activations, soft targets, label smoothing and binary cross-entropy, against the reference
on the host.
"""

import itertools
import math

import pytest
import torch
from gpu.volumes import DEVICE, LAYOUTS, LOGITS, Volume, assert_gradient, assert_sums

import dice_core
from dice_core import calls, losses
from dice_core.spec import Spec
from dice_core.torch import DiceScore, loss, statistics

pytestmark = pytest.mark.gpu

OPTIONS = {
    "nll": {"nll": True},
    "nll_focal": {"nll": True, "gamma": 2.0, "p": 2},
    "none": {"activation": "none"},
    "sigmoid": {"activation": "sigmoid", "p": 2},
    "binary": {"activation": "sigmoid", "binary_gamma": 0.0},
    "binary_focal": {"activation": "sigmoid", "binary_gamma": 2.0},
    "binary_of_softmax": {"binary_gamma": 0.5},
    "everything": {"activation": "sigmoid", "gamma": 0.5, "nll": True, "binary_gamma": 1.5},
}
TARGETS = ("uint8", "int64", "float16", "bfloat16", "float32", "float64")


def on_host(x, y):
    """Copies there, x in float64."""
    return x.detach().cpu().double(), y.cpu().double() if y.is_floating_point() else y.cpu()


def check(x, y, **options):
    """Compares the sums and the gradient for a random cotangent with the reference."""
    x = x.sigmoid() if options.get("activation") == "none" else x  # so that sums do not cancel
    x.requires_grad_()
    sums = statistics(x, y, **options).array
    cotangent = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).double()
    (grad,) = torch.autograd.grad(sums, x, cotangent.to(DEVICE))
    true_x, true_y = on_host(x, y)
    expected = statistics(true_x.requires_grad_(), true_y, **options, backend="reference").array
    (expected_grad,) = torch.autograd.grad(expected, true_x, cotangent)
    assert_sums(sums, expected, x.dtype)
    assert_gradient(grad, expected_grad)


@pytest.mark.parametrize("channels", [1, 2, 5, 20, 150])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_labels(options, logits, channels):
    if channels == 1 and options.get("activation", "softmax") != "softmax":
        channels = 3
    layout = list(LAYOUTS)[channels % 3]
    x, y = Volume(channels, (40, 41), logits, "int16", ignore=-1, layout=layout).tensors()
    check(x, y, ignore_label=-1, **options)


@pytest.mark.parametrize(("logits", "targets"), list(itertools.product(LOGITS, TARGETS)))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_soft_targets(options, logits, targets):
    channels = 3 + (len(targets) + len(options)) % 3 * 14
    x, _ = Volume(channels, (517,), logits).tensors()
    generator = torch.Generator().manual_seed(2)
    whole = not targets.startswith(("float", "bfloat"))
    y = torch.rand(x.shape, generator=generator)
    y = (y.round() if whole else y).to(getattr(torch, targets))
    y[torch.rand(x.shape, generator=generator) < 0.1] = 127
    check(x, y.to(DEVICE), ignore_label=127, target_square=True, **options)


def test_targets_out_of_range_make_their_sample_nan():
    x, _ = Volume(3, (40, 41)).tensors()
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y[1, 2, 5, 6] = 1.5
    sums = statistics(x, y).array
    assert sums[:, 1].isnan().all()
    assert not sums[:, 0].isnan().any()


def test_binary_targets_are_0_or_1():
    x, _ = Volume(3, (40, 41)).tensors()
    y = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).round().to(DEVICE)
    y[1, 2, 5, 6] = 0.5
    sums = calls.call(x, y, Spec("sigmoid", binary_gamma=0.0, targets="binary")).statistics().array
    assert sums[:, 1].isnan().all()
    assert not sums[:, 0].isnan().any()


def test_binary_cross_entropy_at_infinity_is_torchs():
    x = torch.tensor([math.inf, math.inf, -math.inf, -math.inf]).reshape(4, 1, 1)
    y = torch.tensor([1.0, 0, 1, 0]).reshape(4, 1, 1)
    found_x = x.to(DEVICE).requires_grad_()
    found = statistics(found_x, y.to(DEVICE), activation="sigmoid", binary_gamma=0)
    total = found.positive_sum + found.negative_sum
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
    torch.testing.assert_close(total.cpu().float(), expected[..., 0], equal_nan=True)
    (grad,) = torch.autograd.grad(total.sum(), found_x)
    torch.testing.assert_close(grad.cpu(), x.sigmoid() - y)


TERMS = {
    "label_smoothing": (losses.Dice() + losses.CrossEntropy(label_smoothing=0.1), {}),
    "binary": (
        losses.Dice() + losses.BinaryCrossEntropy(pos_weight=[1, 2, 3]),
        {"activation": "sigmoid"},
    ),
    "sigmoid_focal": (losses.SigmoidFocal(alpha=0.25), {"activation": "sigmoid"}),
    "of_probabilities": (losses.Tversky(alpha=0.3, beta=0.7), {"activation": "none"}),
}


@pytest.mark.parametrize("logits", ["bfloat16", "float32"])
@pytest.mark.parametrize(("term", "options"), TERMS.values(), ids=TERMS)
def test_losses(term, options, logits):
    x, y = Volume(3, (40, 41), logits).tensors()
    x = x.sigmoid() if options.get("activation") == "none" else x
    x.requires_grad_()
    value = loss(x, y, term, **options)
    (grad,) = torch.autograd.grad(value, x)
    true_x, true_y = on_host(x, y)
    expected = loss(true_x.requires_grad_(), true_y, term, **options, backend="reference")
    (expected_grad,) = torch.autograd.grad(expected, true_x)
    assert_sums(value, expected, x.dtype)
    assert_gradient(grad, expected_grad)


@pytest.mark.parametrize("channels", [1, 3, 150])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_scores(activation, channels):
    x, y = Volume(channels, (40, 41), "float16", "int16").tensors()
    if activation == "sigmoid":
        y = (y[:, None] == torch.arange(channels, device=DEVICE)[:, None, None]).to(torch.uint8)
    score = DiceScore(activation=activation)
    score.update(x, y)
    expected = dice_core.score(*on_host(x, y), pool="batch", activation=activation).dice[0]
    torch.testing.assert_close(score.compute().cpu(), torch.from_numpy(expected), equal_nan=True)
