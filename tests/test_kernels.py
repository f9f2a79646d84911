"""Each backend's two functions against the reference, with random cotangents."""

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from compare import assert_bitwise_equal, assert_close, kernel_rows
from layouts import LAYOUTS

from dice_core import _reference, buffers, checks, losses
from dice_core import spec as specs
from dice_core.sums import Statistics

FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
FLOATS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
ARITHMETIC = {"float16": 2e-6, "bfloat16": 2e-6, "float32": 2e-6, "float64": 2e-14}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0, "float64": 0}  # of a gradient
LABELS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
CHANNELS = (1, 2, 3, 5, 17, 33, 150)
SIZES = (0, 1, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1023, 1024, 1025, 3001)  # around vectors and tiles

LEVELS = [row.load() for row in kernel_rows()]
backend = pytest.mark.parametrize("kernels", LEVELS, ids=lambda m: m.LEVEL)
backend_or_oracle = pytest.mark.parametrize(
    "kernels", [*LEVELS, _reference], ids=lambda m: getattr(m, "LEVEL", "reference")
)
floats = pytest.mark.parametrize("dtype", FLOATS)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch")


def product(names, *values, others, dtypes=FLOATS):
    """Parametrizes dtype and `names`: all combinations of `values` in float32, and of `others`,
    a few of them, in the other dtypes.
    """
    rows = [("float32", *row) for row in itertools.product(*values)]
    rest = [dtype for dtype in dtypes if dtype != "float32"]
    rows += list(itertools.product(rest, *others))
    return pytest.mark.parametrize(("dtype", *names.split()), rows, ids=lambda v: str(v))


def example(shape, dtype, *, labels="int64", scale=3.0, seed=0):
    """Random logits and labels of every class."""
    rng = np.random.default_rng(seed)
    largest = float(ml_dtypes.finfo(FLOATS[dtype]).max)
    x = np.clip(rng.standard_normal(shape) * scale, -largest, largest).astype(FLOATS[dtype])
    classes = max(2, shape[1])
    y = rng.integers(0, min(classes, 2 if labels == "bool" else 127), (shape[0], *shape[2:]))
    return x, y.astype(labels)


def bind(x, y, **options):
    """(logits, labels, spec, a NaN array for the sums) of a call; `options` may be a Spec."""
    spec = options.pop("spec", None) or specs.checked(**options)
    logits, labels = buffers.of(x, "x"), buffers.of(y, "y")
    seen = specs.signature(logits.layout, labels.layout, spec)
    labels = replace(labels, layout=seen.labels)
    return logits, labels, seen.spec, np.full(seen.sums_shape, np.nan)


def sums_of(kernels, x, y, *, threads=1, **options):
    """(sums, how many labels are out of range) of one backend."""
    logits, labels, spec, sums = bind(x, y, **options)
    found = kernels.statistics(logits, labels, buffers.of(sums, "sums"), spec, threads)
    return sums, found


def run(kernels, x, y, *, threads=1, out=None, cotangent=None, **options):
    """(sums, gradient for a cotangent, by default a random one) of one backend."""
    logits, labels, spec, sums = bind(x, y, **options)
    found = kernels.statistics(logits, labels, buffers.of(sums, "sums"), spec, threads)
    if cotangent is None:
        cotangent = np.random.default_rng(1).standard_normal(sums.shape)
    grad = np.full_like(x, np.nan, subok=False) if out is None else out
    of_cotangent, of_grad = buffers.of(cotangent, "cotangent"), buffers.of(grad, "grad")
    again = kernels.gradient(logits, labels, of_cotangent, of_grad, spec, threads)
    assert found == again == 0
    return sums, grad


def check(kernels, x, y, **options):
    """Compares one backend's sums and gradient with those of the reference."""
    expected_sums, expected_grad = run(_reference, x.astype(np.float64), y, **options)
    sums, grad = run(kernels, x, y, **options)
    exponent = max(options.get("p", 1), options.get("gamma") or 0)  # of s, of 1 - s
    tolerance = ARITHMETIC[x.dtype.name] * exponent
    tiny = np.finfo("float64" if x.dtype == "float64" else "float32").tiny  # smaller s are 0
    assert_close(sums, expected_sums, rtol=tolerance, atol=tiny * sums.size, what="sums")
    # s (t - t.s) cancels: its error is that of a probability times a cotangent, here about 1.
    rounding = 1.01 * ROUNDING[x.dtype.name]
    assert_close(grad, expected_grad, rtol=tolerance + rounding, atol=tolerance, what="gradient")


MORE = {
    "p": {"p": 3},
    "cross-entropy": {"gamma": 0},
    "focal": {"gamma": 0.5, "p": 2},
    "nll": {"nll": True},
    "binary": {"binary_gamma": 0},
    "binary focal": {"binary_gamma": 2.5},
    "sigmoid": {"activation": "sigmoid", "binary_gamma": 2},
    "none": {"activation": "none", "p": 2},
    "squares": {"target_square": True, "gamma": 0},
    "all": {"gamma": 2, "nll": True, "binary_gamma": 1, "activation": "sigmoid", "p": 3},
}
TARGETS = ("labels", "one-hot", "several", "soft")


def targets(kind, x, y, dtype="uint8"):
    """y as class indices, or as targets of x's shape."""
    if kind == "labels":
        return y
    rng = np.random.default_rng(7)
    if kind == "one-hot":
        return (y[:, None] == np.arange(x.shape[1]).reshape(-1, *[1] * (y.ndim - 1))).astype(dtype)
    if kind == "several":
        return rng.integers(0, 2, x.shape).astype(dtype)
    return rng.random(x.shape).astype("float32")


def combinations(*channels):
    """Valid combinations of options, targets and channels: a single channel is two classes of
    labels, or one class of soft targets.
    """
    return [
        (name, kind, count)
        for (name, options), kind, count in itertools.product(MORE.items(), TARGETS, channels)
        if count > 1 or (kind == "labels") == (options.get("activation", "softmax") == "softmax")
    ]


@pytest.mark.parametrize(("options", "kind", "channels"), combinations(1, 2, 5))
@pytest.mark.parametrize("ignore_label", [None, 1])
def test_the_reference_equals_the_naive_code(torch, channels, options, kind, ignore_label):
    import naive

    x, y = example((2, channels, 6, 7), "float64")
    y = targets(kind, x, y)
    options = {**MORE[options], "ignore_label": ignore_label}
    sums, grad = run(_reference, x, y, **options)
    tensor = torch.tensor(x, requires_grad=True)
    theirs = torch.stack(naive.statistics(tensor, torch.tensor(y), **options))
    assert_close(sums, theirs.detach(), rtol=1e-13)
    cotangent = np.random.default_rng(1).standard_normal(sums.shape)
    (theirs * torch.tensor(cotangent)).sum().backward()
    assert_close(grad, tensor.grad, rtol=1e-11, atol=1e-14)


@backend
@pytest.mark.parametrize(
    ("dtype", "options", "kind", "channels"),
    [("float32", *row) for row in combinations(1, 2, 5, 17)]
    + [(d, *row) for d in FLOATS if d != "float32" for row in combinations(3)],
)
def test_optional_sums(kernels, dtype, channels, options, kind):
    options = MORE[options]
    for size, ignore_label in ((1025, None), (70, 1)):
        x, y = example((2, channels, size), dtype)
        x = np.abs(x) if options.get("activation") == "none" else x  # sums of both signs cancel
        check(kernels, x, targets(kind, x, y), **options, ignore_label=ignore_label)


@backend
@product("layout kind", LAYOUTS, TARGETS[:3], others=(LAYOUTS, ["several"]))
def test_optional_sums_in_any_layout(kernels, dtype, layout, kind):
    x, y = example((2, 3, 9, 14, 6), dtype)
    lay_out = LAYOUTS[layout]
    y = targets(kind, x, y)
    check(kernels, lay_out(x), y, **MORE["all"], ignore_label=1)
    check(kernels, x, lay_out(y[:, None])[:, 0] if kind == "labels" else lay_out(y), **MORE["all"])
    x = lay_out(x)
    _, expected = run(kernels, x, y, **MORE["all"])
    _, grad = run(kernels, x, y, **MORE["all"], out=x)
    assert_bitwise_equal(np.ascontiguousarray(grad), np.ascontiguousarray(expected))


@backend
@floats
@pytest.mark.parametrize("ignore_label", [None, 0, 1])
def test_sums_of_squared_targets(kernels, dtype, ignore_label):
    x, y = example((2, 3, 301), dtype)
    y = targets("soft", x, y)
    y[:, 1, ::5] = 1
    options = {"nll": True, "binary_gamma": 0, "ignore_label": ignore_label}
    fewer, same = run(kernels, x, y, cotangent=np.ones((7, 2, 3)), **options)
    sums, grad = run(kernels, x, y, target_square=True, cotangent=np.ones((8, 2, 3)), **options)
    assert specs.checked(target_square=True, targets="soft").fields[-2:] == (
        specs.TARGET_SQUARE,
        specs.VOXELS,
    )
    assert_bitwise_equal(np.delete(sums, 6, 0), fewer)
    assert_bitwise_equal(grad, same)  # neither they nor the number of voxels depend on the logits
    valid = np.ones(y.shape, bool) if ignore_label is None else y != ignore_label
    assert_close(sums[6], np.where(valid, y.astype(float) ** 2, 0).sum(2), rtol=ARITHMETIC[dtype])
    assert_close(sums[7], valid.sum(2), rtol=0)


@backend
@pytest.mark.parametrize("dtype", [*LABELS, "float16", "float32", "float64", "bfloat16"])
def test_dtypes_of_soft_targets(kernels, dtype):
    x, y = example((2, 3, 77), "float32")
    y = targets("several", x, y)
    expected, expected_grad = run(kernels, x, y, gamma=0)
    sums, grad = run(kernels, x, y.astype(FLOATS.get(dtype, dtype)), gamma=0)
    assert_bitwise_equal(sums, expected)
    assert_bitwise_equal(grad, expected_grad)


@backend
@product(
    "scale kind activation",
    [1e-30, 90.0, 1e4],
    TARGETS,
    ["softmax", "sigmoid"],
    others=([1e4], ["labels", "soft"], ["softmax", "sigmoid"]),
)
def test_optional_sums_of_logits_of_any_size(kernels, dtype, scale, kind, activation):
    x, y = example((2, 4, 200), dtype, scale=scale)
    options = {"gamma": 1, "nll": True, "binary_gamma": 1, "activation": activation}
    check(kernels, x, targets(kind, x, y), **options)


@backend
@product(
    "low gamma kind",
    [-3e4, -1e9, -np.inf],
    [0, 0.5, 2],
    ["soft", "labels"],
    others=([-6e4, -np.inf], [0.5], ["soft", "labels"]),
)
def test_nll_of_classes_far_below_the_others(kernels, dtype, low, gamma, kind):
    x = np.array([low, 1, 0]).astype(FLOATS[dtype]).reshape(1, 3, 1).repeat(40, 2)
    y = np.array([0, 0.5, 0.5]).reshape(1, 3, 1).repeat(40, 2)
    if kind == "labels":  # of classes that are possible
        y = np.arange(40).reshape(1, 40) % 2 + 1
    check(kernels, x, y, gamma=gamma)
    sums, _ = run(kernels, x, y, nll=True)
    expected, _ = run(_reference, x.astype(np.float64), y, nll=True)
    assert_close(sums, expected, rtol=8 * ARITHMETIC[dtype])


@backend
def test_a_voxel_with_all_targets_ignored_has_no_effect(kernels):
    x, y = example((2, 3, 300), "float32")
    y = targets("soft", x, y)
    x[:, :, 7], x[:, 1, 8] = np.nan, np.inf
    y[:, :, 7:9] = 255
    sums, grad = run(kernels, x, y, ignore_label=255, gamma=1, nll=True)
    assert np.isfinite(sums).all()
    assert np.isfinite(grad).all()
    assert not grad[:, :, 7:9].any()


@backend
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_decisions_rank_nan_as_infinity(kernels, channels):
    x, y = example((1, channels, 300), "float32")
    x[:, channels // 2, ::3], x[:, 0, 1::7] = np.nan, np.inf
    spec = specs.Spec("argmax")
    sums, _ = sums_of(kernels, x, y, spec=spec)
    assert_bitwise_equal(sums, sums_of(_reference, x, y, spec=spec)[0])


@backend
def test_half_precision_is_not_rounded_to_the_ignore_label(kernels):
    x, y = np.zeros((1, 2, 2), np.float32), np.full((1, 2, 2), 10_000, np.float16)
    y[..., 1] = 0.5
    _, found = sums_of(kernels, x, y, ignore_label=9_999)
    assert found == 2
    _, labels, spec, _ = bind(x, y, ignore_label=9_999)
    with pytest.raises(ValueError, match=r"2 values outside \[0, 1\] \(9999 is ignored\)"):
        checks.targets(labels, spec, 2)


@backend_or_oracle
def test_soft_targets_out_of_range_are_counted_and_skipped(kernels):
    x, y = example((2, 3, 300), "float32")
    y = targets("soft", x, y)
    y[0, 1, 5], y[1, 2, 7], y[1, 0, 299], y[0, 0, 0] = 1.01, -0.5, np.nan, 255
    sums, found = sums_of(kernels, x, y, ignore_label=255)
    assert found == 3
    assert sums[3].tolist() == [[299, 299, 300], [299, 300, 299]]


@backend_or_oracle
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_binary_targets_are_0_or_1(kernels, dtype):
    x, y = example((2, 3, 300), "float32")
    y = targets("several", x, y, dtype)
    options = {"targets": "binary", "ignore_label": 255, "binary_gamma": 0}
    clean = y.copy()
    y[0, 1, 5:9], y[1, 2, 0], y[1, 0, 299] = (0.5, 1e-4, 0.9995, 2), np.nan, -1
    clean[0, 1, 5:9] = clean[1, 2, 0] = clean[1, 0, 299] = 255
    sums, found = sums_of(kernels, x, y, **options)
    assert found == 6
    expected, none = sums_of(kernels, x, clean, **options)
    assert none == 0
    assert_bitwise_equal(sums, expected)
    assert sums_of(kernels, x, y, **{**options, "targets": "soft"})[1] == 3  # 2, -1, NaN
    logits, labels, spec, _ = bind(x, y, **options)
    grad, cotangent = np.empty_like(x), np.ones(sums.shape)
    of_grad, of_cotangent = buffers.of(grad, "grad"), buffers.of(cotangent, "cotangent")
    assert kernels.gradient(logits, labels, of_cotangent, of_grad, spec, 1) == 6


@backend
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64"])
def test_binary_targets_of_integers(kernels, dtype):
    x, y = example((2, 3, 300), "float32")
    y = targets("several", x, y, dtype)
    sums, grad = run(kernels, x, y, targets="binary")
    expected_sums, expected_grad = run(kernels, x, y)
    assert_bitwise_equal(sums, expected_sums)
    assert_bitwise_equal(grad, expected_grad)
    if dtype != "bool":
        y[0, 0, :3] = 2
        assert sums_of(kernels, x, y, targets="binary")[1] == 3


@backend
@pytest.mark.parametrize("threads", [2, 3])
def test_optional_sums_are_bitwise_reproducible_for_any_number_of_threads(kernels, threads):
    x, y = example((2, 5, 40_001), "float32")
    y = targets("several", x, y)
    sums, grad = run(kernels, x, y, **MORE["all"])
    other_sums, other_grad = run(kernels, x, y, **MORE["all"], threads=threads)
    assert_bitwise_equal(other_sums, sums)
    assert_bitwise_equal(other_grad, grad)


@backend
@product("channels p", CHANNELS, [1, 2, 3, 8], others=([1, 2, 5, 33], [1, 3]))
def test_channels_and_powers(kernels, dtype, channels, p):
    check(kernels, *example((2, channels, 11, 13), dtype), p=p)


@backend
@product("channels gamma", CHANNELS, [0, 0.5, 1, 2, 3.7, 40], others=([1, 2, 5, 33], [0, 0.5, 2]))
def test_cross_entropy(kernels, dtype, channels, gamma):
    check(kernels, *example((2, channels, 11, 13), dtype), gamma=gamma)
    x, y = example((2, channels, 300), dtype)
    check(kernels, LAYOUTS["channels-last"](x), y, gamma=gamma, p=2, ignore_label=0)


@backend
@product("channels size", [1, 3, 150], SIZES, others=([3], SIZES))
def test_ragged_sizes(kernels, dtype, channels, size):
    check(kernels, *example((2, channels, size), dtype))


@backend
@floats
@pytest.mark.parametrize("channels", [4, 5, 7])
def test_ragged_sizes_of_adjacent_channels(kernels, dtype, channels):
    """They are transposed in squares of four voxels and channels."""
    for size in (4, 5, 6, 7, 19, 1023):
        x, y = example((2, channels, size), dtype)
        check(kernels, LAYOUTS["channels-last"](x), y)


@backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
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


@backend_or_oracle
@pytest.mark.parametrize("soft", [False, True])
def test_a_byte_of_a_bool_is_0_or_1(kernels, soft):
    x, y = example((2, 3, 300), "float32", labels="bool")
    y = np.stack([y] * 3, 1) if soft else y
    y.view(np.uint8)[1, ..., 7] = 2
    for ignore_label in (None, 2):
        assert sums_of(kernels, x, y, ignore_label=ignore_label)[1] == (3 if soft else 1)


READ_ONLY_LAYOUTS = {
    **LAYOUTS,
    "broadcast": lambda a: np.broadcast_to(a[:, :, :1], a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


PAIRS = [
    *((layout, "contiguous") for layout in READ_ONLY_LAYOUTS),
    *(("contiguous", layout) for layout in READ_ONLY_LAYOUTS if layout != "contiguous"),
    ("channels-last", "crop"),
    ("fortran", "fortran"),
    ("reversed", "batch-last"),
    ("stride-2", "reversed"),
    ("crop", "broadcast"),
]


@backend
@product("channels pair", [1, 3], PAIRS, others=([3], PAIRS), dtypes=("float16", "float64"))
def test_layouts(kernels, dtype, channels, pair):
    layout, label_layout = pair
    x, y = example((2, channels, 7, 20, 9), dtype)
    labels = READ_ONLY_LAYOUTS[label_layout](y[:, None])[:, 0]
    check(kernels, READ_ONLY_LAYOUTS[layout](x), labels)


FEW = [(16, 10), (700, 3, 1), (41, 2), (17, 1), (40, 5, 2, 2), (9, 4, 7), (15, 3, 15), (300, 20)]


@backend
@product(
    "shape options",
    FEW,
    [{}, {"gamma": 0, "p": 2}, {"gamma": 1.5, "p": 3, "ignore_label": 1}],
    others=(FEW[:5], [{"gamma": 2, "ignore_label": 0}]),
)
def test_samples_of_few_voxels(kernels, dtype, shape, options):
    """Their lanes are samples, not voxels; a sample's sums and gradient are those of it alone."""
    x, y = example(shape, dtype)
    check(kernels, x, y, **options)
    sums, grad = run(kernels, x, y, **options)
    for threads in (2, 3):
        other_sums, other_grad = run(kernels, x, y, threads=threads, **options)
        assert_bitwise_equal(other_sums, sums)
        assert_bitwise_equal(other_grad, grad)
    _, other_grad = run(kernels, x, y, out=np.asfortranarray(np.full_like(x, np.nan)), **options)
    assert_bitwise_equal(np.ascontiguousarray(other_grad), grad)
    run(kernels, x, y, out=x, **options)
    assert_bitwise_equal(x, grad)


@backend
@floats
def test_faults_of_samples_of_few_voxels_stay_in_them(kernels, dtype):
    x, y = example((70, 3, 2), dtype)
    tolerance = ARITHMETIC[dtype]
    expected, found = sums_of(kernels, x, y, gamma=0)
    assert found == 0
    wrong, marked = x.copy(), y.astype(np.int8)
    wrong[7, 1, 0], wrong[8, :, 1], marked[8, 1], marked[9] = np.nan, np.inf, -1, 3
    sums, found = sums_of(kernels, wrong, marked, gamma=0, ignore_label=-1)
    assert found == 2
    assert np.isnan(sums[[0, 1, 3], 7]).all()
    alone, _ = sums_of(kernels, x[8:9, :, :1], y[8:9, :1], gamma=0)
    assert_close(sums[:, 8:9], alone, rtol=tolerance, atol=tolerance)
    assert not sums[:, 9].any()
    others = np.delete(expected, (7, 8, 9), 1)  # which may be rounded differently beside NaN
    assert_close(np.delete(sums, (7, 8, 9), 1), others, rtol=tolerance, atol=tolerance)


@backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_goes_into_any_strides(kernels, layout):
    x, y = example((2, 3, 7, 20, 9), "float32")
    _, expected = run(kernels, x, y)
    _, grad = run(kernels, x, y, out=LAYOUTS[layout](np.full_like(x, np.nan)))
    assert_bitwise_equal(np.ascontiguousarray(grad), expected)


@backend
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 5, 40])
@pytest.mark.parametrize("options", [{}, {"p": 2}, {"gamma": 0}, {"gamma": 1.5}], ids=str)
def test_gradient_into_aligned_memory(kernels, dtype, channels, options):
    """Resident memory whose rows are aligned to cache lines is written by non-temporal stores."""
    x, y = example((2, channels, 64, 48), dtype)
    memory = np.ones(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64
    aligned, other = (
        memory[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
        for at in (start, start + x.itemsize)
    )
    _, grad = run(kernels, x, y, **options, out=aligned)
    grad = grad.copy()
    assert_bitwise_equal(grad, run(kernels, x, y, **options, out=other)[1])


@backend
def test_gradient_into_channels_that_are_not_aligned(kernels):
    """Non-temporal stores to such memory would end the process."""
    x, y = example((2, 16, 1001), "float32")  # samples are multiples of 64 bytes, channels are not
    memory = np.ones(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    _, grad = run(kernels, x, y, out=aligned)
    assert_bitwise_equal(grad, run(kernels, x, y)[1])


@backend
@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_gradients_are_rounded_to_nearest_even(kernels, dtype, bits):
    ties = (1 + 2.0**-bits * (np.arange(64) + 0.5)).astype(np.float32)
    numbers = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 2)])
    x, y = example((1, numbers.size, 40), dtype)
    cotangent = np.zeros((3, 1, numbers.size))
    cotangent[1] = numbers  # of the sum of the logits: the gradient of each of them
    _, grad = run(kernels, x, y, activation="none", cotangent=cotangent)
    assert_bitwise_equal(grad[0], np.broadcast_to(numbers.astype(x.dtype)[:, None], x.shape[1:]))


@backend
@product("layout channels gamma", LAYOUTS, [1, 3, 40], [None, 2], others=(LAYOUTS, [3], [2]))
def test_gradient_in_place_of_the_logits(kernels, dtype, layout, channels, gamma):
    x, y = example((2, channels, 9, 30, 11), dtype)
    x = LAYOUTS[layout](x)
    _, expected = run(kernels, x, y, gamma=gamma)
    _, grad = run(kernels, x, y, gamma=gamma, out=x)
    assert grad is x
    assert_bitwise_equal(np.ascontiguousarray(x), np.ascontiguousarray(expected))


@backend
@floats
@pytest.mark.parametrize(
    "shape", [(2, 3, 40_001), (1, 1, 70_000), (3, 20, 9000), (1, 150, 5000)], ids=str
)
@pytest.mark.parametrize("gamma", [None, 1.5])
def test_bitwise_reproducible_for_any_number_of_threads(kernels, dtype, shape, gamma):
    x, y = example(shape, dtype)
    sums, grad = run(kernels, x, y, gamma=gamma, threads=1)
    for threads in (1, 2, 3, 7):
        other_sums, other_grad = run(kernels, x, y, gamma=gamma, threads=threads)
        assert_bitwise_equal(other_sums, sums, what=f"sums with {threads} threads")
        assert_bitwise_equal(other_grad, grad, what=f"gradient with {threads} threads")


@backend
@floats
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_ignored_targets_have_no_effect(kernels, dtype, activation):
    x, _ = example((2, 3, 500), dtype)
    rng = np.random.default_rng(2)
    y = rng.random(x.shape).astype(np.float32)
    ignored = rng.random(x.shape) < 0.3
    y[ignored] = 99
    options = {"activation": activation, "binary_gamma": 2, "ignore_label": 99}
    clean, clean_grad = run(kernels, x, y, **options)
    x[ignored] = np.nan
    sums, grad = run(kernels, x, y, **options)
    assert_bitwise_equal(sums, clean)
    assert_bitwise_equal(grad, clean_grad)
    assert not grad[ignored].any()


@backend
@floats
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("gamma", [None, 0, 2])
def test_ignored_voxels_have_no_effect(kernels, dtype, channels, gamma):
    x, y = example((2, channels, 500), dtype)
    ignored = np.random.default_rng(2).random(y.shape) < 0.3
    y[ignored] = 99
    clean, clean_grad = run(kernels, x, y, ignore_label=99, gamma=gamma)
    for poison in (np.nan, np.inf, -np.inf, 6e4):
        x[np.broadcast_to(ignored[:, None], x.shape)] = poison
        sums, grad = run(kernels, x, y, ignore_label=99, gamma=gamma)
        assert_bitwise_equal(sums, clean)
        assert_close(grad, clean_grad, rtol=0)
        assert not grad[np.broadcast_to(ignored[:, None], x.shape)].any()


@backend
@product(
    "scale channels gamma",
    [1e-30, 20.0, 90.0, 1e4, 1e30],
    [1, 2, 7, 20],
    [None, 0, 2],
    others=([20.0, 1e4], [1, 2, 7, 20], [None, 2]),
)
def test_logits_of_any_size(kernels, dtype, scale, channels, gamma):
    check(kernels, *example((2, channels, 400), dtype, scale=scale), gamma=gamma)


@backend
@product(
    "shift channels binary_gamma",
    [-1e4, -120.0, -30.0, 30.0, 75.0, 120.0],
    [1, 2, 3, 20],
    [0, 2, 3],
    others=([-1e4, -30.0, 75.0], [1, 3], [2]),
)
def test_binary_terms_of_logits_far_from_zero(kernels, dtype, shift, channels, binary_gamma):
    """The softmax beside them does not subtract a logit unless it must."""
    x, y = example((2, channels, 400), dtype)
    y[0, ::7] = 99
    x = x + np.asarray(shift, x.dtype)
    check(kernels, x, y, binary_gamma=binary_gamma, gamma=0, ignore_label=99)


@backend
@floats
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("binary_gamma", [0, 2])
def test_binary_terms_of_logits_that_are_not_finite(kernels, dtype, channels, binary_gamma):
    """Requesting the NLL of every class, whose cotangent is 0, leaves the other sums and the
    gradient as they are, although other loops then compute them.
    """
    classes = max(2, channels)
    x, y = example((4, channels, 100), dtype)
    for n, value in enumerate((np.inf, -np.inf, np.nan)):
        x[n, -1, ::3] = value
    cotangent = np.random.default_rng(5).standard_normal((5, 4, classes))
    sums, grad = run(kernels, x, y, binary_gamma=binary_gamma, cotangent=cotangent)
    names = [*specs.BASIC, specs.NLL, *specs.BINARY]
    without = [k for k, name in enumerate(names) if name != specs.NLL]
    all_cotangents = np.insert(cotangent, names.index(specs.NLL), 0, axis=0)
    expected, expected_grad = run(
        kernels, x, y, binary_gamma=binary_gamma, nll=True, cotangent=all_cotangents
    )
    tolerance = 8 * ARITHMETIC[x.dtype.name]
    assert_close(sums, expected[without], rtol=tolerance, what="sums")
    rounding = 1.01 * ROUNDING[x.dtype.name]
    assert_close(
        grad, expected_grad, rtol=tolerance + rounding, atol=4 * tolerance, what="gradient"
    )


# ---- infinite logits give what torch's operations give ---------------------------------------


def torch_sums(torch, x, y, *, gamma=None, nll=False, p=1):
    """The sums of a softmax and labels by torch's own operations, (K, N, C)."""
    s = x.softmax(1)
    own = y[:, None] == torch.arange(x.shape[1]).reshape(1, -1, 1)
    terms = [s * own, s**p, own.to(x)]
    if gamma is not None:
        nll_own = torch.nn.functional.cross_entropy(x, y, reduction="none")
        if gamma:
            nll_own = nll_own * (1 - s.gather(1, y[:, None])[:, 0]) ** gamma
        terms.append(torch.where(own, nll_own[:, None], s * 0))  # 0, NaN if the probabilities are
    if nll:
        terms.append(-x.log_softmax(1))
    return torch.stack(terms).sum(3)


def infinities(channels, dtype):
    """Logits (4, C, V) with a sample for each kind of infinity, and labels of finite classes."""
    x, _ = example((4, channels, 70), dtype)
    y = np.random.default_rng(3).integers(1, channels, (4, 70))
    x[0, 0, ::3] = -np.inf  # a masked class
    x[0, -1, 1::3] = -np.inf
    y[0, 1::3] = 0
    x[1, channels // 2, 33] = np.inf
    x[2, :, 65] = -np.inf
    x[3, :2, 3] = np.inf
    return x, y


@backend_or_oracle
@product(
    "channels options",
    [2, 3, 7, 20],
    [{}, {"gamma": 0}, {"gamma": 2}, {"p": 3}, {"nll": True}, {"gamma": 0, "nll": True, "p": 2}],
    others=([2, 5, 9], [{"gamma": 0}, {"nll": True}]),
)
def test_infinite_logits_of_a_softmax(torch, kernels, dtype, channels, options):
    x, y = infinities(channels, dtype)
    if kernels is _reference:
        x = x.astype(np.float64)
    sums, grad = run(kernels, x, y, **options)
    tensor = torch.tensor(x.astype(np.float64), requires_grad=True)
    theirs = torch_sums(torch, tensor, torch.tensor(y), **options)
    tolerance = 8 * ARITHMETIC[x.dtype.name]
    assert_close(sums, theirs.detach(), rtol=tolerance, what="sums")
    cotangent = np.random.default_rng(1).standard_normal(sums.shape)
    (theirs * torch.tensor(cotangent)).sum().backward()
    rounding = 1.01 * ROUNDING[x.dtype.name]
    assert_close(grad, tensor.grad, rtol=tolerance + rounding, atol=tolerance, what="gradient")
    for n, voxel in ((1, 33), (2, 65), (3, 3)):
        assert np.isnan(np.delete(sums[:, n], specs.BASIC.index("target_sum"), 0)).all()
        assert np.isnan(grad[n, :, voxel]).all()
        assert np.isfinite(np.delete(grad[n], voxel, 1)).all()
    if "nll" not in options:
        assert not grad[0][x[0] == -np.inf].any()


@backend
@floats
@pytest.mark.parametrize("channels", [2, 3, 9])
def test_infinite_logits_give_what_the_reference_gives(kernels, dtype, channels):
    """For machines without torch."""
    x, y = infinities(channels, dtype)
    for options in ({}, {"gamma": 0}, {"gamma": 2, "nll": True}, {"p": 3}):
        check(kernels, x, y, **options)


@backend_or_oracle
@floats
@pytest.mark.parametrize("channels", [2, 3, 9])
def test_a_label_of_a_masked_class_has_an_infinite_nll(torch, kernels, dtype, channels):
    x, y = example((1, channels, 50), dtype)
    x[0, 0, 7], y[0, 7] = -np.inf, 0
    if kernels is _reference:
        x = x.astype(np.float64)
    for gamma in (0, 2):
        sums, grad = run(kernels, x, y, gamma=gamma)
        assert sums[3, 0, 0] == np.inf
        assert np.isfinite(sums[3, 0, 1:]).all()
        assert np.isfinite(grad).all()
    tensor = torch.tensor(x.astype(np.float64), requires_grad=True)
    cotangent = np.zeros((4, 1, channels))
    cotangent[3] = 1
    _, grad = run(kernels, x, y, gamma=0, cotangent=cotangent)
    torch.nn.functional.cross_entropy(tensor, torch.tensor(y), reduction="sum").backward()
    tolerance = ARITHMETIC[x.dtype.name]
    rounding = 1.01 * ROUNDING[x.dtype.name]
    assert_close(grad, tensor.grad, rtol=8 * tolerance + rounding, atol=tolerance)


@backend_or_oracle
@floats
def test_infinite_logits_of_a_single_channel(kernels, dtype):
    """Two classes with logits 0 and x: the limits of the softmax and of the cross-entropy."""
    x = np.array([np.inf, -np.inf, np.inf, -np.inf]).astype(FLOATS[dtype]).reshape(4, 1, 1)
    y = np.array([0, 0, 1, 1]).reshape(4, 1)
    x = x.astype(np.float64) if kernels is _reference else x
    sums, grad = run(kernels, x, y, gamma=0, cotangent=np.ones((4, 4, 2)))
    assert sums[1].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert sums[0].tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert sums[3].tolist() == [[np.inf, 0], [0, 0], [0, 0], [0, np.inf]]
    assert grad.ravel().tolist() == [1, 0, 0, -1]  # of the cross-entropy, sigmoid(x) - y


@backend_or_oracle
@floats
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_infinite_logits_of_a_sigmoid(kernels, dtype, kind):
    x, y = example((2, 3, 90), dtype)
    y = targets(kind, x, y)
    x[:, 1, ::4], x[:, 2, 1::4] = np.inf, -np.inf
    if kernels is _reference:
        x = x.astype(np.float64)
    finite = np.where(np.isinf(x), np.copysign(x.dtype.type(6e4), x), x)  # saturated
    sums, grad = run(kernels, x, y, activation="sigmoid", p=2)
    expected_sums, expected_grad = run(kernels, finite, y, activation="sigmoid", p=2)
    assert_bitwise_equal(sums, expected_sums)
    assert_bitwise_equal(grad, expected_grad)
    assert not grad[np.isinf(x)].any()
    assert np.isfinite(sums).all()


@backend_or_oracle
@floats
def test_softmax_of_a_single_infinite_logit(kernels, dtype):
    """One class of soft targets: torch's softmax over a single channel is NaN or 1."""
    x = np.array([np.inf, -np.inf, 3]).astype(FLOATS[dtype]).reshape(3, 1, 1)
    x = x.astype(np.float64) if kernels is _reference else x
    sums, _ = run(kernels, x, np.ones((3, 1, 1)), activation="sigmoid", gamma=0, nll=True)
    assert_close(sums[3:5, :, 0], [[np.nan, np.nan, 0]] * 2, rtol=0)


@backend_or_oracle
@floats
@pytest.mark.parametrize("binary_gamma", [0, 2, 0.5])
@pytest.mark.parametrize("kind", ["labels", "soft", "binary"])
def test_infinite_logits_of_a_binary_cross_entropy(torch, kernels, dtype, binary_gamma, kind):
    """One voxel per sample, for every pair of a logit and a target."""
    values = [np.inf, -np.inf, 0.0, 2.5, -2.5, 500.0]
    amounts = [0.0, 1.0] if kind != "soft" else [0.0, 1.0, 0.25]
    pairs = np.array(list(itertools.product(values, amounts)))
    x = pairs[:, 0].astype(FLOATS[dtype]).reshape(-1, 1, 1).repeat(2, 1)
    t = pairs[:, 1].reshape(-1, 1, 1).repeat(2, 1)
    t[:, 1] = 1 - t[:, 1]
    x = x.astype(np.float64) if kernels is _reference else x
    y = t if kind != "labels" else t[:, 1].astype(int)  # the class that is 1
    options = {"activation": "sigmoid", "binary_gamma": binary_gamma}
    options |= {"targets": kind} if kind == "binary" else {}
    cotangent = np.zeros((5 if kind == "labels" else 6, len(x), 2))
    cotangent[3:5] = 1
    sums, grad = run(kernels, x, y, cotangent=cotangent, **options)
    assert np.isfinite(grad).all()
    tensor = torch.tensor(x.astype(np.float64), requires_grad=True)
    target = torch.tensor(t)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(tensor, target, reduction="none")
    tolerance = 8 * ARITHMETIC[x.dtype.name]
    hard = (t == 0) | (t == 1)
    if binary_gamma == 0:
        assert_close(sums[3:5].sum(0), loss.detach()[..., 0], rtol=tolerance, atol=1e-30)
        loss.sum().backward()
        rounding = 1.01 * ROUNDING[x.dtype.name]
        assert_close(grad, tensor.grad, rtol=tolerance + rounding, atol=tolerance)
    loss = (loss * (target - tensor.sigmoid()).abs() ** binary_gamma).detach().numpy()
    for row, at in ((3, t == 1), (4, t == 0)):
        assert_close(sums[row][at[..., 0]], loss[at], rtol=tolerance, atol=1e-30)
        assert not sums[row][(hard & ~at)[..., 0]].any()


@backend_or_oracle
@floats
def test_nan_makes_the_sums_of_every_class_nan(kernels, dtype):
    x, y = example((2, 3, 100), dtype)
    x[1, 2, 50] = np.nan
    x = x.astype(np.float64) if kernels is _reference else x
    for options in ({}, {"gamma": 0}, {"gamma": 2, "p": 2}, {"gamma": 0, "nll": True}):
        sums, grad = run(kernels, x, y, **options)
        assert np.isfinite(sums[:, 0]).all()
        assert np.isnan(np.delete(sums[:, 1], 2, 0)).all()
        assert np.isfinite(sums[2]).all()  # target_sum counts labels
        assert np.isnan(grad[1, :, 50]).all()
        assert np.isfinite(np.delete(grad, 50, axis=2)).all()


@backend
@floats
def test_nan_stays_in_its_sample(kernels, dtype):
    """The scratch of a thread, in which the samples have ragged ends, is used for the next."""
    x, y = example((2, 3, 70), dtype)
    expected, _ = run(kernels, x[1:], y[1:])
    x[0] = np.nan
    assert_bitwise_equal(run(kernels, x, y)[0][:, 1:], expected)


# ---- a loss that is a ratio of the sums ----------------------------------------------------------

RATIOS = [
    losses.Dice(),
    losses.Dice(smooth=1, p=2, ignore_channel=1, reduction="none"),
    losses.Dice(smooth=(0.5, 2), weight=[1, 2, 3], reduction="sum"),
    losses.Jaccard(pool="batch", divisor="kept", ignore_channel=0),
    losses.Jaccard(smooth=1e-5, weight=[0, 2, 1], reduction="none"),
    losses.Tversky(alpha=0.3, beta=0.7, pool="batch", reduction="sum"),
]


@backend
@floats
@pytest.mark.parametrize("term", RATIOS, ids=repr)
@pytest.mark.parametrize("shape", [(0, 3, 50), (1, 3, 50), (4, 3, 50), (300, 3, 1)], ids=str)
def test_a_ratio_of_the_sums(kernels, dtype, term, shape):
    """Value and derivative are those of the term."""
    x, y = example(shape, dtype)
    samples = shape[0]
    y[1:2] = 0  # absent classes,
    y[2:3] = -1  # and nothing at all
    logits, labels, spec, sums = bind(x, y, p=dict(term.needs)["p"], ignore_label=-1)
    kernels.statistics(logits, labels, buffers.of(sums, "sums"), spec, 1)
    expected, slopes = term.with_derivative(Statistics(sums, spec))
    value = np.full(term.shape(samples, 3), np.nan, "f8" if dtype == "float64" else "f4")
    derivative = np.full(sums.shape, np.nan)
    weight = buffers.of(term.weights[0], "weight") if term.weights else None
    found = kernels.loss(
        logits,
        labels,
        buffers.of(value, "loss"),
        buffers.of(derivative, "derivative"),
        spec,
        term.ratio(samples, 3),
        weight,
        1,
    )
    assert found == 0
    assert_close(value, expected, rtol=1e-13 if dtype == "float64" else 1e-7, atol=1e-16)
    assert_close(derivative, np.broadcast_to(slopes, sums.shape), rtol=1e-12, atol=1e-16)
    alone = np.full_like(value, np.nan)
    of_alone = buffers.of(alone, "loss")
    kernels.loss(logits, labels, of_alone, None, spec, term.ratio(samples, 3), weight, 1)
    assert_bitwise_equal(alone, value)


@backend
def test_a_ratio_of_soft_targets_and_of_labels_out_of_range(kernels):
    x, y = example((2, 3, 50), "float32")
    term = losses.Dice(reduction="none")
    for given, count in ((targets("soft", x, y), 0), (y + 2, int((y > 0).sum()))):
        logits, labels, spec, sums = bind(x, given)
        kernels.statistics(logits, labels, buffers.of(sums, "sums"), spec, 1)
        expected, slopes = term.with_derivative(Statistics(sums, spec))
        value, derivative = np.empty(2, np.float32), np.full(sums.shape, np.nan)
        arrays = buffers.of(value, "loss"), buffers.of(derivative, "derivative")
        found = kernels.loss(logits, labels, *arrays, spec, term.ratio(2, 3), None, 1)
        assert found == count
        assert_close(value, expected, rtol=1e-7)
        assert_close(derivative, slopes, rtol=1e-12, atol=1e-16)


@backend
def test_a_ratio_with_a_negative_denominator(kernels):
    """Logits that count as probabilities may be negative: tiny scores still have all digits."""
    x, y = example((40, 3, 1), "float32")
    y[:] = 0
    term = losses.Dice(smooth=1e-5, reduction="none")
    logits, labels, spec, sums = bind(-1 - abs(x), y, activation="none")
    kernels.statistics(logits, labels, buffers.of(sums, "sums"), spec, 1)
    expected, slopes = term.with_derivative(Statistics(sums, spec))
    value, derivative = np.empty(40, np.float32), np.full(sums.shape, np.nan)
    arrays = buffers.of(value, "loss"), buffers.of(derivative, "derivative")
    kernels.loss(logits, labels, *arrays, spec, term.ratio(40, 3), None, 1)
    assert_close(value, expected, rtol=1e-7)
    assert_close(derivative, slopes, rtol=1e-12, atol=1e-18)


# ---- precision ----------------------------------------------------------------------------------


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
def test_probabilities_underflow_to_zero(kernels, dtype):
    """A class d below another has e^-d / (1 + e^-d), 0 where that is no normal number."""
    d = np.linspace(0, 800, 80_001).astype(dtype)
    x = np.stack([np.zeros_like(d), -d])[None]
    cotangent = np.zeros((3, 1, 2))
    cotangent[1, 0, 1] = 1  # dP_1/dx_1 = s_1 (1 - s_1)
    _, grad = run(kernels, x, np.zeros((1, d.size), int), cotangent=cotangent)
    e = np.exp(-d.astype(np.longdouble))
    info = np.finfo(dtype)
    expected = (e / (1 + e) ** 2).astype(np.float64)
    assert_close(grad[0, 1], expected, rtol=8 * info.eps, atol=1.01 * info.tiny)
    assert not grad[0, 1, d > -np.log(info.tiny) + 1].any()
    for c in range(2):
        far = np.zeros((1, 2, 40), dtype)
        far[:, c] = 1000
        sums, _ = run(kernels, far, np.zeros((1, 40), int))
        assert sums[1, 0, 1 - c] == 0
        assert_close(sums[1, 0, c], 40, rtol=info.eps)


@backend
def test_counts_that_float32_cannot_represent(kernels):
    """A float32 counter stops at 2^24; a broadcast array has more voxels without using memory."""
    voxels = 2**25 + 3
    x = np.broadcast_to(np.zeros((1, 2, 1), np.float32), (1, 2, voxels))
    y = np.broadcast_to(np.zeros((1, 1), np.uint8), (1, voxels))
    sums, _ = sums_of(kernels, x, y, threads=2)
    assert sums.tolist() == [[[voxels / 2, 0]], [[voxels / 2, voxels / 2]], [[voxels, 0]]]


@backend
def test_a_thousand_classes(kernels):
    check(kernels, *example((1, 1000, 700), "float32", labels="int16"))


@backend
@product(
    "margin gamma channels",
    [2.0, 8.0, 14.0, 25.0],
    [0, 2],
    [1, 2, 5, 20],
    others=([8.0, 25.0], [2], [1, 2, 5, 20]),
)
def test_cross_entropy_near_zero_is_exact(kernels, dtype, margin, gamma, channels):
    """For a confident, correct prediction 1 - s is tiny, and lost if s is rounded."""
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
def test_dice_of_many_voxels_within_1e_6(kernels):
    """512^3 voxels of two classes, one row of which is in memory."""
    row, labels = example((1, 2, 1, 1, 512), "float32", labels="uint8")
    shape = (512, 512, 512)
    x, y = np.broadcast_to(row, (1, 2, *shape)), np.broadcast_to(labels, (1, *shape))
    sums, _ = sums_of(kernels, x, y, threads=2)
    of_row, _ = sums_of(_reference, row.astype(np.float64), labels)
    dice = [(2 * i / (p + n)).mean() for i, p, n in (sums, of_row)]
    assert abs(dice[0] - dice[1]) < 1e-6
    assert sums[2].sum() == 512**3


@backend
@pytest.mark.parametrize("threads", [1, 2])
def test_labels_out_of_range_are_counted_and_skipped(kernels, threads):
    x, y = example((2, 3, 40_000), "float32")
    wrong = np.random.default_rng(3).random(y.shape) < 0.01
    marked = y.copy()
    marked[wrong] = np.random.default_rng(4).choice([-7, 3, 2**40], wrong.sum())
    sums, found = sums_of(kernels, x, marked, threads=threads)
    assert found == wrong.sum()
    y[wrong] = 99
    assert_bitwise_equal(sums, run(kernels, x, y, ignore_label=99)[0])


@backend
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_negative_label_is_no_class_of_many(kernels, dtype):
    lowest = np.iinfo(dtype).min
    classes = 5 - 2 * lowest  # its bits, read as an unsigned number, would be a class
    x = np.zeros((1, classes, 6), np.float32)
    y = np.array([[0, -1, 5, lowest, -lowest - 1, -2]], dtype)
    sums, found = sums_of(kernels, x, y, ignore_label=-2)
    assert found == 2
    assert sums[2, 0, [0, 5, -lowest - 1]].tolist() == [1, 1, 1]
    assert sums[2].sum() == 3


def test_levels_agree_in_float64():
    x, y = example((2, 5, 3001), "float64")
    results = [run(module, x, y, p=2) for module in LEVELS]
    for (sums, grad), (other_sums, other_grad) in itertools.pairwise(results):
        assert_close(other_sums, sums, rtol=1e-15)
        assert_close(other_grad, grad, rtol=1e-15, atol=1e-15)


# ---- the checks detect faults ----------------------------------------------------------------


class Broken:
    """The first backend, with one fault."""

    def __init__(self, fault):
        self.kernels, self.fault = LEVELS[0], fault

    def statistics(self, logits, labels, sums, spec, threads):
        if self.fault == "drops a voxel":
            labels = np.asarray(labels).copy()
            x = np.delete(np.asarray(logits), 5, axis=2)
            logits, labels = buffers.of(x, "x"), buffers.of(np.delete(labels, 5, axis=1), "y")
        found = self.kernels.statistics(logits, labels, sums, spec, threads)
        total = np.asarray(sums)
        if self.fault == "sums in half":
            total[:] = total.astype(np.float16)
        if self.fault == "swaps sums":
            total[:] = total[[1, 0, 2]]
        if self.fault == "swaps classes":
            total[:] = total[:, :, ::-1].copy()
        return found

    def gradient(self, logits, labels, cotangent, grad, spec, threads):
        found = self.kernels.gradient(logits, labels, cotangent, grad, spec, threads)
        dx = np.asarray(grad)
        if self.fault == "flips the sign":
            dx *= -1
        if self.fault == "leaves a voxel":
            dx[0, 0, 5] = np.nan
        if self.fault == "rounds to half":
            dx[:] = dx.astype(np.float16)
        if self.fault == "shifts by a voxel":
            dx[:] = np.roll(dx, 1, axis=2)
        if self.fault == "skips a sample":
            dx[1] = 0
        return found


FAULTS = (
    "drops a voxel",
    "sums in half",
    "swaps sums",
    "swaps classes",
    "flips the sign",
    "leaves a voxel",
    "rounds to half",
    "shifts by a voxel",
    "skips a sample",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_detected(fault):
    x, y = example((2, 3, 300), "float32")
    check(Broken("none"), x, y)
    with pytest.raises(AssertionError, match="differ"):
        check(Broken(fault), x, y)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([1.0], [1.1]), ([np.nan], [1.0]), ([1.0], [np.nan]), ([np.inf], [1.0]), ([1.0], [1.0, 1.0])],
)
def test_comparisons_detect_differences(actual, expected):
    with pytest.raises(AssertionError):
        assert_close(actual, expected, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_bitwise_equal(actual, expected)
