"""The losses with JAX's reverse-mode derivatives, computed on the CPU.

A loss is a `jax.custom_vjp` around two callbacks, which read and write XLA's buffers in place. The
first computes the loss and its derivative with respect to the sums over voxels, the second the
gradient. Neither calls JAX: a callback that waits for the runtime that waits for it would hang.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import jax
    from jax.custom_derivatives import SymbolicZero
    from jax.experimental.buffer_callback import buffer_callback
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] not in ("jax", "jaxlib"):
        raise
    raise ModuleNotFoundError(
        'dice_core.jax needs JAX 0.6.2 or later: pip install "dice_core[jax]"', name="jax"
    ) from None

from . import buffers, calls, checks, losses
from .losses import Term
from .spec import Spec

__all__ = ["loss"]

Array = Any  # a JAX array or a tracer, a NumPy array, a buffer of XLA


def loss(
    x: Array,
    y: Array,
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
    num_threads: int | None = None,
) -> jax.Array:
    """`dice_core.loss` on JAX arrays, for `jax.grad`, `jit`, `vmap`, `lax.scan` and `checkpoint`:
    the same arguments, formula and errors.

    Replaces, without allocating anything of x's size but the gradient::

        s, t = jax.nn.softmax(x, 1), jnp.moveaxis(jax.nn.one_hot(y, C), -1, 1)
        i, p, t = (s * t).sum(spatial), s.sum(spatial), t.sum(spatial)
        loss = (1 - (2 * i + smooth) / (p + t + smooth)).mean()

    Parameters
    ----------
    x : array (N, C, d1, d2, ...)
        Logits in host memory, float16, bfloat16, float32 or float64. The gradient has their dtype.
    y : array (N, d1, d2, ...) or (N, 1, d1, d2, ...), or like x
        Class labels, any integer dtype or bool; or soft targets. They are not differentiated. JAX
        makes 32-bit numbers of NumPy's 64-bit ones unless `jax_enable_x64` is set.
    term : a loss of `dice_core.losses`, optional
        Outside `jit` each new object is compiled anew: create it once.

    Under `vmap` all samples share one callback, and what is not mapped is not copied.

    Returns
    -------
    Array () for reduction "mean", "sum" and "batch", (N,) for "none", (N, C) for "classes"; float64
    for float64 logits, otherwise float32.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `dice_core.loss` does, while JAX traces the call; TypeError, from JAX, for `jax.jvp` and
        `jacfwd`.
    jax.errors.JaxRuntimeError
        (Outside `jit` JAX may raise ValueError instead.) For labels outside [0, C), with the text
        of `dice_core.loss` at the end, and for arrays on a GPU, which would have to be copied; when
        the loss is computed, which may be after the call returned.
    NotImplementedError
        In a second derivative, and for a y that is differentiated.
    """
    from_options = term is None
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction)
    # Each call makes a new Dice of its options; equal text is an equal loss.
    identity = repr(term) if from_options else term
    term = term.like(np.empty(0))
    x, y = _array(x, "x"), _array(y, "y")
    request = term.spec(activation, ignore_label)
    call = calls.call(_without_memory(x), _without_memory(y), request, backend, num_threads)
    sums, samples, classes = call.shape
    term.check(classes)
    value = jax.ShapeDtypeStruct(term.shape(samples, classes), call.loss_dtype)
    # float64 as pairs of uint32, since JAX has no float64 by default
    derivative = jax.ShapeDtypeStruct((sums, samples, 2 * classes), "uint32")
    results = value, derivative
    return _loss(_Evaluation(term, identity, request, backend, call.num_threads, results), x, y)


def _array(array: Any, name: str) -> jax.Array:
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a JAX or NumPy array, got {type(array).__name__}; "
            f"dice_core.loss takes other arrays"
        )
    checks.no_mask(array, name)
    return jax.numpy.asarray(array)


def _without_memory(array: jax.Array) -> np.ndarray[Any, Any]:
    """An array of this shape and dtype, for the checks of a call."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


@dataclass(frozen=True)
class _Evaluation:
    """A loss and the options of its computation. JAX compiles equal ones once."""

    term: Term = field(compare=False)
    identity: Any
    spec: Spec
    backend: str | None
    num_threads: int
    results: tuple[jax.ShapeDtypeStruct, ...]  # the loss, its derivative

    def call(self, x: Array, y: Array) -> calls.Call:
        """The call for NumPy arrays."""
        return calls.call(x, y, self.spec, self.backend, self.num_threads)


@dataclass(frozen=True)
class _Forward:
    """The callback that computes a loss and its derivative with respect to the sums."""

    evaluation: _Evaluation

    def __call__(self, _: Any, out: list[Array], x: Array, y: Array) -> None:
        value, derivative = map(_view, out)
        derivative = derivative.view(np.float64)
        axes = value.ndim - len(self.evaluation.results[0].shape)
        for i, *arrays in _mapped(value.shape[:axes], _view(x), _view(y)):
            call = self.evaluation.call(*arrays)
            value[i], derivative[i] = call.value_and_derivative(self.evaluation.term)


@dataclass(frozen=True)
class _Backward:
    """The callback that fills the gradient of a loss with this derivative."""

    evaluation: _Evaluation
    axes: int  # of x

    def __call__(self, _: Any, out: list[Array], *arrays: Array) -> None:
        (grad,) = map(_view, out)
        batch = grad.shape[: grad.ndim - self.axes]
        for i, x, y, derivative, grad_loss in _mapped(batch, *map(_view, arrays)):
            call = self.evaluation.call(x, y)
            call.gradient(derivative.view(np.float64), grad_loss, buffers.of(grad[i], "grad"))


def _view(buffer: Array) -> np.ndarray[Any, Any]:
    """A NumPy view of a buffer of XLA."""
    if buffer.__dlpack_device__()[0] != buffers.HOST:
        raise NotImplementedError(
            "dice_core.jax computes on the CPU, but x and y are on a GPU: move them to the host, "
            "jax.device_put(x, jax.devices('cpu')[0])"
        )
    return np.asarray(buffer)


def _mapped(batch: tuple[int, ...], *arrays: Array) -> Iterator[tuple[Any, ...]]:
    """Index and elements of arrays with these axes of `vmap`, which are 1 where not mapped."""
    axes = len(batch)
    arrays = tuple(np.broadcast_to(each, batch + each.shape[axes:]) for each in arrays)
    for i in np.ndindex(batch):
        yield i, *(each[i] for each in arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _run(callback: Any, results: tuple[jax.ShapeDtypeStruct, ...], *arrays: jax.Array) -> Any:
    return buffer_callback(callback, list(results), vmap_method="expand_dims")(*arrays)


@_run.defjvp
def _no_second_derivative(callback: Any, results: Any, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "dice_core computes first derivatives only and cannot be differentiated twice"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(evaluation: _Evaluation, x: jax.Array, y: jax.Array) -> Any:
    return _run(_Forward(evaluation), evaluation.results, x, y)[0]


def _forward(evaluation: _Evaluation, x: Any, y: Any) -> Any:
    if y.perturbed:
        raise NotImplementedError(
            "y is differentiated, but dice_core computes no gradient for targets: pass "
            "jax.lax.stop_gradient(y)"
        )
    value, derivative = _run(_Forward(evaluation), evaluation.results, x.value, y.value)
    return value, (x.value, y.value, derivative)


def _backward(evaluation: _Evaluation, kept: Any, grad_loss: Any) -> Any:
    x, y, derivative = kept
    if isinstance(grad_loss, SymbolicZero):
        return jax.numpy.zeros_like(x), None
    result = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    (grad,) = _run(_Backward(evaluation, x.ndim), result, x, y, derivative, grad_loss)
    return grad, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)
