"""Correctly rounded results that NumPy lacks: fused multiply-add, bfloat16."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SPLIT = 2.0**27 + 1
# Of factors and of products, magnitudes for which no error-free transformation over- or underflows.
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-990, 2.0**990
SMALLEST_PRODUCT, LARGEST_PRODUCT = 2.0**-960, 2.0**1020


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once. The product is exact in float64; the sum is rounded to odd there, so
    that rounding it to float32 is as rounding the exact sum.
    """
    return _sum_to_odd(a.astype(np.float64) * b, c.astype(np.float64)).astype(np.float32)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once (Boldo and Melquiond 2008); in rational numbers where that might over-
    or underflow.
    """
    product, product_error = _product(a, b)
    low, low_error = _sum(product_error, c)
    high, high_error = _sum(product, low)
    result = high + _sum_to_odd(high_error, low_error)
    # Exact, if a factor is 0; and NaN or infinity, if any number is.
    trivial = (product == 0) & ((a == 0) | (b == 0))
    for each in (a, b, c):
        trivial |= ~np.isfinite(each)
    np.copyto(result, product + c, where=trivial)
    size = np.abs(product)
    safe = (size > SMALLEST_PRODUCT) & (size < LARGEST_PRODUCT) & (np.abs(c) < LARGEST_PRODUCT)
    for each in (a, b):
        size = np.abs(each)
        safe &= (size > SMALLEST_FACTOR) & (size < LARGEST_FACTOR)
    for i in np.flatnonzero(~(safe | trivial)):
        result[i] = _fma(a[i], b[i], c[i])
    return result


def to_bf16(x: Array) -> Array:
    """The bits of float32 numbers rounded to nearest even; NaN is the canonical 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    """The bits of float32 numbers rounded to nearest even; NaN is the canonical 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, error


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * SPLIT
    high = scaled - (scaled - a)
    return high, a - high


def _sum_to_odd(a: Array, b: Array) -> Array:
    """The sum, of its two neighbours that with the odd significand if it is not exact."""
    total, error = _sum(a, b)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    if inexact.any():
        bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return total


def _fma(a: float, b: float, c: float) -> float:
    """Of finite numbers, the factors not 0."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return math.inf if exact > 0 else -math.inf
