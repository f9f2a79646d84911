"""Random calls of the whole public API: each is right by `oracle`, or refused with a documented
exception that names an argument at fault.

    python -m tests.fuzz --n 1000000 --seed 0 --workers 2     # prints counts by outcome
    python -m tests.fuzz --seed 0 --only 4711                 # repeats one call

A call is a function of the seed and its index. Its arguments are valid, or one or two of them are
replaced by something wrong; a call that must be refused and is not, or the reverse, is a failure.
So is a refusal that is not raised by a `raise` statement of dice_core with the argument's name in
the text, and any warning. Of an accepted call these are checked:

- sums, losses, gradients, decisions, against the truth in extended precision, within the error that
  naive code in the same precision may make (`oracle`); NaN and infinities where they belong;
- bitwise the same again, with another number of threads; from torch as from arrays; from statistics
  added up tile by tile, the same within that error;
- x, y and all memory around `out` unchanged; gradients of ignored voxels exactly 0.

What is accepted and cannot be compared is counted by reason, and all other checks still hold:

- "sensitive": over the error that its sums may have, a loss or its derivative is not nearly linear
  (its change differs from the first order by a factor of 3, or the derivative varies by 10 %).
  These are ratios close to 0/0, where all probabilities of a class underflow, kinks (floor, eps,
  (1 - q)^g at 0), and square roots at 0. The gradient must be finite where the true one is.
- "overflow": the truth, or a factor of it, is beyond the range of the arithmetic.
- "underflow": with empty="nan", a class whose sum of s^p underflows is 0/0, and so is its gradient.
- "not finite": a counted NaN or infinity makes sums not finite. The loss is still compared, NaN for
  NaN; the gradients of such samples are not.
- "infinite logits in binary cross-entropy": its two sums may be NaN or infinite by torch's formula.
"""

from __future__ import annotations

import argparse
import collections
import functools
import linecache
import multiprocessing
import os
import pickle
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # as in pytest

import ml_dtypes
import numpy as np
import oracle
import torch
from compare import assert_bitwise_equal, kernel_rows
from layouts import LAYOUTS

import dice_core
import dice_core.torch
from dice_core import losses

Array = np.ndarray[Any, Any]
FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
FLOATS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
BACKENDS = (*(row.name for row in kernel_rows()), "reference")
NAN, INF = float("nan"), float("inf")
T, V, TV = (TypeError,), (ValueError,), (TypeError, ValueError)
DOCUMENTED = (*TV, NotImplementedError, dice_core.BackendError, MemoryError)


class Skip(Exception):
    """Nothing to compare, for a reason that is counted."""


# ---- wrong arguments ---------------------------------------------------------------------------

TWO = np.array([1, 2])
NUMBER = [  # of finite numbers from 0
    (-1, V), (NAN, V), (INF, V), (-INF, V), (10**400, V), (-1e-300, V), ("1", T), (b"1", T),
    (True, T), (1j, T), ([1, 2, 3, 4], TV), (np.array([1.0, 2]), T), ({}, T), (object(), T),
    (len, T), (int, T),
]  # fmt: skip
INTEGER = [
    (True, T), (1.5, T), (1.0, T), ("2", T), (b"2", T), (NAN, T), (1j, T), ({}, T), (object(), T),
    (np.float32(1), T), (np.bool_(True), T), (len, T),
]  # fmt: skip
NAME = [
    (None, V),
    (1, V),
    ("average", V),
    (b"mean", V),
    (["mean"], V),
    (object(), V),
    ("", V),
    ({}, V),
]
WEIGHT = [
    ("uniform", T), (["1", "2"], T), ({0: 1}, T), ([1, [2], 3], T), (1j, T), (np.array([1j]), T),
    ([1, None], T), (object(), T), ({1, 2}, T), (b"12", T), (1.0, V), ([], V), (np.ones((2, 2)), V),
    ([1.0] * 77, V), (np.ones(2, "M8[s]"), T), (torch.ones(77), V), (len, T),
    (torch.ones(2, dtype=torch.cfloat), T),
]  # fmt: skip
WRONG: dict[str, list[tuple[Any, tuple[type, ...]]]] = {
    "p": [*INTEGER, (0, V), (-1, V), (2**31, V), (10**400, V), (None, T), ([1], T), (TWO, T)],
    "ignore_label": [*INTEGER, ([0], T), (TWO, T), (10**400, V), (-(10**400), V)],
    "ignore_channel": [*INTEGER, (None, T), ([0.5], T), ([[0]], T), ([None], T), (["0"], T)],
    "smooth": [
        *NUMBER, (None, T), ((1, "2"), T), ([1], V), ((1, 2, 3), V), ((1, -1), V), ((1, NAN), V),
    ],
    "floor": [*NUMBER, (None, T)],
    "alpha": NUMBER,
    "beta": [*NUMBER, (None, T)],
    "gamma": NUMBER,
    "binary_gamma": NUMBER,
    "eps": [*NUMBER, (None, T), (0, V), (1, V), (2, V)],
    "label_smoothing": [*NUMBER, (None, T), (1.5, V)],
    "factor": [*NUMBER, (None, T)],
    "reduction": NAME,
    "pool": NAME,
    "absent": NAME,
    "divisor": [row for row in NAME if row[0] is not None],
    "empty": NAME,
    "weighting": NAME,
    "activation": NAME,
    "weight": WEIGHT,
    "pos_weight": WEIGHT,
    "backend": [(1, T), (["cpu"], T), (b"cpu", T), ("nonsense", V), ("", V), ("CPU", V)],
    "num_threads": [*INTEGER, ([1], T), (0, V), (-1, V), (-(10**30), V)],
    "term": [(losses.Dice, T), ("dice", T), (1, T), ([], T), (object(), T), (len, T), ({}, T)],
    "statistics": [("sums", T), (None, T), (np.ones((3, 1, 2)), T), (1, T), ([], T)],
}  # fmt: skip
FLAGS = ("nll", "target_square")


class Bad:
    """A reason to refuse the call: types of exceptions, and names of which the text has one."""

    def __init__(self, types: tuple[type, ...], *names: str) -> None:
        self.types, self.names = types, names

    def __repr__(self) -> str:
        return f"{'/'.join(t.__name__ for t in self.types)} naming {' or '.join(self.names)}"


class Case:
    """Draws the arguments of one call and remembers what is wrong with them."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = r = random.Random(f"{seed}/{index}")
        self.rng = np.random.default_rng(r.getrandbits(64))
        self.bad: list[Bad] = []
        self.text: list[str] = []
        self.reasons: list[str] = []
        self.unchanged: list[tuple[str, Array, bytes]] = []
        self.wrong: set[str] = set()

    def may(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def one(self, *values: Any) -> Any:
        """One of these."""
        return self.random.choice(values)

    def spoil(self, names: list[str]) -> None:
        """Chooses which arguments will be wrong, if any."""
        if self.may(0.4):
            self.wrong = {self.random.choice(names)}
            if self.may(0.1):
                self.wrong.add(self.random.choice(names))

    def value(self, name: str, *valid: Any) -> Any:
        """A valid value of an argument, or one of those that must be refused."""
        if name not in self.wrong or name not in WRONG:
            return self.one(*valid)
        self.wrong.discard(name)  # once
        value, types = self.random.choice(WRONG[name])
        self.refuse(types, "a term's factor" if name == "factor" else name)
        return value

    def refuse(self, types: tuple[type, ...], *names: str) -> None:
        """The call must be refused."""
        self.bad.append(Bad(types, *names))

    def note(self, text: str) -> None:
        """A part of the description of the call."""
        self.text.append(text)

    def keep(self, name: str, array: Array) -> None:
        """Memory that must not change."""
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        self.unchanged.append((name, base, base.tobytes()))

    def check_memory(self) -> None:
        """Asserts that the kept memory has not changed."""
        for name, base, before in self.unchanged:
            assert base.tobytes() == before, f"{name} was modified"


# ---- arrays ------------------------------------------------------------------------------------


class Wrapper:
    """An array known by one protocol only."""

    def __init__(self, array: Array, protocol: str) -> None:
        self._array = array
        if protocol == "interface":
            self.__array_interface__ = array.__array_interface__


class Capsule:
    """An array known by DLPack only."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def tensor(array: Array) -> torch.Tensor:
    """A torch tensor of the same memory."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == FLOATS["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def layout_of(case: Case, array: Array) -> Array:
    """The same numbers in other memory."""
    if case.may(0.4):
        return array.copy()
    name = case.one(*LAYOUTS, "readonly", "padded")
    if name == "readonly":
        array = array.copy()
        array.flags.writeable = False
        return array
    if name == "padded" and array.ndim:  # rows with a gap
        wide = np.ones((*array.shape[:-1], array.shape[-1] + case.one(1, 3, 16)), array.dtype)
        wide[..., : array.shape[-1]] = array
        return wide[..., : array.shape[-1]]
    if name == "padded":
        return array.copy()
    return LAYOUTS[name](array.copy())


def mapped(array: Array) -> Array:
    """A memory-mapped copy."""
    with tempfile.TemporaryFile() as file:
        view = np.memmap(file, array.dtype, "w+", shape=array.shape)
    view[...] = array
    return view


def unaligned(array: Array) -> Array:
    """A copy one byte off."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def presented(case: Case, array: Array, name: str, face: str) -> Any:
    """The array as an argument: a NumPy array, a tensor, or another object with its memory.

    If the case says so it is one that must be refused.
    """
    if name in case.wrong:
        case.wrong.discard(name)
        return refused_array(case, array, name, face)
    if face == "torch" or (case.may(0.2) and array.dtype.name != "object"):
        view = array
        for _ in range(4):
            view = layout_of(case, array)
            if all(step >= 0 for step in view.strides):
                break
        else:
            view = array.copy()
        if not view.flags.writeable:
            view = view.copy()
        result = tensor(view)
        case.keep(name, view)
        case.note(f"{name}: tensor {array.dtype.name} {array.shape} strides {view.strides}")
        return result
    view = layout_of(case, array)
    kind = case.one(*["array"] * 9, "memmap", "matrix", "interface", "dlpack", "memoryview")
    plain = array.dtype.name != "bfloat16"
    result: Any = view
    if kind == "memmap" and array.size:
        result = view = mapped(array)
    elif kind == "matrix" and array.ndim == 2:
        result = view = view.view(np.matrix)
    elif kind == "interface" and plain:
        result = Wrapper(view, kind)
    elif kind == "dlpack" and plain and view.flags.writeable:
        result = Capsule(view)
    elif kind == "memoryview" and array.size and plain:
        result = memoryview(view)
    case.keep(name, view)
    case.note(
        f"{name}: {type(result).__name__} {array.dtype.name} {array.shape} strides {view.strides}"
    )
    return result


@oracle.quiet
def refused_array(case: Case, array: Array, name: str, face: str) -> Any:
    """Something that must be refused as x or y, of the same shape where it has one."""
    wide = array.astype(np.float64) if array.dtype.name == "bfloat16" else array
    choices: dict[str, Callable[[], Any]] = {
        "list": lambda: wide.tolist(),
        "None": lambda: None,
        "number": lambda: 1.0,
        "text": lambda: "array",
        "dict": lambda: {},
        "type": lambda: np.ndarray,
        "object": lambda: wide.astype(object),
        "strings": lambda: wide.astype("U4"),
        "bytes": lambda: wide.astype("S4"),
        "datetime": lambda: np.zeros(array.shape, "M8[s]"),
        "timedelta": lambda: np.zeros(array.shape, "m8[s]"),
        "structured": lambda: np.zeros(array.shape, [("a", "f4")]),
        "void": lambda: np.zeros(array.shape, "V4"),
        "complex": lambda: wide.astype(np.complex64),
        "longdouble": lambda: wide.astype(np.longdouble),
        "masked": lambda: np.ma.masked_array(wide, wide == 0),
        "scalar": lambda: wide.dtype.type(0),
        "no axes": lambda: np.zeros((), wide.dtype),
        "one axis": lambda: np.zeros(7, wide.dtype),
        "more axes": lambda: wide[..., None, None],
    }
    if wide.dtype.itemsize > 1 and wide.size and wide.dtype.kind != "b":
        choices["big endian"] = lambda: wide.astype(wide.dtype.newbyteorder(">"))
        choices["unaligned"] = lambda: unaligned(wide)
    if face == "torch" or case.may(0.3):
        choices = {
            "complex tensor": lambda: torch.zeros(array.shape, dtype=torch.complex64),
            "meta": lambda: torch.zeros(array.shape, device="meta"),
            "sparse": lambda: torch.ones(array.shape).to_sparse(),
            "no axes tensor": lambda: torch.zeros(()),
            "more axes tensor": lambda: tensor(np.ascontiguousarray(wide))[..., None, None],
            "float8": lambda: torch.zeros(array.shape).to(torch.float8_e4m3fn),
        } | ({"array": lambda: array, **choices} if face == "torch" else {})
        if wide.dtype.kind in "fV":
            choices["requires grad"] = lambda: (
                tensor(wide.copy()).requires_grad_() if face != "torch" or name == "y" else None
            )
    if name == "x":
        choices["integers"] = lambda: (
            tensor(wide.astype(np.int32)) if face == "torch" else wide.astype(np.int32)
        )
        choices["channels"] = lambda: (
            torch.zeros(2, 0, 3) if face == "torch" else np.zeros((2, 0, 3), np.float32)
        )
    kind = case.one(*choices)
    result = choices[kind]()
    case.note(f"{name}: {kind}")
    types: tuple[type, ...] = TV
    if face == "torch":
        types = (*TV, NotImplementedError)
    if kind == "meta":
        types = (*types, dice_core.BackendError)
    case.refuse(types, "x", "y")  # a wrong shape or device of one is also one of the other
    return result


class Data:
    """Valid logits and targets in memory, and their values for the oracle."""

    @oracle.quiet
    def __init__(self, case: Case, face: str, activations: tuple[str, ...]) -> None:
        self.case, self.face = case, face
        self.activation = case.value("activation", *activations)
        known = self.activation if self.activation in activations else "softmax"
        big = case.may(0.004)
        channels = case.one(1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 8, 9, case.one(17, 20))
        samples = case.one(1, 1, 2, 2, 3, case.one(0, 1, 5)) if channels < 17 else 1
        voxels = case.one(
            1, 2, 7, 15, 16, 17, 33, 65, case.random.randrange(1, 300), case.one(0, 1025)
        )
        if big:
            samples, channels, voxels = case.one((1, 2, 40000), (2, 3, 25000), (1, 5, 30011))
        self.shape = (samples, channels, *self._space(voxels))
        self.dtype = case.one("float32", "float32", "float32", "float16", "bfloat16", "float64")
        self.classes = max(2, channels) if known == "softmax" else channels
        single = known != "softmax" and channels == 1
        self.soft = single or (channels > 1 and case.may(0.35))
        self.ignore_label = self._ignore_label()
        y = self._targets()
        x = self._logits(known, y)
        if self.soft and known == "none" and case.may(0.5):
            x = np.clip(np.abs(x.astype(np.float32)), 0, 1).astype(x.dtype)
        if case.may(0.05) and x.ndim > 2 and x.size:  # an axis of stride 0
            axis = case.random.randrange(x.ndim)
            x = np.broadcast_to(np.take(x, [0], axis), x.shape) if axis != 1 else x
        self.x_values, self.y_values = x, y
        if face != "torch" and x.strides and 0 in x.strides and x.size and "x" not in case.wrong:
            self.x = x
            case.keep("x", x)
            case.note(f"x: broadcast {x.dtype} {x.shape}")
        else:
            self.x = presented(case, x, "x", face)
        self.y = presented(case, y, "y", face)
        case.note(f"activation={self.activation!r}, ignore_label={self.ignore_label!r}")

    def _space(self, voxels: int) -> tuple[int, ...]:
        rank = self.case.one(0, 1, 1, 2, 2, 3, 3, 4)
        if rank == 0:
            return ()
        sides = [1] * rank
        for axis in range(rank - 1):
            sides[axis] = self.case.one(1, 2, 3, 4)
            voxels = -(-voxels // sides[axis])
        sides[-1] = voxels
        self.case.random.shuffle(sides)
        return tuple(sides)

    def _ignore_label(self) -> Any:
        case = self.case
        label = case.one(
            -1, -1, None, 0, 1, 255, 2, np.int64(1), np.uint8(255), -(2**40), 2**63 - 1
        )
        if case.may(0.03):
            label = case.one(2**63, 2**64 - 1, 10**30, -(2**70))
        return case.value("ignore_label", label)

    def _known_ignored(self) -> int | None:
        label = self.ignore_label
        return (
            int(label)
            if isinstance(label, (int, np.integer)) and not isinstance(label, bool)
            else None
        )

    def _targets(self) -> Array:
        case, ignored = self.case, self._known_ignored()
        if self.soft:
            dtype = case.one("float32", "float32", "float64", "float16", "bool", *INTEGERS[:6])
            if case.may(0.1):
                dtype = "bfloat16"
            numbers = FLOATS.get(dtype, np.dtype(dtype))
            if numbers.kind in "fV" and case.may(0.7):
                y = case.rng.random(self.shape)
                y[case.rng.random(self.shape) < 0.2] = 0
                y[case.rng.random(self.shape) < 0.2] = 1
            else:
                y = case.rng.integers(0, 2, self.shape)
            y = y.astype(numbers)
        else:
            dtype = case.one("uint8", "int64", *INTEGERS, "bool")
            numbers = np.dtype(dtype)
            space = (self.shape[0], *self.shape[2:])
            if self.case.may(0.3):
                space = (self.shape[0], 1, *self.shape[2:])
            y = case.rng.integers(0, min(self.classes, 2 if dtype == "bool" else 100), space)
            if case.may(0.3):
                y[...] = np.minimum(y, case.random.randrange(self.classes))  # absent classes
            y = y.astype(numbers)
        info = np.iinfo(numbers) if numbers.kind in "iu" else None
        if ignored is not None and y.size and case.may(0.7):
            fits = info is not None and info.min <= ignored <= info.max
            if fits or (numbers.kind in "fV" and ignored in (-1, 0, 1, 2, 255)):
                y[case.rng.random(y.shape) < 0.3] = ignored
            if case.may(0.05) and (y == y.reshape(-1)[0]).any():
                y[...] = y.reshape(-1)[0]
        if case.may(0.07) and y.size:
            self._put_out_of_range(y, ignored)
        return y

    def _put_out_of_range(self, y: Array, ignored: int | None) -> None:
        case = self.case
        place = tuple(case.random.randrange(n) for n in y.shape)
        if y.dtype == bool:
            value = case.one(2, 3, 127, 128, 255)
            if value == ignored:
                return
            y.view(np.uint8)[place] = value
        elif y.dtype.kind in "iu":
            info, top = np.iinfo(y.dtype), 2 if self.soft else self.classes
            value = case.one(top, info.max, info.min, top + 1, -1, -2, 2**32, 2**40)
            if not info.min <= value <= info.max or 0 <= value < top or value == ignored:
                return
        else:
            value = case.one(NAN, -0.5, 1.5, INF, -INF, 2, -1e-3, 1.01)
            if float(np.asarray(value, y.dtype)) == ignored:
                return
        if y.dtype != bool:
            y[place] = value
        case.refuse(V, "y")
        case.note(f"y{list(place)} = {value}")

    def _logits(self, activation: str, y: Array) -> Array:
        case, rng, shape = self.case, self.case.rng, self.shape
        kind = case.one(
            *["normal"] * 6, "wide", "far", "zero", "sure", "sure", "huge", "tiny", "ordered"
        )
        x = rng.standard_normal(shape)
        if activation == "none" and kind in ("normal", "far", "sure", "ordered"):
            x = rng.random(shape)
        elif kind == "wide":
            x *= 10
        elif kind == "far":
            x = x * case.one(30, 100, 1000) + case.one(0, 0, 1e4)
        elif kind == "zero":
            x *= 0
        elif kind == "sure":  # right, by a gap
            gap = case.random.uniform(0, 80)
            if self.soft:
                x = x * 0.1 + gap * (y.astype(np.float64) - 0.5)
            else:
                own = y.reshape(shape[0], 1, *shape[2:]).astype(np.float64)
                x = x * 0.1 + gap * (
                    own == np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
                )
        elif kind == "huge":
            x *= case.one(1e30, 1e4, 3e37)
        elif kind == "tiny":
            x *= case.one(1e-40, 1e-7, 1e-310)
        elif kind == "ordered" and shape[1] > 1:  # a class that nothing predicts
            x[:, case.random.randrange(shape[1])] -= case.one(20, 48, 90, 120, 400)
        limit = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38}.get(self.dtype, 1e308)
        x = np.clip(x, -limit, limit)
        case.note(f"logits {kind}")
        if x.size and case.may(0.08):
            chosen = rng.random(shape) < case.one(0.02, 0.3)
            x = np.where(chosen, rng.choice([NAN, INF, -INF], shape), x)
        elif x.size and not self.soft and case.may(0.15):  # NaN where it must not matter
            ignored = self._known_ignored()
            if ignored is not None and y.dtype != bool:
                info = np.iinfo(y.dtype)
                if info.min <= ignored <= info.max:
                    off = (y == ignored).reshape(shape[0], 1, *shape[2:])
                    x = np.where(off, rng.choice([NAN, INF, -INF, 7.0], shape), x)
        return np.ascontiguousarray(x.astype(FLOATS[self.dtype]))

    def voxels(self, **needs: Any) -> oracle.Voxels:
        """What the oracle sums."""
        x = self.x_values
        x = x.astype(np.float32) if self.dtype == "bfloat16" else x
        y = self.y_values
        y = y.astype(np.float32) if y.dtype.name == "bfloat16" else y
        count = int(np.prod(self.shape[2:], dtype=np.int64))
        x = x.astype(oracle.Real).reshape(*self.shape[:2], count)
        y = y.astype(oracle.Real)
        y = y.reshape(x.shape) if self.soft else y.reshape(self.shape[0], 1, count)
        options = {
            "p": 1, "gamma": None, "nll": False, "binary_gamma": None, "target_square": False,
            **needs, "activation": self.activation, "ignore_label": self._known_ignored(),
            "soft": self.soft,
        }  # fmt: skip
        return oracle.Voxels(x, y, self.dtype, options)

    def pooled(self, a: Array) -> Array:
        """(N, channels, V)."""
        return a.reshape(*self.shape[:2], int(np.prod(self.shape[2:], dtype=np.int64)))


# ---- comparisons -------------------------------------------------------------------------------


@oracle.quiet
def within(case: Case, what: str, actual: Any, truth: Array, error: Array, limit: float) -> None:
    """Asserts that the numbers are right within `error`; where the truth is beyond `limit`, any
    number is.
    """
    actual = np.asarray(actual)
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    actual = actual.astype(oracle.Real)
    beyond = ~(np.abs(truth) + np.abs(np.nan_to_num(error, nan=np.inf)) < limit) & ~np.isnan(truth)
    exact = (actual == truth) | (np.isnan(actual) & np.isnan(truth))
    with np.errstate(invalid="ignore"):
        fine = exact | (np.abs(actual - truth) <= error)
    wrong = ~(fine | beyond)
    if beyond.any() and not fine.all():
        case.reasons.append("overflow")
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} wrong, the first at {at}: {actual[at]}, not "
            f"{truth[at]} within {error[at]}"
        )


def range_of(dtype: str) -> float:
    """Numbers below it do not overflow the arithmetic."""
    return 1e306 if dtype == "float64" else 1e37


FIELDS = {
    "I": "intersection", "P": "pred_sum", "Y": "target_sum", "H": "cross_entropy_sum",
    "L": "nll_sum", "B+": "positive_sum", "B-": "negative_sum", "T2": "target_square_sum",
    "V": "voxel_count",
}  # fmt: skip


@oracle.quiet
def check_sums(case: Case, data: Data, voxels: oracle.Voxels, stats: Any) -> None:
    """Asserts that Statistics are right."""
    values, bounds = voxels.sums()
    names = {FIELDS[name] for name in values}
    assert names == set(stats.spec.fields), f"fields {stats.spec.fields}"
    infinite = (np.isinf(voxels.own) & voxels.m).any(2)
    for name, truth in values.items():
        actual = np.asarray(getattr(stats, FIELDS[name]))
        assert actual.dtype == np.float64, actual.dtype
        if name in ("B+", "B-") and infinite.any():
            case.reasons.append("infinite logits in binary cross-entropy")
            actual, truth = np.where(infinite, 0, actual), np.where(infinite, 0, truth)
        within(case, FIELDS[name], actual, truth, bounds[name] + 1e-300, range_of(data.dtype))


class Expected:
    """The truth about a loss: of the terms `parts`, with an incoming gradient `upstream`."""

    @oracle.quiet
    def __init__(
        self, case: Case, data: Data, parts: list[tuple[float, oracle.Term]], upstream: Any = 1.0
    ) -> None:
        self.case, self.data, self.parts = case, data, parts
        needs: dict[str, Any] = {}
        for _, term in parts:
            needs |= term.needs
        self.voxels = data.voxels(**needs)
        self.sums, bounds = self.voxels.sums()
        self.upstream = np.asarray(upstream, oracle.Real)
        self.limit = range_of(data.dtype)
        finite = all((np.abs(row) < self.limit).all() for row in self.sums.values())
        self.truth: oracle.Truth | None = None
        if finite and data.shape[0]:
            few = 2 if next(iter(self.sums.values())).size > 30 else 3
            self.truth = oracle.evaluate(
                parts,
                self.sums,
                bounds,
                self.upstream,
                PRECISION(data),
                case.rng,
                few,
            )

    @oracle.quiet
    def check_loss(self, value: Any) -> None:
        """Asserts that the loss is right."""
        case, data = self.case, self.data
        dtype = "float64" if data.dtype == "float64" else "float32"
        value = np.asarray(value)
        assert value.dtype == dtype, f"loss: {value.dtype}, not {dtype}"
        if "B+" in self.sums and (np.isinf(self.voxels.own) & self.voxels.m).any():
            case.reasons.append("infinite logits in binary cross-entropy")
            return
        limit = 1e306 if dtype == "float64" else 3e38
        if self.truth is None:
            if data.shape[0]:
                case.reasons.append("not finite")
            truth = oracle.value_only(self.parts, self.sums)
            assert value.shape == truth.shape, f"loss: shape {value.shape}, not {truth.shape}"
            large = any(
                (np.isfinite(r) & (np.abs(r) > self.limit)).any() for r in self.sums.values()
            )
            if not large:
                assert (np.isnan(value) == np.isnan(truth)).all(), f"loss: {value}, not {truth}"
            return
        t = self.truth
        error = t.value_error
        if t.sensitive.any():
            case.reasons.append("sensitive")
            error = np.where(t.sensitive, np.inf, error)
        factors = [np.abs(row).max(initial=0) for row in self.weights()]
        if max(factors, default=0) > self.limit:
            limit = 0
        within(case, "loss", value, t.value, error, max(limit, 1e-300))

    def weights(self) -> list[Array]:
        """The class weights of all terms."""
        given = []
        for factor, term in self.parts:
            given.append(np.asarray(factor))
            for name in ("weight", "pos_weight"):
                if term.settings.get(name) is not None:
                    given.append(np.asarray(term.settings[name]))
        return given

    @oracle.quiet
    def check_gradient(self, grad: Any, part: Any = None) -> None:
        """Asserts that the gradient, or that of a tile, is right."""
        case, data = self.case, self.data
        actual = array_of(grad)
        assert actual.dtype == FLOATS[data.dtype], f"gradient: {actual.dtype}"
        assert actual.shape == data.shape, f"gradient: shape {actual.shape}"
        actual = data.pooled(np.asarray(actual).astype(oracle.Real))
        ignored = np.broadcast_to(~self.voxels.any_valid, actual.shape)
        assert not np.asarray(actual[ignored] != 0).any(), "the gradient of ignored voxels is not 0"
        if self.truth is None:
            if data.shape[0]:
                case.reasons.append("not finite")
            return
        t, p = self.truth, self.voxels.precision
        truth, error = self.voxels.gradient(t.cotangent, t.cotangent_error)
        largest = max((float(np.abs(c).max(initial=0)) for c in t.cotangent.values()), default=0)
        if not largest * max(1, self.voxels.options["p"]) < self.limit:
            case.reasons.append("overflow")
            if not np.isfinite(np.asarray(t.cotangent["I"], np.float64)).all():
                return
            error = np.full_like(error, np.inf)
        doubtful = t.sensitive_sums.any(1)
        if doubtful.any():
            case.reasons.append("sensitive")
            error = np.where(doubtful[:, None, None], np.inf, error)
        small = np.abs(truth) < min(1e30, p.out_max / 8)
        both = small & np.isinf(error) & np.isfinite(truth)
        factors = [np.abs(row).max(initial=0) for row in (self.upstream, *self.weights())]
        both &= max(factors) < 1e30
        sums = self.sums["P"]
        lost = (sums > 0) & (sums < (1e-300 if data.dtype == "float64" else 1e-37))
        if lost.any() and any(term.settings.get("empty") == "nan" for _, term in self.parts):
            case.reasons.append("underflow")
            both &= False
        assert np.isfinite(actual[both]).all(), (
            f"gradient: {(~np.isfinite(actual[both])).sum()} not finite where the truth is"
        )
        error = np.where(np.isinf(error), np.where(np.isnan(actual), np.inf, error), error)
        comparable = np.isfinite(error) & np.isfinite(truth)
        if not comparable.all():
            actual, truth = np.where(comparable, actual, 0), np.where(comparable, truth, 0)
            error = np.where(comparable, error, 0)
        within(case, "gradient", actual, truth, error, p.out_max * 0.99)


def PRECISION(data: Data) -> float:
    """The rounding error of a loss."""
    return 2.0**-53 if data.dtype == "float64" else 2.0**-24


def array_of(value: Any) -> Array:
    """A NumPy array of the same memory."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(FLOATS["bfloat16"])
        return value.numpy()
    return np.asarray(value)


# ---- terms -------------------------------------------------------------------------------------

REDUCTION = ("mean", "mean", "sum", "none", "classes", "batch")
P = (1, 1, 1, 2, 2, 3, 4, np.int64(2), 5, 17)
GAMMA = (0, 0.5, 1, 2, 2.0, 2.5, 3, 0.75, np.float32(1.5), 17)


@oracle.quiet
def numbers(case: Case, name: str, classes: int) -> tuple[Any, list[float] | None]:
    """Class weights as an argument, and their values; None or wrong ones."""
    if name in case.wrong:
        return case.value(name), None
    if case.may(0.5):
        return None, None
    rng = case.rng
    values = rng.random(classes) * 2
    if case.may(0.3):
        values[case.random.randrange(classes)] = case.one(0, -1, 100, 1e-3)
    if case.may(0.02):
        values[case.random.randrange(classes)] = case.one(1e300, 1e38, 1e-300)
    kind = case.one("list", "tuple", "float64", "float32", "int64", "bool", "tensor", "Parameter")
    given: Any = values
    if kind == "list":
        given = values.tolist()
    elif kind == "tuple":
        given = tuple(values.tolist())
    elif kind in ("float32", "int64", "bool"):
        given = np.clip(values, -1e30, 1e30).astype(kind)
    elif kind == "tensor":
        given = (
            torch.from_numpy(values).to(case.one(torch.float32, torch.float64))
            if (np.abs(values).max(initial=0) < 1e37)
            else torch.from_numpy(values)
        )
    elif kind == "Parameter":
        given = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
    return given, np.asarray(
        given.detach() if isinstance(given, torch.Tensor) else given, float
    ).tolist()


def channels(case: Case, classes: int) -> tuple[Any, Any]:
    """ignore_channel as an argument, and its value."""
    given = case.one(
        -1, -1, -1, 0, 1, classes, np.int64(0), (0, 1), [0], {1}, (), (0, 0), np.array([0]), -7
    )
    given = case.value("ignore_channel", given)
    if isinstance(given, (tuple, list, set, np.ndarray)):
        return given, tuple(given)
    return given, given


def smoothing(case: Case) -> tuple[Any, Any]:
    """smooth as an argument, and its value."""
    given = case.one(0.0, 0, 1, 1.0, 1e-5, 0.1, (0, 1), [1, 2.5], (1.0, 0.5), np.float32(0.5), 100)
    if case.may(0.04):
        given = case.one(1e-11, 5e-324, 1e30, (0, 1e-30), (1.0, 0.0), torch.tensor(0.25))
    given = case.value("smooth", given)
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    if isinstance(given, torch.Tensor):
        return given, float(given)
    return given, (tuple(given) if pair else given)


class Drawn:
    """A term as a constructor to call, and for the oracle."""

    def __init__(self, case: Case, classes: int, shared: dict[str, Any]) -> None:
        name = shared.get("name") or case.one(*(entry.term.__name__ for entry in losses.TERMS))
        given: dict[str, Any] = {}
        values: dict[str, Any] = {}
        defaults = oracle.DEFAULTS[name]

        def put(key: str, argument: Any, value: Any = None) -> None:
            given[key] = argument
            values[key] = argument if value is None else value

        def draw(key: str, probability: float, *valid: Any) -> None:
            if key in defaults and (key in case.wrong or case.may(probability)):
                put(key, case.value(key, *valid))

        given["weight"], values["weight"] = numbers(case, "weight", classes)
        if "pos_weight" in defaults:
            given["pos_weight"], values["pos_weight"] = numbers(case, "pos_weight", classes)
        reduction = shared.get("reduction", case.one(*REDUCTION))
        put("reduction", case.value("reduction", reduction))
        overlap = "smooth" in defaults
        pools = ("none", "none", "batch", "classes", "all") if overlap else ("none", "batch")
        if name == "GeneralizedDice":
            pools = ("classes", "all")
        elif name == "MCC":
            pools = ("none", "batch")
        if "pool" in shared and shared["pool"] in pools:
            put("pool", shared["pool"])
        else:
            draw("pool", 0.5, *pools)
        if "ignore_channel" in defaults and (case.may(0.4) or "ignore_channel" in case.wrong):
            put("ignore_channel", *channels(case, classes))
        if overlap:
            put("smooth", *smoothing(case))
            p = shared.get("p", case.one(*P))
            put("p", case.value("p", 1 if name == "MCC" else p))
            draw("absent", 0.4, "count", "skip", "zero", "one")
            draw("divisor", 0.4, None, "one", "classes", "kept", "weights")
            draw("floor", 0.2, 0, 0.5, 1e-3, 20)
            if name != "MCC":
                draw("target_square", 0.2, True, False)
        else:
            divisors = ("voxels", "one", *(["weights"] if name == "CrossEntropy" else []))
            draw("divisor", 0.5, *divisors)
        draw("empty", 0.3, "perfect", "nan")
        draw("alpha", 0.7, 0, 0.3, 0.5, 1, *(() if name == "SigmoidFocal" else (2.0, 1e-6)))
        draw("beta", 0.7, 0, 0.7, 1, 2.0)
        draw("eps", 0.5, 1e-7, 0.3, 1e-3)
        draw("of_mean", 0.4, True, False)
        draw("weighting", 0.6, "square", "simple", "uniform")
        draw("label_smoothing", 0.5, 0, 0.1, 1, 0.5)
        if "gamma" in defaults:
            gamma = (
                shared.get("gamma", case.one(*GAMMA))
                if name != "FocalTversky"
                else case.one(*GAMMA)
            )
            put("gamma", case.value("gamma", gamma))
        given = {
            k: v
            for k, v in given.items()
            if v is not None or (k in WRONG and case.bad) or case.may(0.1)
        }
        given = {
            k: v
            for k, v in given.items()
            if v is not None or defaults.get(k, 0) is None or case.bad
        }
        self.make = functools.partial(getattr(losses, name), **given)
        case.note(f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
        self.truth = None
        if not case.bad:
            self.truth = oracle.Term(name, {k: v for k, v in values.items() if k in given})
            self._refuse(case)
        else:  # these may be found first
            case.refuse(V, "pool", "of_mean", "reduction")

    def _refuse(self, case: Case) -> None:
        assert self.truth is not None
        s = self.truth.settings
        if s["reduction"] == "classes" and s["pool"] in ("classes", "all"):
            case.refuse(V, "pool")
        if s["reduction"] == "none" and s["pool"] in ("batch", "all"):
            case.refuse(V, "pool")
        if s.get("of_mean") and s["reduction"] == "classes":
            case.refuse(V, "of_mean", "pool")


def drawn_term(
    case: Case, classes: int, ratio_only: bool = False
) -> tuple[Callable[[], Any], list[tuple[float, oracle.Term]]]:
    """A term or a sum of terms: a function that makes it, and its parts for the oracle."""
    count = case.one(1, 1, 1, 2, 2, 3) if "factor" not in case.wrong else 2
    shared: dict[str, Any] = {}
    if count > 1:
        shape = case.one(
            ("mean", None), ("sum", None), ("batch", None), ("none", "none"), ("classes", "none")
        )
        shared = {"reduction": shape[0], "p": case.one(*P), "gamma": case.one(*GAMMA)}
        if shape[1]:
            shared["pool"] = shape[1]
    drawn, factors = [], []
    for _ in range(count):
        drawn.append(Drawn(case, classes, shared))
        factors.append(case.value("factor", 1, 0.5, 2, 1e-3, 0, np.float32(3), 100))
    case.note(f"factors {factors}")
    parts: list[tuple[float, oracle.Term]] = []
    if all(one.truth is not None for one in drawn):
        needs: dict[str, Any] = {}
        first = drawn[0].truth
        assert first is not None
        for factor, one in zip(factors, drawn, strict=True):
            assert one.truth is not None
            parts.append((1.0 if count == 1 else factor, one.truth))
            if not case.bad and one.truth.shape(2, 3) != first.shape(2, 3):
                case.refuse(V, "reduction")
            for option, value in one.truth.needs.items():
                if needs.setdefault(option, value) != value:
                    case.refuse(V, option, "reduction")
    elif count > 1:
        case.refuse(V, "p", "gamma", "binary_gamma", "reduction")

    def make() -> Any:
        terms = [one.make() for one in drawn]
        if count == 1:
            return terms[0]
        return sum(factor * term for factor, term in zip(factors, terms, strict=True))

    return make, parts


def dice_options(case: Case, data: Data) -> tuple[dict[str, Any], list[tuple[float, oracle.Term]]]:
    """The options of `loss` without a term, and the oracle's Dice."""
    given: dict[str, Any] = {}
    values: dict[str, Any] = {}
    given["weight"], values["weight"] = numbers(case, "weight", data.classes)
    given["ignore_channel"], values["ignore_channel"] = channels(case, data.classes)
    given["smooth"], values["smooth"] = smoothing(case)
    given["p"] = values["p"] = case.value("p", *P)
    given["reduction"] = values["reduction"] = case.value("reduction", *REDUCTION)
    for name in [*given]:
        if not case.bad and case.may(0.3):
            del given[name], values[name]
    case.note(", ".join(f"{k}={v!r}" for k, v in given.items()))
    return given, [] if case.bad else [(1.0, oracle.Term("Dice", values))]


def running_options(case: Case, data: Data, face: str) -> dict[str, Any]:
    """backend, num_threads, check_labels."""
    given = {
        "backend": case.value("backend", None, None, None, *BACKENDS),
        "num_threads": case.value("num_threads", None, None, 1, 2, 3, np.int64(2), 1000, 10**6),
        "check_labels": case.one(None, None, True, False),
    }
    if case.may(0.02):
        given["backend"] = case.one("cuda", "cpu-avx512")
        if given["backend"] not in BACKENDS:
            case.refuse((dice_core.BackendError,), "backend")
    bfloat16 = "bfloat16" in (data.dtype, data.y_values.dtype.name)
    if given["backend"] == "reference" and bfloat16:
        case.refuse((dice_core.BackendError,), "backend")
    return {k: v for k, v in given.items() if v is not None or case.may(0.2)}


# ---- calls -------------------------------------------------------------------------------------


def refused(case: Case, error: BaseException) -> str:
    """The outcome of a refused call; AssertionError if it should not have been, or not so."""
    kind, text = type(error), str(error)
    if not case.bad:
        raise AssertionError(f"refused a valid call: {kind.__name__}: {text}") from error
    if isinstance(error, MemoryError):
        assert any(MemoryError in bad.types for bad in case.bad), "MemoryError"
        return "refused: MemoryError"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    ours = Path(frame.filename).is_relative_to(Path(dice_core.__file__).parent)
    fits = any(
        kind in bad.types and any(re.search(rf"\b{re.escape(name)}\b", text) for name in bad.names)
        for bad in case.bad
    )
    if not (fits and ours and line.startswith("raise ")):
        raise AssertionError(
            f"refused with {kind.__name__}: {text!r} from {frame.filename}:{frame.lineno} "
            f"{line!r}, expected {case.bad}"
        ) from error
    return f"refused: {kind.__name__}"


def accepted(case: Case) -> None:
    """Asserts that the call was valid."""
    assert not case.bad, f"accepted, expected {case.bad}"


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


def around(out: Any) -> tuple[Array, Array, Array] | None:
    """A copy of all memory behind `out`, to see what else is written."""
    if not isinstance(out, np.ndarray):
        return None
    base = out
    while isinstance(base.base, np.ndarray):
        base = base.base
    if base is out or not base.flags.c_contiguous:
        return None
    return out, base, base.copy()


def check_around(saved: tuple[Array, Array, Array] | None) -> None:
    """Asserts that nothing but `out` was written."""
    if saved is None:
        return
    out, base, before = saved
    offset = out.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    place: Array = np.ndarray(out.shape, out.dtype, before, offset, out.strides)
    place[...] = out
    assert base.tobytes() == before.tobytes(), "memory around out was modified"


def term_or_options(
    case: Case, data: Data
) -> tuple[Callable[[], dict[str, Any]], list[tuple[float, oracle.Term]]]:
    """A term, or Dice with options: a function that gives the arguments, and the oracle's terms."""
    if "term" in case.wrong:
        value = case.value("term")
        return (lambda: {"term": value}), []
    if case.may(0.45):
        given, parts = dice_options(case, data)
        return (lambda: given), parts
    make, parts = drawn_term(case, data.classes)
    extra: dict[str, Any] = {}
    if "combined" in case.wrong:
        name, value = case.one(
            ("weight", [1.0]), ("smooth", 1), ("p", 2), ("reduction", "sum"), ("ignore_channel", 0)
        )
        extra[name] = value
        case.refuse(T, name)
    return (lambda: {"term": make(), **extra}), parts


OPTIONS = [
    "x", "y", "weight", "ignore_channel", "ignore_label", "smooth", "p", "reduction", "activation",
    "backend", "num_threads", "term", "combined", "factor", "pool", "absent", "divisor", "floor",
    "empty", "alpha", "gamma", "eps", "label_smoothing",
]  # fmt: skip
ALL = ("softmax", "softmax", "softmax", "sigmoid", "none")


def loss(case: Case) -> None:
    """`loss`."""
    case.spoil(OPTIONS)
    data = Data(case, "array", ALL)
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
    case.spoil([*OPTIONS, "grad_loss", "out", "out", "out"])
    data = Data(case, "array", ALL)
    arguments, parts = term_or_options(case, data)
    shape = ()
    if parts and not case.bad:
        shape = parts[0][1].shape(data.shape[0], data.classes)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "array"),
    }  # fmt: skip
    grad_loss, upstream = grad_loss_for(case, shape)
    out, is_x = out_for(case, data)
    saved = around(out) if not case.bad else None
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
    check_around(saved)
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    expected.check_loss(value)
    first, options["num_threads"] = array_of(grad).copy(), case.one(1, 2)
    if is_x:
        array_of(data.x)[...] = before
    again, grad = dice_core.loss_and_grad(data.x, data.y, **arguments(), **options)
    assert_bitwise_equal(again, value, what="loss again")
    assert_bitwise_equal(bits(array_of(grad)), bits(first), what="gradient again")
    if is_x:
        array_of(data.x)[...] = before
    for name in ("num_threads", "grad_loss", "out"):
        options.pop(name, None)
    only = dice_core.loss(data.x, data.y, **arguments(), **options)
    assert_bitwise_equal(only, value, what="loss without gradient")


@oracle.quiet
def bits(a: Array) -> Array:
    """The numbers, NaN all alike."""
    wide = np.asarray(a).astype(np.float64)
    return np.where(np.isnan(wide), np.nan, wide) + 0.0


def sum_options(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `statistics`, and their values."""
    given = {
        "p": case.value("p", *P),
        "gamma": case.value("gamma", None, *GAMMA),
        "nll": case.one(False, True),
        "binary_gamma": case.value("binary_gamma", None, *GAMMA),
        "target_square": case.one(False, True),
    }
    for name in [*given]:
        if not case.bad and case.may(0.5):
            del given[name]
    case.note(", ".join(f"{k}={v!r}" for k, v in given.items()))
    return given, dict(given)


SUMMING = [
    "x", "y", "p", "gamma", "binary_gamma", "ignore_label", "activation", "backend", "num_threads",
]  # fmt: skip


def statistics(case: Case) -> None:
    """`statistics`, and what Statistics can do."""
    case.spoil(SUMMING)
    data = Data(case, "array", ALL)
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
    check_object(case, stats)


@oracle.quiet
def check_object(case: Case, stats: Any) -> None:
    """Asserts what Statistics can do besides holding sums."""
    copied = pickle.loads(pickle.dumps(stats))
    assert copied.spec == stats.spec
    assert copied.dtype == stats.dtype
    assert_bitwise_equal(copied.array, stats.array, what="pickled sums")
    for k, (name, row) in enumerate(zip(stats.spec.fields, stats, strict=True)):
        assert_bitwise_equal(row, stats.array[k], what=name)
    host = stats.to_host()
    assert isinstance(host.array, np.ndarray)
    double = sum([stats, stats])
    assert_bitwise_equal(np.asarray(double.array), 2 * np.asarray(stats.array), what="sums added")
    pooled = stats.pooled()
    truth = np.asarray(stats.array).astype(oracle.Real).sum(1, keepdims=True)
    error = 1e-13 * np.abs(np.asarray(stats.array)).sum(1, keepdims=True)
    within(case, "pooled", np.asarray(pooled.array), truth, error, 1e300)
    assert repr(stats).startswith("<Statistics of ")
    voxels = np.asarray(stats.voxels)
    assert voxels.shape == stats.array.shape[1:2], "voxels"
    for name in FIELDS.values():
        try:
            getattr(stats, name)
        except AttributeError as error:
            fits = name in str(error) and "compute them with" in str(error)
            assert fits, error  # noqa: PT017
            assert name not in stats.spec.fields
    for other, kind in ((1, TypeError), (None, TypeError), ("s", TypeError)):
        try:
            stats + other
        except kind:
            continue
        raise AssertionError(f"statistics + {other!r} is accepted")


def gradient(case: Case) -> None:
    """`statistics` of tiles added up, a term of them, and the `gradient` of each tile."""
    case.spoil(
        ["statistics", "grad_loss", "out", *(n for n in OPTIONS[2:] if n not in ("p", "combined"))]
    )
    data = Data(case, "array", ALL)
    arguments, parts = term_or_options(case, data)
    running = running_options(case, data, "array")
    running.pop("check_labels", None)
    needs: dict[str, Any] = {}
    for _, term in parts:
        needs |= term.needs
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
        stats = dice_core.statistics(x, y, **options, **running)
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
        saved = around(out) if not case.bad else None
        grad = dice_core.gradient(data.x, data.y, stats, **given, **running, out=out)
        accepted(case)
        check_around(saved)
    else:
        pieces = [dice_core.gradient(x[t], y[t], stats, **given, **running) for t in tiles]
        accepted(case)
        grad = np.concatenate([array_of(piece) for piece in pieces], axis)
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    term = given.get("term") or losses.of(None, **{"p": needs.get("p", 1), **given})
    value = np.asarray(term(stats))
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


@oracle.quiet
def check_score(case: Case, data: Data, result: Any, pool: str) -> None:
    """Asserts that Dice and IoU are right."""
    both, total = data.voxels().decisions()
    if pool == "batch":
        both, total = both.sum(0, keepdims=True), total.sum(0, keepdims=True)
    eps = 64 * PRECISION(data) * data.soft + 1e-15
    union = total - both
    for name, num, den in (("dice", 2 * both, total), ("iou", both, union)):
        truth = np.where(den == 0, np.nan, num / np.where(den == 0, 1, den))
        error = eps * (
            np.abs(truth) + np.where(den == 0, 0, (num + den) / np.where(den == 0, 1, den))
        )
        within(case, name, getattr(result, name), truth, np.nan_to_num(error), 1e300)


def precompile(case: Case) -> None:
    """`precompile`, which has nothing to do on the host."""
    case.spoil(["x", "y", "p", "activation", "ignore_label", "backend", "term"])
    data = Data(case, "array", ALL)
    options: dict[str, Any] = {"ignore_label": data.ignore_label, "activation": data.activation}
    if "term" in case.wrong or ("p" not in case.wrong and case.may(0.5)):
        options["term"] = case.value("term", losses.Dice(), losses.CrossEntropy())
    else:
        options["p"] = case.value("p", *P)
    running = running_options(case, data, "array")
    if "backend" in running:
        options["backend"] = running["backend"]
    if "num_threads" in case.wrong:
        raise Skip("not a call")
    case.bad = [bad for bad in case.bad if bad.names != ("y",)]  # labels are not read
    assert dice_core.precompile(data.x, data.y, **options) is None
    accepted(case)


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


# ---- torch -------------------------------------------------------------------------------------


def torch_loss(case: Case) -> None:
    """`dice_core.torch.loss` and its backward pass, as arrays have it."""
    case.spoil(OPTIONS)
    data = Data(case, "torch", ALL)
    arguments, parts = term_or_options(case, data)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "torch"),
    }  # fmt: skip
    x = data.x
    differentiable = isinstance(x, torch.Tensor) and x.is_floating_point() and case.may(0.8)
    if differentiable:
        x = x.requires_grad_()
    value = dice_core.torch.loss(x, data.y, **arguments(), **options)
    accepted(case)
    check_torch(case, data, parts, value, x if differentiable else None)
    if case.may(0.3):
        with torch.no_grad():
            arrays = dice_core.loss(data.x.detach(), data.y, **arguments(), **options)
        assert_bitwise_equal(np.asarray(arrays), value.detach().numpy(), what="torch and arrays")


def check_torch(
    case: Case, data: Data, parts: list[tuple[float, oracle.Term]], value: Any, x: Any
) -> None:
    """Asserts that a loss of tensors and its gradient are right."""
    upstream = case.rng.standard_normal(tuple(value.shape))
    if case.may(0.5):
        upstream = np.ones(tuple(value.shape)) * case.one(1, 65536.0)
    incoming = torch.as_tensor(np.asarray(upstream), dtype=value.dtype)
    upstream = incoming.numpy()
    if x is None:
        assert not value.requires_grad
        Expected(case, data, parts, upstream).check_loss(value.numpy())
        return
    (grad,) = torch.autograd.grad(value, x, incoming)
    assert grad.dtype == x.dtype
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    expected.check_loss(value.detach().numpy())


def torch_statistics(case: Case) -> None:
    """`dice_core.torch.statistics` and the gradient of a random linear function of them."""
    case.spoil(SUMMING)
    data = Data(case, "torch", ALL)
    given, values = sum_options(case)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation, **given,
        **running_options(case, data, "torch"),
    }  # fmt: skip
    x = data.x
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        x = x.requires_grad_()
    stats = dice_core.torch.statistics(x, data.y, **options)
    accepted(case)
    voxels = data.voxels(**values)
    detached = dice_core.Statistics(stats.array.detach(), stats.spec, stats.dtype)
    check_sums(case, data, voxels, detached)
    check_object(case, detached)
    cotangent = torch.from_numpy(case.rng.standard_normal(tuple(stats.array.shape)))
    (grad,) = torch.autograd.grad(stats.array, x, cotangent)
    names = [name for name, field in FIELDS.items() if field in stats.spec.fields]
    order = {field: k for k, field in enumerate(stats.spec.fields)}
    of = {n: cotangent.numpy()[order[FIELDS[n]]].astype(oracle.Real) for n in names}
    of = {n: row for n, row in of.items() if n in oracle.OF_LOGITS}
    truth, error = voxels.gradient(of, {n: 0 * row for n, row in of.items()})
    actual = data.pooled(array_of(grad).astype(oracle.Real))
    ignored = np.broadcast_to(~voxels.any_valid, actual.shape)
    assert not np.asarray(actual[ignored] != 0).any(), "the gradient of ignored voxels is not 0"
    usable = np.isfinite(truth) & np.isfinite(error) & (np.abs(truth) < range_of(data.dtype))
    finite = np.isfinite(np.where(voxels.m, voxels.own, 0)).all(1, keepdims=True)
    usable &= finite
    if not usable.all():
        case.reasons.append("not finite")
        actual, truth = np.where(usable, actual, 0), np.where(usable, truth, 0)
        error = np.where(usable, error, 0)
    within(case, "gradient", actual, truth, error, voxels.precision.out_max * 0.99)


MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "DiceLoss": ("Dice", {}),
    "JaccardLoss": ("Jaccard", {}),
    "TverskyLoss": ("Tversky", {}),
    "FocalTverskyLoss": ("FocalTversky", {}),
    "GeneralizedDiceLoss": ("GeneralizedDice", {}),
    "DiceCELoss": ("Dice", {}),
    "DiceFocalLoss": ("Dice", {}),
}


def module(case: Case) -> None:
    """The modules of `dice_core.torch`."""
    case.spoil(
        [name for name in OPTIONS if name not in ("term", "combined", "factor", "eps", "empty")]
    )
    data = Data(case, "torch", ALL[:4])
    name = case.one(*MODULES)
    kind, _ = MODULES[name]
    shared = {"name": kind}
    drawn = Drawn(case, data.classes, shared)
    given = {k: v for k, v in drawn.make.keywords.items() if k not in ("target_square", "empty")}
    parts: list[tuple[float, oracle.Term]] = []
    if drawn.truth is not None:
        settings = {**drawn.truth.settings, "target_square": False, "empty": "perfect"}
        parts = [(1.0, oracle.Term(kind, settings))]
    compound = {"DiceCELoss": "ce", "DiceFocalLoss": "focal"}.get(name)
    if compound:
        extra, values = numbers(case, f"{compound}_weight", data.classes)
        given[f"{compound}_weight"] = extra
        first, second = case.one(1, 0.5, 2), case.one(1.0, 0.3)
        given["lambda_dice"], given[f"lambda_{compound}"] = first, second
        binary = data.activation == "sigmoid"
        more: dict[str, Any] = {"weight": values}
        if compound == "ce":
            other = "BinaryCrossEntropy" if binary else "CrossEntropy"
            if not binary and case.may(0.3):
                given["label_smoothing"] = more["label_smoothing"] = 0.1
        else:
            other = "SigmoidFocal" if binary else "Focal"
            given["gamma"] = more["gamma"] = case.one(*GAMMA)
        if parts:
            s = parts[0][1].settings
            more["reduction"] = s["reduction"]
            batch = s["reduction"] == "mean" or s["pool"] in ("batch", "all")
            more["pool"] = "batch" if batch else "none"
            term = oracle.Term(other, more)
            parts = [(first, parts[0][1]), (second, term)]
            if not case.bad and term.shape(2, 3) != parts[0][1].shape(2, 3):
                case.refuse(V, "reduction")
    case.note(f"{name}({given})")
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "torch"),
    }  # fmt: skip
    criterion = getattr(dice_core.torch, name)(**given, **options)
    assert repr(criterion)
    x = (
        data.x.requires_grad_()
        if isinstance(data.x, torch.Tensor) and data.x.is_floating_point()
        else data.x
    )
    value = criterion(x, data.y)
    accepted(case)
    check_torch(case, data, parts, value, x)


def supervision(case: Case) -> None:
    """DeepSupervision: the weighted sum of the losses of its outputs."""
    case.spoil(["outputs", "weights", "y", "loss"])
    criterion: Any = dice_core.torch.DiceCELoss(smooth=1e-3)
    spoiled = bool(case.wrong)
    if "loss" in case.wrong:
        criterion = case.one(losses.Dice(), None, "dice", 1)
        case.refuse(T, "loss")
    weights: Any = case.one(None, [1, 0.5], np.array([1.0, 2.0]), (0.25, int(spoiled)))
    if "weights" in case.wrong:
        weights, types = case.one(
            ("12", T), ([1.0], V), ([1, 2, 3], V), (torch.ones(2, requires_grad=True), T),
            ([0, 0], V), (["a", 1], TV), ([None, 1], TV), (1.0, TV), ([NAN, 1], TV), (object(), TV),
            ([1, [2]], TV),
        )  # fmt: skip
        case.refuse(types, "weights")
    space = case.one((4,), (4, 6), (2, 2, 4))
    half = tuple(n // 2 for n in space)
    rng = case.rng
    y: Any = torch.from_numpy(rng.integers(0, 3, (2, *space)))
    outputs: Any = [torch.from_numpy(rng.standard_normal((2, 3, *s))) for s in (space, half)]
    small = y[(slice(None), *[slice(None, None, 2)] * len(space))]
    expected = [
        criterion(x, t) if not case.bad else None for x, t in zip(outputs, (y, small), strict=True)
    ]
    if "y" in case.wrong:
        y = case.one(None, [y], y[..., None, None], y[:, :-1], 1.0, [y, "a"], y.numpy())
        case.refuse(TV, "y", "labels", "label")
    elif case.may(0.3):
        y = [y, small]
    if "outputs" in case.wrong:
        outputs = case.one(
            outputs[0], [], None, [outputs[0], None], 1.0, [x.numpy() for x in outputs], "ab"
        )
        case.refuse(TV, "outputs", "x", "output")
    case.note(f"weights={weights!r} y={type(y)} outputs={type(outputs)}")
    value = dice_core.torch.DeepSupervision(criterion, weights)(outputs, y)
    accepted(case)
    factors = [2 / 3, 1 / 3] if weights is None else [float(w) for w in weights]
    truth = sum(f * float(e) for f, e in zip(factors, expected, strict=True) if f)
    assert abs(float(value) - truth) <= 1e-12 * (1 + abs(truth)), f"{value} not {truth}"


def metric(case: Case) -> None:
    """DiceScore over two batches."""
    case.spoil(["x", "y", "pool", "activation", "ignore_label", "num_threads", "backend"])
    data = Data(case, "torch", ("softmax", "softmax", "sigmoid"))
    pool, iou = case.value("pool", "batch", "none"), case.may(0.5)
    options = running_options(case, data, "torch")
    scores = dice_core.torch.DiceScore(
        data.ignore_label, activation=data.activation, pool=pool, iou=iou, **options
    )
    for _ in range(case.one(1, 2)):
        scores.update(data.x, data.y)
    value = scores.compute()
    accepted(case)
    both, total = data.voxels().decisions()
    num, den = (both, total - both) if iou else (2 * both, total)
    with np.errstate(all="ignore"):
        truth = (
            num.sum(0) / den.sum(0)
            if pool == "batch"
            else np.nansum(num / den, 0) / (den > 0).sum(0)
        )
    error = (128 * PRECISION(data) * data.soft + 1e-14) * (1 + np.nan_to_num(np.abs(truth)) * 2)
    small = np.where(den.sum(0) > 0.1, error, np.where(np.isnan(truth), error, np.inf))
    within(case, "scores", value.numpy(), truth, small if pool == "batch" else error * 8, 1e300)


def second_derivative(case: Case) -> None:
    """A second derivative, which is refused."""
    x = torch.from_numpy(case.rng.standard_normal((1, 3, 5))).requires_grad_()
    y = torch.from_numpy(case.rng.integers(0, 3, (1, 5)))
    term = case.one(losses.Dice(), losses.CrossEntropy(), losses.GeneralizedDice())
    value = dice_core.torch.loss(x, y, term)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    case.refuse((RuntimeError,), "dice_core computes first derivatives only")
    torch.autograd.grad(grad.sum(), x)
    accepted(case)


CALLS: tuple[tuple[Callable[[Case], None], int], ...] = (
    (loss, 20),
    (loss_and_grad, 30),
    (statistics, 12),
    (gradient, 12),
    (score, 6),
    (precompile, 2),
    (absurd, 1),
    (torch_loss, 14),
    (torch_statistics, 8),
    (module, 10),
    (supervision, 2),
    (metric, 4),
    (second_derivative, 1),
)


# ---- running them ------------------------------------------------------------------------------


def call(seed: int, index: int) -> tuple[str, str]:
    """The outcome of one call, and what is wrong with it, if anything."""
    case = Case(seed, index)
    function = case.random.choices([f for f, _ in CALLS], [weight for _, weight in CALLS])[0]
    with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
        warnings.simplefilter("error")
        try:
            function(case)
            case.check_memory()
            outcome = "right" if not case.reasons else f"accepted: {case.reasons[0]}"
        except Skip as reason:
            outcome = f"accepted: {reason}"
        except AssertionError as error:
            return failed(case, function, seed, index, error)
        except Exception as error:
            try:
                outcome = refused(case, error)
                case.check_memory()
            except AssertionError as failure:
                return failed(case, function, seed, index, failure)
    return f"{function.__name__}: {outcome}", ""


def failed(case: Case, function: Any, seed: int, index: int, error: Exception) -> tuple[str, str]:
    """The outcome of a failed call, and how to repeat it."""
    text = str(error) or repr(error)
    details = "\n    ".join(case.text)
    return f"{function.__name__}: FAILED", (
        f"python -m tests.fuzz --seed {seed} --only {index}\n"
        f"  {function.__name__}: {text}\n    {details}"
    )


def calls(seed: int, indices: range) -> tuple[collections.Counter[str], list[str]]:
    """Counts by outcome, and failures."""
    torch.set_num_threads(2)
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for index in indices:
        outcome, failure = call(seed, index)
        counts[outcome] += 1
        if failure:
            failures.append(failure)
            if len(failures) > 100:
                break
    return counts, failures


def _calls(job: tuple[int, range]) -> tuple[collections.Counter[str], list[str]]:
    return calls(*job)


def main() -> int:
    """Runs the calls and prints counts by outcome; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="the index of the only call to make")
    options = parser.parse_args()
    if options.only is not None:
        outcome, failure = call(options.seed, options.only)
        print(failure or outcome)
        return bool(failure)
    start, counts, failures = time.monotonic(), collections.Counter[str](), []
    step = 500
    jobs = [(options.seed, range(i, min(i + step, options.n))) for i in range(0, options.n, step)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for some, wrong in pool.imap_unordered(_calls, jobs):
            counts += some
            failures += wrong
            for failure in wrong:
                print(failure, flush=True)
    total: collections.Counter[str] = collections.Counter()
    for outcome, count in counts.items():
        total[outcome.partition(": ")[2]] += count
    for outcome, count in sorted(total.items()):
        print(f"{count:9,}  {outcome}")
    for outcome, count in sorted(counts.items()):
        print(f"{count:9,}  {outcome}")
    seconds = time.monotonic() - start
    print(f"{sum(total.values()):,} calls with seed {options.seed} in {seconds:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
