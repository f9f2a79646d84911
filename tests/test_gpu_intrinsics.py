"""The operations the CUDA kernels are written in: compiled for the host where it has the
instructions, else executed as PTX, or looked for in it.
"""

import ctypes
import itertools
import re
import struct

import numpy as np
import ptx
import pytest
from compare import assert_close
from emulated.arrays import dtype_of

numba = pytest.importorskip("numba", reason="needs the extra gpu")
llvmlite = pytest.importorskip("llvmlite", reason="comes with numba")
from numba import types  # noqa: E402

from dice_core.gpu import compile as compiler  # noqa: E402
from dice_core.gpu import intrinsics  # noqa: E402
from dice_core.gpu import plan as plans  # noqa: E402
from dice_core.spec import Spec  # noqa: E402

POINTER, LONG = intrinsics.POINTER, types.int64
COUNTS = (1, 2, 4, 8)


def on_host(function, *argument_types):
    """The function compiled for the host, taking addresses and integers."""
    made = numba.cfunc(types.void(*argument_types))(function)
    kinds = [ctypes.c_int64 if kind == LONG else ctypes.c_void_p for kind in argument_types]
    call = ctypes.CFUNCTYPE(None, *kinds)(made.address)
    return lambda *arguments, keep=made: call(*arguments)


def aligned(count, dtype):
    """Random bits, aligned to a word."""
    dtype = np.dtype(dtype)
    memory = np.random.default_rng(1).integers(0, 120, count * dtype.itemsize + 64, np.uint8)
    first = -memory.ctypes.data % 16
    return memory[first : first + count * dtype.itemsize].view(dtype)


FLOATS = [
    (dtype, count)
    for dtype, count in itertools.product(intrinsics.REAL, COUNTS)
    if dtype_of(dtype).itemsize * count <= 16
]


def executed(function, *arguments, allocations, noise=None):
    """Executes the PTX of a function of addresses and integers, with one thread."""
    signature = types.void(*(kind for kind, _ in arguments))
    text, _ = compiler.cuda.compile(function, signature, device=False, abi="numba", cc=(9, 0))
    packed = struct.pack(f"{len(arguments)}q", *(value for _, value in arguments))
    sizes = {array.ctypes.data: array.nbytes for array in allocations}
    return ptx.launch(ptx.Kernel(text), 1, 1, packed, sizes, noise=noise)


def loaded(load, source, kind, count):
    """What it loads from the second quarter of an array, and if the condition does not hold."""

    def read(pointer, offset, to, condition):
        numbers = load(pointer, offset, condition != 0)
        for i in range(count):
            to[i] = numbers[i]

    found = []
    for condition in (True, False):
        to = np.zeros(count, kind.name)
        executed(
            read,
            (POINTER, source.ctypes.data if condition else 0),
            (LONG, count * source.itemsize),
            (types.CPointer(kind), to.ctypes.data),
            (LONG, condition),
            allocations=[source, to],
        )
        found.append(to)
    return found


@pytest.mark.parametrize(("dtype", "count"), FLOATS)
def test_numbers_are_loaded(dtype, count):
    real, source = intrinsics.REAL[dtype], aligned(4 * count, dtype_of(dtype))
    load = intrinsics.load_numbers(dtype, count, -np.inf)
    there, absent = loaded(load, source, real, count)
    np.testing.assert_array_equal(there, source[count : 2 * count].astype(real.name))
    np.testing.assert_array_equal(absent, np.full(count, -np.inf))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "dtype", ["bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))]
)
def test_labels_are_loaded(dtype, count):
    kind, source = intrinsics.label_type(dtype), aligned(4 * count, dtype_of(dtype))
    if dtype != "bool":
        source[count] = np.iinfo(dtype).max
        source[2 * count - 1] = np.iinfo(dtype).min
    there, absent = loaded(intrinsics.load_labels(dtype, count), source, kind, count)
    np.testing.assert_array_equal(there, source[count : 2 * count].astype(kind.name))
    np.testing.assert_array_equal(absent, np.zeros(count))


@pytest.mark.parametrize("dtype", intrinsics.REAL)
def test_a_number_is_loaded(dtype):
    real, source = intrinsics.REAL[dtype], aligned(4, dtype_of(dtype))
    load, to = intrinsics.load_number(dtype), np.zeros(1, real.name)

    def read(pointer, offset, to):
        to[0] = load(pointer, offset)

    read = on_host(read, POINTER, LONG, types.CPointer(real))
    read(source.ctypes.data, source.itemsize, to.ctypes.data)
    assert to[0] == source[1]


def test_quotients_of_integers():
    floor_divide = intrinsics.floor_divide

    def apply(a, b, to):
        to[0] = floor_divide(types.int32(a), types.int32(b))

    to = np.zeros(1, np.int32)
    apply = on_host(apply, LONG, LONG, types.CPointer(types.int32))
    for a, b in ((0, 1), (7, 7), (2**31 - 1, 3), (2**31 - 1, 2**31 - 1), (6, 7)):
        apply(a, b, to.ctypes.data)
        assert to[0] == a // b


@pytest.mark.parametrize(("dtype", "count"), FLOATS)
@pytest.mark.parametrize(("condition", "step"), [(True, 1), (False, 1), (True, 3)])
def test_numbers_are_stored_rounded_and_nothing_beside_them(dtype, count, condition, step):
    store, real = intrinsics.store_numbers(dtype, count, step), intrinsics.REAL[dtype]
    cuda, size = compiler.cuda, (1 + step) * count

    def write(pointer, offset, source, condition):
        numbers = cuda.local.array(size, real)
        for i in range(size):
            numbers[i] = source[i]
        store(pointer, offset, numbers, count, condition != 0)

    numbers = np.random.default_rng(2).standard_normal(size).astype(real.name)
    to = aligned(4 * count, dtype_of(dtype))
    to[:] = 7
    executed(
        write,
        (POINTER, to.ctypes.data),
        (LONG, count * to.itemsize),
        (types.CPointer(real), numbers.ctypes.data),
        (LONG, condition),
        allocations=[to, numbers],
    )
    expected = numbers[count::step].astype(to.dtype) if condition else np.full(count, 7, to.dtype)
    np.testing.assert_array_equal(to[count : 2 * count], expected)
    assert (np.delete(to, range(count, 2 * count)) == 7).all()


@pytest.mark.parametrize(("factor", "exponent"), [(1, 0), (1, 1), (3, 2), (1, 7), (5, 4), (8, 7)])
def test_powers(factor, exponent):
    power = intrinsics.scaled_power(factor, exponent)

    def apply(to):
        to[0] = power(to[0])

    number = np.array([1.25])
    on_host(apply, types.CPointer(types.float64))(number.ctypes.data)
    assert number[0] == factor * 1.25**exponent


@pytest.mark.parametrize("exponent", range(8))
def test_complements_of_powers(exponent):
    complement = intrinsics.power_complement(exponent)

    def apply(count, numbers):
        for i in range(count):
            numbers[i] = complement(numbers[i])

    x = np.concatenate([np.logspace(-37, 0, 1001), [0]]).astype(np.float32)
    found, wide = x.copy(), x.astype(np.float64)
    on_host(apply, LONG, types.CPointer(types.float32))(len(x), found.ctypes.data)
    expected = sum(wide * (1 - wide) ** k for k in range(exponent)) + np.zeros(len(x))
    assert_close(found, expected, rtol=4e-7)


def applied(function, x):
    """The function of each number, on the host."""

    def apply(count, numbers):
        for i in range(count):
            numbers[i] = function(numbers[i])

    found = x.copy()
    real = types.CPointer(getattr(types, str(x.dtype)))
    on_host(apply, LONG, real)(len(x), found.ctypes.data)
    return found


def ulps(found, expected):
    """The errors in units in the last place."""
    return np.abs(found - expected) / np.spacing(np.abs(expected.astype(found.dtype)))


@pytest.fixture
def host_division(monkeypatch):
    """In place of the GPU's approximation."""

    def reciprocal(builder, x):
        return builder.fdiv(llvmlite.ir.Constant(x.type, 1.0), x)

    monkeypatch.setattr(intrinsics, "_reciprocal", reciprocal)


@pytest.mark.parametrize(("dtype", "digits", "limit"), [("float32", 7, 1), ("float64", 16, 1.3)])
def test_logarithms(host_division, dtype, digits, limit):
    near_1 = np.logspace(-digits, -0.3, 50001)
    most = 37 if dtype == "float32" else 306
    x = np.concatenate([1 + near_1, 1 - near_1, np.logspace(-most, most, 200001)]).astype(dtype)
    x = np.append(x, np.finfo(dtype).smallest_normal)
    assert ulps(applied(intrinsics.log, x), np.log(x.astype(np.longdouble))).max() <= limit
    assert np.isnan(applied(intrinsics.log, np.full(1, np.nan, dtype))).all()


def test_exponentials():
    x = np.concatenate([np.linspace(-708.39, 709, 200001), np.linspace(-1, 1, 100001)])
    assert ulps(applied(intrinsics.exp, x), np.exp(x.astype(np.longdouble))).max() <= 1
    payload = np.array([0x7FF8000000000ABC]).view(np.float64)[0]  # would change the exponent
    special = applied(intrinsics.exp, np.array([-708.4, -1e300, -np.inf, np.nan, payload]))
    np.testing.assert_array_equal(special, [0, 0, 0, np.nan, np.nan])


@pytest.mark.parametrize("exponent", [0.0, 2.0, 0.5, 2.5, 1e300])
def test_powers_of_probabilities(exponent):
    power = intrinsics.probability_power(exponent)
    x = np.concatenate([[0, 1], np.logspace(-16, -1e-3, 1001)])
    with np.errstate(divide="ignore"):
        nll = np.abs(np.log(x))

    def apply(count, numbers, nll):
        for i in range(count):
            numbers[i] = power(numbers[i], nll[i])

    found, real = x.copy(), types.CPointer(types.float64)
    on_host(apply, LONG, real, real)(len(x), found.ctypes.data, nll.ctypes.data)
    assert_close(found, x**exponent, rtol=2e-14)


@pytest.mark.parametrize("noise", [None, 1])
def test_reciprocals(noise):
    reciprocal, count = intrinsics.reciprocal, 500
    x = np.concatenate([np.geomspace(1, 2048, count - 1), [np.nan]])

    def apply(numbers):
        for i in range(count):
            numbers[i] = reciprocal(numbers[i])

    found = x.copy()
    of_numbers = (types.CPointer(types.float64), found.ctypes.data)
    executed(apply, of_numbers, allocations=[found], noise=noise)
    assert ulps(found, 1 / x.astype(np.longdouble))[:-1].max() <= 1
    assert np.isnan(found[-1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index", range(4))
def test_sigmoids(monkeypatch, host_division, dtype, index):
    """With the host's exponential in place of the GPU's approximation."""

    def exp(builder, x):
        return builder.call(builder.module.declare_intrinsic("llvm.exp", [x.type]), [x])

    if dtype == "float32":
        monkeypatch.setattr(intrinsics, "_exp", exp)
    sigmoids = intrinsics.sigmoids
    function = numba.njit(lambda x: sigmoids(x)[index])
    most, rtol = (87, 4e-7) if dtype == "float32" else (708, 1e-15)
    x = np.concatenate([np.linspace(-most, most, 100001), np.logspace(-7, 0, 1001)])
    x = np.concatenate([x, [np.inf, -np.inf, np.nan]]).astype(dtype)
    wide = x.astype(np.longdouble) * (1 if index % 2 == 0 else -1)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = 1 / (1 + np.exp(-wide)) if index < 2 else np.logaddexp(0, -wide)
    assert_close(applied(function, x), expected, rtol=rtol)


def test_the_counter_returns_its_old_value():
    atomic_increment = intrinsics.atomic_increment

    def apply(pointer, to):
        to[0] = atomic_increment(pointer)

    counter, before = np.array([41], np.int32), np.array([0], np.int32)
    apply = on_host(apply, POINTER, types.CPointer(types.int32))
    apply(counter.ctypes.data, before.ctypes.data)
    assert (counter[0], before[0]) == (42, 41)


def ptx_of(kind, logits, channels=2, p=1, gamma=None):
    made_for = plans.plan(logits, "uint8", channels, Spec(p=p, gamma=gamma), 4096)
    return compiler.ptx(kind, made_for, (9, 0))


class TestPtx:
    """Instructions that the host cannot run: they are present, in the right order."""

    def test_one_exponential_per_value_and_one_reciprocal_per_voxel(self):
        text = ptx_of("statistics", "float32")
        assert len(re.findall(r"ex2\.approx\.ftz\.f32 ", text)) == 8
        assert len(re.findall(r"rcp\.approx\.ftz\.f32 ", text)) == 4
        assert "max.f32" in text

    @pytest.mark.parametrize(
        ("kind", "gamma", "count"),
        [("statistics", 2.0, 8), ("gradient", 0.0, 8), ("gradient", 0.5, 16)],
    )  # fmt: skip
    def test_powers_take_exponentials_only_where_gamma_is_not_whole(self, kind, gamma, count):
        text = ptx_of(kind, "float32", gamma=gamma)
        assert len(re.findall(r"ex2\.approx\.ftz\.f32 ", text)) == count
        assert "lg2" not in text

    def test_the_last_block_sees_what_the_others_wrote(self):
        text = compiler.ptx("loss", plans.Plan("float32", "uint8", 1), (9, 0))
        found = re.findall(r"bar\.sync|membar\.gl|atom\.global\.add|ld\.relaxed\.gpu", text)
        count = found.index("atom.global.add")
        assert found[count - 2 : count + 4] == [
            *("bar.sync", "membar.gl", "atom.global.add", "membar.gl", "bar.sync"),
            "ld.relaxed.gpu",
        ]
