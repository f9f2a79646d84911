"""Whether a call was refused rightly, and whether sums, losses, gradients and scores are right."""

from __future__ import annotations

import linecache
import pickle
import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from compare import assert_bitwise_equal
from layouts import Array

import dice_core

from .arrays import FLOATS, array_of
from .cases import Case
from .data import Data

Parts = list[tuple[float, oracle.Term]]  # a loss: factors and terms


def refused(case: Case, error: BaseException) -> str:
    """The outcome of a refused call; AssertionError if it should not have been, or not so."""
    kind, text = type(error), str(error)
    reasons = case.bad + case.doubts
    if not reasons:
        raise AssertionError(f"refused a valid call: {kind.__name__}: {text}") from error
    if isinstance(error, MemoryError):
        assert any(MemoryError in bad.types for bad in case.bad), "MemoryError"
        return "refused: MemoryError"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    fits = any(
        kind in bad.types and any(re.search(rf"\b{re.escape(name)}\b", text) for name in bad.names)
        for bad in reasons
    )
    if not (fits and is_ours(error) and line.startswith("raise ")):
        raise AssertionError(
            f"refused with {kind.__name__}: {text!r} from {frame.filename}:{frame.lineno} "
            f"{line!r}, expected {reasons}"
        ) from error
    return f"refused: {kind.__name__}"


def is_ours(error: BaseException) -> bool:
    """Whether dice_core has raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(Path(dice_core.__file__).parent)


def accepted(case: Case) -> None:
    """Asserts that the call was valid."""
    assert not case.bad, f"accepted, expected {case.bad}"


def empty_is_nan(term: oracle.Term) -> bool:
    """Whether its score of a class that is neither there nor predicted is NaN."""
    return term.settings.get("empty") == "nan"


def divides_by_0(term: oracle.Term) -> bool:
    """Whether its score of such a class is smooth/0."""
    smooth = term.settings.get("smooth", 0)
    above, below = smooth if isinstance(smooth, tuple) else (smooth, smooth)
    return above > 1e3 * below


@oracle.quiet
def assert_within(
    case: Case, what: str, actual: Any, truth: Array, error: Array, limit: float
) -> None:
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
        assert_within(
            case, FIELDS[name], actual, truth, bounds[name] + 1e-300, range_of(data.dtype)
        )


class Expected:
    """The truth about a loss: of the terms `parts`, with an incoming gradient `upstream`."""

    @oracle.quiet
    def __init__(self, case: Case, data: Data, parts: Parts, upstream: Any = 1.0) -> None:
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
                data.eps,
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
        assert_within(case, "loss", value, t.value, error, max(limit, 1e-300))

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
        doubtful: Array = np.asarray(t.sensitive_sums.any(1))
        if doubtful.any():
            case.reasons.append("sensitive")
            error = np.where(doubtful[:, None, None], np.inf, error)
        small = np.abs(truth) < min(1e30, p.out_max / 8)
        both = small & np.isinf(error) & np.isfinite(truth)
        factors = [np.abs(row).max(initial=0) for row in (self.upstream, *self.weights())]
        both &= max(factors) < 1e30
        smallest = 1e-300 if data.dtype == "float64" else 1e-37
        if any(divides_by_0(term) for _, term in self.parts):
            smallest = smallest**0.5  # the derivative of smooth/P is divided by the square of P
        sums = np.abs(self.sums["P"])
        lost = ((sums > 0) & (sums < smallest)).any()
        if lost and any(empty_is_nan(term) or divides_by_0(term) for _, term in self.parts):
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
        assert_within(case, "gradient", actual, truth, error, p.out_max * 0.99)


@oracle.quiet
def check_statistics(case: Case, stats: Any) -> None:
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
    assert_within(case, "pooled", np.asarray(pooled.array), truth, error, 1e300)
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


@oracle.quiet
def check_score(case: Case, data: Data, result: Any, pool: str) -> None:
    """Asserts that Dice and IoU are right."""
    both, total = data.voxels().decisions()
    if pool == "batch":
        both, total = both.sum(0, keepdims=True), total.sum(0, keepdims=True)
    eps = 64 * data.eps * data.soft + 1e-15
    union = total - both
    for name, num, den in (("dice", 2 * both, total), ("iou", both, union)):
        truth = np.where(den == 0, np.nan, num / np.where(den == 0, 1, den))
        error = eps * (
            np.abs(truth) + np.where(den == 0, 0, (num + den) / np.where(den == 0, 1, den))
        )
        assert_within(case, name, getattr(result, name), truth, np.nan_to_num(error), 1e300)
