"""Comparisons that assert and say where they fail."""

import numpy as np

from dice_core import backends


def assert_close(actual, expected, *, rtol, atol=0.0, what="value"):
    """|actual - expected| <= atol + rtol |expected| everywhere, NaN only where expected."""
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual = actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(actual - expected) <= atol + rtol * np.abs(expected))
    wrong &= ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    if wrong.any():
        error = np.where(wrong, np.nan_to_num(np.abs(actual - expected), nan=np.inf), -1)
        worst = np.unravel_index(np.argmax(error), error.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} differ ({100 * wrong.mean():.1f} %), "
            f"the worst at {tuple(map(int, worst))}: {actual[worst]!r}, not {expected[worst]!r}"
        )


def assert_same_bits(actual, expected, *, what="value"):
    """The same shape, dtype and bytes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    differ = actual.tobytes() != expected.tobytes()
    assert not differ, f"{what}: {np.sum(actual != expected)} of {actual.size} numbers differ"


def kernel_rows():
    """Every backend of this machine that reads host memory, the oracle aside."""
    return [
        row
        for row in backends.table()
        if row.device == "cpu" and row.name != "reference" and not row.unavailable()
    ]
