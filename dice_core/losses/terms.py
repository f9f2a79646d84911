"""The base classes of all losses: a term, a sum of terms, and the settings that terms share."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from .. import allocators, checks, spec
from ..spec import Spec
from ..sums import Statistics, check_is_statistics

Array = Any  # NumPy array or torch tensor
Self = TypeVar("Self", bound="Term")

REDUCTIONS = ("mean", "sum", "none", "classes", "batch")  # the last is pool "batch" with "mean"
PLAIN = (int, float, str, type(None))  # settings that are found in a cache by their value
_POOLED_BATCH = {"none": "batch", "batch": "batch", "classes": "all", "all": "all"}


class Ratio(NamedTuple):
    """The loss start + sum_c share w_c (num + excess) / (den + smooth) of two linear functions of
    the sums, which a GPU computes in the launch that completes the sums.
    """

    pooled: bool  # whether the sums of the samples are added first
    per_sample: bool  # whether there is a loss for each sample
    ignore_channel: int  # -1 for none
    share: float
    start: float
    excess: float
    smooth: float
    num: tuple[float, ...]  # coefficients of I, P and Y
    den: tuple[float, ...]


class Term:
    """A loss computed from the sums over voxels, or a sum of such losses.

    - needs: the sums that it needs, as options of `dice_core.statistics`: pairs such as ("p", 2) or
      ("gamma", 0.0).
    - weights: its class weights, if any, (C,) arrays or tensors.
    - reduction, pool: its value has shape () for reduction "mean" and "sum", (N,) for "none" and
      (N, C) for "classes", with 1 in place of N where samples are pooled.

    A loss of your own defines `needs` and `value`, and for gradients of arrays `with_derivative`;
    on torch tensors autograd takes its place.
    """

    needs: tuple[tuple[str, Any], ...]
    weights: tuple[Any, ...] = ()
    reduction: str = "mean"
    pool: str = "none"
    has_derivative: bool = False  # whether it defines with_derivative

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.has_derivative = cls.with_derivative is not Term.with_derivative

    @property
    def name(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    def value(self, sums: Statistics) -> Array:
        """The loss of NumPy arrays or torch tensors."""
        raise NotImplementedError

    def with_derivative(self, sums: Statistics) -> tuple[Array, Array]:
        """The loss of NumPy arrays, and the derivative of each sample's loss with respect to its
        sums, (K, N, C). Times an incoming gradient of the loss's shape it is the cotangent of the
        sums.
        """
        raise NotImplementedError(
            f"{self.name} defines no with_derivative, which gradients of arrays need; "
            f"dice_core.torch differentiates its value"
        )

    @property
    def pools_samples(self) -> bool:
        """Whether it is a loss of sums that are added over the samples."""
        return self.pool in ("batch", "all")

    def ratio(self, samples: int, classes: int) -> Ratio | None:
        """This loss of this many samples and classes as a Ratio; None if it is not one."""
        return None

    def check(self, classes: int) -> None:
        """Raises ValueError if it cannot be computed for this many classes."""

    def with_weights(self: Self, weights: Sequence[Any]) -> Self:
        """A copy with these class weights."""
        return self

    def spec(self, activation: Any, ignore_label: Any, targets: str = "labels") -> Spec:
        """The Spec of the sums that it needs. Targets "binary" must be 0 or 1."""
        options = activation, ignore_label, targets, self.needs
        if type(activation) is str and type(ignore_label) in PLAIN:
            return _request(*options)
        return _request.__wrapped__(*options)  # a tensor is hashed by identity

    def shape(self, samples: int, classes: int) -> tuple[int, ...]:
        """The shape of its value."""
        rows = samples if self.pool in ("none", "classes") else 1
        return {"none": (rows,), "classes": (rows, classes)}.get(self.reduction, ())

    __array_ufunc__ = None  # so that an array times a term is an error, not an array of terms

    def __call__(self, statistics: Statistics) -> Array:
        """The loss of statistics, in float64, differentiable if they are. Statistics of libraries
        other than NumPy and torch are copied to the host.

        Raises ValueError if they lack what it needs.
        """
        self.check_statistics(statistics)
        if namespace(statistics.array) is np and not isinstance(statistics.array, np.ndarray):
            statistics = statistics.to_host()
        term = self.like(statistics.array)
        with allocators.quiet(statistics.array):
            return term.value(statistics)

    def like(self: Self, array: Array) -> Self:
        """The same with its class weights as float64 arrays of the library of `array`, NumPy or
        torch, and on its device.
        """
        if not self.weights:
            return self
        xp = namespace(array)
        if xp is np:
            return self.with_weights([to_numpy(weight) for weight in self.weights])
        weights = [xp.as_tensor(weight) for weight in self.weights]
        for weight in weights:
            check_tensor(weight)
            if weight.is_meta and not array.is_meta:
                raise TypeError(_META)
        return self.with_weights([weight.to(array.device, xp.float64) for weight in weights])

    def check_statistics(self, statistics: Statistics) -> None:
        """Raises TypeError if these are not Statistics, ValueError if they lack a needed sum or
        have the wrong number of classes.
        """
        check_is_statistics(statistics)
        shape = tuple(getattr(statistics.array, "shape", ()))
        if len(shape) != 3 or shape[0] != len(statistics.spec.fields):
            raise ValueError(
                f"statistics must have the shape ({len(statistics.spec.fields)}, N, C) of their "
                f"sums, got {shape}"
            )
        for option, needed in self.needs:
            found = getattr(statistics.spec, option)
            if found != needed and not (
                option == "target_square" and not statistics.spec.soft_targets
            ):
                raise ValueError(
                    f"{self.name} needs statistics with {option} = {needed}, but these have "
                    f"{option} = {found}; compute them with {option}={needed}"
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
        name = "a term's factor"
        factor = checks.number(factor, name)
        return Sum(tuple((checks.number(factor * each, name), term) for each, term in _parts(self)))

    __rmul__ = __mul__


def _parts(term: Term) -> tuple[tuple[float, Term], ...]:
    return term.parts if isinstance(term, Sum) else ((1.0, term),)


@functools.lru_cache(1024, typed=True)
def _request(activation: Any, ignore_label: Any, targets: Any, needs: Any) -> Spec:
    return spec.checked(
        activation=activation, ignore_label=ignore_label, targets=targets, **dict(needs)
    )


class Sum(Term):
    """A weighted sum of terms, all computed from one pass over the voxels.

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
        self.has_derivative = all(term.has_derivative for _, term in parts)
        self.weights = tuple(weight for _, term in parts for weight in term.weights)
        needs: dict[str, Any] = {}
        needed_by: dict[str, str] = {}
        for _, term in parts:
            for option, needed in term.needs:
                if needs.setdefault(option, needed) != needed:
                    raise ValueError(
                        f"{needed_by[option]} needs {option} = {needs[option]} and {term.name} "
                        f"needs {option} = {needed}; one pass over the voxels has a single {option}"
                    )
                needed_by.setdefault(option, term.name)
        self.needs = tuple(needs.items())

    @property
    def name(self) -> str:
        return " + ".join(term.name for _, term in self.parts)

    @property
    def pools_samples(self) -> bool:
        return all(term.pools_samples for _, term in self.parts)

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
    """A term with keyword-only settings, which are checked on construction."""

    weight: Any = None
    reduction: str = "mean"
    pool: str = "none"

    of_classes: ClassVar[tuple[str, ...]] = ("weight",)  # settings that are (C,) numbers
    pools: ClassVar[tuple[str, ...]] = ("none", "batch")

    def __post_init__(self) -> None:
        reduction, pool = self.reduction, self.pool
        checks.one_of(reduction, "reduction", REDUCTIONS)
        if reduction == "batch":  # as in the published C++ implementation
            checks.one_of(pool, "pool", self.pools)
            reduction, pool = "mean", _POOLED_BATCH[pool]
            assign(self, reduction=reduction, pool=pool)
        checks.one_of(pool, "pool", self.pools)
        if reduction == "classes" and pool in ("classes", "all"):
            raise ValueError(f"pool={pool!r} leaves no loss per class for reduction='classes'")
        if reduction == "none" and pool in ("batch", "all"):
            raise ValueError(f"pool={pool!r} leaves no loss per sample for reduction='none'")
        for setting in fields(self):
            if isinstance(setting.default, bool):
                value = checks.flag(getattr(self, setting.name), setting.name)
                assign(self, **{setting.name: value})
        for name in self.of_classes:
            value = getattr(self, name)
            if value is not None and not hasattr(value, "requires_grad"):
                assign(self, **{name: checks.weight(value, name)})
        assign(self, weights=self._weights())

    def settle(self, needs: Mapping[str, Any], **values: Any) -> None:
        """Sets what a constructor derives: the needed sums and the checked settings."""
        assign(self, needs=tuple(needs.items()), **values)

    def check(self, classes: int) -> None:
        for name in self.of_classes:
            value = getattr(self, name)
            if value is not None:
                checks.weight_shape(value, classes, name)

    def with_weights(self: Self, weights: Sequence[Any]) -> Self:
        if not self.weights:
            return self
        other = copy.copy(self)  # its other settings are checked already
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
    """Those of the ignored channels, one or several, that are within [0, classes)."""
    several = channels if isinstance(channels, tuple) else (channels,)
    return [channel for channel in several if 0 <= channel < classes]


def assign(term: Any, **values: Any) -> None:
    """Sets attributes of a frozen dataclass during its construction."""
    for name, value in values.items():
        object.__setattr__(term, name, value)


_META = "weight is on the meta device, where it has no numbers"


def to_numpy(weight: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Class weights without autograd. Raises TypeError for a tensor that requires grad."""
    if not hasattr(weight, "requires_grad"):
        return checks.weight(weight)
    checks.no_gradient(weight, "weight")
    refuse_unusual(weight)
    if weight.is_meta:
        raise TypeError(_META)
    return checks.weight(weight.detach().cpu().double().numpy())


def refuse_unusual(weight: Any, name: str = "weight") -> None:
    """Raises TypeError for a complex tensor, whose conversion would drop the imaginary part, and
    for a sparse, nested or quantized one.
    """
    if weight.is_complex() or weight.is_quantized:
        raise TypeError(f"{name} must be numbers, one per class, got {weight.dtype}")
    if weight.is_nested or weight.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name} must be a dense tensor")


def check_tensor(weight: Any) -> None:
    """Raises TypeError for class weights that are not plain numbers, ValueError for infinite ones.

    Those on a device are not read, which would synchronize; nor those that torch traces.
    """
    refuse_unusual(weight)
    torch = sys.modules["torch"]
    if (
        weight.is_cpu
        and not is_traced(torch)
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
    ):
        checks.weight(weight.detach().double())


def is_traced(torch: Any) -> bool:
    """Whether torch traces, transforms or intercepts what is computed now."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )


def namespace(array: Array) -> Any:
    """The library of an array: torch if it is a tensor, else NumPy."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np
