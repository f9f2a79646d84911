"""The functions of `dice_core` and `dice_core.torch` against the naive code in float64."""

import dataclasses
import math
import pickle

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
import torch
from compare import assert_bitwise_equal, assert_close, kernel_rows
from hypothesis import given, settings
from layouts import LAYOUTS

import dice_core
import dice_core.torch
from dice_core import losses
from dice_core.losses import TERMS, CrossEntropy, Dice, Focal, SigmoidFocal, Tversky

REDUCTIONS = ("mean", "sum", "none", "classes", "batch")
LABELS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
BACKENDS = ("reference", *(row.name for row in kernel_rows()))


@st.composite
def problems(draw, divisible=False):
    """Logits, labels and options of every kind; with `divisible` the last axis can be cut."""
    channels = draw(st.integers(1, 33))
    spatial = draw(st.lists(st.integers(0, 9), max_size=3 if divisible else 4))
    spatial += [draw(st.integers(2, 9))] * divisible
    shape = (draw(st.integers(0, 3)), channels, *spatial)
    dtype = draw(st.sampled_from(["float32", "float64"]))
    classes = max(2, channels)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lay_out = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    x = lay_out(rng.standard_normal(shape).astype(dtype) * 3)
    labels = draw(st.sampled_from(LABELS))
    y = rng.integers(0, 2 if labels == "bool" else classes, (shape[0], *spatial)).astype(labels)
    if draw(st.booleans()):
        y = y[:, None]
    options = {
        "weight": draw(st.none() | st.just(rng.random(classes).tolist())),
        "ignore_channel": draw(st.integers(-2, classes + 1)),
        "ignore_label": draw(st.none() | st.integers(-2, classes + 1)),
        "smooth": draw(st.sampled_from([0.0, 1e-5, 1.0])),
        "p": draw(st.integers(1, 4)),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    return x, y, options


def truth(x, y, options, upstream=None):
    """Value, gradient and the size of its cotangents, by the naive code in float64."""
    x = torch.tensor(x.copy(order="C"), dtype=torch.float64, requires_grad=True)
    y = torch.tensor(y.astype(np.int64, order="C"))
    summed = {name: options[name] for name in ("ignore_label", "p") if name in options}
    rest = {name: options[name] for name in options if name not in summed}
    i, p, t = naive.statistics(x, y, **summed)
    value = naive.dice_of(i, p, t, **rest)
    upstream = torch.ones_like(value) if upstream is None else torch.as_tensor(upstream).double()
    grad, of_i, of_p = torch.autograd.grad(value, (x, i, p), upstream)
    size = max((float(g.abs().max()) for g in (of_i, of_p) if g.numel()), default=0.0)
    return value.detach().numpy(), grad.numpy(), size * options.get("p", 1)


def check(value, grad, x, y, options, upstream=None):
    expected, expected_grad, size = truth(x, y, options, upstream)
    tolerance = 2e-6 if x.dtype == np.float32 else 1e-13
    assert np.asarray(value).dtype == x.dtype
    assert_close(value, expected, rtol=4 * tolerance, atol=4 * tolerance, what="loss")
    # Cotangents cancel in the gradient: its error is that of a probability times a cotangent.
    assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance * size, what="gradient")


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from(BACKENDS), st.sampled_from([1, 2]))
def test_arrays(problem, backend, num_threads):
    x, y, options = problem
    use = {"backend": backend, "num_threads": num_threads}
    value = dice_core.loss(x, y, **options, **use)
    again, grad = dice_core.loss_and_grad(x, y, **options, **use)
    assert_bitwise_equal(value, again)
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    check(value, grad, x, y, options)


@settings(deadline=None, max_examples=150)
@given(problems(), st.sampled_from(BACKENDS))
def test_torch(problem, backend):
    x, y, options = problem
    logits = torch.tensor(x.copy(order="C"), requires_grad=True)
    labels = torch.tensor(y.copy(order="C"))
    value = dice_core.torch.loss(logits, labels, **options, backend=backend)
    value.sum().backward()
    assert logits.grad.stride() == logits.stride()
    check(value.detach(), logits.grad, x, y, options)


@settings(deadline=None, max_examples=150)
@given(problems(divisible=True), st.data())
def test_tiles(problem, data):
    x, y, options = problem
    cut = data.draw(st.integers(1, x.shape[-1] - 1))
    tiles = [(x[..., :cut], y[..., :cut]), (x[..., cut:], y[..., cut:])]
    summed = {name: options.pop(name) for name in ("ignore_label", "p")}
    first, second = (dice_core.statistics(*tile, **summed) for tile in tiles)
    total = first + second
    grads = [dice_core.gradient(*tile, total, **options) for tile in tiles]
    value = losses.of(None, **options, p=summed["p"])(total).astype(x.dtype)
    check(value, np.concatenate(grads, -1), x, y, {**options, **summed})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_finite_differences(reduction, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, 3, 4))
    y = rng.integers(0, max(2, channels), (2, 3, 4))
    options = {"reduction": reduction, "smooth": 0.5, "p": 3, "ignore_channel": 1}
    options["weight"] = rng.random(max(2, channels))
    upstream = rng.standard_normal(np.shape(dice_core.loss(x, y, **options)))
    _, grad = dice_core.loss_and_grad(x, y, grad_loss=upstream, **options)
    step = 1e-6
    for i in np.ndindex(x.shape):
        at = [x.copy(), x.copy()]
        at[0][i] += step
        at[1][i] -= step
        high, low = (np.sum(upstream * dice_core.loss(a, y, **options)) for a in at)
        assert_close((high - low) / (2 * step), grad[i], rtol=1e-5, atol=1e-10, what=f"at {i}")


# ---- terms ---------------------------------------------------------------------------------------


def naive_loss(term, x, y, ignore_label=-1):
    """A term evaluated on the sums of the naive code, with autograd."""
    sums = torch.stack(naive.statistics(x, y, ignore_label=ignore_label, **dict(term.needs)))
    term = term.with_weights([*map(torch.as_tensor, term.weights)])
    return term.value(dice_core.Statistics(sums, term.spec("softmax", ignore_label)))


COMPOUNDS = {
    "dice-ce": Dice(smooth=1) + 0.5 * CrossEntropy(),
    "weighted": Dice(weight=[1, 2, 3, 4], p=2, ignore_channel=0) + Focal(weight=[1, 2, 3, 4]),
    "smoothed": Dice() + CrossEntropy(label_smoothing=0.1, weight=[1, 2, 3, 4]),
    "dice-focal": Dice(smooth=1) + SigmoidFocal(alpha=0.3),
    "per sample": Tversky(reduction="none") + CrossEntropy(pool="none", reduction="none"),
    "per class": Dice(reduction="classes", smooth=1),
}
EVERY_TERM = {**{entry.term.__name__: entry.term() for entry in TERMS}, **COMPOUNDS}


@pytest.mark.parametrize("term", EVERY_TERM.values(), ids=EVERY_TERM)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_terms_of_voxels(term, backend, dtype):
    rng = np.random.default_rng(0)
    x = (2 * rng.standard_normal((2, 4, 13, 11))).astype(dtype)
    y = rng.integers(-1, 4, (2, 13, 11))
    exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = naive_loss(term, exact, torch.tensor(y))
    upstream = rng.standard_normal(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, exact, torch.tensor(upstream))
    use = {"term": term, "backend": backend}
    value, grad = dice_core.loss_and_grad(x, y, grad_loss=upstream, **use)
    assert_bitwise_equal(dice_core.loss(x, y, **use), value)
    tolerance = 2e-5 if dtype == "float32" else 1e-10
    assert_close(value, expected.detach(), rtol=tolerance / 10)
    size = float(expected_grad.abs().max())
    assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance * size)

    logits = torch.tensor(x, requires_grad=True)
    again = dice_core.torch.loss(logits, torch.tensor(y), term, backend=backend)
    assert_close(again.detach(), value, rtol=1e-15)
    again.backward(torch.tensor(upstream).to(again))
    assert_close(logits.grad, grad, rtol=tolerance / 10, atol=tolerance * size / 10)


@pytest.mark.parametrize("term", EVERY_TERM.values(), ids=EVERY_TERM)
def test_terms_by_finite_differences(term):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 4, 3, 2)), rng.integers(0, 4, (2, 3, 2))
    y.flat[:4] = range(4)
    upstream = rng.standard_normal(term.shape(2, 4))
    _, grad = dice_core.loss_and_grad(x, y, term=term, grad_loss=upstream)
    step = 1e-6
    for i in np.ndindex(x.shape):
        at = [x.copy(), x.copy()]
        at[0][i] += step
        at[1][i] -= step
        high, low = (np.sum(upstream * dice_core.loss(a, y, term=term)) for a in at)
        assert_close(grad[i], (high - low) / (2 * step), rtol=1e-6, atol=1e-9, what=f"at {i}")


@pytest.mark.parametrize("term", EVERY_TERM.values(), ids=EVERY_TERM)
def test_terms_of_tiles(term):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 4, 6, 8)), rng.integers(0, 4, (2, 6, 8))
    needs = dict(term.needs)
    tiles = [(x[..., :5], y[..., :5]), (x[..., 5:], y[..., 5:])]
    first, second = (dice_core.statistics(*tile, **needs) for tile in tiles)
    total = first + second
    value, grad = dice_core.loss_and_grad(x, y, term=term)
    assert_close(term(total), value, rtol=1e-12)
    grads = [dice_core.gradient(*tile, total, term) for tile in tiles]
    assert_close(np.concatenate(grads, -1), grad, rtol=1e-11, atol=1e-15)


class Transposed(Dice):
    """A term whose derivative is not contiguous."""

    def ratio(self, samples, classes):
        return None

    def with_derivative(self, sums):
        value, derivative = super().with_derivative(sums)
        return value, np.asfortranarray(derivative)


def test_a_derivative_of_any_strides():
    x = np.random.default_rng(0).standard_normal((2, 3, 20))
    y = np.arange(40).reshape(2, 20) % 3
    (value, grad), (same, expected) = (
        dice_core.loss_and_grad(x, y, term()) for term in (Transposed, Dice)
    )
    assert_close(value, same, rtol=1e-14)
    assert_close(grad, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("ignore_label", [-1, 1])
def test_score(backend, channels, activation, ignore_label):
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((3, channels, 9, 13)), 1).astype("float32")  # with ties
    y = rng.integers(0, max(2, channels), (3, 9, 13))
    if activation == "sigmoid":
        y = rng.integers(0, 2, x.shape)
    expected = naive.score(
        torch.tensor(x), torch.tensor(y), ignore_label=ignore_label, activation=activation
    )
    options = {"ignore_label": ignore_label, "activation": activation}
    score = dice_core.score(x, y, **options, backend=backend)
    assert_close(score.dice, expected[0], rtol=1e-15)
    assert_close(score.iou, expected[1], rtol=1e-15)
    flat = np.moveaxis(x, 0, 1).reshape(1, channels, -1)
    labels = (
        np.moveaxis(y, 0, 1).reshape(1, channels, -1) if y.shape == x.shape else y.reshape(1, -1)
    )
    pooled = dice_core.score(x, y, **options, backend=backend, pool="batch")
    of_all = dice_core.score(flat, labels, **options, backend=backend)
    assert_close(pooled.dice, of_all.dice, rtol=1e-15)
    assert_close(pooled.iou, of_all.iou, rtol=1e-15)


@pytest.mark.parametrize("decide", [dice_core.score, dice_core.torch.DiceScore], ids=["", "torch"])
def test_scores_need_logits(decide):
    arrays = (np.zeros((1, 2, 3)), np.zeros((1, 3), int)) if decide is dice_core.score else ()
    with pytest.raises(ValueError, match="activation must be one of 'softmax', 'sigmoid', got"):
        decide(*arrays, activation="none")


@pytest.mark.parametrize("iou", [False, True])
@pytest.mark.parametrize("pool", ["batch", "none"])
def test_score_of_batches(iou, pool):
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.standard_normal((4, 3, 50)), requires_grad=True)
    y = torch.tensor(rng.integers(0, 2, (4, 50)))  # no label is 2
    with torch.no_grad():
        x[1:, 2] = -9
    score = dice_core.torch.DiceScore(iou=iou, pool=pool)
    with pytest.raises(RuntimeError, match="called before update"):
        score.compute()
    score.update(x[:3], y[:3])
    last = score(x[3:], y[3:])
    whole = dice_core.score(x.detach(), y, pool=pool)[iou]
    alone = dice_core.score(x[3:].detach(), y[3:])[iou]
    assert_close(score.compute(), np.nanmean(whole, axis=0), rtol=1e-14)
    assert_close(last, alone[0], rtol=1e-14)
    score.reset()
    assert score.total is None


def test_one_channel_s_cross_entropy_is_binary():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 50, dtype=torch.float64, generator=generator)
    y = torch.randint(2, (2, 50), generator=generator)
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    expected = binary(x[:, 0], y.double(), pos_weight=torch.tensor(3.0))
    mine = dice_core.torch.loss(x, y, CrossEntropy(weight=[1, 3], divisor="voxels"))
    assert_close(mine, expected, rtol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_incoming_gradient(reduction):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((3, 4, 50)), rng.integers(0, 4, (3, 50))
    options = {"reduction": reduction}
    upstream = rng.standard_normal(np.shape(dice_core.loss(x, y, **options)))
    value, grad = dice_core.loss_and_grad(x, y, grad_loss=upstream, **options)
    check(value, grad, x, y, options, upstream)


def test_known_values():
    x = np.zeros((1, 2, 4))  # every probability is 1/2
    y = np.array([[0, 0, 0, 1]])
    # class 0: 1 - 2 * 1.5 / (2 + 3), class 1: 1 - 2 * 0.5 / (2 + 1)
    assert dice_core.loss(x, y) == pytest.approx((0.4 + 2 / 3) / 2)
    assert dice_core.loss(x, y, weight=[1, 0]) == pytest.approx(0.4)
    assert dice_core.loss(x, y, ignore_channel=0) == pytest.approx(1 / 3)
    assert dice_core.loss(x, y, p=2) == pytest.approx((1 - 3 / 4 + 1 - 1 / 2) / 2)
    assert dice_core.loss(x, y, smooth=1) == pytest.approx((1 - 4 / 6 + 1 - 2 / 4) / 2)
    assert dice_core.loss(x, y, ignore_label=1) == pytest.approx((1 - 3 / 4.5 + 1) / 2)
    stats = dice_core.statistics(x, y)
    assert stats.intersection.tolist() == [[1.5, 0.5]]
    assert stats.pred_sum.tolist() == [[2, 2]]
    assert stats.target_sum.tolist() == [[3, 1]]


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_empty_class_predicted_empty_is_perfect(channels):
    x = np.full((2, channels, 10), -1e4, np.float32)
    x[:, 0] = -1e4 if channels == 1 else 1e4
    y = np.zeros((2, 10), int)
    value, grad = dice_core.loss_and_grad(x, y, reduction="none")
    assert value.tolist() == [0, 0]
    assert not grad.any()


def test_empty_class_predicted_somewhere_is_a_full_loss():
    x, y = np.zeros((1, 2, 10)), np.zeros((1, 10), int)
    assert dice_core.loss(x, y, weight=[0, 1]) == 1
    assert dice_core.loss(x, y, weight=[0, 1], smooth=1) == pytest.approx(1 - 1 / 6)


def test_no_samples():
    x, y = np.zeros((0, 3, 5)), np.zeros((0, 5), int)
    values = {name: dice_core.loss(x, y, reduction=name) for name in REDUCTIONS}
    assert values["none"].shape == (0,)
    assert values["sum"] == values["batch"] == 0
    assert math.isnan(values["mean"])


def test_no_samples_of_a_batch():
    x, y, term = np.zeros((0, 3, 5)), np.zeros((0, 5), int), Dice(pool="batch", smooth=(0, 1))
    assert dice_core.loss(x, y, term) == term(dice_core.statistics(x, y)) == 1


def test_no_voxels():
    x, y = np.zeros((2, 3, 0, 4)), np.zeros((2, 0, 4), int)
    value, grad = dice_core.loss_and_grad(x, y)
    assert value == 0
    assert grad.shape == x.shape
    assert dice_core.loss_and_grad(x, y, out=grad)[1] is grad


def test_every_voxel_ignored():
    x, y = np.full((1, 3, 8), np.nan), np.full((1, 8), 7)
    value, grad = dice_core.loss_and_grad(x, y, ignore_label=7)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_keeps_dtype_and_strides(dtype, layout):
    x = LAYOUTS[layout](np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(dtype))
    _, grad = dice_core.loss_and_grad(x, np.zeros((2, 4, 5), int))
    assert grad.dtype == x.dtype
    assert np.argsort(grad.strides).tolist() == np.argsort(np.abs(x.strides)).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out(layout):
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    y = np.ones((2, 4, 5), np.uint8)
    value, grad = dice_core.loss_and_grad(x, y)
    out = LAYOUTS[layout](np.zeros_like(x))
    value_out, returned = dice_core.loss_and_grad(x, y, out=out)
    assert returned is out
    assert_bitwise_equal(value_out, value)
    assert_bitwise_equal(np.ascontiguousarray(out), grad)
    value_over, over = dice_core.loss_and_grad(x, y, out=x)
    assert over is x
    assert_bitwise_equal(value_over, value)
    assert_bitwise_equal(x, grad)


def test_torch_tensors_are_read_like_any_array():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last)
    y = torch.ones(2, 4, 5, dtype=torch.int16)
    value, grad = dice_core.loss_and_grad(x, y)
    assert isinstance(value, np.float32)
    assert isinstance(grad, torch.Tensor)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert_close(value, dice_core.loss(x.numpy(), y.numpy()), rtol=0)
    check(value, grad, x.numpy(), y.numpy(), {})


def example_arrays():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 3, 20)), rng.integers(0, 3, (2, 20))


@pytest.mark.parametrize("label", [2**63, 2**64 - 1])
@pytest.mark.parametrize("term", [Dice(), Dice(target_square=True) + CrossEntropy()], ids=repr)
def test_any_uint64_label_may_be_ignored(term, label):
    x, y = example_arrays()
    wide = y.astype(np.uint64)
    y[:, :3], wide[:, :3] = -1, label
    expected = dice_core.loss(x, y, term)
    assert_bitwise_equal(dice_core.loss(x, wide, term, ignore_label=label), expected)
    x, wide = torch.from_numpy(x).requires_grad_(), torch.from_numpy(wide)
    fused = dice_core.torch.loss(x, wide, term, ignore_label=label)
    assert_close(fused.detach(), expected, rtol=1e-14)
    options = {"ignore_label": label, **dict(term.needs)}
    from_sums = term(dice_core.torch.statistics(x, wide, **options))
    assert_close(from_sums.detach(), expected, rtol=1e-14)


EXTREME = [
    {"smooth": 5e-324},
    {"smooth": (1.7e308, 5e-324)},
    {"floor": 1.7e308},
    {"weight": [1e300, -1e300, 1e308]},
    {"weight": [5e-324, 0, 5e-324], "empty": "nan"},
    {"gamma": 1.7e308},
    {"alpha": 5e-324, "beta": 1.7e308},
    {"pos_weight": [1.7e308] * 3, "weight": [1.7e308] * 3},
    {"p": 2**31 - 1},
]


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
def test_extreme_numbers_overflow_without_warnings(entry):
    """NumPy's results are those of torch's arithmetic, and nothing warns or raises."""
    x, y = example_arrays()
    x[1, 1, 2] = np.inf
    x32 = x.astype(np.float32)
    x[0] *= 1e300
    names = {field.name for field in dataclasses.fields(entry.term)}
    names -= {"p"} if entry.term is losses.MCC else set()
    with np.errstate(all="raise"):
        for options in ({}, *(options for options in EXTREME if names.issuperset(options))):
            term = 1e308 * entry.term(reduction="sum", pool=entry.term.pools[0], **options)
            for activation in ("softmax", "none"):
                check_extreme(term, x, x32, y, activation)


def check_extreme(term, x, x32, y, activation):
    options = {"activation": activation, **dict(term.needs)}
    sums = dice_core.statistics(x, y, **options)
    value = dice_core.loss(x, y, term, activation=activation)
    assert_close(term(sums), value, rtol=1e-12)
    tensors = dice_core.torch.statistics(torch.from_numpy(x), torch.from_numpy(y), **options)
    assert_close(value, term(tensors), rtol=1e-12)
    assert sums.pooled().array.shape == (sums + sums).pooled().array.shape
    for upstream in (1e300, np.inf, np.nan):
        scale = np.full(np.shape(value), upstream)
        _, grad = dice_core.loss_and_grad(x, y, term, activation=activation, grad_loss=scale)
        assert_bitwise_equal(dice_core.gradient(x, y, sums, term, grad_loss=scale), grad)
        assert upstream == 1e300 or not np.isfinite(grad).all()
        single = dice_core.loss_and_grad(x32, y, term, activation=activation, grad_loss=scale)
        assert single[0].dtype == np.float32


def test_statistics_object():
    x, y = np.zeros((2, 3, 4), np.float32), np.zeros((2, 4), int)
    stats = dice_core.statistics(x, y, p=2)
    assert stats.intersection.shape == stats.pred_sum.shape == stats.target_sum.shape == (2, 3)
    assert stats.intersection.dtype == np.float64
    assert Dice(p=2)(stats) == pytest.approx(dice_core.loss(x, y, p=2))
    assert all(map(np.array_equal, stats, stats.array))
    assert repr(stats) == (
        "<Statistics of 2 samples, 3 classes: softmax, p = 2, ignore_label = -1>"
    )
    out = np.empty_like(x)
    assert dice_core.gradient(x, y, stats, out=out) is out
    assert_bitwise_equal(out, dice_core.loss_and_grad(x, y, p=2)[1])
    with pytest.raises(TypeError):
        stats + 1


@pytest.mark.parametrize("as_torch", [False, True])
def test_statistics_pickle_and_add_up(as_torch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 8)), rng.integers(0, 3, (2, 8))
    take = dice_core.statistics
    if as_torch:
        x, y, take = torch.tensor(x), torch.tensor(y), dice_core.torch.statistics
    stats = take(x, y, gamma=0, nll=True, binary_gamma=2)
    again = pickle.loads(pickle.dumps(stats))
    assert again.spec == stats.spec
    assert_close(again.array, stats.array, rtol=0)
    assert_close(sum([stats, again]).array, 2 * stats.array, rtol=1e-15)
    for name in stats.spec.fields:
        assert_close(getattr(again, name), getattr(stats, name), rtol=0)
    assert_close(stats.voxel_count, np.full((2, 3), 8), rtol=0)
    with pytest.raises(ValueError, match="cannot add statistics with different sums"):
        stats + take(x, y)
    with pytest.raises(AttributeError, match=r"have no nll_sum .* compute them with nll=True"):
        take(x, y).nll_sum  # noqa: B018


def test_larger_tiles_merge_in_any_order():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 4, 64, 64)), rng.integers(0, 4, (1, 64, 64))
    parts = [dice_core.statistics(x[:, :, i::4], y[:, i::4]) for i in range(4)]
    whole = dice_core.statistics(x, y)
    assert_close((parts[0] + parts[1] + parts[2] + parts[3]).array, whole.array, rtol=1e-13)
    assert_close((parts[3] + parts[1] + parts[0] + parts[2]).array, whole.array, rtol=1e-13)
