"""Each backend's two functions against the oracle, with random cotangents (they are linear)."""

import itertools

import ml_dtypes
import naive
import numpy as np
import pytest
import torch
from compare import assert_close, assert_same_bits, kernel_rows
from layouts import LAYOUTS

from dice_core import _reference, buffers, losses, spec

FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
FLOATS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
ARITHMETIC = {"float16": 2e-6, "bfloat16": 2e-6, "float32": 2e-6, "float64": 2e-14}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0, "float64": 0}  # of a gradient
LABELS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
CHANNELS = (1, 2, 3, 5, 17, 33, 150)
SIZES = (0, 1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1023, 1024, 1025, 3001)  # around vectors and tiles

backend = pytest.mark.parametrize(
    "kernels", [r.load() for r in kernel_rows()], ids=lambda m: m.LEVEL
)
floats = pytest.mark.parametrize("dtype", FLOATS)


def example(shape, dtype, *, labels="int64", scale=3.0, seed=0):
    """Random logits and labels of every class."""
    rng = np.random.default_rng(seed)
    largest = float(ml_dtypes.finfo(FLOATS[dtype]).max)
    x = np.clip(rng.standard_normal(shape) * scale, -largest, largest).astype(FLOATS[dtype])
    classes = max(2, shape[1])
    y = rng.integers(0, min(classes, 2 if labels == "bool" else 127), (shape[0], *shape[2:]))
    return x, y.astype(labels)


def run(kernels, x, y, *, threads=1, out=None, seed=1, **options):
    """(sums, gradient for random cotangents) of one backend."""
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), **options)
    sums = np.full(at.sums_shape, np.nan)
    bad = kernels.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, threads)
    cotangent = np.random.default_rng(seed).standard_normal(at.sums_shape)
    grad = np.full_like(x, np.nan, subok=False) if out is None else out
    again = kernels.gradient(
        at.logits,
        at.labels,
        buffers.of(cotangent, "cotangent"),
        buffers.of(grad, "grad"),
        at.spec,
        threads,
    )
    assert bad == again == 0
    return sums, grad


def check(kernels, x, y, **options):
    """One backend's sums and gradient against the oracle's."""
    expected_sums, expected_grad = run(_reference, x.astype(np.float64), y, **options)
    sums, grad = run(kernels, x, y, **options)
    exponent = max(options.get("p", 1), options.get("gamma") or 0)  # of s, of 1 - s
    tolerance = ARITHMETIC[x.dtype.name] * exponent
    tiny = np.finfo("float64" if x.dtype == "float64" else "float32").tiny  # scores below are 0
    assert_close(sums, expected_sums, rtol=tolerance, atol=tiny * sums.size, what="sums")
    # s (t - t.s) cancels: its error is that of a score times a cotangent, here about 1.
    rounding = 1.01 * ROUNDING[x.dtype.name]
    assert_close(grad, expected_grad, rtol=tolerance + rounding, atol=tolerance, what="gradient")


MORE = {
    "p": {"p": 3},
    "cross-entropy": {"gamma": 0},
    "focal": {"gamma": 0.5, "p": 2},
    "smoothing": {"smoothing": True},
    "binary": {"binary_gamma": 0},
    "binary focal": {"binary_gamma": 2.5},
    "sigmoid": {"activation": "sigmoid", "binary_gamma": 2},
    "none": {"activation": "none", "p": 2},
    "all": {"gamma": 2, "smoothing": True, "binary_gamma": 1, "activation": "sigmoid", "p": 3},
}
TARGETS = ("labels", "one-hot", "several", "soft")


def targets(kind, x, y, dtype="uint8"):
    """y as class indices, or how much of each class in an array like x."""
    if kind == "labels":
        return y
    rng = np.random.default_rng(7)
    if kind == "one-hot":
        return (y[:, None] == np.arange(x.shape[1]).reshape(-1, *[1] * (y.ndim - 1))).astype(dtype)
    if kind == "several":
        return rng.integers(0, 2, x.shape).astype(dtype)
    return rng.random(x.shape).astype("float32")


def combinations(*channels):
    """Of options, targets and channels those that go together: a single channel is two classes of
    labels, or one class of dense targets.
    """
    return pytest.mark.parametrize(
        ("options", "kind", "channels"),
        [
            pytest.param(options, kind, count, id=f"{name}-{kind}-{count}")
            for (name, options), kind, count in itertools.product(MORE.items(), TARGETS, channels)
            if count > 1
            or (kind == "labels") == (options.get("activation", "softmax") == "softmax")
        ],
    )


@combinations(1, 2, 5)
@pytest.mark.parametrize("ignore_label", [None, 1])
def test_the_oracle_is_the_naive_code(channels, options, kind, ignore_label):
    x, y = example((2, channels, 6, 7), "float64")
    y = targets(kind, x, y)
    options = {**options, "ignore_label": ignore_label}
    sums, grad = run(_reference, x, y, **options)
    tensor = torch.tensor(x, requires_grad=True)
    theirs = torch.stack(naive.statistics(tensor, torch.tensor(y), **options))
    assert_close(sums, theirs.detach(), rtol=1e-13)
    cotangent = np.random.default_rng(1).standard_normal(sums.shape)
    (theirs * torch.tensor(cotangent)).sum().backward()
    assert_close(grad, tensor.grad, rtol=1e-11, atol=1e-14)


@backend
@floats
@combinations(1, 2, 5, 17)
def test_more_sums(kernels, dtype, channels, options, kind):
    for size, ignore_label in ((1025, None), (70, 1)):
        x, y = example((2, channels, size), dtype)
        x = np.abs(x) if options.get("activation") == "none" else x  # sums of both signs cancel
        check(kernels, x, targets(kind, x, y), **options, ignore_label=ignore_label)


@backend
@floats
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TARGETS[:3])
def test_more_sums_in_any_layout(kernels, dtype, layout, kind):
    x, y = example((2, 3, 9, 14, 6), dtype)
    lay_out = LAYOUTS[layout]
    y = targets(kind, x, y)
    check(kernels, lay_out(x), y, **MORE["all"], ignore_label=1)
    check(kernels, x, lay_out(y[:, None])[:, 0] if kind == "labels" else lay_out(y), **MORE["all"])
    x = lay_out(x)
    _, expected = run(kernels, x, y, **MORE["all"])
    _, grad = run(kernels, x, y, **MORE["all"], out=x)
    assert_same_bits(np.ascontiguousarray(grad), np.ascontiguousarray(expected))


@backend
@pytest.mark.parametrize("dtype", [*LABELS, "float16", "float32", "float64", "bfloat16"])
def test_dtypes_of_dense_targets(kernels, dtype):
    x, y = example((2, 3, 77), "float32")
    y = targets("several", x, y)
    expected, expected_grad = run(kernels, x, y, gamma=0)
    sums, grad = run(kernels, x, y.astype(FLOATS.get(dtype, dtype)), gamma=0)
    assert_same_bits(sums, expected)
    assert_same_bits(grad, expected_grad)


@backend
@floats
@pytest.mark.parametrize("scale", [1e-30, 90.0, 1e4])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_more_sums_of_logits_of_any_size(kernels, dtype, scale, kind, activation):
    x, y = example((2, 4, 200), dtype, scale=scale)
    options = {"gamma": 1, "smoothing": True, "binary_gamma": 1, "activation": activation}
    check(kernels, x, targets(kind, x, y), **options)


@backend
@floats
@pytest.mark.parametrize("low", [-3e4, -1e9, -np.inf])
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_classes_far_below_the_others_have_exact_entropies(kernels, dtype, low, gamma, kind):
    if low == -1e9 and dtype == "float16":
        low = -65504
    x = np.array([low, 1, 0]).astype(FLOATS[dtype]).reshape(1, 3, 1).repeat(40, 2)
    y = np.array([0, 0.5, 0.5]).reshape(1, 3, 1).repeat(40, 2)
    if kind == "labels":  # of classes that there are
        y = np.arange(40).reshape(1, 40) % 2 + 1
    check(kernels, x, y, gamma=gamma)
    sums, _ = run(kernels, x, y, smoothing=True)
    expected, _ = run(_reference, x.astype(np.float64), y, smoothing=True)
    assert_close(sums, expected, rtol=8 * ARITHMETIC[dtype])


@backend
@floats
def test_smoothing_beside_a_label_that_is_impossible(kernels, dtype):
    x = np.array([-np.inf, 1, 0]).astype(FLOATS[dtype]).reshape(1, 3, 1)
    sums, _ = run(kernels, x, np.zeros((1, 1), np.uint8), smoothing=True)
    entropies = np.log1p(np.exp([-1, 1]))
    assert_close(sums[3, 0], [np.inf, *entropies], rtol=8 * ARITHMETIC[dtype])


@backend
def test_a_voxel_without_targets_is_nothing_whatever_its_logits(kernels):
    x, y = example((2, 3, 300), "float32")
    y = targets("soft", x, y)
    x[:, :, 7] = np.nan
    y[:, :, 7] = 255
    sums, grad = run(kernels, x, y, ignore_label=255, gamma=1, smoothing=True)
    assert np.isfinite(sums).all()
    assert np.isfinite(grad).all()
    assert not grad[:, :, 7].any()


@backend
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_decisions_take_nan_for_infinite(kernels, channels):
    x, y = example((1, channels, 300), "float32")
    x[:, channels // 2, ::3], x[:, 0, 1::7] = np.nan, np.inf
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), spec.Spec("argmax"))
    sums, expected = np.empty(at.sums_shape), np.empty(at.sums_shape)
    for kernels_of, into in ((kernels, sums), (_reference, expected)):
        kernels_of.statistics(at.logits, at.labels, buffers.of(into, "sums"), at.spec, 1)
    assert_same_bits(sums, expected)


@backend
def test_half_precision_is_not_rounded_to_the_ignore_label(kernels):
    x, y = np.zeros((1, 2, 2), np.float32), np.full((1, 2, 2), 10_000, np.float16)
    y[..., 1] = 0.5
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), ignore_label=9_999)
    sums = buffers.of(np.empty(at.sums_shape), "sums")
    assert kernels.statistics(at.logits, at.labels, sums, at.spec, 1) == 2
    with pytest.raises(ValueError, match=r"2 values outside \[0, 1\] \(9999 is ignored\)"):
        spec.check_labels(at)


@backend
def test_bad_dense_targets_are_counted_and_skipped(kernels):
    x, y = example((2, 3, 300), "float32")
    y = targets("soft", x, y)
    y[0, 1, 5], y[1, 2, 7], y[1, 0, 299], y[0, 0, 0] = 1.01, -0.5, np.nan, 255
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), ignore_label=255)
    sums = np.empty(at.sums_shape)
    assert kernels.statistics(at.logits, at.labels, buffers.of(sums, "s"), at.spec, 1) == 3
    assert sums[3].tolist() == [[299, 299, 300], [299, 300, 299]]


@backend
@pytest.mark.parametrize("threads", [2, 3])
def test_more_sums_have_the_same_bits_for_any_number_of_threads(kernels, threads):
    x, y = example((2, 5, 40_001), "float32")
    y = targets("several", x, y)
    sums, grad = run(kernels, x, y, **MORE["all"])
    other_sums, other_grad = run(kernels, x, y, **MORE["all"], threads=threads)
    assert_same_bits(other_sums, sums)
    assert_same_bits(other_grad, grad)


@backend
@floats
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_channels_and_powers(kernels, dtype, channels, p):
    check(kernels, *example((2, channels, 11, 13), dtype), p=p)


@backend
@floats
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 3.7, 40])
def test_cross_entropy(kernels, dtype, channels, gamma):
    check(kernels, *example((2, channels, 11, 13), dtype), gamma=gamma)
    x, y = example((2, channels, 300), dtype)
    check(kernels, LAYOUTS["channels-last"](x), y, gamma=gamma, p=2, ignore_label=0)


@backend
@floats
@pytest.mark.parametrize("channels", [1, 3, 150])
@pytest.mark.parametrize("size", SIZES)
def test_ragged_sizes(kernels, dtype, channels, size):
    check(kernels, *example((2, channels, size), dtype))


@backend
@floats
@pytest.mark.parametrize(
    "shape",
    [(3, 4), (1, 2, 5), (2, 1, 3, 4), (2, 3, 4, 5, 6), (1, 5, 2, 3, 2, 3), (0, 3, 4), (2, 3, 0, 4)],
    ids=str,
)
def test_spatial_axes(kernels, dtype, shape):
    check(kernels, *example(shape, dtype))


@backend
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("channels", [1, 2, 9])
def test_label_dtypes(kernels, labels, channels):
    x, y = example((2, channels, 300), "float32", labels=labels)
    check(kernels, x, y)
    info = (0, 1) if labels == "bool" else (int(np.iinfo(labels).min), int(np.iinfo(labels).max))
    for ignore_label in {*info, 1, -1, 2**63, 2**64 - 1, 2**70}:
        y[0, ::10] = ignore_label if info[0] <= ignore_label <= info[1] else 0
        check(kernels, x, y, ignore_label=ignore_label)


READ_ONLY_LAYOUTS = {
    **LAYOUTS,
    "broadcast": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@backend
@floats
@pytest.mark.parametrize("layout", READ_ONLY_LAYOUTS)
@pytest.mark.parametrize("label_layout", READ_ONLY_LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_layouts(kernels, dtype, channels, layout, label_layout):
    x, y = example((2, channels, 7, 20, 9), dtype)
    labels = READ_ONLY_LAYOUTS[label_layout](y[:, None])[:, 0]
    check(kernels, READ_ONLY_LAYOUTS[layout](x), labels)


@backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_goes_into_any_strides(kernels, layout):
    x, y = example((2, 3, 7, 20, 9), "float32")
    _, expected = run(kernels, x, y)
    _, grad = run(kernels, x, y, out=LAYOUTS[layout](np.full_like(x, np.nan)))
    assert_same_bits(np.ascontiguousarray(grad), expected)


@backend
@floats
@pytest.mark.parametrize("channels", [1, 5, 40])
@pytest.mark.parametrize("options", [{}, {"p": 2}, {"gamma": 0}, {"gamma": 1.5}], ids=str)
def test_gradient_into_aligned_memory(kernels, dtype, channels, options):
    """Memory in use that begins a cache line with every row may be written past the caches."""
    x, y = example((2, channels, 64, 48), dtype)
    memory = np.ones(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64
    aligned, other = (
        memory[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
        for at in (start, start + x.itemsize)
    )
    _, grad = run(kernels, x, y, **options, out=aligned)
    grad = grad.copy()
    assert_same_bits(grad, run(kernels, x, y, **options, out=other)[1])


@backend
@floats
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("gamma", [None, 2])
def test_gradient_over_the_logits(kernels, dtype, layout, channels, gamma):
    x, y = example((2, channels, 9, 30, 11), dtype)
    x = LAYOUTS[layout](x)
    _, expected = run(kernels, x, y, gamma=gamma)
    _, grad = run(kernels, x, y, gamma=gamma, out=x)
    assert grad is x
    assert_same_bits(np.ascontiguousarray(x), np.ascontiguousarray(expected))


@backend
@floats
@pytest.mark.parametrize(
    "shape", [(2, 3, 40_001), (1, 1, 70_000), (3, 20, 9000), (1, 150, 5000)], ids=str
)
@pytest.mark.parametrize("gamma", [None, 1.5])
def test_same_bits_for_any_number_of_threads(kernels, dtype, shape, gamma):
    x, y = example(shape, dtype)
    sums, grad = run(kernels, x, y, gamma=gamma, threads=1)
    for threads in (1, 2, 3, 7):
        other_sums, other_grad = run(kernels, x, y, gamma=gamma, threads=threads)
        assert_same_bits(other_sums, sums, what=f"sums with {threads} threads")
        assert_same_bits(other_grad, grad, what=f"gradient with {threads} threads")


@backend
@floats
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_ignored_targets_leak_nothing(kernels, dtype, activation):
    x, _ = example((2, 3, 500), dtype)
    rng = np.random.default_rng(2)
    y = rng.random(x.shape).astype(np.float32)
    ignored = rng.random(x.shape) < 0.3
    y[ignored] = 99
    options = {"activation": activation, "binary_gamma": 2, "ignore_label": 99}
    clean, clean_grad = run(kernels, x, y, **options)
    x[ignored] = np.nan
    sums, grad = run(kernels, x, y, **options)
    assert_same_bits(sums, clean)
    assert_same_bits(grad, clean_grad)
    assert not grad[ignored].any()


@backend
@floats
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("gamma", [None, 0, 2])
def test_ignored_voxels_leak_nothing(kernels, dtype, channels, gamma):
    x, y = example((2, channels, 500), dtype)
    ignored = np.random.default_rng(2).random(y.shape) < 0.3
    y[ignored] = 99
    clean, clean_grad = run(kernels, x, y, ignore_label=99, gamma=gamma)
    for poison in (np.nan, np.inf, -np.inf, 6e4):
        x[np.broadcast_to(ignored[:, None], x.shape)] = poison
        sums, grad = run(kernels, x, y, ignore_label=99, gamma=gamma)
        assert_same_bits(sums, clean)
        assert_close(grad, clean_grad, rtol=0)
        assert not grad[np.broadcast_to(ignored[:, None], x.shape)].any()


@backend
@floats
@pytest.mark.parametrize("gamma", [None, 0, 2])
def test_nan_in_a_counted_voxel_is_nan_there(kernels, dtype, gamma):
    x, y = example((2, 3, 100), dtype)
    x[1, 2, 50] = np.nan
    sums, grad = run(kernels, x, y, gamma=gamma)
    assert np.isfinite(sums[:, 0]).all()
    for k in range(len(sums)):
        assert np.isnan(sums[k, 1]).any() == (k != 2)  # Y counts labels
    assert np.isnan(grad[1, :, 50]).all()
    assert np.isfinite(np.delete(grad, 50, axis=2)).all()


@backend
@floats
@pytest.mark.parametrize("scale", [1e-30, 20.0, 90.0, 1e4, 1e30])
@pytest.mark.parametrize("channels", [1, 2, 7, 20])
@pytest.mark.parametrize("layout", ["contiguous", "stride-2"])
@pytest.mark.parametrize("gamma", [None, 0, 2])
def test_logits_of_any_size(kernels, dtype, scale, channels, layout, gamma):
    x, y = example((2, channels, 400), dtype, scale=scale)
    check(kernels, LAYOUTS[layout](x), y, gamma=gamma)


@backend
@floats
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2, 7, 20])
@pytest.mark.parametrize("gamma", [None, 0, 2])
def test_infinite_logits(kernels, dtype, infinity, channels, gamma):
    x, y = example((2, channels, 400), dtype)
    x[:, 0, ::3] = infinity
    check(kernels, x, y, gamma=gamma)
    assert np.isfinite(run(kernels, x, y, gamma=gamma)[1]).all()
    if gamma is not None and channels > 1:
        sums, _ = run(kernels, x, np.full_like(y, 0 if infinity > 0 else 1), gamma=gamma)
        assert np.isfinite(sums).all()  # infinitely sure, and right


@backend
@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"), [("float32", -87.33, 88.0), ("float64", -708.3, 709.0)]
)
def test_worst_ulp_of_the_exponential(kernels, dtype, lowest, highest):
    x = np.linspace(lowest, highest, 4_000_000).astype(dtype)
    actual = np.empty_like(x)
    kernels.elementwise("exp", buffers.of(x, "x"), buffers.of(actual, "out"))
    expected = np.exp(x.astype(np.longdouble))
    ulp = np.spacing(expected.astype(dtype)).astype(np.longdouble)
    assert (np.abs(actual - expected) / ulp).max() < (5.5 if dtype == "float32" else 1.2)


@backend
@pytest.mark.parametrize(("dtype", "lowest"), [("float32", -87.0), ("float64", -708.0)])
def test_worst_ulp_of_the_logarithm(kernels, dtype, lowest):
    x = np.exp(np.linspace(lowest, 0, 2_000_000)).astype(dtype)
    x[-64:] = 1 - np.arange(64)[::-1] * np.finfo(dtype).epsneg
    actual = np.empty_like(x)
    kernels.elementwise("log", buffers.of(x, "x"), buffers.of(actual, "out"))
    expected = np.log(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
    assert (np.abs(actual - expected) / ulp).max() < 2
    assert actual[-1] == 0


@backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_underflow_to_zero(kernels, dtype):
    """A class d below another scores e^-d / (1 + e^-d), 0 where that is no normal number."""
    d = np.linspace(0, 800, 80_001).astype(dtype)
    x = np.stack([np.zeros_like(d), -d])[None]
    grad = np.empty_like(x)
    at = spec.call(
        buffers.of(x, "x"), buffers.of(np.zeros((1, d.size), int), "y"), p=1, ignore_label=None
    )
    cotangent = np.zeros((3, 1, 2))
    cotangent[1, 0, 1] = 1  # dP_1/dx_1 = s_1 (1 - s_1)
    kernels.gradient(
        at.logits, at.labels, buffers.of(cotangent, "c"), buffers.of(grad, "g"), at.spec, 1
    )
    e = np.exp(-d.astype(np.longdouble))
    info = np.finfo(dtype)
    expected = (e / (1 + e) ** 2).astype(np.float64)
    assert_close(grad[0, 1], expected, rtol=8 * info.eps, atol=1.01 * info.tiny)
    assert not grad[0, 1, d > -np.log(info.tiny) + 1].any()


@backend
def test_counts_beyond_float32(kernels):
    """A float32 counter stops at 2^24; a broadcast array has more voxels in no memory."""
    voxels = 2**25 + 3
    x = np.broadcast_to(np.zeros((1, 2, 1), np.float32), (1, 2, voxels))
    y = np.broadcast_to(np.zeros((1, 1), np.uint8), (1, voxels))
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), p=1, ignore_label=None)
    sums = np.empty(at.sums_shape)
    kernels.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 2)
    assert sums.tolist() == [[[voxels / 2, 0]], [[voxels / 2, voxels / 2]], [[voxels, 0]]]


@backend
def test_a_thousand_classes(kernels):
    check(kernels, *example((1, 1000, 700), "float32", labels="int16"))


@backend
@floats
@pytest.mark.parametrize("margin", [2.0, 8.0, 14.0, 25.0])
@pytest.mark.parametrize("gamma", [0, 2])
@pytest.mark.parametrize("channels", [1, 2, 5, 20])
def test_cross_entropy_near_zero_is_exact(kernels, dtype, margin, gamma, channels):
    """Of a network that is nearly sure and right 1 - s is tiny, and lost where s is rounded."""
    x, y = example((1, channels, 1000), dtype)
    if channels == 1:
        x[:, 0] += margin * (2 * y - 1).astype(x.dtype)
    else:
        own = np.take_along_axis(x, y[:, None], 1)
        np.put_along_axis(x, y[:, None], own + x.dtype.type(margin), axis=1)
    true, _ = run(_reference, x.astype(np.float64), y, gamma=gamma)
    sums, _ = run(kernels, x, y, gamma=gamma)
    assert_close(sums[3], true[3], rtol=ARITHMETIC[x.dtype.name] * (1 + gamma))


@backend
def test_loss_of_many_voxels_within_1e_6(kernels):
    """512^3 voxels of two classes, one row of which is in memory."""
    row, labels = example((1, 2, 1, 1, 512), "float32", labels="uint8")
    shape = (512, 512, 512)
    at = spec.call(
        buffers.of(np.broadcast_to(row, (1, 2, *shape)), "x"),
        buffers.of(np.broadcast_to(labels, (1, *shape)), "y"),
        p=1,
        ignore_label=None,
    )
    sums, of_row = np.empty(at.sums_shape), np.empty(at.sums_shape)
    kernels.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 2)
    small = spec.call(
        buffers.of(row.astype(np.float64), "x"), buffers.of(labels, "y"), p=1, ignore_label=None
    )
    _reference.statistics(small.logits, small.labels, buffers.of(of_row, "s"), small.spec, 1)
    dice = losses.Dice()
    assert abs(dice(sums) - dice(of_row)) < 1e-6
    assert sums[2].sum() == 512**3


@backend
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_labels_are_counted_and_skipped(kernels, threads):
    x, y = example((2, 3, 40_000), "float32")
    wrong = np.random.default_rng(3).random(y.shape) < 0.01
    marked = y.copy()
    marked[wrong] = np.random.default_rng(4).choice([-7, 3, 2**40], wrong.sum())
    at = spec.call(buffers.of(x, "x"), buffers.of(marked, "y"), p=1, ignore_label=None)
    sums = np.empty(at.sums_shape)
    bad = kernels.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, threads)
    assert bad == wrong.sum()
    y[wrong] = 99
    assert_same_bits(sums, run(kernels, x, y, ignore_label=99)[0])


@backend
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_negative_label_is_no_class_of_many(kernels, dtype):
    lowest = np.iinfo(dtype).min
    classes = 5 - 2 * lowest  # its bits, read as a positive number, would be one
    x = np.zeros((1, classes, 6), np.float32)
    y = np.array([[0, -1, 5, lowest, -lowest - 1, -2]], dtype)
    at = spec.call(buffers.of(x, "x"), buffers.of(y, "y"), p=1, ignore_label=-2)
    sums = np.empty(at.sums_shape)
    assert kernels.statistics(at.logits, at.labels, buffers.of(sums, "sums"), at.spec, 1) == 2
    assert sums[2, 0, [0, 5, -lowest - 1]].tolist() == [1, 1, 1]
    assert sums[2].sum() == 3


def test_levels_agree_in_float64():
    modules = [row.load() for row in kernel_rows()]
    x, y = example((2, 5, 3001), "float64")
    results = [run(module, x, y, p=2) for module in modules]
    for (sums, grad), (other_sums, other_grad) in itertools.pairwise(results):
        assert_close(other_sums, sums, rtol=1e-15)
        assert_close(other_grad, grad, rtol=1e-15, atol=1e-15)


# ---- the checks bite ------------------------------------------------------------------------


class Broken:
    """The first backend with one fault."""

    def __init__(self, fault):
        self.kernels, self.fault = kernel_rows()[0].load(), fault

    def statistics(self, logits, labels, sums, spec, threads):
        if self.fault == "drops a voxel":
            labels = np.asarray(labels).copy()
            x = np.delete(np.asarray(logits), 5, axis=2)
            logits, labels = buffers.of(x, "x"), buffers.of(np.delete(labels, 5, axis=1), "y")
        bad = self.kernels.statistics(logits, labels, sums, spec, threads)
        total = np.asarray(sums)
        if self.fault == "sums in half":
            total[:] = total.astype(np.float16)
        if self.fault == "swaps statistics":
            total[:] = total[[1, 0, 2]]
        return bad

    def gradient(self, logits, labels, cotangent, grad, spec, threads):
        bad = self.kernels.gradient(logits, labels, cotangent, grad, spec, threads)
        dx = np.asarray(grad)
        if self.fault == "flips the sign":
            dx *= -1
        if self.fault == "leaves a voxel":
            dx[0, 0, 5] = np.nan
        if self.fault == "rounds to half":
            dx[:] = dx.astype(np.float16)
        return bad


@pytest.mark.parametrize(
    "fault",
    [
        "drops a voxel",
        "sums in half",
        "swaps statistics",
        "flips the sign",
        "leaves a voxel",
        "rounds to half",
    ],
)
def test_a_wrong_kernel_is_found(fault):
    x, y = example((2, 3, 300), "float32")
    check(Broken("none"), x, y)
    with pytest.raises(AssertionError, match="differ"):
        check(Broken(fault), x, y)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([1.0], [1.1]), ([np.nan], [1.0]), ([1.0], [np.nan]), ([np.inf], [1.0]), ([1.0], [1.0, 1.0])],
)
def test_comparisons_bite(actual, expected):
    with pytest.raises(AssertionError):
        assert_close(actual, expected, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_same_bits(actual, expected)
