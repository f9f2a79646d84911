"""Comparisons that assert and report where they fail."""

from typing import Any

import numpy as np

from dice_core import backends


def assert_close(
    actual: Any, expected: Any, *, rtol: float, atol: float = 0.0, what: str = "value"
) -> None:
    """|actual - expected| <= atol + rtol |expected| everywhere, NaN only where expected."""
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual = actual.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(actual - expected)
    wrong = ~(error <= atol + rtol * np.abs(expected))
    wrong &= ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    if wrong.any():
        error = np.where(wrong, np.nan_to_num(error, nan=np.inf), -1)
        worst = np.unravel_index(np.argmax(error), error.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} differ ({100 * wrong.mean():.1f} %), "
            f"the worst at {tuple(map(int, worst))}: {actual[worst]!r}, not {expected[worst]!r}"
        )


def assert_bitwise_equal(actual: Any, expected: Any, *, what: str = "value") -> None:
    """Asserts the same shape, dtype and bytes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    differ = actual.tobytes() != expected.tobytes()
    assert not differ, f"{what}: {np.sum(actual != expected)} of {actual.size} numbers differ"


def kernel_rows() -> list[backends.Backend]:
    """Every backend of this machine that reads host memory, except the reference."""
    return [
        row
        for row in backends.table()
        if row.device == "cpu" and row.name != "reference" and not row.unavailable()
    ]
