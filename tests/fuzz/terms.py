"""Losses with any settings, and the options of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import torch
from compare import kernel_rows

import dice_core
from dice_core import losses

from .cases import WRONG, Case, T, V
from .data import Data
from .judge import Parts

BACKENDS = (*(row.name for row in kernel_rows()), "reference")
ARGUMENTS = [
    "x", "y", "weight", "ignore_channel", "ignore_label", "smooth", "p", "reduction", "activation",
    "backend", "num_threads", "term", "combined", "factor", "pool", "absent", "divisor", "floor",
    "empty", "alpha", "gamma", "eps", "label_smoothing",
]  # fmt: skip
SUM_ARGUMENTS = [
    "x", "y", "p", "gamma", "binary_gamma", "ignore_label", "activation", "backend", "num_threads",
]  # fmt: skip
ACTIVATIONS = ("softmax", "softmax", "softmax", "sigmoid", "none")
REDUCTIONS = ("mean", "mean", "sum", "none", "classes", "batch")
POWERS = (1, 1, 1, 2, 2, 3, 4, np.int64(2), 5, 17)
GAMMAS = (0, 0.5, 1, 2, 2.0, 2.5, 3, 0.75, np.float32(1.5), 17)


@oracle.quiet
def class_weights(case: Case, name: str, classes: int) -> tuple[Any, list[float] | None]:
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


def ignored_channels(case: Case, classes: int) -> tuple[Any, Any]:
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


class DrawnTerm:
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

        given["weight"], values["weight"] = class_weights(case, "weight", classes)
        if "pos_weight" in defaults:
            given["pos_weight"], values["pos_weight"] = class_weights(case, "pos_weight", classes)
        reduction = shared.get("reduction", case.one(*REDUCTIONS))
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
            put("ignore_channel", *ignored_channels(case, classes))
        if overlap:
            put("smooth", *smoothing(case))
            p = shared.get("p", case.one(*POWERS))
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
                shared.get("gamma", case.one(*GAMMAS))
                if name != "FocalTversky"
                else case.one(*GAMMAS)
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


def term_or_sum(case: Case, classes: int) -> tuple[Callable[[], Any], Parts]:
    """A term or a sum of terms: a function that makes it, and its parts for the oracle."""
    count = case.one(1, 1, 1, 2, 2, 3) if "factor" not in case.wrong else 2
    shared: dict[str, Any] = {}
    if count > 1:
        shape = case.one(
            ("mean", None), ("sum", None), ("batch", None), ("none", "none"), ("classes", "none")
        )
        shared = {"reduction": shape[0], "p": case.one(*POWERS), "gamma": case.one(*GAMMAS)}
        if shape[1]:
            shared["pool"] = shape[1]
    drawn, factors = [], []
    for _ in range(count):
        drawn.append(DrawnTerm(case, classes, shared))
        factors.append(case.value("factor", 1, 0.5, 2, 1e-3, 0, np.float32(3), 100))
    case.note(f"factors {factors}")
    parts: Parts = []
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


def dice_options(case: Case, data: Data) -> tuple[dict[str, Any], Parts]:
    """The options of `loss` without a term, and the oracle's Dice."""
    given: dict[str, Any] = {}
    values: dict[str, Any] = {}
    given["weight"], values["weight"] = class_weights(case, "weight", data.classes)
    given["ignore_channel"], values["ignore_channel"] = ignored_channels(case, data.classes)
    given["smooth"], values["smooth"] = smoothing(case)
    given["p"] = values["p"] = case.value("p", *POWERS)
    given["reduction"] = values["reduction"] = case.value("reduction", *REDUCTIONS)
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


def term_or_options(case: Case, data: Data) -> tuple[Callable[[], dict[str, Any]], Parts]:
    """A term, or Dice with options: a function that gives the arguments, and the oracle's terms."""
    if "term" in case.wrong:
        value = case.value("term")
        return (lambda: {"term": value}), []
    if case.may(0.45):
        given, parts = dice_options(case, data)
        return (lambda: given), parts
    make, parts = term_or_sum(case, data.classes)
    extra: dict[str, Any] = {}
    if "combined" in case.wrong:
        name, value = case.one(
            ("weight", [1.0]), ("smooth", 1), ("p", 2), ("reduction", "sum"), ("ignore_channel", 0)
        )
        extra[name] = value
        case.refuse(T, name)
    return (lambda: {"term": make(), **extra}), parts


def sum_options(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `statistics`, and their values."""
    given = {
        "p": case.value("p", *POWERS),
        "gamma": case.value("gamma", None, *GAMMAS),
        "nll": case.one(False, True),
        "binary_gamma": case.value("binary_gamma", None, *GAMMAS),
        "target_square": case.one(False, True),
    }
    for name in [*given]:
        if not case.bad and case.may(0.5):
            del given[name]
    case.note(", ".join(f"{k}={v!r}" for k, v in given.items()))
    return given, dict(given)
