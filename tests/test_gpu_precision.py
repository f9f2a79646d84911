"""The relative error of the CUDA kernels' gradients in a simulator, against exact arithmetic: from
random to near-perfect predictions, and of classes that are absent.
"""

import gpu_simulator
import mpmath
import numpy as np
import pytest
from compare import assert_close
from emulated.arrays import DeviceArray

import dice_core
from dice_core import _gpu, allocators, buffers, losses, spec
from dice_core.gpu import plan as plans
from dice_core.spec import Spec

GAPS = (0, 2, 5, 8, 10, 15, 20, 40, 80)  # of the logit of the labelled class above the others
RTOL = 5e-6  # the relative error of an exponential, exp(x), is that of x times x
NEAR_PERFECT = 1 - 2e-7  # a score

KINDS = {  # the options of Spec, and whether targets are one-hot rather than labels
    "plain": ({}, False),
    "focal": ({"gamma": 2.0}, False),
    "dense": ({}, True),
    "dense_cross_entropy": ({"gamma": 0.0, "targets": "binary"}, True),
    "dense_focal": ({"gamma": 2.0}, True),
    "nll": ({"gamma": 0.0, "nll": True}, False),
    "sigmoid": ({"activation": "sigmoid"}, False),
    "sigmoid_binary": ({"activation": "sigmoid", "binary_gamma": 0.0}, True),
    "softmax_binary": ({"binary_gamma": 0.0}, False),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_simulator.install(monkeypatch, warps=1)


def example(classes, dtype="float32", sign=1):
    """Logits (gaps, classes, classes) with a voxel of each class, and their labels."""
    labels = np.broadcast_to(np.arange(classes, dtype=np.uint8), (len(GAPS), classes))
    noise = np.sin(np.arange(classes * classes)).reshape(classes, classes) / 4
    gaps = sign * np.array(GAPS, float).reshape(-1, 1, 1)
    return (np.eye(classes) * gaps + noise).astype(dtype), labels


def one_hot(x, y):
    return (y[:, None] == np.arange(x.shape[1]).reshape(-1, 1)).astype(np.uint8)


def derivative_of_dice(fields, samples, classes, p):
    """Dice's, of a near-perfect score, and 1 for all other sums."""
    cotangent = np.ones((len(fields), samples, classes))
    den = np.arange(1.0, classes + 1) * 100
    cotangent[0], cotangent[1] = -2 / den, NEAR_PERFECT * (2 / p) / den
    return cotangent / 7


def gradient(x, y, cotangent, options):
    logits, labels = (buffers.of(DeviceArray.holding(a), "array") for a in (x, y))
    signature = spec.signature(logits.layout, labels.layout, Spec(**options))
    grad = buffers.of(allocators.empty(logits, x.shape, str(x.dtype)), "grad")
    on_device = buffers.of(DeviceArray.holding(cotangent), "cotangent")
    _gpu.gradient(logits, labels, on_device, grad, signature.spec, 1)
    return grad.owner.host


def exact(x, y, cotangent, options):
    """With 200 digits, the gradient as the documentation of `_reference.gradient` states it."""
    fields, p = Spec(**options).fields, options.get("p", 1)
    gamma = mpmath.mpf(options.get("gamma") or 0)
    grad = np.zeros(x.shape)
    with mpmath.workdps(200):
        for n, v in np.ndindex(x.shape[0], x.shape[2]):
            of = {
                field: [mpmath.mpf(float(number)) for number in row[n]]
                for field, row in zip(fields, cotangent, strict=True)
            }
            column = [mpmath.mpf(float(number)) for number in x[n, :, v]]
            t = [int(c == y[n, v]) for c in range(len(column))]
            total = mpmath.fsum(mpmath.exp(each) for each in column)
            q = [mpmath.exp(each) / total for each in column]
            b = [1 / (1 + mpmath.exp(-each)) for each in column]
            s = b if options.get("activation") == "sigmoid" else q
            d = [
                of["intersection"][c] * t[c] + of["pred_sum"][c] * p * s[c] ** (p - 1)
                for c in range(len(s))
            ]
            mean = mpmath.fsum(each * slope for each, slope in zip(s, d, strict=True))
            u = []
            for c in range(len(s)):
                rest, nll = 1 - q[c], -mpmath.log(q[c])
                modulated = rest**gamma + gamma * rest ** (gamma - 1) * q[c] * nll
                of_c = of["cross_entropy_sum"][c] * t[c] * modulated if "gamma" in options else 0
                u.append(of_c + (of["nll_sum"][c] if "nll" in options else 0))
            for c in range(len(s)):
                dx = d[c] * s[c] * (1 - s[c]) if s is b else s[c] * (d[c] - mean)
                dx += q[c] * sum(u) - u[c]
                if "binary_gamma" in options:
                    dx -= of["positive_sum"][c] * t[c] * (1 - b[c])
                    dx += of["negative_sum"][c] * (1 - t[c]) * b[c]
                grad[n, c, v] = dx
    return grad


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_near_perfect_predictions_have_an_exact_gradient(kind, p):
    options, dense = KINDS[kind]
    options = {"p": p} | ({"targets": "soft"} if dense else {}) | options
    x, y = example(3)
    cotangent = derivative_of_dice(Spec(**options).fields, *x.shape[:2], p)
    grad = gradient(x, one_hot(x, y) if dense else y, cotangent, options)
    true_grad = exact(x, y, cotangent, options)
    tiny = float(np.finfo(np.float32).tiny)
    assert_close(grad[1:], true_grad[1:], rtol=RTOL, atol=RTOL * tiny)
    # Of equal logits, the exact derivatives of the classes may cancel.
    assert_close(grad[0], true_grad[0], rtol=RTOL, atol=1e-7 * np.abs(true_grad[0]).max())


@pytest.mark.parametrize("kind", ["plain", "dense_focal"])
def test_also_where_lanes_share_a_voxel(kind):
    options, dense = KINDS[kind]
    options = {"p": 2} | ({"targets": "soft"} if dense else {}) | options
    x, y = (array[2:6] for array in example(34))
    cotangent = derivative_of_dice(Spec(**options).fields, *x.shape[:2], 2)
    x, y = x[..., 10:12], y[:, 10:12]
    grad = gradient(x, one_hot(x, y) if dense else y, cotangent, options)
    assert plans.plan("float32", "uint8", 34, Spec(**options), 99).lanes > 1
    assert_close(grad, exact(x, y, cotangent, options), rtol=RTOL, atol=1e-38)


@pytest.mark.parametrize("targets", ["labels", "one-hot"])
def test_a_rare_class_that_is_missed_costs_the_others_nothing(targets):
    """Its factor is a million times theirs: the error of their gradient must not depend on it."""
    x, y = (array[4:5] for array in example(3, sign=-1))
    cotangent = derivative_of_dice(("I", "P", "Y", "m"), 1, 3, 1)
    cotangent[:2, :, 2] *= 1e6
    dense = targets == "one-hot"
    options = {"targets": "soft"} if dense else {}
    cotangent = cotangent[: len(Spec(**options).fields)]
    grad = gradient(x, one_hot(x, y) if dense else y, cotangent, options)
    true_grad = exact(x, y, cotangent, options)
    own_scale = np.abs(cotangent[0, 0, 0])
    assert_close(grad[:, :2, 2], true_grad[:, :2, 2], rtol=RTOL, atol=1e-6 * own_scale)


LOSSES = {
    "dice": (lambda p: losses.Dice(p=p), "softmax"),
    "tversky": (lambda p: losses.Tversky(p=p), "softmax"),
    "sigmoid": (lambda p: losses.Dice(p=p), "sigmoid"),
    "cross_entropy": (lambda p: losses.Dice(p=p) + losses.CrossEntropy(), "softmax"),
    "binary": (lambda p: losses.Dice(p=p) + losses.BinaryCrossEntropy(), "sigmoid"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "p", "logit"),
    [(name, "float32", *case) for name in LOSSES for case in ((2, -48), (3, -32))]
    + [(name, "float64", 2, logit) for name in ("dice", "sigmoid") for logit in (-360, -371)],
)
@pytest.mark.parametrize("dense", [False, True])
def test_an_absent_class_that_is_not_predicted(dense, name, dtype, p, logit):
    """2 / (P + Y) overflows, and is multiplied by a target of 0."""
    make, activation = LOSSES[name]
    x = np.sin(np.arange(36.0)).reshape(1, 3, 12).astype(dtype)
    x[:, 2] = logit
    y = np.arange(12, dtype=np.uint8)[None] % 2
    targets = one_hot(x, y) if dense else y
    on_gpu = map(DeviceArray.holding, (x, targets))
    value, grad = dice_core.loss_and_grad(*on_gpu, make(p), activation=activation)
    assert np.isfinite(value.host)
    assert np.isfinite(grad.host).all()
    x[:, 2] = -20  # the score is 0 as well
    expected = dice_core.loss_and_grad(
        x.astype(float), targets, make(p), activation=activation, backend="reference"
    )[1]
    assert_close(grad.host[:, :2], expected[:, :2], rtol=1e-5, atol=1e-6)
