"""compat.monai compared with MONAI: values, gradients, shapes, warnings, errors, differences."""

import collections
import contextlib
import functools
import inspect
import pickle
import random
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dice_core.compat import monai as ours

reason = "MONAI is not installed: there is nothing to compare with"
monai = pytest.importorskip("monai", reason=reason)
theirs = pytest.importorskip("monai.losses", reason=reason)

CALLS = 300
RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}
LOSSES = sorted(ours.__all__)
COMPOUNDS = ("DiceCELoss", "DiceFocalLoss")


# ---- MONAI in float64 --------------------------------------------------------------------------


@contextlib.contextmanager
def in_float64():
    """MONAI without its casts to float32, which round one-hot encodings' norms, the generalized
    Dice loss's class weights and the focal loss, whatever the input.
    """
    from monai.losses import dice, tversky

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in (dice, tversky):
            patch.setattr(module, "one_hot", functools.partial(module.one_hot, dtype=torch.float64))
        yield


SETTINGS = ("softmax=True", "to_onehot_y=True", "include_background=False", "No mask value")


@contextlib.contextmanager
def warned():
    """The SETTINGS named in warnings."""
    seen = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield seen
    for warning in caught:
        assert warning.category is UserWarning
        names = [name for name in SETTINGS if name in str(warning.message)]
        assert len(names) == 1, warning.message
        seen |= set(names)


def evaluated(loss, x, target, *mask, dtype=None):
    """Value, gradient for random incoming gradients, and warnings."""
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    with warned() as names:
        value = loss(x, target, *mask)
    upstream = torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
    (value * upstream).sum().backward()
    return value.detach(), x.grad, names


def assert_gradients_close(grad, expected, rtol):
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    # A voxel's gradient is a sum of terms of order 1, which may cancel, in the logits' precision.
    atol = 5 * rtol * largest + 1e-3 * rtol
    assert_close(grad, expected, rtol=rtol, atol=atol, what="gradient")


def compare(loss, reference, x, dtype, mine, other):
    """Compares ours with MONAI's in float64, since MONAI's float32 sums would have errors as large
    as ours.
    """
    value, grad, names = evaluated(loss, x, *mine, dtype=dtype)
    with in_float64():
        expected, expected_grad, expected_names = evaluated(
            reference, x, *other, dtype=torch.float64
        )
    assert (value.dtype, grad.dtype) == (dtype, dtype)
    rtol = RTOL[dtype]
    assert_close(value, expected, rtol=rtol, atol=rtol * 1e-2)
    if len(mine) > 1 or getattr(loss, "ignore_index", None) is not None:
        # For ignored voxels ours is 0, and MONAI's is 0 times NaN.
        expected_grad[expected_grad.isnan() & (grad == 0)] = 0
    assert_gradients_close(grad, expected_grad, rtol)
    assert names == expected_names


# ---- random calls ------------------------------------------------------------------------------


class Call(NamedTuple):
    """A loss, its settings, and what it is called with: ours, and the same in MONAI's dtypes."""

    name: str
    settings: dict[str, Any]
    x: torch.Tensor
    mine: list[torch.Tensor]
    other: list[torch.Tensor]
    refused: tuple[type[Exception], str] | None  # by us, MONAI computes it

    def made(self, module):
        settings = dict(self.settings)
        if module is theirs and isinstance(settings.get("weight"), torch.Tensor):
            settings["weight"] = settings["weight"].double()  # which torch wants to be input's
        return getattr(module, self.name)(**settings)


class Draw:
    """Random choices and tensors from one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, *values):
        return self.random.choice(values)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def labels(self, shape):
        """(B, 1, *), in one call of three without the last class."""
        classes = max(shape[1], 2)
        y = torch.randint(classes, (shape[0], 1, *shape[2:]), generator=self.generator)
        return y % (classes - 1) if classes > 2 and self.of(0, 0, 1) else y

    def logits(self, shape, settings):
        """Positive where they are probabilities themselves: denominators far from 0."""
        if activated(shape, settings):
            return (3 * torch.randn(shape, generator=self.generator, dtype=torch.float64)).float()
        return (0.05 + 0.9 * self.rand(*shape)).float()

    def settings(self, name, shape):
        """Every constructor argument but to_onehot_y."""
        channels, of = shape[1], self.of
        settings = {
            "include_background": of(True, False),
            "batch": of(True, False),
            "reduction": of(*["mean", "sum", "none"][: 3 - (name in COMPOUNDS)]),
            "smooth_nr": of(1e-5, 0.0, 0.3),
            "smooth_dr": of(1e-5, 0.0, 0.7),
        }
        activations = {"sigmoid": True}, {"softmax": True}, {"other_act": torch.tanh}, {}
        settings |= dict(of(*activations))
        kept = channels - (not settings["include_background"] and channels > 1)
        several = self.rand(kept) + 0.1
        if "Dice" in name and name != "GeneralizedDiceLoss":
            settings |= {"squared_pred": of(True, False), "jaccard": of(True, False)}
            settings["weight"] = of(None, 2, 0.5, several.tolist(), several)
        if name in ("DiceLoss", "TverskyLoss") and of(0, 1):
            settings["ignore_index"] = of(0, 1, 255, -1, -100)
        if name not in COMPOUNDS:
            settings["soft_label"] = of(False, False, True)
        if name == "TverskyLoss":
            settings |= {"alpha": self.random.random(), "beta": of(0.0, self.random.random())}
        if name == "GeneralizedDiceLoss":
            settings["w_type"] = of("square", "simple", "uniform")
        if name in COMPOUNDS:
            # NumPy warns of 0 times the -inf that 1 - smooth_nr / 0 is.
            settings["lambda_dice"] = of(1.0, 0.3, 0.0) if settings["smooth_dr"] else 0.3
        if name == "DiceCELoss":
            settings["weight"] = of(None, self.rand(channels) + 0.1)
            settings |= {"lambda_ce": of(1.0, 2.0, 0.0), "label_smoothing": of(0.0, 0.2)}
        if name == "DiceFocalLoss":
            alpha = (self.rand(kept) * 0.9).tolist()
            settings |= {
                "lambda_focal": of(1.0, 2.0, 0.0),
                "gamma": of(0.0, 0.5, 1.0, 2.0, 3),
                "alpha": of(None, None, 0.25, 0.0, alpha, torch.tensor(alpha), torch.tensor(0.3)),
            }
            if kept == 1:
                settings["weight"] = of(None, 2, 0.5)
        return settings

    def target(self, shape, index):
        """A target of each kind: ours, and MONAI's; whether it has soft values; to_onehot_y."""
        channels = shape[1]
        labels = self.labels(shape)
        kind = self.of("labels", "one-hot", "regions", "soft")
        hole = self.rand(*labels.shape) < 0.3
        sentinel = index is not None and not 0 <= index < max(channels, 2)
        integers = (torch.int16, torch.int64) if sentinel else (torch.uint8, torch.int64)
        if channels == 1:
            soft = kind == "soft"
            y = self.rand(*shape).float() if soft else labels.to(self.of(*integers, torch.float32))
            y = torch.where(hole, index, y) if sentinel else y
            return y, y.double(), soft, self.of(True, False)
        if kind == "labels":
            y = torch.where(hole, index, labels) if sentinel else labels
            y = y.to(self.of(*integers, torch.float32, torch.float16))
            return y, y, False, True
        dense = {
            "one-hot": one_hot(labels, channels),
            "regions": self.rand(*shape) < 0.4,
            "soft": self.rand(*shape).float(),
        }[kind]
        if sentinel:
            dense = dense * ~hole
        if kind != "soft":
            dense = dense.to(self.of(torch.bool, torch.uint8, torch.int64, torch.float32))
        # MONAI's torch calls refuse some integer and bool targets.
        return dense, dense.double(), kind == "soft", False

    def call(self):
        name = self.of(*LOSSES)
        spatial = self.of((7,), (3, 4), (2, 3, 2), (11, 5))
        shape = (self.of(1, 2, 3), self.of(1, 2, 3, 5), *spatial)
        settings = self.settings(name, shape)
        index = settings.get("ignore_index")
        mine, other, soft, settings["to_onehot_y"] = self.target(shape, index)
        x = self.logits(shape, settings)
        if not activated(shape, settings) and "other_act" not in settings and not soft:
            x[:, -1] = 0  # nothing predicted, 0/0 where there is nothing either
            settings["smooth_nr"] = self.of(settings["smooth_nr"], 0.0)
            settings["smooth_dr"] = 0.0
            if "lambda_dice" in settings:
                settings["lambda_dice"] = 0.3
            if mine.shape == x.shape:
                mine[:, -1] = other[:, -1] = 0
        mine, other = [mine], [other]
        if name == "MaskedDiceLoss" and self.of(0, 1, 1, 1):
            mask = self.rand(self.of(1, shape[0]), 1, *spatial)
            soft_mask = self.of(0, 0, 0, 1)
            if not soft_mask:
                mask = (mask < 0.6).to(self.of(torch.bool, torch.uint8, torch.float32))
            mine, other = [*mine, mask], [*other, mask]
        else:
            soft_mask = False
        refused = refusal(name, settings, shape, soft, soft_mask, index)
        return Call(name, settings, x, mine, other, refused)


def activated(shape, settings):
    """Whether a sigmoid or softmax is taken; a softmax of a single channel is not."""
    return settings.get("sigmoid") or (settings.get("softmax") and shape[1] > 1)


def one_hot(labels, channels):
    """(B, C, *) bool; of a single channel where the label is 1."""
    first = 1 if channels == 1 else 0
    classes = torch.arange(first, first + channels)
    return labels == classes.reshape(-1, *[1] * (labels.ndim - 2))


def refusal(name, settings, shape, soft, soft_mask, index):
    """The error for calls that MONAI supports and we refuse."""
    minimum = settings.get("soft_label") and not settings.get("squared_pred")
    if minimum and not activated(shape, settings):
        return NotImplementedError, "soft_label=True without sigmoid=True or softmax=True"
    if minimum and soft:
        return ValueError, "outside .*soft_label=True requires targets of 0 or 1"
    if soft and index is not None and 0 <= index < shape[1] and shape[1] > 1:
        return ValueError, f"outside .*ignore_index={index} requires zeros and ones"
    if soft and name == "DiceFocalLoss" and settings["gamma"]:
        return ValueError, "outside 0 and 1.*gamma requires targets of 0 or 1"
    if soft and name == "DiceFocalLoss" and settings["alpha"] is not None:
        return ValueError, "outside 0 and 1.*alpha requires targets of 0 or 1"
    if soft_mask:
        return ValueError, "outside .*mask must hold only zeros and ones"
    return None


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_random_calls(block, dtype):
    """The same value, gradient and warnings, or one of the expected errors."""
    for seed in range(block, CALLS, 10):
        call = Draw(seed).call()
        try:
            if call.refused is None:
                pair = call.made(ours), call.made(theirs)
                compare(*pair, call.x, dtype, call.mine, call.other)
                continue
            error, message = call.refused
            with warned(), pytest.raises(error, match=message):
                call.made(ours)(call.x.to(dtype), *call.mine)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {call.name}({call.settings})") from error


def test_random_calls_are_of_all_kinds():
    calls = [Draw(seed).call() for seed in range(CALLS)]
    refused = collections.Counter(call.refused for call in calls)
    assert refused[None] > 0.6 * CALLS
    for name in LOSSES:
        assert sum(call.name == name and not call.refused for call in calls) > 15
        signature = inspect.signature(getattr(theirs, name))
        drawn = set().union(*(call.settings for call in calls if call.name == name))
        assert drawn == set(signature.parameters)
    with in_float64():
        values = [
            call.made(theirs)(call.x.double(), *call.other)
            for call in calls
            if not call.refused and call.x.shape[1] > 1 and call.name != "MaskedDiceLoss"
        ]
    assert 5 < sum(bool(value.isnan().any()) for value in values) < 0.3 * CALLS


# ---- MONAI's oddities, by name -----------------------------------------------------------------


def test_an_ignored_class_stays_in_the_mean():
    """Like an absent class: the loss of a perfect prediction is 1/3."""
    y = torch.tensor([[[0, 1, 2, 2]]])
    x = 100 * (y == torch.arange(3)[:, None]).double()
    x[:, 2] = -100
    settings = {"softmax": True, "to_onehot_y": True, "ignore_index": 2}
    settings |= {"smooth_nr": 0, "smooth_dr": 0}
    for module in (ours, theirs):
        assert_close(module.DiceLoss(**settings)(x, y), 1 / 3, rtol=1e-12)


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
def test_an_ignored_class_of_channels_leaves_out_voxels(name):
    """All of a voxel's classes, not a channel."""
    x = torch.rand(1, 2, 2, dtype=torch.float64)
    y = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    pair = [getattr(m, name)(ignore_index=0, reduction="none") for m in (ours, theirs)]
    compare(*pair, x, torch.float64, [y], [y])
    changed = x + torch.tensor([0.3, 0.0])
    assert_close(pair[0](changed, y), pair[0](x, y), rtol=0)


def test_masked_labels_are_background():
    """With to_onehot_y, where probability is 0: their number is added to Y of class 0."""
    draw = Draw(0)
    x, labels = draw.logits((2, 2, 5, 4), {"softmax": True}), draw.labels((2, 2, 5, 4))
    mask = draw.rand(2, 1, 5, 4) < 0.5
    dense = one_hot(labels, 2).float()
    settings = {"softmax": True, "reduction": "none", "smooth_nr": 0, "smooth_dr": 0}
    of_labels = ours.MaskedDiceLoss(to_onehot_y=True, **settings)(x, labels, mask).flatten(1)
    of_channels = ours.MaskedDiceLoss(**settings)(x, dense, mask).flatten(1)
    s, t = x.softmax(1)[:, :1] * mask, dense[:, :1] * mask
    i, total, masked = ((n).flatten(1).sum(1) for n in (s * t, s + t, ~mask))
    assert_close(of_labels[:, 0], 1 - 2 * i / (total + masked), rtol=1e-6)
    assert_close(of_labels[:, 1], of_channels[:, 1], rtol=1e-6)
    assert (of_labels[:, 0] > of_channels[:, 0]).all()


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "GeneralizedDiceLoss"])
def test_0_divided_by_0_is_nan(name, dtype):
    x, y = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    x[1], y[1] = 0.5, 1
    settings = {"smooth_nr": 0, "smooth_dr": 0, "reduction": "none"}
    pair = getattr(ours, name)(**settings), getattr(theirs, name)(**settings)
    isnan = pair[0](x, y).isnan().flatten(1)
    assert (isnan.all(1).tolist(), isnan.any(1).tolist()) == ([True, False], [True, False])
    compare(*pair, x, dtype, [y], [y.double()])


def test_an_excluded_background_may_be_nan():
    x, y = torch.rand(2, 3, 5), torch.rand(2, 3, 5) < 0.5
    x[:, 0] = float("nan")
    for name in LOSSES:
        if name != "DiceCELoss":  # whose cross-entropy is of all classes
            settings = {"include_background": False}
            pair = getattr(ours, name)(**settings), getattr(theirs, name)(**settings)
            (value, grad, _), (expected, expected_grad, _) = (
                evaluated(loss, x.double(), y.double()) for loss in pair
            )
            assert_close(value, expected, rtol=1e-6)
            assert_gradients_close(grad[:, 1:], expected_grad[:, 1:], 1e-6)


def test_uint8_labels_compare_as_torch_compares_them():
    """-1 is 255."""
    y = torch.tensor([[[0, 1, 255, 2]]], dtype=torch.uint8)
    settings = {"softmax": True, "to_onehot_y": True, "ignore_index": -1}
    pair = ours.DiceLoss(**settings), theirs.DiceLoss(**settings)
    compare(*pair, torch.randn(1, 3, 4), torch.float64, [y], [y])


def test_floating_point_labels_are_truncated():
    """But compared with ignore_index as they are."""
    y = torch.tensor([[[0.9, 1.5, 1.0, 2.2]]])
    for index in (None, 1, 2, -1):
        settings = {"softmax": True, "to_onehot_y": True, "ignore_index": index}
        pair = ours.TverskyLoss(**settings), theirs.TverskyLoss(**settings)
        compare(*pair, torch.randn(1, 3, 4), torch.float64, [y], [y])


def test_a_scalar_weight_is_expanded_at_the_first_call():
    x, y = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    for module in (ours, theirs):
        for weight in (2, 0.5, torch.tensor(0.5, dtype=torch.float64)):
            loss = module.DiceLoss(weight=weight)
            assert loss.state_dict()["class_weight"].shape == ()
            loss(x, y)
            expanded = loss.state_dict()["class_weight"]
            assert torch.equal(expanded, torch.as_tensor([weight] * 3))
            assert expanded.dtype == torch.as_tensor(weight).dtype
            with pytest.raises(ValueError, match="The length of"):
                loss(x[:, :2], y[:, :2])
    focal = ours.DiceFocalLoss(weight=2.0)
    focal(x, (y > 0.5).float())
    assert [w.shape for w in focal.state_dict().values()] == [(3,), ()]


def test_the_focal_loss_is_of_the_sigmoid_even_with_softmax():
    x, y = torch.randn(2, 3, 5), torch.randint(3, (2, 1, 5))
    settings = {"softmax": True, "to_onehot_y": True, "lambda_dice": 0.0}
    of_sigmoid = theirs.FocalLoss(to_onehot_y=True)(x, y)
    assert_close(ours.DiceFocalLoss(**settings)(x, y), of_sigmoid, rtol=1e-6)


@pytest.mark.parametrize("weight", [[1.0], [1.0, 2.0, 3.0], 2.0])
def test_weights_of_one_class_are_not_used(weight):
    x, y = torch.rand(2, 2, 5), torch.rand(2, 2, 5) < 0.5
    settings = {"include_background": False, "weight": weight}
    expected = theirs.DiceLoss(**settings)(x, y)
    assert_close(ours.DiceLoss(**settings)(x, y), expected, rtol=1e-6)


# ---- infinities --------------------------------------------------------------------------------

INF = float("inf")


# That of DiceFocalLoss is NaN in MONAI, because of 0 times infinity.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "DiceFocalLoss"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [INF, -INF])
def test_infinite_logits(name, activation, value):
    """+inf under a softmax is NaN; -inf beside finite logits is a class of probability 0."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[[0, 1, 2, 2]], [[1, 1, 2, 0]]])
    x[0, 0, 1] = value
    if activation == "sigmoid" and name in COMPOUNDS and value > 0:
        y[0, 0, 1] = 0  # else the loss is infinite
    settings = {activation: True, "to_onehot_y": True}
    pair = getattr(ours, name)(**settings), getattr(theirs, name)(**settings)
    mask = [torch.ones(2, 1, 4)] if name == "MaskedDiceLoss" else []
    compare(*pair, x, torch.float64, [y, *mask], [y, *mask])


def test_infinite_losses_of_classes_with_target_0_contribute_nothing():
    x, y = torch.randn(1, 3, 4), torch.tensor([[[0, 1, 2, 2]]])
    x[0, 0, 1] = -INF
    dense = one_hot(y, 3).float()
    expected = theirs.DiceCELoss(softmax=True, to_onehot_y=True)(x, y)
    assert expected.isfinite()
    assert theirs.DiceCELoss(softmax=True)(x, dense).isnan()
    assert_close(ours.DiceCELoss(softmax=True)(x, dense), expected, rtol=1e-6)


def test_ignored_voxels_may_be_nan():
    x, y = torch.randn(1, 3, 4), torch.tensor([[[0, 1, 255, 2]]])
    x[..., 2] = float("nan")
    settings = {"softmax": True, "to_onehot_y": True, "ignore_index": 255}
    value, grad, _ = evaluated(ours.DiceLoss(**settings), x, y)
    assert theirs.DiceLoss(**settings)(x, y).isnan()
    x[..., 2] = 0
    assert_close(value, theirs.DiceLoss(**settings)(x, y), rtol=1e-6)
    assert grad.isfinite().all()
    assert not grad[..., 2].any()


# ---- masks -------------------------------------------------------------------------------------


def test_masked_and_out_of_range_labels():
    """No label in the data is mistaken for a masked one; 256 classes use all of uint8."""
    x, mask = torch.zeros(1, 3, 4), torch.tensor([[[1, 1, 0, 1]]])
    loss = ours.MaskedDiceLoss(softmax=True, to_onehot_y=True)
    for rogue, dtype in ((255, torch.uint8), (254, torch.uint8), (-1, torch.int64)):
        y = torch.tensor([[[0, 1, 2, rogue]]]).to(dtype)
        with pytest.raises(ValueError, match=f"1 label outside .* first is {rogue} at"):
            loss(x, y, mask)
    x = torch.randn(1, 256, 4, dtype=torch.float64)
    y = torch.tensor([[[0, 254, 255, 255]]], dtype=torch.uint8)
    other = theirs.MaskedDiceLoss(softmax=True, to_onehot_y=True)
    compare(loss, other, x, torch.float64, [y, mask], [y, mask])


def test_masked_and_out_of_range_targets():
    x, mask = torch.zeros(1, 2, 2), torch.tensor([[[1, 0]]])
    for dtype, rogue in ((torch.uint8, 254), (torch.int8, -128), (torch.float32, 1.5)):
        y = torch.tensor([[[rogue, 1], [0, 1]]], dtype=dtype)
        with pytest.raises(ValueError, match=f"1 value outside .* first is {rogue} at"):
            ours.MaskedDiceLoss()(x, y, mask)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1, 1, 4), "Spatial size of input"), ((1, 1, 4), "Dim of input")],
)
@pytest.mark.parametrize("labels", [True, False])
def test_masks_of_other_shapes_broadcast_with_a_warning(shape, message, labels):
    draw = Draw(1)
    x, mask = draw.rand(2, 3, 5, 4), draw.rand(*shape) < 0.5
    y = draw.labels(x.shape) if labels else draw.rand(2, 3, 5, 4)
    values = []
    for module in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values.append(module.MaskedDiceLoss(to_onehot_y=labels)(x, y, mask))
        assert any(message in str(warning.message) for warning in caught)
        assert {warning.category for warning in caught} == {UserWarning}
    assert_close(*values, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 1, 5), "Batch size of mask"), ((2, 2, 5), "only one channel")]
)
def test_masks_that_do_not_fit(shape, message):
    x = torch.rand(2, 3, 5)
    for loss in (ours.MaskedDiceLoss(), theirs.MaskedDiceLoss()):
        with pytest.raises(ValueError, match=message):
            loss(x, x, torch.ones(shape))


def test_masks_that_do_not_broadcast():
    x = torch.rand(2, 3, 5)
    with (
        pytest.warns(UserWarning, match="Spatial size"),
        pytest.raises(ValueError, match=r"mask must broadcast to \(2, 1, 5\)"),
    ):
        ours.MaskedDiceLoss()(x, x, torch.ones(2, 1, 4))


# ---- constructors, errors ----------------------------------------------------------------------

OURS_ALONE = ["backend", "num_threads", "check_labels", "inplace"]


@pytest.mark.parametrize("name", LOSSES)
def test_signatures(name):
    for method in ("__init__", "forward"):
        mine, other = (
            list(inspect.signature(getattr(getattr(module, name), method)).parameters.values())
            for module in (ours, theirs)
        )
        extras = mine[len(other) :]
        assert [p.name for p in extras] == OURS_ALONE * (method == "__init__")
        assert all(p.kind is p.KEYWORD_ONLY and not p.default for p in extras)
        mine, other = (
            [(p.name, p.kind, p.default) for p in each] for each in (mine[: len(other)], other)
        )
        assert mine == other


@pytest.mark.parametrize("name", LOSSES)
def test_docstrings_say_what_and_whether_it_differs(name):
    text = inspect.getdoc(getattr(ours, name))
    assert f"monai.losses.{name}" in text
    assert "Shapes: " in text
    assert "Raises" in text
    assert "Differences from MONAI: those listed in the module's docstring." in text
    assert "The only differences from MONAI:" in ours.__doc__


@pytest.mark.parametrize("name", LOSSES)
def test_keyword_only_extras(name):
    x, y = torch.zeros(1, 3, 4), torch.tensor([[[0, 1, 2, 2]]])
    settings = {"softmax": True, "to_onehot_y": True}
    mask = [torch.ones(1, 1, 4)] if name == "MaskedDiceLoss" else []
    default = getattr(ours, name)(**settings)(x, y, *mask)
    settings |= {"backend": "reference", "num_threads": 1, "check_labels": True}
    assert_close(getattr(ours, name)(**settings)(x, y, *mask), default, rtol=1e-6)
    with pytest.raises(ValueError, match="nowhere is not a backend"):
        getattr(ours, name)(**{**settings, "backend": "nowhere"})(x, y, *mask)
    with pytest.raises(ValueError, match="num_threads"):
        getattr(ours, name)(num_threads=0)


@pytest.mark.parametrize("name", LOSSES)
def test_constructor_errors(name):
    both = getattr(ours, name), getattr(theirs, name)
    for kind in both:
        for settings in ({"sigmoid": True, "softmax": True}, {"softmax": True, "other_act": abs}):
            with pytest.raises(ValueError, match="Incompatible values"):
                kind(**settings)
        with pytest.raises(TypeError, match="other_act must be None or callable"):
            kind(other_act=1)
        for reduction in ("max", None):
            with pytest.raises(ValueError, match=str(reduction)):
                kind(reduction=reduction)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("GeneralizedDiceLoss", {"w_type": "squared"}, ValueError, "squared"),
        ("DiceCELoss", {"reduction": "none"}, ValueError, "none"),
        ("DiceCELoss", {"lambda_dice": -1}, ValueError, "lambda_dice should be no less than 0.0"),
        ("DiceCELoss", {"lambda_ce": -1}, ValueError, "lambda_ce should be no less than 0.0"),
        ("DiceFocalLoss", {"lambda_dice": -1}, ValueError, "lambda_dice should be no less than"),
        ("DiceFocalLoss", {"lambda_focal": -1}, ValueError, "lambda_focal should be no less than"),
        ("DiceCELoss", {"weight": [1.0, 2.0]}, TypeError, "weight"),
        ("DiceCELoss", {"weight": 2.0, "include_background": False}, TypeError, "float"),
    ],
)
def test_errors_of_single_constructors(name, settings, error, message):
    for kind in (getattr(ours, name), getattr(theirs, name)):
        with pytest.raises(error, match=message):
            kind(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DiceLoss", {"smooth_nr": -1.0}, "smooth_nr must be finite and at least 0"),
        ("TverskyLoss", {"smooth_dr": INF}, "smooth_dr must be finite"),
        ("TverskyLoss", {"alpha": -0.1}, "alpha must be"),
        ("DiceLoss", {"weight": [1.0, -1.0]}, "values of weight should be finite numbers no less"),
        ("DiceCELoss", {"weight": torch.tensor([1.0, -1.0])}, "values of weight should be"),
        ("DiceFocalLoss", {"weight": -1.0}, "values of weight should be"),
        ("DiceFocalLoss", {"gamma": -1.0}, "gamma must be"),
        ("DiceFocalLoss", {"alpha": 1.5}, "alpha must be at most 1"),
        ("DiceFocalLoss", {"alpha": [0.5, -1.0]}, "values of alpha should be"),
        ("DiceCELoss", {"label_smoothing": 2.0}, "label_smoothing must be at most 1"),
        ("DiceCELoss", {"lambda_ce": INF}, "lambda_ce must be finite"),
    ],
)
def test_settings_are_checked_on_construction(name, settings, message):
    """MONAI refuses some of them when the loss is called, and others never."""
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(**settings)


def test_settings_that_are_tensors():
    loss = ours.DiceFocalLoss(gamma=torch.tensor(1.0), alpha=torch.tensor(0.25))
    assert (loss.focal.gamma, loss.focal.alpha) == (1.0, 0.25)
    learnt = torch.tensor(1.0, requires_grad=True)
    for kind, name in ((ours.DiceCELoss, "lambda_ce"), (ours.DiceFocalLoss, "alpha")):
        with pytest.raises(NotImplementedError, match=f"{name} that is a tensor"):
            kind(**{name: learnt})
    loss = ours.DiceCELoss()
    loss.lambda_ce = learnt
    for _ in range(2):
        with pytest.raises(TypeError, match="settings of a loss must be numbers"):
            loss(SOFT, HARD)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("settings", "x", "target", "error", "of_compound"),
    [
        ({}, (2, 3, 4), (2, 1, 4), AssertionError, AssertionError),
        ({}, (2, 3, 4), (2, 3, 5), AssertionError, AssertionError),
        ({}, (2, 3, 4), (2, 2, 4), AssertionError, ValueError),
        ({}, (2, 3, 4), (2, 3, 4, 1), AssertionError, ValueError),
        ({"include_background": False}, (2, 2, 4), (2, 1, 4), AssertionError, AssertionError),
        ({"to_onehot_y": True}, (2, 3, 4), (2, 3, 4), AssertionError, AssertionError),
        ({"to_onehot_y": True}, (2, 3, 4), (2, 4), AssertionError, ValueError),
        ({"to_onehot_y": True}, (2, 3, 4), (2, 1, 5), AssertionError, AssertionError),
        ({}, (3,), (3,), *[(IndexError, ValueError)] * 2),
    ],
)
@pytest.mark.filterwarnings("ignore:No mask value:UserWarning")
def test_shapes_that_do_not_fit(name, settings, x, target, error, of_compound):
    error = of_compound if name in COMPOUNDS else error
    for kind in (getattr(ours, name), getattr(theirs, name)):
        with pytest.raises(error):
            kind(**settings)(torch.zeros(x), torch.zeros(target))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:No mask value:UserWarning")
def test_flags_and_tensors_of_a_wrong_kind(name):
    kind, x, target = getattr(ours, name), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    for flag in ("include_background", "to_onehot_y", "sigmoid", "softmax", "batch"):
        for wrong in ("yes", None, torch.ones(2)):
            with pytest.raises(TypeError, match=f"{flag} must be True or False"):
                kind(**{flag: wrong})
    for wrong in (None, x.numpy(), x.to_sparse()):
        with pytest.raises(TypeError, match="input must be a"):
            kind()(wrong, target)
        with pytest.raises(TypeError, match="target must be a"):
            kind()(x, wrong)
    with pytest.raises(ValueError, match="target is on meta but input is on cpu"):
        kind()(x, target.to("meta"))


def test_masks_of_a_wrong_kind():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match="mask must be a"):
        ours.MaskedDiceLoss()(x, x, "mask")
    with pytest.raises(ValueError, match="mask is on meta but input is on cpu"):
        ours.MaskedDiceLoss()(x, x, x[:, :1].to("meta"))


def test_settings_of_a_wrong_kind():
    for weight in (["1", "2"], [1, [2]], torch.ones(2, dtype=torch.cfloat)):
        with pytest.raises(TypeError, match="weight must be"):
            ours.DiceLoss(weight=weight)
    with pytest.raises(ValueError, match="weight must be one number per class"):
        ours.DiceCELoss(weight=torch.tensor(2.0), include_background=False)
    for factor in ("1", None, [1.0]):
        with pytest.raises(TypeError, match="lambda_dice must be a number"):
            ours.DiceCELoss(lambda_dice=factor)
    with pytest.raises(TypeError, match="alpha must be numbers"):
        ours.DiceFocalLoss(alpha=[[1], 2])


@pytest.mark.parametrize(
    ("name", "settings", "channels", "message"),
    [
        ("DiceLoss", {"weight": [1.0, 2.0]}, 3, "[Tt]he length of"),
        ("DiceLoss", {"weight": [1.0] * 3, "include_background": False}, 3, "[Tt]he length of"),
        ("DiceCELoss", {"weight": torch.ones(2)}, 3, "[Tt]he length of"),
        ("DiceFocalLoss", {"weight": [1.0, 2.0]}, 3, "[Tt]he length of"),
        ("DiceFocalLoss", {"weight": [1.0]}, 1, "Per-class"),
        ("DiceFocalLoss", {"weight": [1.0], "include_background": False}, 2, "Per-class"),
        ("DiceFocalLoss", {"alpha": [0.5, 0.5]}, 3, "[Tt]he length of alpha"),
    ],
)
def test_weights_that_do_not_fit(name, settings, channels, message):
    x = torch.zeros(2, channels, 4)
    for kind in (getattr(ours, name), getattr(theirs, name)):
        with pytest.raises(ValueError, match=message):
            kind(**settings)(x, x)


# ---- what differs ------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [3, -1, 255])
def test_labels_out_of_range(label):
    """A ValueError that says which and where; MONAI's RuntimeError is scatter's."""
    x, y = torch.zeros(1, 3, 4), torch.tensor([[[0, 1, 2, label]]])
    for name in ("DiceLoss", "GeneralizedDiceLoss", "TverskyLoss", *COMPOUNDS):
        with pytest.raises(ValueError, match=f"1 label outside .* the first is {label}"):
            getattr(ours, name)(to_onehot_y=True)(x, y)
        with pytest.raises(RuntimeError, match="out of bounds"):
            getattr(theirs, name)(to_onehot_y=True)(x, y)


def test_soft_targets_out_of_range():
    x, y = torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 255]]])
    with pytest.raises(ValueError, match=r"1 value outside \[0, 1\]"):
        ours.DiceLoss(sigmoid=True)(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits(dtype):
    """float32 losses, of sums that do not overflow."""
    x = torch.ones(1, 2, 300, 300, dtype=dtype).requires_grad_()
    loss = ours.DiceLoss(sigmoid=True)(x, torch.ones(1, 2, 300, 300, dtype=torch.bool))
    loss.backward()
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)
    s = torch.tensor(1.0).sigmoid()
    assert_close(loss.detach(), 1 - 2 * s / (1 + s), rtol=1e-5)


def test_second_derivatives_are_refused():
    x = torch.randn(1, 3, 4, requires_grad=True)
    loss = ours.DiceLoss(softmax=True, to_onehot_y=True)(x, torch.zeros(1, 1, 4).long())
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


# ---- what is refused ---------------------------------------------------------------------------

SOFT = torch.full((1, 2, 4), 0.5)
HARD = torch.eye(2)[None].repeat(1, 1, 2)
LABELS = torch.zeros(1, 1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "settings", "target", "message"),
    [
        ("DiceLoss", {"soft_label": True}, HARD, "soft_label=True without sigmoid=True or"),
        ("TverskyLoss", {"soft_label": True, "to_onehot_y": True}, LABELS, "soft_label=True witho"),
        ("TverskyLoss", {"soft_label": True, "other_act": abs}, HARD, "soft_label=True without"),
        ("DiceLoss", {}, SOFT.clone().requires_grad_(), "a target that requires grad .* detach it"),
        ("DiceLoss", {"other_act": lambda x: x[:, :1]}, HARD, "other_act that changes the shape"),
    ],
)
def test_what_one_pass_cannot_compute(name, settings, target, message):
    with pytest.raises(NotImplementedError, match=message):
        getattr(ours, name)(**settings)(torch.zeros(1, 2, 4), target)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "DiceLoss",
            {"soft_label": True, "softmax": True},
            "soft_label=True requires targets of 0",
        ),
        (
            "TverskyLoss",
            {"soft_label": True, "sigmoid": True},
            "soft_label=True requires targets of",
        ),
        ("GeneralizedDiceLoss", {"soft_label": True, "sigmoid": True}, "soft_label=True requires"),
        ("DiceLoss", {"ignore_index": 1}, "ignore_index=1 requires zeros and ones in that chan"),
        ("TverskyLoss", {"ignore_index": 0}, "ignore_index=0 requires zeros and ones"),
        ("DiceFocalLoss", {}, "gamma requires targets of 0 or 1"),
        ("DiceFocalLoss", {"gamma": 0, "alpha": 0.5}, "alpha requires targets of 0 or 1"),
    ],
)
def test_soft_targets_that_are_refused_during_the_pass(name, settings, message):
    """They are not checked in advance; targets of 0 and 1 are valid."""
    loss = getattr(ours, name)(**settings)
    with pytest.raises(ValueError, match=f"outside (0 and 1|.0, 1.) .*; {message}"):
        loss(torch.zeros(1, 2, 4), SOFT)
    assert loss(torch.zeros(1, 2, 4), HARD).isfinite()


def test_voxel_maps_are_refused():
    with pytest.raises(NotImplementedError, match='reduction="none", a loss of each voxel'):
        ours.DiceFocalLoss(reduction="none")


@pytest.mark.parametrize("target", [HARD, SOFT, LABELS], ids=["hard", "soft", "labels"])
def test_float_masks_are_refused(target):
    loss = ours.MaskedDiceLoss(to_onehot_y=target is LABELS)
    for value in (0.5, 2, -1, float("nan")):
        mask = torch.tensor([[[0, 1, 1, value]]])
        with pytest.raises(ValueError, match=r"outside .*; mask must hold only zeros and ones"):
            loss(SOFT, target, mask)
    with pytest.raises(NotImplementedError, match="a mask that requires grad"):
        loss(SOFT, target, torch.ones(1, 1, 4).requires_grad_())


def test_several_weights_of_one_channel_are_refused():
    loss = ours.DiceCELoss(weight=torch.ones(4))
    with pytest.raises(NotImplementedError, match="weight of several numbers"):
        loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:No mask value:UserWarning")
def test_input_without_spatial_axes_is_refused(name):
    with pytest.raises(NotImplementedError, match="without spatial axes"):
        getattr(ours, name)()(torch.zeros(2, 3), torch.zeros(2, 3))


# ---- as modules --------------------------------------------------------------------------------


def changed_loss(module, name):
    """A loss whose settings are changed after its first call."""
    x, y = torch.rand(2, 3, 5), torch.randint(3, (2, 1, 5))
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    settings = {"softmax": True, "to_onehot_y": True}
    if name in ("DiceLoss", *COMPOUNDS):
        settings["weight"] = weight
    loss = getattr(module, name)(**settings)
    loss(x.double(), y)
    inner = getattr(loss, "dice", loss)
    inner.smooth_nr, inner.smooth_dr, inner.batch = 0.5, 0.25, True
    inner.include_background = True
    if name == "DiceCELoss":
        loss.lambda_dice, loss.lambda_ce, loss.cross_entropy.label_smoothing = 0.5, 3, 0.1
        loss.cross_entropy.weight = weight.flip(0)
    elif name == "DiceFocalLoss":
        loss.lambda_focal, loss.focal.gamma, loss.focal.alpha = 2, 1.5, 0.3
        loss.focal.class_weight = weight.flip(0)
    elif name == "TverskyLoss":
        loss.alpha, loss.reduction = 0.9, "sum"
    elif name == "GeneralizedDiceLoss":
        loss.w_type, loss.reduction = "simple", "none"
    else:
        loss.jaccard, loss.squared_pred, loss.ignore_index = True, True, 1
    return loss


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "MaskedDiceLoss"])
def test_settings_may_change_after_a_call(name):
    x, y = torch.randn(2, 3, 5), torch.randint(3, (2, 1, 5))
    pair = changed_loss(ours, name), changed_loss(theirs, name)
    compare(*pair, x, torch.float64, [y], [y])
    single = pair[0].to(torch.float32)  # buffers are replaced
    assert_close(single(x, y), pair[1](x.double(), y).detach(), rtol=1e-5)


@pytest.mark.parametrize("name", ["DiceLoss", "DiceFocalLoss"])
def test_class_weights_may_require_grad(name):
    x, y = torch.randn(2, 3, 5).double(), torch.randint(3, (2, 1, 5))
    grads = []
    for module in (ours, theirs):
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        loss = getattr(module, name)(softmax=True, to_onehot_y=True, weight=weight)
        with in_float64():
            loss(x, y).backward()
        grads.append(weight.grad)
    assert_close(*grads, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "weight"),
    [(name, weight) for name in ("DiceLoss", "MaskedDiceLoss", *COMPOUNDS) for weight in (0, 1)]
    + [("GeneralizedDiceLoss", 0), ("TverskyLoss", 0)],
)
def test_state_dicts_are_exchanged(name, weight):
    settings = {"weight": torch.tensor([1.0, 2.0])} if weight else {}
    mine, other = getattr(ours, name)(**settings), getattr(theirs, name)(**settings)
    assert list(mine.state_dict()) == list(other.state_dict())
    if weight:
        changed = {key: value + 1 for key, value in other.state_dict().items()}
        mine.load_state_dict(changed)
        assert all(torch.equal(value, changed[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "MaskedDiceLoss"])
def test_only_the_gradient_has_the_size_of_the_logits(name):
    """Checks what torch allocates from the call to the end of backward: float targets are not
    checked before the pass.
    """
    large = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= x.numel():
                large.append(out)
            return out

    x, y = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randint(5, (2, 1, 8, 8))
    dense = one_hot(y, 5)
    for target, labels in ((y, True), (dense, False), (dense.float(), False)):
        loss = getattr(ours, name)(softmax=True, to_onehot_y=labels)
        with Sizes():
            (grad,) = torch.autograd.grad(loss(x, target), x)
        assert {t.data_ptr() for t in large} == {grad.data_ptr()}
        large.clear()


def test_a_mask_copies_the_labels_only():
    kept = []
    x, y = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randint(5, (2, 1, 8, 8))
    loss = ours.MaskedDiceLoss(softmax=True, to_onehot_y=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(x, y.to(torch.uint8), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    assert {(t.dtype, t.numel()) for t in kept if t.numel() > 30} == {
        (torch.float32, x.numel()),
        (torch.int16, y.numel()),
    }


@pytest.mark.parametrize(("name", "most"), [("DiceLoss", 75), ("DiceCELoss", 90)])
def test_a_step_makes_few_python_calls(name, most):
    """Counts calls of dice_core functions, whose overhead matters for small images."""
    loss = getattr(ours, name)(to_onehot_y=True, softmax=True)
    x = torch.randn(2, 4, 8, 8, 8, requires_grad=True)
    y = torch.randint(4, (2, 1, 8, 8, 8))
    package = str(Path(ours.__file__).parents[1])
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(package)

    loss(x, y).backward()
    sys.setprofile(profile)
    loss(x, y).backward()
    sys.setprofile(None)
    assert 10 < count <= most


def test_enumerations_are_accepted():
    from monai.utils import LossReduction, Weight

    for name in LOSSES:
        assert getattr(ours, name)(reduction=LossReduction.MEAN).reduction == "mean"
    assert ours.GeneralizedDiceLoss(w_type=Weight.SIMPLE).w_type == "simple"


def test_meta_tensors():
    from monai.data import MetaTensor

    x, y = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 1, 4, 5))
    mask = torch.rand(2, 1, 4, 5) < 0.5
    settings = {"softmax": True, "to_onehot_y": True}
    for loss, more in (
        (ours.DiceCELoss(**settings), ()),
        (ours.MaskedDiceLoss(**settings), (mask,)),
    ):
        values = [loss(of(x), of(y), *map(of, more)) for of in (torch.as_tensor, MetaTensor)]
        assert_close(torch.as_tensor(values[1]), values[0], rtol=1e-7)


def test_a_module_as_activation_and_pickle():
    x, y = torch.randn(2, 3, 4), torch.randint(3, (2, 1, 4))
    for name in LOSSES:
        loss = getattr(ours, name)(to_onehot_y=True, other_act=torch.nn.Softmax(1))
        mask = [torch.ones(2, 1, 4)] if name == "MaskedDiceLoss" else []
        copy = pickle.loads(pickle.dumps(loss))
        assert_close(copy(x, y, *mask), loss(x, y, *mask), rtol=0)


WEIGHTED = {"DiceLoss": 2.0, "DiceCELoss": torch.tensor([1.0, 2.0, 3.0]), "DiceFocalLoss": 0.5}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in LOSSES for kind in ("labels", "hard")] + [("DiceCELoss", "soft")],
)
def test_compiles_as_one_graph(name, kind):
    """With gradients, and targets that are checked only during the pass."""
    x, labels = torch.randn(2, 3, 4), torch.randint(3, (2, 1, 4))
    settings = {"softmax": True, "to_onehot_y": kind == "labels"}
    if name in WEIGHTED:
        settings["weight"] = WEIGHTED[name]
    hard = one_hot(labels, 3).float()
    y = {"labels": labels, "hard": hard, "soft": 0.25 + hard / 2}[kind]
    if kind == "hard" and name not in COMPOUNDS:
        settings["soft_label"] = True
    if kind == "hard" and name in ("DiceLoss", "TverskyLoss"):
        settings["ignore_index"] = 1
    mask = [torch.randint(2, (2, 1, 4)).float()] if name == "MaskedDiceLoss" else []
    eager = evaluated(getattr(ours, name)(**settings), x, y, *mask)
    torch._dynamo.reset()
    backend = "aot_eager" if kind == "labels" else "eager"
    compiled = torch.compile(getattr(ours, name)(**settings), backend=backend, fullgraph=True)
    value, grad, _ = evaluated(compiled, x, y, *mask)
    assert_close(value, eager[0], rtol=1e-6)
    assert_gradients_close(grad, eager[1], 1e-6)


def test_a_compiled_loss_sees_changed_settings():
    x, y = torch.randn(2, 3, 4), torch.randint(3, (2, 1, 4))
    loss = ours.DiceCELoss(softmax=True, to_onehot_y=True)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for loss.lambda_ce in (1.0, 0.5, 0.25):
        assert_close(compiled(x, y), loss(x, y), rtol=1e-6)


def test_monai_is_not_imported():
    source = Path(ours.__file__).read_text()
    assert not re.search(r"^\s*(import|from) monai", source, re.MULTILINE)
