"""LinearLoss against a convolution in float64 followed by naive code or by the loss itself."""

import copy
import os
import subprocess
import sys

import naive
import numpy as np
import pytest
import torch
from compare import assert_bitwise_equal, assert_close
from layouts import LAYOUTS
from torch.autograd import forward_ad

import dice_core.torch
from dice_core import losses
from dice_core.torch import DeepSupervision, DiceCELoss, DiceLoss, LinearLoss, linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that every volume has several blocks, for which more threads would only wait."""
    monkeypatch.setitem(linear.BLOCK_BYTES, "cpu", 2000)
    monkeypatch.setattr(linear, "BLOCKS", 10**9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(*shape, classes=3, bias=True, dtype=torch.float64, seed=0):
    """Features, weight, bias and labels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, shape[1], generator=generator, dtype=torch.float64)
    offset = torch.randn(classes, generator=generator, dtype=torch.float64)
    y = torch.randint(max(2, classes), (shape[0], *shape[2:]), generator=generator)
    tensors = [t.to(dtype).requires_grad_() for t in (features, weight, offset)]
    return *(tensors if bias else [*tensors[:2], None]), y


def logits_of(features, weight, bias):
    x = torch.einsum("nf...,cf->nc...", features, weight.flatten(1))
    return x if bias is None else x + bias.reshape(-1, *[1] * (x.ndim - 2))


def results(function, *tensors):
    """The value of a function of tensors, and its gradients, each scaled in the same way."""
    value = function(*tensors)
    scale = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, scale)]


def doubled(*tensors):
    return [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]


def compare(loss, *tensors, y, rtol, atol):
    """LinearLoss against the loss of the logits of exactly these tensors, in float64."""
    found = results(lambda *head: LinearLoss(loss)(*head, y), *tensors)
    expected = results(lambda *head: loss(logits_of(*head), y), *doubled(*tensors))
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    for tensor, grad in zip(wanted, found[1:], strict=True):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
    for mine, exact, what in zip(
        found, expected, ("value", "first", "second", "third"), strict=False
    ):
        scale = exact.abs().max().item() if exact.numel() else 0
        assert_close(mine.double(), exact, rtol=rtol, atol=atol * scale, what=what)
    return found


SHAPES = [(2, 4), (3, 4, 50), (2, 5, 7, 9), (1, 3, 5, 6, 7), (40, 3, 2, 2, 2), (2, 1, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_naive_code_in_float64(shape, classes):
    *tensors, y = example(*shape, classes=classes)
    y[0] = torch.where(y[0] == 0, -1, y[0])
    options = {"smooth": 1.0, "p": 2, "reduction": "none"}
    found = results(lambda *head: LinearLoss(DiceLoss(**options))(*head, y), *tensors)
    expected = results(lambda *head: naive.dice_loss(logits_of(*head), y, **options), *tensors)
    for mine, exact, what in zip(
        found, expected, ("value", "features", "weight", "bias"), strict=True
    ):
        assert_close(mine, exact, rtol=1e-11, atol=1e-14, what=what)


TOLERANCES = {  # of the values, and of the gradients relative to the largest
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, dtype):
    features, weight, bias, y = example(2, 4, 6, 7, 8)
    features, y = (LAYOUTS[layout](t.detach().numpy()) for t in (features, y))
    # torch has no negative strides
    features, y = (
        torch.from_numpy(np.copy(a) if layout == "reversed" else a) for a in (features, y)
    )
    head = [t.detach().to(dtype) for t in (weight, bias)]
    typed = torch.empty_strided(features.shape, features.stride(), dtype=dtype).copy_(features)
    tensors = [t.requires_grad_() for t in (typed, *head)]
    tolerance = TOLERANCES[dtype]
    grad = compare(DiceCELoss(smooth=1), *tensors, y=y, rtol=tolerance, atol=tolerance)[1]
    if layout in ("contiguous", "channels-last", "batch-last", "fortran"):
        assert grad.stride() == typed.stride()


@pytest.mark.parametrize("axes", [0, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_of_weights(axes, bias):
    features, weight, offset, y = example(2, 4, 6, 7, 8, bias=bias)
    weight = weight.detach().reshape(*weight.shape, *[1] * axes).requires_grad_()
    compare(DiceLoss(smooth=1), features, weight, offset, y=y, rtol=1e-12, atol=1e-13)


MODULES = {
    "Loss": dice_core.torch.Loss(losses.MCC() + losses.CrossEntropy(label_smoothing=0.1)),
    "DiceLoss": DiceLoss([1, 2, 3], smooth=1, pool="batch"),
    "classes": DiceLoss(reduction="classes"),
    "JaccardLoss": dice_core.torch.JaccardLoss(smooth=1, reduction="none"),
    "TverskyLoss": dice_core.torch.TverskyLoss(0.3, 0.7, ignore_label=2),
    "FocalTverskyLoss": dice_core.torch.FocalTverskyLoss(),
    "GeneralizedDiceLoss": dice_core.torch.GeneralizedDiceLoss(pool="all"),
    "DiceCELoss": DiceCELoss(ce_weight=[1, 3, 2], reduction="batch"),
    "DiceFocalLoss": dice_core.torch.DiceFocalLoss(gamma=1.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    *tensors, y = example(2, 4, 6, 7, 8)
    compare(MODULES[name], *tensors, y=y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [DiceLoss, DiceCELoss])
@pytest.mark.parametrize("classes", [1, 3])
def test_soft_targets(kind, classes):
    *tensors, _ = example(2, 4, 6, 7, 8, classes=classes)
    loss = kind(activation="sigmoid", smooth=1)
    y = torch.rand(2, classes, 6, 7, 8, dtype=torch.float64)
    for targets in (y, y.movedim(1, -1).contiguous().movedim(-1, 1), y > 0.5):
        compare(loss, *tensors, y=targets, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.uint64])
def test_labels(dtype):
    *tensors, y = example(2, 4, 6, 7, 8, classes=2)
    expected = results(lambda *head: LinearLoss(DiceLoss())(*head, y), *tensors)
    padded = torch.nn.functional.pad(y, (1, 2, 3, 4, 5, 6)).to(dtype)[:, 5:-6, 3:-4, 1:-2]
    for labels in (y.to(dtype), y.to(dtype)[:, None], padded, padded[:, None]):
        found = results(
            lambda *head, labels=labels: LinearLoss(DiceLoss())(*head, labels), *tensors
        )
        for mine, exact in zip(found, expected, strict=True):
            assert_bitwise_equal(mine, exact)


@pytest.mark.parametrize("needs", range(1, 8))
def test_only_needed_gradients(needs):
    *tensors, y = example(2, 4, 6, 7, 8)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(needs >> i & 1))
    compare(DiceLoss(), *tensors, y=y, rtol=1e-11, atol=1e-12)


def test_no_graph_without_grad():
    *tensors, y = example(2, 4, 6)
    criterion = LinearLoss(DiceLoss())
    assert criterion(*(t.detach() for t in tensors), y).grad_fn is None
    with torch.no_grad():
        assert criterion(*tensors, y).grad_fn is None
    with torch.inference_mode():
        value = criterion(*tensors, y)
    assert_close(value, criterion(*tensors, y).detach(), rtol=1e-15)


def test_gradcheck():
    *tensors, y = example(2, 3, 2, 3)
    criterion = LinearLoss(DiceCELoss())
    assert torch.autograd.gradcheck(lambda *head: criterion(*head, y), tensors)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (2, 4, 5, 0)], ids=str)
def test_nothing_there(shape):
    *tensors, y = example(*shape)
    compare(DiceLoss(smooth=1, reduction="sum"), *tensors, y=y, rtol=1e-15, atol=0)


def test_one_block_and_many_agree(monkeypatch):
    *tensors, y = example(3, 4, 6, 7, 8)
    found = []
    for size in (1, 1000, 10**9):
        monkeypatch.setitem(linear.BLOCK_BYTES, "cpu", size)
        found.append(results(lambda *head: LinearLoss(DiceCELoss())(*head, y), *tensors))
    for others in found[1:]:
        for mine, first in zip(others, found[0], strict=True):
            assert_close(mine, first, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 11), (4, 1, 6, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("voxels", [1, 4, 13, 10**6])
def test_blocks_partition_a_volume(shape, voxels):
    places = np.arange(np.prod(shape)).reshape(shape)
    blocks = [places[block] for block in linear._blocks(shape, voxels)]
    assert all(block.size <= voxels for block in blocks)
    assert np.array_equal(np.concatenate([block.ravel() for block in blocks]), places.ravel())


def test_half_precision_gradients_of_weights_are_rounded_once():
    """The sum of 600 halves, a block each: blocks added in bfloat16 would stop growing at 128."""
    features = torch.ones(1, 1, 600, dtype=torch.bfloat16)
    weight, bias = (torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in ((2, 1), 2))
    y = torch.zeros(1, 600, dtype=torch.uint8)
    loss = dice_core.torch.Loss(losses.CrossEntropy(divisor="one"))
    linear.BLOCK_BYTES["cpu"] = 4
    LinearLoss(loss)(features, weight, bias, y).backward()
    assert weight.grad.flatten().tolist() == [-300, 300]
    assert bias.grad.tolist() == [-300, 300]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The values of the convolution under autocast; gradients in the dtypes of the arguments."""
    features, weight, bias, y = example(2, 4, 6, 7, 8, dtype=torch.float32)
    conv = torch.nn.Conv3d(4, 3, 1)
    conv.load_state_dict({"weight": weight.reshape(3, 4, 1, 1, 1), "bias": bias})
    loss = DiceCELoss(smooth=1)
    with torch.autocast("cpu", dtype):
        mine = LinearLoss(loss)(features, conv.weight, conv.bias, y)
        theirs = loss(conv(features), y)
    assert mine.dtype == theirs.dtype == torch.float32
    assert_close(mine.detach(), theirs.detach(), rtol=1e-5)
    wanted = [features, conv.weight, conv.bias]
    for a, b in zip(
        torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=2e-2, atol=1e-2 * b.abs().max().item())
    with torch.autocast("cpu", dtype):
        mine = LinearLoss(loss)(features, conv.weight, conv.bias, y)
        again = torch.autograd.grad(mine, wanted)
    exact = loss(logits_of(*doubled(features.to(dtype), conv.weight.to(dtype), conv.bias)), y)
    assert_close(mine.detach(), exact.detach(), rtol=2e-2)
    for a, b in zip(again, torch.autograd.grad(LinearLoss(loss)(*wanted, y), wanted), strict=True):
        assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())
    mixed = features.detach().to(dtype), weight, bias.double()
    with (
        torch.autocast("cpu", dtype),
        pytest.raises(TypeError, match="bias must have features' dt"),
    ):
        LinearLoss(loss)(*mixed, y)
    in_double = [t.detach().double() for t in wanted]
    with torch.autocast("cpu", dtype):
        assert LinearLoss(loss)(*in_double, y).dtype == torch.float64


def test_autocast_leaves_wide_sums_alone():
    """Under autocast too the products of a weight's gradient are of float32."""
    *tensors, y = example(1, 4, 500, dtype=torch.float32)
    criterion = LinearLoss(DiceLoss())
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        outside = results(lambda *head: criterion(*head, y), *tensors)
    value = criterion(*tensors, y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(value, tensors, torch.ones(()))
    for mine, exact in zip(inside, outside[1:], strict=True):
        assert_bitwise_equal(mine, exact)


def test_compiled_whole():
    torch.compiler.reset()
    criterion = LinearLoss(DiceCELoss(weight=[1.0, 2.0, 3.0], smooth=1))

    def step(features, weight, bias, y):
        return criterion(2 * features, weight, bias, y)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 4, 5, 6), (3, 4, 7, 9)):
        *tensors, y = example(*shape)
        found = results(lambda *head, y=y: compiled(*head, y), *tensors)
        expected = results(lambda *head, y=y: step(*head, y), *tensors)
        for mine, exact in zip(found, expected, strict=True):
            assert_close(mine, exact, rtol=1e-12, atol=1e-16)


def test_exported():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 3, 1).double()
            self.criterion = LinearLoss(DiceLoss())

        def forward(self, features, y):
            return self.criterion(features, self.conv.weight, self.conv.bias, y)

    features, _, _, y = example(2, 4, 5, 6)
    step = Step()
    exported = torch.export.export(step, (features.detach(), y)).module()
    assert_close(exported(features, y).detach(), step(features, y).detach(), rtol=1e-14)


def test_meta_tensors_have_shapes():
    *tensors, y = (t.to("meta") for t in example(2, 4, 5, 6))
    assert LinearLoss(DiceLoss(reduction="none"))(*tensors, y).shape == (2,)


OPTIONS = ("softmax", 1, "-1", None, False, None, False, "labels", None, 1, None)


@pytest.mark.parametrize("bias", [False, True])
def test_operators_are_well_formed(bias):
    *tensors, y = example(2, 4, 5, 6, bias=bias)
    head = torch.ops.dice_core.linear_statistics
    torch.library.opcheck(head.default, (*tensors, y, torch.float64, *OPTIONS))
    tensors = [None if t is None else t.detach() for t in tensors]
    cotangent = torch.rand(3, 2, 3, dtype=torch.float64)
    needs = [True, True, bias]
    torch.library.opcheck(
        torch.ops.dice_core.linear_statistics_grad.default,
        (*tensors, y, cotangent, needs, torch.float64, *OPTIONS),
    )


def test_forward_keeps_only_the_arguments():
    *tensors, y = example(2, 4, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LinearLoss(DiceLoss())(*tensors, y)
    large = {t.data_ptr() for t in kept if t.numel() > 3 * 2 * 3}
    assert large <= {t.data_ptr() for t in (*tensors, y)}


def test_second_derivatives_are_refused():
    *tensors, y = example(2, 4, 5)
    value = LinearLoss(DiceLoss())(*tensors, y)
    grads = torch.autograd.grad(value, tensors, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.sum(), tensors[0], retain_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
@pytest.mark.parametrize("which", range(3))
def test_other_modes_of_differentiation_are_refused(which):
    *tensors, y = example(2, 4, 5)
    tensors = [t.detach() for t in tensors]
    criterion = LinearLoss(DiceLoss())

    def of_one(t):
        return criterion(*(t if i == which else other for i, other in enumerate(tensors)), y)

    name = ("features", "weight", "bias")[which]
    with pytest.raises(NotImplementedError, match=f"jacrev and hessian of {name}: use backward"):
        torch.func.grad(of_one)(tensors[which])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="neither jvp nor jacf"):
        of_one(forward_ad.make_dual(tensors[which], tensors[which]))


def test_threads_change_nothing():
    *tensors, y = example(2, 4, 20, 20)
    found = [
        results(lambda *head, n=n: LinearLoss(DiceLoss(num_threads=n))(*head, y), *tensors)
        for n in (1, 3)
    ]
    for a, b in zip(*found, strict=True):
        assert_bitwise_equal(a, b)


def test_learned_class_weights():
    *tensors, y = example(2, 4, 5)
    loss = DiceLoss(torch.nn.Parameter(torch.ones(3)))
    LinearLoss(loss)(*tensors, y).backward()
    (expected,) = torch.autograd.grad(loss(logits_of(*tensors), y), loss.weight)
    assert_close(loss.weight.grad, expected, rtol=1e-6)


def test_module():
    criterion = LinearLoss(DiceCELoss(ce_weight=[1, 2, 3]))
    assert list(criterion.state_dict()) == ["loss.ce_weight"]
    assert "DiceCELoss(Dice() + CrossEntropy(weight=[1.0, 2.0, 3.0])" in repr(criterion)
    *tensors, y = example(2, 4, 5)
    assert torch.equal(copy.deepcopy(criterion)(*tensors, y), criterion(*tensors, y))


def test_deep_supervision():
    heads, labels = [], example(2, 4, 8, 12)[-1]
    for i, side in enumerate((1, 2)):
        heads.append(tuple(example(2, 4, 8 // side, 12 // side, bias=not i, seed=i)[:-1]))
    loss = DiceLoss(smooth=1)
    expected = DeepSupervision(loss)([logits_of(*head) for head in heads], labels)
    soft = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    for y in (labels, labels[:, None], [labels, labels[:, ::2, ::2]]):
        value = DeepSupervision(LinearLoss(loss))(heads, y)
        assert_close(value.detach(), expected.detach(), rtol=1e-13)
    expected = DeepSupervision(loss)([logits_of(*head) for head in heads], soft)
    assert_close(
        DeepSupervision(LinearLoss(loss))(heads, soft).detach(), expected.detach(), rtol=1e-13
    )
    x = logits_of(*heads[0])
    for criterion, outputs, message in (
        (LinearLoss(loss), [heads[0], x], "outputs must be a sequence of tuples, got a Tensor in"),
        (loss, [x, heads[1]], "outputs must be a sequence of Tensors, got a tuple in it"),
        (LinearLoss(loss), [()], "outputs must be a sequence of Tensors, got a NoneType in it"),
    ):
        with pytest.raises(TypeError, match=message):
            DeepSupervision(criterion)(outputs, labels)


class Sharded(torch.Tensor):
    """Has DTensor's method."""

    def full_tensor(self):
        return self


FEATURES, WEIGHT, BIAS, Y = (t.detach() for t in example(2, 4, 6, 5))


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"features": np.ones((2, 4, 6, 5))}, "features must be a torch tensor, got nd"),
        (TypeError, {"weight": None}, "weight must be a torch tensor, got NoneType"),
        (TypeError, {"bias": [1, 2, 3]}, "bias must be a torch tensor, got list"),
        (TypeError, {"y": [1]}, "y must be a torch tensor, got list"),
        (
            TypeError,
            {"features": FEATURES.int()},
            "features must hold floating-point numbers .* int32",
        ),
        (
            TypeError,
            {"weight": WEIGHT.cfloat()},
            "weight must hold floating-point .* got complex64",
        ),
        (TypeError, {"bias": BIAS.int()}, "bias must hold floating-point numbers .* got int32"),
        (TypeError, {"y": Y.float()}, "y must hold integer or bool class labels, got float32"),
        (
            TypeError,
            {"weight": WEIGHT.float()},
            "weight must have features' dtype float64, got float32",
        ),
        (TypeError, {"bias": BIAS.half()}, "bias must have features' dtype float64, got float16"),
        (
            TypeError,
            {"features": FEATURES.to_sparse()},
            "features is a sparse_coo tensor; call .to_de",
        ),
        (TypeError, {"y": Y.to_sparse()}, "y is a sparse_coo tensor; call .to_dense"),
        (
            TypeError,
            {"features": torch.nested.nested_tensor([*FEATURES], layout=torch.jagged)},
            "features is a nested tens",
        ),
        (
            ValueError,
            {"features": FEATURES[0, 0, 0]},
            r"features must have the shape \(N, F, d1, d2",
        ),
        (
            ValueError,
            {"features": FEATURES[:, :0]},
            r"features must have the shape .*got \(2, 0, 6, 5",
        ),
        (ValueError, {"weight": WEIGHT[0]}, r"weight must be that of a 1x1x1 conv.* got \(4,\)"),
        (ValueError, {"weight": WEIGHT[:0]}, r"weight must be that of a 1x1x1 conv.* got \(0, 4\)"),
        (
            ValueError,
            {"weight": torch.ones(3, 4, 3, 3).double()},
            r"weight must be .*\(3, 4, 3, 3\)",
        ),
        (ValueError, {"weight": WEIGHT[:, :2]}, "weight takes 2 channels, but features have 4"),
        (
            ValueError,
            {"bias": BIAS[:2]},
            r"bias must have the shape \(3,\) for weight .*got \(2,\)",
        ),
        (
            ValueError,
            {"bias": BIAS.sum()},
            r"bias must have the shape \(3,\) for weight .*got \(\)",
        ),
        (ValueError, {"y": Y[:, :3]}, r"y must have shape \(2, 6, 5\) or \(2, 1, 6, 5\) for x of"),
        (ValueError, {"y": Y.to("meta")}, "y is on meta but features are on cpu"),
        (ValueError, {"weight": WEIGHT.to("meta")}, "weight is on meta but features are on cpu"),
        (
            NotImplementedError,
            {"weight": WEIGHT.as_subclass(Sharded)},
            r"weight is a Sharded, .*distributed over processes: pass weight.full_tensor\(\)",
        ),
        (
            NotImplementedError,
            {"y": torch.rand(2, 3, 6, 5, requires_grad=True)},
            r"y requires grad, .*pass y.detach\(\)",
        ),
        (ValueError, {"y": Y + (Y == 2)}, r"y has \d+ labels outside \[0, 3\)"),
    ],
)
def test_wrong_arguments(error, changes, message):
    given = {"features": FEATURES, "weight": WEIGHT, "bias": BIAS, "y": Y} | changes
    with pytest.raises(error, match=message):
        LinearLoss(DiceLoss())(**given)


@pytest.mark.parametrize("channel_axis", [False, True])
def test_the_position_of_an_out_of_range_label_is_that_in_the_volume(channel_axis):
    *tensors, y = example(2, 4, 30, 20)
    y[1, 25, 7] = 9
    where = "(1, 0, 25, 7)" if channel_axis else "(1, 25, 7)"
    y = y[:, None] if channel_axis else y
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        LinearLoss(DiceLoss())(*tensors, y)
    assert str(caught.value).endswith(f"the first is 9 at {where}")
    with pytest.raises(ValueError, match=r"y has 1 label outside \[0, 3\)"):
        LinearLoss(DiceLoss())(*(t.detach() for t in tensors), y)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (losses.Dice(), "got Dice"),
        (DiceLoss, "got the class DiceLoss"),
        (torch.nn.CrossEntropyLoss(), "got CrossEntropyLoss"),
        (None, "got NoneType"),
    ],
)
def test_losses_that_are_no_modules_of_this_package(loss, got):
    with pytest.raises(TypeError, match=rf"loss must be a dice_core.torch.Loss such as .*, {got}"):
        LinearLoss(loss)


def test_class_weights_of_another_number_of_classes():
    *tensors, y = example(2, 4, 5)
    with pytest.raises(ValueError, match="weight must have 3 entries, one per class, got shape"):
        LinearLoss(DiceLoss([1, 2]))(*tensors, y)


RESIDENT = """
import torch
import dice_core.torch

def status(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

C, F, side = 105, 16, 64
criterion = dice_core.torch.LinearLoss(dice_core.torch.DiceCELoss())
conv = torch.nn.Conv3d(F, C, 1)

def step(features):
    y = torch.zeros(1, *features.shape[2:], dtype=torch.uint8)
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts again from the present
    before = status("VmRSS")
    criterion(features, conv.weight, conv.bias, y).backward()
    grown = status("VmHWM") - before - features.grad.nbytes
    return grown / (4 * C * y.numel())

first = torch.randn(1, F, side, side, side)
volumes = first, first.clone(), first.to(memory_format=torch.channels_last_3d)
print(*(step(features.requires_grad_()) for features in volumes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc/self")
def test_memory_above_arguments_and_gradients():
    """After a first step, which loads the code and the buffers of torch's matrix product."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # what is freed is returned
    )
    for growth in map(float, done.stdout.split()[1:]):
        assert -0.02 < growth < 1 / 20, f"the step grew by {growth:.3f} times the logits"


# ---- LinearHead ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d])
def test_a_head_has_the_parameters_of_its_convolution(kind, bias):
    conv = kind(4, 3, 1, bias=bias)
    head = dice_core.torch.LinearHead(conv)
    assert list(head.state_dict()) == list(conv.state_dict())
    x = torch.randn(2, 4, *[5] * (conv.weight.ndim - 2))
    features, weight, of_bias = head(x)
    assert features is x
    assert weight is conv.weight
    assert of_bias is conv.bias
    assert torch.equal(head.eval()(x), conv(x))
    assert not dice_core.torch.LinearHead(conv.eval()).training


@pytest.mark.parametrize(
    ("conv", "error"),
    [
        (lambda: torch.nn.Linear(4, 3), TypeError),
        (lambda: torch.nn.ConvTranspose2d(4, 3, 1), TypeError),
        (lambda: torch.nn.Conv2d(4, 3, 3), ValueError),
        (lambda: torch.nn.Conv2d(4, 3, 1, stride=2), ValueError),
        (lambda: torch.nn.Conv2d(4, 3, 1, padding=1), ValueError),
        (lambda: torch.nn.Conv2d(4, 4, 1, groups=2), ValueError),
    ],
)
def test_layers_that_are_no_head(conv, error):
    with pytest.raises(error, match="conv must"):
        dice_core.torch.LinearHead(conv())
