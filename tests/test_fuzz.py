"""The fuzzer: a thousand of its calls, its oracle, and that it finds faults."""

import itertools
import math
import warnings

import naive
import numpy as np
import oracle
import pytest
import torch
from compare import assert_close
from fuzz import array_calls, compat_calls, run, torch_calls

import dice_core
from dice_core import losses
from dice_core.compat import monai
from dice_core.torch import functional

CALLS = 1000


def test_calls():
    """Every call is right or refused as documented; few cannot be compared."""
    counts, failures = run.calls(1, range(CALLS))
    assert not failures, "\n\n".join(failures[:5])
    share = dict.fromkeys(("right", "refused", "accepted"), 0.0)
    for outcome, count in counts.items():
        share[outcome.split(": ")[1]] += count / CALLS
    assert share["right"] > 0.4
    assert share["refused"] > 0.25
    assert share["accepted"] < 0.1
    sensitive = sum(count for name, count in counts.items() if name.endswith("sensitive"))
    assert sensitive < 0.03 * CALLS


def test_a_call_is_a_function_of_seed_and_index():
    first = [run.call(5, index) for index in range(20)]
    assert first == [run.call(5, index) for index in range(20)]


# ---- faults are found ----------------------------------------------------------------------------


def test_faults_are_found(monkeypatch, fault):
    """Each fault makes some of a few hundred calls fail, and the report says how to repeat it."""
    name = fault(monkeypatch)
    monkeypatch.setattr(run, "CALLS", ((getattr(array_calls, name), 1),))
    for index in range(300):
        outcome, failure = run.call(2, index)
        if failure:
            assert outcome.endswith("FAILED")
            assert f"--seed 2 --only {index}" in failure
            return
    raise AssertionError("not found")


def _changed(name, change):
    """A fault: `change` of the function's results and arguments."""

    def patch(monkeypatch):
        original = getattr(dice_core, name)

        def wrapped(x, y, *args, **options):
            return change(original, x, y, *args, **options)

        monkeypatch.setattr(dice_core, name, wrapped)
        return name

    return patch


def _without_last_voxel(original, x, y, *args, **options):
    """A voxel is dropped."""
    stats = original(x, y, *args, **options)
    stats.array[2] = np.maximum(stats.array[2] - 1, 0)
    return stats


def _wrong_sign(original, x, y, *args, **options):
    value, grad = original(x, y, *args, **options)
    grad[:, -1] *= -1
    return value, grad


def _any_label(original, x, y, *args, **options):
    try:
        return original(x, y, *args, **options)
    except ValueError as error:
        if not str(error).startswith("y has"):
            raise
        return np.float32(0.5)


def _ignores_smooth(original, x, y, *args, **options):
    options.pop("smooth", None)
    return original(x, y, *args, **options)


def _modifies_y(original, x, y, *args, **options):
    value = original(x, y, *args, **options)
    if isinstance(y, np.ndarray) and y.size and y.flags.writeable:
        y.reshape(-1)[-1:] = 0
        y[(-1,) * y.ndim] = 1 - y[(-1,) * y.ndim]
    return value


def _swaps_weights(original, x, y, *args, **options):
    weight = options.get("weight")
    if isinstance(weight, (list, tuple)):
        options["weight"] = weight[::-1]
    return original(x, y, *args, **options)


def _warns(original, x, y, *args, **options):
    if y.ndim > 4:
        warnings.warn("leaked", UserWarning, stacklevel=1)
    return original(x, y, *args, **options)


def _raw_error(original, x, y, *args, **options):
    x.shape  # noqa: B018 -- an AttributeError for a list
    return original(x, y, *args, **options)


FAULTS = {
    "a voxel dropped": _changed("statistics", _without_last_voxel),
    "a sign": _changed("loss_and_grad", _wrong_sign),
    "an out-of-range label accepted": _changed("loss", _any_label),
    "an argument ignored": _changed("loss", _ignores_smooth),
    "an input modified": _changed("loss", _modifies_y),
    "weights swapped": _changed("loss", _swaps_weights),
    "a warning": _changed("loss", _warns),
    "a raw AttributeError": _changed("loss", _raw_error),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS)
def fault(request):
    return request.param


def _fails(monkeypatch, function):
    """Whether some of a few hundred calls of this function fail."""
    monkeypatch.setattr(run, "CALLS", ((function, 1),))
    return any(run.call(2, index)[1] for index in range(300))


def test_a_copy_in_place_of_overwritten_logits_is_found(monkeypatch):
    monkeypatch.setattr(functional, "_overwritten", lambda x, version: x.detach().clone())
    assert _fails(monkeypatch, torch_calls.torch_loss)


@pytest.mark.parametrize(
    "change",
    [lambda value: value.half(), lambda value: value[None], lambda value: value * math.nan],
)
def test_a_wrong_result_of_compat_is_found(monkeypatch, change):
    original = monai.evaluate
    monkeypatch.setattr(monai, "evaluate", lambda *given: change(original(*given)))
    assert _fails(monkeypatch, compat_calls.compat)


# ---- the oracle ----------------------------------------------------------------------------------

MORE = {
    "plain": {},
    "powers": {"p": 3, "gamma": 1.5},
    "all": {"p": 2, "gamma": 2, "nll": True, "binary_gamma": 1.5, "target_square": True},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize(
    ("activation", "channels", "soft"),
    [
        *itertools.product(("softmax", "sigmoid", "none"), [3], [False, True]),
        ("softmax", 1, False),  # two classes
        ("sigmoid", 1, True),
        ("none", 1, True),
    ],
)
def test_the_oracle_s_sums_and_gradients_are_the_naive_code_s(activation, channels, soft, more):
    rng = np.random.default_rng(0)
    x = (
        rng.random((2, channels, 7))
        if activation == "none"
        else rng.standard_normal((2, channels, 7))
    )
    y = rng.random(x.shape) if soft else rng.integers(0, max(2, channels), (2, 1, 7))
    if soft:
        y[rng.random(x.shape) < 0.3] = 1
    options = {"ignore_label": 1, "activation": activation, **more}
    tensor = torch.tensor(x, requires_grad=True)
    expected = naive.statistics(tensor, torch.tensor(y), **options)
    defaults = {"p": 1, "gamma": None, "nll": False, "binary_gamma": None, "target_square": False}
    voxels = oracle.Voxels(
        x.astype(oracle.Real),
        y.astype(oracle.Real),
        "float64",
        {**defaults, **options, "soft": soft},
    )
    sums, bounds = voxels.sums()
    for (name, value), truth in zip(sums.items(), expected, strict=True):
        assert_close(value, truth.detach(), rtol=1e-13, atol=1e-14, what=name)
        assert (bounds[name] <= 1e-12 * (1 + np.abs(value))).all()
    cotangent = {
        name: rng.standard_normal(row.shape).astype(oracle.Real) for name, row in sums.items()
    }
    of_logits = {name: row for name, row in cotangent.items() if name in oracle.OF_LOGITS}
    total = sum(
        (truth * torch.tensor(np.asarray(row, float))).sum()
        for truth, row in zip(expected, cotangent.values(), strict=True)
    )
    total.backward()
    grad, error = voxels.gradient(of_logits, {name: 0 * row for name, row in of_logits.items()})
    assert_close(grad, tensor.grad, rtol=1e-12, atol=1e-13, what="gradient")
    assert (error <= 1e-11).all()


def test_the_oracle_s_losses_by_hand():
    """A sample, two classes."""
    sums = {
        "I": [3, 1],
        "P": [4, 2],
        "Y": [4, 3],
        "H": [2, 6],
        "L": [9, 5],
        "B+": [1, 2],
        "B-": [3, 4],
    }
    rows = {name: np.array([row], oracle.Real) for name, row in sums.items()}
    for name, settings, value in (
        ("Dice", {}, (0.25 + 0.6) / 2),
        ("Dice", {"weight": [2, 1], "divisor": "weights"}, (2 * 0.25 + 0.6) / 3),
        ("Dice", {"ignore_channel": 1}, 0.25 / 2),
        ("Dice", {"smooth": (0, 1)}, (1 - 6 / 9 + 1 - 2 / 6) / 2),
        ("Dice", {"pool": "classes", "weight": [1, 2]}, 1 - (6 + 4) / (8 + 10)),
        ("Dice", {"floor": 10}, (1 - 6 / 10 + 1 - 2 / 10) / 2),
        ("Jaccard", {}, (1 - 3 / 5 + 1 - 1 / 4) / 2),
        ("Tversky", {"alpha": 1, "beta": 0}, (1 - 3 / 4 + 1 - 1 / 2) / 2),
        ("FocalTversky", {"alpha": 1, "beta": 0, "gamma": 2, "of_mean": True}, (3 / 8) ** 2),
        ("LogDice", {}, -(math.log(0.75) + math.log(0.4)) / 2),
        ("LogCoshDice", {}, (math.log(math.cosh(0.25)) + math.log(math.cosh(0.6))) / 2),
        ("GeneralizedDice", {}, 1 - 2 * (3 / 16 + 1 / 9) / (8 / 16 + 5 / 9)),
        ("MCC", {"ignore_channel": 1}, (1 - (3 * 7 - 16) / math.sqrt(4 * 4 * 3 * 3)) / 2),
        ("CrossEntropy", {"weight": [1, 2]}, 14 / 10),
        ("CrossEntropy", {"label_smoothing": 0.5}, (0.5 * 8 + 0.25 * 14) / 7),
        ("Focal", {}, 8 / 7),
        ("BinaryCrossEntropy", {"ignore_channel": 0, "weight": [5, 2]}, 2 * 6 / 7),
        ("SigmoidFocal", {"alpha": 0.25}, (0.25 * 3 + 0.75 * 7) / 14),
    ):
        actual = oracle.value_only([(1.0, oracle.Term(name, settings))], rows)
        assert_close(np.asarray(actual, float), value, rtol=1e-14, what=f"{name} {settings}")


def test_the_oracle_knows_every_term_and_setting():
    assert set(oracle.DEFAULTS) == {entry.term.__name__ for entry in losses.TERMS}
    for entry in losses.TERMS:
        term = entry.term()
        for name, value in oracle.DEFAULTS[entry.term.__name__].items():
            assert getattr(term, name) == value or (value is None and getattr(term, name) is None)
