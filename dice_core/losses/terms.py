"""What every loss is: a term, a sum of terms, and the settings that terms share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from .. import spec

Array = Any  # of either library
Self = TypeVar("Self", bound="Term")

REDUCTIONS = ("mean", "sum", "none", "classes")


class Sums(NamedTuple):
    """The statistics by name, (N, C) each; None for those that were not summed."""

    intersection: Array
    pred_sum: Array
    target_sum: Array
    cross_entropy_sum: Array = None
    smoothing_sum: Array = None
    positive_sum: Array = None
    negative_sum: Array = None
    voxel_sum: Array = None

    def of_batch(self) -> Sums:
        """Added over samples, (1, C)."""
        return Sums(*(None if row is None else row.sum(0)[None] for row in self))

    @property
    def voxels(self) -> Array:
        """(N,): how many voxels are counted; of dense targets, on average over the classes."""
        return self.target_sum.sum(-1) if self.voxel_sum is None else self.voxel_sum.mean(-1)

    @classmethod
    def of(cls, sums: Array, names: Sequence[str]) -> Sums:
        """The rows of (K, N, C)."""
        return cls(**dict(zip(names, sums, strict=True)))


class Ratio(NamedTuple):
    """The loss start + sum_c share w_c (num + excess) / (den + smooth), what a GPU computes right
    behind the sums.
    """

    pooled: bool  # whether the samples' sums are added first,
    each: bool  # else whether each sample has a loss
    left_out: int  # class, -1 for none
    share: float
    start: float
    excess: float
    smooth: float
    num: tuple[float, ...]  # coefficients of I, P and Y
    den: tuple[float, ...]


class Term:
    """A loss of the sums, or a sum of such losses.

    `needs` are the fields of a `spec.Spec` that it asks for. Its value has the shape () for
    reduction "mean" and "sum", (N,) for "none" and (N, C) for "classes", 1 in place of N where
    samples are pooled.
    """

    reduction: str
    pool: str

    @property
    def name(self) -> str:
        """As messages call it."""
        return type(self).__name__

    @property
    def needs(self) -> Mapping[str, Any]:
        """The fields of a `spec.Spec` without which it has no value."""
        raise NotImplementedError

    def value(self, sums: Sums) -> Array:
        """The loss."""
        raise NotImplementedError

    def with_derivative(
        self, sums: Array, names: Sequence[str] = spec.STATISTICS
    ) -> tuple[Array, Array]:
        """The loss of NumPy's (K, N, C) and, (K, N, C), the derivative of each sample's loss for
        its sums.

        Times an incoming gradient of the loss's shape, an axis for the classes appended where it
        has none, this is the cotangent of the sums.
        """
        raise NotImplementedError

    def check(self, classes: int) -> None:
        """Raises ValueError if it does not fit so many classes."""

    def with_weights(self: Self, convert: Callable[[Any], Any]) -> Self:
        """The same with every weight converted."""
        return self

    @property
    def weights(self) -> tuple[Any, ...]:
        """Its classes' weights, those that there are."""
        return ()

    def __call__(self, sums: Array, names: Sequence[str] = spec.STATISTICS) -> Array:
        """The loss of (K, N, C), whose rows have these names."""
        return self.value(Sums.of(sums, names))

    def ratio(self, samples: int, classes: int) -> Ratio | None:
        """This loss of so many samples and classes as a Ratio, if it is one."""
        return None

    def shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """Of its value."""
        rows = samples if self.pool in ("none", "classes") else 1
        return {"none": (rows,), "classes": (rows, classes)}.get(self.reduction, ())

    def __add__(self, other: Any) -> Sum:
        if not isinstance(other, Term):
            return NotImplemented
        return Sum((*_parts(self), *_parts(other)))

    def __mul__(self, factor: Any) -> Sum:
        factor = spec.number(factor, "a term's factor")
        return Sum(tuple((factor * each, term) for each, term in _parts(self)))

    __rmul__ = __mul__


def _parts(term: Term) -> tuple[tuple[float, Term], ...]:
    return term.parts if isinstance(term, Sum) else ((1.0, term),)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Term):
    """Terms times their factors, of the same sums: one pass over the voxels for all."""

    parts: tuple[tuple[float, Term], ...]

    def __post_init__(self) -> None:
        (_, first), *others = self.parts
        for _, other in others:
            if other.shape(2, 3) != first.shape(2, 3):
                raise ValueError(
                    f"{first.name} has reduction {first.reduction!r} (pool {first.pool!r}), "
                    f"{other.name} has {other.reduction!r} (pool {other.pool!r}): the losses of a "
                    f"sum must have the same shape"
                )
        self.needs  # noqa: B018  raises where the terms contradict each other

    @property
    def reduction(self) -> str:  # type: ignore[override]
        """Of all its terms."""
        return self.parts[0][1].reduction

    @property
    def pool(self) -> str:  # type: ignore[override]
        """Of its first term."""
        return self.parts[0][1].pool

    @property
    def name(self) -> str:
        return " + ".join(term.name for _, term in self.parts)

    @property
    def needs(self) -> Mapping[str, Any]:
        needs: dict[str, Any] = {}
        asked: dict[str, Term] = {}
        for _, term in self.parts:
            for field, wanted in term.needs.items():
                if needs.setdefault(field, wanted) != wanted:
                    raise ValueError(
                        f"{asked[field].name} needs {field} = {needs[field]} and {term.name} needs "
                        f"{field} = {wanted}; one pass over the voxels has one {field}"
                    )
                asked.setdefault(field, term)
        return needs

    @property
    def weights(self) -> tuple[Any, ...]:
        return tuple(weight for _, term in self.parts for weight in term.weights)

    def value(self, sums: Sums) -> Array:
        total = None
        for factor, term in self.parts:
            value = factor * term.value(sums)
            total = value if total is None else total + value
        return total

    def with_derivative(
        self, sums: Array, names: Sequence[str] = spec.STATISTICS
    ) -> tuple[Array, Array]:
        values, derivatives = zip(
            *(term.with_derivative(sums, names) for _, term in self.parts), strict=True
        )
        factors = [factor for factor, _ in self.parts]
        return (
            sum(f * value for f, value in zip(factors, values, strict=True)),
            sum(f * derivative for f, derivative in zip(factors, derivatives, strict=True)),
        )

    def check(self, classes: int) -> None:
        for _, term in self.parts:
            term.check(classes)

    def with_weights(self, convert: Callable[[Any], Any]) -> Sum:
        return Sum(tuple((factor, term.with_weights(convert)) for factor, term in self.parts))

    def __repr__(self) -> str:
        return " + ".join(
            repr(term) if factor == 1 else f"{factor:g} * {term!r}" for factor, term in self.parts
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Settings(Term):
    """What terms are given by keyword."""

    weight: Any = None
    reduction: str = "mean"

    arrays: ClassVar[tuple[str, ...]] = ("weight",)  # settings that are (C,) numbers

    def __post_init__(self) -> None:
        for name in self.arrays:
            value = getattr(self, name)
            if value is not None and not hasattr(value, "requires_grad"):
                assign(self, **{name: spec.weights(value)})
        spec.one_of(self.reduction, "reduction", REDUCTIONS)

    def check(self, classes: int) -> None:
        for weight in self.weights:
            spec.check_weight(weight, classes)

    @property
    def weights(self) -> tuple[Any, ...]:
        given = (getattr(self, name) for name in self.arrays)
        return tuple(value for value in given if value is not None)

    def with_weights(self: Self, convert: Callable[[Any], Any]) -> Self:
        if not self.weights:
            return self
        other = copy.copy(self)  # what else it has was checked
        for name in type(self).arrays:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if value is not None:
                assign(other, **{name: convert(value)})
        return other

    def __repr__(self) -> str:
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not field.default and not (
                isinstance(value, (int, float, str, tuple)) and value == field.default
            ):
                value = value.tolist() if hasattr(value, "tolist") else value
                given.append(f"{field.name}={value!r}")
        return f"{self.name}({', '.join(given)})"


def left_out(channels: Any, classes: int) -> list[int]:
    """Of the ignored channels, one or several, those that there are."""
    several = channels if isinstance(channels, tuple) else (channels,)
    return [channel for channel in several if 0 <= channel < classes]


def ignored(channels: Any) -> Any:
    """An ignore_channel, or several as a tuple, checked."""
    if isinstance(channels, (tuple, list, set, frozenset, range)):
        return tuple(map(spec.channel, channels))
    return spec.channel(channels)


def assign(term: Any, **values: Any) -> None:
    """Of a frozen dataclass, while it is made."""
    for name, value in values.items():
        object.__setattr__(term, name, value)


def times(upstream: Array, derivative: Array) -> Array:
    """The cotangent of the sums: a loss's derivative times the incoming gradient, of its shape."""
    return derivative * (upstream if upstream.ndim == 2 else upstream[..., None])


def namespace(array: Array) -> Any:
    """The library of an array: torch if it is a tensor, else NumPy."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np
