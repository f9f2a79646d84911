"""The CUDA kernels in a simulator, against the reference: no GPU, no compiler."""

from dataclasses import replace
from types import SimpleNamespace

import gpu_simulator
import numpy as np
import pytest
from compare import assert_bitwise_equal, assert_close
from emulated.arrays import DeviceArray, dtype_of

from dice_core import _gpu, _reference, allocators, buffers, spec
from dice_core.gpu import plan as plans
from dice_core.spec import Spec

RTOL = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-14}
GRAD = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-14}
RUN = 64


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_simulator.install(monkeypatch)
    short_runs(monkeypatch)


def short_runs(monkeypatch):
    """Makes runs short, so that small volumes have several blocks."""
    for name, value in (("MAX_ROUNDS", 2), ("BLOCKS", 1), ("MIN_RUN", RUN)):
        monkeypatch.setattr(plans, name, value)


def example(logits, labels, channels, voxels, samples=2, soft=False, targets=None):
    """Logits, labels or soft targets, and a cotangent for all possible sums."""
    rng = np.random.default_rng(channels * 1000 + voxels)
    x = (rng.standard_normal((samples, channels, voxels)) * 3).astype(dtype_of(logits))
    cotangent = rng.standard_normal((9, samples, max(2, channels)))
    if labels in plans.ITEMSIZE:
        y = rng.random(x.shape).round(0 if targets == "binary" else 1)
        return x, y.astype(dtype_of(labels)), cotangent
    soft |= targets == "binary"
    classes = min(max(2, channels), 2 if labels == "bool" or soft else 127)
    shape = x.shape if soft else (samples, voxels)
    return x, rng.integers(0, classes, shape).astype(labels), cotangent


def on_gpu(array, name="array"):
    return buffers.of(DeviceArray.holding(array), name)


def empty(at, shape=None, dtype="float64"):
    """Memory of the GPU for a result."""
    shape = at.shape if shape is None else shape
    return buffers.of(allocators.empty(at.logits, shape, dtype), "new")


def bound(logits, labels, options):
    """Arrays and what to sum of them, for the functions of a backend."""
    seen = spec.signature(logits.layout, labels.layout, Spec(**options))
    labels = replace(labels, layout=seen.labels)
    return SimpleNamespace(logits=logits, labels=labels, spec=seen.spec, shape=seen.sums_shape)


def call(x, y, **options):
    return bound(on_gpu(x), on_gpu(y), options)


def has_gradient(at):
    return at.spec.activation in spec.ACTIVATIONS


def run(x, y, cotangent, scale=None, **options):
    """(sums, gradient) of the kernels, for as many rows of the cotangent as there are sums."""
    at = call(x, y, **options)
    sums, grad = empty(at), on_gpu(np.full_like(x, np.nan))
    assert _gpu.statistics(at.logits, at.labels, sums, at.spec, 1) == 0
    if not has_gradient(at):
        return sums.owner.host, np.zeros_like(x)
    cotangent = on_gpu(cotangent[: at.shape[0], :, : at.shape[2]].copy())
    scale = None if scale is None else on_gpu(scale)
    assert _gpu.gradient(at.logits, at.labels, cotangent, grad, at.spec, 1, scale) == 0
    return sums.owner.host, grad.owner.host


def expected(x, y, cotangent, **options):
    """The sums and the gradient of the reference."""
    x = x.astype(np.float64)
    y = y.astype(np.float64) if y.dtype == dtype_of("bfloat16") else y
    at = bound(buffers.of(x, "x"), buffers.of(y, "y"), options)
    cotangent = cotangent[: at.shape[0], :, : at.shape[2]].copy()
    sums, grad = np.empty(at.shape), np.empty_like(x)
    with np.errstate(invalid="ignore"):
        _reference.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 1)
        if not has_gradient(at):
            return sums, np.zeros_like(x)
        _reference.gradient(
            at.logits, at.labels, buffers.of(cotangent, "c"), buffers.of(grad, "g"), at.spec, 1
        )
    return sums, grad


# Each path of the kernels, crossed with dtypes, lanes, alignments and layouts so that most pairs
# occur: logits, labels, channels, voxels, sums and memory layout.
PLAIN = {
    "single": ("float32", "bool", 1, 520, {}),
    "single_root": ("float16", "uint8", 1, 600, {"gamma": 0.5, "ignore_label": 255}),
    "two": ("bfloat16", "uint8", 2, 600, {}),
    "two_focal": ("float64", "int64", 2, 130, {"gamma": 2.0}),
    "three_scalar": ("float32", "int64", 3, 301, {}),
    "four_ignored": ("float16", "uint8", 4, 600, {"ignore_label": 1}),
    "four_cross_entropy": ("float32", "uint8", 4, 520, {"gamma": 0.0}),
    "five_root": ("float16", "int16", 5, 300, {"gamma": 0.5, "p": 2, "ignore_label": -1}),
    "double": ("float64", "int32", 3, 130, {"p": 3, "gamma": 0.0}),
    "unsigned": ("float32", "uint32", 7, 300, {"ignore_label": 2**32 - 1}),
    "wide_unsigned": ("float64", "uint64", 2, 130, {}),
    "ragged": ("bfloat16", "uint16", 9, 259, {"gamma": 0.0}),
    "two_lanes": ("float16", "uint8", 20, 260, {}),
    "two_lanes_focal": ("float32", "uint32", 20, 70, {"gamma": 2.0, "ignore_label": 2**32 - 1}),
    "four_lanes": ("float32", "int64", 33, 68, {"p": 2, "ignore_label": -1}),
    "eight_lanes": ("float16", "int8", 105, 48, {}),
    "eight_lanes_root": ("bfloat16", "int8", 105, 24, {"gamma": 0.5, "ignore_label": -1}),
    "sixteen_lanes": ("float32", "int16", 300, 9, {}),
    "one_table_for_all_warps": ("float64", "int16", 700, 5, {"gamma": 1.0}),
    "misaligned": ("float16", "uint8", 4, 264, {"offset": 3}),
    "half_aligned": ("float16", "uint8", 4, 516, {}),
    "broadcast_labels": ("float32", "uint8", 3, 300, {"broadcast": True}),
    "channels_last": ("float32", "uint8", 5, 300, {"gamma": 2.0, "channels_last": True}),
    "channels_last_words": ("float16", "uint8", 4, 601, {"channels_last": True}),
    "channels_last_wide": ("float32", "int16", 8, 131, {"gamma": 0.0, "channels_last": True}),
    "channels_last_lanes": ("float16", "int64", 40, 40, {"channels_last": True}),
    "channels_last_ragged": ("bfloat16", "uint8", 150, 21, {"p": 2, "channels_last": True}),
    "apart": ("float16", "uint8", 4, 1203, {"ignore_label": 255}),
    "apart_lanes": ("float16", "uint8", 35, 77, {"gamma": 2.0}),
    "pairs_apart": ("bfloat16", "int64", 3, 514, {"gamma": 0.0}),
    "pairs_apart_single": ("float16", "bool", 1, 514, {}),
    "one_voxel": ("float32", "uint8", 3, 1, {}),
}
BINARY = {"activation": "sigmoid", "binary_gamma": 0.0}
GENERAL = {
    "nll": ("float32", "uint8", 4, 300, {"nll": True, "ignore_label": 2}),
    "nll_single": ("float16", "bool", 1, 300, {"nll": True, "gamma": 0.0}),
    "nll_lanes": ("bfloat16", "int8", 40, 40, {"nll": True, "gamma": 2.0}),
    "none": ("float64", "int64", 3, 130, {"activation": "none", "p": 2, "gamma": 0.0}),
    "sigmoids": ("float16", "uint16", 4, 300, {"activation": "sigmoid", "p": 3}),
    "sigmoids_all": ("float32", "uint8", 3, 132, {**BINARY, "gamma": 2.0, "nll": True}),
    "binary_single": ("float16", "uint8", 1, 300, {"binary_gamma": 0.0, "ignore_label": 255}),
    "binary_softmax": ("float32", "uint8", 3, 132, {"binary_gamma": 2.0}),
    "binary_lanes": ("bfloat16", "uint8", 20, 66, {**BINARY, "ignore_label": 255}),
    "binary_root": ("float64", "int32", 2, 130, {**BINARY, "binary_gamma": 0.5}),
    "soft": ("float32", "float32", 3, 132, {"ignore_label": -1, "target_square": True}),
    "soft_integers": (
        *("float16", "uint8", 2, 300),
        {"soft": True, "ignore_label": 255, "gamma": 0.0},
    ),
    "soft_one": (
        *("float32", "uint64", 1, 132),
        {**BINARY, "soft": True, "ignore_label": 2**64 - 1, "target_square": True},
    ),
    "soft_half": ("bfloat16", "float16", 4, 132, {**BINARY, "p": 2, "ignore_label": 4096}),
    "soft_bfloat": ("float64", "bfloat16", 3, 130, {"gamma": 0.5, "nll": True}),
    "soft_double": ("float32", "float64", 5, 130, {"activation": "none", "ignore_label": -7}),
    "soft_lanes": (
        *("float16", "float32", 30, 48),
        {**BINARY, "gamma": 2.0, "nll": True, "target_square": True},
    ),
    "soft_last": ("float32", "float32", 5, 130, {"gamma": 0.0, "channels_last": True}),
    "soft_last_words": (
        *("float16", "uint8", 4, 131),
        {**BINARY, "soft": True, "ignore_label": 255, "channels_last": True},
    ),
    "soft_last_lanes": ("bfloat16", "float32", 56, 20, {"channels_last": True}),
    "soft_first": ("float32", "float32", 4, 130, {"channels_last": "logits"}),
    "soft_apart": ("float16", "float16", 3, 301, {"gamma": 0.0, "target_square": True}),
    "soft_misaligned": ("float16", "float16", 2, 136, {"activation": "sigmoid", "offset": 3}),
    "zero_or_one": (
        *("float32", "float32", 3, 132),
        {**BINARY, "targets": "binary", "ignore_label": 255},
    ),
    "zero_or_one_integers": ("float16", "int8", 2, 136, {"targets": "binary", "ignore_label": -1}),
    "argmax": ("float16", "uint8", 4, 300, {"activation": "argmax", "ignore_label": 255}),
    "argmax_single": ("float32", "bool", 1, 130, {"activation": "argmax"}),
    "argmax_lanes": ("float32", "int16", 150, 10, {"activation": "argmax"}),
    "threshold": ("float32", "float32", 3, 130, {"activation": "threshold", "ignore_label": -1}),
}
LAYOUT = ("channels_last", "offset", "broadcast", "soft")


def laid_out(x, y, channels_last=False, offset=0, broadcast=False):
    """The same numbers with another memory layout."""
    if channels_last:
        x = last(x)
    if channels_last is True and y.shape == x.shape:
        y = last(y)
    if offset:
        wide = np.zeros((*x.shape[:2], x.shape[2] + 8), x.dtype)
        wide[..., offset : offset + x.shape[2]] = x
        x = wide[..., offset : offset + x.shape[2]]
    if broadcast:
        y = np.broadcast_to(y[:, :1], y.shape)
    return x, y


def last(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


@pytest.mark.parametrize(
    ("logits", "labels", "channels", "voxels", "options"),
    [*PLAIN.values(), *GENERAL.values()],
    ids=[*PLAIN, *GENERAL],
)
def test_against_the_reference(logits, labels, channels, voxels, options):
    layout = {name: value for name, value in options.items() if name in LAYOUT}
    options = {name: value for name, value in options.items() if name not in LAYOUT}
    soft = layout.pop("soft", False)
    x, y, cotangent = example(
        logits, labels, channels, voxels, soft=soft, targets=options.get("targets")
    )
    ignore = options.get("ignore_label")
    if ignore is not None:
        ignored = np.random.default_rng(1).random(y.shape) < 0.2
        y[ignored] = ignore
        if y.shape != x.shape:
            x[np.broadcast_to(ignored[:, None], x.shape)] = np.nan
        elif not Spec(**options).needs_softmax:  # which an ignored channel has a part in
            x[ignored] = np.nan
    x, y = laid_out(x, y, **layout)
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=RTOL[logits], atol=RTOL[logits])
    assert_gradient(grad, true_grad)


def assert_gradient(grad, true_grad, what="gradient"):
    tolerance = GRAD[str(grad.dtype)]
    scale = np.abs(np.nan_to_num(true_grad)).max(initial=0)
    assert_close(grad, true_grad, rtol=tolerance, atol=tolerance * scale, what=what)


# ---- layouts and launches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "voxels", "offset", "expected"),
    [("float16", 1024, 0, 8), ("float16", 1028, 0, 4), ("float32", 1024, 0, 4),
     ("float64", 1022, 0, 2), ("float16", 1024, 2, 2), ("float16", 1024, 3, 1),
     ("bfloat16", 1023, 0, 1)],
)  # fmt: skip
def test_voxels_are_loaded_together_as_far_as_they_are_whole_words(dtype, voxels, offset, expected):
    x, y, _ = example(dtype, "uint8", 2, voxels)
    x, y = laid_out(x, y, offset=offset)
    found = plan_of(call(x, y))
    assert (found.contiguous, found.word) == ("voxels", expected)
    assert found.voxels == plans.WORD_BYTES // plans.ITEMSIZE[dtype]


@pytest.mark.parametrize(
    ("dtype", "channels", "expected"),
    [("float16", 4, 4), ("float16", 24, 4), ("float32", 8, 4), ("float32", 6, 2),
     ("bfloat16", 40, 2), ("float16", 150, 2), ("float64", 3, 1), ("float16", 105, 1)],
)  # fmt: skip
def test_channels_are_loaded_together_as_far_as_they_are_whole_words(dtype, channels, expected):
    x, y, _ = example(dtype, "uint8", channels, 30)
    found = plan_of(call(last(x), y))
    assert (found.contiguous, found.word) == ("channels", expected)
    padded = last(np.zeros((2, channels + 1, 30), x.dtype))[:, :channels]
    assert plan_of(call(padded, y)).word <= 1 + channels % 2


def test_arrays_contiguous_along_different_axes():
    x, y, _ = example("float32", "float32", 4, 130)
    assert plan_of(call(last(x), last(y))).contiguous == "channels"
    assert plan_of(call(x, y)).contiguous == "voxels"
    for arrays in ((last(x), y), (x, last(y)), (x[..., ::2], y[..., ::2])):
        assert plan_of(call(*arrays)).contiguous == ""
    labels = np.zeros((2, 260), np.uint8)[:, ::2]
    assert plan_of(call(last(x), labels)).contiguous == ""


def plan_of(at, grad=None):
    job, _ = _gpu._prepared(at.logits, at.labels, at.spec, grad)
    return job.plan


@pytest.mark.parametrize(("voxels", "expected"), [(1, 1), (64, 1), (65, 2), (200, 4), (257, 8)])
def test_few_voxels_are_spread_over_the_threads_of_a_block(voxels, expected):
    """64 in these tests; more than half of them have a voxel, if there are as many."""
    x, y, _ = example("float16", "uint8", 2, voxels)
    assert plan_of(call(x, y)).voxels == expected


@pytest.mark.parametrize("options", [{"gamma": 2.0}, BINARY | {"nll": True}])
def test_bitwise_reproducible_in_any_order_of_threads_and_blocks(monkeypatch, options):
    gpu_simulator.install(monkeypatch, warps=8)  # as on a GPU
    x, y, cotangent = example("float32", "uint8", 17 if "gamma" in options else 9, 130)
    sums, grad = run(x, y, cotangent, **options)
    true_sums, _ = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=RTOL["float32"], atol=RTOL["float32"])
    # The simulator shuffles every launch anew.
    other_sums, other_grad = run(x, y, cotangent, **options)
    assert_bitwise_equal(other_sums, sums)
    assert_bitwise_equal(other_grad, grad)


@pytest.mark.parametrize("what", ["gradient", "labels"])
def test_arrays_inside_others_are_accessed_in_place(what):
    x, y, cotangent = example("float16", "uint8", 4, 264)
    at, grad = call(x, y), on_gpu(np.full_like(x, np.nan))
    if what == "gradient":
        wide = DeviceArray.holding(np.zeros((2, 4, 268), np.float16))
        grad = buffers.of(wide[..., 1:265], "out")
    else:
        labels = DeviceArray.holding(np.zeros((2, 267), np.uint8))[:, :264]
        labels.host[...] = y
        at = bound(at.logits, buffers.of(labels, "y"), {})
    _gpu.gradient(at.logits, at.labels, on_gpu(cotangent[:3]), grad, at.spec, 1)
    assert_gradient(grad.owner.host, expected(x, y, cotangent)[1])


@pytest.mark.parametrize(
    ("channels", "voxels", "blocks"),
    [(4, 512**3, 1024), (4, 2**24, 1024), (4, 4096, 2), (1000, 16384, 64)],
)
def test_number_of_blocks(monkeypatch, channels, voxels, blocks):
    for name, value in (("THREADS", 256), ("MAX_ROUNDS", 64), ("BLOCKS", 1024), ("MIN_RUN", 256)):
        monkeypatch.setattr(plans, name, value)
    plan = plans.plan("float16", "uint8", channels, Spec(), voxels)
    assert -(-voxels // plan.run(1, voxels)) == blocks


@pytest.mark.parametrize("logits", ["float16", "float64"])
@pytest.mark.parametrize(
    "what",
    [Spec(), Spec(gamma=0.0, nll=True, binary_gamma=0.0, targets="soft", target_square=True)],
)
def test_tables_of_sums_fit_into_shared_memory(monkeypatch, logits, what):
    for name, value in (("THREADS", 256), ("WARPS", 8)):
        monkeypatch.setattr(plans, name, value)
    for channels in range(1, plans.most_channels(logits, what) + 1):
        adjacent = min(channels & -channels, plans.WORD_BYTES)
        for contiguous in ("voxels", "channels"):
            plan = plans.plan(logits, "uint8", channels, what, 8, contiguous, adjacent)
            size = plan.tables * plan.table * max(4, plans.ITEMSIZE[logits])
            assert size <= plans.SHARED_BYTES


def test_many_runs():
    """More than the threads of the second launch load at a time."""
    x, y, cotangent = example("float32", "uint8", 2, 38 * 2 * RUN + 1)
    sums, _ = run(x, y, cotangent)
    assert_close(sums, expected(x, y, cotangent)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 0, 5), (2, 3, 4, 5, 0), (2, 3, 0, 5, 4)])
def test_no_strides_of_an_empty_array_are_refused(shape):
    layout = on_gpu(np.zeros(shape, np.float32)).layout
    assert _gpu._voxel_step(layout, 2) == 4


@pytest.mark.parametrize("each", [False, True, "alike"])
def test_a_scale_multiplies_the_cotangent(each):
    x, y, cotangent = example("float16", "uint8", 3, 264)
    scale = np.array([3, -0.25] if each else 1024, np.float32)
    if each == "alike":
        scale = np.broadcast_to(np.float32(7), 2)
    _, grad = run(x, y, cotangent, scale=scale)
    assert_gradient(grad, expected(x, y, cotangent * scale[..., None])[1])


# ---- the loss of the second launch ---------------------------------------------------------------

RATIO = {
    "pooled": False,
    "per_sample": False,
    "ignore_channel": -1,
    "share": 1.0,
    "start": 0.5,
    "excess": 0.0,
    "smooth": 0.0,
    "num": (-2.0, 1.0, 1.0),
    "den": (0.0, 1.0, 1.0),
}
RATIOS = {
    "mean": {"share": 0.25},
    "per_sample": {"per_sample": True, "excess": 0.5, "smooth": 0.5},
    "per_sample_ignoring": {"per_sample": True, "ignore_channel": 2, "share": 0.5},
    "pooled": {"pooled": True, "excess": 0.25, "smooth": 2.0, "weight": (0.2, 1.5, 0.7)},
    "jaccard": {
        "num": (-2.0, 1.0, 1.0),
        "den": (-1.0, 1.0, 1.0),
        "ignore_channel": 0,
        "smooth": 1.0,
    },
    "tversky": {"num": (-1.0, 0.3, 0.7), "den": (0.0, 0.3, 0.7), "weight": (1.0, 0.0, 2.5)},
}


def ratio_of(sums, weight, ratio):
    """The loss start + sum_c share w_c (num + excess) / (den + smooth), and its derivative."""
    basic = sums[:3].sum(1, keepdims=True) if ratio.pooled else sums[:3]
    num, den = (np.tensordot(by, basic, 1) for by in (ratio.num, ratio.den))
    num, den = num + ratio.excess, den + ratio.smooth
    den = np.where(den == 0, np.inf, den)
    factor = ratio.share * np.ones(sums.shape[2]) * (1 if weight is None else weight)
    factor[max(ratio.ignore_channel, 0)] *= ratio.ignore_channel < 0
    terms = factor * num / den
    value = ratio.start + terms.sum(1 if ratio.per_sample else None)
    derivative = np.zeros(sums.shape)
    score = (np.where(den < np.inf, den, 0) - num) / den
    for k in range(3):
        derivative[k] = (score * ratio.den[k] - (ratio.den[k] - ratio.num[k])) * factor / den
    return value, derivative


def check_ratio(at, **changed):
    """The kernel's value and derivative are those of its own sums."""
    weight = changed.pop("weight", None)
    ratio = SimpleNamespace(**RATIO | changed)
    value = empty(at, at.shape[1:2] if ratio.per_sample else (), "float32")
    derivative, sums = empty(at), empty(at)
    on_device = None if weight is None else on_gpu(np.resize(weight, at.shape[2]))
    _gpu.loss(at.logits, at.labels, value, derivative, at.spec, ratio, on_device, 1)
    assert gpu_simulator.Kernel.launched == ("statistics", "loss")
    _gpu.statistics(at.logits, at.labels, sums, at.spec, 1)
    weight = None if weight is None else np.resize(weight, at.shape[2])
    true_value, true_derivative = ratio_of(sums.owner.host, weight, ratio)
    assert_close(value.owner.host, true_value, rtol=2e-7)
    assert_close(derivative.owner.host, true_derivative, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("changed", RATIOS.values(), ids=RATIOS)
def test_the_loss_follows_in_the_second_launch(changed, channels):
    x, y, _ = example("float32", "uint8", channels, 300 // channels, samples=3)
    x[:, -1] = -200  # neither present nor predicted: 0/0
    y[y == channels - 1] = 0
    check_ratio(call(x, y), **changed)


def test_a_score_near_0_has_an_exact_derivative():
    """Of a class that is absent and hardly predicted, with smoothing that is small beside P: the
    score is not 1 minus the loss, which would lose its digits.
    """
    x, y, _ = example("float64", "uint8", 3, 60)
    x[:, -1], y = -15, y % 2
    at, smooth = call(x, y), 1e-14
    value, derivative, sums = empty(at, (2,), "float64"), empty(at), empty(at)
    ratio = SimpleNamespace(**RATIO | {"smooth": smooth, "per_sample": True})
    _gpu.loss(at.logits, at.labels, value, derivative, at.spec, ratio, None, 1)
    _gpu.statistics(at.logits, at.labels, sums, at.spec, 1)
    den = sums.owner.host[1, :, 2] + smooth
    assert_close(derivative.owner.host[1, :, 2], smooth / den / den, rtol=1e-14)
    assert_close(derivative.owner.host[0, :, 2], -2 / den, rtol=1e-14)


def test_a_loss_takes_nothing_from_an_ignored_channel():
    x, y, _ = example("float32", "float32", 3, 70, samples=3)
    x[:, 1] = np.nan
    at = call(x, y, activation="sigmoid")
    value, derivative = empty(at, (), "float32"), empty(at)
    ratio = SimpleNamespace(**RATIO | {"ignore_channel": 1})
    _gpu.loss(at.logits, at.labels, value, derivative, at.spec, ratio, None, 1)
    assert np.isfinite(value.owner.host)
    assert np.isfinite(derivative.owner.host).all()


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"soft": True}])
def test_a_loss_has_no_derivative_for_other_sums(options):
    soft = options.pop("soft", False)
    x, y, _ = example("float32", "float32" if soft else "uint8", 3, 70, samples=3)
    check_ratio(call(x, y, **options), **RATIOS["per_sample"])


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (0, 3, 0)])
def test_empty_arrays(shape):
    x, y = np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.uint8)
    sums, grad = run(x, y, np.ones((3, shape[0], 3)))
    assert sums.shape == (3, shape[0], 3)
    assert not sums.any()
    assert grad.shape == shape
    at = call(x, y)
    for name in ("mean", "per_sample", "pooled"):
        gpu_simulator.Kernel.launched = ()
        check_ratio(at, **RATIOS[name])


# ---- targets out of range, ignored labels --------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, BINARY, {"nll": True}])
def test_labels_out_of_range_make_their_sample_nan(options):
    x, y, cotangent = example("float32", "int64", 3, 130)
    y[1, [5, 99]] = -7, 2**40
    sums, grad = run(x, y, cotangent, **options)
    assert np.isnan(sums[:, 1]).all()
    assert not np.isnan(sums[:, 0]).any()
    assert not grad[1, :, [5, 99]].any()


@pytest.mark.parametrize(
    ("labels", "value", "channels", "targets"),
    [("float16", 1.01, 3, "soft"), ("float64", np.nan, 30, "soft"), ("int8", -1, 3, "soft"),
     ("float32", 0.5, 3, "binary"), ("bfloat16", 0.25, 30, "binary"), ("uint8", 2, 3, "binary")],
)  # fmt: skip
def test_targets_out_of_range_make_their_sample_nan(labels, value, channels, targets):
    x, y, cotangent = example("float32", labels, channels, 90, soft=True, targets=targets)
    y[1, 2, 5] = value
    sums, _ = run(x, y, cotangent, targets=targets)
    assert np.isnan(sums[:, 1]).all()
    assert not np.isnan(sums[:, 0]).any()


@pytest.mark.parametrize(
    ("dtype", "label", "can_be"),
    [("float16", 2048, True), ("float16", 2049, False), ("float16", 4096, True),
     ("float16", 65504, True), ("float16", 65536, False), ("bfloat16", -255, True),
     ("bfloat16", 257, False), ("float32", 2**24 + 1, False), ("float64", 2**24 + 1, True),
     ("float32", 0, True), ("float64", 2**70, False)],
)  # fmt: skip
def test_ignore_labels_of_floating_point_targets(dtype, label, can_be):
    assert _gpu._ignored(dtype, label) == ((label, label) if can_be else (-1, 0))
    if can_be:
        assert dtype_of(dtype).type(label) == label


def test_an_ignore_label_outside_the_range_of_the_dtype():
    x, y, cotangent = example("float64", "uint64", 2, 130)
    y[0, 3] = 2**64 - 1
    assert np.isnan(run(x, y, cotangent, ignore_label=-1)[0][:, 0]).all()
    assert not np.isnan(run(x, y, cotangent, ignore_label=2**64 - 1)[0]).any()


@pytest.mark.parametrize("options", [{}, {"nll": True}])
def test_a_byte_of_a_bool_is_0_or_1(options):
    x, y, cotangent = example("float32", "bool", 3, 130)
    y.view(np.uint8)[1, 5] = 2
    for ignore_label in (None, 2):
        sums, _ = run(x, y, cotangent, ignore_label=ignore_label, **options)
        assert np.isnan(sums[:, 1]).all()
        assert not np.isnan(sums[:, 0]).any()


@pytest.mark.parametrize("channels", [3, 30])
def test_a_voxel_without_valid_targets_contributes_nothing(channels):
    x, y, cotangent = example("float32", "float32", channels, 40)
    x[..., 7], y[..., 7] = np.nan, 255
    options = {"ignore_label": 255, "gamma": 1.0, "nll": True}
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=1e-6, atol=1e-6)
    assert_close(grad, true_grad, rtol=1e-5, atol=1e-5)
    assert not grad[..., 7].any()


# ---- infinities, as torch has them ---------------------------------------------------------------

# Each voxel is a separate sample, since a NaN affects all sums of a sample.


@pytest.mark.parametrize(
    ("channels", "options"),
    [(2, {}), (3, {"gamma": 0.0}), (3, {"gamma": 2.0}), (20, {"gamma": 0.5}), (3, {"nll": True}),
     (20, {"nll": True, "gamma": 0.0})],
)  # fmt: skip
def test_a_softmax_over_an_overflow_is_nan(channels, options):
    x, _, cotangent = example("float32", "uint8", channels, 1, samples=6)
    x[0, -1], x[1, :2], x[2], x[3, 0] = np.inf, np.inf, -np.inf, np.nan
    x[4, 0], x[4, -1] = np.nan, np.inf
    labels = np.array([0, 1, 1, channels - 1, 0, 1], np.uint8)
    sums, grad = run(x, labels[:, None], cotangent, **options)
    wrong, label = np.arange(5), labels[:5]
    fields = dict(zip(Spec(**options).fields, sums, strict=True))
    assert np.isnan(fields["pred_sum"][wrong]).all()
    assert np.isnan(fields["intersection"][wrong]).all()
    if "gamma" in options:
        assert np.isnan(fields["cross_entropy_sum"][wrong, label]).all()
    if "nll" in options:
        assert np.isnan(fields["nll_sum"][wrong]).all()
    np.testing.assert_array_equal(fields["target_sum"], np.eye(channels)[labels])
    assert np.isnan(grad[wrong]).all()
    assert np.isfinite(sums[:, 5]).all()
    assert np.isfinite(grad[5]).all()


@pytest.mark.parametrize(
    ("channels", "options"),
    [(2, {}), (3, {"gamma": 0.0}), (3, {"gamma": 2.0}), (20, {"gamma": 0.5}),
     (20, {"nll": True, "gamma": 2.0})],
)  # fmt: skip
def test_minus_infinity_beside_finite_logits_is_a_masked_class(channels, options):
    x, _, cotangent = example("float32", "uint8", channels, 1, samples=4)
    x[:2, -1], x[2:, :-1] = -np.inf, -np.inf
    y = np.array([[0], [channels - 1], [channels - 1], [0]], np.uint8)
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=1e-6, atol=1e-6)
    assert_close(grad, true_grad, rtol=2e-6, atol=2e-6)
    masked = np.isneginf(x[..., 0])
    assert not sums[1][masked].any()
    assert np.isfinite(grad).all()
    if "nll" not in options:
        assert not grad[masked & (y != np.arange(channels))].any()
    if "gamma" in options:
        assert np.isposinf(sums[3][1, -1])


@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.0}, {"gamma": 2.0, "p": 2}, {"gamma": 0.5, "nll": True}, {"binary_gamma": 0.0}],
)
def test_a_single_channel_is_1_or_0_at_infinity(options):
    x = np.array([np.inf, np.inf, -np.inf, -np.inf, np.nan], np.float32).reshape(5, 1, 1)
    y = np.array([[0], [1], [0], [1], [1]], np.uint8)
    cotangent = example("float32", "uint8", 1, 1, samples=5)[2]
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    np.testing.assert_array_equal(sums[1, :4], [[0, 1], [0, 1], [1, 0], [1, 0]])
    assert_close(sums[:, :4], true_sums[:, :4], rtol=1e-6, atol=1e-6)
    assert_close(grad, true_grad, rtol=2e-6, atol=2e-6)
    assert np.isnan(sums[1, 4]).all()
    assert np.isnan(grad[4]).all()


@pytest.mark.parametrize("binary_gamma", [0.0, 0.5, 2.0])
def test_binary_cross_entropy_at_infinity(binary_gamma):
    """B+ is -log b of the voxels of a class, B- is -log(1 - b) of the others; torch's
    binary_cross_entropy_with_logits has (1 - t) x, 0 times infinity, in either.
    """
    x, _, cotangent = example("float32", "uint8", 2, 1, samples=4)
    x[:2, 0], x[2:, 0] = np.inf, -np.inf
    y = np.array([[0], [1], [0], [1]], np.uint8)
    options = BINARY | {"binary_gamma": binary_gamma}
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    np.testing.assert_array_equal(sums[1, :, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(sums[3, :, 0], [np.nan, 0, np.nan, 0])
    np.testing.assert_array_equal(sums[4, :, 0], [0, np.inf, 0, np.nan])
    assert_close(sums[..., 1], true_sums[..., 1], rtol=1e-6, atol=1e-6)
    assert_close(grad, true_grad, rtol=2e-6, atol=2e-6)


def test_the_gradient_of_binary_cross_entropy_at_infinity_is_torchs():
    x = np.array([np.inf, np.inf, -np.inf, -np.inf], np.float32).reshape(4, 1, 1)
    y = np.array([0, 1, 0, 1], np.float32).reshape(4, 1, 1)
    cotangent = np.zeros((9, 4, 2))
    cotangent[3:5] = 1
    _, grad = run(x, y, cotangent, **BINARY)
    np.testing.assert_array_equal(grad.ravel(), [1, 0, 0, -1])  # sigmoid(x) - t


@pytest.mark.parametrize("channels", [1, 4, 20])
@pytest.mark.parametrize("options", [{"gamma": 2.0}, {"gamma": 0.0, "nll": True}, BINARY])
def test_ignored_voxels_contribute_nothing_whatever_their_logits(options, channels):
    if channels == 1 and options is BINARY:
        options = {"binary_gamma": 0.0}
    x, y, cotangent = example("float32", "uint8", channels, 34)
    y[:, ::5] = 255
    found = []
    for poison in (0, np.inf, -np.inf, np.nan):
        x[..., ::5] = poison
        found.append(run(x, y, cotangent, ignore_label=255, **options))
        assert not found[-1][1][..., ::5].any()
    for sums, grad in found[1:]:
        assert_bitwise_equal(sums, found[0][0])
        assert_bitwise_equal(grad, found[0][1])


# ---- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 150])
def test_the_first_of_equal_logits_wins(channels):
    x, y, cotangent = example("float32", "int16", channels, 5)
    x[:] = np.minimum(x.astype(int), 2)
    sums, _ = run(x, y, cotangent, activation="argmax")
    winners = np.stack([np.bincount(sample, minlength=channels) for sample in x.argmax(1)])
    np.testing.assert_array_equal(sums[1], winners)


@pytest.mark.parametrize("channels", [3, 20])
def test_decisions_rank_nan_as_infinity(channels):
    x, y, cotangent = example("float32", "uint8", channels, 40)
    x[:, channels // 2, ::3], x[:, 0, 1::7] = np.nan, np.inf
    sums, _ = run(x, y, cotangent, activation="argmax")
    assert_bitwise_equal(sums, expected(x, y, cotangent, activation="argmax")[0])


# ---- extremes ------------------------------------------------------------------------------------


def test_a_gamma_beyond_any_number_is_the_largest():
    x, y, cotangent = example("float32", "uint8", 3, 40)
    sums, grad = run(x, y, cotangent, **BINARY | {"binary_gamma": 1e39})
    assert np.isfinite(sums).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("logits", "channels", "gamma"),
    [("float16", 1, 0.5), ("float32", 5, 2.0), ("float64", 3, 0.5), ("float32", 33, 0.0)],
)
def test_logits_of_any_size_have_a_finite_cross_entropy(logits, channels, gamma):
    x, y, cotangent = example(logits, "uint8", channels, 132)
    x = (x * (1000 if logits == "float16" else 1e4)).astype(x.dtype)
    sums, grad = run(x, y, cotangent, gamma=gamma)
    true_sums, true_grad = expected(x, y, cotangent, gamma=gamma)
    assert np.isfinite(true_sums).all()
    assert true_sums[3].max() > 1e4
    assert_close(sums, true_sums, rtol=RTOL[logits], atol=RTOL[logits])
    assert_gradient(grad, true_grad)


@pytest.mark.parametrize(("channels", "gamma"), [(1, 0.5), (4, 0.0), (4, 2.0)])
def test_probabilities_near_1_have_an_exact_cross_entropy(channels, gamma):
    """Each voxel is more certain than the one before, up to a probability that rounds to 1."""
    x = np.zeros((22, channels, 1), np.float32)
    x[:, -1, 0] = np.arange(22)
    y = np.full((22, 1), max(2, channels) - 1, np.uint8)
    cotangent = np.zeros((4, 22, max(2, channels)))
    cotangent[3] = 1
    sums, grad = run(x, y, cotangent, gamma=gamma)
    true_sums, true_grad = expected(x, y, cotangent, gamma=gamma)
    assert_close(sums[3], true_sums[3], rtol=3e-7, atol=1e-7)
    assert_close(grad, true_grad, rtol=3e-7, atol=2e-7)


# ---- the comparisons themselves ------------------------------------------------------------------


class Faults:
    """Operations with one fault, which a comparison must detect."""

    @staticmethod
    def half(ops):
        ops.exp = lambda x, exp=ops.exp: np.float32(np.float16(exp(x)))

    @staticmethod
    def lonely(ops):
        ops.shuffle = lambda mask, value, distance: value * 0

    @staticmethod
    def coarse(ops):
        ops.log = lambda x, log=ops.log: np.float32(np.float16(log(x)))

    @staticmethod
    def unmodulated(ops):
        ops.modulation_slope = lambda x: x

    @staticmethod
    def unread(ops):
        ops.load_targets = lambda address, at, condition: (np.int64(0),) * 4

    @staticmethod
    def beyond(ops):
        ops.load_logits = lambda address, at, condition, load=ops.load_logits: load(
            address, at + 16, condition
        )


class GeneralFaults:
    """Faults in operations that only the general kernels use."""

    @staticmethod
    def crude(ops):
        def sigmoids(x, whole=ops.sigmoids):
            b, not_b, *logs = whole(x)
            return np.float32(np.float16(b)), np.float32(np.float16(not_b)), *logs

        ops.sigmoids = sigmoids

    @staticmethod
    def rough(ops):
        def sigmoids(x, whole=ops.sigmoids):
            *own, positive, negative = whole(x)
            return *own, np.float32(np.float16(positive)), np.float32(np.float16(negative))

        ops.sigmoids = sigmoids

    @staticmethod
    def unmodulated(ops):
        ops.binary_modulation = lambda x, nll: x


@pytest.mark.parametrize(
    ("faults", "fault"),
    [
        (faults, name)
        for faults in (Faults, GeneralFaults)
        for name in vars(faults)
        if name[0] != "_"
    ],
)
def test_the_comparison_detects_faults(monkeypatch, faults, fault):
    def broken(plan, cuda, whole=gpu_simulator.operations):
        ops = whole(plan, cuda)
        getattr(faults, fault)(ops)
        return ops

    monkeypatch.setattr(gpu_simulator, "operations", broken)
    options = {"gamma": 2.0} if faults is Faults else {**BINARY, "binary_gamma": 2.0}
    with pytest.raises(AssertionError):
        test_against_the_reference("float32", "uint8", 4, 264, options)
