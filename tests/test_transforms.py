"""What torch does to functions: compile, export, differentiate twice, vectorise, defer."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_bitwise_equal, assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import dice_core.torch
from dice_core import losses
from dice_core.torch import DiceCELoss, DiceLoss, Loss, loss, statistics

# torch itself compiles decompositions when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
FIRST_ONLY, REVERSE_ONLY = "first derivatives only", "reverse-mode differentiation only"


def example(*shape, dtype=torch.float64):
    """Logits (..., N, C, V) and labels (..., N, V)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    y = torch.randint(max(2, shape[-2]), (*shape[:-2], shape[-1]), generator=generator)
    return x, y


def of_statistics(x, y):
    return statistics(x, y, gamma=0).array


SEVERAL = Loss(losses.Dice(smooth=1) + losses.CrossEntropy(), activation="softmax")
FUNCTIONS = [loss, DiceLoss(smooth=1, reduction="none"), DiceCELoss(), SEVERAL, of_statistics]
FUNCTIONS += [DiceLoss([1.0, 2, 3], ignore_channel=0, p=2)]


def gradient(function, x, y):
    """Of the sum of the function's values, one pass at a time, without torch.func."""
    x = x.detach().clone().requires_grad_()
    function(x, y).sum().backward()
    return x.grad


# ---- torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_grad(function):
    x, y = example(2, 3, 5)
    grad, value = torch.func.grad_and_value(lambda x: function(x, y).sum())(x)
    assert_close(value, function(x, y).sum(), rtol=1e-14)
    assert_close(grad, gradient(function, x, y), rtol=1e-12, atol=1e-16)
    value, pull = torch.func.vjp(lambda x: function(x, y), x)
    assert_close(value, function(x, y), rtol=1e-14)
    assert_close(pull(torch.ones_like(value))[0], grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axes", [(0, 0), (2, 1), (-1, 2), (0, None), (None, 0)], ids=str)
def test_vmap(function, axes):
    x, y = example(4, 2, 3, 5)
    expected = [
        (a, b)
        for a, b in zip(
            x if axes[0] is not None else [x[0]] * 4,
            y if axes[1] is not None else [y[0]] * 4,
            strict=True,
        )
    ]
    x = x[0] if axes[0] is None else x.movedim(0, axes[0])
    y = y[0] if axes[1] is None else y.movedim(0, axes[1])
    values = torch.vmap(function, in_dims=axes)(x, y)
    assert_close(values, torch.stack([function(a, b) for a, b in expected]), rtol=1e-13)
    grads = torch.vmap(
        torch.func.grad(lambda x, y: function(x, y).sum()), in_dims=axes, randomness="error"
    )(x, y)
    singly = torch.stack([gradient(function, a, b) for a, b in expected])
    assert_close(grads, singly, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nested_vmap_and_backward(function):
    x, y = example(3, 4, 2, 3, 5)
    x.requires_grad_()
    values = torch.vmap(torch.vmap(function))(x, y)
    values.sum().backward()
    for a, b, grad in zip(x.detach().flatten(0, 1), y.flatten(0, 1), x.grad.flatten(0, 1)):  # noqa: B905
        assert_close(grad, gradient(function, a, b), rtol=1e-12, atol=1e-16)


def test_one_pass_for_all_of_vmap():
    """The kernel is called once, not once for each element."""
    x, y = example(4, 2, 3, 5)
    with torch.profiler.profile() as profile:
        torch.vmap(torch.func.grad(loss))(x, y)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["dice_core::statistics"] == calls["dice_core::statistics_grad"] == 1


def test_jacrev():
    x, y = example(2, 3, 5)
    criterion = DiceLoss(smooth=1, reduction="none")
    rows = torch.func.jacrev(lambda x: criterion(x, y))(x)
    expected = torch.autograd.functional.jacobian(lambda x: criterion(x, y), x)
    assert_close(rows, expected, rtol=1e-12, atol=1e-16)
    x, y = example(4, 2, 3, 5)
    batched = torch.vmap(torch.func.jacrev(criterion))(x, y)
    singly = [torch.func.jacrev(criterion)(a, b) for a, b in zip(x, y, strict=True)]
    assert_close(batched, torch.stack(singly), rtol=1e-12, atol=1e-16)


def test_gradients_of_each_sample():
    """As for differentially private training: a network's gradients of each sample."""
    net = nn.Conv1d(2, 3, 1, dtype=torch.float64)
    x = torch.randn(4, 1, 2, 5, dtype=torch.float64)
    y = torch.randint(3, (4, 1, 5))
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def of_parameters(parameters, x, y):
        return loss(torch.func.functional_call(net, parameters, (x,)), y)

    grads = torch.vmap(torch.func.grad(of_parameters), in_dims=(None, 0, 0))(parameters, x, y)
    for k in range(4):
        net.zero_grad()
        loss(net(x[k]), y[k]).backward()
        for name, p in net.named_parameters():
            assert_close(grads[name][k], p.grad, rtol=1e-10, atol=1e-15)


def test_class_weights():
    x, y = example(2, 3, 5)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    expected = loss(x, y, weight=weight)
    (slope,) = torch.autograd.grad(expected, weight)

    def of_weight(w, x=x):
        return loss(x, y, weight=w)

    assert_close(torch.func.grad(of_weight)(weight.detach()).detach(), slope, rtol=1e-13)
    assert_close(torch.func.grad(of_weight)(weight.detach(), x), slope, rtol=1e-13)
    both = torch.func.vmap(of_weight)(torch.stack([weight, 2 * weight])).detach()
    assert_close(both, [expected.item(), 2 * expected.item()], rtol=1e-13)
    module = DiceLoss([1, 1, 1])
    value = torch.func.functional_call(module, {"weight": weight}, (x, y))
    assert_close(value.detach(), expected.detach(), rtol=1e-13)


def test_no_grad_within():
    x, y = example(2, 3, 5)

    def constant(x):
        with torch.no_grad():
            value = loss(x, y)
        return value * x.sum()

    grad = torch.func.grad(constant)(x)
    assert_close(grad, loss(x, y).expand(x.shape), rtol=1e-13)


# ---- what is refused -----------------------------------------------------------------------------


def test_second_derivatives():
    x, y = example(1, 2, 5)
    x.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(loss(x, y) * scale, x, create_graph=True)
    for to in (x, scale):
        with pytest.raises(RuntimeError, match=FIRST_ONLY):
            torch.autograd.grad(grad.sum(), to, retain_graph=True)
    with pytest.raises(RuntimeError, match=FIRST_ONLY):
        torch.autograd.functional.hessian(lambda x: loss(x, y), x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_of_torch_func(function):
    x, y = example(2, 3, 5)

    def slope(x):
        return torch.func.grad(lambda x: function(x, y).sum())(x).square().sum()

    for transform in (
        lambda: torch.func.grad(slope)(x),
        lambda: torch.func.jacrev(torch.func.jacrev(lambda x: function(x, y)))(x),
        lambda: torch.vmap(torch.func.grad(slope))(x[None]),
    ):
        with pytest.raises(RuntimeError, match=FIRST_ONLY):
            transform()


@FORWARD_MODE
@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode(function):
    x, y = example(2, 3, 5)
    for transform in (
        lambda: torch.func.jvp(lambda x: function(x, y), (x,), (x,)),
        lambda: torch.func.jacfwd(lambda x: function(x, y))(x),
        lambda: torch.func.hessian(lambda x: function(x, y).sum())(x),
        lambda: torch.vmap(lambda x: torch.func.jvp(lambda x: function(x, y), (x,), (x,)))(x[None]),
    ):
        with pytest.raises(NotImplementedError, match=REVERSE_ONLY):
            transform()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REVERSE_ONLY):
        function(forward_ad.make_dual(x, x), y)


# ---- torch.compile and torch.export --------------------------------------------------------------


class Segmenter(nn.Module):
    """A network with its loss."""

    def __init__(self, criterion):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.criterion = criterion

    def forward(self, image, y):
        return self.criterion(self.net(image), y)


CRITERIA = [
    DiceLoss([1.0, 2.0, 3.0], smooth=1, ignore_channel=0),
    DiceCELoss(pool="batch", ce_weight=[1, 2, 3]),
    Loss(losses.GeneralizedDice(smooth=1)),
]


def step(model, image, y):
    model.zero_grad()
    value = model(image, y)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda criterion: type(criterion).__name__)
def test_model_and_loss_are_compiled_whole_for_any_shape(criterion):
    model = Segmenter(criterion)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        for shape in ((2, 8, 8), (3, 6, 10), (5, 12, 4)):
            image, y = torch.randn(shape[0], 1, *shape[1:]), torch.randint(3, shape)
            value, grads = step(compiled, image, y)
            expected, eager = step(model, image, y)
            assert_close(value, expected, rtol=1e-6)
            for a, b in zip(grads, eager, strict=True):
                assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_export():
    model = Segmenter(DiceLoss(smooth=1))
    image, y = torch.randn(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (image, y), dynamic_shapes={"image": {0: batch}, "y": {0: batch}}
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for count in (2, 5):
        image, y = torch.randn(count, 1, 8, 8), torch.randint(3, (count, 8, 8))
        assert_close(loaded(image, y).detach(), model(image, y).detach(), rtol=1e-6)


# ---- modes of torch ------------------------------------------------------------------------------


def test_copies():
    module = DiceCELoss(weight=[1, 2, 3], smooth=1, pool="batch")
    x, y = example(2, 3, 5)
    expected = module(x, y)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    other = DiceCELoss(weight=[3, 3, 3], smooth=1, pool="batch")
    other.load_state_dict(module.state_dict())
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other]
    copies.append(torch.load(saved, weights_only=False))
    for each in copies:
        assert_bitwise_equal(each(x, y).numpy(), expected.numpy())


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_deterministic_algorithms(deterministic):
    """Which also fill new memory with NaN: every element of a gradient is written."""
    x, y = example(2, 3, 500, dtype=torch.float32)
    grads = [gradient(loss, x, y) for _ in range(3)]
    assert torch.isfinite(grads[0]).all()
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_inference_mode():
    x, y = example(2, 3, 5)
    with torch.inference_mode():
        value = loss(x * 1, y.clone())
        score = dice_core.torch.DiceScore()
        score.update(x * 1, y.clone())
    assert_close(value, loss(x, y), rtol=1e-15)
    outside = dice_core.torch.DiceScore()
    outside.update(x, y)
    assert torch.equal(score.compute(), outside.compute())


def test_meta_tensors_have_shapes():
    x = torch.empty(2, 3, 4, 5, device="meta", requires_grad=True)
    y = torch.empty(2, 4, 5, dtype=torch.int64, device="meta")
    value = loss(x, y, reduction="none")
    assert value.shape == (2,)
    value.sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.is_meta


def test_fake_tensors_have_shapes():
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)
        y = torch.empty(2, 4, 5, dtype=torch.uint8)
        value = DiceLoss(reduction="classes")(x, y)
        assert (value.shape, value.dtype) == ((2, 3), torch.float32)
        value.sum().backward()
        assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection():
    x, y = example(2, 3, 5)
    x.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        loss(x, y).backward()
    assert torch.isfinite(x.grad).all()
