"""The operations on registers, as NumPy functions of all lanes.

Results are those of IEEE arithmetic, rounded to nearest even: `mul` followed by `add` is not
contracted, as an assembler may do. The payload of a NaN is NumPy's unless said otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import rounding
from .rounding import Array

TYPES: dict[str, Any] = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # their bits
    "bf16x2": np.dtype("u4"),
    "pred": np.dtype(bool),
}
INTEGERS = ("s16", "s32", "s64", "u16", "u32", "u64")
FLOATS = ("f32", "f64")
Noise = int | None  # a seed of the errors of approximations, which are functions of the operand


@dataclass(frozen=True)
class Operation:
    """`function` of the sources; of an approximation also of the noise. A result may have another
    dtype of the same size as `result`.
    """

    function: Callable[..., Any]
    result: str
    sources: tuple[str, ...]
    approximate: bool = False


def operation(opcode: str) -> Operation | None:
    """The operation of an opcode; None if it is unknown."""
    return TABLE.get(opcode)


def divided(a: Array, b: Array) -> Array:
    """The quotient of integers rounded to zero, of b != 0."""
    quotient: Array = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper 64 bits of the product of two 64-bit integers."""
    half, mask = a.dtype.type(32), a.dtype.type(0xFFFFFFFF)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    low = (a_low.view(np.uint64) * b_low.view(np.uint64)) >> np.uint64(32)
    middle = a_high * b_low + low.view(a.dtype)
    other = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> half) + (other >> half)


def inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: b, its bits from `position` on replaced by the lowest `length` bits of a."""
    bits = 8 * a.dtype.itemsize
    position, length = (each.astype(a.dtype) & a.dtype.type(0xFF) for each in (position, length))
    field = shifted_left(np.ones_like(a), length) - a.dtype.type(1)
    field = np.where(length >= bits, ~a.dtype.type(0), field)
    mask = shifted_left(field, position)
    return (b & ~mask) | (shifted_left(a, position) & mask)


def shifted_left(a: Array, amount: Array) -> Array:
    """The shift amount is clamped to the width of a."""
    return np.left_shift(a, _clamped(a, amount))


def shifted_right(a: Array, amount: Array) -> Array:
    return np.right_shift(a, _clamped(a, amount))


def _clamped(a: Array, amount: Array) -> Array:
    # NumPy defines shifts by the whole width, or more, as PTX does.
    return np.minimum(amount, 8 * a.dtype.itemsize).astype(a.dtype)


def larger(a: Array, b: Array) -> Array:
    """max: the other number if one is NaN, 0x7fffffff... if both are; +0 is larger than -0."""
    return _selected(np.fmax(a, b), a, b, np.bitwise_and)


def smaller(a: Array, b: Array) -> Array:
    return _selected(np.fmin(a, b), a, b, np.bitwise_or)


def _selected(result: Array, a: Array, b: Array, of_zeros: Any) -> Array:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    equal = a == b
    found = result.view(bits)
    np.copyto(found, of_zeros(a.view(bits), b.view(bits)), where=equal)
    np.copyto(found, bits.type(np.iinfo(bits).max >> 1), where=np.isnan(result))
    return result


def exp2(x: Array, noise: Noise) -> Array:
    """ex2.approx.ftz.f32: within 2 ulp; of 0 it is 1."""
    x = _flushed(x)
    return _approximated(x, np.exp2(x.astype(np.float64)), 2, noise, x != 0)


def reciprocal(x: Array, noise: Noise) -> Array:
    """rcp.approx.ftz.f32: within 1 ulp."""
    x = _flushed(x)
    return _approximated(x, 1 / x.astype(np.float64), 1, noise, True)


def crude_reciprocal(x: Array, noise: Noise) -> Array:
    """rcp.approx.ftz.f64: of the upper word, to the upper word, within a unit of its last place."""
    upper = np.uint64(0xFFFFFFFF00000000)
    tiny = np.finfo(np.float64).smallest_normal
    x = (x.view(np.uint64) & upper).view(np.float64)
    x = np.where(np.abs(x) < tiny, np.copysign(0.0, x), x)
    result = 1 / x
    result = np.where(np.abs(result) < tiny, np.copysign(0.0, result), result)
    bits = result.view(np.uint64) & upper
    if noise is not None:
        step = (_error(x, noise) > 0).astype(np.uint64) << np.uint64(32)
        bits = np.where(np.isfinite(result) & (result != 0), bits + step, bits)
    return bits.view(np.float64)


def _approximated(x: Array, exact: Array, ulps: int, noise: Noise, where: Any) -> Array:
    """Rounded to float32 with subnormal results flushed; with noise, off by up to `ulps`."""
    if noise is not None:
        rounded = exact.astype(np.float32)
        off = (ulps - 0.5) * _error(x, noise) * np.spacing(np.abs(rounded))
        exact = np.where(np.isfinite(rounded) & (rounded != 0) & where, exact + off, exact)
    return _flushed(exact.astype(np.float32))


def _error(x: Array, seed: int) -> Array:
    """A number in [-1, 1) for each operand: a hash (splitmix64) of its bits."""
    bits = x.view(f"u{x.dtype.itemsize}").astype(np.uint64)
    bits += np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-52 - 1


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.copysign(0, x), x).astype(
        np.float32, copy=False
    )


def _compared(name: str) -> Callable[..., Any]:
    """A comparison of floating-point numbers: false of NaN or, of a name with u, true."""
    ordered: dict[str, Any] = {
        "eq": np.equal,
        "ne": lambda a, b: (a < b) | (a > b),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    }
    opposite = {"ne": "eq", "eq": "ne", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}
    if name in ordered:
        return ordered[name]
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    reverse = ordered[opposite[name[:-1]]]
    return lambda a, b: ~reverse(a, b)


def _integer_table() -> dict[str, Operation]:
    table = {}
    comparisons = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    binary: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply}
    binary |= {"min": np.minimum, "max": np.maximum, "div": divided}
    for of in INTEGERS:
        for name, function in binary.items():
            table[f"{name}.{of}"] = Operation(function, of, (of, of))
        table[f"mad.lo.{of}"] = Operation(lambda a, b, c: a * b + c, of, (of, of, of))
        table[f"neg.{of}"] = Operation(np.negative, of, (of,))
        table[f"shr.{of}"] = Operation(shifted_right, of, (of, "u32"))
        for name, compare in comparisons.items():
            table[f"setp.{name}.{of}"] = Operation(compare, "pred", (of, of))
    for of in ("s16", "u16", "s32", "u32"):
        wide = f"{of[0]}{2 * int(of[1:])}"
        table[f"mul.wide.{of}"] = Operation(partial(_wide_product, wide), wide, (of, of))
    for of in ("s64", "u64"):
        table[f"mul.hi.{of}"] = Operation(high_product, of, (of, of))
    for bits in (16, 32, 64):
        of = f"b{bits}"
        table[f"shl.{of}"] = Operation(shifted_left, of, (of, "u32"))
        table[f"bfi.{of}"] = Operation(inserted, of, (of, of, "u32", "u32"))
        for name in ("eq", "ne"):
            table[f"setp.{name}.{of}"] = Operation(comparisons[name], "pred", (of, of))
    for of in ("b16", "b32", "b64", "pred"):
        for name in ("and", "or", "xor"):
            table[f"{name}.{of}"] = Operation(getattr(np, f"bitwise_{name}"), of, (of, of))
        table[f"not.{of}"] = Operation(np.bitwise_not, of, (of,))
    for space in ("global", "local"):
        table[f"cvta.{space}.u64"] = table[f"cvta.to.{space}.u64"] = Operation(
            np.positive, "u64", ("u64",)
        )
    return table


def _wide_product(wide: str, a: Array, b: Array) -> Array:
    return a.astype(TYPES[wide]) * b


def _float_table() -> dict[str, Operation]:
    table = {}
    binary = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    fma = {"f32": rounding.fma_f32, "f64": rounding.fma_f64}
    comparisons = ("eq", "ne", "lt", "le", "gt", "ge")
    for of in FLOATS:
        for name, function in binary.items():
            table[f"{name}.{of}"] = table[f"{name}.rn.{of}"] = Operation(function, of, (of, of))
        table[f"div.rn.{of}"] = Operation(np.divide, of, (of, of))
        table[f"rcp.rn.{of}"] = Operation(np.reciprocal, of, (of,))
        table[f"fma.rn.{of}"] = Operation(fma[of], of, (of, of, of))
        table[f"max.{of}"] = Operation(larger, of, (of, of))
        table[f"min.{of}"] = Operation(smaller, of, (of, of))
        table[f"abs.{of}"] = Operation(np.absolute, of, (of,))
        table[f"neg.{of}"] = Operation(np.negative, of, (of,))
    for of in ("f16", *FLOATS):
        for name in (*comparisons, *(f"{each}u" for each in comparisons), "num", "nan"):
            table[f"setp.{name}.{of}"] = Operation(_compared(name), "pred", (of, of))
    for opcode, approximation in {
        "ex2.approx.ftz.f32": exp2,
        "rcp.approx.ftz.f32": reciprocal,
        "rcp.approx.ftz.f64": crude_reciprocal,
    }.items():
        of = opcode[-3:]
        table[opcode] = Operation(approximation, of, (of,), approximate=True)
    return table


def _conversion_table() -> dict[str, Operation]:
    table = {}
    integers = ("s8", "u8", *INTEGERS)
    for to in INTEGERS:
        for of in integers:
            table[f"cvt.{to}.{of}"] = Operation(partial(_converted, to), to, (of,))
    for to in FLOATS:
        for of in ("s16", "u16", "s32", "u32", "s64"):
            table[f"cvt.rn.{to}.{of}"] = Operation(partial(_converted, to), to, (of,))
    for opcode in ("cvt.f32.f16", "cvt.f64.f16", "cvt.f64.f32", "cvt.rn.f32.f64"):
        *_, to, of = opcode.split(".")
        table[opcode] = Operation(partial(_converted, to), to, (of,))
    table["cvt.rn.f16.f32"] = Operation(rounding.to_f16, "b16", ("f32",))
    table["cvt.rn.bf16.f32"] = Operation(rounding.to_bf16, "bf16", ("f32",))
    table["cvt.rn.bf16x2.f32"] = Operation(_pair, "bf16x2", ("f32", "f32"))
    return table


def _converted(to: str, x: Array) -> Array:
    return x.astype(TYPES[to])


def _pair(high: Array, low: Array) -> Array:
    upper = rounding.to_bf16(high).astype(np.uint32) << np.uint32(16)
    return upper | rounding.to_bf16(low)


def _move_table() -> dict[str, Operation]:
    """Moves of one register, and selections."""
    table = {}
    for of in TYPES:
        if re.fullmatch(r"[bsuf](16|32|64)|pred", of):
            table[f"mov.{of}"] = Operation(lambda a: a, of, (of,))
            table[f"selp.{of}"] = Operation(
                lambda a, b, chosen: np.where(chosen, a, b), of, (of, of, "pred")
            )
    return table


TABLE = _integer_table() | _float_table() | _conversion_table() | _move_table()
