"""No release drifts: every backend, and the torch functions, give the stored values of `golden.py`.

The bounds are relative: to a sum, which adds up positive numbers; to 1 for a loss; to a gradient's
sum of magnitudes, or its largest number, for its digest.
"""

import json

import golden
import ml_dtypes
import numpy as np
import pytest
import torch
from compare import assert_close, kernel_rows

import dice_core
import dice_core.torch
from dice_core import losses

STORED = json.loads(golden.FILE.read_text())
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
ARITHMETIC = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-6, "bfloat16": 2e-6}
ROUNDING = {"float64": 0, "float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a gradient
SMALLEST = {"float64": 0, "float32": 0, "float16": 2.0**-25, "bfloat16": 0}  # half a subnormal

LEVELS = [row.name for row in kernel_rows()]
BACKENDS = [(dtype, name) for dtype in DTYPES for name in LEVELS]
BACKENDS += [(dtype, "reference") for dtype in DTYPES if dtype != "bfloat16"]  # NumPy has none
dtypes = pytest.mark.parametrize("dtype", DTYPES)
cases = pytest.mark.parametrize("name", golden.CASES)


def term_of(text):
    return eval(text, {name: getattr(losses, name) for name in losses.__all__})


def check_loss(value, stored, dtype):
    bound = ARITHMETIC[dtype]
    assert_close(value, stored["value"], rtol=bound, atol=bound, what="value")


def check_gradient(grad, stored, dtype):
    found = golden.digest(grad)
    each = ARITHMETIC[dtype] + ROUNDING[dtype]
    whole = each * stored["absolute"] + grad.size * SMALLEST[dtype]
    for what in ("absolute", "dot"):
        assert_close(found[what], stored[what], rtol=0, atol=whole, what=what)
    assert_close(found["squares"], stored["squares"], rtol=2 * each, what="squares")
    atol = ARITHMETIC[dtype] * stored["largest"] + SMALLEST[dtype]
    for what in ("largest", "at"):
        assert_close(found[what], stored[what], rtol=ROUNDING[dtype], atol=atol, what=what)


@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
@cases
def test_arrays(name, dtype, backend):
    case, stored = golden.CASES[name], STORED[name]
    assert case.checksum == stored["inputs"]
    x, y = case.x().astype(DTYPES[dtype]), case.y()
    sums = dice_core.statistics(x, y, **case.sums, backend=backend)
    assert_close(sums.array, stored["statistics"], rtol=ARITHMETIC[dtype], what="statistics")
    options = {key: case.sums[key] for key in ("activation", "ignore_label") if key in case.sums}
    for term in case.terms:
        value, grad = dice_core.loss_and_grad(
            x, y, term_of(term), **options, grad_loss=case.grad_loss, backend=backend
        )
        check_loss(value, stored[term], dtype)
        check_gradient(grad, stored[term], dtype)


@dtypes
@cases
def test_tensors(name, dtype):
    case, stored = golden.CASES[name], STORED[name]
    y = torch.from_numpy(case.y())
    options = {key: case.sums[key] for key in ("activation", "ignore_label") if key in case.sums}
    for term in case.terms:
        x = torch.from_numpy(case.x()).to(getattr(torch, dtype)).requires_grad_()
        value = dice_core.torch.loss(x, y, term_of(term), **options)
        value.backward(torch.tensor(case.grad_loss).to(value))
        check_loss(value.item(), stored[term], dtype)
        check_gradient(x.grad.double().numpy(), stored[term], dtype)


@cases
def test_the_inputs_are_exact_in_every_dtype(name):
    """So that all dtypes share the stored values."""
    case = golden.CASES[name]
    for dtype in DTYPES.values():
        assert (case.x().astype(dtype).astype(np.float64) == case.x()).all()


def test_the_file_lists_the_cases_and_every_loss():
    assert {name: ["inputs", "statistics", *case.terms] for name, case in golden.CASES.items()} == {
        name: list(entries) for name, entries in STORED.items()
    }
    used = " ".join(term for case in golden.CASES.values() for term in case.terms)
    assert all(f"{entry.term.__name__}(" in used for entry in losses.TERMS)


def numbers(tree, path=()):
    """The path of every number."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, (*path, key))
    else:
        yield path


def edited(tree, path):
    """A copy in which one number differs, by little more than the bound of float64."""
    if not path:
        return tree + 1e-11 * max(1, abs(tree)) if isinstance(tree, float) else tree + 1
    copy = tree.copy()
    copy[path[0]] = edited(tree[path[0]], path[1:])
    return copy


PATHS = list(numbers(STORED["small"]))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "/".join(map(str, path)))
def test_an_edited_number_is_found(monkeypatch, path):
    monkeypatch.setitem(STORED, "small", edited(STORED["small"], path))
    with pytest.raises(AssertionError):
        test_arrays("small", "float64", "reference")
