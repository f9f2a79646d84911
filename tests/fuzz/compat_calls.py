"""The losses of dice_core.compat: any constructor arguments, and tensors of any kind.

Their values are compared with the libraries' in tests/test_compat_*.py, not here. A call gives a
value of the documented dtype and shape, and a finite gradient where the value is finite; or it is
refused. What may be refused, because of another argument for example, is a doubt: both are right.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import numpy as np
import torch
from compare import assert_bitwise_equal
from layouts import Array

import dice_core
from dice_core.compat import monai, nnunet, smp

from .arrays import FLOATS, INTEGERS, array_of, nan_alike, presented, tensor
from .cases import INTEGER, NAME, NAN, NUMBER, PAIR, TV, WEIGHT, WRONG, Case
from .judge import accepted
from .terms import BACKENDS

CLASSES: list[Any] = [
    kind
    for module in (monai, nnunet, smp)
    for kind in (getattr(module, name) for name in module.__all__)
    if inspect.isclass(kind)
]
REFUSALS = (*TV, AssertionError, NotImplementedError, dice_core.BackendError)
X_NAMES = ("x", "input", "net_output", "y_pred")
Y_NAMES = ("y", "target", "y_true", "labels")
DICE = (nnunet.SoftDiceLoss, nnunet.MemoryEfficientSoftDiceLoss)
TOLERATED = "single channel prediction|No mask value|Dim of input|Spatial size of input"

NUMBERS = {
    "smooth_nr": (1e-5, 0, 1, 0.5), "smooth_dr": (1e-5, 1, 0.5, 1e-3), "smooth": (1.0, 1e-5, 0, 2),
    "lambda_dice": (1.0, 0.5, 0), "lambda_ce": (1, 0.3), "lambda_focal": (1.0, 2),
    "gamma": (2.0, 1, 0, 0.5, 3), "alpha": (0.5, 0.3, 1), "beta": (0.5, 0.7, 0),
    "label_smoothing": (0.0, 0.1), "eps": (1e-7, 1e-3), "clip_tp": (None, 1e-3, 1, 2.5),
    "weight_ce": (1, 0.5, 0, 2), "weight_dice": (1, 0.5, 0, 2),
}  # fmt: skip
FLAGS = (
    "include_background", "to_onehot_y", "sigmoid", "softmax", "squared_pred", "jaccard", "batch",
    "soft_label", "batch_dice", "do_bg", "log_loss", "use_ignore_label",
)  # fmt: skip
OTHERS: dict[str, tuple[Any, ...]] = {
    "other_act": (None, None, torch.sigmoid, functools.partial(torch.softmax, dim=1)),
    "apply_nonlin": (
        None, torch.sigmoid, nnunet.softmax_helper_dim1, torch.nn.Softmax(1), torch.special.expit,
        torch.nn.functional.hardsigmoid,  # no part of a pass
    ),
    "reduction": ("mean", "mean", "sum", "none"),
    "w_type": ("square", "simple", "uniform"),
    "mode": (smp.BINARY_MODE, smp.MULTICLASS_MODE, smp.MULTICLASS_MODE, smp.MULTILABEL_MODE),
    "ignore_index": (None, 0, 1, 255, -1), "ignore_label": (None, 0, 1, 255, -1),
    "ddp": (False,), "from_logits": (True,), "dice_class": DICE,
    "backend": (None, None, *BACKENDS), "num_threads": (None, 1, 2, 7),
    "check_labels": (None, True, False), "inplace": (False, True),
}  # fmt: skip
FACTORS = ("weight_ce", "weight_dice")
NO_FLAGS: tuple[Any, ...] = ("yes", None, 2, [], [0], NAN, object(), PAIR, torch.ones(2), {}, "")
NO_CALLABLES: tuple[Any, ...] = ("softmax", 1, [], {}, object(), True)
NO_MAPPINGS: tuple[Any, ...] = (None, 1, "ab", [1], object(), len)
NO_CLASSES: tuple[Any, ...] = (None, "SoftDiceLoss", 1, torch.nn.Module, monai.DiceLoss, {}, [])


def compat(case: Case) -> None:
    """A loss of `dice_core.compat`."""
    kind = case.one(*CLASSES)
    tensors = [*inspect.signature(kind.forward).parameters][1:]
    case.spoil([*inspect.signature(kind).parameters, *tensors * 3])
    space = case.one((5,), (33,), (4, 3), (2, 3, 4))
    shape = (case.one(1, 2, 3), case.one(1, 2, 2, 3, 3, 4), *space)
    given = arguments(case, kind, shape)
    case.note(f"{kind.__module__}.{kind.__name__}(**{given})")
    x, *more = tensors_for(case, kind, given, shape, tensors)
    leaf = x if isinstance(x, torch.Tensor) and x.is_floating_point() else None
    known = leaf is not None and str(leaf.dtype).removeprefix("torch.") in FLOATS
    inplace = known and given.get("inplace") is True and not case.bad
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TOLERATED)
        criterion = kind(**given)
        assert repr(criterion)
        if leaf is not None:
            x = leaf.requires_grad_() * 1 if inplace else leaf.requires_grad_()
        before = x.detach().clone() if inplace else None
        value = criterion(x, *more)
        accepted(case)
        assert leaf is not None, "x is accepted"
        grad = check(case, kind, given, value, leaf)
        if before is not None:
            given["inplace"] = False
            again = kind(**given)(before.requires_grad_(), *more)
            if isinstance(again, torch.Tensor) and x.stride() == before.stride():
                (expected,) = torch.autograd.grad(again.sum(), before)
                for name, a, b in (("loss", value, again), ("gradient", grad, expected)):
                    actual, wanted = nan_alike(array_of(a)), nan_alike(array_of(b))
                    assert_bitwise_equal(actual, wanted, what=f"{name} with inplace=True")


def check(case: Case, kind: Any, given: dict[str, Any], value: Any, x: torch.Tensor) -> Any:
    """Asserts that a loss and its gradient, which is returned, are as documented."""
    if is_empty(given) and not isinstance(value, torch.Tensor) and value == 0:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = shape_of(kind, given, x)
    assert isinstance(value, torch.Tensor), f"loss: {type(value).__name__}, not a tensor"
    assert value.dtype == dtype, f"loss: {value.dtype}, not {dtype}"
    assert value.shape == shape, f"loss: shape {tuple(value.shape)}, not {shape}"
    (grad,) = torch.autograd.grad(value.sum(), x)
    assert grad.dtype == x.dtype, f"gradient: {grad.dtype}"
    assert grad.shape == x.shape, f"gradient: shape {tuple(grad.shape)}"
    if not value.isfinite().all():
        ignoring = any(given.get(name) is not None for name in ("ignore_index", "ignore_label"))
        assert ignoring or kind.__module__ == smp.__name__, f"loss: {value}"
        case.reasons.append("not finite")
    elif not grad.isfinite().all():
        assert kind is smp.TverskyLoss, "gradient: not finite where the loss is"
        case.reasons.append("not finite")
    return grad


def shape_of(kind: Any, given: dict[str, Any], x: torch.Tensor) -> tuple[int, ...]:
    """The documented shape of a loss."""
    if given.get("reduction") != "none":
        return ()
    samples, classes = x.shape[:2]
    classes -= classes > 1 and not is_on(given, "include_background", True)
    rows = () if is_on(given, "batch") else (samples,)
    if kind is monai.TverskyLoss:
        return (*rows, classes)
    if kind is monai.GeneralizedDiceLoss:
        return (samples if rows else 1, *[1] * (x.ndim - 1 if rows else x.ndim - 2))
    return (*rows, classes, *[1] * (x.ndim - 2))


def is_on(given: dict[str, Any], name: str, default: bool = False) -> bool:
    """Whether a flag is true, or anything that is like it."""
    value = given.get(name, default)
    return not isinstance(value, (np.ndarray, torch.Tensor)) and bool(value)


def is_empty(given: dict[str, Any]) -> bool:
    """Whether nothing is computed, since both factors are 0."""
    return all(type(given.get(name)) is int and given[name] == 0 for name in FACTORS)


# ---- constructor arguments -----------------------------------------------------------------------


def arguments(case: Case, kind: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of the constructor."""
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in case.wrong:
            given[name] = wrong(case, kind, name)
        elif parameter.default is parameter.empty or case.may(0.3):
            given[name] = valid(case, kind, name, shape, given)
    spoiled = bool(case.bad or case.doubts or case.wrong)
    if is_on(given, "batch_dice") and "ddp" not in case.wrong:  # there is no process group
        given["ddp"] = False
    if sum(is_on(given, name) for name in ("sigmoid", "softmax", "other_act")) > 1:
        if case.may(0.9) and not spoiled:
            del given[case.one(*(n for n in ("sigmoid", "other_act") if is_on(given, n)))]
        if sum(is_on(given, name) for name in ("sigmoid", "softmax", "other_act")) > 1:
            case.refuse(REFUSALS, "sigmoid")
    if is_empty(given) and spoiled:
        given["weight_ce"] = 1  # with a part that finds what is wrong
    for name in ("soft_label", "inplace"):
        if is_on(given, name):
            case.doubt(REFUSALS, name)
    if given.get("mode") == smp.BINARY_MODE:
        case.doubt(REFUSALS, "classes", "class_weights")
    if given.get("reduction") == "none" and kind in (monai.DiceCELoss, monai.DiceFocalLoss):
        case.refuse(REFUSALS, "reduction")
    if shape[1] == 1:
        names = ("do_bg", "net_output", "y_pred", "weight", "alpha", "class_weights", "classes")
        case.doubt(REFUSALS, *names)
    if given.get("backend") == "reference":
        case.doubt((dice_core.BackendError,), "backend")
    return given


def wrong(case: Case, kind: Any, name: str) -> Any:
    """An argument that must be refused, or may be."""
    case.wrong.discard(name)
    listed = {
        **dict.fromkeys(NUMBERS, NUMBER), **dict.fromkeys(("reduction", "w_type", "mode"), NAME),
        **dict.fromkeys(("ignore_index", "ignore_label"), INTEGER),
        **dict.fromkeys(("weight", "class_weights", "classes"), WEIGHT),
        "check_labels": [row for row in WRONG["inplace"] if row[0] is not None],
    }  # fmt: skip
    plain: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys((*FLAGS, "from_logits"), NO_FLAGS),
        **dict.fromkeys(("other_act", "apply_nonlin"), NO_CALLABLES),
        **dict.fromkeys(("soft_dice_kwargs", "ce_kwargs", "bce_kwargs"), NO_MAPPINGS),
        "dice_class": NO_CLASSES,
        "ddp": (False,),
    }
    if name in ("soft_dice_kwargs", "ce_kwargs") and case.may(0.7):
        inner = "smooth" if name == "soft_dice_kwargs" else case.one("reduction", "label_smoothing")
        value: Any = {inner: wrong(case, kind, inner)}
        return {**value, "ddp": False} if name == "soft_dice_kwargs" else value
    if name in plain:
        value = case.one(*plain[name])
    else:
        value, _ = case.one(*(WRONG | listed)[name])
    signed = name in (*FACTORS, "clip_tp") or (name == "gamma" and kind is smp.TverskyLoss)
    several = name == "alpha" and kind is monai.DiceFocalLoss
    unsure = name in ("weight", "class_weights", "classes", "ddp")
    (case.doubt if signed or several or unsure else case.refuse)(REFUSALS, name)
    return value


def valid(case: Case, kind: Any, name: str, shape: tuple[int, ...], given: dict[str, Any]) -> Any:
    """A valid argument, for logits of this shape and the arguments before it."""
    classes, rng = shape[1], case.rng
    kept = classes - bool(classes > 1 and not is_on(given, "include_background", True))
    if name == "alpha" and kind is monai.DiceFocalLoss and case.may(0.6):
        return case.one(None, [0.25] * kept, torch.full((kept,), 0.5))
    if name == "weight":
        count = classes if kind is monai.DiceCELoss else kept
        weight = torch.from_numpy(rng.random(count) + 0.1)
        if kind is monai.DiceCELoss:
            return case.one(None, weight, weight.float())
        if kind is monai.DiceFocalLoss and kept == 1:
            return case.one(None, 2.0, torch.tensor(0.5))
        return case.one(None, weight, weight.tolist(), 2.0, torch.tensor(0.5))
    if name == "classes":
        return case.one(None, [0], [classes - 1], [*range(classes)])
    if name == "class_weights":
        return case.one(None, (rng.random(classes) + 0.1).tolist(), rng.random(classes) + 0.1)
    if name == "soft_dice_kwargs":
        names = [n for n in ("batch_dice", "do_bg", "smooth") if case.may(0.4)]
        return {"ddp": False, **{n: valid(case, kind, n, shape, given) for n in names}}
    if name == "ce_kwargs":
        more = {"weight": torch.from_numpy(rng.random(classes) + 0.1)} if case.may(0.3) else {}
        return {**more, "reduction": case.one("mean", "sum"), "label_smoothing": case.one(0.0, 0.1)}
    if name == "bce_kwargs":
        size = (classes, *[1] * (len(shape) - 2))
        names = [n for n in ("weight", "pos_weight") if case.may(0.3)]
        return {n: torch.from_numpy(rng.random(size) + 0.1) for n in names}
    return case.one(*(NUMBERS.get(name) or OTHERS.get(name) or (True, False)))


# ---- tensors -------------------------------------------------------------------------------------


def tensors_for(
    case: Case, kind: Any, given: dict[str, Any], shape: tuple[int, ...], names: list[str]
) -> list[Any]:
    """The tensors of a call: logits, targets and perhaps a mask."""
    for name, general in zip(names, ("x", "y", "mask"), strict=False):
        if name in case.wrong:
            case.wrong.discard(name)
            case.wrong.add(general)
    own = given.get("apply_nonlin") is torch.nn.functional.hardsigmoid
    if own or is_on(given, "other_act") or (shape[1] == 1 and kind.__module__ == nnunet.__name__):
        case.wrong.discard("x")  # what the function does with it is not known
    active = ("sigmoid", "softmax", "other_act", "apply_nonlin")
    if any(is_on(given, name) for name in active) or kind.__module__ == smp.__name__:
        x = case.rng.standard_normal(shape) * case.one(1, 1, 4, 20)
    else:
        x = case.rng.random(shape)  # probabilities
    x = x.astype(FLOATS[case.one("float32", "float32", "float64", "float16", "bfloat16")])
    y, ignored = targets(case, kind, given, shape)
    masks = (
        [mask(case, shape)] if len(names) > 2 and (case.may(0.5) or "mask" in case.wrong) else []
    )
    if y.dtype != bool and case.may(0.08):
        y[(0,) * y.ndim] = 100
        case.note("y has 100")
        index = given.get("ignore_index")  # perhaps of that voxel
        unseen = masks or ignored or is_empty(given) or index is not None
        (case.doubt if unseen else case.refuse)(REFUSALS, *Y_NAMES)
    known = len(case.bad)
    arrays = [presented(case, a, name, "torch") for a, name in ((x, "x"), (y, "y"))]
    if len(case.bad) > known:  # such as more axes of size 1, which some losses accept
        del case.bad[known:]
        case.doubt(REFUSALS, *X_NAMES, *Y_NAMES)
    return [*arrays, *masks]


def targets(
    case: Case, kind: Any, given: dict[str, Any], shape: tuple[int, ...]
) -> tuple[Array, bool]:
    """Targets as this loss needs them, and whether an extra channel excludes voxels."""
    samples, classes, *space = shape
    mode, extra = given.get("mode"), is_on(given, "use_ignore_label")
    labels = classes > 1 and (
        is_on(given, "to_onehot_y")
        or kind is nnunet.DC_and_CE_loss
        or mode == smp.MULTICLASS_MODE
        or (kind in DICE and case.may(0.6))
    )
    ignored = given.get("ignore_index", given.get("ignore_label"))
    if labels:
        y = case.rng.integers(0, classes, (samples, 1, *space))
        dtype = np.dtype(case.one(*INTEGERS, "int64", "uint8", "float32"))
        if isinstance(ignored, int) and (ignored >= 0 or dtype.kind in "if") and case.may(0.5):
            dtype = np.dtype("int16") if dtype.kind == "i" else dtype
            y[case.rng.random(y.shape) < 0.3] = ignored
        if kind.__module__ == smp.__name__ or kind in DICE:
            y = y[:, 0] if case.may(0.5) else y
        return y.astype(dtype), False
    y = case.rng.integers(0, 2, (samples, classes + extra, *space))
    dtype = np.dtype(case.one("float32", "float64", "float16", "uint8", "int64", "bool"))
    free = kind in (*DICE, nnunet.DC_and_BCE_loss, monai.DiceLoss, monai.DiceCELoss)
    if free and dtype.kind == "f" and ignored is None and not is_on(given, "soft_label"):
        return case.rng.random(y.shape).astype(dtype), extra
    return y.astype(dtype), extra


def mask(case: Case, shape: tuple[int, ...]) -> Any:
    """A mask, perhaps a wrong one."""
    values = case.rng.integers(0, 2, (shape[0], 1, *shape[2:]))
    if "mask" in case.wrong:
        case.wrong.discard("mask")
        case.doubt(REFUSALS, "mask", "Mask", "loss_mask", *Y_NAMES)
        good = torch.from_numpy(values)
        return case.one(
            "mask", 1, [1], values, good * 2 + 1, good[:, :, :-1], good[:, [0, 0]], good[..., None],
            good.float().requires_grad_(), good.float() * NAN, good.to(torch.cfloat), good[0],
            good.to("meta"), good[[0] * (shape[0] + 1)],
        )  # fmt: skip
    return tensor(values.astype(case.one("bool", "uint8", "int64", "float32")))
