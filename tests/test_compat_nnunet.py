"""nnU-Net's losses as dice_core computes them, against nnU-Net's own and against the formulas."""

import ast
import copy
import datetime
import functools
import importlib
import importlib.util
import inspect
import itertools
import pickle
import random
import subprocess
import sys
import types
from pathlib import Path

import naive
import pytest
import torch
from compare import assert_close
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dice_core.compat import nnunet
from dice_core.compat.nnunet import (
    DC_and_BCE_loss,
    DC_and_CE_loss,
    MemoryEfficientSoftDiceLoss,
    SoftDiceLoss,
)

HAS_NNUNET = importlib.util.find_spec("nnunetv2") is not None
needs_nnunet = pytest.mark.skipif(not HAS_NNUNET, reason="nnunetv2 is not installed")
DICE = (MemoryEfficientSoftDiceLoss, SoftDiceLoss)
# nnU-Net adds in float32, of float64 logits too.
ROUNDED = 1e-6


def softmax_helper_dim1(x):
    return torch.softmax(x, 1)


NONLINEARITIES = {
    "softmax": (softmax_helper_dim1, functools.partial(torch.softmax, dim=1), nn.Softmax(1)),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "none": (None,),
}
SOFTMAX, SIGMOID = (NONLINEARITIES[name][0] for name in ("softmax", "sigmoid"))


def theirs(ours):
    """nnU-Net's loss of the same name."""
    module = "dice" if issubclass(ours, DICE) else "compound_losses"
    return getattr(importlib.import_module(f"nnunetv2.training.loss.{module}"), ours.__name__)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For what is this small, several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Random(random.Random):
    """Choices, shapes and tensors of one seed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def of(self, *choices):
        return self.choice(choices)

    def shape(self, *channels):
        return (self.randint(1, 3), self.of(*channels), *self.of((7,), (3, 12), (2, 3, 2)))

    def logits(self, shape):
        return torch.randn(shape, generator=self.torch, dtype=self.of(torch.float32, torch.float64))

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.torch)

    def labels(self, shape):
        return torch.randint(shape[1], (shape[0], 1, *shape[2:]), generator=self.torch)


def one_hot(y, classes):
    return (y == torch.arange(classes).reshape(1, -1, *(1,) * (y.ndim - 2))).to(torch.uint8)


def differentiated(function, x):
    """The loss, which has no axes, and its gradient."""
    x = x.detach().clone().requires_grad_()
    value = function(x)
    assert type(value) is torch.Tensor
    assert value.shape == ()
    (grad,) = torch.autograd.grad(value * 3.0, x)
    assert grad.dtype == x.dtype
    return value.detach(), grad / 3


def same(ours, others, x, rtol, what):
    """Value and gradient, in x's dtype, of two functions of x."""
    (value, grad), (other, other_grad) = differentiated(ours, x), differentiated(others, x)
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32), what
    assert_close(value, other, rtol=rtol, atol=rtol, what=what)
    scale = float(other_grad.abs().max())
    assert_close(grad, other_grad, rtol=0, atol=rtol * scale + 1e-30, what=f"gradient, {what}")


def agree(ours, formula, x, arguments, what):
    """With the formula in float64, and with nnU-Net in its own precision.

    `ours` is a class or its name's, `arguments` what it is made of and what its forward takes.
    """
    kind, made, given = ours, *arguments
    exact = 1e-10 if x.dtype == torch.float64 else 1e-6
    loss = kind(**copy.deepcopy(made))
    same(lambda x: loss(x, *given), lambda x: formula(x.double()), x, exact, what)
    if HAS_NNUNET:
        if "dice_class" in made:
            made = {**made, "dice_class": theirs(made["dice_class"])}
        other = theirs(kind)(**copy.deepcopy(made))
        same(lambda x: loss(x, *given), lambda x: other(x, *given), x, 3 * ROUNDED, what)


def sums(x, y, mask=None, **options):
    """Of labels (N, 1, *) or a target like x, counted where the mask is not 0."""
    y = one_hot(y, x.shape[1]) if y.shape != x.shape else y
    if mask is not None:
        y = torch.where(mask != 0, y.double(), -5)
    return naive.statistics(x, y, ignore_label=-5, **options)


def dice(i, p, t, *, batch_dice, do_bg, smooth, clip_tp=None):
    if batch_dice:
        i, p, t = (row.sum(0, keepdim=True) for row in (i, p, t))
    raised = i if clip_tp is None else i.clamp(min=clip_tp)
    p, t = p + raised - i, t + raised - i
    q = (2 * raised + smooth) / (p + t + smooth).clamp(min=1e-8)
    return -(q if do_bg else q[:, 1:]).mean()


def dice_settings(some):
    return {
        "batch_dice": some.of(True, False),
        "do_bg": some.of(True, False),
        "smooth": some.of(1.0, 1e-5, 0),
    }


def dice_target(some, shape):
    y = some.labels(shape)
    if some.of(True, False):
        y[y == shape[1] - 1] = 0  # a class that is not there
    kind = some.of("labels", "labels", "bare", "one-hot", "soft")
    dtypes = (torch.int16, torch.uint8, torch.int64, torch.float32, torch.float16)
    if kind == "labels":
        return y, y.to(some.of(*dtypes))
    if kind == "bare":
        return y, y[:, 0].to(some.of(*dtypes))
    dense = one_hot(y, shape[1]) if kind == "one-hot" else some.uniform(*shape)
    return dense, dense.to(some.of(torch.bool, *dtypes)) if kind == "one-hot" else dense


@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_dice(kind, seed):
    some = Random(seed)
    for case in range(25):
        shape = some.shape(2, 3, 5)
        activation = some.of(*NONLINEARITIES)
        x = some.logits(shape)
        x = x.sigmoid() if activation == "none" else x
        plain, y = dice_target(some, shape)
        mask = some.of(None, (some.uniform(shape[0], 1, *shape[2:]) > 0.4))
        settings = dice_settings(some)
        if kind is SoftDiceLoss:
            settings["clip_tp"] = some.of(None, 1.0, 3.0)
        if mask is not None:
            mask = mask.to(some.of(torch.bool, torch.uint8, torch.float32, torch.float64))
        what = f"{case}: {activation}, {y.dtype}, {tuple(y.shape)}, {settings}"
        made = {
            **settings,
            "apply_nonlin": some.of(*NONLINEARITIES[activation]),
            "ddp": some.of(False, settings["batch_dice"] is False),
        }

        def formula(x, activation=activation, plain=plain, mask=mask, settings=settings):
            return dice(*sums(x, plain, mask, activation=activation)[:3], **settings)

        agree(kind, formula, x, (made, (y, mask)), what)


@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("smooth", [0, 1])
def test_dice_of_nothing(kind, smooth):
    """Nothing counted, and nothing there: -1, or without smoothing 0."""
    x, y = torch.randn(2, 3, 4, 5), torch.ones(2, 1, 4, 5, dtype=torch.int64)
    made = {"apply_nonlin": SOFTMAX, "smooth": smooth}
    agree(kind, lambda x: -smooth + 0 * x.sum(), x, (made, (y, torch.zeros_like(y))), f"{smooth}")


def test_dice_of_one_channel():
    x = torch.randn(2, 1, 4, 5)
    y = torch.randint(2, (2, 1, 4, 5))
    for kind, target in itertools.product(DICE, (y, y[:, 0], y.bool(), y.float() / 2)):
        dense = target.reshape(x.shape)
        agree(
            kind,
            lambda x, dense=dense: dice(
                *sums(x, dense, activation="sigmoid")[:3], batch_dice=False, do_bg=True, smooth=1
            ),
            x,
            ({"apply_nonlin": SIGMOID}, (target,)),
            f"{kind.__name__}, {target.dtype}",
        )
    with pytest.raises(ValueError, match="do_bg=False leaves no class"):  # nnU-Net's is NaN
        SoftDiceLoss(SIGMOID, do_bg=False)(x, y)
    with pytest.raises(ValueError, match="softmax of a single channel"):  # nnU-Net's is constant
        SoftDiceLoss(SOFTMAX)(x, y)


def test_other_nonlinearities_come_first():
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(3, (2, 1, 4, 5))
    for nonlin in (lambda x: torch.softmax(2 * x, 1), functools.partial(torch.softmax, dim=-1)):
        made = {"apply_nonlin": nonlin}
        for kind in DICE:
            agree(
                kind,
                lambda x, nonlin=nonlin: dice(
                    *sums(nonlin(x), y, activation="none")[:3],
                    batch_dice=False,
                    do_bg=True,
                    smooth=1,
                ),
                x,
                (made, (y,)),
                "a callable",
            )


@pytest.mark.parametrize("seed", range(4))
def test_dice_and_cross_entropy(seed):
    some = Random(seed)
    for case in range(30):
        shape = some.shape(2, 3, 5)
        classes = shape[1]
        x, y = some.logits(shape), some.labels(shape)
        ignore = some.of(None, None, 255, classes, -1, 1)
        if ignore is not None and not 0 <= ignore < classes:
            y[some.uniform(*y.shape) < some.of(0.3, 0.3, 1.1)] = ignore
        mask = None if ignore is None else y != ignore
        settings = dice_settings(some)
        weights = {"weight_ce": some.of(1, 2, 0), "weight_dice": some.of(1, 0.5, 0, -1)}
        entropy = {
            "weight": some.of(None, some.uniform(classes) + 0.1),
            "label_smoothing": some.of(0.0, 0.1),
            "reduction": some.of("mean", "sum"),
        }
        if not entropy["label_smoothing"] and ignore is None:
            entropy["ignore_index"] = some.of(-100, 1)
        nothing = mask is not None and not mask.any()
        if not weights["weight_dice"] and (nothing or not weights["weight_ce"]):
            continue  # nnU-Net's is an int: test_the_loss_is_a_tensor
        if entropy["weight"] is not None:
            entropy["weight"] = entropy["weight"].to(x.dtype)
        made = {
            "soft_dice_kwargs": {**settings, "ddp": False},
            "ce_kwargs": entropy,
            **weights,
            "ignore_label": ignore,
            "dice_class": some.of(*DICE),
        }
        dtype = some.of(torch.int16, torch.int64, torch.float32)
        what = f"{case}: {made}"

        def formula(
            x, y=y, mask=mask, settings=settings, entropy=entropy, weights=weights, ignore=ignore
        ):
            out = naive.statistics(x, y, ignore_label=ignore, gamma=0, smoothing=True)
            counted = out if ignore is not None else None
            index = entropy.get("ignore_index")
            if counted is None and index is not None:
                counted = naive.statistics(x, y, ignore_label=index, gamma=0, smoothing=True)
            counted = out if counted is None else counted
            w = torch.ones(x.shape[1]) if entropy["weight"] is None else entropy["weight"]
            e = entropy["label_smoothing"]
            value = (1 - e) * (w * counted[3]).sum() + e / x.shape[1] * (w * counted[4]).sum()
            if entropy["reduction"] == "mean":
                value = value / (w * counted[2]).sum().clamp(min=1e-30)
            return (
                weights["weight_dice"] * dice(*out[:3], **settings) + weights["weight_ce"] * value
            )

        agree(DC_and_CE_loss, formula, x, (made, (y.to(dtype),)), what)


@pytest.mark.parametrize("seed", range(4))
def test_dice_and_binary_cross_entropy(seed):
    some = Random(seed)
    for case in range(25):
        shape = some.shape(1, 2, 3)
        samples, classes, *space = shape
        x = some.logits(shape)
        regions = some.uniform(*shape) > 0.5
        mask, target = None, regions
        if some.of(True, False):
            mask = some.uniform(samples, 1, *space) < some.of(0.6, 0.6, -1)
            target = torch.cat([regions, ~mask], 1)
        elif some.of(True, False):
            regions = target = some.uniform(*shape)
        if not target.is_floating_point():
            target = target.to(
                some.of(torch.bool, torch.uint8, torch.int16, torch.float32, torch.int64)
            )
        settings = {**dice_settings(some)}
        settings["do_bg"] |= classes == 1
        weights = {"weight_ce": some.of(1, 2, 0), "weight_dice": some.of(1, 0.5, 0)}
        axes = (1,) * len(space)
        entropy = {
            name: some.of(None, some.uniform(*some.of((classes, *axes), (1, classes, *axes), (1,))))
            for name in ("weight", "pos_weight")
        }
        if mask is None:
            entropy["reduction"] = some.of("mean", "sum")
        made = {
            "bce_kwargs": entropy,
            "soft_dice_kwargs": {**settings, "ddp": False},
            **weights,
            "use_ignore_label": mask is not None,
            "dice_class": some.of(*DICE),
        }

        def formula(
            x, regions=regions, mask=mask, settings=settings, entropy=entropy, weights=weights
        ):
            out = sums(x, regions, mask, activation="sigmoid", binary_gamma=0)
            w, u = (
                1 if entropy[name] is None else entropy[name].reshape(-1)
                for name in ("weight", "pos_weight")
            )
            value = (w * (u * out[3] + out[4])).sum()
            if mask is not None:
                value = value / mask.sum().clamp(min=1e-8)
            elif entropy["reduction"] == "mean":
                value = value / x.numel()
            return (
                weights["weight_dice"] * dice(*out[:3], **settings) + weights["weight_ce"] * value
            )

        what = f"{case}: {made}, {target.dtype}"
        agree(DC_and_BCE_loss, formula, x, (made, (target,)), what)


def example(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x, torch.randint(shape[1], (shape[0], 1, *shape[2:]), generator=generator)


# Where nnU-Net is not followed.


def test_callers_arguments_are_not_written_to():
    entropy = {}
    assert DC_and_CE_loss({}, entropy, ignore_label=2).ce.ignore_index == 2
    DC_and_BCE_loss(entropy, {}, use_ignore_label=True)
    assert entropy == {}


def test_the_loss_is_a_tensor():
    x, y = example(2, 3, 4, 5)
    for weights in ({"weight_ce": 0}, {"ignore_label": 2}):
        loss = DC_and_CE_loss({}, {}, weight_dice=0, **weights)
        value, grad = differentiated(lambda x, loss=loss: loss(x, torch.full_like(y, 2)), x)
        assert_close(value, 0, rtol=0)
        assert_close(grad, torch.zeros(x.shape), rtol=0)


def test_cross_entropy_alone_ignores_its_index():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    y[0, :, 1:] = -100
    loss = DC_and_CE_loss({}, {}, weight_dice=0)
    same(lambda x: loss(x, y), lambda x: nn.functional.cross_entropy(x, y[:, 0]), x, 1e-12, "alone")
    with pytest.raises(ValueError, match="outside"):
        DC_and_CE_loss({}, {})(x, y)


def test_cross_entropy_of_nothing_is_0():
    x, y = example(2, 3, 4, 5)
    loss = DC_and_CE_loss({}, {"ignore_index": 1}, weight_dice=0)
    for target in (torch.ones_like(y), one_hot(torch.ones_like(y), 3)):
        value, grad = differentiated(lambda x, target=target: loss(x, target), x)
        assert_close(value, 0, rtol=0)
        assert_close(grad, torch.zeros(x.shape), rtol=0)


@pytest.mark.parametrize("weights", [(1, 1), (2, 0)])
@pytest.mark.parametrize("index", [-100, 1])
def test_one_hot_target_is_its_labels(weights, index):
    """nnU-Net's cross-entropy reads channel 0 as labels."""
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    loss = DC_and_CE_loss(
        {}, {"weight": torch.tensor([1.0, 2, 4]), "ignore_index": index}, *weights
    )
    for target in (one_hot(y, 3).float(), one_hot(y, 3).bool(), y[:, 0]):
        same(lambda x, t=target: loss(x, t), lambda x: loss(x, y), x, 1e-12, f"{target.dtype}")


def test_float64_is_summed_in_float64():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    value = SoftDiceLoss(SOFTMAX)(x, y)
    assert value.dtype == torch.float64
    assert abs(value - value.float()) > 1e-10  # float32 has no such value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    x, y = example(2, 3, 4, 5)
    x = x.to(dtype)
    loss = DC_and_CE_loss({"ddp": False, "batch_dice": True}, {})
    value, grad = differentiated(lambda x: loss(x, y), x)
    exact, exact_grad = differentiated(lambda x: loss(x, y), x.double())
    assert value.dtype == torch.float32
    assert_close(value, exact, rtol=1e-6)
    assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


# What is refused.


@pytest.mark.parametrize("kind", DICE, ids=lambda kind: kind.__name__)
def test_masks(kind):
    x, y = example(2, 3, 4, 5)
    loss = kind(SOFTMAX)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.float64):
        assert_close(
            loss(x, y.to(dtype), loss_mask=(y != 1).to(dtype)), loss(x, y, y != 1), rtol=1e-6
        )
    for mask in (
        torch.full((2, 1, 4, 5), 0.5),
        torch.full((2, 1, 4, 5), 2),
        torch.ones(2, 4, 5),
        torch.ones(2, 3, 4, 5),
        torch.ones(2, 1, 4, 5, requires_grad=True),
    ):
        with pytest.raises(NotImplementedError, match="loss_mask"):
            loss(x, y, loss_mask=mask)
    with pytest.raises(RuntimeError, match="size"):
        loss(x, y, loss_mask=torch.ones(2, 1, 4, 3, dtype=torch.bool))
    y[0, 0, 0, 0] = -1  # whose voxel counts
    with pytest.raises(ValueError, match="1 label outside"):
        loss(x, y, loss_mask=torch.ones(2, 1, 4, 5, dtype=torch.bool))


def test_targets_that_do_not_fit():
    x, y = example(2, 3, 4, 5)
    for loss in (SoftDiceLoss(SOFTMAX), DC_and_CE_loss({}, {}, ignore_label=7)):
        with pytest.raises(ValueError, match="outside"):
            loss(x, y + 1)
        with pytest.raises(ValueError, match="outside"):
            loss(x, y.float() - 1)
        with pytest.raises(ValueError, match="y must have shape"):
            loss(x, y[..., :3])
        with pytest.raises(NotImplementedError, match="target requires grad"):
            loss(x, y.float().requires_grad_())
    with pytest.raises(AssertionError, match="with an ignore_label target must be labels"):
        loss(x, one_hot(y, 3))
    loss = DC_and_BCE_loss({}, {})
    with pytest.raises(ValueError, match="target must have shape"):
        loss(x, y)
    with pytest.raises(ValueError, match="outside"):
        loss(x, one_hot(y, 3) * 2)


def test_settings_that_are_no_sums():
    x, y = example(2, 3, 4, 5)
    for kind, name in ((DC_and_CE_loss, "ce_kwargs"), (DC_and_BCE_loss, "bce_kwargs")):
        with pytest.raises(NotImplementedError, match=f"^{name}: reduction"):
            kind(**{"soft_dice_kwargs": {}, name: {"reduction": "none"}})
        for other in (functools.partial(SoftDiceLoss), nn.Identity):
            with pytest.raises(NotImplementedError, match="dice_class must be one of"):
                kind({}, {}, dice_class=other)
    DC_and_BCE_loss({"reduction": "none"}, {}, use_ignore_label=True)  # which has its own
    loss = DC_and_CE_loss({}, {"ignore_index": 1, "label_smoothing": 0.1})
    with pytest.raises(NotImplementedError, match="ignore_index"):
        loss(x, y)
    for weight in (torch.ones(5), torch.ones(3), torch.ones(4, 5), torch.ones(2, 3, 4, 5)):
        loss = DC_and_BCE_loss({"pos_weight": weight}, {})
        with pytest.raises(NotImplementedError, match="pos_weight must be one number per class"):
            loss(x, one_hot(y, 3))
    with pytest.raises(TypeError, match="apply_nonlin"):
        DC_and_CE_loss({"apply_nonlin": None}, {})


@needs_nnunet
def test_nnunets_own_dice_classes_stand_for_ours():
    for kind in DICE:
        loss = DC_and_CE_loss({"smooth": 2}, {}, dice_class=theirs(kind))
        assert type(loss.dc) is kind
        assert loss.dc.smooth == 2


@needs_nnunet
def test_signatures_are_nnunets():
    for kind in (*DICE, DC_and_CE_loss, DC_and_BCE_loss):
        ours, others = inspect.signature(kind), inspect.signature(theirs(kind))
        assert list(ours.parameters) == list(others.parameters)
        for name, parameter in ours.parameters.items():
            default = others.parameters[name].default
            assert getattr(parameter.default, "__name__", parameter.default) == getattr(
                default, "__name__", default
            )


# As modules.


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


class Recorded(TorchDispatchMode):
    """Keeps every result, so that none takes the memory of another."""

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.results.append(out)
        return out

    def large(self, x):
        """How many pieces of memory at least half as large as x there are beside x."""
        storages = [out.untyped_storage() for out in self.results if isinstance(out, torch.Tensor)]
        large = {each.data_ptr() for each in storages if each.nbytes() >= x.nbytes // 2}
        return len(large - {x.untyped_storage().data_ptr()})


def test_only_the_gradient_is_of_image_size():
    x, y = example(2, 3, 24, 24)
    x.requires_grad_()
    regions = torch.cat([one_hot(y, 3), y == 1], 1).bool()
    targets = (y.to(torch.uint8), y.to(torch.uint8), regions)
    made = (*losses_of_all_kinds()[:2], DC_and_BCE_loss({}, {}, use_ignore_label=True))
    for loss, target in zip(made, targets, strict=True):
        with Recorded() as recorded:
            torch.autograd.grad(loss(x, target), x)
        assert recorded.large(x) == 1


def test_compiled():
    x, y = example(2, 3, 4, 5)
    for loss, target in zip(losses_of_all_kinds(), (y, y, one_hot(y, 3)), strict=True):
        value, grad = differentiated(lambda x, f=loss, t=target: f(x, t), x)
        compiled = torch.compile(loss, backend="eager")
        other, other_grad = differentiated(lambda x, f=compiled, t=target: f(x, t), x)
        assert_close(other, value, rtol=1e-6)
        assert_close(other_grad, grad, rtol=1e-6, atol=1e-9)


# Ranks.


def batch_losses(dice, compound, ddp, weight_ce):
    """Of two modules, with a target of the logits that `of_rank` makes."""
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
            modules = theirs(SoftDiceLoss).__module__, theirs(DC_and_CE_loss).__module__
            others = batch_losses(*map(importlib.import_module, modules), True, 1)
            for (loss, y), (other, _) in zip(ours(True, 1), others, strict=True):
                same(
                    lambda x, f=loss, y=y: f(x, y[half]),
                    lambda x, f=other, y=y: f(x, y[half]),
                    x[half],
                    3 * ROUNDED,
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
    for loss in (SoftDiceLoss(SOFTMAX, batch_dice=True), DC_and_CE_loss({"batch_dice": True}, {})):
        with pytest.raises(ValueError, match="Default process group has not been initialized"):
            loss(x, y)


# The trainer.


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
    nnunet.trainer.cache_clear()
    yield module.nnUNetTrainer, nnunet.nnUNetTrainerDiceCore
    nnunet.trainer.cache_clear()


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
    """Whose weight nnU-Net divides by itself, 0."""
    with pytest.warns(RuntimeWarning, match="invalid value"):
        loss = built(trainers[1], scales=1)
    x, y = example(2, 3, 4, 5)
    assert_close(loss([x], [y]), loss.loss(x, y), rtol=0)


def test_trainer_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    for name in [name for name in sys.modules if name.startswith("nnunetv2.")]:
        monkeypatch.setitem(sys.modules, name, None)
    nnunet.trainer.cache_clear()
    with pytest.raises(ImportError, match=r"cannot be imported .*; pip install nnunetv2"):
        from dice_core.compat.nnunet import nnUNetTrainerDiceCore  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'nnUNetTrainer'"):
        nnunet.nnUNetTrainer  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_masks_of_unsigned_labels(dtype):
    x, y = torch.randn(2, 1, 30), torch.randint(2, (2, 1, 30))
    mask = torch.rand(2, 1, 30) < 0.5
    loss = nnunet.SoftDiceLoss(torch.sigmoid)
    assert torch.equal(loss(x, y.to(dtype), mask), loss(x, y, mask))
