"""compat.smp compared with segmentation_models_pytorch."""

import ast
import copy
import importlib
import importlib.util
import inspect
import itertools
import math
import pickle
import sys
import types

import pytest
import torch
from compare import assert_close
from peers import Random, Recorded, differentiated, example, one_hot, same, same_compiled
from peers import one_thread as one_thread

from dice_core.compat import smp
from dice_core.compat.smp import DiceLoss, JaccardLoss, TverskyLoss

KINDS = (DiceLoss, JaccardLoss, TverskyLoss)
MODES = ("binary", "multiclass", "multilabel")


def installed():
    """SMP's losses, which need torch alone; its package imports timm and torchvision."""
    found = importlib.util.find_spec("segmentation_models_pytorch")
    if found is None:
        return None
    before = {name: module for name, module in sys.modules.items() if name.startswith(found.name)}
    package = types.ModuleType(found.name)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[found.name] = package
    try:
        return importlib.import_module(f"{found.name}.losses")
    finally:  # whoever imports the package gets all of it
        for name in [name for name in sys.modules if name.startswith(found.name)]:
            del sys.modules[name]
        sys.modules.update(before)


SMP = installed()
needs_smp = pytest.mark.skipif(SMP is None, reason="segmentation-models-pytorch is not installed")


def theirs(kind, arguments, x):
    """SMP's loss; for float64 logits its float32 class weights are converted to float64."""
    loss = getattr(SMP, kind.__name__)(**arguments)
    if x.dtype == torch.float64 and loss.class_weights is not None:
        loss.class_weights = loss.class_weights.double()
    return loss


def agree(kind, arguments, x, y, what=None):
    """Asserts agreement with SMP, up to rounding; float32 up to its rounding of the score."""
    ours, other = kind(**arguments), theirs(kind, arguments, x)
    rtol = 1e-10 if x.dtype == torch.float64 else 5e-6
    what = f"{what}: {kind.__name__}, {arguments}, {y.dtype}, {tuple(x.shape)}"
    same(lambda x: ours(x, y), lambda x: other(x, y), x, rtol, what)


# ---- values and gradients ------------------------------------------------------------------------


def settings(some, kind, mode, channels):
    arguments = {
        "mode": mode,
        "log_loss": some.of(True, False),
        "smooth": some.of(0.0, 0.5),
        "ignore_index": some.of(None, None, 255, -1, 0),
        "eps": some.of(1e-7, 1e-7, 0.3, 9.0),
    }
    if mode != "binary":
        weights = [some.random() + 0.1 for _ in range(channels)]
        classes = some.of(None, None, [0], (channels - 1, 0), [-1, 0, 0])
        arguments["classes"] = torch.tensor(classes) if classes and some.of(0, 1) else classes
        arguments["class_weights"] = some.of(None, weights, torch.tensor(weights))
    if kind is TverskyLoss:
        arguments.update(alpha=some.random(), beta=some.random(), gamma=some.of(1.0, 1.5, 2, 0))
    return arguments


def target(some, mode, shape, ignore):
    """Labels, or 0 and 1, in a form that SMP takes."""
    samples, channels = shape[:2]
    if mode == "multiclass":
        y = some.labels(shape)
        y[y == some.of(channels - 1, -1)] = 0  # an absent class
    else:
        y = (some.uniform(*shape) > 0.6).long()
        y[:, -1] *= some.of(0, 1)
    if ignore:
        y[some.uniform(*y.shape) < 0.3] = ignore
    if ignore is not None or mode != "multiclass":
        dtypes = (torch.int16, torch.int64, torch.float32, torch.float64)
        y = y.to(some.of(*dtypes, *[torch.uint8] * (ignore != -1)))
        if mode != "multiclass" and ignore is None:
            y = some.of(y, y.bool())
    if mode == "multiclass" or channels == 1:
        y = some.of(y, y[:, 0], y.reshape(samples, -1))
    return y


@needs_smp
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_values_and_gradients(kind, mode, seed):
    some = Random(seed)
    for case in range(25):
        shape = some.shape(1) if mode == "binary" else some.shape(2, 3, 5)
        arguments = settings(some, kind, mode, shape[1])
        y = target(some, mode, shape, arguments["ignore_index"])
        agree(kind, arguments, some.logits(shape), y, case)


@needs_smp
def test_binary_takes_any_axes_for_one_class():
    x, _ = example(2, 3, 4, 5, dtype=torch.float64)
    y = torch.randint(2, (2, 3, 4, 5))
    for given in (
        (x, y),
        (x.reshape(2, 12, 5), y),
        (x.reshape(2, 1, 60), y.reshape(2, 60)),
        (x[:, :1], y[:, 0]),
        (x.permute(0, 2, 3, 1), y),
    ):
        agree(DiceLoss, {"mode": "binary"}, *given)


@needs_smp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    """Computed in float32; SMP rounds probabilities and sums to half precision."""
    x, y = example(2, 3, 4, 5)
    x = x.to(dtype)
    for log_loss in (False, True):
        loss = JaccardLoss("multiclass", log_loss=log_loss)
        other = SMP.JaccardLoss("multiclass", log_loss=log_loss)
        value, grad = differentiated(lambda x, loss=loss: loss(x, y), x)
        exact, exact_grad = differentiated(lambda x, loss=other: loss(x, y[:, 0]), x.double())
        assert value.dtype == torch.float32
        assert_close(value, exact, rtol=1e-6)
        assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_labels_of_any_integer_dtype():
    x, y = example(2, 3, 4, 5)
    loss = DiceLoss("multiclass")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        assert_close(loss(x, y.to(dtype)), loss(x, y), rtol=0)


# ---- oddities ------------------------------------------------------------------------------------


@needs_smp
@pytest.mark.parametrize("log_loss", [False, True])
@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_power_of_a_zero_loss(gamma, log_loss):
    """If all classes are absent the mean is 0, and the derivative of 0**0.5 is infinite times 0."""
    x, y = example(2, 1, 4, 5, dtype=torch.float64)
    arguments = {"mode": "binary", "gamma": gamma, "log_loss": log_loss}
    agree(TverskyLoss, arguments, x, torch.zeros_like(y))
    loss = TverskyLoss(**arguments)
    _, grad = differentiated(lambda x: loss(x, torch.zeros_like(y)), x)
    assert bool(grad.isnan().all()) == (gamma in (-1.0, 0.5) and not log_loss)


@needs_smp
@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
def test_power_of_a_negative_mean(gamma):
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    arguments = {"mode": "multiclass", "gamma": gamma, "class_weights": [-3.0, 1.0, 1.0]}
    agree(TverskyLoss, arguments, x, y)


@needs_smp
@pytest.mark.parametrize(
    ("eps", "log_loss"), [(0.0, False), *itertools.product([0.3, 1.0, 5.0], [False, True])]
)
def test_eps_is_the_smallest_denominator_and_score(eps, log_loss):
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    arguments = {"mode": "multiclass", "eps": eps, "log_loss": log_loss}
    for scale in (1, 1e4):  # scores of exactly 0
        agree(DiceLoss, arguments, scale * x, y, scale)
        agree(DiceLoss, arguments, scale * x, torch.zeros_like(y), scale)


@needs_smp
def test_a_denominator_of_exactly_eps_has_a_derivative():
    x = torch.zeros(1, 1, 4, dtype=torch.float64)  # P = 2, I = Y / 2
    y = torch.tensor([[[1, 1, 0, 0]]])
    for kind, eps in ((DiceLoss, 2.0), (JaccardLoss, 3.0)):
        agree(kind, {"mode": "binary", "eps": eps}, x, y)


@needs_smp
def test_zero_denominator():
    """Without eps and smooth, the 0/0 of an absent class is NaN, and so is the loss."""
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    x[:, 2] = -math.inf
    y[y == 2] = 0
    arguments = {"mode": "multiclass", "eps": 0.0}
    agree(DiceLoss, arguments, x, y)
    assert DiceLoss(**arguments)(x, y).isnan()


@needs_smp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_logits_that_are_not_finite(special, mode):
    x, y = example(2, 1 if mode == "binary" else 3, 4, 5, dtype=torch.float64)
    x[1, 0, 1, 1] = special
    y = one_hot(y, 3) * torch.tensor([0, 1, 1])[:, None, None] if mode == "multilabel" else y
    for log_loss in (False, True):
        agree(JaccardLoss, {"mode": mode, "log_loss": log_loss}, x, y)


@needs_smp
@pytest.mark.parametrize("mode", MODES)
def test_no_valid_voxels(mode):
    x, y = example(2, 1 if mode == "binary" else 3, 4, 5)
    y = torch.full(x.shape if mode == "multilabel" else y.shape, 255)
    for kind in KINDS:
        agree(kind, {"mode": mode, "ignore_index": 255}, x, y)


@needs_smp
def test_classes_index_class_weights_of_any_length():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    for classes in ([0, 1], [1, 1, 0], [[0, 1], [1, 1]], torch.tensor(1), [True, False, True]):
        for weights in ([0.5, 2.0], [0.5, 2.0, 1.0, 4.0], None):
            arguments = {"mode": "multiclass", "classes": classes, "class_weights": weights}
            agree(DiceLoss, arguments, x, y)
    # A negative index counts from the end of each.
    agree(DiceLoss, {"mode": "multiclass", "classes": [-1], "class_weights": [1.0, 2.0]}, x, y)


@needs_smp
def test_class_weights_have_a_gradient():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    grads = []
    for kind in (DiceLoss, SMP.DiceLoss):
        weights = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
        loss = kind("multiclass", class_weights=weights, classes=[2, 0])
        grads += torch.autograd.grad(loss(x, y), weights)
    assert_close(grads[0], grads[1], rtol=1e-6)


@needs_smp
def test_changed_settings_are_followed():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    ours, other = TverskyLoss("multiclass"), SMP.TverskyLoss("multiclass")
    for name, value in (
        ("alpha", 0.9),
        ("gamma", 2.0),
        ("smooth", 1.0),
        ("eps", 70.0),
        ("log_loss", True),
        ("ignore_index", 1),
        ("classes", torch.tensor([2, 0])),
        ("class_weights", torch.tensor([1.0, 2.0, 4.0])),
        ("mode", "multilabel"),
    ):
        setattr(ours, name, value)
        setattr(other, name, value)
        given = one_hot(y, 3) if ours.mode == "multilabel" else y
        same(lambda x, t=given: ours(x, t), lambda x, t=given: other(x, t), x, 1e-7, name)
    ours.smooth = -1.0
    for _ in range(2):
        with pytest.raises(ValueError, match="smooth must be finite and at least 0"):
            ours(x, given)


# ---- where SMP is not followed -------------------------------------------------------------------


@needs_smp
def test_logits_of_ignored_voxels_have_no_effect():
    x, y = example(2, 3, 4, 5, dtype=torch.float64)
    y[0, 0, 0] = 255
    arguments = {"mode": "multiclass", "ignore_index": 255}
    loss, other = DiceLoss(**arguments), SMP.DiceLoss(**arguments)
    value, grad = differentiated(lambda x: loss(x, y), x)
    x[0, :, 0] = math.nan
    assert other(x, y).isnan()
    value_then, grad_then = differentiated(lambda x: loss(x, y), x)
    assert_close(value_then, value, rtol=0)
    assert_close(grad_then, grad, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_arguments(kind):
    with pytest.raises(AssertionError, match="mode must be"):
        kind("foo")
    with pytest.raises(ValueError, match="class_weights are not supported with mode='binary'"):
        kind("binary", class_weights=[1.0])
    with pytest.raises(AssertionError, match="classes are not supported with mode='binary'"):
        kind("binary", classes=[0])
    with pytest.raises(NotImplementedError, match="from_logits=False is not supported"):
        kind("binary", from_logits=False)
    # SMP treats scalars as None, and a single weight as a sum instead of a mean.
    with pytest.raises(TypeError, match="classes must be a list, got 1"):
        kind("multiclass", classes=1)
    with pytest.raises(TypeError, match=r"class_weights must be a list, got 3\.0"):
        kind("multilabel", class_weights=3.0)
    for name in ("smooth", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be finite and at least 0"):
            kind("multiclass", **{name: -0.5})
        with pytest.raises(TypeError, match=f"{name} must be a number, got a tensor"):
            kind("multiclass", **{name: torch.tensor(0.5)})
    with pytest.raises(ValueError, match="eps must be greater than 0 with log_loss=True"):
        kind("multiclass", log_loss=True, eps=0)
    with pytest.raises(TypeError, match="ignore_index must be an integer"):
        kind("multiclass", ignore_index=0.5)
    with pytest.raises(ValueError, match="num_threads"):
        kind("multiclass", num_threads=0)
    x, y = example(2, 3, 4, 5)
    with pytest.raises(ValueError, match="backend"):
        kind("multiclass", backend="foo")(x, y)
    for weights in ([2.0], [1.0, 2.0], [1.0] * 4):
        with pytest.raises(ValueError, match="class_weights must have 3 entries"):
            kind("multiclass", class_weights=weights)(x, y)
    with pytest.raises(ValueError, match="classes must name at least one"):
        kind("multiclass", classes=[])
    for classes in (None, [0, 2]):
        with pytest.raises(ValueError, match="class_weights that are averaged with sum to 0"):
            kind("multiclass", classes=classes, class_weights=[1.0, 0.0, -1.0])
    for classes in ([3], [-4]):
        with pytest.raises(ValueError, match=r"classes .* are not among the channels of y_pred, 3"):
            kind("multiclass", classes=classes)(x, y)
    with pytest.raises(ValueError, match="are not among the entries of class_weights, 3"):
        kind("multiclass", classes=[3], class_weights=[1.0] * 3)
    with pytest.raises(ValueError, match="class_weights must have one entry per class, got shape"):
        kind("multiclass", class_weights=[[1.0, 1.0]])
    for weights in (["a"], [1, [2]], [1j]):
        with pytest.raises(TypeError, match="class_weights must be"):
            kind("multiclass", class_weights=weights)
    for name in ("log_loss", "from_logits"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            kind("multiclass", **{name: "yes"})
    for wrong in (None, y.numpy(), y.to_sparse()):
        with pytest.raises(TypeError, match="y_true must be a"):
            kind("multiclass")(x, wrong)
        with pytest.raises(TypeError, match="y_pred must be a"):
            kind("multiclass")(wrong, y)
    with pytest.raises(ValueError, match="y_true has too few axes"):
        kind("multiclass")(x, y.new_zeros(()))
    with pytest.raises(ValueError, match="y_true is on meta but y_pred is on cpu"):
        kind("multiclass")(x, y.to("meta"))


@pytest.mark.parametrize("mode", MODES)
def test_targets_that_do_not_fit(mode):
    x, y = example(2, 1 if mode == "binary" else 3, 4, 5)
    y = torch.randint(2, x.shape) if mode == "multilabel" else y
    loss = DiceLoss(mode)
    with pytest.raises(AssertionError, match="y_true has 1 samples and y_pred 2"):
        loss(x, y[:1])
    for x_wrong, y_wrong in ((x, y[..., :3]), (x[..., :0], y[..., :0])):
        with pytest.raises(AssertionError, match="y_true has shape"):
            loss(x_wrong, y_wrong)
    for label in (3, -1):
        with pytest.raises(ValueError, match="outside"):
            loss(x, torch.where(y == 1, label, y))
    with pytest.raises(NotImplementedError, match="y_true requires grad"):
        loss(x, y.float().requires_grad_())
    if mode == "multiclass":
        with pytest.raises(ValueError, match="y_pred must have at least two channels"):
            loss(x[:, :1], y)


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_soft_targets_are_refused(mode):
    """During the pass; ignored targets may be soft."""
    x, y = example(2, 1 if mode == "binary" else 3, 4, 5)
    y = (y if mode == "binary" else one_hot(y, 3)).float()
    for wrong in (0.5, 1e-30, 2.0, math.nan):
        given = y.clone()
        given[1, 0, 2, 3] = wrong
        with pytest.raises(ValueError, match=r"1 value outside 0 and 1 .*\(1, 0, 2, 3\)"):
            DiceLoss(mode)(x, given)


@needs_smp
def test_names_are_smps():
    for kind in KINDS:
        ours, others = inspect.signature(kind), inspect.signature(getattr(SMP, kind.__name__))
        extras = ["backend", "num_threads", "check_labels", "inplace"]
        assert list(ours.parameters) == [*others.parameters, *extras]
        for name in extras:
            assert ours.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        for name, parameter in others.parameters.items():
            assert ours.parameters[name].default == parameter.default
        made = ("multiclass", [0, 2], True, True, 0.5, 2, 0.1)
        loss, other = kind(*made), getattr(SMP, kind.__name__)(*made)
        for name in others.parameters:
            value, expected = getattr(loss, name, None), getattr(other, name, None)
            assert value is expected or (value == expected) is True or value.equal(expected)
    for name in ("BINARY_MODE", "MULTICLASS_MODE", "MULTILABEL_MODE"):
        assert getattr(smp, name) == getattr(SMP, name)
    assert not issubclass(JaccardLoss, DiceLoss)
    assert issubclass(TverskyLoss, DiceLoss)


# ---- as modules ----------------------------------------------------------------------------------


def losses_of_all_kinds():
    return (
        DiceLoss("multiclass", ignore_index=2, class_weights=[1.0, 2.0, 4.0]),
        JaccardLoss("multilabel", classes=[0, 2], log_loss=True),
        TverskyLoss("binary", gamma=0.7, log_loss=True),
    )


def targets(y):
    dense = torch.cat([y == channel for channel in range(3)], 1)
    return y.to(torch.uint8), dense.float(), dense.to(torch.uint8)


def test_copies_and_pickles():
    x, y = example(2, 3, 4, 5)
    for loss, given in zip(losses_of_all_kinds(), targets(y), strict=True):
        value = loss(x, given)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
            assert_close(other(x, given), value, rtol=0)
        assert not loss.state_dict()


def test_only_the_gradient_has_the_size_of_the_logits():
    x, y = example(2, 3, 24, 24)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    for loss, given in zip(losses_of_all_kinds(), targets(y), strict=True):
        with Recorded() as recorded:
            torch.autograd.grad(loss(x, given), x)
        assert recorded.large(x) == 1
    crop = torch.randn(2, 1, 26, 26)[..., 1:-1, 1:-1].requires_grad_()
    with Recorded() as recorded:
        torch.autograd.grad(DiceLoss("binary")(crop, y > 1), crop)
    assert recorded.large(crop) == 1


@pytest.mark.parametrize("case", range(3))
def test_compiled_whole(case):
    x, y = example(2, 3, 4, 5)
    same_compiled(losses_of_all_kinds()[case], x, targets(y)[case])


def test_smp_is_not_imported():
    imports = ast.walk(ast.parse(inspect.getsource(smp)))
    modules = {getattr(node, "module", None) for node in imports}
    modules |= {name.name for node in imports for name in getattr(node, "names", ())}
    assert not [name for name in modules if str(name).startswith("segmentation_models")]
