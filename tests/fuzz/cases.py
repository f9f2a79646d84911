"""Wrong arguments of every kind, and the arguments of one call, of which some are wrong."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from layouts import Array

from dice_core import losses

NAN, INF = float("nan"), float("inf")
T, V, TV = (TypeError,), (ValueError,), (TypeError, ValueError)


class Skip(Exception):
    """Nothing to compare, for a reason that is counted."""


PAIR = np.array([1, 2])
Wrong = list[tuple[Any, tuple[type, ...]]]  # values, and what they raise
NUMBER: Wrong = [  # of finite numbers from 0
    (-1, V), (NAN, V), (INF, V), (-INF, V), (10**400, V), (-1e-300, V), ("1", T), (b"1", T),
    (True, T), (1j, T), ([1, 2, 3, 4], TV), (np.array([1.0, 2]), T), ({}, T), (object(), T),
    (len, T), (int, T),
]  # fmt: skip
INTEGER: Wrong = [
    (True, T), (1.5, T), (1.0, T), ("2", T), (b"2", T), (NAN, T), (1j, T), ({}, T), (object(), T),
    (np.float32(1), T), (np.bool_(True), T), (len, T),
]  # fmt: skip
NAME: Wrong = [
    (None, V),
    (1, V),
    ("average", V),
    (b"mean", V),
    (["mean"], V),
    (object(), V),
    ("", V),
    ({}, V),
]
WEIGHT: Wrong = [
    ("uniform", T), (["1", "2"], T), ({0: 1}, T), ([1, [2], 3], T), (1j, T), (np.array([1j]), T),
    ([1, None], T), (object(), T), ({1, 2}, T), (b"12", T), (1.0, V), ([], V), (np.ones((2, 2)), V),
    ([1.0] * 77, V), (np.ones(2, "M8[s]"), T), (torch.ones(77), V), (len, T),
    (torch.ones(2, dtype=torch.cfloat), T),
]  # fmt: skip
WRONG: dict[str, Wrong] = {
    "p": [*INTEGER, (0, V), (-1, V), (2**31, V), (10**400, V), (None, T), ([1], T), (PAIR, T)],
    "ignore_label": [*INTEGER, ([0], T), (PAIR, T), (10**400, V), (-(10**400), V)],
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
    "inplace": [
        (None, T), ("yes", T), (2, T), (-1, T), (1.0, T), (NAN, T), ([], T), ([True], T), (PAIR, T),
        (object(), T), (len, T), (np.int64(1), T), (torch.ones(()), T),
    ],
    "term": [(losses.Dice, T), ("dice", T), (1, T), ([], T), (object(), T), (len, T), ({}, T)],
    "statistics": [("sums", T), (None, T), (np.ones((3, 1, 2)), T), (1, T), ([], T)],
}  # fmt: skip


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
        self.doubts: list[Bad] = []
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

    def doubt(self, types: tuple[type, ...], *names: str) -> None:
        """The call may be refused."""
        self.doubts.append(Bad(types, *names))

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
