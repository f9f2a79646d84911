"""`dice_core.dask` against `dice_core` on the whole array, block by block and in little memory."""

import inspect
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from compare import assert_bitwise_equal, assert_close

import dice_core
from dice_core.losses import TERMS, CrossEntropy, Dice, Focal, GeneralizedDice, Jaccard, Tversky

dask = pytest.importorskip("dask", reason="needs the extra dask")
da = pytest.importorskip("dask.array", reason="needs the extra dask")
import dice_core.dask  # noqa: E402

SHAPE = (3, 3, 6, 7, 8)
CHUNKS = (2, -1, (1, 5), 4, 3)
WEIGHT = [0.5, 1.0, 2.0]


@pytest.fixture(autouse=True)
def synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def arrays(shape=SHAPE, dtype="float64", labels="uint8"):
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal(shape).astype(dtype)
    return x, rng.integers(0, max(2, shape[1]), (shape[0], *shape[2:])).astype(labels)


def check(x, y, chunks=CHUNKS, term=None, rtol=1e-12, **options):
    """Loss, sums and gradient are those of the whole array."""
    blocks = da.from_array(x, chunks=chunks)
    lazy = dice_core.dask.loss(blocks, y, term, **options)
    expected, expected_grad = dice_core.loss_and_grad(x, y, term, **options)
    value = lazy.compute()
    assert isinstance(lazy, da.Array)
    assert (lazy.shape, lazy.dtype) == (value.shape, value.dtype) == (expected.shape, lazy.dtype)
    assert_close(value, expected, rtol=rtol, what="loss")

    needs = dict((term or dice_core.losses.of(None, p=options.get("p", 1))).needs)
    summed = {name: options[name] for name in ("ignore_label", "activation") if name in options}
    total = dice_core.dask.statistics(blocks, y, **needs, **summed).to_host()
    whole = dice_core.statistics(x, y, **needs, **summed)
    assert (total.spec, total.dtype) == (whole.spec, whole.dtype)
    assert_close(total.array, whole.array, rtol=rtol, what="sums")

    rest = {name: options[name] for name in options if name not in (*summed, "p")}
    grad = dice_core.dask.gradient(blocks, y, total, term, **rest)
    assert (grad.chunks, grad.dtype) == (blocks.chunks, x.dtype)
    grad = grad.compute()
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    size = np.abs(expected_grad).max(initial=0)
    assert_close(grad, expected_grad, rtol=10 * rtol, atol=10 * rtol * size, what="gradient")


# ---- the same numbers as on the whole array ------------------------------------------------------


@pytest.mark.parametrize("kind", [entry.term for entry in TERMS], ids=lambda kind: kind.__name__)
def test_every_loss(kind):
    for pool in kind.pools:
        check(*arrays(), term=kind(pool=pool))
    check(*arrays(), term=kind(reduction="sum"))


@pytest.mark.parametrize(
    "term",
    [
        None,
        Dice(smooth=1, weight=WEIGHT) + 0.5 * CrossEntropy(weight=WEIGHT, label_smoothing=0.1),
        2 * Jaccard(pool="batch") + Tversky(pool="batch") + Focal(pool="batch"),
        Dice(reduction="none") + CrossEntropy(pool="none", reduction="none"),
        Dice(reduction="classes", p=2),
        GeneralizedDice(reduction="none"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("chunks", [CHUNKS, -1, (1, -1, -1, -1, -1), (1, -1, 3, 2, 2)], ids=str)
def test_compounds_and_chunks(term, chunks):
    check(*arrays(), chunks, term)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "classes", "batch"])
def test_options_of_dice(reduction):
    options = {"weight": WEIGHT, "ignore_channel": 0, "ignore_label": 1, "smooth": 0.5, "p": 3}
    check(*arrays(), reduction=reduction, **options)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((4, 3), (2, -1)), ((0, 3, 5), (1, -1, 2)), ((2, 3, 0), -1), ((2, 1, 5, 4), (1, 1, 2, 3))],
    ids=str,
)
def test_shapes(shape, chunks):
    check(*arrays(shape), chunks, reduction="none")


def test_targets():
    x, y = arrays()
    check(x, y[:, None])
    soft = np.random.default_rng(1).random(SHAPE)
    check(x, soft, activation="sigmoid")
    check(x, soft, term=Dice(smooth=1) + CrossEntropy())
    x, y = arrays((2, 1, 4, 5, 6), labels="bool")
    check(x, y[:, None], 3, activation="sigmoid")


def test_targets_get_the_chunks_of_x():
    x, y = arrays()
    blocks = da.from_array(x, chunks=CHUNKS)
    expected = dice_core.dask.loss(blocks, y).compute()
    for targets in (y.astype("int64"), y[:, None]):
        lazy = da.from_array(targets, chunks=5)
        assert_bitwise_equal(dice_core.dask.loss(blocks, lazy).compute(), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype):
    x, y = arrays(dtype="float32")
    x = x.astype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    blocks = da.from_array(x, chunks=CHUNKS)
    value, dx = dice_core.loss_and_grad(x, y)
    total = dice_core.dask.statistics(blocks, y).to_host()
    grad = dice_core.dask.gradient(blocks, y, total).compute()
    assert total.dtype == dtype
    assert_close(dice_core.dask.loss(blocks, y).compute(), value, rtol=1e-6)
    assert grad.dtype == dx.dtype
    rtol = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    dx = dx.astype(np.float64)
    assert_close(grad, dx, rtol=rtol, atol=rtol * np.abs(dx).max())


@pytest.mark.parametrize("pool", ["none", "batch"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_score(pool, activation):
    x, y = arrays()
    y[0] = 1
    y = y if activation == "softmax" else x > 1
    options = {"pool": pool, "activation": activation, "ignore_label": 2}
    lazy = dice_core.dask.score(da.from_array(x, chunks=CHUNKS), y, **options)
    for each, expected in zip(lazy, dice_core.score(x, y, **options), strict=True):
        assert each.shape == expected.shape
        assert_bitwise_equal(each.compute(), expected)


def test_incoming_gradient():
    x, y = arrays()
    blocks, upstream = da.from_array(x, chunks=CHUNKS), np.array([1.0, -2.0, 3.0])
    total = dice_core.dask.statistics(blocks, y).to_host()
    options = {"reduction": "none", "grad_loss": upstream}
    grad = dice_core.dask.gradient(blocks, y, total, **options).compute()
    expected = dice_core.gradient(x, y, total, **options)
    assert_bitwise_equal(grad, expected)


def test_sums_that_overflow_are_silent():
    x = np.full((1, 2, 4), np.inf)
    x[..., 2:] = -np.inf
    y = np.zeros((1, 4), np.uint8)
    blocks = da.from_array(x, chunks=(1, -1, 1))
    assert np.isnan(dice_core.dask.loss(blocks, y, activation="none").compute())


# ---- what is lazy, and what is read --------------------------------------------------------------


def generated(count, shape=(1, 4, 64, 64, 64), side=16):
    """A volume whose blocks are made when they are computed, and counted."""

    def block(block_info=None):
        count.append(1)
        return np.ones(block_info[None]["chunk-shape"], np.float32)

    chunks = da.core.normalize_chunks((1, -1, side, side, side), shape)
    x = da.map_blocks(block, chunks=chunks, meta=np.empty((0,) * len(shape), np.float32))
    return x, da.zeros((shape[0], *shape[2:]), dtype=np.uint8, chunks=side)


def test_nothing_is_computed_before_it_is_asked_for():
    x, y = generated(count := [], shape=(2, 4, 32, 32, 32))
    loss, score = dice_core.dask.loss(x, y), dice_core.dask.score(x, y)
    total = dice_core.dask.statistics(x, y)
    assert not count
    dask.compute(loss, total.array, *score)
    assert len(count) == 16  # one pass for all of them
    total = total.to_host()
    grad = dice_core.dask.gradient(x, y, total)
    assert len(count) == 32
    grad.compute()
    assert len(count) == 48


class Discard:
    def __setitem__(self, where, block):
        pass


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory():
    """Of 64 blocks there is one in memory, and its gradient."""
    x, y = generated([])
    block = x.nbytes // 64
    small, _ = generated([], shape=(1, 4, 32, 32, 32))
    dice_core.dask.loss(small, y[:, :32, :32, :32]).compute()  # imports and caches
    loss, score = dice_core.dask.loss(x, y), dice_core.dask.score(x, y)
    graph = 2 << 20
    assert peak_of(lambda: dask.compute(loss, *score)) < 2 * block + graph
    total = dice_core.dask.statistics(x, y).to_host()
    grad = dice_core.dask.gradient(x, y, total)
    assert peak_of(lambda: da.store(grad, Discard(), lock=False)) < 3 * block + graph
    assert peak_of(lambda: (x + 0).sum().compute()) < 3 * block + graph
    assert peak_of(lambda: x.compute()) > 64 * block


def test_blocks_of_numpy_arrays_are_views(tmp_path):
    x, y = arrays((2, 3, 32, 32, 32), "float32")
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with dask.config.set({"array.chunk-size": "64 KiB"}):
        volume = dice_core.dask._Volume(mapped, y, dice_core.spec.checked(), None, 1, None)
        value = dice_core.dask.loss(mapped, y)
    assert volume.x.npartitions > 8
    assert volume.x.numblocks[1] == 1
    for blocks, array in ((volume.x, mapped), (volume.y, y)):
        for key in dask.core.flatten(blocks.__dask_keys__()):
            assert np.shares_memory(blocks.dask[key], array)
    assert_close(value.compute(), dice_core.loss(x, y), rtol=1e-6)


def test_lazy_statistics():
    x, y = arrays()
    blocks = da.from_array(x, chunks=CHUNKS)
    lazy = dice_core.dask.statistics(blocks, y, gamma=0)
    whole = dice_core.statistics(x, y, gamma=0)
    assert repr(lazy) == repr(whole)
    i, _, _, entropy = lazy
    assert_close((i / entropy).compute(), whole.intersection / whole.cross_entropy_sum, rtol=1e-12)
    term = Dice() + CrossEntropy()
    assert_close(term(lazy), term(whole), rtol=1e-12)
    twice = pickle.loads(pickle.dumps(lazy + lazy)).to_host()
    assert_close(twice.array, 2 * whole.array, rtol=1e-12)


def test_zarr(tmp_path):
    pytest.importorskip("zarr", reason="needs zarr")
    x, y = arrays((2, 3, 8, 8, 8), "float32")
    da.from_array(x, chunks=(1, -1, 4, 4, 4)).to_zarr(tmp_path / "x.zarr")
    da.from_array(y, chunks=8).to_zarr(tmp_path / "y.zarr")
    stored = da.from_zarr(tmp_path / "x.zarr"), da.from_zarr(tmp_path / "y.zarr")
    total = dice_core.dask.statistics(*stored).to_host()
    dice_core.dask.gradient(*stored, total).to_zarr(tmp_path / "dx.zarr")
    dx = da.from_zarr(tmp_path / "dx.zarr")
    assert dx.chunksize == (1, 3, 4, 4, 4)
    assert_bitwise_equal(dx.compute(), dice_core.gradient(x, y, total))


# ---- schedulers ----------------------------------------------------------------------------------


def results(x, y):
    """Loss, scores, sums and gradient."""
    blocks = da.from_array(x, chunks=CHUNKS)
    term = Dice(smooth=1, weight=WEIGHT) + CrossEntropy()
    lazy = dice_core.dask.statistics(blocks, y, gamma=0)
    loss, score = dice_core.dask.loss(blocks, y, term), dice_core.dask.score(blocks, y)
    value, array, *scores = dask.compute(loss, lazy.array, *score)
    total = dice_core.Statistics(array, lazy.spec, lazy.dtype)
    grad = dice_core.dask.gradient(blocks, y, total, term, grad_loss=2)
    return value, array, *scores, grad.compute()


@pytest.fixture(scope="module")
def synchronously():
    with dask.config.set(scheduler="synchronous"):
        return results(*arrays(dtype="float32"))


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "threads", "num_workers": 1},
        {"scheduler": "threads", "num_workers": 4},
        {"scheduler": "processes", "num_workers": 2},
        {"scheduler": "synchronous", "split_every": 2, "optimization.fuse.active": True},
    ],
    ids=str,
)
def test_schedulers_give_the_same_bits(settings, synchronously):
    with dask.config.set(settings):
        for actual, expected in zip(results(*arrays(dtype="float32")), synchronously, strict=True):
            assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("processes", [False, True])
def test_cluster_gives_the_same_bits(processes, synchronously, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs distributed")
    cluster = distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=processes,
        dashboard_address=None,
        local_directory=tmp_path,
    )
    with cluster, distributed.Client(cluster, timeout=30), dask.config.set(scheduler=None):
        for actual, expected in zip(results(*arrays(dtype="float32")), synchronously, strict=True):
            assert_bitwise_equal(actual, expected)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dice_core.dask.__all__)
def test_the_arguments_are_those_of_dice_core(name):
    ours = inspect.signature(getattr(dice_core.dask, name)).parameters
    theirs = dict(inspect.signature(getattr(dice_core, name)).parameters)
    theirs.pop("out", None)
    assert list(ours) == list(theirs)
    for each in set(ours) - {"num_threads"}:
        assert (ours[each].default, ours[each].kind) == (theirs[each].default, theirs[each].kind)


X, Y = (da.from_array(array, chunks=4) for array in arrays((2, 3, 6, 7)))
ALL = X.rechunk({1: -1})


@pytest.mark.parametrize(
    ("x", "y", "options", "kind", "message"),
    [
        (X.rechunk({1: 2}), Y, {}, ValueError, r"^x has chunks \(2, 1\) along the channels"),
        (ALL, [1], {}, TypeError, "^y must be a dask array or a NumPy array, got list"),
        (None, Y, {}, TypeError, "^x must be a dask array or a NumPy array, got NoneType"),
        (ALL, Y[Y > 0], {}, ValueError, "^y has chunks of unknown size"),
        (ALL[:, :, ALL[0, 0, :, 0] > 0], Y, {}, ValueError, "^x has chunks of unknown size"),
        (ALL, Y[:, 1:], {}, ValueError, r"^y must have shape \(2, 6, 7\) or"),
        (ALL, Y.astype(float), {}, TypeError, "^y must hold integer or bool class labels"),
        (ALL.astype(int), Y, {}, TypeError, "^x must hold floating-point logits"),
        (ALL.astype(">f4"), Y, {}, TypeError, "^x is not in native byte order"),
        (ALL, np.ma.ones((2, 6, 7), int), {}, TypeError, "^y is a masked array"),
        (ALL[0, 0, 0], Y, {}, ValueError, "^x must have at least two axes"),
        (ALL, Y, {"backend": "cuda"}, dice_core.BackendError, "reads cuda memory"),
        (ALL, Y, {"backend": "quantum"}, ValueError, "backend=quantum is not a backend"),
        (ALL, Y, {"num_threads": 0}, ValueError, "^num_threads must be at least 1"),
        (ALL, Y, {"check_labels": "yes"}, TypeError, "^check_labels must be True or False"),
        (ALL, Y, {"activation": "relu"}, ValueError, "^activation must be one of"),
    ],
)
def test_errors_come_at_the_call(x, y, options, kind, message):
    with pytest.raises(kind, match=message):
        dice_core.dask.loss(x, y, **options)
    with pytest.raises(kind, match=message):
        dice_core.dask.statistics(x, y, **options)
    with pytest.raises(kind, match=message):
        dice_core.dask.score(x, y, **options)


def test_errors_of_terms_and_statistics():
    with pytest.raises(ValueError, match=r"^weight must have 3 entries"):
        dice_core.dask.loss(ALL, Y, weight=[1, 2])
    with pytest.raises(TypeError, match=r"^term must be a loss"):
        dice_core.dask.loss(ALL, Y, "Dice")
    with pytest.raises(ValueError, match=r"^pool must be one of"):
        dice_core.dask.score(ALL, Y, pool="classes")
    lazy = dice_core.dask.statistics(ALL, Y)
    with pytest.raises(TypeError, match=r"lazy ones; pass statistics\.to_host\(\)"):
        dice_core.dask.gradient(ALL, Y, lazy)
    total = lazy.to_host()
    with pytest.raises(TypeError, match=r"^statistics must be those of dice_core.statistics"):
        dice_core.dask.gradient(ALL, Y, total.array)
    with pytest.raises(ValueError, match=r"^x and y do not match these statistics"):
        dice_core.dask.gradient(ALL[:1], Y[:1], total)
    with pytest.raises(ValueError, match=r"needs statistics with gamma"):
        dice_core.dask.gradient(ALL, Y, total, CrossEntropy())
    with pytest.raises(ValueError, match=r"^grad_loss must have the loss's shape"):
        dice_core.dask.gradient(ALL, Y, total, grad_loss=[1, 2, 3])


def test_functions_of_arrays_in_memory_name_the_module():
    with pytest.raises(TypeError, match=r"^x is a dask Array; use dice_core\.dask$"):
        dice_core.loss(ALL, Y)


def test_out_of_range_labels_raise_in_their_block():
    x, y = arrays((2, 3, 6, 7))
    blocks = da.from_array(x, chunks=(1, -1, 4, 4))
    total = dice_core.dask.statistics(blocks, y).to_host()
    y[1, 5, 6] = 9
    message = (
        r"in a block of x of shape \(1, 3, 2, 3\): y has 1 label outside \[0, 3\) \(-1 is ignored\)"
        r"; the first is 9 at \(0, 1, 2\)"
    )
    for lazy in (dice_core.dask.loss(blocks, y), dice_core.dask.gradient(blocks, y, total)):
        with pytest.raises(ValueError, match=message):
            lazy.compute(scheduler="threads")


WITHOUT_DASK = """
import sys
import dice_core
assert "dask" not in sys.modules
sys.modules["dask"] = None  # as if it were not installed
import dice_core.dask
"""


def test_without_dask(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_DASK]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = "dice_core.dask needs dask.array, which is not installed"
    assert f'ImportError: {message}: pip install "dice_core[dask]"' in run.stderr
