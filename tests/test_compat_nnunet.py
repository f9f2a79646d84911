"""compat.nnunet compared with nnU-Net."""

import ast
import copy
import datetime
import functools
import importlib
import importlib.util
import inspect
import itertools
import math
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from compare import assert_close
from peers import Random, Recorded, differentiated, example, one_hot, same, same_compiled
from peers import one_thread as one_thread
from torch import distributed, nn

from dice_core.compat import nnunet
from dice_core.compat.nnunet import (
    DC_and_BCE_loss,
    DC_and_CE_loss,
    MemoryEfficientSoftDiceLoss,
    SoftDiceLoss,
    softmax_helper_dim1,
)
from dice_core.torch import LinearHead

HAS_NNUNET = importlib.util.find_spec("nnunetv2") is not None
needs_nnunet = pytest.mark.skipif(not HAS_NNUNET, reason="nnunetv2 is not installed")
DICE = (MemoryEfficientSoftDiceLoss, SoftDiceLoss)
NONLINEARITIES = {
    "softmax": (softmax_helper_dim1, functools.partial(torch.softmax, dim=1), nn.Softmax(1)),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "none": (None,),
}
ROUNDED = 3e-6  # nnU-Net sums in float32


@functools.cache
def module(name, dtype=torch.float32):
    """nnU-Net's module of this name; or its source with float64 in place of float32."""
    theirs = importlib.import_module(f"nnunetv2.training.loss.{name}")
    if dtype == torch.float32:
        return theirs
    source = inspect.getsource(theirs)
    source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    other = types.ModuleType(f"float64.{name}")
    if name == "compound_losses":
        line = "from nnunetv2.training.loss.dice import "
        assert line in source
        source = source.replace(line, "from float64.dice import ")
        sys.modules["float64"] = types.ModuleType("float64")
        sys.modules["float64.dice"] = module("dice", dtype)
    exec(compile(source, theirs.__file__, "exec"), other.__dict__)
    for added in ("float64", "float64.dice"):
        sys.modules.pop(added, None)
    return other


def theirs(kind, dtype=torch.float32):
    """nnU-Net's loss of the same name."""
    name = "dice" if issubclass(kind, DICE) else "compound_losses"
    return getattr(module(name, dtype), kind.__name__)


def agree(kind, made, x, given, what=None):
    """Asserts agreement with nnU-Net: float64 up to rounding with its source converted to float64,
    float32 with the original.

    `made` are the arguments of the class, `given` those of its forward besides the logits.
    """
    what = f"{what}: {kind.__name__}, {made}, {given[0].dtype}, {tuple(x.shape)}"
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = kind(**copy.deepcopy(made))
    if "dice_class" in made:
        made = {**made, "dice_class": theirs(made["dice_class"], dtype)}
    other = theirs(kind, dtype)(**copy.deepcopy(made))
    rtol = 1e-10 if dtype == torch.float64 else ROUNDED
    same(lambda x: loss(x, *given), lambda x: other(x, *given), x, rtol, what)


# ---- values and gradients ------------------------------------------------------------------------


def dice_settings(some, kind=None):
    settings = {
        "batch_dice": some.of(True, False),
        "do_bg": some.of(True, False),
        "smooth": some.of(1.0, 1e-5, 0),
    }
    settings["ddp"] = some.of(False, settings["batch_dice"] is False)
    if kind is SoftDiceLoss:
        settings["clip_tp"] = some.of(None, 1.0, 3.0)
    return settings


def dice_target(some, x):
    """Labels, or a target like x, in a form that nnU-Net takes."""
    y = some.labels(x.shape)
    if some.of(True, False):
        y[y == x.shape[1] - 1] = 0  # an absent class
    kind = some.of("labels", "labels", "bare", "one-hot", "soft")
    dtype = some.of(torch.int16, torch.uint8, torch.int64, torch.float32, torch.float16)
    if kind == "soft":
        return some.uniform(*x.shape)
    if kind == "one-hot":
        return one_hot(y, x.shape[1]).to(some.of(torch.bool, dtype))
    return (y if kind == "labels" else y[:, 0]).to(dtype)


@needs_nnunet
@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_dice(kind, seed):
    some = Random(seed)
    for case in range(25):
        x = some.logits(some.shape(2, 3, 5))
        activation = some.of(*NONLINEARITIES)
        x = x.sigmoid() if activation == "none" else x
        y, mask = dice_target(some, x), None
        if some.of(True, False):
            mask = some.uniform(x.shape[0], 1, *x.shape[2:]) > some.of(0.4, 0.4, 1)
            mask = mask.to(some.of(torch.bool, torch.uint8, torch.float32, torch.float64))
        made = dice_settings(some, kind)
        made["apply_nonlin"] = some.of(*NONLINEARITIES[activation])
        agree(kind, made, x, (y, mask), case)


@needs_nnunet
@pytest.mark.parametrize("seed", range(4))
def test_dice_and_cross_entropy(seed):
    some = Random(seed)
    for case in range(25):
        x = some.logits(some.shape(2, 3, 5))
        y, classes = some.labels(x.shape), x.shape[1]
        ignore = some.of(None, None, 255, classes, -1, 1)
        entropy = {
            "weight": some.of(None, (some.uniform(classes) + 0.1).to(x.dtype)),
            "label_smoothing": some.of(0.0, 0.1),
            "reduction": some.of("mean", "sum"),
        }
        weights = {"weight_ce": some.of(1, 2, 0), "weight_dice": some.of(1, 0.5, -1)}
        if ignore is None:
            entropy["ignore_index"] = some.of(-100, 1)
        elif not 0 <= ignore < classes:
            y[some.uniform(*y.shape) < some.of(0.3, 0.3, 1.1)] = ignore
        kind = some.of(*DICE)
        made = {
            "soft_dice_kwargs": {**dice_settings(some, kind), "ddp": False},
            "ce_kwargs": entropy,
            **weights,
            "ignore_label": ignore,
            "dice_class": kind,
        }
        y = y.to(some.of(torch.int16, torch.int64, torch.float32))
        agree(DC_and_CE_loss, made, x, (y,), case)


@needs_nnunet
@pytest.mark.parametrize("seed", range(4))
def test_dice_and_binary_cross_entropy(seed):
    some = Random(seed)
    for case in range(25):
        x = some.logits(some.shape(1, 2, 3))
        samples, classes, *space = x.shape
        y, ignores = some.uniform(*x.shape) > 0.5, some.of(True, False)
        if ignores:
            ignored = some.uniform(samples, 1, *space) > some.of(0.6, 0.6, -1)
            y = torch.cat([y, ignored], 1)
        elif some.of(True, False):
            y = some.uniform(*x.shape)
        if y.dtype == torch.bool:
            dtypes = (torch.uint8, torch.int16, torch.float32, torch.int64)
            y = y.to(some.of(torch.bool, torch.bool, *dtypes))
        axes = (1,) * len(space)
        entropy = {
            name: some.of(None, some.uniform(*some.of((classes, *axes), (1, classes, *axes), (1,))))
            for name in ("weight", "pos_weight")
        }
        if not ignores:
            entropy["reduction"] = some.of("mean", "sum")
        kind = some.of(*DICE)
        settings = {**dice_settings(some, kind), "ddp": False}
        settings["do_bg"] |= classes == 1
        made = {
            "bce_kwargs": entropy,
            "soft_dice_kwargs": settings,
            "weight_ce": some.of(1, 2, 0),
            "weight_dice": some.of(1, 0.5, 0),
            "use_ignore_label": ignores,
            "dice_class": kind,
        }
        agree(DC_and_BCE_loss, made, x, (y,), case)


@needs_nnunet
def test_dice_of_one_channel():
    x, y = example(2, 1, 4, 5)
    for kind, target in itertools.product(DICE, (y, y[:, 0], y.bool(), y.float() / 2)):
        agree(kind, {"apply_nonlin": torch.sigmoid}, x, (target,))
        for nonlin in NONLINEARITIES["softmax"]:  # 1 everywhere
            agree(kind, {"apply_nonlin": nonlin}, x, (target,))


@needs_nnunet
def test_other_nonlinearities_are_applied_before_the_pass():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    for nonlin in (lambda x: torch.softmax(2 * x, 1), functools.partial(torch.softmax, dim=-1)):
        for kind in DICE:
            agree(kind, {"apply_nonlin": nonlin}, x, (y,))
        for kind, target in ((DC_and_CE_loss, y), (DC_and_BCE_loss, one_hot(y, 3))):
            ours, other = kind({}, {}), theirs(kind, torch.float64)({}, {})
            ours.dc.apply_nonlin = other.dc.apply_nonlin = nonlin  # not of the cross-entropy
            same(
                lambda x, f=ours, y=target: f(x, y),
                lambda x, f=other, y=target: f(x, y),
                x,
                1e-10,
                kind.__name__,
            )


@needs_nnunet
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    """Computed in float32; nnU-Net rounds probabilities to half precision."""
    x, y = example(2, 3, 4, 5)
    x = x.to(dtype)
    loss, other = (kind({}, {}) for kind in (DC_and_CE_loss, theirs(DC_and_CE_loss, torch.float64)))
    value, grad = differentiated(lambda x: loss(x, y), x)
    exact, exact_grad = differentiated(lambda x: other(x, y), x.double())
    assert value.dtype == torch.float32
    assert_close(value, exact, rtol=1e-6)
    assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


# ---- oddities ------------------------------------------------------------------------------------


@needs_nnunet
@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("smooth", [0, 1])
def test_dice_without_valid_voxels(kind, smooth):
    """-1, or without smoothing 0."""
    x, y = example(2, 3, 4, 5)
    made = {"apply_nonlin": softmax_helper_dim1, "smooth": smooth}
    agree(kind, made, x, (y, torch.zeros_like(y)))
    assert_close(kind(**made)(x, y, torch.zeros_like(y)), -smooth, rtol=0)


@needs_nnunet
@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
def test_denominators_are_at_least_1e_8(kind):
    x, y = torch.zeros(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, 4)
    for smooth in (0, 1e-9, 1e-8, 2e-8):  # 1e-8 itself has a derivative
        agree(kind, {"smooth": smooth}, x, (y,))


@needs_nnunet
def test_raised_true_positives_have_no_derivative():
    x, y = torch.full((1, 2, 4), 0.5, dtype=torch.float64), torch.tensor([[[0, 0, 0, 1]]])
    for clip_tp in (-1.0, 0.5, 1.0, 1.5, 2.0):  # I is 1.5 and 0.5, where it has one
        agree(SoftDiceLoss, {"clip_tp": clip_tp}, x, (y,))


@needs_nnunet
@pytest.mark.parametrize("entropy", [{}, {"weight": [1.0, 2, 4]}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize("index", [-100, 1])
def test_cross_entropy_without_voxels_is_nan(index, entropy):
    """Dice's gradient stays: an ignored voxel has none of a NaN loss."""
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    if "weight" in entropy:
        entropy = {"weight": torch.tensor(entropy["weight"], dtype=torch.float64)}
    made = {"soft_dice_kwargs": {}, "ce_kwargs": {**entropy, "ignore_index": index}}
    for weight_dice in (0, 1):
        if index == 1 or not weight_dice:
            made["weight_dice"] = weight_dice
            agree(DC_and_CE_loss, made, x, (torch.full_like(y, index),), weight_dice)
    assert DC_and_CE_loss(**made)(x[..., :0], y[..., :0]).isnan()


@needs_nnunet
@pytest.mark.parametrize("ignore_label", [None, 2])
def test_classes_without_weight(ignore_label):
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    made = {"soft_dice_kwargs": {}, "ce_kwargs": {"weight": weight}, "ignore_label": ignore_label}
    agree(DC_and_CE_loss, made, x, (y,))
    y[y == 0] = 1
    agree(DC_and_CE_loss, made, x, (torch.ones_like(y),))  # 0/0
    if ignore_label is not None:
        y[y == 0] = 1
        agree(DC_and_CE_loss, made, x, (y,))
        agree(DC_and_CE_loss, made, x, (torch.full_like(y, ignore_label),))


@needs_nnunet
def test_a_loss_without_parts_is_a_number():
    x, y = example(2, 3, 4, 5)
    for kind in (DC_and_CE_loss, theirs(DC_and_CE_loss)):
        value = kind({}, {}, 0, 0)(x, y)
        assert type(value) is int
        assert value == 0


@needs_nnunet
def test_arguments_of_the_caller_are_modified():
    for kind in (DC_and_CE_loss, theirs(DC_and_CE_loss)):
        entropy = {}
        assert kind({}, entropy, ignore_label=2).ce.ignore_index == 2
        assert entropy == {"ignore_index": 2}
    for kind in (DC_and_BCE_loss, theirs(DC_and_BCE_loss)):
        entropy = {}
        assert kind(entropy, {}, use_ignore_label=True).ce.reduction == "none"
        assert entropy == {"reduction": "none"}


@needs_nnunet
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite(special):
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    x[1, 0, 1, 1] = special
    for label in (0, 1):
        y[1, 0, 1, 1] = label
        agree(DC_and_CE_loss, {"soft_dice_kwargs": {}, "ce_kwargs": {}}, x, (y,), label)
        for kind in DICE:
            agree(kind, {"apply_nonlin": softmax_helper_dim1}, x, (y,), label)
            agree(kind, {"apply_nonlin": torch.sigmoid}, x, (y,), label)
        made = {"bce_kwargs": {}, "soft_dice_kwargs": {}}
        agree(DC_and_BCE_loss, made, x, (one_hot(y, 3),), label)


@needs_nnunet
def test_changed_settings_are_followed():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    ours, other = (
        kind({}, {"weight": torch.ones(3, dtype=torch.float64)})
        for kind in (DC_and_CE_loss, theirs(DC_and_CE_loss, torch.float64))
    )
    changes = (
        ("weight_ce", 2),
        ("weight_dice", 0.5),
        ("dc.do_bg", False),
        ("dc.smooth", 0.1),
        ("dc.clip_tp", 20.0),
        ("dc.apply_nonlin", torch.sigmoid),
        ("ce.label_smoothing", 0.1),
        ("ce.reduction", "sum"),
        ("ce.ignore_index", 2),
        ("ce.weight", torch.tensor([1.0, 2, 4], dtype=torch.float64)),
        ("ignore_label", 2),
    )
    for name, value in changes:
        for loss in (ours, other):
            *within, name = name.split(".")
            setattr(getattr(loss, within[0]) if within else loss, name, value)
            name = ".".join((*within, name))
        same(lambda x: ours(x, y), lambda x: other(x, y), x, 1e-10, name)
    ours.ce.weight[1] = other.ce.weight[1] = 7
    same(lambda x: ours(x, y), lambda x: other(x, y), x, 1e-10, "in place")
    ours.dc.smooth = -1.0
    for _ in range(2):
        with pytest.raises(ValueError, match="smooth must be finite and at least 0"):
            ours(x, y)
    ours.dc.smooth, ours.ce.reduction = 1.0, "none"
    with pytest.raises(NotImplementedError, match="ce_kwargs: reduction"):
        ours(x, y)


# ---- where nnU-Net is not followed ---------------------------------------------------------------


@needs_nnunet
def test_logits_of_ignored_voxels_have_no_effect():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    y[0, 0, 0] = 7
    loss, other = (
        kind({}, {}, ignore_label=7) for kind in (DC_and_CE_loss, theirs(DC_and_CE_loss))
    )
    value, grad = differentiated(lambda x: loss(x, y), x)
    x[0, :, 0] = math.nan
    assert other(x, y).isnan()
    value_then, grad_then = differentiated(lambda x: loss(x, y), x)
    assert_close(value_then, value, rtol=0)
    assert_close(grad_then, grad, rtol=0)


def test_cross_entropy_without_valid_voxels_is_a_tensor():
    x, y = example(2, 3, 4, 5)
    loss = DC_and_CE_loss({}, {}, weight_dice=0, ignore_label=7)
    value, grad = differentiated(lambda x: loss(x, torch.full_like(y, 7)), x)
    assert_close(value, 0, rtol=0)
    assert_close(grad, torch.zeros(x.shape), rtol=0)


def test_float64_is_summed_in_float64():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    value = SoftDiceLoss(softmax_helper_dim1)(x, y)
    assert value.dtype == torch.float64
    assert abs(value - value.float()) > 1e-10  # float32 cannot represent this value


@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
def test_arguments_of_a_wrong_kind(kind):
    x, y = example(2, 3, 4, 5)
    for name in ("batch_dice", "do_bg", "ddp"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            kind(**{name: "yes"})
    with pytest.raises(TypeError, match="apply_nonlin must be None or callable"):
        kind("softmax")
    loss = kind(softmax_helper_dim1)
    for wrong in (None, y.numpy(), y.to_sparse()):
        with pytest.raises(TypeError, match="x must be a"):
            loss(wrong, y)
        with pytest.raises(TypeError, match="y must be a"):
            loss(x, wrong)
    for wrong in ("mask", y.numpy()):
        with pytest.raises(TypeError, match="loss_mask must be a"):
            loss(x, y, wrong)
    with pytest.raises(ValueError, match="loss_mask is on meta but x is on cpu"):
        loss(x, y, y.to("meta"))


def test_arguments_of_compounds_of_a_wrong_kind():
    for wrong in (None, [1], "ab"):
        with pytest.raises(TypeError, match="ce_kwargs must be a dict"):
            DC_and_CE_loss({}, wrong)
        with pytest.raises(TypeError, match="soft_dice_kwargs must be a dict"):
            DC_and_CE_loss(wrong, {})
        with pytest.raises(TypeError, match="bce_kwargs must be a dict"):
            DC_and_BCE_loss(wrong, {})
    for name in ("weight_ce", "weight_dice"):
        for wrong in ("1", 1j, None, math.nan):
            with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
                DC_and_CE_loss({}, {}, **{name: wrong})
    with pytest.raises(TypeError, match="clip_tp must be a number"):
        SoftDiceLoss(clip_tp=[1, 2])


@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
def test_masks(kind):
    x, y = example(2, 3, 4, 5)
    loss, valid = kind(softmax_helper_dim1), y != 1
    targets = [y.to(dtype) for dtype in (torch.uint8, torch.int8, torch.int32, torch.float64)]
    for target in (*targets, one_hot(y, 3), one_hot(y, 3).bool(), one_hot(y, 3).half()):
        for mask in (valid, valid.to(torch.int32), valid.double()):
            assert_close(loss(x, target, loss_mask=mask), loss(x, y, valid), rtol=1e-6)
        for wrong in (0.5, 2, -1, math.nan):
            mask = valid.float()
            mask[1, 0, 2, 3] = wrong
            with pytest.raises(ValueError, match=r"outside .* the first is .*\(1, 0, 2, 3\)"):
                loss(x, target, loss_mask=mask)
    for mask in (
        torch.ones(2, 4, 5),
        torch.ones(2, 3, 4, 5),
        torch.ones(2, 1, 4, 5, requires_grad=True),
    ):
        with pytest.raises(NotImplementedError, match="loss_mask"):
            loss(x, y, loss_mask=mask)
    with pytest.raises(ValueError, match="loss_mask of shape"):
        loss(x, y, loss_mask=torch.ones(2, 1, 4, 3, dtype=torch.bool))
    y[0, 0, 0, 0] = -1  # whose voxel is valid
    with pytest.raises(ValueError, match="1 label outside"):
        loss(x, y, loss_mask=torch.ones(2, 1, 4, 5, dtype=torch.bool))
    for dtype in (torch.uint8, torch.int8):  # every number of which may be in the data
        y[0, 0, 0, 0] = label = torch.iinfo(dtype).max - 1
        with pytest.raises(ValueError, match=f"1 label outside .* the first is {label} "):
            loss(x, y.to(dtype), loss_mask=torch.ones(2, 1, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_masks_of_unsigned_labels(dtype):
    x, y = example(2, 3, 30)
    mask = torch.rand(2, 1, 30) < 0.5
    loss = SoftDiceLoss(softmax_helper_dim1)
    assert torch.equal(loss(x, y.to(dtype), mask), loss(x, y, mask))


def test_targets_that_do_not_fit():
    x, y = example(2, 3, 4, 5)
    losses = (SoftDiceLoss(softmax_helper_dim1), "y"), (DC_and_CE_loss({}, {}), "target")
    for loss, name in losses:
        for wrong in (y + 1, y.float() - 1):
            with pytest.raises(ValueError, match="outside"):
                loss(x, wrong)
        for wrong in (y[..., :3], y[:1], torch.cat([y, y], 1)):
            with pytest.raises(ValueError, match=f"^{name} must have shape"):
                loss(x, wrong)
        with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
            loss(x, y.float().requires_grad_())
    for target in (one_hot(y, 3), y[:, 0]):
        with pytest.raises(ValueError, match="target must be labels"):
            DC_and_CE_loss({}, {})(x, target)
        with pytest.raises(AssertionError, match="with an ignore_label target must be labels"):
            DC_and_CE_loss({}, {}, ignore_label=7)(x, target)
        loss, dice = DC_and_CE_loss({}, {}, 0, 2), SoftDiceLoss(softmax_helper_dim1)
        assert_close(loss(x, target), 2 * dice(x, target), rtol=1e-6)
    with pytest.raises(ValueError, match="net_output must have at least two channels"):
        DC_and_CE_loss({}, {})(x[:, :1], y)
    loss = DC_and_BCE_loss({}, {})
    for target in (y, torch.cat([y] * 4, 1)):
        with pytest.raises(ValueError, match="target must have shape"):
            loss(x, target)
    with pytest.raises(ValueError, match="outside"):
        loss(x, one_hot(y, 3) * 2)
    with pytest.raises(NotImplementedError, match="target requires grad"):
        loss(x, one_hot(y, 3).float().requires_grad_())


def test_settings_that_are_refused():
    x, y = example(2, 3, 4, 5)
    for kind, name in ((DC_and_CE_loss, "ce_kwargs"), (DC_and_BCE_loss, "bce_kwargs")):
        with pytest.raises(NotImplementedError, match=f"^{name}: reduction"):
            kind(**{"soft_dice_kwargs": {}, name: {"reduction": "none"}})
        for other in (functools.partial(SoftDiceLoss), nn.Identity):
            with pytest.raises(NotImplementedError, match="dice_class must be one of"):
                kind({}, {}, dice_class=other)
        for factor in ("weight_ce", "weight_dice"):
            with pytest.raises(TypeError, match=f"{factor} must be a number, got a tensor"):
                kind({}, {}, **{factor: torch.tensor(2.0)})
        with pytest.raises(ValueError, match="num_threads"):
            kind({}, {}, num_threads=0)
        with pytest.raises(ValueError, match="backend"):
            kind({}, {}, backend="foo")(x, y if kind is DC_and_CE_loss else one_hot(y, 3))
    for weight in (torch.ones(5), torch.ones(3), torch.ones(4, 5), torch.ones(2, 3, 4, 5)):
        loss = DC_and_BCE_loss({"pos_weight": weight}, {})
        with pytest.raises(NotImplementedError, match="pos_weight must be one number per class"):
            loss(x, one_hot(y, 3))
    with pytest.raises(TypeError, match="apply_nonlin"):
        DC_and_CE_loss({"apply_nonlin": None}, {})
    with pytest.raises(ValueError, match="weight must have 3 entries"):
        DC_and_CE_loss({}, {"weight": torch.ones(2)})(x, y)
    for kind in DICE:
        with pytest.raises(ValueError, match="smooth must be finite and at least 0"):
            kind(smooth=-1.0)
        with pytest.raises(TypeError, match="smooth must be a number, got a tensor"):
            kind(smooth=torch.tensor(1.0))
        with pytest.raises(ValueError, match="do_bg=False leaves no class"):  # nnU-Net's is NaN
            kind(torch.sigmoid, do_bg=False)(x[:, :1], y == 1)


@needs_nnunet
def test_nnunets_dice_classes_are_replaced_by_ours():
    for kind in DICE:
        loss = DC_and_CE_loss({"smooth": 2}, {}, dice_class=theirs(kind))
        assert type(loss.dc) is kind
        assert loss.dc.smooth == 2


@needs_nnunet
def test_signatures_are_nnunets():
    for kind in (*DICE, DC_and_CE_loss, DC_and_BCE_loss):
        ours, others = inspect.signature(kind), inspect.signature(theirs(kind))
        extras = ["backend", "num_threads", "check_labels", "inplace"]
        assert list(ours.parameters) == [*others.parameters, *extras]
        for name in extras:
            assert ours.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        for name, parameter in others.parameters.items():
            default, expected = ours.parameters[name].default, parameter.default
            assert getattr(default, "__name__", default) == getattr(expected, "__name__", expected)


@needs_nnunet
def test_softmax_helper_of_nnunet_is_part_of_the_pass():
    from nnunetv2.utilities.helpers import softmax_helper_dim1 as helper

    x, y = example(2, 3, 24, 24)
    x.requires_grad_()
    for nonlin in (helper, *NONLINEARITIES["softmax"]):
        with Recorded() as recorded:
            torch.autograd.grad(SoftDiceLoss(nonlin)(x, y.to(torch.uint8)), x)
        assert recorded.large(x) == 1


# ---- as modules ----------------------------------------------------------------------------------


def losses_of_all_kinds():
    weight = torch.tensor([1.0, 2, 4])
    return (
        SoftDiceLoss(nn.Softmax(1), clip_tp=1.0),
        DC_and_CE_loss({"do_bg": False}, {"weight": weight}, ignore_label=2),
        DC_and_BCE_loss(
            {"pos_weight": weight.reshape(3, 1, 1)}, {"batch_dice": True, "ddp": False}
        ),
    )


def test_state_copies_and_pickles():
    x, y = example(2, 3, 4, 5)
    for loss, target in zip(losses_of_all_kinds(), (y, y, one_hot(y, 3)), strict=True):
        value = loss(x, target)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
            assert_close(other(x, target), value, rtol=0)
    assert list(losses_of_all_kinds()[1].state_dict()) == ["ce.weight"]
    assert list(losses_of_all_kinds()[2].state_dict()) == ["ce.pos_weight"]


def test_only_the_gradient_has_the_size_of_the_logits():
    x, y = example(2, 3, 24, 24)
    x.requires_grad_()
    regions = torch.cat([one_hot(y, 3), y == 1], 1).bool()
    targets = (y.to(torch.uint8), y.to(torch.uint8), regions)
    made = (*losses_of_all_kinds()[:2], DC_and_BCE_loss({}, {}, use_ignore_label=True))
    for loss, target in zip(made, targets, strict=True):
        with Recorded() as recorded:
            torch.autograd.grad(loss(x, target), x)
        assert recorded.large(x) == 1


def test_compiled_whole():
    x, y = example(2, 3, 4, 5)
    dense, valid = one_hot(y, 3), y != 1
    for loss, target in (
        *zip(losses_of_all_kinds(), (y, y, dense), strict=True),
        (MemoryEfficientSoftDiceLoss(torch.sigmoid), dense.float()),
        (DC_and_CE_loss({}, {"ignore_index": 1, "label_smoothing": 0.1}), y),
        (DC_and_BCE_loss({}, {}, use_ignore_label=True), torch.cat([dense, y == 1], 1)),
    ):
        same_compiled(loss, x, target)
    for mask in (valid, valid.float()):
        loss = SoftDiceLoss(softmax_helper_dim1)
        same_compiled(lambda x, y, f=loss, mask=mask: f(x, y, mask), x, y)


# ---- ranks ---------------------------------------------------------------------------------------


def batch_losses(dice, compound, ddp, weight_ce):
    """The losses of two modules, with targets for the logits of `of_rank`."""
    y = torch.randint(3, (4, 1, 5), generator=torch.Generator().manual_seed(0))
    settings = {"batch_dice": True, "ddp": ddp}
    entropy = {"weight": torch.tensor([1.0, 2, 4], dtype=torch.float64)}
    kind = dice.MemoryEfficientSoftDiceLoss
    yield dice.SoftDiceLoss(softmax_helper_dim1, clip_tp=2.0, **settings), y
    yield compound.DC_and_CE_loss(settings, entropy, weight_ce, ignore_label=1, dice_class=kind), y
    yield compound.DC_and_BCE_loss({}, settings, weight_ce), one_hot(y, 3)


def of_rank(rank, path):
    """One of two ranks, each with half of the samples."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=100),
    )
    try:
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        half = slice(2 * rank, 2 * rank + 2)
        ours = functools.partial(batch_losses, nnunet, nnunet)
        # Each rank's loss is that of the whole batch, and its gradient that of both ranks' sum: the
        # mean that DDP takes is the loss's.
        for (loss, y), (alone, _) in zip(ours(True, 0), ours(False, 0), strict=True):
            value, grad = differentiated(lambda x, f=loss, y=y: f(x, y[half]), x[half])
            whole, whole_grad = differentiated(lambda x, f=alone, y=y: f(x, y), x)
            assert_close(value, whole, rtol=1e-12)
            assert_close(grad, 2 * whole_grad[half], rtol=1e-10, atol=1e-14)
        if HAS_NNUNET:
            modules = (module(name, torch.float64) for name in ("dice", "compound_losses"))
            others = batch_losses(*modules, True, 1)
            for (loss, y), (other, _) in zip(ours(True, 1), others, strict=True):
                same(
                    lambda x, f=loss, y=y: f(x, y[half]),
                    lambda x, f=other, y=y: f(x, y[half]),
                    x[half],
                    1e-10,
                    type(loss).__name__,
                )
    finally:
        distributed.destroy_process_group()


def test_batch_dice_over_ranks(tmp_path):
    path = str(tmp_path / "store")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_compat_nnunet\n"
        "assert not [name for name in sys.modules if name.startswith('nnunetv2')]\n"
        f"test_compat_nnunet.of_rank(1, {path!r})\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        of_rank(0, path)
    finally:
        _, errors = other.communicate(timeout=100)
    assert other.returncode == 0, errors


def test_batch_dice_over_ranks_needs_a_process_group():
    x, y = example(2, 3, 4, 5)
    for loss in (
        SoftDiceLoss(softmax_helper_dim1, batch_dice=True),
        DC_and_CE_loss({"batch_dice": True}, {}),
    ):
        with pytest.raises(ValueError, match="Default process group has not been initialized"):
            loss(x, y)


# ---- the output of a fused head ------------------------------------------------------------------

SETTINGS = [{}, {"batch_dice": True}, {"do_bg": False}, {"smooth": 0.5}]


def of_head_and_of_logits(criterion, features, conv, y):
    """The loss and gradients of a head's output, and of the convolution's logits."""
    found = []
    for of_head in (True, False):
        x = features.clone().requires_grad_()
        conv.zero_grad()
        output = LinearHead(conv.train())(x) if of_head else conv(x)
        value = criterion(output, y)
        value.backward()
        grads = [x.grad, *(p.grad.clone() for p in conv.parameters())]
        found.append((value.detach(), grads))
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
def test_the_output_of_a_head(settings, regions, ignore_label):
    torch.manual_seed(0)
    conv, features = nn.Conv2d(5, 3, 1).double(), torch.randn(2, 5, 6, 7).double()
    y = torch.randint(3 if ignore_label is None else 4, (2, 1, 6, 7))
    dice = {"ddp": False, **settings}
    if regions:
        criterion = DC_and_BCE_loss({}, dice, use_ignore_label=ignore_label is not None)
        extra = [y == 3] if ignore_label is not None else []
        y = torch.cat([y == 0, y == 1, y == 2, *extra], 1)
    else:
        weight = torch.tensor([1.0, 2.0, 3.0]).double()
        criterion = DC_and_CE_loss(dice, {"weight": weight}, ignore_label=ignore_label)
    (value, grads), (expected, others) = of_head_and_of_logits(criterion, features, conv, y)
    assert_close(value, expected, rtol=1e-13)
    for grad, other in zip(grads, others, strict=True):
        assert_close(grad, other, rtol=1e-10, atol=1e-16)


def test_the_output_of_a_head_that_ce_and_dice_read_apart():
    """With an ignore_index of CE that is a class there are two passes."""
    conv, features = nn.Conv2d(5, 3, 1).double(), torch.randn(2, 5, 6, 7).double()
    criterion = DC_and_CE_loss({"ddp": False}, {"ignore_index": 1})
    y = torch.randint(3, (2, 1, 6, 7))
    (value, grads), (expected, others) = of_head_and_of_logits(criterion, features, conv, y)
    assert_close(value, expected, rtol=1e-13)
    for grad, other in zip(grads, others, strict=True):
        assert_close(grad, other, rtol=1e-10, atol=1e-16)


def test_outputs_of_a_head_that_are_refused():
    features, y = torch.randn(2, 5, 6, 7), torch.zeros(2, 1, 6, 7)
    criterion = DC_and_CE_loss({"ddp": False}, {})
    with pytest.raises(TypeError, match="features, weight and bias of a LinearHead"):
        criterion((features, y), y)
    with pytest.raises(ValueError, match="weight takes 4 channels"):
        criterion((features, torch.ones(3, 4), None), y)
    criterion.dc.apply_nonlin = torch.tanh
    with pytest.raises(NotImplementedError, match="apply_nonlin that is part of the pass"):
        criterion((features, torch.ones(3, 5), None), y)


# ---- the trainer ---------------------------------------------------------------------------------


def stand_in():
    """A module of nnU-Net's _build_loss, as it is installed, without what its trainer imports."""
    found = importlib.util.find_spec("nnunetv2.training.nnUNetTrainer")
    path = f"{found.submodule_search_locations[0]}/nnUNetTrainer.py"
    with open(path) as text:
        (trainer,) = (
            node
            for node in ast.parse(text.read()).body
            if isinstance(node, ast.ClassDef) and node.name == "nnUNetTrainer"
        )
    trainer.body = [each for each in trainer.body if getattr(each, "name", "") == "_build_loss"]
    module = types.ModuleType("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    exec(
        "import numpy as np\n"
        "import torch\n"
        "from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss\n"
        "from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper\n"
        "from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss\n",
        module.__dict__,
    )
    exec(compile(ast.Module([trainer], []), path, "exec"), module.__dict__)
    return module


@pytest.fixture
def trainers(monkeypatch):
    """nnU-Net's trainer, or what builds its loss, and dice_core's."""
    module = stand_in()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for cached in (nnunet.trainer, nnunet.fused_head_trainer):
        cached.cache_clear()
    yield module.nnUNetTrainer, nnunet.nnUNetTrainerDiceCore
    for cached in (nnunet.trainer, nnunet.fused_head_trainer):
        cached.cache_clear()


def built(kind, *, regions=False, ignore_label=None, scales=3, ddp=False, compiles=False):
    trainer = kind.__new__(kind)
    vars(trainer).update(
        label_manager=types.SimpleNamespace(has_regions=regions, ignore_label=ignore_label),
        configuration_manager=types.SimpleNamespace(batch_dice=True),
        is_ddp=ddp,
        enable_deep_supervision=scales > 0,
        _do_i_compile=lambda: compiles,
        _get_deep_supervision_scales=lambda: [[1 / 2**i] for i in range(scales)],
    )
    return trainer._build_loss()


@needs_nnunet
@pytest.mark.parametrize("scales", [0, 3])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_trainer(trainers, regions, ignore_label, scales):
    theirs, ours = trainers
    assert issubclass(ours, theirs)
    assert ours.__name__ == "nnUNetTrainerDiceCore"
    assert nnunet.nnUNetTrainerDiceCore is ours
    settings = {"regions": regions, "ignore_label": ignore_label, "scales": scales}
    for ddp, compiles in itertools.product((False, True), repeat=2):
        loss = built(ours, **settings, ddp=ddp, compiles=compiles)
        other = built(theirs, **settings, ddp=ddp, compiles=compiles)
        if scales:
            assert type(loss) is type(other)
            assert_close(loss.weight_factors, other.weight_factors, rtol=0)
            loss, other = loss.loss, other.loss
        assert type(loss) is (DC_and_BCE_loss if regions else DC_and_CE_loss)
        assert type(loss.dc) is MemoryEfficientSoftDiceLoss
        assert loss.dc.ddp == other.dc.ddp == ddp
    loss, other = built(ours, **settings), built(theirs, **settings)
    outputs, targets = [], []
    for side in (8, 4, 2):
        x, y = example(2, 3, side, side)
        if ignore_label is not None:
            y[0, :, :2] = 3
        if regions:
            extra = [y == 3] if ignore_label is not None else []
            y = torch.cat([one_hot(y, 3).bool(), *extra], 1)
        outputs.append(x)
        targets.append(y if regions else y.short())
    if not scales:
        outputs, targets = outputs[0], targets[0]
    assert_close(loss(outputs, targets), other(outputs, targets), rtol=1e-6)


@needs_nnunet
def test_trainer_of_a_single_scale(trainers):
    """nnU-Net normalises its weight as 0/0."""
    with pytest.warns(RuntimeWarning, match="invalid value"):
        loss = built(trainers[1], scales=1)
    x, y = example(2, 3, 4, 5)
    assert_close(loss([x], [y]), loss.loss(x, y), rtol=0)


class Decoder(nn.Module):
    """As nnU-Net's networks have it: a list of outputs, or with one scale its only one."""

    def __init__(self):
        super().__init__()
        self.seg_layers = nn.ModuleList(nn.Conv2d(4, 3, 1) for _ in range(2))

    def forward(self, x):
        return [self.seg_layers[1](x), self.seg_layers[0](x[..., ::2, ::2])]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.decoder = nn.Conv2d(1, 4, 3, padding=1), Decoder()

    def forward(self, x):
        return self.decoder(self.body(x))


@needs_nnunet
def test_trainer_with_a_fused_head(trainers):
    theirs, ours = trainers
    theirs.build_network_architecture = staticmethod(lambda kind: kind())
    kind = nnunet.nnUNetTrainerDiceCoreFusedHead
    assert issubclass(kind, ours)
    assert kind.__name__ == "nnUNetTrainerDiceCoreFusedHead"
    asked = inspect.signature(theirs.build_network_architecture)  # nnU-Net reads it
    assert inspect.signature(kind.build_network_architecture) == asked
    net, other = kind.build_network_architecture(UNet), UNet()
    other.load_state_dict(net.state_dict())  # a checkpoint of one is one of the other
    image = torch.randn(2, 1, 8, 8)
    y = torch.randint(3, (2, 1, 8, 8))
    targets = [y, y[..., ::2, ::2]]
    fused, loss = built(kind, scales=2), built(ours, scales=2)
    value, expected = fused(net(image), targets), loss(other(image), targets)
    assert_close(value.detach(), expected.detach(), rtol=1e-5)
    value.backward()
    expected.backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)
    net.eval()
    with torch.no_grad():  # as in validation and prediction
        assert_close(fused(net(image), targets), loss(other.eval()(image), targets), rtol=1e-5)
    with pytest.raises(NotImplementedError, match=r"decoder\.seg_layers, got Sequential"):
        kind.build_network_architecture(nn.Sequential)


def test_trainer_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    for name in [name for name in sys.modules if name.startswith("nnunetv2.")]:
        monkeypatch.setitem(sys.modules, name, None)
    nnunet.trainer.cache_clear()
    with pytest.raises(ImportError, match=r"cannot be imported .*; pip install nnunetv2"):
        from dice_core.compat.nnunet import nnUNetTrainerDiceCore  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'nnUNetTrainer'"):
        nnunet.nnUNetTrainer  # noqa: B018
