"""dice_core.torch: autograd, modules, operators, compilation, memory kept for backward."""

import inspect
import math
import subprocess
import sys
import weakref

import naive
import pytest
import torch
from compare import assert_close
from pairwise import pairwise
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dice_core.torch
from dice_core import losses
from dice_core.torch import DiceCELoss, DiceFocalLoss, DiceLoss, loss, statistics

REDUCTIONS = ("mean", "sum", "none", "classes", "batch")


def example(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    y = torch.randint(max(2, shape[1]), (shape[0], *shape[2:]), generator=generator)
    return x.requires_grad_(), y


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("p", [1, 2])
def test_gradcheck(channels, p):
    x, y = example(2, channels, 3, 2)
    weight = torch.rand(max(2, channels), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(statistics(x, y, p=p)), x)
    assert torch.autograd.gradcheck(lambda x, w: loss(x, y, weight=w, p=p), (x, weight))


@pytest.mark.parametrize("name", ["statistics", "statistics_grad"])
def test_operators_are_well_formed(name):
    x, y = example(2, 3, 4, 5)
    options = ("softmax", 1, "-1", None, False, None, False, "labels", None, 1, None)
    if name == "statistics":
        torch.library.opcheck(torch.ops.dice_core.statistics.default, (x, y, *options))
    else:
        cotangent = torch.rand(3, 2, 3, dtype=torch.float64)
        torch.library.opcheck(
            torch.ops.dice_core.statistics_grad.default, (x.detach(), y, cotangent, *options)
        )


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 4, 5), torch.contiguous_format),
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_keeps_dtype_and_memory_format(shape, memory_format, dtype):
    x, y = example(*shape, dtype=dtype)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    value = loss(x, y)
    (grad,) = torch.autograd.grad(value, x)  # backward() would copy it into this format
    assert value.dtype == grad.dtype == dtype
    assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_logits_is_float32(dtype):
    x, y = example(2, 3, 20, dtype=dtype)
    learned = torch.ones(3, requires_grad=True)  # a loss that torch computes from the sums
    for weight in (None, learned):
        assert loss(x, y, weight=weight).dtype == torch.float32


def test_forward_keeps_only_the_inputs_and_small_numbers():
    x, y = example(2, 3, 16, 16, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(x, y)
    large = {t.data_ptr() for t in kept if t.numel() > 3 * 2 * 3}
    assert large == {x.data_ptr(), y.data_ptr()}


def test_a_graph_keeps_no_logits_that_a_hook_has_moved():
    leaf, y = example(2, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        x = leaf * 1
        value = loss(x, y)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    assert_close(*(torch.autograd.grad(v, leaf)[0] for v in (value, loss(leaf, y))), rtol=1e-12)


@pytest.mark.parametrize("changed", ["x", "y"])
def test_inputs_changed_before_backward_are_refused(changed):
    x, y = example(1, 2, 5)
    x = x.clone()
    value = loss(x, y)
    with torch.no_grad():
        {"x": x, "y": y}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_second_backward_is_refused():
    x, y = example(1, 2, 5)
    value = loss(x, y)
    value.backward(retain_graph=True)
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_no_graph_without_grad():
    x, y = example(1, 2, 5)
    assert loss(x.detach(), y).grad_fn is None
    with torch.no_grad():
        assert loss(x, y).grad_fn is None


def test_upstream_scale_reaches_small_gradients_before_rounding():
    x, y = example(1, 2, 100_000, dtype=torch.float16)  # whose gradient is subnormal
    (scaled,) = torch.autograd.grad(loss(x, y) * 2**16, x)
    exact = x.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(exact, y) * 2**16, exact)
    assert_close(scaled, grad, rtol=2**-10, atol=1e-6)


def test_custom_loss_of_the_statistics():
    """A Tversky loss in a line, against autograd through softmax and one-hot."""
    x, y = example(2, 3, 50)
    i, p, t = statistics(x, y)
    (grad,) = torch.autograd.grad((1 - i / (i + 0.3 * (p - i) + 0.7 * (t - i))).mean(), x)
    s, onehot = x.softmax(1), torch.nn.functional.one_hot(y, 3).movedim(-1, 1)
    i, p, t = (s * onehot).sum(2), s.sum(2), onehot.sum(2)
    expected = (1 - i / (i + 0.3 * (p - i) + 0.7 * (t - i))).mean()
    assert_close(grad, torch.autograd.grad(expected, x)[0], rtol=1e-9, atol=1e-12)


def test_weight_gradient():
    x, y = example(2, 3, 20)
    weight = torch.ones(3, requires_grad=True)
    loss(x, y, weight=weight, reduction="none").sum().backward()
    i, p, t = statistics(x.detach(), y)
    assert_close(weight.grad, (1 - 2 * i / (p + t)).sum(0), rtol=1e-6)


# torch itself compiles decompositions when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_weight_tangent():
    x, y = example(2, 3, 20)
    ones = torch.ones(3)
    with forward_ad.dual_level():
        value = forward_ad.unpack_dual(loss(x, y, weight=forward_ad.make_dual(ones, ones)))
    assert_close(value.tangent.detach(), value.primal.detach(), rtol=1e-6)


# ---- one node for plain tensors, operators and torch's arithmetic otherwise ---------------


class PassThroughMode(TorchDispatchMode):
    """Intercepts every operator without changing its result."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def loss_and_grad(x, y, upstream, **options):
    value = loss(x, y, **options)
    return value.detach(), torch.autograd.grad(value, x, upstream)[0], value.grad_fn.name()


SETTINGS = pairwise(
    [None, [0.2, 1.5, 0.7], torch.tensor([2, 0, 1])],  # weight
    [-1, 1],  # ignore_channel
    [0.0, 1.0],  # smooth
    REDUCTIONS,
    [torch.float32, torch.float64],
)


@pytest.mark.parametrize(
    ("weight", "ignore_channel", "smooth", "reduction", "dtype"), SETTINGS, ids=str
)
def test_fused_node_operators_and_naive_code_agree(
    dtype, weight, ignore_channel, smooth, reduction
):
    x, y = example(4, 3, 5, 6, dtype=dtype)
    y[2] = -1  # 0/0 in every class of a sample where smooth is 0
    options = {"weight": weight, "ignore_channel": ignore_channel}
    options |= {"smooth": smooth, "reduction": reduction}
    upstream = torch.tensor([0.5, -2, 1, 3], dtype=dtype) if reduction == "none" else None
    if reduction == "classes":
        upstream = torch.arange(12, dtype=dtype).reshape(4, 3)
    value, grad, node = loss_and_grad(x, y, upstream, **options)
    with PassThroughMode():
        *general, general_node = loss_and_grad(x, y, upstream, **options)
    assert node != general_node
    single = dtype == torch.float32
    assert_close(value, general[0], rtol=2e-7 if single else 1e-14)
    assert_close(grad, general[1], rtol=1e-6 if single else 1e-13, atol=1e-9 if single else 1e-16)
    exact = x.detach().double().requires_grad_()
    expected = naive.dice_loss(exact, y, **options)
    upstream = None if upstream is None else upstream.double()
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream)
    tolerance = 1e-6 if single else 1e-13
    assert_close(value, expected.detach(), rtol=tolerance, atol=tolerance)
    assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_incoming_gradient_of_any_strides(dtype):
    x, y = example(4, 3, 5, dtype=dtype)
    wide = torch.arange(8, dtype=dtype)
    for upstream in (wide[::2], wide[:1].expand(4), wide[1:5].flip(0)):
        value = loss(x, y, reduction="none")
        (grad,) = torch.autograd.grad(value, x, upstream)
        each = [g * loss(x[n : n + 1], y[n : n + 1]) for n, g in enumerate(upstream)]
        assert_close(grad, torch.autograd.grad(sum(each), x)[0], rtol=1e-6, atol=1e-9)


def test_batched_incoming_gradients():
    x, y = example(2, 3, 5)
    value = loss(x, y, reduction="none")
    rows = [torch.autograd.grad(value[n], x, retain_graph=True)[0] for n in range(2)]
    (grads,) = torch.autograd.grad(value, x, torch.eye(2), is_grads_batched=True)
    assert_close(grads, torch.stack(rows), rtol=1e-15)


def as_negated_view(x):
    return torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag


class Subclass(torch.Tensor):
    """A subclass that adds no behaviour."""


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.Parameter, as_negated_view, lambda x: x.as_subclass(Subclass)],
    ids=["parameter", "negated_view", "subclass"],
)
def test_tensors_of_other_kinds(wrap):
    x, y = example(2, 3, 5)
    wrapped = wrap(x.detach()).requires_grad_()
    value, grad, _ = loss_and_grad(wrapped, y, None)
    expected, expected_grad, _ = loss_and_grad(x, y, None)
    assert_close(value, expected, rtol=1e-15)
    assert_close(grad, expected_grad, rtol=1e-13, atol=1e-16)


def test_the_default_device_has_no_effect():
    x, y = example(2, 3, 5)
    expected = loss_and_grad(x, y, None, weight=[1, 2, 3])
    with torch.device("meta"):
        value, grad, _ = loss_and_grad(x, y, None, weight=[1, 2, 3])
    assert torch.equal(value, expected[0])
    assert torch.equal(grad, expected[1])


def test_module():
    module = DiceLoss(torch.tensor([1.0, 2.0]), ignore_channel=1, smooth=1, p=2, reduction="none")
    assert list(module.state_dict()) == ["weight"]
    assert module.double().weight.dtype == torch.float64
    assert repr(module) == (
        "DiceLoss(Dice(weight=[1.0, 2.0], reduction='none', p=2, smooth=1.0, ignore_channel=1), "
        "ignore_label=-1)"
    )
    x, y = example(3, 2, 7)
    options = {"ignore_channel": 1, "smooth": 1, "p": 2, "reduction": "none"}
    expected = loss(x, y, weight=[1, 2], **options)
    assert torch.equal(module(x, y), expected)
    assert DiceLoss().state_dict() == {}


MODULES = {
    "JaccardLoss": (losses.Jaccard, {"smooth": 1}),
    "TverskyLoss": (losses.Tversky, {"alpha": 0.2, "beta": 0.8}),
    "FocalTverskyLoss": (losses.FocalTversky, {"gamma": 1.5, "weight": [1, 2, 3]}),
    "GeneralizedDiceLoss": (losses.GeneralizedDice, {"weighting": "simple"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_named_modules(name):
    kind, settings = MODULES[name]
    x, y = example(2, 3, 40)
    module = getattr(dice_core.torch, name)(**settings, ignore_label=2)
    expected = loss(x, y, kind(**settings), ignore_label=2)
    assert torch.equal(module(x, y), expected)
    assert list(module.state_dict()) == ["weight"] * ("weight" in settings)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("class_weight", [None, [3.0, 1.0, 2.0]])
def test_compounds(weight, class_weight):
    """`weight` applies to Dice, not normalised; the other loss has its own weights, as in torch."""
    x, y = example(2, 3, 40)
    y[0, :5] = -1
    log_s = torch.where(y[:, None] >= 0, x, torch.zeros_like(x)).log_softmax(1)
    tensor = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
    dice = loss(x, y, weight=weight, smooth=1)
    entropy = F.cross_entropy(x, y, tensor, ignore_index=-1)
    module = DiceCELoss(2, 0.5, weight=weight, ce_weight=class_weight, smooth=1)
    assert_close(module(x, y).detach(), (2 * dice + 0.5 * entropy).detach(), rtol=1e-13)
    names = [name for name, w in (("weight", weight), ("ce_weight", class_weight)) if w]
    assert list(module.state_dict()) == names
    own = log_s.gather(1, y.clamp(min=0)[:, None])[:, 0]
    each = (1 - own.exp()) ** 2 * -own * (1 if tensor is None else tensor[y])
    focal = each[y >= 0].mean()
    module = DiceFocalLoss(2, 0.5, weight=weight, focal_weight=class_weight, smooth=1)
    assert_close(module(x, y).detach(), (2 * dice + 0.5 * focal).detach(), rtol=1e-13)
    assert list(module.state_dict()) == [name.replace("ce_", "focal_") for name in names]


def test_multi_label():
    """Several classes at once: the sigmoid of each channel, and its binary cross-entropy."""
    x, _ = example(2, 3, 40)
    y = torch.rand(2, 3, 40, dtype=torch.float64) > 0.5
    s, t = x.sigmoid(), y.double()
    dice = (1 - 2 * (s * t).sum(2) / (s.sum(2) + t.sum(2))).mean()
    assert_close(DiceLoss(activation="sigmoid")(x, y).detach(), dice.detach(), rtol=1e-13)
    entropy = F.binary_cross_entropy_with_logits(x, t)
    module = DiceCELoss(activation="sigmoid")
    assert_close(module(x, y).detach(), (dice + entropy).detach(), rtol=1e-13)
    grads = [torch.autograd.grad(value, x)[0] for value in (module(x, y), dice + entropy)]
    assert_close(*grads, rtol=1e-12, atol=1e-15)
    own = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    focal = ((1 - (-own).exp()) ** 2 * own).mean()
    module = DiceFocalLoss(activation="sigmoid")
    assert_close(module(x, y).detach(), (dice + focal).detach(), rtol=1e-13)


@pytest.mark.parametrize("kind", [DiceCELoss, DiceFocalLoss])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_compounds(kind, reduction):
    x, y = example(2, 3, 40)
    value = kind(reduction=reduction)(x, y).detach()
    each = [kind()(x[n : n + 1], y[n : n + 1]).detach() for n in range(2)]
    flat, labels = x.movedim(0, 1).reshape(1, 3, 80), y.reshape(1, 80)
    expected = {
        "mean": torch.stack(each).mean(),  # all samples have the same number of voxels
        "sum": torch.stack(each).sum(),
        "none": torch.stack(each),
        "batch": kind()(flat, labels).detach(),
    }
    if reduction == "classes":  # Dice's are averaged, the other loss's are parts of a sum
        assert value.shape == (2, 3)
    else:
        assert_close(value, expected[reduction], rtol=1e-13)


@pytest.mark.parametrize("change", ["half", "bfloat16", "float"])
def test_half_precision_leaves_class_weights_alone(change):
    x, y = example(2, 3, 40)
    given = torch.tensor([1e5 + 1, 1.0, 1e-8], dtype=torch.float64)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 2), DiceCELoss(weight=given, ce_weight=[1e5, 1, 1])
    )
    expected = net[1](x, y)
    getattr(net, change)()
    assert net[0].weight.dtype == getattr(torch, change.replace("half", "float16"))
    assert torch.equal(net[1].weight, given)
    assert torch.equal(net[1](x, y), expected)
    assert net[1].to("meta", torch.half).weight.dtype == torch.float64


def test_parameters_follow_half_precision_unless_they_overflow():
    module = DiceLoss(torch.nn.Parameter(torch.tensor([2.0, 1, 1])))
    assert module.half().weight.dtype == torch.half
    module = DiceLoss(torch.nn.Parameter(torch.tensor([1e5, 1, 1])))
    with pytest.raises(ValueError, match=r"weight must be finite, got \[inf, 1.0, 1.0\]"):
        module.half()


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_class_weights_that_are_not_finite_cannot_be_loaded(wrong, assign):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), DiceCELoss(ce_weight=[1, 1, 2]))
    state = net.state_dict()
    state["1.ce_weight"] = torch.tensor([1, wrong, 2])
    with pytest.raises(ValueError, match=rf"1.ce_weight must be finite, got \[1.0, {wrong}, 2.0\]"):
        net.load_state_dict(state, assign=assign)
    assert net[1].ce_weight.tolist() == [1, 1, 2]
    state["1.ce_weight"] = torch.ones(3) * 1j
    with pytest.raises(TypeError, match=r"1.ce_weight must be numbers, .* got torch.complex64"):
        net.load_state_dict(state, assign=assign)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_class_weights_that_are_not_finite_are_refused(requires_grad, wrong):
    x, y = example(2, 3, 40)
    weight = torch.tensor([1.0, wrong, 1.0]).requires_grad_(requires_grad)
    term = losses.Dice(weight=weight) + losses.CrossEntropy()
    module = DiceLoss([1, 1, 1])
    module.weight = weight.detach()
    for call in (
        lambda: loss(x, y, weight=weight),
        lambda: loss(x, y, term),
        lambda: term(statistics(x, y, gamma=0)),
        lambda: module(x, y),
        lambda: loss(x.detach().to("meta"), y.to("meta"), weight=weight),
    ):
        with pytest.raises(ValueError, match=rf"weight must be finite, got \[1.0, {wrong}, 1.0\]"):
            call()


@pytest.mark.parametrize("make", [DiceLoss, lambda: dice_core.torch.Loss(losses.Dice())])
def test_class_weights_cannot_be_added_later(make):
    module = make()
    module.weight = None
    with pytest.raises(AttributeError, match="weight cannot be changed: create another"):
        module.weight = torch.ones(3)


def test_an_overwritten_tensor_is_known_to_autograd():
    x, y = example(2, 3, 40)
    x, scale = x.detach(), torch.ones((), dtype=torch.float64, requires_grad=True)
    value = (x * scale).sum()
    dice_core.loss_and_grad(x, y, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_settings_that_a_compound_cannot_have():
    with pytest.raises(ValueError, match="label_smoothing needs activation 'softmax', got 'sigm"):
        DiceCELoss(label_smoothing=0.1, activation="sigmoid")
    for kind in (DiceCELoss, DiceFocalLoss):
        with pytest.raises(ValueError, match="activation must be one of 'softmax', 'sigmoid', got"):
            kind(activation="none")


def test_a_module_follows_its_buffers():
    x, y = example(2, 3, 40)
    module = DiceCELoss(weight=[1, 1, 1], ce_weight=[1, 1, 1])
    module.load_state_dict({"weight": torch.ones(3), "ce_weight": torch.tensor([1.0, 2.0, 3.0])})
    term = losses.Dice(weight=[1, 1, 1]) + losses.CrossEntropy(weight=[1, 2, 3])
    assert_close(module(x, y).detach(), loss(x, y, term).detach(), rtol=1e-14)
    assert "weight=[1.0, 2.0, 3.0]" in repr(module)


@pytest.mark.parametrize(
    "name",
    [
        *("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalTverskyLoss", "GeneralizedDiceLoss"),
        *("DiceCELoss", "DiceFocalLoss"),
    ],
)
def test_every_module_has_the_common_parameters(name):
    kind = getattr(dice_core.torch, name)
    parameters = inspect.signature(kind).parameters
    common = {"activation", "reduction", "backend", "num_threads", "check_labels", "ignore_label"}
    common |= {"inplace", "process_group"}
    assert common | {"weight", "pool"} <= set(parameters)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    x, y = example(2, 3, 10)
    module = kind(backend="reference", num_threads=1, check_labels=True)
    assert_close(module(x, y).detach(), kind()(x, y).detach(), rtol=1e-13)
    for wrong in ({"backend": "none"}, {"num_threads": 0}, {"activation": "relu"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kind(**wrong)(x, y)


def test_the_functions_have_the_same_parameters():
    parameters = [
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (dice_core.loss, loss, dice_core.loss_and_grad)
    ]
    assert parameters[0] == parameters[1][:-2] == parameters[2][:-2]
    assert [name for name, *_ in parameters[1][-2:]] == ["inplace", "process_group"]
    parameters = [
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (dice_core.statistics, statistics)
    ]
    assert parameters[0] == parameters[1]


def test_a_target_that_requires_grad_is_refused():
    x, _ = example(2, 3, 10)
    y = torch.rand(2, 3, 10, requires_grad=True)
    for function in (loss, statistics, DiceLoss(), dice_core.torch.DiceScore()):
        with pytest.raises(NotImplementedError, match=r"y requires grad, .* y\.detach\(\)"):
            function(x, y)


def test_a_hook_may_unpack_other_strides():
    """What saved-tensor hooks return is read as it lies, even at the address of what was saved."""
    leaf, y = example(2, 3, 8, 8)
    expected = torch.autograd.grad(loss(leaf * 1, y, p=2), leaf)[0]

    def pack(tensor):
        return tensor.contiguous().numpy().copy() if tensor.is_floating_point() else tensor

    def unpack(packed):
        return packed if isinstance(packed, torch.Tensor) else torch.from_numpy(packed).clone()

    for _ in range(20):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            x = (leaf * 1).contiguous(memory_format=torch.channels_last)
            value = loss(x, y, p=2)
            del x
        assert_close(torch.autograd.grad(value, leaf)[0], expected, rtol=1e-12, atol=1e-16)


def test_settings_that_are_tensors_are_read_at_every_call():
    x, y = example(2, 3, 40)
    smooth, label = torch.tensor(0.0), torch.tensor(-1)
    before = loss(x, y, smooth=smooth, ignore_label=label)
    smooth.fill_(100)
    label.fill_(1)
    assert_close(before.detach(), loss(x, y).detach(), rtol=0)
    after = loss(x, y, smooth=smooth, ignore_label=label)
    assert_close(after.detach(), loss(x, y, smooth=100, ignore_label=1).detach(), rtol=0)


def test_settings_that_require_grad_are_refused():
    x, y = example(2, 3, 40)
    learned = torch.nn.Parameter(torch.tensor(2.0))
    for make in (
        lambda: loss(x, y, learned * losses.Dice() + losses.CrossEntropy()),
        lambda: DiceCELoss(lambda_dice=learned),
        lambda: DiceLoss(smooth=learned),
        lambda: dice_core.torch.DeepSupervision(DiceLoss(), learned[None]),
    ):
        with pytest.raises(TypeError, match="requires grad, and no gradient would reach it"):
            make()


def test_weights_that_are_learned():
    x, y = example(2, 3, 40)
    weight = torch.nn.Parameter(torch.ones(3))
    module = DiceCELoss(weight=weight, ce_weight=[1, 2, 3])
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    module(x, y).backward()
    expected = dice_core.torch.statistics(x.detach(), y)
    i, p, t = expected
    assert_close(weight.grad, (1 - 2 * i / (p + t)).mean(0), rtol=1e-6)


def test_settings_of_a_module_cannot_change():
    module = DiceLoss(weight=[1, 2, 3])
    for name, value in (
        ("term", losses.Dice(p=2)),
        ("smooth", 1),
        ("ignore_label", 2),
        ("reduction", "none"),
        ("weight", None),
    ):
        with pytest.raises(AttributeError):
            setattr(module, name, value)
    module.weight = torch.tensor([3.0, 2, 1])
    assert "weight=[3.0, 2.0, 1.0]" in repr(module)


def test_terms_with_weights_of_tensors_and_arrays():
    """Whichever library the weights and the sums are of."""
    x, y = example(2, 3, 40)
    for weight in ([1, 2, 3], torch.tensor([1.0, 2, 3])):
        for term in (
            losses.Dice(weight=weight, divisor="weights"),
            losses.CrossEntropy(weight=weight),
            losses.BinaryCrossEntropy(pos_weight=weight),
        ):
            expected = loss(x, y, term)
            sums = statistics(x, y, **dict(term.needs))
            assert_close(term(sums).detach(), expected.detach(), rtol=1e-13)
            assert term(sums).requires_grad
            arrays = x.detach().numpy(), y.numpy()
            assert_close(dice_core.loss(*arrays, term), expected.detach(), rtol=1e-13)
            sums = dice_core.statistics(*arrays, **dict(term.needs))
            assert_close(term(sums), expected.detach(), rtol=1e-13)
            dx = dice_core.gradient(*arrays, sums, term)
            assert_close(dx, torch.autograd.grad(expected, x)[0], rtol=1e-11, atol=1e-16)


def test_the_weighted_cross_entropy_of_soft_targets_is_torch_s():
    x, _ = example(2, 3, 40)
    y = torch.rand(2, 3, 40, dtype=torch.float64).softmax(1)
    weight = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    mine = loss(x, y, losses.CrossEntropy(weight=weight))
    assert_close(mine.detach(), F.cross_entropy(x, y, weight).detach(), rtol=1e-13)


def test_scores_of_different_numbers_of_classes_do_not_mix():
    score = dice_core.torch.DiceScore()
    score.update(*example(2, 3, 8))
    with pytest.raises(ValueError, match=r"x has 2 classes, but .* 3; call reset\(\)"):
        score.update(*example(2, 2, 8))


def test_labels_on_another_device():
    x, y = example(2, 3, 10)
    with pytest.raises(ValueError, match="x is on cpu but y is on meta; move y to x's device"):
        loss(x, y.to("meta"))


def test_deep_supervision():
    x, y = example(2, 3, 8, 12)
    coarse = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    criterion = DiceLoss(smooth=1)
    parts = [criterion(x, y), criterion(coarse, y[:, ::2, ::4].contiguous())]
    for labels in (y, y[:, None]):
        value = dice_core.torch.DeepSupervision(criterion)([x, coarse], labels)
        assert_close(value.detach(), (2 * parts[0] + parts[1]).detach() / 3, rtol=1e-14)
        value = dice_core.torch.DeepSupervision(criterion, [0.25, 4])([x, coarse], labels)
        assert_close(value.detach(), (0.25 * parts[0] + 4 * parts[1]).detach(), rtol=1e-14)
    value = dice_core.torch.DeepSupervision(criterion, [1, 0])([x, coarse * math.nan], y)
    assert_close(value.detach(), parts[0].detach(), rtol=1e-14)
    volumes = [y, y[:, ::2, ::4]]  # as in nnU-Net
    value = dice_core.torch.DeepSupervision(criterion)([x, coarse], volumes)
    assert_close(value.detach(), (2 * parts[0] + parts[1]).detach() / 3, rtol=1e-14)
    with pytest.raises(ValueError, match="there are 1 label volumes for 2 outputs"):
        dice_core.torch.DeepSupervision(criterion)([x, coarse], volumes[:1])
    nearest = F.interpolate(y[:, None].double(), (4, 3), mode="nearest")[:, 0]
    assert torch.equal(dice_core.torch.modules._nearest(y, coarse), nearest.long())


@pytest.mark.parametrize(
    ("outputs", "weights", "message"),
    [
        (
            [torch.zeros(1, 2, 8), torch.zeros(1, 2, 3)],
            None,
            "each side must be an integer multiple",
        ),
        ([torch.zeros(1, 2, 8)], [1, 2], "there are 2 weights for 1 outputs"),
        ([torch.zeros(1, 2, 8)], [0], "all weights are 0"),
        ([], None, "outputs must be a sequence of logits"),
        (torch.zeros(1, 2, 8), None, "outputs must be a sequence of logits"),
    ],
)
def test_deep_supervision_refuses(outputs, weights, message):
    criterion = dice_core.torch.DeepSupervision(DiceLoss(), weights)
    with pytest.raises(ValueError, match=message):
        criterion(outputs, torch.zeros(1, 8, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.uint64])
@pytest.mark.parametrize("channel_axis", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_label_dtypes_and_shapes(dtype, channel_axis, channels):
    x, y = example(2, channels, 3, 4)
    expected = loss(x, y)
    labels = y.to(dtype)[:, None] if channel_axis else y.to(dtype)
    assert torch.equal(loss(x, labels), expected)


def test_small_network_trains():
    torch.manual_seed(0)
    x = torch.randn(4, 1, 12, 12)
    y = (x[:, 0] > 0.3).to(torch.uint8) + (x[:, 0] > 1).to(torch.uint8)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 1)
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.05)
    criterion = DiceLoss()
    first = criterion(network(x), y).item()
    for _ in range(150):
        optimizer.zero_grad()
        value = criterion(network(x), y)
        value.backward()
        optimizer.step()
    assert value.item() < 0.1 < first


def test_import_order_does_not_matter():
    for order in ("import torch, dice_core.torch", "import dice_core; dice_core.torch.DiceLoss()"):
        subprocess.run([sys.executable, "-c", order], check=True)
