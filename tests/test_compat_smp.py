"""segmentation_models_pytorch's losses as dice_core computes them, against its own and against
the formulas.
"""

import ast
import copy
import importlib
import importlib.util
import inspect
import pickle
import random
import sys
import types

import naive
import pytest
import torch
from compare import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For what is this small, several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Random(random.Random):
    """Choices and tensors of one seed."""

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


def agree(kind, formula, x, arguments, y, what):
    """With the formula in float64, and with SMP in x's precision."""
    exact = 1e-10 if x.dtype == torch.float64 else 1e-6
    loss = kind(**arguments)
    same(lambda x: loss(x, y), lambda x: formula(x.double()), x, exact, what)
    if SMP is not None:
        # Its 1 - score is x's precision, and its sum of class weights always float32.
        rtol = 5e-6 if x.dtype == torch.float32 else exact
        rtol = max(rtol, 5e-7 if arguments.get("class_weights") is not None else 0)
        other = getattr(SMP, kind.__name__)(**arguments)
        same(lambda x: loss(x, y), lambda x: other(x, y), x, rtol, what)


def mean(i, p, t, arguments, alpha, beta, gamma):
    """The loss of the sums (N, C)."""
    i, p, t = (row.sum(0) for row in (i, p, t))
    eps, smooth = arguments["eps"], arguments["smooth"]
    q = (i + smooth) / (i + alpha * (p - i) + beta * (t - i) + smooth).clamp(min=eps)
    f = -q.clamp(min=eps).log() if arguments["log_loss"] else 1 - q
    f = f * (t > 0)
    weight = torch.ones_like(f)
    if arguments["class_weights"] is not None:
        weight = torch.as_tensor(arguments["class_weights"]).float().double()
    if arguments["classes"] is not None:
        classes = torch.as_tensor(arguments["classes"])
        f, weight = f[classes], weight[classes]
    return ((f * weight).sum() / weight.sum()) ** gamma


def settings(some, mode, channels):
    arguments = {
        "mode": mode,
        "classes": None,
        "log_loss": some.of(True, False),
        "from_logits": some.of(True, True, False),
        "smooth": some.of(0.0, 0.5),
        "ignore_index": some.of(None, None, 255, -1, 0),
        "eps": some.of(1e-7, 1e-7, 0.3, 9.0),
        "class_weights": None,
    }
    if arguments["eps"] > 1:  # which leaves no logarithm
        arguments["log_loss"] = False
    if mode != "binary":
        arguments["classes"] = some.of(None, None, [0], (channels - 1, 0), [-1, 0, 0])
        weights = [some.random() + 0.1 for _ in range(channels)]
        arguments["class_weights"] = some.of(None, weights, torch.tensor(weights))
        if isinstance(arguments["classes"], list):
            arguments["classes"] = some.of(arguments["classes"], torch.tensor(arguments["classes"]))
    return arguments


def target(some, mode, shape, ignore):
    """Labels in the form that SMP takes, and as the formula reads them."""
    samples, channels, *space = shape
    if mode == "multiclass":
        y = torch.randint(channels, (samples, 1, *space), generator=some.torch)
        y[y == some.of(channels - 1, -1)] = 0  # a class that is not there
    else:
        y = (some.uniform(*shape) > 0.6).long()
        y[:, -1] *= some.of(0, 1)
    if ignore:
        y[some.uniform(*y.shape) < 0.3] = ignore
    given = y
    if ignore is not None or mode != "multiclass":
        dtypes = (torch.int16, torch.int64, torch.float32, torch.float64)
        given = y.to(some.of(*dtypes, *[torch.uint8] * (ignore != -1)))
        if mode != "multiclass" and ignore is None:
            given = some.of(given, y.bool())
    if mode == "multiclass" or channels == 1:
        given = some.of(given, given[:, 0], given.reshape(samples, -1))
    return given, y


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(2))
def test_values_and_gradients(kind, mode, seed):
    some = Random(seed)
    for case in range(25):
        shape = some.shape(1) if mode == "binary" else some.shape(2, 3, 5)
        arguments = settings(some, mode, shape[1])
        x = some.logits(shape)
        x = x if arguments["from_logits"] else 0.01 + 0.98 * x.sigmoid()
        y, plain = target(some, mode, shape, arguments["ignore_index"])
        rates = {DiceLoss: (0.5, 0.5, 1), JaccardLoss: (1, 1, 1)}.get(kind)
        made = dict(arguments)
        if rates is None:
            rates = (some.random(), some.random(), some.of(1.0, 1.5, 2.0))
            made.update(zip(("alpha", "beta", "gamma"), rates, strict=True))
        activation = "softmax" if mode == "multiclass" else "sigmoid"
        activation = activation if arguments["from_logits"] else "none"

        def formula(x, plain=plain, arguments=arguments, rates=rates, activation=activation):
            ignore = arguments["ignore_index"]
            out = naive.statistics(x, plain, ignore_label=ignore, activation=activation)
            return mean(*out[:3], arguments, *rates)

        if rates[2] != 1 and formula(x.double()) == 0:
            continue  # whose gradient the next test is about
        agree(kind, formula, x, made, y, f"{case}: {made}, {y.dtype}, {tuple(x.shape)}")


def example(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x, torch.randint(max(shape[1], 2), (shape[0], 1, *shape[2:]), generator=generator)


def test_binary_takes_any_axes_for_one_class():
    x, _ = example(2, 3, 4, 5, dtype=torch.float64)
    y = torch.randint(2, (2, 3, 4, 5))
    loss, flat = DiceLoss("binary"), (x.reshape(2, 1, 60), y.reshape(2, 60))
    for given in (
        (x, y),
        (x.reshape(2, 12, 5), y),
        (x[:, :1], y[:, 0]),
        (x.permute(0, 2, 3, 1), y),
    ):
        whole = given[0].reshape(2, 1, -1), given[1].reshape(2, 1, -1)
        assert_close(loss(*given), loss(*whole), rtol=1e-12)
        if SMP is not None:
            assert_close(loss(*given), SMP.DiceLoss("binary")(*given), rtol=1e-10)
    assert_close(loss(x, y), loss(*flat), rtol=1e-12)


@pytest.mark.parametrize("log_loss", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_no_loss_has_no_gradient(gamma, log_loss):
    """Where no class is there; SMP's derivative of 0**0.5 is NaN."""
    x, y = example(2, 1, 4, 5)
    loss = TverskyLoss("binary", gamma=gamma, log_loss=log_loss)
    value, grad = differentiated(lambda x: loss(x, torch.zeros_like(y)), x)
    assert_close(value, 0, rtol=0)
    assert_close(grad, torch.zeros(x.shape), rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nothing_counted(kind):
    x, y = example(2, 3, 4, 5)
    y[:] = 255
    made = {"mode": "multiclass", "ignore_index": 255}
    agree(kind, lambda x: 0 * x.sum(), x, made, y, "nothing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    x, y = example(2, 3, 4, 5)
    x = x.to(dtype)
    for log_loss in (False, True):
        loss = JaccardLoss("multiclass", log_loss=log_loss)
        value, grad = differentiated(lambda x, loss=loss: loss(x, y), x)
        exact, exact_grad = differentiated(lambda x, loss=loss: loss(x, y), x.double())
        assert value.dtype == torch.float32
        assert_close(value, exact, rtol=1e-6)
        assert_close(grad.double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_labels_of_any_integers():
    x, y = example(2, 3, 4, 5)
    loss = DiceLoss("multiclass")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        assert_close(loss(x, y.to(dtype)), loss(x, y), rtol=0)


# What is refused.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_arguments(kind):
    with pytest.raises(AssertionError, match="mode must be"):
        kind("foo")
    with pytest.raises(ValueError, match="class_weights are of several classes"):
        kind("binary", class_weights=[1.0])
    with pytest.raises(AssertionError, match="classes are some of several"):
        kind("binary", classes=[0])
    # SMP takes numbers for None, and one weight for a sum in place of a mean.
    with pytest.raises(TypeError, match="classes must be a list, got 1"):
        kind("multiclass", classes=1)
    with pytest.raises(TypeError, match=r"class_weights must be a list, got 3\.0"):
        kind("multilabel", class_weights=3.0)
    x, y = example(2, 3, 4, 5)
    with pytest.raises(ValueError, match="eps must lie between 0 and 1"):
        kind("multiclass", log_loss=True, eps=1.0)(x, y)
    for weights in ([2.0], [1.0, 2.0], [1.0] * 4):
        with pytest.raises(ValueError, match="weight must have 3 entries"):
            kind("multiclass", class_weights=weights)(x, y)
    for nothing in ({"classes": []}, {"class_weights": [0.0, 1.0, -1.0]}):
        with pytest.raises(ValueError, match="leave nothing"):
            kind("multiclass", **nothing)(x, y)
    for classes in ([3], [-4]):
        with pytest.raises(IndexError, match="out of bounds"):
            kind("multiclass", classes=classes)(x, y)


@pytest.mark.parametrize("mode", MODES)
def test_targets_that_do_not_fit(mode):
    x, y = example(2, 1 if mode == "binary" else 3, 4, 5)
    y = torch.randint(2, x.shape) if mode == "multilabel" else y
    loss = DiceLoss(mode)
    with pytest.raises(AssertionError, match="y_true has 1 samples and y_pred 2"):
        loss(x, y[:1])
    shape = (RuntimeError, "invalid") if mode == "multilabel" else (AssertionError, "has shape")
    with pytest.raises(shape[0], match=shape[1]):
        loss(x, y[..., :3])
    for label in (3, -1):
        with pytest.raises(ValueError, match="outside"):
            loss(x, torch.where(y == 1, label, y))
    with pytest.raises(NotImplementedError, match="y_true requires grad"):
        loss(x, y.float().requires_grad_())
    if mode == "multiclass":
        with pytest.raises(ValueError, match="needs at least two channels"):
            loss(x[:, :1], y)
        return
    with pytest.raises(NotImplementedError, match="y_true must hold 0 and 1"):
        loss(x, y * 0.5)
    with pytest.raises(ValueError, match="outside"):
        loss(x, y * 2.0)


@needs_smp
def test_names_are_smps():
    for kind in KINDS:
        ours, others = inspect.signature(kind), inspect.signature(getattr(SMP, kind.__name__))
        assert list(ours.parameters) == list(others.parameters)
        for name, parameter in ours.parameters.items():
            assert parameter.default == others.parameters[name].default
        made = ("multiclass", [0, 2], True, False, 0.5, 2, 0.1)
        loss, other = kind(*made), getattr(SMP, kind.__name__)(*made)
        for name in ours.parameters:
            value, expected = getattr(loss, name, None), getattr(other, name, None)
            assert value is expected or (value == expected) is True or value.equal(expected)
    for name in ("BINARY_MODE", "MULTICLASS_MODE", "MULTILABEL_MODE"):
        assert getattr(smp, name) == getattr(SMP, name)
    assert not issubclass(JaccardLoss, DiceLoss)
    assert issubclass(TverskyLoss, DiceLoss)


# As modules.


def losses_of_all_kinds():
    return (
        DiceLoss("multiclass", ignore_index=2, class_weights=[1.0, 2.0, 4.0]),
        JaccardLoss("multilabel", classes=[0, 2], log_loss=True),
        TverskyLoss("binary", gamma=2.0, log_loss=True),
    )


def targets(y):
    dense = torch.cat([y == channel for channel in range(3)], 1)
    return y.to(torch.uint8), dense, dense.to(torch.uint8)


def test_copies_and_pickles():
    x, y = example(2, 3, 4, 5)
    for loss, given in zip(losses_of_all_kinds(), targets(y), strict=True):
        value = loss(x, given)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
            assert_close(other(x, given), value, rtol=0)
        assert not loss.state_dict()


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
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    for loss, given in zip(losses_of_all_kinds(), targets(y), strict=True):
        with Recorded() as recorded:
            torch.autograd.grad(loss(x, given), x)
        assert recorded.large(x) == 1
    crop = torch.randn(2, 1, 26, 26)[..., 1:-1, 1:-1].requires_grad_()
    with Recorded() as recorded:
        torch.autograd.grad(DiceLoss("binary")(crop, y > 1), crop)
    assert recorded.large(crop) == 1


def test_compiled():
    x, y = example(2, 3, 4, 5)
    for loss, given in zip(losses_of_all_kinds(), targets(y), strict=True):
        value, grad = differentiated(lambda x, f=loss, t=given: f(x, t), x)
        compiled = torch.compile(loss, backend="eager")
        other, other_grad = differentiated(lambda x, f=compiled, t=given: f(x, t), x)
        assert_close(other, value, rtol=1e-6)
        assert_close(other_grad, grad, rtol=1e-6, atol=1e-9)


def test_smp_is_not_imported():
    imports = ast.walk(ast.parse(inspect.getsource(smp)))
    modules = {getattr(node, "module", None) for node in imports}
    modules |= {name.name for node in imports for name in getattr(node, "names", ())}
    assert not [name for name in modules if str(name).startswith("segmentation_models")]
