"""Pairwise testing: a few combinations of parameters in which every pair of values occurs."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

Row = tuple[int, ...]  # a combination, by index into each axis
Pair = tuple[tuple[int, int], ...]  # two values, as (axis, index) each


def pairwise(
    *axes: Sequence[Any], allowed: Callable[..., bool] = lambda *values: True
) -> list[tuple[Any, ...]]:
    """A few of the allowed combinations of one value from each axis, which contain every pair of
    values that occurs in any allowed combination.
    """
    rows = [
        row for row in itertools.product(*map(range, map(len, axes))) if _ok(axes, row, allowed)
    ]
    random.Random(0).shuffle(rows)
    missing: set[Pair] = set().union(*map(_pairs, rows))
    chosen: list[Row] = []
    while missing:
        best = max(rows[:2000], key=lambda row: len(missing & _pairs(row)))
        if not missing & _pairs(best):
            best = next(row for row in rows if missing & _pairs(row))
        chosen.append(best)
        missing -= _pairs(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]


def _ok(axes: Sequence[Sequence[Any]], row: Row, allowed: Callable[..., bool]) -> bool:
    return allowed(*(axis[i] for axis, i in zip(axes, row, strict=True)))


def _pairs(row: Row) -> set[Pair]:
    return set(itertools.combinations(enumerate(row), 2))
