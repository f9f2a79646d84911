"""What tests/test_jax.py does with JAX: each function here runs in a process of its own.

``python tests/jax_scenarios.py transforms`` runs one by hand.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__" and sys.argv[1] == "one_core":  # before JAX starts its threads
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
from compare import assert_bitwise_equal

import dice_core
import dice_core.jax
from dice_core import buffers, calls, losses
from dice_core.losses import CrossEntropy, Dice, Focal, SigmoidFocal, Term, Tversky

Array = Any
loss = dice_core.jax.loss
grad = jax.value_and_grad(loss)

TERMS: list[Term] = [
    *(entry.term() for entry in losses.TERMS),
    Dice(smooth=1) + 0.5 * CrossEntropy(),
    Dice(weight=[1, 2, 3], p=2, ignore_channel=0) + Focal(weight=[1, 2, 3]),
    Dice(smooth=1) + SigmoidFocal(alpha=0.3),
    Tversky(reduction="none") + CrossEntropy(pool="none", reduction="none"),
    Dice(reduction="classes", smooth=1),
]
OPTIONS: list[dict[str, Any]] = [
    *({"reduction": name} for name in ("mean", "sum", "none", "classes", "batch")),
    {"weight": [1, 0.5, 2], "ignore_channel": [0, 1], "ignore_label": 2, "smooth": (1, 2), "p": 3},
    {"ignore_label": None, "backend": "reference"},
    {"activation": "sigmoid"},
    {"activation": "none", "num_threads": 1},
]


def volume(*batch: int, dtype: Any = "float32", channels: int = 3) -> tuple[Array, Array]:
    """Logits and labels of two samples, after the axes of a batch."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*batch, 2, channels, 8, 9)).astype(dtype)
    return x, rng.integers(0, max(2, channels), (*batch, 2, 8, 9)).astype(np.uint8)


def soft(x: Array) -> Array:
    return np.random.default_rng(1).random(x.shape, np.float32)


def compare(x: Array, y: Array, *term: Term, **options: Any) -> None:
    """Asserts the bits of NumPy's face for the loss, and its gradient for some incoming one."""
    expected = dice_core.loss(x, y, *term, **options)
    upstream = np.random.default_rng(2).standard_normal(expected.shape).astype(expected.dtype)
    _, of_x = dice_core.loss_and_grad(x, y, *term, grad_loss=upstream, **options)
    value, pullback = jax.vjp(lambda x: loss(x, y, *term, **options), x)
    assert isinstance(value, jax.Array)
    assert_bitwise_equal(value, expected)
    assert_bitwise_equal(pullback(jnp.asarray(upstream))[0], of_x)
    assert_bitwise_equal(loss(x, y, *term, **options), expected)


# ---- values ------------------------------------------------------------------------------------


def terms() -> None:
    x, y = volume()
    for term in TERMS:
        compare(x, y, term)


def options() -> None:
    x, y = volume()
    for each in OPTIONS:
        compare(x, soft(x) if "activation" in each else y, **each)
    compare(x, soft(x), Dice(target_square=True) + CrossEntropy())
    compare(x, np.where(y == 1, 255, y), ignore_label=255)
    compare(x, y[:, None])
    compare(*volume(channels=1))
    compare(x[:0], y[:0])
    compare(x[:, :, :0], y[:, :0])


def dtypes() -> None:
    labels = ("bool", "int8", "uint16", "int16", "uint32", "int32")
    for dtype in ("float16", jnp.bfloat16, "float32"):
        x, y = volume(dtype=dtype, channels=2)
        compare(x, y)
        compare(x, soft(x).astype(dtype))
    for of_labels in labels:
        compare(x, y.astype(of_labels))
    jax.config.update("jax_enable_x64", True)
    x, y = volume(dtype="float64")
    for of_labels in ("int64", "uint64"):
        compare(x, y.astype(of_labels))
    for term in TERMS:
        compare(x, soft(x), term)
    jax.config.update("jax_enable_x64", False)


def derivative_in_float64() -> None:
    """The derivative between forward and backward is not rounded to float32."""
    x, y = volume()
    term = Dice(smooth=1e-5) + CrossEntropy()
    _, expected = dice_core.loss_and_grad(x, y, term)
    call = calls.call(x, y, term.spec("softmax", -1))
    rounded = call.value_and_derivative(term)[1].astype(np.float32).astype(np.float64)
    other = np.empty_like(x)
    call.gradient(rounded, None, buffers.of(other, "grad"))
    assert (other != expected).any()  # that would be seen
    assert_bitwise_equal(grad(x, y, term)[1], expected)


def half_precision_scale() -> None:
    """An incoming gradient is folded in before the gradient is rounded to half precision."""
    x, y = volume(dtype="float16")
    x = x * 6
    scale = np.float32(2**16)
    _, expected = dice_core.loss_and_grad(x, y, grad_loss=scale)
    assert_bitwise_equal(jax.grad(lambda x: scale * loss(x, y))(x), expected)
    _, unscaled = dice_core.loss_and_grad(x, y)
    assert (scale * unscaled.astype(np.float32) != expected).any()


def threads() -> None:
    """Bitwise reproducible for any number of threads, and from several Python threads at once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 2, 64, 64, 64), np.float32))
    y = jnp.asarray(rng.integers(0, 2, (2, 64, 64, 64), np.uint8))
    value, of_x = dice_core.loss_and_grad(np.asarray(x), np.asarray(y))
    found: list[Array] = []

    def call(num_threads: int | None) -> None:
        found.append(grad(x, y, num_threads=num_threads))

    callers = [threading.Thread(target=call, args=(count,)) for count in (None, 1, 2, 3, 2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == len(callers)
    for each in found:
        assert_bitwise_equal(each[0], value)
        assert_bitwise_equal(each[1], of_x)


# ---- transformations -----------------------------------------------------------------------------


def transforms() -> None:
    x, y = volume()
    value, of_x = dice_core.loss_and_grad(x, y)

    def check(found: tuple[Array, Array], value: Array = value, of_x: Array = of_x) -> None:
        assert_bitwise_equal(found[0], value)
        assert_bitwise_equal(found[1], of_x)

    check(jax.jit(grad)(x, y))
    check(jax.value_and_grad(jax.jit(loss))(x, y))
    check(jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(x, y))
    aux = jax.grad(lambda x: (x.sum(), loss(x, y)), has_aux=True)(x)
    check((aux[1], aux[0]), of_x=np.ones_like(x))
    rows = jax.jacrev(lambda x: loss(x, y, reduction="classes"))(x)
    assert rows.shape == (2, 3, *x.shape)
    one = np.zeros((2, 3), np.float32)
    one[1, 2] = 1
    _, row = dice_core.loss_and_grad(x, y, reduction="classes", grad_loss=one)
    assert_bitwise_equal(rows[1, 2], row)

    # the chain rule through a network before the loss and arithmetic after it
    found = jax.jit(jax.grad(lambda w: 3 * loss(w * x, y) ** 2))(jnp.float32(1))
    assert np.isclose(found, 6 * value * (of_x * x).sum(), rtol=1e-4)
    assert (jax.jit(lambda x: loss(x, y) + loss(2 * x, y))(x)) > 0


def vmap() -> None:
    x, y = volume(4)
    each = [dice_core.loss_and_grad(*pair) for pair in zip(x, y, strict=True)]
    values, of_x = map(np.stack, zip(*each, strict=True))
    for function in (jax.vmap(grad), jax.jit(jax.vmap(grad))):
        found = function(x, y)
        assert_bitwise_equal(found[0], values)
        assert_bitwise_equal(found[1], of_x)
    found = jax.grad(lambda x: jax.vmap(loss)(x, y).sum())(x)
    assert_bitwise_equal(found, of_x)
    moved = np.moveaxis(x, 0, -1)
    assert_bitwise_equal(jax.vmap(loss, (-1, 0))(moved, y), values)

    # logits or labels that are not mapped
    for axes, pairs in (
        ((0, None), [(a, y[0]) for a in x]),
        ((None, 0), [(x[0], b) for b in y]),
    ):
        arguments = (x, y[0]) if axes[0] == 0 else (x[0], y)
        found = jax.vmap(grad, axes)(*arguments)
        for i, pair in enumerate(pairs):
            value, row = dice_core.loss_and_grad(*pair)
            assert_bitwise_equal(found[0][i], value)
            assert_bitwise_equal(found[1][i], row)

    # two axes, and a loss that is not a number
    found = jax.vmap(jax.vmap(lambda a, b: loss(a[None], b[None], reduction="classes")))(x, y)
    assert found.shape == (4, 2, 1, 3)
    expected = dice_core.loss(x[3, 1:], y[3, 1:], reduction="classes")
    assert_bitwise_equal(found[3, 1], expected)


def scan() -> None:
    x, y = map(jnp.asarray, volume(5))

    def step(total: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        value, of_x = grad(*pair)
        return total + value, of_x

    total, of_x = jax.jit(lambda: jax.lax.scan(step, jnp.float32(0), (x, y)))()
    expected = [dice_core.loss_and_grad(*pair) for pair in zip(*volume(5), strict=True)]
    assert_bitwise_equal(of_x, np.stack([row for _, row in expected]))
    assert np.isclose(total, sum(value for value, _ in expected))

    def summed(x: Array) -> Array:
        return jax.lax.scan(lambda s, pair: (s + loss(*pair), None), jnp.float32(0), (x, y))[0]

    assert_bitwise_equal(jax.jit(jax.grad(summed))(x), of_x)


def sharded() -> None:
    """Arrays that lie on several devices: the loss is that of the whole batch."""
    assert jax.device_count() == 2
    x, y = volume()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "n")
    samples = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n"))
    found = jax.jit(grad)(jax.device_put(x, samples), jax.device_put(y, samples))
    value, of_x = dice_core.loss_and_grad(x, y)
    assert_bitwise_equal(found[0], value)
    assert_bitwise_equal(found[1], of_x)


# ---- refusals ------------------------------------------------------------------------------------


def message(error: Any, function: Callable[[], Any]) -> str:
    """The text of the error, or one of several, that the function must raise."""
    try:
        jax.block_until_ready(function())
    except error as caught:
        return str(caught)
    raise AssertionError("nothing was raised")


def refusals() -> None:
    arrays = volume()
    x, y = map(jnp.asarray, arrays)
    of_x = jax.grad(loss)
    twice = "dice_core computes first derivatives only and cannot be differentiated twice"
    for function in (
        lambda: jax.hessian(loss)(x, y),
        lambda: jax.grad(lambda x: of_x(x, y).sum())(x),
        lambda: jax.jit(jax.grad(lambda x: jax.jit(of_x)(x, y).sum()))(x),
        lambda: jax.jvp(lambda x: of_x(x, y), (x,), (x,)),
        lambda: jax.vmap(jax.grad(lambda x: of_x(x, y).sum()))(x[None]),
    ):
        assert message(NotImplementedError, function) == twice
    for function in (
        lambda: jax.jvp(lambda x: loss(x, y), (x,), (x,)),
        lambda: jax.jacfwd(loss)(x, y),
    ):
        assert "forward-mode" in message(TypeError, function)

    targets = jax.nn.softmax(x, 1)
    for function in (
        lambda: jax.grad(loss, 1)(x, targets),
        lambda: jax.grad(jax.jit(loss), (0, 1))(x, targets),
        lambda: jax.grad(lambda x: loss(x, jax.nn.softmax(x, 1)))(x),
    ):
        assert "pass jax.lax.stop_gradient(y)" in message(NotImplementedError, function)
    stopped = jax.grad(lambda x: loss(x, jax.lax.stop_gradient(targets * x**0)))(x)
    assert_bitwise_equal(stopped, dice_core.loss_and_grad(arrays[0], np.asarray(targets))[1])
    assert jax.grad(loss, (0, 1), allow_int=True)(x, y)[1].dtype == jax.dtypes.float0

    for function, text in (
        (lambda: loss(x, np.ma.masked_array(arrays[1])), "y is a masked array"),
        (lambda: loss([1.0], y), "x must be a JAX or NumPy array, got list"),
        (lambda: loss(x, arrays[1].tolist()), "y must be a JAX or NumPy array, got list"),
        (lambda: loss(x, y * 1.0), "y must hold integer or bool class labels, got float32"),
        (lambda: loss(y, y[:, 0]), "x must hold floating-point logits"),
        (lambda: loss(x, y, Dice), "term must be a loss"),  # type: ignore[arg-type]
        (lambda: loss(x, y, Dice(), p=2), "p cannot be combined with term="),
        (lambda: jax.grad(lambda w: loss(x, y, weight=w))(jnp.ones(3)), "weight must be numbers"),
        (lambda: jax.grad(lambda s: loss(x, y, smooth=s))(1.0), "smooth must be a number"),
        (lambda: loss(x, y, num_threads=True), "num_threads must be an integer, got bool"),
    ):
        for call in (function, jax.jit(function)):
            assert text in message(TypeError, call)
    for function, text in (
        (lambda: loss(x, y[:, 1:]), "y must have shape (2, 8, 9) or (2, 1, 8, 9) for x of shape"),
        (lambda: loss(x, y, weight=[1, 2]), "weight must have 3 entries, one per class"),
        (lambda: loss(x, y, Dice(weight=[1, 2])), "weight must have 3 entries, one per class"),
        (lambda: loss(x, y, reduction="all"), "reduction must be one of"),
        (lambda: jax.vmap(loss)(x, y), "y must have shape (3, 9) or (3, 1, 9) for x of shape"),
    ):
        for call in (function, jax.jit(function)):
            assert text in message(ValueError, call)
    assert "backend=cuda does not" in message(
        dice_core.BackendError, lambda: loss(x, y, backend="cuda")
    )


def labels_out_of_range() -> None:
    """The error has the text of dice_core.loss, whenever it is raised, and calls go on after it."""
    arrays = volume(2)
    x, y = map(jnp.asarray, arrays)
    wrong = y.at[1, 0, 2, 3].set(7)
    text = "y has 1 label outside [0, 3) (-1 is ignored); the first is 7 at (0, 2, 3)"
    for function in (
        lambda: loss(x[1], wrong[1]),
        lambda: jax.jit(loss)(x[1], wrong[1]),
        lambda: grad(x[1], wrong[1]),
        lambda: jax.jit(grad)(x[1], wrong[1]),
        lambda: jax.vmap(grad)(x, wrong),
        lambda: jax.lax.scan(lambda _, pair: (None, loss(*pair)), None, (x, wrong)),
    ):
        assert text in message((ValueError, jax.errors.JaxRuntimeError), function)
        assert_bitwise_equal(loss(x[0], wrong[0]), dice_core.loss(arrays[0][0], arrays[1][0]))


def device_buffers() -> None:
    """Arrays on a GPU, which this imitates, are refused rather than copied."""

    class OnGPU:
        def __dlpack_device__(self) -> tuple[int, int]:
            return buffers.CUDA, 0

    assert "x and y are on a GPU" in message(
        NotImplementedError, lambda: dice_core.jax._view(OnGPU())
    )


# ---- time and memory -----------------------------------------------------------------------------


def one_core() -> None:
    """Many calls on one core that are in flight at once, on arrays of any size."""
    assert len(os.sched_getaffinity(0)) == 1
    step = jax.jit(lambda x, y: x - grad(x, y)[1] * grad(2 * x, y)[0])
    for side in (4, 128):
        x = jnp.ones((2, 4, side, side, 8))
        y = jnp.zeros((2, side, side, 8), jnp.uint8)
        results = [step(x + i, y) for i in range(8)]
        results += [grad(x + i, y)[1] for i in range(8)]
        jax.block_until_ready(results)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What JAX says about each compilation."""
    found: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("jax")
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    with jax.log_compiles():
        yield found
    logger.removeHandler(handler)


def compiled_once() -> None:
    """Calls outside jit with equal options compile once."""
    x, y = map(jnp.asarray, volume())
    term = Dice(weight=[1, 2, 3]) + CrossEntropy()
    options: list[dict[str, Any]] = [{}, {"weight": [1, 2, 3]}, {"term": term}]
    for each in options:
        grad(x, y, **each)
        with compilations() as found:
            grad(x, y, **each)
        assert not found
    with compilations() as found:
        other = loss(x, y, weight=[1, 2, 4])
    assert found
    assert_bitwise_equal(other, dice_core.loss(*volume(), weight=[1, 2, 4]))


def memory() -> None:
    """A step grows the process by one gradient."""

    def status(name: str) -> int:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    def growth(function: Callable[..., Any], *arrays: Array) -> float:
        compiled = jax.jit(function).lower(*arrays).compile()
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # the peak starts again from the present
        before = status("VmRSS")
        jax.block_until_ready(compiled(*arrays))
        return (status("VmHWM") - before) / arrays[0].nbytes

    x, y = volume()
    jax.block_until_ready(jax.jit(grad)(x, y))  # threads and imports
    for batch in ((), (2,)):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((*batch, 1, 4, 128, 128, 128), np.float32))
        y = jnp.zeros((*batch, 1, 128, 128, 128), jnp.uint8)
        jax.block_until_ready((x, y))
        of_loss, of_grad = (jax.vmap(f) if batch else f for f in (loss, grad))
        found = growth(of_loss, x, y), growth(of_grad, x, y)
        print(f"{found[0]:.3f} and {found[1]:.3f} times the logits")
        assert found[0] < 0.05
        assert 0.9 < found[1] < 1.05


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
