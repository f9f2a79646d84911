"""The executor of PTX against other implementations of the same operations; each of its checks."""

import math
import operator
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import ptx
import pytest
from ptx import Fault

HEADER = """
.version 8.0
.target sm_90
.address_size 64
{shared}
.visible .entry test(
    .param .u64 test_in,
    .param .u64 test_out
)
{{
    {local}
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .reg .f64 %fd<9>;
    ld.param.u64 %rd7, [test_in];
    ld.param.u64 %rd8, [test_out];
    cvta.to.global.u64 %rd7, %rd7;
    cvta.to.global.u64 %rd8, %rd8;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd6, %r0, 64;
    add.s64 %rd7, %rd7, %rd6;
    add.s64 %rd8, %rd8, %rd6;
{body}
    ret;
}}
"""
THREADS = 64
WORDS = 64  # bytes of each thread's part of the input and of the output
SHARED = ".shared .align 16 .b8 table[512];"
# Bits, as the widths of registers have names.
REGISTER = {"pred": "%p", "16": "%rs", "32": "%r", "64": "%rd"}
EDGES = {
    16: [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x00FF, 0x0080, 0x1234, 15, 16, 17],
    32: [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFF, 0x80, 31, 32, 33, 200],
    64: [0, 1, 2, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**32, 2**31, 63, 64, 65, 12345678901],
}


class Memory:
    """An input and an output, of 64 bytes for each thread, and the launch on them."""

    def __init__(self, threads=THREADS, blocks=1, size=None):
        self.threads, self.blocks = threads, blocks
        size = threads * WORDS if size is None else size
        padded = [np.zeros(size + 32, np.uint8) for _ in range(2)]
        self.given, self.out = (each[-each.ctypes.data % 16 :][:size] for each in padded)

    def run(self, body, shared="", local="", **options):
        kernel = ptx.Kernel(HEADER.format(body=body, shared=shared, local=local))
        arrays = self.given, self.out
        allocations = {each.ctypes.data: each.size for each in arrays}
        arguments = struct.pack("2q", *allocations)
        return ptx.launch(kernel, self.blocks, self.threads, arguments, allocations, **options)


def computed(opcode, columns, result, sources=None, **options):
    """The results of an opcode for columns of the bits of its operands.

    `result` and `sources`: the suffixes of their types, `u64` for example; loaded and stored so.
    """
    count = len(columns[0])
    memory = Memory(threads=count)
    given = memory.given.reshape(count, WORDS)
    sources = sources or [result] * len(columns)
    lines, registers = [], []
    for i, (column, of) in enumerate(zip(columns, sources, strict=True)):
        size = int(of[1:]) // 8
        given[:, 16 * i : 16 * i + size] = np.asarray(column, f"u{size}")[:, None].view(np.uint8)
        register = f"{REGISTER[str(max(16, 8 * size))]}{i + 1}"
        lines.append(f"ld.global.{of} {register}, [%rd7+{16 * i}];")
        registers.append(register)
    to, end = f"{REGISTER[result[1:]]}5", ""
    lines.append(f"{opcode} {to}, {', '.join(registers)}{end};")
    lines.append(f"st.global.{result} [%rd8], {to};")
    memory.run("\n".join(lines), **options)
    size = int(result[1:]) // 8
    rows = np.ascontiguousarray(memory.out.reshape(count, WORDS)[:, :size])
    return rows.view(f"u{size}")[:, 0]


def pairs(bits):
    values = EDGES[bits]
    return [a for a in values for b in values], [b for a in values for b in values]


def as_signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) else value


def floats(dtype, count, rng):
    """Any bits: NaN, infinities, subnormals and zeros too, with more numbers of ordinary size."""
    bits = rng.integers(
        0, 2 ** (8 * np.dtype(dtype).itemsize), count, dtype=f"u{np.dtype(dtype).itemsize}"
    )
    special = np.array(
        [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, np.finfo(dtype).smallest_normal], dtype
    )
    special = np.append(special, [np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max])
    ordinary = rng.standard_normal(count).astype(dtype)
    return np.concatenate([special, bits.view(dtype), ordinary])


def bits_of(values):
    values = np.asarray(values)
    return values.view(f"u{values.dtype.itemsize}")


def assert_same_numbers(bits, expected):
    """Bitwise equal, but for NaN."""
    found = np.asarray(bits).view(expected.dtype)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(bits_of(found[there]), bits_of(expected[there]))


# ---- integers ------------------------------------------------------------------------------------

INTEGER = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("of", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic(name, of):
    bits = int(of[1:])
    a, b = pairs(bits)
    read = as_signed if of[0] == "s" else lambda value, bits: value
    expected = [
        INTEGER[name](read(x, bits), read(y, bits)) % (1 << bits) for x, y in zip(a, b, strict=True)
    ]
    assert computed(f"{name}.{of}", [a, b], f"u{bits}").tolist() == expected


@pytest.mark.parametrize("of", ["s64", "u32", "s32"])
def test_division_rounds_to_zero(of):
    bits = int(of[1:])
    pair = [
        (a, b)
        for a, b in zip(*pairs(bits), strict=True)
        if b and (a, b) != (1 << (bits - 1), (1 << bits) - 1)
    ]
    read = as_signed if of[0] == "s" else lambda value, bits: value
    expected = [int(Fraction(read(a, bits), read(b, bits))) % (1 << bits) for a, b in pair]
    assert computed(f"div.{of}", list(zip(*pair, strict=True)), f"u{bits}").tolist() == expected


@pytest.mark.parametrize("sign", ["s", "u"])
def test_wide_and_high_products(sign):
    read = as_signed if sign == "s" else lambda value, bits: value
    a, b = pairs(64)
    high = [(read(x, 64) * read(y, 64) >> 64) % 2**64 for x, y in zip(a, b, strict=True)]
    assert computed(f"mul.hi.{sign}64", [a, b], "u64").tolist() == high
    for bits in (16, 32):
        a, b = pairs(bits)
        wide = [read(x, bits) * read(y, bits) % 4**bits for x, y in zip(a, b, strict=True)]
        of = [f"u{bits}"] * 2
        assert computed(f"mul.wide.{sign}{bits}", [a, b], f"u{2 * bits}", of).tolist() == wide


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_are_clamped(bits):
    values = EDGES[bits]
    amounts = [0, 1, 31, 32, 33, 63, 64, 65, 200, 2**32 - 1]
    a, by = [v for v in values for _ in amounts], [s for _ in values for s in amounts]
    sources = [f"u{bits}", "u32"]
    left = [(v << min(s, bits)) % (1 << bits) for v, s in zip(a, by, strict=True)]
    assert computed(f"shl.b{bits}", [a, by], f"u{bits}", sources).tolist() == left
    right = [v >> min(s, bits) for v, s in zip(a, by, strict=True)]
    assert computed(f"shr.u{bits}", [a, by], f"u{bits}", sources).tolist() == right
    right = [(as_signed(v, bits) >> min(s, bits)) % (1 << bits) for v, s in zip(a, by, strict=True)]
    assert computed(f"shr.s{bits}", [a, by], f"u{bits}", sources).tolist() == right


@pytest.mark.parametrize("of", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_multiply_and_add(of):
    bits = int(of[1:])
    a, b = pairs(bits)
    c = a[::-1]
    expected = [(x * y + z) % (1 << bits) for x, y, z in zip(a, b, c, strict=True)]
    assert computed(f"mad.lo.{of}", [a, b, c], f"u{bits}").tolist() == expected


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise_operations(bits):
    a, b = pairs(bits)
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        found = computed(f"{name}.b{bits}", [a, b], f"u{bits}").tolist()
        assert found == list(map(function, a, b))
    assert computed(f"not.b{bits}", [a], f"u{bits}").tolist() == [x ^ ((1 << bits) - 1) for x in a]


def test_bit_fields_are_inserted():
    cases = [
        (0xDEADBEEFCAFEBABE, 0x123456789ABCDEF0, p, n)
        for p in (0, 8, 32, 60, 64, 70)
        for n in (0, 1, 8, 32, 64)
    ]
    expected = []
    for a, b, position, length in cases:
        mask = ((1 << length) - 1) << position
        expected.append(((b & ~mask) | ((a << position) & mask)) % 2**64)
    columns = list(zip(*cases, strict=True))
    assert computed("bfi.b64", columns, "u64", ["u64", "u64", "u32", "u32"]).tolist() == expected


@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("of", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_conversions_of_integers(to, of):
    """The lowest bits of the source register, extended by its sign."""
    bits = max(16, int(of[1:]))
    values = EDGES[bits]
    low = [v % (1 << int(of[1:])) for v in values]
    exact = [as_signed(v, int(of[1:])) for v in low] if of[0] == "s" else low
    expected = [v % (1 << int(to[1:])) for v in exact]
    found = computed(f"cvt.{to}.{of}", [values], f"u{to[1:]}", [f"u{bits}"])
    assert found.tolist() == expected


# ---- floating-point numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("of", ["f32", "f64"])
def test_float_arithmetic(of):
    dtype = np.dtype(f"f{int(of[1:]) // 8}")
    rng = np.random.default_rng(0)
    a = floats(dtype, 300, rng)
    b, c = rng.permutation(a), rng.permutation(a)
    columns = [bits_of(each) for each in (a, b, c)]
    kinds = [f"u{of[1:]}"] * 3
    with np.errstate(all="ignore"):
        for name, expected in (
            ("add", a + b), ("sub.rn", a - b), ("mul", a * b), ("div.rn", a / b),
        ):  # fmt: skip
            assert_same_numbers(
                computed(f"{name}.{of}", columns[:2], kinds[0], kinds[:2]), expected
            )
        for name, expected in (("abs", abs(a)), ("neg", -a), ("rcp.rn", 1 / a)):
            assert_same_numbers(
                computed(f"{name}.{of}", columns[:1], kinds[0], kinds[:1]), expected
            )


def exact_fma(a, b, c, dtype):
    """a b + c in rational numbers, rounded once."""
    a, b, c = float(a), float(b), float(c)
    if not all(map(math.isfinite, (a, b, c))) or not (a and b):
        with np.errstate(all="ignore"):
            return dtype.type(np.float64(a) * np.float64(b) + np.float64(c))
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), dtype)


def rounded(exact, dtype):
    """A rational number rounded to nearest even, by integer arithmetic."""
    if exact == 0:
        return dtype.type(0)
    precision, lowest = (24, -149) if dtype.itemsize == 4 else (53, -1074)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, lowest)
    nearest = round(size / unit) * unit  # to even
    largest = Fraction(float(np.finfo(dtype).max))
    sign = 1 if exact > 0 else -1
    return dtype.type(sign * (math.inf if nearest > largest else float(nearest)))


@pytest.mark.parametrize("of", ["f32", "f64"])
def test_fma_rounds_once(of):
    dtype = np.dtype(f"f{int(of[1:]) // 8}")
    rng = np.random.default_rng(1)
    a = floats(dtype, 300, rng)
    b, c = rng.permutation(a), rng.permutation(a)
    with np.errstate(all="ignore"):
        near = -(a * b)  # cancellation: what is left is the rounding error of the product
        tie = np.ldexp(dtype.type(1), rng.integers(-30, -20, len(a))).astype(dtype)
        half = (1 + np.finfo(dtype).eps * rng.integers(0, 9, len(a))).astype(dtype)
        a, b, c = np.r_[a, a, half, half], np.r_[b, b, half, tie], np.r_[c, near, tie, half]
        tiny = [np.ldexp(half, -rng.integers(*by, len(half))) for by in ((480, 540), (480, 540))]
        zeros = np.array([0.0, -0.0, 1.0, -1.0], dtype)
        signs = [each.ravel() for each in np.meshgrid(zeros, zeros, zeros)]
        a, b = np.r_[a, tiny[0], tiny[0], signs[0]], np.r_[b, tiny[1], tiny[1], signs[1]]
        c = np.r_[c, -tiny[0] * tiny[1], np.roll(tiny[0] * tiny[1], 1), signs[2]]
    expected = np.array([exact_fma(*each, dtype) for each in zip(a, b, c, strict=True)])
    kinds = [f"u{of[1:]}"] * 3
    found = computed(f"fma.rn.{of}", [bits_of(each) for each in (a, b, c)], kinds[0], kinds)
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("of", ["f32", "f64"])
def test_fma_does_not_round_twice(of):
    """A product halfway between two numbers, and a tiny one that decides."""
    dtype, precision = np.dtype(f"f{int(of[1:]) // 8}"), 24 if of == "f32" else 53
    cases = []
    for halfway in range(2**precision + 1, 2**precision + 401, 2):
        factor = next((f for f in range(3, 999, 2) if halfway % f == 0), None)
        if factor:
            cases += [(factor, halfway // factor, sign * 2.0**-60) for sign in (-1, 0, 1)]
    assert len(cases) > 300
    expected = np.array([exact_fma(*case, dtype) for case in cases])
    columns = [bits_of(np.array(column, dtype)) for column in zip(*cases, strict=True)]
    kinds = [f"u{of[1:]}"] * 3
    assert_same_numbers(computed(f"fma.rn.{of}", columns, kinds[0], kinds), expected)


@pytest.mark.parametrize("of", ["f32", "f64"])
def test_minimum_and_maximum(of):
    dtype = np.dtype(f"f{int(of[1:]) // 8}")
    nan, values = math.nan, [0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan]
    cases = [(a, b) for a in values for b in values]

    def best(a, b, sign):
        if math.isnan(a) or math.isnan(b):
            return b if math.isnan(a) else a
        return max((a, b), key=lambda x: (sign * x, sign * math.copysign(1, x)))

    a, b = (bits_of(np.array(column, dtype)) for column in zip(*cases, strict=True))
    kinds = [f"u{of[1:]}"] * 2
    for name, sign in (("max", 1), ("min", -1)):
        expected = np.array([best(*case, sign) for case in cases], dtype)
        found = computed(f"{name}.{of}", [a, b], kinds[0], kinds)
        assert_same_numbers(found, expected)
        canonical = np.array([nan], dtype).view(found.dtype)[0] | (
            found.dtype.type(-1 % 2 ** (8 * dtype.itemsize)) >> 1
        )
        assert set(found[np.isnan(expected)].tolist()) == {int(canonical)}


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def compared(opcode, a, b, of):
    """The predicates of a comparison."""
    size, count = int(of[1:]) // 8, len(a)
    memory = Memory(threads=count)
    rows = memory.given.reshape(count, WORDS)
    for i, column in enumerate((a, b)):
        rows[:, 16 * i : 16 * i + size] = np.asarray(column, f"u{size}")[:, None].view(np.uint8)
    name = REGISTER[of[1:]]
    memory.run(f"""
        ld.global.b{8 * size} {name}1, [%rd7];
        ld.global.b{8 * size} {name}2, [%rd7+16];
        {opcode} %p1, {name}1, {name}2;
        selp.b32 %r1, 1, 0, %p1;
        st.global.u32 [%rd8], %r1;
    """)
    return memory.out.reshape(count, WORDS)[:, 0].astype(bool).tolist()


@pytest.mark.parametrize("of", ["f16", "f32", "f64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats(name, of):
    """Python's operators are C's: true of NaN for != only; PTX has each in both kinds."""
    dtype = np.dtype(f"f{int(of[1:]) // 8}")
    values = np.array([0.0, -0.0, 1, -2, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny], dtype)
    a, b = np.repeat(values, len(values)), np.tile(values, len(values))
    for unordered in ("", "u"):
        expected = [
            bool(unordered) if math.isnan(x) or math.isnan(y) else eval(f"x {COMPARISONS[name]} y")
            for x, y in zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True)
        ]
        assert compared(f"setp.{name}{unordered}.{of}", bits_of(a), bits_of(b), of) == expected


@pytest.mark.parametrize("of", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_integers(name, of):
    bits = int(of[1:])
    a, b = pairs(bits)
    read = as_signed if of[0] == "s" else lambda value, bits: value
    expected = [
        eval(f"{read(x, bits)} {COMPARISONS[name]} {read(y, bits)}")
        for x, y in zip(a, b, strict=True)
    ]
    assert compared(f"setp.{name}.{of}", a, b, of) == expected
    if name in ("eq", "ne"):
        assert compared(f"setp.{name}.b{bits}", a, b, of) == expected


def test_predicates():
    memory = Memory()
    memory.run("""
        and.b32 %r1, %r0, 1;
        setp.eq.s32 %p1, %r1, 1;
        setp.lt.s32 %p2, %r0, 32;
        and.pred %p3, %p1, %p2;
        or.pred %p4, %p1, %p2;
        xor.pred %p5, %p1, %p2;
        not.pred %p6, %p1;
        selp.f32 %f1, 0f3F800000, 0f40000000, %p3;
        selp.b16 %rs1, 1, -1, %p4;
        selp.s64 %rd1, -5, 5, %p5;
        selp.b32 %r2, 1, 0, %p6;
        st.global.f32 [%rd8], %f1;
        st.global.u16 [%rd8+4], %rs1;
        st.global.u64 [%rd8+8], %rd1;
        st.global.u32 [%rd8+16], %r2;
        mov.u32 %r3, 7;
        @%p1 mov.u32 %r3, 8;
        @!%p2 mov.u32 %r3, 9;
        st.global.u32 [%rd8+20], %r3;
    """)
    for thread, row in enumerate(memory.out.reshape(THREADS, WORDS)):
        odd, low = thread % 2 == 1, thread < 32
        found = struct.unpack("<fh2xqii", row[:24].tobytes())
        moved = 9 if not low else 8 if odd else 7
        assert found == (
            1.0 if odd and low else 2.0, 1 if odd or low else -1, -5 if odd != low else 5,
            int(not odd), moved,
        )  # fmt: skip


# ---- conversions of floating-point numbers -------------------------------------------------------


@pytest.mark.parametrize(
    ("opcode", "bits", "dtype"),
    [("cvt.f32.f16", "u32", np.float32), ("cvt.f64.f16", "u64", np.float64)],
)
def test_every_half_is_widened(opcode, bits, dtype):
    values = np.arange(2**16, dtype=np.uint16)
    found = np.concatenate(
        [computed(opcode, [part], bits, ["u16"]) for part in np.split(values, 64)]
    )
    assert_same_numbers(found, values.view(np.float16).astype(dtype))


@pytest.mark.parametrize(
    ("opcode", "dtype"), [("cvt.rn.f16.f32", np.float16), ("cvt.rn.bf16.f32", ml_dtypes.bfloat16)]
)
def test_narrowing_rounds_to_nearest_even(opcode, dtype):
    """Of every number with 16 bits, itself, the middle to the next, and the neighbours of both."""
    exact = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    following = np.append(exact[1:], exact[-1])
    with np.errstate(over="ignore"):
        middle = ((exact.astype(np.float64) + following) / 2).astype(np.float32)
        near = [
            np.nextafter(each, np.float32(to))
            for each in (exact, middle)
            for to in (-np.inf, np.inf)
        ]
    values = np.concatenate([exact, middle, *near, np.float32([np.inf, -np.inf, np.nan])])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    found = np.concatenate(
        [computed(opcode, [bits_of(part)], "u16", ["u32"]) for part in np.array_split(values, 400)]
    )
    there = ~np.isnan(values)
    np.testing.assert_array_equal(found[there], expected.view(np.uint16)[there])
    assert set(found[~there].tolist()) == {0x7FFF}


def test_a_pair_of_bfloat16_has_the_first_operand_above():
    high, low = np.float32([1.0, -3.5, np.inf]), np.float32([2.0, 1e-40, -0.0])
    found = computed("cvt.rn.bf16x2.f32", [bits_of(high), bits_of(low)], "u32", ["u32", "u32"])
    words = [each.astype(ml_dtypes.bfloat16).view(np.uint16).astype(int) for each in (high, low)]
    assert found.tolist() == (words[0] << 16 | words[1]).tolist()


def test_conversions_between_wide_types():
    rng = np.random.default_rng(2)
    doubles, singles = floats(np.float64, 200, rng), floats(np.float32, 200, rng)
    with np.errstate(all="ignore"):
        narrow = doubles.astype(np.float32)
        assert_same_numbers(computed("cvt.rn.f32.f64", [bits_of(doubles)], "u32", ["u64"]), narrow)
        wide = singles.astype(np.float64)
        assert_same_numbers(computed("cvt.f64.f32", [bits_of(singles)], "u64", ["u32"]), wide)
    for of in ("s16", "u16", "s32", "s64"):
        bits = int(of[1:])
        values = EDGES[bits] + [v % (1 << bits) for v in range(2**24 - 5, 2**24 + 9)]
        numbers = [as_signed(v, bits) if of[0] == "s" else v for v in values]
        for to, dtype in (("f32", np.float32), ("f64", np.float64)):
            expected = np.array([rounded(Fraction(v), np.dtype(dtype)) for v in numbers])
            found = computed(f"cvt.rn.{to}.{of}", [values], f"u{to[1:]}", [f"u{bits}"])
            assert_same_numbers(found, expected)


def test_moves_split_and_join_registers():
    memory = Memory()
    memory.given[:] = np.arange(memory.given.size) % 251
    memory.run("""
        ld.global.u64 %rd1, [%rd7];
        {
        .reg .b32 %temp;
        mov.b64 {%r1, %temp}, %rd1;
        }
        {
        .reg .b32 %temp;
        mov.b64 {%temp, %r2}, %rd1;
        }
        mov.b64 %rd2, {%r2, %r1};
        st.global.u64 [%rd8], %rd2;
        cvt.u16.u32 %rs1, %r1;
        mov.b16 %h1, 0x3C00;
        mov.b32 %r3, {%rs1, %h1};
        st.global.u32 [%rd8+8], %r3;
    """)
    given = memory.given.reshape(THREADS, WORDS)
    out = memory.out.reshape(THREADS, WORDS)
    np.testing.assert_array_equal(out[:, :4], given[:, 4:8])
    np.testing.assert_array_equal(out[:, 4:8], given[:, :4])
    np.testing.assert_array_equal(out[:, 8:10], given[:, :2])
    np.testing.assert_array_equal(out[:, 10:12], np.tile([0x00, 0x3C], (THREADS, 1)))


# ---- approximations ------------------------------------------------------------------------------


def ulps(found, exact):
    """The largest error, in units in the last place of float32."""
    exact = np.asarray(exact, np.float64)
    return np.max(np.abs(found - exact) / np.spacing(exact.astype(np.float32)))


@pytest.mark.parametrize(("noise", "limits"), [(None, (0.51, 0.51)), (1, (2.0, 1.0))])
def test_approximations(noise, limits):
    rng = np.random.default_rng(3)
    x = rng.uniform(-125, 127, 600).astype(np.float32)
    bits = computed("ex2.approx.ftz.f32", [bits_of(x)], "u32", noise=noise)
    errors = [ulps(bits.view(np.float32), np.exp2(x.astype(np.float64)))]
    y = np.abs(floats(np.float32, 600, rng))
    y = y[(y > 1e-37) & (y < 1e37)]
    bits = computed("rcp.approx.ftz.f32", [bits_of(y)], "u32", noise=noise)
    errors.append(ulps(bits.view(np.float32), 1 / y.astype(np.float64)))
    assert all(0 < error <= limit + 1e-6 for error, limit in zip(errors, limits, strict=True))
    assert noise is None or min(errors) > 0.75


@pytest.mark.parametrize("noise", [None, 1])
def test_approximations_flush_subnormals(noise):
    tiny = np.finfo(np.float32).smallest_subnormal
    x = np.float32([0, -0.0, tiny, -tiny, np.inf, -np.inf, -126.5, 128, 1000, -1000, np.nan])
    bits = computed("ex2.approx.ftz.f32", [bits_of(x)], "u32", noise=noise)
    expected = np.float32([1, 1, 1, 1, np.inf, 0, 0, np.inf, np.inf, 0, np.nan])
    assert_same_numbers(bits, expected)
    x = np.float32([0, -0.0, tiny, -tiny, np.inf, -np.inf, 2.0**127, np.nan])
    bits = computed("rcp.approx.ftz.f32", [bits_of(x)], "u32", noise=noise)
    assert_same_numbers(bits, np.float32([np.inf, -np.inf, np.inf, -np.inf, 0, -0.0, 0, np.nan]))


@pytest.mark.parametrize("noise", [None, 1])
def test_the_crude_reciprocal_is_of_upper_words(noise):
    x = np.random.default_rng(4).uniform(1, 100, 300)
    found = computed("rcp.approx.ftz.f64", [bits_of(x)], "u64", noise=noise)
    assert not (found & 0xFFFFFFFF).any()
    error = np.abs(found.view(np.float64) * x - 1).max()
    assert 2.0**-22 < error < 2.0**-18


# ---- memory and threads --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "signed"), [("u8", False), ("s8", True), ("u16", False), ("s16", True)]
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loads_extend_and_stores_truncate(of, signed, count):
    memory = Memory()
    memory.given[:] = np.random.default_rng(5).integers(0, 256, memory.given.size)
    size = int(of[1:]) // 8
    parts = [f"%r{i + 1}" for i in range(count)]
    vector, registers = ("", parts[0]) if count == 1 else (f".v{count}", f"{{{', '.join(parts)}}}")
    body = f"ld.global{vector}.{of} {registers}, [%rd7+16];"
    body += "".join(f"st.global.u32 [%rd8+{4 * i}], {part};" for i, part in enumerate(parts))
    body += f"st.global{vector}.b{8 * size} [%rd8+32], {registers};"
    memory.run(body)
    given = memory.given.reshape(THREADS, WORDS)[:, 16 : 16 + size * count]
    out = memory.out.reshape(THREADS, WORDS)
    numbers = np.ascontiguousarray(given).view(f"{'i' if signed else 'u'}{size}")
    words = np.ascontiguousarray(out[:, : 4 * count]).view("i4" if signed else "u4")
    np.testing.assert_array_equal(words, numbers)
    np.testing.assert_array_equal(out[:, 32 : 32 + size * count], given)


def test_special_registers_and_counts():
    memory = Memory(threads=32, blocks=3, size=3 * 32 * 4)
    counts = memory.run("""
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ntid.x;
        mov.u32 %r3, %nctaid.x;
        mul.lo.s32 %r4, %r1, %r2;
        add.s32 %r4, %r4, %r0;
        mul.wide.s32 %rd1, %r4, 4;
        ld.param.u64 %rd2, [test_out];
        add.s64 %rd1, %rd1, %rd2;
        mul.lo.s32 %r5, %r1, 1000;
        add.s32 %r5, %r5, %r0;
        mul.lo.s32 %r3, %r3, 100000;
        add.s32 %r5, %r5, %r3;
        st.global.u32 [%rd1], %r5;
    """)
    expected = 300000 + 1000 * np.arange(3)[:, None] + np.arange(32)
    np.testing.assert_array_equal(memory.out.view(np.int32).reshape(3, 32), expected)
    assert counts["st.global.u32"] == 96
    assert counts.total() == 96 * (8 + 13 + 1)


def test_threads_that_diverge_meet_again():
    """A loop of as many rounds as the thread's number; then all shuffle."""
    memory = Memory(threads=32)
    counts = memory.run("""
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
    $loop:
        setp.ge.u32 %p1, %r1, %r0;
        @%p1 bra $done;
        add.u32 %r1, %r1, 1;
        add.u32 %r2, %r2, %r1;
        bra.uni $loop;
    $done:
        shfl.sync.bfly.b32 %r3|%p2, %r2, 1, 31, -1;
        st.global.u32 [%rd8], %r3;
    """)
    found = memory.out.view(np.uint32).reshape(32, -1)[:, 0]
    partner = np.arange(32) ^ 1
    np.testing.assert_array_equal(found, partner * (partner + 1) // 2)
    assert counts["setp.ge.u32"] == sum(range(33))
    assert counts["shfl.sync.bfly.b32"] == 32


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
def test_shuffles_exchange_within_warps(distance):
    memory = Memory()
    memory.run(f"""
        mov.u32 %r1, {distance};
        mov.u32 %r2, 31;
        mov.u32 %r3, -1;
        shfl.sync.bfly.b32 %r4|%p1, %r0, %r1, %r2, %r3;
        st.global.u32 [%rd8], %r4;
    """)
    found = memory.out.view(np.uint32).reshape(THREADS, -1)[:, 0]
    np.testing.assert_array_equal(found, np.arange(THREADS) ^ distance)


@pytest.mark.parametrize("thread", [3, 40])
def test_votes_are_of_a_warp(thread):
    memory = Memory()
    memory.run(f"""
        setp.eq.s32 %p1, %r0, {thread};
        vote.sync.any.pred %p2, %p1, -1;
        selp.u32 %r1, 1, 0, %p2;
        st.global.u32 [%rd8], %r1;
    """)
    found = memory.out.view(np.uint32).reshape(THREADS, -1)[:, 0]
    np.testing.assert_array_equal(found, np.arange(THREADS) // 32 == thread // 32)


EXCHANGE = """
    mov.u32 %r1, table;
    shl.b32 %r2, %r0, 2;
    add.u32 %r1, %r1, %r2;
    cvt.u64.u32 %rd1, %r1;
    st.shared.u32 [%rd1], %r0;
    bar.sync 0;
    mov.u32 %r3, 252;
    sub.u32 %r3, %r3, %r2;
    mov.u32 %r1, table;
    add.u32 %r1, %r1, %r3;
    cvt.u64.u32 %rd1, %r1;
    ld.shared.u32 %r4, [%rd1];
    st.global.u32 [%rd8], %r4;
"""


def test_shared_memory_after_a_barrier():
    memory = Memory()
    memory.run(EXCHANGE, SHARED)
    found = memory.out.view(np.uint32).reshape(THREADS, -1)[:, 0]
    np.testing.assert_array_equal(found, np.arange(THREADS)[::-1])


LOCAL = """
    .local .align 16 .b8 depot[32];
    .reg .b64 %SP;
    .reg .b64 %SPL;
"""
SPILL = """
    mov.u64 %SPL, depot;
    cvta.local.u64 %SP, %SPL;
    st.local.v2.u32 [%SPL+8], {%r0, %r0};
    ld.local.u64 %rd1, [%SP+8];
    st.global.u64 [%rd8], %rd1;
"""


def test_local_memory_is_of_each_thread():
    memory = Memory()
    memory.run(SPILL, local=LOCAL)
    found = memory.out.view(np.uint32).reshape(THREADS, -1)
    np.testing.assert_array_equal(found[:, :2], np.repeat(np.arange(THREADS), 2).reshape(-1, 2))


# Each block stores a number per thread, the last one adds up all.
REDUCTION = """
    ld.param.u64 %rd1, [test_out];
    ld.param.u64 %rd5, [test_in];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mul.lo.s32 %r3, %r1, %r2;
    add.s32 %r3, %r3, %r0;
    mul.wide.u32 %rd2, %r3, 8;
    add.s64 %rd2, %rd2, %rd1;
    cvt.rn.f64.s32 %fd1, %r3;
    st.global.f64 [%rd2], %fd1;
    membar.gl;
    bar.sync 0;
    setp.ne.s32 %p1, %r0, 0;
    @%p1 bra $counted;
    atom.global.add.u32 %r4, [%rd5], 1;
    st.shared.u32 [table], %r4;
$counted:
    bar.sync 0;
    ld.shared.u32 %r5, [table];
    mov.u32 %r6, %nctaid.x;
    sub.s32 %r6, %r6, 1;
    setp.ne.s32 %p2, %r5, %r6;
    @%p2 bra $end;
    membar.gl;
    setp.ne.s32 %p3, %r0, 0;
    @%p3 bra $end;
    mov.f64 %fd2, 0d0000000000000000;
    mov.u32 %r7, %nctaid.x;
    mul.lo.s32 %r7, %r7, %r2;
$add:
    ld.relaxed.gpu.f64 %fd3, [%rd1];
    add.f64 %fd2, %fd2, %fd3;
    add.s64 %rd1, %rd1, 8;
    sub.s32 %r7, %r7, 1;
    setp.gt.s32 %p4, %r7, 0;
    @%p4 bra $add;
    st.global.f64 [%rd5+8], %fd2;
$end:
"""


@pytest.mark.parametrize("seed", range(4))
def test_the_last_block_adds_what_the_others_wrote(seed):
    memory = Memory(threads=32, blocks=20, size=20 * 32 * 8)
    memory.run(REDUCTION, SHARED, seed=seed)
    assert memory.given.view(np.uint32)[0] == 20
    assert memory.given.view(np.float64)[1] == sum(range(640))


# ---- checks --------------------------------------------------------------------------------------


def fence_of_others(text):
    """The thread that reads passes no fence itself, and no barrier after that of the others."""
    one = "membar.gl;\n    setp.ne.s32 %p3, %r0, 0;"
    return text.replace(one, "setp.ne.s32 %p3, %r0, 0;\n    @%p3 membar.gl;")


def fence_before_atomic(text):
    return text.replace("membar.gl;", "", 1)


def fence_after_atomic(text):
    return "".join(text.rsplit("membar.gl;", 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fence_before_atomic, "not ordered after the write"),
        (fence_after_atomic, "not ordered after the write"),
        (fence_of_others, "not ordered after the write"),
        (lambda text: text.replace("membar.gl", "membar.cta"), "not ordered after the write"),
        (lambda text: text.replace("ld.relaxed.gpu.f64", "ld.global.f64"), "a plain read"),
        (lambda text: text.replace("bar.sync 0;", "", 1), "not ordered after the write"),
        (lambda text: "".join(text.rsplit("bar.sync 0;", 1)), "never written|another thread"),
        (
            lambda text: text.replace(
                "atom.global.add.u32 %r4, [%rd5], 1;",
                "ld.global.u32 %r4, [%rd5]; add.u32 %r8, %r4, 1; st.global.u32 [%rd5], %r8;",
            ),
            "another thread (writes|reads)|another block writes",
        ),
        (
            lambda text: text.replace("@%p2 bra", "ld.global.u32 %r8, [%rd5]; @%p2 bra"),
            "accessed atomically",
        ),
        (
            lambda text: text.replace("mul.lo.s32 %r3, %r1, %r2;", "mov.u32 %r3, 0;"),
            "a write of what another thread writes: block",
        ),
    ],
    ids=[
        "no fence before", "no fence after", "a fence of others", "narrow fences", "plain read",
        "no barrier before", "no barrier after", "no atomic", "plain read of the counter",
        "same place",
    ],
)  # fmt: skip
def test_a_weaker_reduction_is_a_race(change, message):
    changed = change(REDUCTION)
    assert changed != REDUCTION
    memory = Memory(threads=32, blocks=5, size=20 * 32 * 8)
    with pytest.raises(Fault, match=message):
        memory.run(changed, SHARED)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("read", ["ld.global.u32", "ld.relaxed.gpu.u32"])
def test_blocks_race_whichever_goes_first(read, seed):
    memory = Memory(threads=32, blocks=2)
    with pytest.raises(Fault, match=r"another (thread|block)|not ordered after the write"):
        memory.run(
            f"""
            mov.u32 %r1, %ctaid.x;
            add.u32 %r1, %r1, %r0;
            setp.eq.s32 %p1, %r1, 0;
            ld.param.u64 %rd1, [test_in];
            @%p1 st.global.u32 [%rd1], %r1;
            mov.u32 %r2, %ctaid.x;
            setp.eq.s32 %p2, %r2, 1;
            @%p2 {read} %r3, [%rd1];
            """,
            seed=seed,
        )


@pytest.mark.parametrize("seed", range(4))
def test_reads_of_several_blocks_are_remembered(seed):
    """Also if the one that writes was the last to read."""
    body = """
        ld.param.u64 %rd1, [test_in];
        ld.global.u16 %r1, [%rd1];
        mov.u32 %r2, %ctaid.x;
        add.u32 %r2, %r2, 1;
        add.u32 %r2, %r2, %r0;
        mov.u32 %r3, %nctaid.x;
        setp.eq.s32 %p1, %r2, %r3;
        @%p1 st.global.u8 [%rd1+1], %r1;
    """
    with pytest.raises(Fault, match=r"another thread (reads|writes)|another block writes"):
        Memory(threads=1, blocks=2).run(body, seed=seed)
    Memory(threads=1).run(body)


def test_reads_of_several_threads_are_remembered():
    body = """
        ld.param.u64 %rd1, [test_in];
        setp.eq.s32 %p1, %r0, 1;
        setp.eq.s32 %p2, %r0, 2;
        @%p1 ld.global.u32 %r1, [%rd1];
        @%p2 ld.global.u32 %r1, [%rd1];
        @%p2 st.global.u32 [%rd1], %r0;
    """
    with pytest.raises(Fault, match=r"thread 2, .*a write of what another thread reads"):
        Memory().run(body)
    Memory().run(body.replace("@%p2 st", "bar.sync 0; @%p2 st"))


def test_the_end_of_memory_within_a_word():
    body = "ld.global.u32 %r1, [%rd7+60];"
    with pytest.raises(Fault, match=r"thread 63, .*out of bounds: 4 bytes"):
        Memory(size=THREADS * WORDS - 2).run(body)
    with pytest.raises(Fault, match=r"thread 0, .*out of bounds: 4 bytes"):
        Memory(threads=1, size=WORDS - 2).run(body)


def test_shared_arrays_are_apart():
    two = ".shared .align 4 .b8 one[16]; .shared .align 4 .b8 two[16];"
    for name in ("one", "two"):
        with pytest.raises(Fault, match=r"out of bounds"):
            Memory(threads=1).run(f"st.shared.u32 [{name}+16], %r0;", two)


BARRIER_IN_BRANCH = """
    setp.lt.u32 %p1, %r0, 8;
    @%p1 bra $other;
    bar.sync 0;
    bra $end;
$other:
    bar.sync 0;
$end:
"""
CHECKS = {
    "below": ("ld.global.u32 %r1, [%rd7+-4];", r"thread 0, line \d+: ld.*out of bounds: 4 bytes"),
    "beyond": ("ld.global.u32 %r1, [%rd7+64];", r"thread 63, .*out of bounds"),
    "beyond by a vector": ("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd7+56];", "misaligned|bounds"),
    "store beyond": ("st.global.u8 [%rd8+64], %r0;", r"thread 63, .*out of bounds: 1 bytes"),
    "misaligned": ("ld.global.u32 %r1, [%rd7+2];", "misaligned: 4 bytes"),
    "misaligned vector": ("ld.global.v2.u32 {%r1, %r2}, [%rd7+4];", "misaligned: 8 bytes"),
    "shared beyond": ("st.shared.u32 [table+512], %r0;", "out of bounds"),
    "shared misaligned": ("st.shared.u32 [table+2], %r0;", "misaligned"),
    "shared unwritten": ("ld.shared.u32 %r1, [table+4];", "shared memory never written"),
    "shared as global": ("mov.u64 %rd1, table; ld.global.u32 %r1, [%rd1];", "out of bounds"),
    "race of two writes": ("st.shared.u32 [table], %r0;", "two writes by one instruction"),
    "race of global writes": ("ld.param.u64 %rd1, [test_out]; st.global.u32 [%rd1], %r0;", "two"),
    "race of a byte": (
        "shl.b32 %r1, %r0, 1; cvt.u64.u32 %rd1, %r1; mov.u64 %rd2, table; add.s64 %rd1, %rd1, %rd2;"
        "st.shared.u16 [%rd1], %r0; st.shared.u8 [%rd1+1], %r0; shr.u32 %r1, %r0, 1;"
        "shl.b32 %r1, %r1, 2; cvt.u64.u32 %rd1, %r1; add.s64 %rd1, %rd1, %rd2;"
        "ld.shared.u32 %r2, [%rd1];",
        "a read of what another thread writes",
    ),
    "race of a read and a later write": (
        "ld.param.u64 %rd1, [test_out]; ld.global.u32 %r1, [%rd1]; st.global.u32 [%rd8], %r1;",
        "a write of what another thread reads",
    ),
    "no barrier": (EXCHANGE.replace("bar.sync 0;", ""), "thread"),
    "different barriers": (BARRIER_IN_BRANCH, "threads wait at different barriers"),
    "ended": ("setp.lt.u32 %p1, %r0, 8; @%p1 ret; bar.sync 0;", "threads ended before a barrier"),
    "shuffle of a part": (
        "setp.lt.u32 %p1, %r0, 8; @%p1 bra $end; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $end:",
        "a shuffle or vote without all threads of its mask",
    ),
    "shuffle beyond its mask": ("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 1;", "not in its mask"),
    "vote of a part": (
        "setp.lt.u32 %p1, %r0, 8; @%p1 bra $end; vote.sync.any.pred %p2, %p1, -1; $end:",
        "a shuffle or vote without all threads of its mask",
    ),
    "unwritten in a branch": (
        "setp.lt.u32 %p1, %r0, 8; @%p1 bra $end; mov.u32 %r1, 1; $end: st.global.u32 [%rd8], %r1;",
        r"thread 0, .*%r1 was never written",
    ),
    "unwritten under a predicate": (
        "setp.lt.u32 %p1, %r0, 8; @%p1 mov.u32 %r1, 1; st.global.u32 [%rd8], %r1;",
        r"thread 8, .*%r1 was never written",
    ),
    "division by 0": ("mov.u32 %r1, 8; div.u32 %r2, %r1, %r0;", r"thread 0, .*division by 0"),
}


@pytest.mark.parametrize(("body", "message"), CHECKS.values(), ids=CHECKS)
def test_checks(body, message):
    with pytest.raises(Fault, match=message) as error:
        Memory().run(body, SHARED)
    assert "block 0" in str(error.value)


def test_checks_of_local_memory():
    for changed, message in (
        (
            SPILL.replace("ld.local.u64 %rd1, [%SP+8]", "ld.local.u64 %rd1, [%SP+16]"),
            "never written",
        ),
        (SPILL.replace("st.local.v2.u32 [%SPL+8]", "st.local.v2.u32 [%SPL+32]"), "out of bounds"),
    ):
        with pytest.raises(Fault, match=message):
            Memory().run(changed, local=LOCAL)


def test_a_register_written_by_the_lanes_that_read_it():
    memory = Memory()
    memory.run("""
        setp.lt.u32 %p1, %r0, 8;
        @%p1 mov.u32 %r1, 5;
        @%p1 st.global.u32 [%rd8], %r1;
    """)
    found = memory.out.view(np.uint32).reshape(THREADS, -1)[:, 0]
    np.testing.assert_array_equal(found, np.where(np.arange(THREADS) < 8, 5, 0))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.u32 %r1, %r2, 1;", r"line \d+: add.*%r2 is never written"),
        ("sin.approx.f32 %f1, 0f00000000;", r"line \d+: sin.*unknown opcode"),
        ("ld.global.ca.u32 %r1, [%rd7];", "unknown opcode"),
        ("shfl.sync.up.b32 %r1, %r0, 1, 0, -1;", "unknown opcode"),
        ("bar.sync 1;", "operands do not fit"),
        ("membar.sys;", "unknown opcode"),
        ("add.u32 %rd1, %r0, 1;", "%rd1 has 64 bits, u32 32"),
        ("add.f32 %f1, 0d3FF0000000000000, 0f00000000;", "a constant of 64 bits"),
        ("mov.u32 %r1, 4294967296;", "out of the range"),
        ("bra $nowhere;", "no such label"),
        ("mov.u32 %r1, unknown;", "no value"),
        ("mov.u32 %r99, 1;", "not declared"),
        ("mov.b64 {%r1, %rs1}, %rd7;", "bits of the whole"),
        ("ld.param.u64 %rd1, [test_out+8];", "not within test_out"),
        ("ld.global.v2.u32 %r1, [%rd7];", "operands do not fit"),
        ("what is this", "not understood|unknown"),
    ],
)
def test_what_is_not_understood(body, message):
    with pytest.raises(Fault, match=message):
        ptx.Kernel(HEADER.format(body=body, shared="", local=""))


def test_arguments_of_the_wrong_size():
    kernel = ptx.Kernel(HEADER.format(body="", shared="", local=""))
    with pytest.raises(Fault, match="8 bytes of arguments, not 16"):
        ptx.launch(kernel, 1, 32, bytes(8), {})
