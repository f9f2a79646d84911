"""A call bound to its backend: checked arrays, the sums to compute, and the kernels for it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np

from . import allocators, backends, buffers, checks, threads
from .buffers import Buffer
from .spec import TARGET_SQUARE, Signature, Spec, signature
from .sums import Statistics

CHECK = "DICE_CORE_CHECK"

Array = Any  # NumPy, torch, CuPy, ...


def call(
    x: Array,
    y: Array,
    spec: Spec,
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Call:
    """Binds logits x, targets y and the sums `spec` to a backend that supports them.

    Raises TypeError or ValueError for invalid arguments, BackendError if no backend supports them.
    """
    if check_labels is not None:
        checks.flag(check_labels, "check_labels")
    logits, labels = buffers.of(x, "x"), buffers.of(y, "y")
    sig = signature(logits.layout, labels.layout, spec)
    if labels.layout is not sig.labels:
        labels = replace(labels, layout=sig.labels)
    kind = HostCall if sig.logits.device == "cpu" else DeviceCall
    kernels = backends.select(sig, backend)
    return kind(logits, labels, sig, kernels, threads.resolve(num_threads), check_labels)


class Call:
    """Logits and targets, the sums to compute, and the kernels that compute them.

    A `term` is a loss of the sums, a `dice_core.losses.Term`. Values of losses and incoming
    gradients are float64 for float64 logits, else float32.
    """

    needs_derivative = True  # whether kernels compute a ratio only together with its derivative

    def __init__(
        self,
        logits: Buffer,
        labels: Buffer,
        sig: Signature,
        kernels: Any,
        num_threads: int,
        check_labels: bool | None,
    ) -> None:
        self.logits = logits
        self.labels = labels
        self.spec = sig.spec
        self.shape = sig.sums_shape  # (K, N, C) of the sums
        self.loss_dtype = sig.loss_dtype
        self.kernels = kernels
        self.num_threads = num_threads
        self.check_labels = check_labels

    def statistics(self) -> Statistics:
        """The sums. Raises ValueError for out-of-range targets. On a device they make the sums of
        their sample NaN instead, unless `check_labels` (None: DICE_CORE_CHECK) requests the check.
        """
        sums = self._empty(self.shape, "float64")
        at = buffers.of(sums, "sums")
        found = self.kernels.statistics(self.logits, self.labels, at, self.spec, self.num_threads)
        self._check(found, at)
        return Statistics(sums, self.spec, self.logits.layout.dtype)

    def value(self, term: Any) -> Array:
        """The loss."""
        if term.has_derivative:
            return self.value_and_derivative(term, self.needs_derivative)[0]
        sums = self.statistics().to_host()
        with allocators.quiet(sums.array):
            return self.from_host(np.asarray(term.value(sums), self.loss_dtype))

    def value_and_derivative(self, term: Any, needed: bool = True) -> tuple[Array, Array]:
        """The loss, and its derivative with respect to the sums, (K, N, C): computed by the kernels
        if the term is a ratio of the usual sums, otherwise by the term. It may be None unless it
        is needed.
        """
        _, samples, classes = self.shape
        ratio = None if TARGET_SQUARE in self.spec.fields else term.ratio(samples, classes)
        if ratio is None or not hasattr(self.kernels, "loss"):
            return self.evaluate(term, self.statistics())
        value = self._empty(term.shape(samples, classes), self.loss_dtype)
        derivative: Array = None
        at = weight = None
        if needed:
            derivative = self._empty(self.shape, "float64")
            at = buffers.of(derivative, "derivative")
        if term.weights:
            weight = buffers.of(self._weight(term.weights[0]), "weight")
        found = self.kernels.loss(
            self.logits,
            self.labels,
            buffers.of(value, "loss"),
            at,
            self.spec,
            ratio,
            weight,
            self.num_threads,
        )
        self._check(found, at)
        return value, derivative

    def check_statistics(self, statistics: Statistics) -> None:
        """Raises ValueError unless these may include the sums of this call's arrays."""
        expected = tuple(statistics.array.shape), statistics.spec, statistics.dtype
        actual = self.shape, self.spec, self.logits.dtype
        if actual != expected:
            raise ValueError(
                f"x and y do not match these statistics: (K, N, C), sums and dtype are "
                f"{', '.join(map(str, actual))}, not {', '.join(map(str, expected))}"
            )

    def evaluate(self, term: Any, sums: Statistics) -> tuple[Array, Array]:
        """The loss of these sums and its derivative, computed by the term in host memory."""
        sums = sums.to_host()
        with allocators.quiet(sums.array):
            value, derivative = term.with_derivative(sums)
            value = np.asarray(value, self.loss_dtype)
        return self.from_host(value), self.from_host(derivative)

    def gradient(self, derivative: Array, grad_loss: Array | None, grad: Buffer) -> None:
        """Fills grad with the gradient with respect to the logits of a loss with this derivative,
        times the incoming gradient, which has the loss's shape; None means ones.
        """
        raise NotImplementedError

    def checked_grad_loss(self, grad_loss: Any, shape: tuple[int, ...]) -> Array | None:
        """The incoming gradient of a loss of this shape, as `gradient` takes it."""
        raise NotImplementedError

    def gradient_buffer(self, x: Array, out: Any) -> tuple[Buffer, Array]:
        """The Buffer for the gradient, and its array: `out`, or a new one like x."""
        if out is None:
            out = allocators.empty_like(x, "x")
            return buffers.of(out, "out"), out
        checks.no_gradient(out, "out")
        grad = buffers.of(out, "out")
        checks.out(grad, self.logits, self.labels)
        allocators.mark_changed(out)
        return grad, out

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new array in the memory of the sums and losses."""
        raise NotImplementedError

    def _weight(self, weight: Array) -> Array:
        """(C,) class weights in that memory, in float64."""
        raise NotImplementedError

    def from_host(self, numbers: Array) -> Array:
        """A NumPy array in that memory."""
        raise NotImplementedError

    def _check(self, found: int, sums: Buffer | None) -> None:
        """Raises ValueError for out-of-range targets; `found` is a kernel's count."""
        raise NotImplementedError

    def _raise_for_targets(self, found: int = 0) -> None:
        checks.targets(self.labels, self.spec, self.shape[2], found)


class HostCall(Call):
    """A call on host memory: sums, losses and derivatives are NumPy arrays."""

    needs_derivative = False

    def gradient(self, derivative: Array, grad_loss: Array | None, grad: Buffer) -> None:
        if grad_loss is not None and not (grad_loss.ndim == 0 and grad_loss == 1):
            derivative = cotangent(derivative, grad_loss)
        at = buffers.of(np.ascontiguousarray(derivative), "cotangent")
        found = self.kernels.gradient(
            self.logits, self.labels, at, grad, self.spec, self.num_threads
        )
        self._check(found, at)

    def checked_grad_loss(self, grad_loss: Any, shape: tuple[int, ...]) -> Array | None:
        return None if grad_loss is None else checks.grad_loss(grad_loss, shape)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, dtype)

    def _weight(self, weight: Array) -> Array:
        return np.ascontiguousarray(weight)

    def from_host(self, numbers: Array) -> Array:
        return numbers

    def _check(self, found: int, sums: Buffer | None) -> None:
        if found:
            self._raise_for_targets(found)


class DeviceCall(Call):
    """A call on device memory: sums, losses and derivatives are arrays of the caller's library on
    that device.

    Only the check of labels, and terms that are not a plain ratio of sums, synchronize.
    """

    def gradient(self, derivative: Array, grad_loss: Array | None, grad: Buffer) -> None:
        scale = None
        if grad_loss is not None and len(grad_loss.shape) == 2:  # one per sample and class
            each = allocators.to_host(buffers.of(grad_loss, "grad_loss"))
            derivative = allocators.to_host(buffers.of(derivative, "derivative"))
            derivative = allocators.from_host(cotangent(derivative, each), self.logits)
        elif grad_loss is not None:
            scale = buffers.of(grad_loss, "grad_loss")
        at = buffers.of(derivative, "cotangent")
        self.kernels.gradient(
            self.logits, self.labels, at, grad, self.spec, self.num_threads, scale
        )
        self._wait()

    def checked_grad_loss(self, grad_loss: Any, shape: tuple[int, ...]) -> Array | None:
        if grad_loss is None:
            return None
        if allocators.is_on_host(grad_loss):
            numbers = checks.grad_loss(grad_loss, shape, self.loss_dtype)
            return allocators.from_host(numbers, self.logits)
        at = buffers.of(grad_loss, "grad_loss")
        checks.device_grad_loss(at, shape, self.loss_dtype, self.logits.device)
        return grad_loss

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return allocators.empty(self.logits, shape, dtype)

    def _weight(self, weight: Array) -> Array:
        return allocators.on_device(weight, self.logits)

    def from_host(self, numbers: Array) -> Array:
        return allocators.from_host(numbers, self.logits)

    def _check(self, found: int, sums: Any) -> None:
        """Checks the labels if requested and some sum is NaN, then waits if necessary."""
        check = self.check_labels
        if check is None:
            check = os.environ.get(CHECK, "0") not in ("", "0")
        if check and np.isnan(allocators.to_host(sums)).any():
            self._raise_for_targets()
        self._wait()

    def _wait(self) -> None:
        """Synchronizes if the arrays' library does not order its work after the kernels."""
        if not allocators.is_ordered(self.logits):
            self.kernels.wait(self.logits)


def cotangent(derivative: Array, grad_loss: Array) -> Array:
    """The cotangent of the sums, (K, N, C): a loss's derivative times the incoming gradient, of the
    loss's shape (), (N,) or (N, C).
    """
    with allocators.quiet(derivative):
        return derivative * (grad_loss if grad_loss.ndim == 2 else grad_loss[..., None])
