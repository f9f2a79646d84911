"""The functions on arrays."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from compare import assert_bitwise_equal

import dice_core
from dice_core import losses

from .arrays import array_of, nan_alike
from .cases import Case, Skip, V
from .data import Data
from .judge import Expected, accepted, check_score, check_statistics, check_sums
from .outputs import check_memory_around, grad_loss_for, memory_around, out_for
from .terms import (
    ACTIVATIONS,
    ARGUMENTS,
    POWERS,
    SUM_ARGUMENTS,
    running_options,
    sum_options,
    term_or_options,
)


def loss(case: Case) -> None:
    """`loss`."""
    case.spoil(ARGUMENTS)
    data = Data(case, "array", ACTIVATIONS)
    arguments, parts = term_or_options(case, data)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "array"),
    }  # fmt: skip
    value = dice_core.loss(data.x, data.y, **arguments(), **options)
    accepted(case)
    Expected(case, data, parts).check_loss(value)
    options["num_threads"] = case.one(1, 2)
    again = dice_core.loss(data.x, data.y, **arguments(), **options)
    assert_bitwise_equal(again, value, what="loss again")


def loss_and_grad(case: Case) -> None:
    """`loss_and_grad`, and `loss`, and torch."""
    case.spoil([*ARGUMENTS, "grad_loss", "out", "out", "out"])
    data = Data(case, "array", ACTIVATIONS)
    arguments, parts = term_or_options(case, data)
    shape: tuple[int, ...] = ()
    if parts and not case.bad:
        shape = parts[0][1].shape(data.shape[0], data.classes)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "array"),
    }  # fmt: skip
    grad_loss, upstream = grad_loss_for(case, shape)
    out, is_x = out_for(case, data)
    saved = memory_around(out) if not case.bad else None
    before = array_of(data.x).copy() if is_x and not case.bad else None
    if grad_loss is not None:
        options["grad_loss"] = grad_loss
        case.note(f"grad_loss={grad_loss!r}")
    if out is not None:
        options["out"] = out
    value, grad = dice_core.loss_and_grad(data.x, data.y, **arguments(), **options)
    accepted(case)
    assert out is None or grad is out, "out is not returned"
    assert isinstance(grad, torch.Tensor) == isinstance(
        data.x if out is None else out, torch.Tensor
    )
    check_memory_around(saved)
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    expected.check_loss(value)
    first, options["num_threads"] = array_of(grad).copy(), case.one(1, 2)
    if is_x:
        array_of(data.x)[...] = before
    again, grad = dice_core.loss_and_grad(data.x, data.y, **arguments(), **options)
    assert_bitwise_equal(again, value, what="loss again")
    assert_bitwise_equal(nan_alike(array_of(grad)), nan_alike(first), what="gradient again")
    if is_x:
        array_of(data.x)[...] = before
    for name in ("num_threads", "grad_loss", "out"):
        options.pop(name, None)
    only = dice_core.loss(data.x, data.y, **arguments(), **options)
    assert_bitwise_equal(only, value, what="loss without gradient")


def statistics(case: Case) -> None:
    """`statistics`, and what Statistics can do."""
    case.spoil(SUM_ARGUMENTS)
    data = Data(case, "array", ACTIVATIONS)
    given, values = sum_options(case)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation, **given,
        **running_options(case, data, "array"),
    }  # fmt: skip
    stats = dice_core.statistics(data.x, data.y, **options)
    accepted(case)
    voxels = data.voxels(**values)
    check_sums(case, data, voxels, stats)
    options["num_threads"] = case.one(1, 2)
    again = dice_core.statistics(data.x, data.y, **options)
    assert_bitwise_equal(again.array, stats.array, what="sums again")
    check_statistics(case, stats)


def gradient(case: Case) -> None:
    """`statistics` of tiles added up, a term of them, and the `gradient` of each tile."""
    case.spoil(
        [
            "statistics",
            "grad_loss",
            "out",
            *(n for n in ARGUMENTS[2:] if n not in ("p", "combined")),
        ]
    )
    data = Data(case, "array", ACTIVATIONS)
    arguments, parts = term_or_options(case, data)
    running = running_options(case, data, "array")
    running.pop("check_labels", None)
    needs: dict[str, Any] = {}
    for _, part in parts:
        needs |= part.needs
    x, y = data.x, data.y
    axis = None
    arrays = isinstance(x, np.ndarray) and isinstance(y, (np.ndarray, torch.Tensor))
    if (
        arrays
        and type(x) is not np.matrix
        and len(data.shape) > 2
        and y.ndim == x.ndim
        and case.may(0.6)
    ):
        axis = case.random.randrange(2, len(data.shape))
        middle = case.random.randrange(data.shape[axis] + 1)
        tiles = [(slice(None),) * axis + (part,) for part in (slice(middle), slice(middle, None))]
    options = {"ignore_label": data.ignore_label, "activation": data.activation, **needs}
    if axis is None:
        stats: Any = dice_core.statistics(x, y, **options, **running)
    else:
        case.note(f"tiles along axis {axis} at {middle}")
        stats = sum(dice_core.statistics(x[t], y[t], **options, **running) for t in tiles)
    if "statistics" in case.wrong:
        stats = case.value("statistics")
    shape = parts[0][1].shape(data.shape[0], data.classes) if parts and not case.bad else ()
    grad_loss, upstream = grad_loss_for(case, shape)
    running["grad_loss"] = grad_loss
    if case.bad:  # the statistics were computed for no term
        case.refuse(V, "statistics")
    given = arguments()
    if "term" not in given:
        given.pop("p", None)  # of the statistics
    if axis is None:
        out, _ = out_for(case, data)
        saved = memory_around(out) if not case.bad else None
        grad = dice_core.gradient(data.x, data.y, stats, **given, **running, out=out)
        accepted(case)
        check_memory_around(saved)
    else:
        pieces = [dice_core.gradient(x[t], y[t], stats, **given, **running) for t in tiles]
        accepted(case)
        grad = np.concatenate([array_of(piece) for piece in pieces], axis)
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    loss_of_sums: Any = given.get("term") or losses.of(None, **{"p": needs.get("p", 1), **given})
    value = np.asarray(loss_of_sums(stats))
    dtype = np.float64 if data.dtype == "float64" else np.float32
    with np.errstate(over="ignore"):
        expected.check_loss(value.astype(dtype))


def score(case: Case) -> None:
    """`score`."""
    case.spoil(["x", "y", "pool", "activation", "ignore_label", "backend", "num_threads"])
    data = Data(case, "array", ("softmax", "softmax", "sigmoid"))
    pool = case.value("pool", "none", "batch")
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation, "pool": pool,
        **running_options(case, data, "array"),
    }  # fmt: skip
    result = dice_core.score(data.x, data.y, **options)
    accepted(case)
    check_score(case, data, result, pool)


def precompile(case: Case) -> None:
    """`precompile`, which has nothing to do on the host."""
    case.spoil(["x", "y", "p", "activation", "ignore_label", "backend", "term"])
    data = Data(case, "array", ACTIVATIONS)
    options: dict[str, Any] = {"ignore_label": data.ignore_label, "activation": data.activation}
    if "term" in case.wrong or ("p" not in case.wrong and case.may(0.5)):
        options["term"] = case.value("term", losses.Dice(), losses.CrossEntropy())
    else:
        options["p"] = case.value("p", *POWERS)
    running = running_options(case, data, "array")
    if "backend" in running:
        options["backend"] = running["backend"]
    if "num_threads" in case.wrong:
        raise Skip("not a call")
    case.bad = [bad for bad in case.bad if bad.names != ("y",)]  # labels are not read
    dice_core.precompile(data.x, data.y, **options)
    accepted(case)


def diagnose(case: Case) -> None:
    """`diagnose`, which finds something where `statistics` raises for the arrays, or is NaN."""
    case.spoil(ARGUMENTS)
    data = Data(case, "array", ACTIVATIONS)
    arguments, _ = term_or_options(case, data)
    options: dict[str, Any] = {"ignore_label": data.ignore_label, "activation": data.activation}
    found = dice_core.diagnose(data.x, data.y, **arguments(), **options)
    of_arrays = any(set(bad.names) <= {"x", "y"} for bad in case.bad)
    assert found or of_arrays or not case.bad, f"nothing found, expected {case.bad}"
    count = "1 finding in x " if len(found) == 1 else f"{len(found)} findings in x "
    assert str(found).startswith(count if found else "nothing found in x "), str(found)
    if getattr(data.x, "requires_grad", False):
        raise Skip("logits that require grad")
    sums: Any = np.inf
    with contextlib.suppress(TypeError, ValueError):
        sums = dice_core.statistics(data.x, data.y, **options).array
    assert found or np.isfinite(sums).all(), "nothing found, but statistics raises or gives NaN"


def absurd(case: Case) -> None:
    """Arrays with too many samples, axes or classes for any memory."""
    samples = case.one(2**50, 2**55)
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (samples, 2), (0, 0))
    y = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (samples,), (0,))
    case.note(f"{samples} samples")
    case.refuse((MemoryError, ValueError), "x")
    function = case.one(
        dice_core.loss, dice_core.loss_and_grad, dice_core.statistics, dice_core.score
    )
    function(x, y)
    accepted(case)
