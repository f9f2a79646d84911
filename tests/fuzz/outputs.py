"""The arguments grad_loss and out, and the memory around out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from layouts import Array

from .arrays import FLOATS, layout_of, tensor, unaligned
from .cases import INF, NAN, TV, Case, T, V
from .data import Data


def grad_loss_for(case: Case, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """An incoming gradient as an argument, and its values."""
    if "grad_loss" in case.wrong:
        case.wrong.discard("grad_loss")
        rows = [
            ("one", T), (1j, T), ({}, T), (object(), T), (np.ones((7, 7, 7)), V), (len, T),
            ([1.0] * 99, V), (torch.ones((), requires_grad=True), T), ([[1], 2], T), (b"1", T),
            (np.array("a"), T),
        ]  # fmt: skip
        value, types = case.random.choice(rows)
        case.refuse(types, "grad_loss")
        return value, 1.0
    kind = case.one("none", "none", "number", "array", "list", "large", "int", "tensor")
    if case.may(0.02):
        value = case.one(INF, NAN, 1e300, -INF, 1e-310)
        return value, value
    if kind == "none":
        return None, 1.0
    if kind == "number":
        return 0.5, 0.5
    if kind == "int":
        return 3, 3
    if kind == "large":
        return 65536.0, 65536.0
    values = case.rng.standard_normal(shape)
    if kind == "list" and values.size:
        return values.tolist(), values
    if kind == "tensor":
        return torch.from_numpy(np.asarray(values)), values
    return values.astype(np.float32), values.astype(np.float32)


def out_for(case: Case, data: Data) -> tuple[Any, bool]:
    """An `out`, and whether it is x."""
    x, shape, dtype = data.x, data.shape, FLOATS[data.dtype]
    size = int(np.prod(shape))
    if "out" in case.wrong:
        case.wrong.discard("out")
        makers: dict[str, tuple[Callable[[], Any], tuple[type, ...]]] = {
            "list": (lambda: [0.0], T),
            "number": (lambda: 1.0, T),
            "shape": (lambda: np.zeros((*shape, 1), dtype), V),
            "dtype": (
                lambda: np.zeros(shape, np.float32 if data.dtype != "float32" else np.float64),
                V,
            ),
            "integers": (lambda: np.zeros(shape, np.int32), V),
            "objects": (lambda: np.zeros(shape, object), TV),
            "masked": (lambda: np.ma.zeros(shape, np.float32), T),
            "text": (lambda: "out", T),
            "type": (lambda: np.ndarray, T),
        }
        if size > 1:
            makers["readonly"] = (lambda: np.broadcast_to(np.zeros((), dtype), shape), V)
            makers["itself"] = (
                lambda: np.lib.stride_tricks.as_strided(
                    np.zeros(1, dtype), shape, [0] * len(shape)
                ),
                V,
            )
            if data.dtype != "bfloat16":
                makers["big endian"] = (lambda: np.zeros(shape, dtype.newbyteorder(">")), T)
                makers["unaligned"] = (lambda: unaligned(np.zeros(shape, dtype)), T)
        if size > 1 and isinstance(x, np.ndarray) and x.flags.c_contiguous and "x" not in case.text:
            makers["over x"] = (functools.partial(shifted_over_x, case, data), V)
        y = data.y_values
        if size > 1 and isinstance(data.y, np.ndarray) and y.size and y.dtype.name not in ("bool",):
            makers["over y"] = (functools.partial(over_y, case, data), V)
        kind = case.one(*makers)
        make, types = makers[kind]
        case.note(f"out: {kind}")
        case.refuse(types, "out")
        return make(), False
    kind = case.one("none", "none", "none", "new", "new", "x", "view", "tensor")
    writable = isinstance(x, (np.ndarray, torch.Tensor)) and type(x) is not np.matrix
    if isinstance(x, np.ndarray):
        writable = writable and x.flags.writeable and 0 not in x.strides
    if kind == "view" and getattr(x, "is_sparse", False):  # which torch has no view of
        kind = "x"
    if kind in ("x", "view") and writable:
        case.unchanged = [row for row in case.unchanged if row[0] != "x"]
        case.note("out: x")
        return (x if kind == "x" else x[...]), True
    if kind == "new":
        view = layout_of(case, np.full(shape, 7, dtype))
        if not view.flags.writeable:
            view = view.copy()
        case.note(f"out: strides {view.strides}")
        return view, False
    if kind == "tensor":
        return tensor(np.full(shape, 7, dtype)), False
    return None, False


def shifted_over_x(case: Case, data: Data) -> Any:
    """An `out` that overlaps x by all but one element; x moves there."""
    memory = np.zeros(data.x_values.size + 1, FLOATS[data.dtype])
    x = memory[:-1].reshape(data.shape)
    x[...] = data.x_values
    data.x = x
    case.keep("x", x)
    return memory[1:].reshape(data.shape)


def over_y(case: Case, data: Data) -> Any:
    """An `out` that begins inside y, which moves there."""
    y = data.y_values
    memory = np.zeros(data.x_values.nbytes + y.nbytes + 16, np.uint8)
    moved = memory[: y.nbytes].view(y.dtype).reshape(y.shape)
    moved[...] = y
    data.y = moved
    item = FLOATS[data.dtype].itemsize
    start = (y.nbytes - 1) // item * item
    out = memory[start : start + data.x_values.nbytes].view(FLOATS[data.dtype])
    case.keep("y", moved)
    return out.reshape(data.shape)


def memory_around(out: Any) -> tuple[Array, Array, Array] | None:
    """A copy of all memory behind `out`, to see what else is written."""
    if not isinstance(out, np.ndarray):
        return None
    base = out
    while isinstance(base.base, np.ndarray):
        base = base.base
    if base is out or not base.flags.c_contiguous:
        return None
    return out, base, base.copy()


def check_memory_around(saved: tuple[Array, Array, Array] | None) -> None:
    """Asserts that nothing but `out` was written."""
    if saved is None:
        return
    out, base, before = saved
    offset = out.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    place: Array = np.ndarray(out.shape, out.dtype, before, offset, out.strides)
    place[...] = out
    assert base.tobytes() == before.tobytes(), "memory around out was modified"
