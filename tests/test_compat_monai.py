"""compat.monai beside MONAI itself: values, gradients, shapes, warnings, errors, differences."""

import contextlib
import inspect
import pickle
import random
import re
import warnings
from pathlib import Path

import pytest
import torch
from compare import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dice_core.compat import monai as ours

reason = "MONAI is not installed: there is nothing to compare with"
monai = pytest.importorskip("monai", reason=reason)
theirs = pytest.importorskip("monai.losses", reason=reason)

CONFIGURATIONS = 75  # of each loss
DTYPES = (torch.float64, torch.float32)


# ---- random calls -----------------------------------------------------------------------------


class Draw:
    """Choices and tensors of one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, *values):
        return self.random.choice(values)

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def shape(self, *channels):
        spatial = self.of((7,), (3, 4), (2, 3, 2), (11, 5))
        return (self.of(1, 2, 3), self.of(*(channels or (1, 2, 3, 5))), *spatial)

    def activation(self):
        named = {"sigmoid": True}, {"softmax": True}, {"other_act": torch.tanh}, {}
        return dict(self.of(*named))

    def common(self):
        return {
            "include_background": self.of(True, False),
            "batch": self.of(True, False),
            "reduction": self.of("mean", "sum", "none"),
            "smooth_nr": self.of(1e-5, 0.0, 0.3),
            "smooth_dr": self.of(1e-5, 0.7),
            **self.activation(),
        }

    def logits(self, shape, activation):
        """Positive where they are scores themselves: denominators far from 0."""
        if scored(shape, activation):
            x = 3 * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        else:
            x = 0.05 + 0.9 * self.rand(*shape)
        return x.float()

    def labels(self, shape, classes=None):
        """(B, 1, *), in one call of three without the last class."""
        classes = classes or max(shape[1], 2)
        y = torch.randint(classes, (shape[0], 1, *shape[2:]), generator=self.generator)
        return y % (classes - 1) if classes > 2 and self.of(0, 0, 1) else y

    def target(self, shape, soft=True):
        """Labels or a dense target, the same in MONAI's words, and to_onehot_y."""
        labels = self.labels(shape)
        kind = self.of("labels", "one-hot", "regions", *["soft"] * soft)
        if kind == "labels":
            dtype = self.of(torch.uint8, torch.int16, torch.int64, torch.float32, torch.float16)
            y = labels.to(dtype)
            return y, y.double() if shape[1] == 1 else y, True
        if kind == "one-hot":
            dense = one_hot(labels, shape[1])
        elif kind == "regions":
            dense = self.rand(*shape) < 0.4
        else:
            dense = self.rand(*shape).float()
        if kind != "soft":
            dense = dense.to(self.of(torch.bool, torch.uint8, torch.int64, torch.float32))
        # MONAI's torch calls refuse some integer and bool targets.
        return dense, dense.double(), shape[1] == 1 and self.of(True, False)


def scored(shape, settings):
    """Whether scores are a sigmoid or softmax; that of a single channel is ignored."""
    return settings.get("sigmoid") or (settings.get("softmax") and shape[1] > 1)


def one_hot(labels, channels):
    """(B, C, *) bool; of a single channel where the label is 1."""
    first = 1 if channels == 1 else 0
    classes = torch.arange(first, first + channels)
    return labels == classes.reshape(-1, *[1] * (labels.ndim - 2))


def every(draw_configuration):
    """Runs a comparison for each seed, which a failure names, in both dtypes."""

    @pytest.mark.parametrize("block", range(5))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test(block, dtype):
        for seed in range(block, CONFIGURATIONS, 5):
            try:
                draw_configuration(Draw(seed), dtype)
            except Exception as error:
                raise AssertionError(f"seed {seed}") from error

    return test


SETTINGS = ("softmax=True", "to_onehot_y=True", "include_background=False", "No mask value")


@contextlib.contextmanager
def warned():
    """Which of the SETTINGS were warned of."""
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


def compare(loss, reference, x, dtype, mine, other, rtol=None):
    """Ours against MONAI's in float64, whose own float32 sums would be as far from the truth."""
    value, grad, names = evaluated(loss, x, *mine, dtype=dtype)
    expected, expected_grad, expected_names = evaluated(reference, x, *other, dtype=torch.float64)
    assert (value.dtype, grad.dtype) == (dtype, dtype)
    rtol = max(rtol or 0, {torch.float64: 1e-10, torch.float32: 1e-6}[dtype])
    assert_close(value, expected, rtol=rtol, atol=rtol * 1e-2)
    largest = float(expected_grad.abs().max())
    assert_close(grad, expected_grad, rtol=0, atol=rtol * largest + 1e-300, what="gradient")
    assert names == expected_names


# ---- each loss --------------------------------------------------------------------------------


def hard_only(draw, settings, shape):
    """Whether squared_pred or soft_label, drawn here where they can be, forbid soft targets."""
    settings["squared_pred"] = draw.of(True, False)
    settings["soft_label"] = bool(scored(shape, settings)) and draw.of(True, False)
    return settings["squared_pred"] or settings["soft_label"]


def tolerance(settings, shape):
    """MONAI squares norms, of the labels those of its float32 one-hot encoding."""
    of_labels = settings["to_onehot_y"] and shape[1] > 1
    return 1e-6 if of_labels and settings["squared_pred"] else None


def weights(draw, settings, shape):
    kept = shape[1] - (not settings["include_background"] and shape[1] > 1)
    several = draw.rand(kept).float() + 0.1
    return draw.of(None, 2, 0.5, several.tolist(), several)


@every
def test_dice(draw, dtype):
    shape, settings = draw.shape(), draw.common()
    hard = hard_only(draw, settings, shape)
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=not hard)
    settings |= {"jaccard": draw.of(True, False), "weight": weights(draw, settings, shape)}
    x = draw.logits(shape, settings)
    pair = ours.DiceLoss(**settings), theirs.DiceLoss(**settings)
    compare(*pair, x, dtype, [mine], [other], tolerance(settings, shape))


@every
def test_tversky(draw, dtype):
    shape, settings = draw.shape(), draw.common()
    hard = hard_only(draw, settings, shape) and settings["soft_label"]
    del settings["squared_pred"]
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=not hard)
    settings |= {"alpha": draw.random.random(), "beta": draw.random.random()}
    x = draw.logits(shape, settings)
    pair = ours.TverskyLoss(**settings), theirs.TverskyLoss(**settings)
    compare(*pair, x, dtype, [mine], [other])


@every
def test_generalized_dice(draw, dtype):
    shape, settings = draw.shape(), draw.common()
    hard = hard_only(draw, settings, shape) and settings["soft_label"]
    del settings["squared_pred"]
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=not hard)
    settings["w_type"] = draw.of("square", "simple", "uniform")
    x = draw.logits(shape, settings)
    # MONAI computes w in float32, whatever the input.
    pair = ours.GeneralizedDiceLoss(**settings), theirs.GeneralizedDiceLoss(**settings)
    compare(*pair, x, dtype, [mine], [other], rtol=1e-6)


@every
def test_masked_dice(draw, dtype):
    shape, settings = draw.shape(), draw.common()
    hard = hard_only(draw, settings, shape)
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=not hard)
    settings |= {"jaccard": draw.of(True, False), "weight": weights(draw, settings, shape)}
    if settings["to_onehot_y"] and shape[1] > 1:
        settings["include_background"] = False  # which is MONAI's exception, tested below
        settings["weight"] = None
    mask = draw.rand(draw.of(1, shape[0]), 1, *shape[2:]) < 0.6
    mask = mask.to(draw.of(torch.bool, torch.uint8, torch.int64, torch.float32))
    masks = draw.of([mask], [mask], [mask], [])
    x = draw.logits(shape, settings)
    pair = ours.MaskedDiceLoss(**settings), theirs.MaskedDiceLoss(**settings)
    compare(*pair, x, dtype, [mine, *masks], [other, *masks], tolerance(settings, shape))


def compound(draw, shape):
    settings = draw.common()
    settings |= {
        "reduction": draw.of("mean", "sum"),
        "jaccard": draw.of(True, False),
        "squared_pred": draw.of(True, False),
        "lambda_dice": draw.of(1.0, 0.3, 0.0),
    }
    return settings


@every
def test_dice_ce(draw, dtype):
    shape = draw.shape()
    settings = compound(draw, shape)
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=not settings["squared_pred"])
    settings |= {"lambda_ce": draw.of(1.0, 2.0, 0.0), "label_smoothing": draw.of(0.0, 0.2)}
    weight = draw.of(None, draw.rand(shape[1]) + 0.1)
    x = draw.logits(shape, settings)
    pair = (module.DiceCELoss(weight=weight, **settings) for module in (ours, theirs))
    compare(*pair, x, dtype, [mine], [other], tolerance(settings, shape))


@every
def test_dice_focal(draw, dtype):
    shape = draw.shape()
    settings = compound(draw, shape)
    kept = shape[1] - (not settings["include_background"] and shape[1] > 1)
    soft = draw.of(True, False, False) and not settings["squared_pred"]
    alpha = draw.of(None, 0.25, 0.0, (draw.rand(kept) * 0.9).tolist())
    gamma = draw.of(0.0, 0.5, 1.0, 2.0, 3.0)
    settings |= {
        "gamma": 0.0 if soft else gamma,
        "alpha": None if soft else alpha,
        "lambda_focal": draw.of(1.0, 2.0, 0.0),
        "weight": weights(draw, settings, shape) if kept > 1 else draw.of(None, 2, 0.5),
    }
    mine, other, settings["to_onehot_y"] = draw.target(shape, soft=soft)
    x = draw.logits(shape, settings)
    # MONAI computes the focal loss in float32, whatever the input.
    pair = ours.DiceFocalLoss(**settings), theirs.DiceFocalLoss(**settings)
    compare(*pair, x, dtype, [mine], [other], rtol=2e-6)


# ---- ignore_index ------------------------------------------------------------------------------


def ignoring(draw, shape, index):
    """A target of each kind with voxels to ignore, ours and MONAI's, and to_onehot_y."""
    channels = shape[1]
    labels = draw.labels(shape)
    hole = draw.rand(*labels.shape) < 0.3
    sentinel = not 0 <= index < max(channels, 2)
    kind = draw.of("labels", "dense")
    if channels == 1:
        y = draw.rand(*shape).float() if kind == "dense" and sentinel else labels
        y = torch.where(hole, index, y) if sentinel else y
        return y, y.double(), False
    if kind == "labels":
        y = torch.where(hole, index, labels) if sentinel else labels
        y = y.to(draw.of(torch.int16, torch.int64, torch.float32))
        return y, y, True
    dense = one_hot(labels, channels)
    if sentinel:
        dense = dense & ~hole
        soft = dense * draw.rand(*shape).float()
        if draw.of(True, False):
            return soft, soft.double(), False
    mine = dense.to(draw.of(torch.bool, torch.uint8, torch.int64, torch.float32))
    return mine, dense.double(), False


@every
def test_ignored_sentinel(draw, dtype):
    shape, settings = draw.shape(), draw.common()
    settings["ignore_index"] = index = draw.of(255, -1, -100, 7)
    mine, other, settings["to_onehot_y"] = ignoring(draw, shape, index)
    name = draw.of("DiceLoss", "TverskyLoss")
    if name == "DiceLoss":
        settings |= {"jaccard": draw.of(True, False), "weight": weights(draw, settings, shape)}
    x = draw.logits(shape, settings)
    pair = getattr(ours, name)(**settings), getattr(theirs, name)(**settings)
    compare(*pair, x, dtype, [mine], [other])


@every
def test_ignored_class(draw, dtype):
    """MONAI counts the ignored class in the mean, as one that no voxel has, though its
    documentation says it is left out of the loss. We leave it out: our mean is that of MONAI's
    other classes.
    """
    shape, settings = draw.shape(), draw.common()
    settings["ignore_index"] = index = draw.of(0, 1)
    mine, other, settings["to_onehot_y"] = ignoring(draw, shape, index)
    name = draw.of("DiceLoss", "TverskyLoss")
    reduction, channels = settings["reduction"], shape[1]
    reference = getattr(theirs, name)(**{**settings, "reduction": "none"})

    def others(x, target):
        cells = reference(x, target)
        axis = 0 if settings["batch"] else 1
        classes = list(range(cells.shape[axis]))
        first = channels - len(classes)
        left = [c for c in classes if channels == 1 or c + first != index]
        if reduction == "none":
            keep = torch.zeros(cells.shape[axis], dtype=cells.dtype)
            keep[left] = 1
            ones = cells.ndim - axis - 1
            return torch.where(keep.reshape(-1, *[1] * ones) > 0, cells, 0.0)
        cells = cells.index_select(axis, torch.tensor(left, dtype=torch.int64))
        # No class is left of a background that is left out and an ignored foreground: 0.
        return cells.sum() if reduction == "sum" or not left else cells.mean()

    x = draw.logits(shape, settings)
    compare(getattr(ours, name)(**settings), others, x, dtype, [mine], [other])


def test_the_ignored_class_counts_in_monai():
    """Why `test_ignored_class` does not compare means: MONAI's is 1/3 where nothing is wrong."""
    y = torch.tensor([[[0, 1, 2, 2]]])
    x = 100 * (y == torch.arange(3)[:, None]).double()
    x[:, 2] = -100
    settings = {"softmax": True, "to_onehot_y": True, "ignore_index": 2}
    assert_close(ours.DiceLoss(**settings)(x, y), 0, rtol=0, atol=1e-9)
    assert_close(theirs.DiceLoss(**settings, smooth_nr=0)(x, y), 1 / 3, rtol=1e-4)


# ---- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool], ids=str)
def test_masked_voxels_are_no_background(dtype):
    """With to_onehot_y MONAI makes masked voxels the background's, which the masked prediction
    misses. Its documentation has only the voxels inside the mask contribute, as here: the loss of
    labels is that of their one-hot encoding.
    """
    draw = Draw(0)
    x, labels = draw.logits((2, 2, 5, 4), {"softmax": True}), draw.labels((2, 2, 5, 4)).to(dtype)
    mask = draw.rand(2, 1, 5, 4) < 0.5
    dense = one_hot(labels.long(), 2).float()
    of_labels = ours.MaskedDiceLoss(softmax=True, to_onehot_y=True)(x, labels, mask)
    expected = theirs.MaskedDiceLoss(softmax=True)(x, dense, mask)
    assert_close(of_labels, expected, rtol=1e-6)
    in_monai = theirs.MaskedDiceLoss(softmax=True, to_onehot_y=True)(x, labels, mask)
    assert abs(in_monai - of_labels) > 0.01


def test_masked_and_rogue_labels():
    """No label that data may hold is taken for a masked one; 256 classes fill uint8."""
    x, mask = torch.zeros(1, 3, 4), torch.tensor([[[1, 1, 0, 1]]])
    loss = ours.MaskedDiceLoss(softmax=True, to_onehot_y=True)
    for rogue, dtype in ((255, torch.uint8), (-1, torch.int64), (255, torch.int16)):
        y = torch.tensor([[[0, 1, 2, rogue]]]).to(dtype)
        with pytest.raises(ValueError, match=f"1 label outside .* first is {rogue} at"):
            loss(x, y, mask)
    x = torch.randn(1, 256, 4, dtype=torch.float64)
    y = torch.tensor([[[0, 254, 255, 255]]], dtype=torch.uint8)
    expected = theirs.MaskedDiceLoss(softmax=True)(x, one_hot(y, 256).double(), mask)
    assert_close(loss(x, y, mask), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 1, 1, 4), "Spatial size of input"), ((1, 1, 4), "Dim of input")],
)
def test_masks_of_other_shapes_broadcast_with_a_warning(shape, message):
    draw = Draw(1)
    x, y, mask = draw.rand(2, 3, 5, 4), draw.rand(2, 3, 5, 4) < 0.5, draw.rand(*shape) < 0.5
    values = []
    for loss in (ours.MaskedDiceLoss(), theirs.MaskedDiceLoss()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values.append(loss(x, y.double(), mask))
        assert any(message in str(warning.message) for warning in caught)
        assert {warning.category for warning in caught} == {UserWarning}
    assert_close(*values, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 1, 5), "Batch size of mask"), ((2, 2, 5), "only one channel")]
)
def test_masks_that_do_not_fit(shape, message):
    x = torch.rand(2, 3, 5)
    for loss in (ours.MaskedDiceLoss(), theirs.MaskedDiceLoss()):
        with pytest.raises(ValueError, match=message):
            loss(x, x, torch.ones(shape))


# ---- constructors, errors ----------------------------------------------------------------------

LOSSES = sorted(ours.__all__)


@pytest.mark.parametrize("name", LOSSES)
def test_signatures(name):
    for method in ("__init__", "forward"):
        mine, other = (
            [
                (p.name, p.kind, p.default)
                for p in inspect.signature(
                    getattr(getattr(module, name), method)
                ).parameters.values()
            ]
            for module in (ours, theirs)
        )
        assert mine == other


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


OVERLAPS = ("DiceLoss", "MaskedDiceLoss", "GeneralizedDiceLoss", "TverskyLoss")
COMPOUNDS = ("DiceCELoss", "DiceFocalLoss")


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
        ({}, (3,), (3,), IndexError, IndexError),
    ],
)
@pytest.mark.filterwarnings("ignore:No mask value:UserWarning")
def test_shapes_that_do_not_fit(name, settings, x, target, error, of_compound):
    error = of_compound if name in COMPOUNDS else error
    for kind in (getattr(ours, name), getattr(theirs, name)):
        with pytest.raises(error):
            kind(**settings)(torch.zeros(x), torch.zeros(target))


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


@pytest.mark.parametrize("weight", [[1.0], [1.0, 2.0, 3.0], 2.0])
def test_weights_of_one_class_are_not_looked_at(weight):
    x, y = torch.rand(2, 2, 5), torch.rand(2, 2, 5) < 0.5
    settings = {"include_background": False, "weight": weight}
    expected = theirs.DiceLoss(**settings)(x, y)
    assert_close(ours.DiceLoss(**settings)(x, y), expected, rtol=1e-6)


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


def test_dense_targets_out_of_range():
    x, y = torch.zeros(1, 1, 3), torch.tensor([[[0, 1, 255]]])
    with pytest.raises(ValueError, match=r"1 value outside \[0, 1\]"):
        ours.DiceLoss(sigmoid=True)(x, y)


def test_negative_weights_are_refused_at_once():
    for kind in (ours.DiceLoss, ours.DiceFocalLoss):
        with pytest.raises(ValueError, match="no less than 0"):
            kind(weight=[1.0, -1.0])
    with pytest.raises(ValueError, match="no less than 0"):
        theirs.DiceLoss(weight=[1.0, -1.0])(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_nothing_of_nothing_is_perfect():
    x, y = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    assert ours.DiceLoss(smooth_nr=0, smooth_dr=0)(x, y) == 0
    assert theirs.DiceLoss(smooth_nr=0, smooth_dr=0)(x, y).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_logits(dtype):
    """float32 losses, of sums that do not overflow."""
    x = torch.ones(1, 2, 300, 300, dtype=dtype).requires_grad_()
    loss = ours.DiceLoss(sigmoid=True)(x, torch.ones(1, 2, 300, 300, dtype=torch.bool))
    loss.backward()
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)
    s = torch.tensor(1.0).sigmoid()
    assert_close(loss.detach(), 1 - 2 * s / (1 + s), rtol=1e-5)


# ---- what is refused ---------------------------------------------------------------------------

SOFT = torch.full((1, 2, 4), 0.5)
HARD = torch.eye(2)[None].repeat(1, 1, 2)
LABELS = torch.zeros(1, 1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "settings", "target", "message"),
    [
        ("DiceLoss", {"squared_pred": True}, SOFT, "squared_pred=True with targets between"),
        ("DiceCELoss", {"squared_pred": True}, SOFT, "squared_pred=True with targets between"),
        ("DiceLoss", {"soft_label": True, "softmax": True}, SOFT, "soft_label=True with targets"),
        ("TverskyLoss", {"soft_label": True, "sigmoid": True}, SOFT, "soft_label=True with target"),
        ("GeneralizedDiceLoss", {"soft_label": True, "sigmoid": True}, SOFT, "soft_label=True wi"),
        ("DiceLoss", {"soft_label": True}, HARD, "soft_label=True without sigmoid=True or"),
        ("TverskyLoss", {"soft_label": True, "to_onehot_y": True}, LABELS, "soft_label=True witho"),
        ("TverskyLoss", {"soft_label": True, "other_act": abs}, HARD, "soft_label=True without"),
        ("DiceLoss", {"ignore_index": 1}, SOFT, "ignore_index=1 of a class with targets between"),
        ("TverskyLoss", {"ignore_index": 0}, SOFT, "ignore_index=0 of a class with targets"),
        ("DiceFocalLoss", {}, SOFT, "gamma with targets between 0 and 1 .* use gamma=0, alpha="),
        ("DiceFocalLoss", {"gamma": 0, "alpha": 0.5}, SOFT, "alpha with targets between 0 and 1"),
        ("DiceLoss", {}, SOFT.clone().requires_grad_(), "target that requires grad .* detach it"),
    ],
)
def test_what_one_pass_cannot_compute(name, settings, target, message):
    with pytest.raises(NotImplementedError, match=message):
        getattr(ours, name)(**settings)(torch.zeros(1, 2, 4), target)


def test_voxel_maps_are_refused():
    with pytest.raises(NotImplementedError, match='reduction="none", a loss of each voxel'):
        ours.DiceFocalLoss(reduction="none")


def test_float_masks_are_refused():
    loss = ours.MaskedDiceLoss()
    for mask in (torch.full((1, 1, 4), 0.5), torch.full((1, 1, 4), 2)):
        with pytest.raises(NotImplementedError, match="mask with values other than 0 and 1"):
            loss(SOFT, HARD, mask)
    with pytest.raises(NotImplementedError, match="mask that requires grad"):
        loss(SOFT, HARD, torch.ones(1, 1, 4).requires_grad_())


def test_several_weights_of_one_channel_are_refused():
    loss = ours.DiceCELoss(weight=torch.ones(4))
    with pytest.raises(NotImplementedError, match="weight of several numbers"):
        loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_input_without_spatial_axes_is_refused(name):
    with pytest.raises(NotImplementedError, match="without spatial axes"):
        getattr(ours, name)()(torch.zeros(2, 3), torch.zeros(2, 3))


# ---- as modules --------------------------------------------------------------------------------


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
def test_only_the_gradient_is_of_the_images_size(name):
    """What torch allocates from the call to the end of backward, for labels and bool targets."""
    large = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= x.numel():
                large.append(out)
            return out

    x, y = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randint(5, (2, 1, 8, 8))
    for target, labels in ((y, True), (one_hot(y, 5), False)):
        loss = getattr(ours, name)(softmax=True, to_onehot_y=labels)
        with Sizes():
            (grad,) = torch.autograd.grad(loss(x, target), x)
        assert {t.data_ptr() for t in large} == {grad.data_ptr()}
        large.clear()


def test_of_labels_a_mask_copies_no_more_than_them():
    kept = []
    x, y = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randint(5, (2, 1, 8, 8))
    loss = ours.MaskedDiceLoss(softmax=True, to_onehot_y=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(x, y.to(torch.uint8), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    assert {(t.dtype, t.numel()) for t in kept if t.numel() > 30} == {
        (torch.float32, x.numel()),
        (torch.uint8, y.numel()),
    }


def test_enumerations_are_taken():
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


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_as_one_graph(name):
    x, y = torch.randn(2, 3, 4), torch.randint(3, (2, 1, 4))
    loss = getattr(ours, name)(softmax=True, to_onehot_y=True)
    mask = [torch.rand(2, 1, 4) < 0.5] if name == "MaskedDiceLoss" else []
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_close(compiled(x, y, *mask), loss(x, y, *mask), rtol=1e-6)


def test_monai_is_not_imported():
    source = Path(ours.__file__).read_text() + Path(ours._shared.__file__).read_text()
    assert not re.search(r"^\s*(import|from) monai", source, re.MULTILINE)
