"""The losses of dask arrays, for volumes that do not fit in memory::

    total = dice_core.dask.statistics(x, y).to_host()  # one pass over the blocks
    value = Dice()(total)
    dice_core.dask.gradient(x, y, total, Dice()).to_zarr("dx.zarr")  # and a second one

A task of dask's computes the sums of one block, and these are added in an order that depends on
nothing but the chunks: results are bitwise reproducible, whatever the scheduler (threads,
processes, a cluster of machines with the same instruction set) and the number of its workers. There
are as many blocks in memory as tasks run at a time; a block may have some tens of megabytes. All
results are lazy.

x and y are dask arrays, or NumPy arrays such as a memmap, whose blocks are views of the array
(`dask.array.from_array` copies a memmap into memory). Views are sent to other processes as part of
the graph; there, arrays in storage that the workers read, such as zarr, are better. Chunks may
divide the samples and the spatial axes of x, not its channels; y gets those of x. A block that is
not in C order is copied first, since its layout in memory decides the order of the sums. Blocks in
GPU memory (CuPy) are summed there, which has not been tested.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

try:
    import dask.array as da
except ModuleNotFoundError as error:
    raise ImportError(
        f'dice_core.dask needs {error.name}, which is not installed: pip install "dice_core[dask]"'
    ) from None

from . import allocators, api, calls, checks, losses, spec
from .api import Score
from .losses import Term
from .spec import Spec
from .sums import Statistics, check_is_statistics

__all__ = ["gradient", "loss", "score", "statistics"]

Array = Any  # a NumPy array, or another library's in a dask array
Lazy = Any  # a dask array

SPLIT_EVERY = 8  # how many partial sums are added at a time


def loss(
    x: Any,
    y: Any,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = 1,
    check_labels: bool | None = None,
) -> Lazy:
    """The loss of dask arrays, with the arguments of `dice_core.loss`.

    Replaces the naive code of `dice_core.loss` on dask arrays, which allocates several arrays of
    the size of each block.

    Parameters
    ----------
    x, y : dask or NumPy arrays
        Logits, and labels or targets, as in `dice_core.loss`.
    num_threads : int, optional
        The number of threads for each block, of which dask computes several at a time: one is best
        for as many tasks as cores.

    Returns
    -------
    A lazy array of the loss's shape and dtype.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `dice_core.loss` does, without computing anything, and for chunks of unknown size or that
        divide the channels. Out-of-range labels raise when their block is computed.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction).like(_NUMPY)
    request = term.spec(activation, ignore_label)
    volume = _Volume(x, y, request, backend, num_threads, check_labels)
    if term.weights:
        term.check(volume.call.shape[2])
    shape, dtype = term.shape(*volume.call.shape[1:]), volume.call.loss_dtype
    return _of(volume.statistics(), functools.partial(_loss, term, dtype), shape, dtype)


def statistics(
    x: Any,
    y: Any,
    *,
    ignore_label: int | None = -1,
    p: int = 1,
    gamma: float | None = None,
    nll: bool = False,
    binary_gamma: float | None = None,
    target_square: bool = False,
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = 1,
    check_labels: bool | None = None,
) -> Statistics:
    """The sums over voxels, with the arguments of `dice_core.statistics`; see `loss` for x, y and
    num_threads.

    Replaces `sum(dice_core.statistics(x[tile], y[tile]) for tile in tiles)`.

    Returns
    -------
    Statistics, of lazy arrays. `to_host()` computes them, as does a term when it is called with
    them.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss` does.
    """
    request = spec.checked(
        activation=activation,
        p=p,
        ignore_label=ignore_label,
        gamma=gamma,
        nll=nll,
        binary_gamma=binary_gamma,
        target_square=target_square,
    )
    return _Volume(x, y, request, backend, num_threads, check_labels).statistics()


def score(
    x: Any,
    y: Any,
    *,
    ignore_label: int | None = -1,
    pool: str = "none",
    activation: str = "softmax",
    backend: str | None = None,
    num_threads: int | None = 1,
    check_labels: bool | None = None,
) -> Score:
    """The Dice score and IoU of hard decisions, with the arguments of `dice_core.score`; see `loss`
    for x, y and num_threads.

    Replaces the naive code of `dice_core.score` on dask arrays.

    Returns
    -------
    Score, of lazy arrays. `dask.compute(*score)` computes both in one pass over the blocks, and
    `dask.compute(loss, *score)` a loss as well.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss` does.
    """
    checks.one_of(pool, "pool", ("none", "batch"))
    request = spec.decision(activation, ignore_label)
    volume = _Volume(x, y, request, backend, num_threads, check_labels)
    _, samples, classes = volume.call.shape
    shape = 2, 1 if pool == "batch" else samples, classes
    dice, iou = _of(volume.statistics(), functools.partial(_score, pool), shape, "float64")
    return Score(dice, iou)


def gradient(
    x: Any,
    y: Any,
    statistics: Statistics,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    smooth: float | tuple[float, float] = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
    num_threads: int | None = 1,
    grad_loss: Any = None,
) -> Lazy:
    """The gradient, with respect to x, of the loss of these statistics, with the arguments of
    `dice_core.gradient`; see `loss` for x, y and num_threads.

    Replaces the backward pass of the naive code, which keeps the probabilities of all of x.

    Parameters
    ----------
    statistics : Statistics
        Those of `statistics(x, y, ...)`, computed: `statistics(x, y, ...).to_host()`. In one graph
        with the gradient, dask would keep each block of x from its sums to its gradient, that is,
        all of x.

    Returns
    -------
    A lazy array with x's shape, chunks and dtype. Storing it, with `to_zarr` for example, computes
    or reads x's blocks a second time.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `loss` and `dice_core.gradient` do.
    """
    check_is_statistics(statistics)
    if isinstance(statistics.array, da.Array):
        raise TypeError("statistics must be computed, got lazy ones; pass statistics.to_host()")
    p = statistics.spec.p if term is None else 1
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction).like(_NUMPY)
    volume = _Volume(x, y, statistics.spec, backend, num_threads, None)
    call = volume.call
    call.check_statistics(statistics)
    term.check_statistics(statistics)
    grad_loss = call.checked_grad_loss(grad_loss, term.shape(*call.shape[1:]))
    _, derivative = call.evaluate(term, statistics)
    return volume.gradient(
        derivative if grad_loss is None else calls.cotangent(derivative, grad_loss)
    )


_NUMPY = np.empty(0)
_SUM, _SAMPLE, _CLASS = -1, -2, -3  # axes of the sums; those of x are 0, 1, 2, ...


class _Volume:
    """Checked logits and targets as dask arrays with the same chunks.

    - call: the same call on arrays without memory, which has checked the arguments.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        request: Spec,
        backend: str | None,
        num_threads: int | None,
        check_labels: bool | None,
    ) -> None:
        logits, targets = _without_memory(x, "x"), _without_memory(y, "y")
        # These are in host memory; a backend for blocks elsewhere is checked when it gets them.
        named = backend if isinstance(getattr(x, "_meta", x), np.ndarray) else None
        self.call = calls.call(logits, targets, request, named, num_threads, check_labels)
        self.options = self.call.spec, backend, num_threads, check_labels
        self.x = x if isinstance(x, da.Array) else _views(x, _automatic_chunks(x))
        if self.x.numblocks[1] > 1:
            raise ValueError(
                f"x has chunks {self.x.chunks[1]} along the channels, which a block must have all "
                f"of: x.rechunk({{1: -1}}) copies them together"
            )
        self.axes = tuple(range(x.ndim))
        self.axes_of_y = self.axes
        if not self.call.spec.soft_targets:
            y = y[:, 0] if y.ndim == x.ndim else y
            self.axes_of_y = (0, *self.axes[2:])
        chunks = tuple(self.x.chunks[axis] for axis in self.axes_of_y)
        self.y = y.rechunk(chunks) if isinstance(y, da.Array) else _views(y, chunks)

    def statistics(self) -> Statistics:
        """The lazy sums: those of the blocks, (K, n, C, 1, ...), added over the spatial axes."""
        sums, _, classes = self.call.shape
        spatial = self.axes[2:]
        array = da.blockwise(
            functools.partial(_sums, self.options),
            (_SUM, *self.axes),
            *(self.x, self.axes, self.y, self.axes_of_y),
            new_axes={_SUM: sums},
            adjust_chunks={1: classes, **dict.fromkeys(spatial, 1)},
            dtype=np.float64,
            meta=np.empty((0,) * (1 + len(self.axes))),
            token="dice_core-sums",
        )
        if spatial:
            array = da.reduction(
                array,
                chunk=_add,
                aggregate=_add,
                axis=tuple(1 + axis for axis in spatial),
                dtype=np.float64,
                split_every=SPLIT_EVERY,
                meta=np.empty((0, 0, 0)),
                name="dice_core-add",
            )
        return Statistics(array, self.call.spec, self.call.logits.dtype)

    def gradient(self, cotangent: Array) -> Lazy:
        """The lazy gradient for this cotangent of the sums, (K, N, C)."""
        cotangent = da.from_array(cotangent, chunks=(-1, self.x.chunks[0], -1))
        return da.blockwise(
            functools.partial(_gradient, self.options),
            self.axes,
            *(self.x, self.axes, self.y, self.axes_of_y, cotangent, (_SUM, 0, _CLASS)),
            concatenate=True,
            dtype=self.x.dtype,
            meta=self.x._meta,
            token="dice_core-gradient",
        )


def _without_memory(array: Any, name: str) -> Array:
    """A NumPy array of this shape and dtype that is one number, broadcast."""
    if not isinstance(array, (da.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a dask array or a NumPy array, got {type(array).__name__}; "
            f"dask.array.from_array and from_zarr make dask arrays"
        )
    if any(math.isnan(size) for size in array.shape):
        raise ValueError(
            f"{name} has chunks of unknown size; {name}.compute_chunk_sizes() computes them"
        )
    if isinstance(array, np.ma.MaskedArray):
        return array  # which the call refuses
    return np.broadcast_to(np.empty((), array.dtype), array.shape)


def _automatic_chunks(x: Array) -> tuple[tuple[int, ...], ...]:
    """Chunks of the size that dask is configured to use, with all channels."""
    chunks = tuple(-1 if axis == 1 else "auto" for axis in range(x.ndim))
    return da.core.normalize_chunks(chunks, x.shape, dtype=x.dtype)


def _views(array: Array, chunks: tuple[tuple[int, ...], ...]) -> Lazy:
    """A dask array whose blocks are views of this array."""
    name = f"dice_core-views-{uuid.uuid4().hex}"
    keys = itertools.product([name], *(range(len(sizes)) for sizes in chunks))
    blocks = (array[where] for where in da.core.slices_from_chunks(chunks))
    return da.Array(dict(zip(keys, blocks, strict=True)), name, chunks, meta=array[:0])


def _of(total: Statistics, function: Callable[..., Any], shape: Any, dtype: str) -> Lazy:
    """The lazy array of this shape that the function computes from the sums of all samples."""
    axes = tuple(range(len(shape)))
    return da.blockwise(
        functools.partial(_evaluate, function, total.spec, total.dtype),
        axes,
        *(total.array, (_SUM, _SAMPLE, _CLASS)),
        new_axes=dict(zip(axes, shape, strict=True)),
        concatenate=True,
        dtype=dtype,
        meta=np.empty((0,) * len(shape), dtype),
        token="dice_core-of-sums",
    )


# ---- tasks: they are pickled, so they are functions of the module --------------------------------


def _sums(options: tuple[Any, ...], x: Array, y: Array) -> Array:
    x, y = _uniform(x), _uniform(y)
    with _errors_of_block(x):
        array = calls.call(x, y, *options).statistics().to_host().array
    return array.reshape(*array.shape, *(1 for _ in x.shape[2:]))


def _gradient(options: tuple[Any, ...], x: Array, y: Array, cotangent: Array) -> Array:
    x, y = _uniform(x), _uniform(y)
    with _errors_of_block(x):
        call = calls.call(x, y, *options)
        grad, out = call.gradient_buffer(x, None)
        call.gradient(call.from_host(cotangent), None, grad)
    return out


def _uniform(block: Array) -> Array:
    """The block in C order. The order in which its voxels are added depends on its strides, and
    those on the scheduler: a view of an array loses them, and its alignment, when it is sent to
    another process.
    """
    if isinstance(block, np.ndarray):
        return np.require(block, requirements=["C", "ALIGNED"])
    return block


@contextlib.contextmanager
def _errors_of_block(x: Array) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"in a block of x of shape {x.shape}: {error}") from None


def _add(array: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    with allocators.quiet(array):
        return array.sum(axis=axis, keepdims=keepdims)


def _evaluate(function: Callable[..., Any], request: Spec, dtype: str, array: Array) -> Array:
    return function(Statistics(array, request, dtype))


def _loss(term: Term, dtype: str, total: Statistics) -> Array:
    value = term(total)
    with allocators.quiet(value):
        return np.asarray(value, dtype)[()]


def _score(pool: str, counts: Statistics) -> Array:
    return np.stack(api.score_of(counts, pool))
