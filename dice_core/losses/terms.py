"""What every loss is: a term, a sum of terms, and the settings that terms share."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from .. import checks, spec
from ..spec import Spec
from ..sums import Statistics

Array = Any  # NumPy's or torch's
Self = TypeVar("Self", bound="Term")

REDUCTIONS = ("mean", "sum", "none", "classes", "batch")  # the last is pool "batch" with "mean"
_POOLED_BATCH = {"none": "batch", "batch": "batch", "classes": "all", "all": "all"}


class Ratio(NamedTuple):
    """The loss start + sum_c share w_c (num + excess) / (den + smooth) of two linear functions of
    the sums, which a GPU computes in the launch that completes the sums.
    """

    pooled: bool  # whether the samples' sums are added first
    per_sample: bool  # else whether each sample has a loss
    ignore_channel: int  # -1 for none
    share: float
    start: float
    excess: float
    smooth: float
    num: tuple[float, ...]  # coefficients of I, P and Y
    den: tuple[float, ...]


class Term:
    """A loss of the sums over voxels, or a sum of such losses. It never sees a voxel.

    - needs: the sums that it is computed from, as options of `dice_core.statistics`: pairs such as
      ("p", 2) or ("gamma", 0.0).
    - weights: its class weights, if any, (C,) arrays or tensors.
    - reduction, pool: its value has the shape () for reduction "mean" and "sum", (N,) for "none"
      and (N, C) for "classes", with 1 in place of N where samples are pooled.
    """

    needs: tuple[tuple[str, Any], ...]
    weights: tuple[Any, ...]
    reduction: str
    pool: str

    @property
    def name(self) -> str:
        """As messages call it."""
        return type(self).__name__

    def value(self, sums: Statistics) -> Array:
        """The loss of NumPy arrays or torch tensors."""
        raise NotImplementedError

    def with_derivative(self, sums: Statistics) -> tuple[Array, Array]:
        """The loss of NumPy arrays and, (K, N, C), the derivative of each sample's loss for its
        sums: times an incoming gradient of the loss's shape, the cotangent of the sums.
        """
        raise NotImplementedError

    def ratio(self, samples: int, classes: int) -> Ratio | None:
        """This loss of so many samples and classes as a Ratio, if it is one."""
        return None

    def check(self, classes: int) -> None:
        """Raises ValueError if it does not fit so many classes."""

    def with_weights(self: Self, weights: Sequence[Any]) -> Self:
        """The same with these in place of `weights`."""
        return self

    def spec(self, activation: Any, ignore_label: Any, targets: str = "labels") -> Spec:
        """The sums that it needs, of these probabilities and labels. With targets "binary" soft
        targets must be 0 or 1.
        """
        try:
            return _request(activation, ignore_label, targets, self.needs)
        except TypeError:  # of what does not hash, and of what does not fit
            return _request.__wrapped__(activation, ignore_label, targets, self.needs)

    def shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """The shape of its value."""
        rows = samples if self.pool in ("none", "classes") else 1
        return {"none": (rows,), "classes": (rows, classes)}.get(self.reduction, ())

    def __call__(self, statistics: Statistics) -> Array:
        """The loss of statistics, in float64, differentiable if they are. Those of other libraries
        than NumPy and torch are copied to the host.

        Raises ValueError if they lack what it needs.
        """
        self.check_statistics(statistics)
        if namespace(statistics.array) is np and not isinstance(statistics.array, np.ndarray):
            statistics = statistics.to_host()
        return self.value(statistics)

    def check_statistics(self, statistics: Statistics) -> None:
        """Raises ValueError if these lack a sum that it needs, or it does not fit their classes."""
        for option, needed in self.needs:
            there = getattr(statistics.spec, option)
            if there != needed and not (
                option == "target_square" and not statistics.spec.soft_targets
            ):
                raise ValueError(
                    f"{self.name} needs statistics with {option} = {needed}, and these have "
                    f"{option} = {there}; take them with {option}={needed}"
                )
        self.check(statistics.array.shape[2])

    def __add__(self, other: Any) -> Term:
        if not isinstance(other, Term):
            return NotImplemented
        return Sum((*_parts(self), *_parts(other)))

    def __radd__(self, other: Any) -> Term:
        return (
            self if isinstance(other, int) and other == 0 else NotImplemented
        )  # sum() starts at 0

    def __mul__(self, factor: Any) -> Sum:
        factor = checks.number(factor, "a term's factor")
        return Sum(tuple((factor * each, term) for each, term in _parts(self)))

    __rmul__ = __mul__


def _parts(term: Term) -> tuple[tuple[float, Term], ...]:
    return term.parts if isinstance(term, Sum) else ((1.0, term),)


@functools.lru_cache(1024, typed=True)
def _request(activation: Any, ignore_label: Any, targets: Any, needs: Any) -> Spec:
    return spec.checked(
        activation=activation, ignore_label=ignore_label, targets=targets, **dict(needs)
    )


class Sum(Term):
    """Terms times their factors, of the same sums: one pass over the voxels for all.

    - parts: pairs (factor, term).
    """

    def __init__(self, parts: tuple[tuple[float, Term], ...]) -> None:
        (_, first), *others = self.parts = parts
        for _, other in others:
            if other.shape(2, 3) != first.shape(2, 3):
                raise ValueError(
                    f"{first.name} has reduction {first.reduction!r} (pool {first.pool!r}), "
                    f"{other.name} has {other.reduction!r} (pool {other.pool!r}): the losses of a "
                    f"sum must have the same shape"
                )
        self.reduction, self.pool = first.reduction, first.pool
        self.weights = tuple(weight for _, term in parts for weight in term.weights)
        needs: dict[str, Any] = {}
        needed_by: dict[str, str] = {}
        for _, term in parts:
            for option, needed in term.needs:
                if needs.setdefault(option, needed) != needed:
                    raise ValueError(
                        f"{needed_by[option]} needs {option} = {needs[option]} and {term.name} "
                        f"needs {option} = {needed}; one pass over the voxels has one {option}"
                    )
                needed_by.setdefault(option, term.name)
        self.needs = tuple(needs.items())

    @property
    def name(self) -> str:
        return " + ".join(term.name for _, term in self.parts)

    def value(self, sums: Statistics) -> Array:
        (factor, first), *others = self.parts
        total = factor * first.value(sums)
        for factor, term in others:
            total = total + factor * term.value(sums)
        return total

    def with_derivative(self, sums: Statistics) -> tuple[Array, Array]:
        (factor, first), *others = self.parts
        value, derivative = first.with_derivative(sums)
        if factor != 1:
            value, derivative = factor * value, factor * derivative
        for factor, term in others:
            more, slope = term.with_derivative(sums)
            value, derivative = value + factor * more, derivative + factor * slope
        return value, derivative

    def check(self, classes: int) -> None:
        if self.weights:
            for _, term in self.parts:
                term.check(classes)

    def with_weights(self, weights: Sequence[Any]) -> Sum:
        other, parts = copy.copy(self), []
        other.weights = tuple(weights)
        for factor, term in self.parts:
            count = len(term.weights)
            parts.append((factor, term.with_weights(weights[:count])))
            weights = weights[count:]
        other.parts = tuple(parts)
        return other

    def __repr__(self) -> str:
        return " + ".join(
            repr(term) if factor == 1 else f"{factor:g} * {term!r}" for factor, term in self.parts
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Settings(Term):
    """A term with settings, all by keyword, that checks them when it is made."""

    weight: Any = None
    reduction: str = "mean"
    pool: str = "none"

    of_classes: ClassVar[tuple[str, ...]] = ("weight",)  # settings that are (C,) numbers
    pools: ClassVar[tuple[str, ...]] = ("none", "batch")

    def __post_init__(self) -> None:
        reduction, pool = self.reduction, self.pool
        if reduction == "batch":  # that of the published C++ implementation
            checks.one_of(pool, "pool", self.pools)
            reduction, pool = "mean", _POOLED_BATCH[pool]
            assign(self, reduction=reduction, pool=pool)
        checks.one_of(reduction, "reduction", REDUCTIONS)
        checks.one_of(pool, "pool", self.pools)
        if reduction == "classes" and pool in ("classes", "all"):
            raise ValueError(f"pool={pool!r} leaves no loss per class: reduction 'classes'")
        if reduction == "none" and pool in ("batch", "all"):
            raise ValueError(f"pool={pool!r} leaves no loss per sample: reduction 'none'")
        for name in self.of_classes:
            value = getattr(self, name)
            if value is not None and not hasattr(value, "requires_grad"):
                assign(self, **{name: checks.weight(value, name)})
        assign(self, weights=self._weights())

    def settle(self, needs: Mapping[str, Any], **values: Any) -> None:
        """Sets what a constructor derives: the sums that are needed, and settings as checked."""
        assign(self, needs=tuple(needs.items()), **values)

    def check(self, classes: int) -> None:
        for name in self.of_classes:
            value = getattr(self, name)
            if value is not None:
                checks.weight_shape(value, classes, name)

    def with_weights(self: Self, weights: Sequence[Any]) -> Self:
        if not self.weights:
            return self
        other = copy.copy(self)  # what else it has was checked
        given = [n for n in type(self).of_classes if getattr(self, n) is not None]  # type: ignore[attr-defined]
        assign(other, weights=tuple(weights), **dict(zip(given, weights, strict=True)))
        return other

    def _weights(self) -> tuple[Any, ...]:
        given = (getattr(self, name) for name in self.of_classes)
        return tuple(value for value in given if value is not None)

    def __repr__(self) -> str:
        given = []
        for field in fields(self):
            if not field.init:
                continue
            value = getattr(self, field.name)
            if value is not field.default and not (
                isinstance(value, (int, float, str, tuple)) and value == field.default
            ):
                value = value.tolist() if hasattr(value, "tolist") else value
                given.append(f"{field.name}={value!r}")
        return f"{self.name}({', '.join(given)})"


def ignored_channels(channels: Any, classes: int) -> list[int]:
    """Of the ignored channels, one or several, those that there are."""
    several = channels if isinstance(channels, tuple) else (channels,)
    return [channel for channel in several if 0 <= channel < classes]


def assign(term: Any, **values: Any) -> None:
    """Sets attributes of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(term, name, value)


def namespace(array: Array) -> Any:
    """The library of an array: torch if it is a tensor, else NumPy."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np
