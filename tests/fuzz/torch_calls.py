"""The functions, losses and metrics of dice_core.torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import torch
from compare import assert_bitwise_equal

import dice_core
import dice_core.torch
from dice_core import losses

from .arrays import array_of, nan_alike
from .cases import NAN, TV, Case, T, V
from .data import Data
from .judge import (
    FIELDS,
    Expected,
    Parts,
    accepted,
    assert_within,
    check_statistics,
    check_sums,
    range_of,
)
from .terms import (
    ACTIVATIONS,
    ARGUMENTS,
    GAMMAS,
    SUM_ARGUMENTS,
    DrawnTerm,
    class_weights,
    running_options,
    sum_options,
    term_or_options,
)


def torch_loss(case: Case) -> None:
    """`dice_core.torch.loss` and its backward pass, as arrays have it."""
    case.spoil([*ARGUMENTS, "inplace"])
    data = Data(case, "torch", ACTIVATIONS)
    arguments, parts = term_or_options(case, data)
    options = {
        "ignore_label": data.ignore_label, "activation": data.activation,
        **running_options(case, data, "torch"),
    }  # fmt: skip
    x, leaf, inplace = logits_for(case, data, case.may(0.8))
    before: Any = None if case.bad else x.detach().clone()
    value = dice_core.torch.loss(x, data.y, **arguments(), **options, **inplace)
    accepted(case)
    grad, upstream = check_torch(case, data, parts, value, leaf)
    if any(inplace.values()) and leaf is not None:
        fresh = before.requires_grad_()
        again = dice_core.torch.loss(fresh, data.y, **arguments(), **options)
        check_overwritten(x, value, grad, fresh, again, upstream)
    if case.may(0.3) and x is data.x:  # else sums are added in another order
        with torch.no_grad():
            arrays = dice_core.loss(data.x.detach(), data.y, **arguments(), **options)
        assert_bitwise_equal(np.asarray(arrays), value.detach().numpy(), what="torch and arrays")


def logits_for(case: Case, data: Data, differentiable: bool) -> tuple[Any, Any, dict[str, Any]]:
    """x, the leaf that its gradient reaches, if any, and `inplace` as an argument."""
    x = data.x
    value = case.value("inplace", False, False, False, True, True, 1, np.True_)
    inplace = {"inplace": value} if value is not False or case.may(0.2) else {}
    case.note(f"{inplace}")
    if not (isinstance(x, torch.Tensor) and x.is_floating_point() and differentiable):
        return x, None, inplace
    leaf = x.requires_grad_()
    if not inplace or inplace["inplace"] is False:
        return leaf, leaf, inplace
    kind = case.one(*["computed"] * 7, "leaf", "view of a leaf")
    if kind == "computed" and not case.bad:
        return leaf * 1, leaf, inplace
    if x.layout != torch.strided:  # torch has no view of it
        kind = "leaf"
    case.note(f"inplace: {kind}")
    case.refuse((ValueError, NotImplementedError), "inplace")
    return (leaf if kind != "view of a leaf" else leaf[...]), leaf, inplace


def check_torch(case: Case, data: Data, parts: Parts, value: Any, leaf: Any) -> tuple[Any, Any]:
    """Asserts that a loss of tensors and its gradient are right; returns the gradient, None without
    a leaf, and the incoming one.
    """
    upstream = case.rng.standard_normal(tuple(value.shape))
    if case.may(0.5):
        upstream = np.ones(tuple(value.shape)) * case.one(1, 65536.0)
    incoming = torch.as_tensor(np.asarray(upstream), dtype=value.dtype)
    upstream = incoming.numpy()
    if leaf is None:
        assert not value.requires_grad
        Expected(case, data, parts, upstream).check_loss(value.numpy())
        return None, incoming
    (grad,) = torch.autograd.grad(value, leaf, incoming)
    assert grad.dtype == leaf.dtype
    expected = Expected(case, data, parts, upstream)
    expected.check_gradient(grad)
    expected.check_loss(value.detach().numpy())
    return grad, incoming


def check_overwritten(
    x: torch.Tensor, value: Any, grad: Any, fresh: torch.Tensor, again: Any, upstream: Any
) -> None:
    """Asserts that x holds its gradient, that of a copy of it to the bit: the loss of `fresh`."""
    (expected,) = torch.autograd.grad(again, fresh, upstream)
    given, wanted = value.detach().numpy(), again.detach().numpy()
    if x.stride() == fresh.stride():  # else sums are added in another order
        assert_bitwise_equal(given, wanted, what="loss with inplace=True")
        bits = nan_alike(array_of(expected))
        assert_bitwise_equal(nan_alike(array_of(grad)), bits, what="gradient with inplace=True")
    bits = nan_alike(array_of(grad))
    assert_bitwise_equal(nan_alike(array_of(x)), bits, what="x overwritten")


def torch_statistics(case: Case) -> None:
    """`dice_core.torch.statistics` and the gradient of a random linear function of them."""
    case.spoil(SUM_ARGUMENTS)
    data = Data(case, "torch", ACTIVATIONS)
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
    check_statistics(case, detached)
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
    assert_within(case, "gradient", actual, truth, error, voxels.precision.out_max * 0.99)


MODULES = {  # and their terms, of compounds the first
    "DiceLoss": "Dice",
    "JaccardLoss": "Jaccard",
    "TverskyLoss": "Tversky",
    "FocalTverskyLoss": "FocalTversky",
    "GeneralizedDiceLoss": "GeneralizedDice",
    "DiceCELoss": "Dice",
    "DiceFocalLoss": "Dice",
}


def module(case: Case) -> None:
    """The modules of `dice_core.torch`."""
    case.spoil(
        [
            "inplace",
            *(n for n in ARGUMENTS if n not in ("term", "combined", "factor", "eps", "empty")),
        ]
    )
    data = Data(case, "torch", ACTIVATIONS[:4])
    name = case.one(*MODULES)
    kind = MODULES[name]
    shared = {"name": kind}
    drawn = DrawnTerm(case, data.classes, shared)
    given = {k: v for k, v in drawn.make.keywords.items() if k not in ("target_square", "empty")}
    parts: Parts = []
    if drawn.truth is not None:
        settings = {**drawn.truth.settings, "target_square": False, "empty": "perfect"}
        parts = [(1.0, oracle.Term(kind, settings))]
    compound = {"DiceCELoss": "ce", "DiceFocalLoss": "focal"}.get(name)
    if compound:
        extra, values = class_weights(case, f"{compound}_weight", data.classes)
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
            given["gamma"] = more["gamma"] = case.one(*GAMMAS)
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
    x, leaf, inplace = logits_for(case, data, True)
    before: Any = None if case.bad else x.detach().clone()
    criterion = getattr(dice_core.torch, name)(**given, **options, **inplace)
    assert repr(criterion)
    value = criterion(x, data.y)
    accepted(case)
    grad, upstream = check_torch(case, data, parts, value, leaf)
    if any(inplace.values()):
        fresh = before.requires_grad_()
        again = getattr(dice_core.torch, name)(**given, **options)(fresh, data.y)
        check_overwritten(x, value, grad, fresh, again, upstream)


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
    expected: list[Any] = [
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
    truth = sum([f * float(e) for f, e in zip(factors, expected, strict=True) if f])
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
    error = (128 * data.eps * data.soft + 1e-14) * (1 + np.nan_to_num(np.abs(truth)) * 2)
    small = np.where(den.sum(0) > 0.1, error, np.where(np.isnan(truth), error, np.inf))
    assert_within(
        case, "scores", value.numpy(), truth, small if pool == "batch" else error * 8, 1e300
    )


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
