"""Statistics: the sums over voxels from which every loss is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import allocators, buffers, spec
from .spec import Spec

Array = Any  # NumPy, torch, CuPy, ...

_OPTIONS = {  # the options that request the optional sums
    spec.CROSS_ENTROPY: "gamma=0",
    spec.NLL: "nll=True",
    spec.POSITIVE: "binary_gamma=0",
    spec.NEGATIVE: "binary_gamma=0",
}


class Statistics:
    """Sums over the valid voxels of each sample and class, (N, C) float64 each, by name.

    They are arrays of the logits' library on the logits' device; those of `dice_core.torch` are
    differentiable tensors, those of `dice_core.dask` lazy arrays. ``+`` adds statistics of the same
    kind, which gives the sums over both sets of voxels. Statistics can be iterated over and
    unpacked in the order of `spec.fields`, and can be pickled.

    - array: all of them, (K, N, C).
    - spec: what was summed.
    - dtype: of the logits.
    """

    __slots__ = ("array", "dtype", "spec")

    def __init__(self, array: Array, spec: Spec, dtype: str = "float64") -> None:
        self.array = array
        self.spec = spec
        self.dtype = dtype

    @property
    def intersection(self) -> Array:
        """I = sum s t, the probability of a class over its own voxels."""
        return self.array[0]

    @property
    def pred_sum(self) -> Array:
        """P = sum s^p over all valid voxels."""
        return self.array[1]

    @property
    def target_sum(self) -> Array:
        """Y = sum t, for labels the number of voxels of the class."""
        return self.array[2]

    @property
    def cross_entropy_sum(self) -> Array:
        """H = sum t (1 - q)^gamma (-log q), q the softmax."""
        return self.row(spec.CROSS_ENTROPY)

    @property
    def nll_sum(self) -> Array:
        """L = sum (-log q) over all valid voxels, q the softmax."""
        return self.row(spec.NLL)

    @property
    def positive_sum(self) -> Array:
        """B+ = sum t (1 - b)^gamma (-log b), b the sigmoid."""
        return self.row(spec.POSITIVE)

    @property
    def negative_sum(self) -> Array:
        """B- = sum (1 - t) b^gamma (-log(1 - b)), b the sigmoid."""
        return self.row(spec.NEGATIVE)

    @property
    def target_square_sum(self) -> Array:
        """sum t^2; for labels the same as `target_sum`."""
        if not self.spec.soft_targets:
            return self.array[2]
        return self.row(spec.TARGET_SQUARE)

    @property
    def voxel_count(self) -> Array:
        """The number of valid voxels; for labels the same for every class."""
        if self.spec.soft_targets:
            return self.array[-1]
        return self.array[2] * 0 + self.array[2].sum(-1)[:, None]

    @property
    def voxels(self) -> Array:
        """The number of valid voxels, (N,); for soft targets, the mean over the classes."""
        return self.array[-1].mean(-1) if self.spec.soft_targets else self.array[2].sum(-1)

    def row(self, name: str) -> Array:
        """The sum of this name. Raises AttributeError if it was not computed."""
        fields = self.spec.fields
        if name not in fields:
            option = _OPTIONS.get(name, f"{name.removesuffix('_sum')}=True")
            raise AttributeError(
                f"these statistics have no {name} (they have {', '.join(fields)}); "
                f"compute them with {option}"
            )
        return self.array[fields.index(name)]

    def pooled(self) -> Statistics:
        """The statistics added over the samples, N = 1."""
        with allocators.quiet(self.array):
            array = self.array.sum(1)[:, None]
        return Statistics(array, self.spec, self.dtype)

    def __iter__(self) -> Iterator[Array]:
        return (self.array[k] for k in range(len(self.spec.fields)))

    def __add__(self, other: Any) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        tensors = hasattr(self.array, "requires_grad"), hasattr(other.array, "requires_grad")
        for what, mine, theirs in (
            ("kinds of arrays", *("torch's" if each else "others" for each in tensors)),
            ("sums", self.spec, other.spec),
            ("logits' dtypes", self.dtype, other.dtype),
            ("shapes (K, N, C)", tuple(self.array.shape), tuple(other.array.shape)),
        ):
            if mine != theirs:
                raise ValueError(
                    f"cannot add statistics with different {what}: {mine} and {theirs}"
                )
        with allocators.quiet(self.array):
            array = allocators.add(self.array, other.array)
        return Statistics(array, self.spec, self.dtype)

    def __radd__(self, other: Any) -> Statistics:
        return (
            self if isinstance(other, int) and other == 0 else NotImplemented
        )  # sum() starts at 0

    def __repr__(self) -> str:
        samples, classes = self.array.shape[1:]
        return f"<Statistics of {samples} samples, {classes} classes: {self.spec}>"

    def to_host(self) -> Statistics:
        """The same statistics as NumPy arrays; synchronizes with the device, and computes those of
        `dice_core.dask`.
        """
        if isinstance(self.array, np.ndarray):
            return self
        if hasattr(self.array, "__dask_graph__"):
            return Statistics(self.array.compute(), self.spec, self.dtype)
        array = allocators.to_host(buffers.of(self.array, "statistics"))
        return Statistics(array, self.spec, self.dtype)


def check_is_statistics(statistics: Any) -> None:
    """Raises TypeError if these are not Statistics."""
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics must be those of dice_core.statistics, got {type(statistics).__name__}"
        )
