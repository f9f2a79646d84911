"""The CUDA kernels in a simulator, against the reference: no GPU, no compiler."""

import numpy as np
import pytest
from compare import assert_close, assert_same_bits
from gpu_simulator import Simulator, dtype_of, operations

from dice_core import _gpu_kernels, _reference, buffers, spec

RTOL = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-14}
GRAD = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6, "float64": 1e-14}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """So that small volumes have several blocks."""
    monkeypatch.setattr(_gpu_kernels, "ROUNDS", 2)


def example(logits, labels, channels, voxels, samples=2):
    rng = np.random.default_rng(channels * 1000 + voxels)
    x = (rng.standard_normal((samples, channels, voxels)) * 3).astype(dtype_of(logits))
    classes = min(max(2, channels), 2 if labels == "bool" else 127)
    y = rng.integers(0, classes, (samples, voxels)).astype(labels)
    return x, y, rng.standard_normal((3, samples, max(2, channels)))


def memory(array):
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def run(plan, x, y, cotangent, ignore=None, channels_last=False, seed=0):
    """(sums, counts of bad labels, gradient) of the kernels."""
    samples, channels, voxels = x.shape
    stored = np.moveaxis(x, 1, -1) if channels_last else x
    item = x.dtype.itemsize
    strides = (channels * voxels * item, voxels * item, item)
    if channels_last:
        strides = (channels * voxels * item, item, channels * item)
    arguments = (samples, voxels, *strides, voxels * y.itemsize, y.itemsize, *strides)
    arguments = (*map(np.int64, arguments), ignore is not None, np.int64(ignore or 0))
    gpu = Simulator(seed)
    ops = operations(plan, gpu)
    runs = -(-voxels // plan.run)
    logits, labels = memory(stored), memory(y)
    partials = np.zeros(samples * runs * plan.columns * ops.size, np.uint8)
    sums = np.zeros(cotangent.nbytes, np.uint8)
    counts = np.zeros(samples * 8, np.uint8)
    grad = memory(np.full(stored.shape, np.nan, x.dtype))
    statistics = _gpu_kernels.voxel_kernel(plan, False, ops)
    gpu.launch(
        statistics, (runs, samples), _gpu_kernels.THREADS, logits, labels, partials, None,
        *arguments,
    )  # fmt: skip
    total = _gpu_kernels.total_kernel(plan, ops)
    gpu.launch(
        total, (samples, 1), _gpu_kernels.THREADS, partials, sums, counts,
        np.int64(samples), np.int64(runs),
    )  # fmt: skip
    gradient = _gpu_kernels.voxel_kernel(plan, True, ops)
    gpu.launch(
        gradient, (runs, samples), _gpu_kernels.THREADS, logits, labels, grad,
        memory(cotangent), *arguments,
    )  # fmt: skip
    grad = grad.view(x.dtype).reshape(stored.shape)
    grad = np.moveaxis(grad, -1, 1) if channels_last else grad
    return sums.view(np.float64).reshape(cotangent.shape), counts.view(np.int64), grad


def expected(x, y, cotangent, p, ignore):
    x = x.astype(np.float64)
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), p=p, ignore_label=ignore)
    sums, grad = np.empty(at.sums_shape), np.empty_like(x)
    _reference.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 1)
    _reference.gradient(
        at.logits, at.labels, buffers.of(cotangent, "c"), buffers.of(grad, "g"), at.spec, 1
    )
    return sums, grad


CASES = {
    "sigmoid": ("float32", "bool", 1, 1028, {}),
    "sigmoid_power": ("float16", "uint8", 1, 1024, {"p": 2}),
    "two": ("bfloat16", "uint8", 2, 1200, {}),
    "three_scalar": ("float32", "int64", 3, 701, {}),
    "four_ignored": ("float32", "uint8", 4, 1024, {"ignore": 255}),
    "five_negative": ("float16", "int16", 5, 600, {"p": 2, "ignore": -1}),
    "double": ("float64", "int32", 3, 512, {"p": 3}),
    "unsigned": ("float32", "uint32", 7, 300, {"ignore": 2**32 - 1}),
    "wide_unsigned": ("float64", "uint64", 2, 130, {}),
    "ragged": ("bfloat16", "uint16", 9, 515, {}),
    "lanes": ("float16", "uint8", 20, 512, {}),
    "four_lanes": ("float32", "int64", 33, 260, {"p": 2, "ignore": -1}),
    "eight_lanes": ("float16", "int8", 105, 96, {}),
    "all_lanes": ("float32", "int16", 300, 20, {}),
    "channels_last": ("float32", "uint8", 5, 700, {"channels_last": True}),
    "channels_last_lanes": ("float16", "int64", 40, 130, {"channels_last": True}),
    "one_voxel": ("float32", "uint8", 3, 1, {}),
}


@pytest.mark.parametrize(
    ("logits", "labels", "channels", "voxels", "options"), CASES.values(), ids=CASES
)
def test_against_the_reference(logits, labels, channels, voxels, options):
    x, y, cotangent = example(logits, labels, channels, voxels)
    p, ignore, last = (options.get(name) for name in ("p", "ignore", "channels_last"))
    if ignore is not None:
        ignored = np.random.default_rng(1).random(y.shape) < 0.2
        y[ignored] = ignore
        x[np.broadcast_to(ignored[:, None], x.shape)] = np.nan
    together = not last and voxels * x.dtype.itemsize % _gpu_kernels.WORD_BYTES == 0
    plan = _gpu_kernels.plan(logits, labels, channels, p or 1, together)
    sums, bad, grad = run(plan, x, y, cotangent, ignore, last)
    true_sums, true_grad = expected(x, y, cotangent, p or 1, ignore)
    assert not bad.any()
    assert_close(sums, true_sums, rtol=RTOL[logits], atol=RTOL[logits])
    scale = np.abs(true_grad).max()
    assert_close(grad.astype(np.float64), true_grad, rtol=GRAD[logits], atol=GRAD[logits] * scale)


def test_same_bits_in_any_order_of_threads():
    x, y, cotangent = example("float32", "uint8", 20, 512)
    plan = _gpu_kernels.plan("float32", "uint8", 20, 1, True)
    sums, _, grad = run(plan, x, y, cotangent, seed=1)
    other_sums, _, other_grad = run(plan, x, y, cotangent, seed=2)
    assert_same_bits(other_sums, sums)
    assert_same_bits(other_grad, grad)


def test_bad_labels_make_their_sample_nan_and_are_counted():
    x, y, cotangent = example("float32", "int64", 3, 600)
    y[1, [5, 99]] = -7, 2**40
    plan = _gpu_kernels.plan("float32", "int64", 3, 1, True)
    sums, bad, grad = run(plan, x, y, cotangent)
    assert bad.tolist() == [0, 2]
    assert np.isnan(sums[:, 1]).all()
    assert not np.isnan(sums[:, 0]).any()
    assert not grad[1, :, [5, 99]].any()


def test_infinities_are_as_in_the_limit():
    x = np.zeros((1, 3, 4), np.float32)
    x[0, 0] = np.inf, -np.inf, -np.inf, np.nan
    x[0, 1:, 2] = -np.inf
    y = np.array([[0, 1, 1, 2]])
    cotangent = np.ones((3, 1, 3))
    plan = _gpu_kernels.plan("float32", "int64", 3, 1, False)
    for voxel, scores in enumerate(([1, 0, 0], [0, 0.5, 0.5], [np.nan] * 3, [np.nan] * 3)):
        at = np.s_[..., voxel : voxel + 1]
        sums, _, _ = run(plan, x[at], y[at], cotangent)
        np.testing.assert_array_equal(sums[1, 0], scores)


class Faults:
    """Operations with one fault, which a comparison must find."""

    @staticmethod
    def half(ops):
        ops.exp = lambda x, exp=ops.exp: np.float32(np.float16(exp(x)))

    @staticmethod
    def lonely(ops):
        ops.shuffle = lambda mask, value, distance: value * 0

    @staticmethod
    def unread(ops):
        ops.load_labels = lambda memory, at: (np.int64(0),) * 4


@pytest.mark.parametrize("fault", ["half", "lonely", "unread"])
def test_the_comparison_bites(monkeypatch, fault):
    def broken(plan, cuda, whole=operations):
        ops = whole(plan, cuda)
        getattr(Faults, fault)(ops)
        return ops

    monkeypatch.setitem(globals(), "operations", broken)
    with pytest.raises(AssertionError):
        test_against_the_reference("float32", "uint8", 4, 512, {})
