"""The CUDA kernels in a simulator, against the reference: no GPU, no compiler."""

import itertools
from dataclasses import replace

import gpu_simulator
import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from gpu_simulator import DeviceArray, dtype_of

from dice_core import _gpu, _gpu_plan, _reference, buffers, losses, spec
from dice_core.spec import Spec

RTOL = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-14}
GRAD = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-14}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """With short runs, so that small volumes have several blocks."""
    gpu_simulator.install(monkeypatch)
    monkeypatch.setattr(_gpu_plan, "ROUNDS", 2)
    monkeypatch.setattr(_gpu_plan, "BLOCKS", 1)


def example(logits, labels, channels, voxels, samples=2, dense=False):
    """Logits, labels or dense targets, and a cotangent of every sum there may be."""
    rng = np.random.default_rng(channels * 1000 + voxels)
    x = (rng.standard_normal((samples, channels, voxels)) * 3).astype(dtype_of(logits))
    cotangent = rng.standard_normal((8, samples, max(2, channels)))
    if labels in _gpu_plan.ITEMSIZE:
        return x, rng.random(x.shape).round(1).astype(dtype_of(labels)), cotangent
    classes = min(max(2, channels), 2 if labels == "bool" or dense else 127)
    shape = x.shape if dense else (samples, voxels)
    return x, rng.integers(0, classes, shape).astype(labels), cotangent


def on_gpu(array, name="array"):
    return buffers.of(DeviceArray.holding(array), name)


def nothing(at, shape=None, dtype="float64"):
    """Memory of the GPU for a result."""
    shape = at.sums_shape if shape is None else shape
    return buffers.of(buffers.empty(at.logits, shape, dtype), "new")


def asked(activation="softmax", **options):
    """`spec.asked`, also for decisions."""
    return replace(spec.asked(**options), activation=activation)


def call(x, y, **options):
    return spec.call(on_gpu(x), on_gpu(y), asked(**options))


def run(x, y, cotangent, scale=None, **options):
    """(sums, gradient) of the kernels, for as much of the cotangent as there are sums."""
    at = call(x, y, **options)
    sums, grad = nothing(at), on_gpu(np.full_like(x, np.nan))
    assert _gpu.statistics(at.logits, at.labels, sums, at.spec, 1) == 0
    if at.spec.activation not in spec.ACTIVATIONS:  # decisions have none
        return sums.owner.host, np.zeros_like(x)
    cotangent = on_gpu(cotangent[: len(at.spec.statistics), :, : at.classes].copy())
    scale = None if scale is None else on_gpu(scale)
    assert _gpu.gradient(at.logits, at.labels, cotangent, grad, at.spec, 1, scale) == 0
    return sums.owner.host, grad.owner.host


def expected(x, y, cotangent, **options):
    x = x.astype(np.float64)
    y = y.astype(np.float64) if y.dtype == dtype_of("bfloat16") else y
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), asked(**options))
    cotangent = cotangent[: len(at.spec.statistics), :, : at.classes].copy()
    sums, grad = np.empty(at.sums_shape), np.empty_like(x)
    _reference.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 1)
    if at.spec.activation not in spec.ACTIVATIONS:
        return sums, np.zeros_like(x)
    _reference.gradient(
        at.logits, at.labels, buffers.of(cotangent, "c"), buffers.of(grad, "g"), at.spec, 1
    )
    return sums, grad


CASES = {
    "sigmoid": ("float32", "bool", 1, 1028, {}),
    "sigmoid_power": ("float16", "uint8", 1, 1024, {"p": 2}),
    "two": ("bfloat16", "uint8", 2, 1200, {}),
    "three_scalar": ("float32", "int64", 3, 701, {}),
    "four_ignored": ("float32", "uint8", 4, 1024, {"ignore_label": 255}),
    "five_negative": ("float16", "int16", 5, 600, {"p": 2, "ignore_label": -1}),
    "double": ("float64", "int32", 3, 512, {"p": 3}),
    "unsigned": ("float32", "uint32", 7, 300, {"ignore_label": 2**32 - 1}),
    "wide_unsigned": ("float64", "uint64", 2, 130, {}),
    "ragged": ("bfloat16", "uint16", 9, 515, {}),
    "lanes": ("float16", "uint8", 20, 512, {}),
    "four_lanes": ("float32", "int64", 33, 260, {"p": 2, "ignore_label": -1}),
    "eight_lanes": ("float16", "int8", 105, 96, {}),
    "all_lanes": ("float32", "int16", 300, 20, {}),
    "crowded": ("float64", "int16", 600, 10, {}),
    "misaligned": ("float16", "uint8", 4, 1024, {"offset": 3}),
    "half_aligned": ("float16", "uint8", 4, 1028, {}),
    "broadcast_labels": ("float32", "uint8", 3, 600, {"broadcast": True}),
    "channels_last": ("float32", "uint8", 5, 700, {"channels_last": True}),
    "channels_last_lanes": ("float16", "int64", 40, 130, {"channels_last": True}),
    "one_voxel": ("float32", "uint8", 3, 1, {}),
    "entropy_sigmoid": ("float16", "bool", 1, 1024, {"gamma": 0.0}),
    "entropy_two": ("bfloat16", "uint8", 2, 600, {"gamma": 0.0, "ignore_label": 255}),
    "entropy_double": ("float64", "int32", 5, 512, {"gamma": 0.0, "p": 2}),
    "entropy_eight_lanes": ("float32", "int8", 105, 96, {"gamma": 0.0, "ignore_label": -1}),
    "root_sigmoid": ("float32", "uint8", 1, 700, {"gamma": 0.5, "ignore_label": 255}),
    "root_two": ("float64", "int64", 2, 300, {"gamma": 0.5}),
    "root_five": ("float16", "int16", 5, 600, {"gamma": 0.5, "p": 2, "ignore_label": -1}),
    "root_lanes": ("bfloat16", "uint8", 20, 512, {"gamma": 0.5}),
    "focal_sigmoid": ("float64", "bool", 1, 300, {"gamma": 2.0}),
    "focal_two": ("float32", "int64", 2, 701, {"gamma": 2.0}),
    "focal_five": ("bfloat16", "uint8", 5, 700, {"gamma": 2.0, "channels_last": True}),
    "focal_lanes": ("float32", "uint32", 20, 260, {"gamma": 2.0, "ignore_label": 2**32 - 1}),
    "focal_eight_lanes": ("float16", "uint8", 105, 96, {"gamma": 2.0, "p": 3}),
    "focal_all_lanes": ("float64", "int16", 600, 10, {"gamma": 1.0}),
}
BINARY = {"activation": "sigmoid", "binary_gamma": 0.0}
WHOLE = {**BINARY, "dense": True}
GENERAL = {
    "smoothing": ("float32", "uint8", 4, 600, {"smoothing": True, "ignore_label": 255}),
    "smoothing_single": ("float16", "bool", 1, 700, {"smoothing": True, "gamma": 0.0}),
    "smoothing_lanes": ("bfloat16", "int8", 40, 130, {"smoothing": True, "gamma": 2.0}),
    "none": ("float32", "uint8", 3, 300, {"activation": "none", "p": 2}),
    "none_entropy": ("float64", "int64", 3, 130, {"activation": "none", "gamma": 0.0}),
    "sigmoids": ("float16", "uint8", 4, 512, {"activation": "sigmoid", "ignore_label": 255}),
    "sigmoids_power": ("float64", "uint16", 5, 130, {"activation": "sigmoid", "p": 3}),
    "sigmoids_entropy": ("float32", "uint8", 3, 300, {**BINARY, "gamma": 2.0, "smoothing": True}),
    "binary_single": ("float16", "uint8", 1, 700, {"binary_gamma": 0.0, "ignore_label": 255}),
    "binary_softmax": ("float32", "uint8", 3, 300, {"binary_gamma": 2.0}),
    "binary_lanes": ("bfloat16", "uint8", 20, 260, {**BINARY, "ignore_label": 255}),
    "binary_root": ("float64", "int32", 2, 130, {**BINARY, "binary_gamma": 0.5}),
    "dense": ("float32", "float32", 3, 300, {"ignore_label": -1}),
    "dense_whole": ("float16", "uint8", 2, 600, {"dense": True, "ignore_label": 255, "gamma": 0.0}),
    "dense_one": ("float32", "uint64", 1, 300, {**WHOLE, "ignore_label": 2**64 - 1}),
    "dense_half": ("bfloat16", "float16", 4, 512, {**BINARY, "p": 2, "ignore_label": 4096}),
    "dense_bfloat": ("float64", "bfloat16", 3, 130, {"gamma": 0.5, "smoothing": True}),
    "dense_double": ("float32", "float64", 5, 260, {"activation": "none", "ignore_label": -7}),
    "dense_lanes": ("float16", "float32", 30, 96, {**BINARY, "gamma": 2.0, "smoothing": True}),
    "dense_last": ("float32", "float32", 5, 300, {"gamma": 0.0, "channels_last": True}),
    "dense_misaligned": ("float16", "float16", 2, 512, {"activation": "sigmoid", "offset": 3}),
    "argmax": ("float16", "uint8", 4, 600, {"activation": "argmax", "ignore_label": 255}),
    "argmax_single": ("float32", "bool", 1, 300, {"activation": "argmax"}),
    "argmax_lanes": ("float32", "int16", 150, 40, {"activation": "argmax"}),
    "threshold": ("float32", "float32", 3, 300, {"activation": "threshold", "ignore_label": -1}),
}


def split(options):
    """What to sum, and the rest."""
    names = "activation", "p", "ignore_label", "gamma", "smoothing", "binary_gamma"
    return (
        {name: value for name, value in options.items() if name in names},
        {name: value for name, value in options.items() if name not in names},
    )


def laid_out(x, y, channels_last=False, offset=0, broadcast=False):
    """The same numbers elsewhere in memory."""
    if channels_last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    if offset:
        wide = np.zeros((*x.shape[:2], x.shape[2] + 8), x.dtype)
        wide[..., offset : offset + x.shape[2]] = x
        x = wide[..., offset : offset + x.shape[2]]
    if broadcast:
        y = np.broadcast_to(y[:, :1], y.shape)
    return x, y


@pytest.mark.parametrize(
    ("logits", "labels", "channels", "voxels", "options"),
    [*CASES.values(), *GENERAL.values()],
    ids=[*CASES, *GENERAL],
)
def test_against_the_reference(logits, labels, channels, voxels, options):
    options, layout = split(options)
    x, y, cotangent = example(logits, labels, channels, voxels, dense=layout.pop("dense", False))
    ignore = options.get("ignore_label")
    if ignore is not None:
        ignored = np.random.default_rng(1).random(y.shape) < 0.2
        y[ignored] = ignore
        if y.shape != x.shape:
            x[np.broadcast_to(ignored[:, None], x.shape)] = np.nan
        elif not asked(**options).softmax:  # a channel's own
            x[ignored] = np.nan
    x, y = laid_out(x, y, **layout)
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=RTOL[logits], atol=RTOL[logits])
    scale = np.abs(true_grad).max()
    assert_close(grad.astype(np.float64), true_grad, rtol=GRAD[logits], atol=GRAD[logits] * scale)


@pytest.mark.parametrize(
    ("dtype", "voxels", "offset", "expected"),
    [("float16", 1024, 0, 8), ("float16", 1028, 0, 4), ("float32", 1024, 0, 4),
     ("float64", 1022, 0, 2), ("float16", 1024, 2, 2), ("float16", 1024, 3, 1),
     ("bfloat16", 1023, 0, 1)],
)  # fmt: skip
def test_voxels_are_read_together_as_far_as_they_lie_on_whole_words(
    dtype, voxels, offset, expected
):
    x, y, _ = example(dtype, "uint8", 2, voxels)
    x, y = laid_out(x, y, offset=offset)
    at = call(x, y)
    job, _ = _gpu._prepared(at.logits, at.labels, at.spec)
    assert job.plan.voxels == expected


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, BINARY | {"smoothing": True}])
def test_same_bits_in_any_order_of_threads_and_blocks(monkeypatch, options):
    gpu_simulator.install(monkeypatch, warps=8)  # as on a GPU
    x, y, cotangent = example("float32", "uint8", 20, 512)
    sums, grad = run(x, y, cotangent, **options)
    true_sums, _ = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=RTOL["float32"], atol=RTOL["float32"])
    # The simulator shuffles every launch anew.
    other_sums, other_grad = run(x, y, cotangent, **options)
    assert_same_bits(other_sums, sums)
    assert_same_bits(other_grad, grad)


@pytest.mark.parametrize("what", ["gradient", "labels"])
def test_arrays_between_others_are_read_and_written_as_they_lie(what):
    x, y, cotangent = example("float16", "uint8", 4, 1024)
    wide = np.zeros((2, 4, 1028), np.float16), np.zeros((2, 1027), np.uint8)
    at, grad = call(x, y), on_gpu(np.full_like(x, np.nan))
    if what == "gradient":
        grad = buffers.of(DeviceArray.holding(wide[0])[..., 1:1025], "out")
    else:
        labels = DeviceArray.holding(wide[1])[:, :1024]
        labels.host[...] = y
        at = spec.call(at.logits, buffers.of(labels, "y"), p=1, ignore_label=None)
    _gpu.gradient(at.logits, at.labels, on_gpu(cotangent[:3]), grad, at.spec, 1)
    _, true_grad = expected(x, y, cotangent)
    atol = GRAD["float16"] * np.abs(true_grad).max()
    got = grad.owner.host.astype(np.float64)
    assert_close(got, true_grad, rtol=GRAD["float16"], atol=atol)


@pytest.mark.parametrize(
    ("channels", "voxels", "blocks"),
    [(4, 512**3, 1024), (4, 2**24, 1024), (4, 4096, 2), (1000, 16384, 64)],
)
def test_how_many_blocks_there_are(monkeypatch, channels, voxels, blocks):
    for name, value in (("THREADS", 256), ("ROUNDS", 64), ("BLOCKS", 1024)):
        monkeypatch.setattr(_gpu_plan, name, value)
    plan = _gpu_plan.plan("float16", "uint8", channels, Spec(), 8)
    assert -(-voxels // plan.run(1, voxels)) == blocks


@pytest.mark.parametrize("shape", [(2, 3, 4, 0, 5), (2, 3, 4, 5, 0), (2, 3, 0, 5, 4)])
def test_no_strides_of_nothing_are_refused(shape):
    layout = on_gpu(np.zeros(shape, np.float32)).layout
    assert _gpu._voxel_step(layout, 2) == 4


@pytest.mark.parametrize("each", [False, True, "alike"])
def test_a_scale_multiplies_the_cotangent(each):
    x, y, cotangent = example("float16", "uint8", 3, 520)
    scale = np.array([3, -0.25] if each else 1024, np.float32)
    if each == "alike":
        scale = np.broadcast_to(np.float32(7), 2)
    _, grad = run(x, y, cotangent, scale=scale)
    _, true_grad = expected(x, y, cotangent * scale[..., None])
    atol = GRAD["float16"] * np.abs(true_grad).max()
    assert_close(grad.astype(np.float64), true_grad, rtol=GRAD["float16"], atol=atol)


@pytest.mark.parametrize(
    ("channels", "smooth", "reduction"),
    [*itertools.product([1, 4], [0.0, 0.5], spec.REDUCTIONS), (40, 0.5, "batch")],
)
def test_the_loss_and_its_derivative_follow_in_the_second_launch(channels, smooth, reduction):
    x, y, _ = example("float32", "uint8", channels, 300 // channels, samples=3)
    y[y == 1] = 0
    x[:, -1] = -200  # neither there nor predicted
    y[y == channels - 1] = 0
    at = call(x, y, ignore_label=-1)
    weight = np.arange(1, at.classes + 1) / 7 if smooth else None
    check_ratio(at, losses.dice(weight, 0 if smooth else -1, smooth, 1, reduction))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "term",
    [
        losses.Jaccard(smooth=(0.25, 2)),
        losses.Dice(smooth=(1, 0), ignore_channel=2, divisor="kept", reduction="none"),
        losses.Tversky(alpha=0.3, beta=0.7, weight=[1, 2, 3], divisor="kept", ignore_channel=0),
        losses.Dice(divisor="kept", pool="batch", reduction="sum"),
    ],
    ids=str,
)
def test_any_ratio_follows_in_the_second_launch(term, dense):
    x, y, _ = example("float32", "float32" if dense else "uint8", 3, 100, samples=3)
    check_ratio(call(x, y), term)


def check_ratio(at, term):
    """Value and derivative are those that NumPy finds for the sums."""
    ratio, weight = term.ratio(3, at.classes), next(iter(term.weights), None)
    value = nothing(at, (3,) if term.reduction == "none" else (), "float32")
    derivative, sums = nothing(at), nothing(at)
    on_device = None if weight is None else on_gpu(weight)
    _gpu.loss(at.logits, at.labels, value, derivative, at.spec, ratio, on_device)
    assert gpu_simulator.Kernel.launched == ("statistics", "loss")
    _gpu.statistics(at.logits, at.labels, sums, at.spec, 1)
    true_value, true_derivative = term.with_derivative(sums.owner.host, at.spec.statistics)
    assert_close(value.owner.host, np.asarray(true_value), rtol=2e-7, atol=0)
    assert_close(derivative.owner.host, true_derivative, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0), (0, 3, 0)])
@pytest.mark.parametrize("reduction", spec.REDUCTIONS)
def test_nothing_to_sum(shape, reduction):
    x, y = np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.uint8)
    sums, grad = run(x, y, np.ones((3, shape[0], 3)))
    assert sums.shape == (3, shape[0], 3)
    assert not sums.any()
    assert grad.shape == shape
    at = call(x, y)
    value = nothing(at, shape[:1] if reduction == "none" else (), "float32")
    dice = losses.dice(None, -1, 0, 1, reduction)
    ratio = dice.ratio(shape[0], at.classes)
    _gpu.loss(at.logits, at.labels, value, nothing(at), at.spec, ratio, None)
    np.testing.assert_array_equal(value.owner.host, dice(np.zeros(at.sums_shape)))


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 2.0}, BINARY, {"smoothing": True}]
)
def test_bad_labels_make_their_sample_nan(options):
    x, y, cotangent = example("float32", "int64", 3, 600)
    y[1, [5, 99]] = -7, 2**40
    sums, grad = run(x, y, cotangent, **options)
    assert np.isnan(sums[:, 1]).all()
    assert not np.isnan(sums[:, 0]).any()
    assert not grad[1, :, [5, 99]].any()


@pytest.mark.parametrize(("labels", "bad"), [("float16", 1.01), ("float64", np.nan), ("int8", -1)])
@pytest.mark.parametrize("channels", [3, 30])
def test_bad_targets_make_their_sample_nan(labels, bad, channels):
    x, y, cotangent = example("float32", labels, channels, 90, dense=True)
    y[1, 2, 5] = bad
    sums, _ = run(x, y, cotangent)
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


def test_an_ignore_label_that_labels_cannot_be():
    x, y, cotangent = example("float64", "uint64", 2, 130)
    y[0, 3] = 2**64 - 1
    assert np.isnan(run(x, y, cotangent, ignore_label=-1)[0][:, 0]).all()
    assert not np.isnan(run(x, y, cotangent, ignore_label=2**64 - 1)[0]).any()


def test_infinities_are_as_in_the_limit():
    x = np.zeros((1, 3, 4), np.float32)
    x[0, 0] = np.inf, -np.inf, -np.inf, np.nan
    x[0, 1:, 2] = -np.inf
    y = np.array([[0, 1, 1, 2]])
    for voxel, scores in enumerate(([1, 0, 0], [0, 0.5, 0.5], [np.nan] * 3, [np.nan] * 3)):
        at = np.s_[..., voxel : voxel + 1]
        sums, _ = run(x[at], y[at], np.ones((3, 1, 3)))
        np.testing.assert_array_equal(sums[1, 0], scores)


@pytest.mark.parametrize("channels", [4, 150])
def test_the_first_of_equal_logits_wins(channels):
    x, y, cotangent = example("float32", "int16", channels, 5)
    x[:] = np.minimum(x.astype(int), 2)
    sums, _ = run(x, y, cotangent, activation="argmax")
    winners = np.stack([np.bincount(sample, minlength=channels) for sample in x.argmax(1)])
    np.testing.assert_array_equal(sums[1], winners)


@pytest.mark.parametrize("channels", [3, 20])
def test_decisions_take_nan_for_infinite(channels):
    x, y, cotangent = example("float32", "uint8", channels, 40)
    x[:, channels // 2, ::3], x[:, 0, 1::7] = np.nan, np.inf
    sums, _ = run(x, y, cotangent, activation="argmax")
    assert_same_bits(sums, expected(x, y, cotangent, activation="argmax")[0])


@pytest.mark.parametrize("channels", [3, 20])
def test_nan_beside_infinity_stays_nan(channels):
    x, y, cotangent = example("float32", "uint8", channels, 1)
    x[:, 0], x[:, 1], y[:] = np.nan, np.inf, 1
    sums, grad = run(x, y, cotangent, gamma=0.0, smoothing=True)
    assert np.isnan(sums[:2]).any(1).all()
    assert np.isnan(sums[3:, :, 1]).all()
    assert np.isnan(grad).all()


@pytest.mark.parametrize("channels", [3, 30])
def test_a_voxel_without_targets_is_nothing_whatever_its_logits(channels):
    x, y, cotangent = example("float32", "float32", channels, 40)
    x[..., 7], y[..., 7] = np.nan, 255
    options = {"ignore_label": 255, "gamma": 1.0, "smoothing": True}
    sums, grad = run(x, y, cotangent, **options)
    true_sums, true_grad = expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=1e-6, atol=1e-6)
    assert_close(grad, true_grad, rtol=1e-5, atol=1e-5)
    assert not grad[..., 7].any()


def test_a_gamma_beyond_any_number_is_the_largest():
    x, y, cotangent = example("float32", "uint8", 3, 40)
    sums, grad = run(x, y, cotangent, **BINARY | {"binary_gamma": 1e39})
    assert np.isfinite(sums).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("binary_gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinities_of_the_general_sums_are_as_in_the_limit(activation, binary_gamma, infinity):
    x, y, cotangent = example("float32", "uint8", 3, 6, samples=1)
    x[0, 1, ::2] = infinity
    options = {"activation": activation, "binary_gamma": binary_gamma}
    for label in range(3):
        y[:] = label
        for voxel in range(2):
            one = x[..., voxel : voxel + 1], y[:, voxel : voxel + 1], cotangent
            sums, grad = run(*one, **options)
            with np.errstate(invalid="ignore"):
                true_sums, true_grad = expected(*one, **options)
            what = f"label {label} of voxel {voxel}"
            assert_close(sums, true_sums, rtol=1e-6, atol=1e-6, what=what)
            assert_close(grad, true_grad, rtol=2e-6, atol=2e-6, what=what)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("logits", "channels"), [("float16", 1), ("float32", 5), ("float64", 3), ("float32", 33)]
)
def test_logits_of_any_size_have_a_finite_entropy(logits, channels, gamma):
    x, y, cotangent = example(logits, "uint8", channels, 260)
    x = (x * (1000 if logits == "float16" else 1e4)).astype(x.dtype)
    sums, grad = run(x, y, cotangent, gamma=gamma)
    true_sums, true_grad = expected(x, y, cotangent, gamma=gamma)
    assert np.isfinite(true_sums).all()
    assert true_sums[3].max() > 1e4
    assert_close(sums, true_sums, rtol=RTOL[logits], atol=RTOL[logits])
    scale = np.abs(true_grad).max()
    assert_close(grad.astype(np.float64), true_grad, rtol=GRAD[logits], atol=GRAD[logits] * scale)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("channels", [1, 3, 40])
def test_the_entropy_of_infinities_is_as_in_the_limit(channels, gamma):
    """One voxel is +inf at one of the last two classes, one at both, one -inf at the last, one all
    -inf, one NaN at the first; its label is each class in turn.
    """
    last = slice(-1, None) if channels == 1 else slice(-2, None)
    x = np.random.default_rng(1).standard_normal((1, channels, 5)).astype(np.float32)
    x[0, -1, 0], x[0, last, 1], x[0, -1, 2], x[0, :, 3] = np.inf, np.inf, -np.inf, -np.inf
    x[0, 0, 4] = np.nan
    x[0, -1, 4] = np.nan if channels == 1 else np.inf
    for label, voxel in itertools.product({0, max(2, channels) - 1}, range(x.shape[2])):
        y, one = np.full((1, 1), label, np.uint8), x[..., voxel : voxel + 1]
        cotangent = example("float32", "uint8", channels, 1, samples=1)[2]
        sums, grad = run(one, y, cotangent, gamma=gamma)
        true_sums, true_grad = expected(one, y, cotangent, gamma=gamma)
        what = f"label {label} of voxel {voxel}"
        assert_close(sums[3], true_sums[3], rtol=1e-6, atol=1e-6, what=what)
        assert_close(grad, true_grad, rtol=2e-6, atol=2e-6, what=what)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("channels", [1, 4])
def test_sure_scores_have_their_entropy(channels, gamma):
    """Each voxel is surer than the one before, up to a score that float32 takes for 1."""
    x = np.zeros((22, channels, 1), np.float32)
    x[:, -1, 0] = np.arange(22)
    y = np.full((22, 1), max(2, channels) - 1, np.uint8)
    cotangent = np.zeros((4, 22, max(2, channels)))
    cotangent[3] = 1
    sums, grad = run(x, y, cotangent, gamma=gamma)
    true_sums, true_grad = expected(x, y, cotangent, gamma=gamma)
    assert_close(sums[3], true_sums[3], rtol=3e-7, atol=1e-7)
    assert_close(grad, true_grad, rtol=3e-7, atol=2e-7)


class Faults:
    """Operations with one fault, which a comparison must find."""

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
    def unfocused(ops):
        ops.focus_slope = lambda x: x

    @staticmethod
    def unread(ops):
        ops.load_targets = lambda address, at: (np.int64(0),) * 4

    @staticmethod
    def beyond(ops):
        ops.load_logits = lambda address, at, load=ops.load_logits: load(address, at + 16)


class GeneralFaults:
    """Of operations that the general kernels alone use."""

    @staticmethod
    def crude(ops):
        ops.sigmoid = lambda x, sigmoid=ops.sigmoid: np.float32(np.float16(sigmoid(x)))

    @staticmethod
    def rough(ops):
        ops.softplus = lambda x, softplus=ops.softplus: np.float32(np.float16(softplus(x)))

    @staticmethod
    def unfocused(ops):
        ops.binary_focus = lambda x: x


@pytest.mark.parametrize(
    ("faults", "fault"),
    [
        (faults, name)
        for faults in (Faults, GeneralFaults)
        for name in vars(faults)
        if name[0] != "_"
    ],
)
def test_the_comparison_bites(monkeypatch, faults, fault):
    def broken(plan, cuda, whole=gpu_simulator.operations):
        ops = whole(plan, cuda)
        getattr(faults, fault)(ops)
        return ops

    monkeypatch.setattr(gpu_simulator, "operations", broken)
    options = {"gamma": 2.0} if faults is Faults else {**BINARY, "binary_gamma": 2.0}
    with pytest.raises(AssertionError):
        test_against_the_reference("float32", "uint8", 4, 512, options)
