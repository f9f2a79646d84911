"""inplace=True: the backward pass overwrites the logits with their gradient."""

import copy
import pickle

import numpy as np
import pytest
import torch
from compare import assert_bitwise_equal
from torch import nn
from torch.utils.checkpoint import checkpoint

import dice_core.torch
from dice_core import losses
from dice_core.compat import monai, nnunet, smp
from dice_core.torch import DiceCELoss, DiceLoss, Loss, loss

MODIFIED = "has been modified|modified by an inplace operation"


def example(*shape, dtype=torch.float32, seed=0):
    """A leaf, logits computed from it by an operation that saves nothing, and labels."""
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    y = torch.randint(max(2, shape[1]), (shape[0], *shape[2:]), generator=generator)
    return leaf, leaf + 0.5, y


def check_overwritten(function, leaf, x, y):
    """The gradient is that of a copy of the logits, and lies where they were."""
    fresh = x.detach().clone().requires_grad_()
    upstream = torch.rand_like(value) if (value := function(fresh, y, False)).ndim else None
    value.backward(upstream)
    address = x.data_ptr()
    function(x, y, True).backward(upstream)
    assert_bitwise_equal(leaf.grad.numpy(), fresh.grad.numpy())
    assert_bitwise_equal(x.detach().contiguous().numpy(), fresh.grad.contiguous().numpy())
    assert x.data_ptr() == address


TERMS = {
    "Dice": lambda: losses.Dice(smooth=1),
    "Dice of each sample": lambda: losses.Dice(smooth=1, reduction="none"),
    "Dice of each class": lambda: losses.Dice(smooth=1, reduction="classes"),
    "GeneralizedDice": lambda: losses.GeneralizedDice(smooth=1),
    "Dice + CrossEntropy": lambda: losses.Dice(smooth=1) + losses.CrossEntropy(),
    "Focal": lambda: losses.Focal(),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    term = TERMS[name]()
    check_overwritten(lambda x, y, inplace: loss(x, y, term, inplace=inplace), *example(2, 3, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    leaf, x, y = example(2, 3, 5, 7, dtype=dtype)
    fresh = x.detach().clone().requires_grad_()
    loss(fresh, y).backward()
    loss(x, y, inplace=True).backward()
    assert torch.equal(leaf.grad, fresh.grad)
    assert torch.equal(x, fresh.grad)


MODULES = {
    "DiceLoss": lambda inplace: DiceLoss(smooth=1, inplace=inplace),
    "DiceCELoss": lambda inplace: DiceCELoss(inplace=inplace),
    "Loss": lambda inplace: Loss(losses.Tversky(smooth=1), inplace=inplace),
    "monai": lambda inplace: monai.DiceCELoss(to_onehot_y=True, softmax=True, inplace=inplace),
    "nnunet": lambda inplace: nnunet.DC_and_CE_loss(
        {"batch_dice": True, "ddp": False}, {}, inplace=inplace
    ),
    "nnunet Dice": lambda inplace: nnunet.MemoryEfficientSoftDiceLoss(
        nnunet.softmax_helper_dim1, ddp=False, inplace=inplace
    ),
    "smp": lambda inplace: smp.DiceLoss("multiclass", inplace=inplace),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    leaf, x, y = example(2, 3, 5, 7)
    check_overwritten(lambda x, y, inplace: MODULES[name](inplace)(x, y), leaf, x, y[:, None])


def test_it_is_a_setting_that_is_copied():
    module = DiceLoss(inplace=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        leaf, x, y = example(1, 3, 5, 7)
        other(x, y).backward()
        assert torch.equal(x, leaf.grad)


def test_a_learned_weight_and_the_logits():
    """The sums' gradient also overwrites where the loss is computed by torch."""
    weight = torch.rand(3, requires_grad=True)
    check_overwritten(
        lambda x, y, inplace: loss(x, y, weight=weight, inplace=inplace), *example(2, 3, 5, 7)
    )
    assert weight.grad is not None


def test_deep_supervision():
    criterion = dice_core.torch.DeepSupervision(DiceLoss(inplace=True))
    fine, x, y = example(1, 3, 8, 8)
    coarse, z, _ = example(1, 3, 4, 4)
    criterion([x, z], y).backward()
    assert torch.equal(x, fine.grad)
    assert torch.equal(z, coarse.grad)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[..., :5],
        lambda t: t[:, :, ::2],
        lambda t: t.transpose(2, 3),
        lambda t: t.flip(3),
        lambda t: t.to(memory_format=torch.channels_last),
    ],
)
def test_views(view):
    leaf, base, _ = example(2, 3, 6, 8)
    x, y = view(base), torch.randint(3, (2, *view(base).shape[2:]))
    fresh, untouched = base.detach().clone().requires_grad_(), base.detach().clone()
    loss(view(fresh), y).backward()
    loss(x, y, inplace=True).backward()
    assert torch.equal(leaf.grad, fresh.grad)
    assert torch.equal(x, view(fresh.grad))
    if x._base is not None:
        others = torch.ones_like(base, dtype=torch.bool)
        view(others)[...] = False
        assert torch.equal(base[others], untouched[others])


def test_the_version_counter():
    _leaf, x, y = example(1, 3, 5, 7)
    value = loss(x, y, inplace=True)
    before = x._version
    value.backward()
    assert x._version == before + 1


def test_an_operation_that_has_saved_the_logits_raises():
    leaf, x, y = example(1, 3, 5, 7)
    total = (x**2).sum() + loss(x, y, inplace=True)  # backward of the loss, created last, is first
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()
    assert leaf.grad is None


def test_an_activation_that_has_saved_its_output_raises():
    _leaf, x, y = example(1, 3, 5, 7)
    value = loss(torch.exp(x), y, inplace=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        value.backward()


def test_two_losses_of_the_same_logits_raise():
    _leaf, x, y = example(1, 3, 5, 7)
    with pytest.raises(RuntimeError, match=MODIFIED):
        (loss(x, y, inplace=True) + loss(x, y, inplace=True)).backward()


def test_a_second_backward_pass_raises():
    _leaf, x, y = example(1, 3, 5, 7)
    value = loss(x, y, inplace=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        value.backward()


def test_the_sum_with_another_gradient():
    """Another consumer that has not saved the logits gets its own gradient added elsewhere."""
    leaf, x, y = example(1, 3, 5, 7)
    fresh = x.detach().clone().requires_grad_()
    (loss(fresh, y) + 3 * fresh.sum()).backward()
    (loss(x, y, inplace=True) + 3 * x.sum()).backward()
    np.testing.assert_allclose(leaf.grad, fresh.grad, rtol=1e-6)


def test_hooks_and_retained_gradients():
    leaf, x, y = example(1, 3, 5, 7)
    seen = []
    x.retain_grad()
    x.register_hook(lambda grad: seen.append(grad.clone()))
    loss(x, y, inplace=True).backward()
    assert torch.equal(seen[0], leaf.grad)
    assert torch.equal(x.grad, leaf.grad)
    assert torch.equal(x, leaf.grad)


def test_saved_tensors_that_are_moved():
    leaf, x, y = example(1, 3, 5, 7)
    before = x.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        value = loss(x, y, inplace=True)
    value.backward()
    assert torch.equal(x, before)  # what was unpacked has memory of its own
    fresh = before.clone().requires_grad_()
    loss(fresh, y).backward()
    assert torch.equal(leaf.grad, fresh.grad)


def test_hooks_that_return_the_logits_themselves():
    leaf, x, y = example(1, 3, 5, 7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        value, again = loss(x, y, inplace=True), loss(x, y, inplace=True)
    again.backward()
    assert torch.equal(x, leaf.grad)
    with pytest.raises(RuntimeError, match=MODIFIED):
        value.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_networks(reentrant):
    """The network is recomputed; the logits that the loss has saved are the only ones."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    image, y = torch.randn(2, 1, 8, 8).requires_grad_(), torch.randint(3, (2, 8, 8))
    loss(network(image), y).backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    loss(checkpoint(network, image, use_reentrant=reentrant), y, inplace=True).backward()
    for p, grad in zip(network.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_checkpointed_loss():
    """What is recomputed is not overwritten: others may have saved it too."""
    torch.manual_seed(0)
    layer, y = nn.Conv2d(1, 3, 1), torch.randint(3, (2, 8, 8))
    image = torch.randn(2, 1, 8, 8).requires_grad_()

    def region(image, inplace):
        x = layer(image)
        return (x**2).mean() + loss(x, y, inplace=inplace)

    region(image, False).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    checkpoint(region, image, True, use_reentrant=False).backward()
    assert torch.equal(layer.weight.grad, expected)


def test_a_graph_of_the_gradient_takes_new_memory():
    leaf, x, y = example(1, 3, 5, 7)
    before = x.detach().clone()
    (grad,) = torch.autograd.grad(loss(x, y, inplace=True), leaf, create_graph=True)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_without_a_gradient_nothing_happens():
    leaf, x, y = example(1, 3, 5, 7)
    before = x.detach().clone()
    with torch.no_grad():
        loss(x, y, inplace=True)
        loss(leaf, y, inplace=True)
    loss(leaf.detach(), y, inplace=True)
    loss(x, y, inplace=True)
    assert torch.equal(x, before)


def test_leaves_are_refused():
    leaf, _, y = example(2, 3, 5, 7)
    for inputs, what in ((leaf, "x is a leaf"), (leaf[:, :, :], "a view of a leaf")):
        with pytest.raises(ValueError, match=what):
            loss(inputs, y, inplace=True)
        with pytest.raises(ValueError, match=what):
            DiceLoss(weight=torch.ones(3, requires_grad=True), inplace=True)(inputs, y)


def test_broadcast_logits_are_refused():
    _leaf, x, _ = example(1, 3, 1, 7)
    with pytest.raises(ValueError, match="elements that share memory"):
        loss(x.expand(2, 3, 5, 7), torch.zeros(2, 5, 7, dtype=torch.uint8), inplace=True)


def test_traced_tensors_are_refused():
    leaf, _x, y = example(1, 3, 5, 7)

    def function(leaf):
        return loss(leaf + 0.5, y, inplace=True)

    criterion = DiceLoss(inplace=True)
    with pytest.raises(Exception, match=r"cannot be used within torch\.compile"):
        torch.compile(lambda leaf: criterion(leaf + 0.5, y), backend="eager", fullgraph=True)(leaf)
    with pytest.raises(NotImplementedError, match=r"inplace=True|torch\.func"):
        torch.func.grad(function)(leaf.detach())


def test_wrong_values_are_refused():
    for function in (DiceLoss, monai.DiceLoss, nnunet.SoftDiceLoss):
        with pytest.raises(TypeError, match="inplace must be"):
            function(inplace="yes")


def test_activations_of_the_user_take_new_memory():
    """exp saves its output; overwriting it would make its backward pass raise."""
    leaf, x, y = example(2, 3, 5, 7)
    target = nn.functional.one_hot(y, 3).movedim(-1, 1).float()
    act = torch.exp
    for module in (
        monai.DiceLoss(other_act=act, inplace=True),
        monai.DiceCELoss(other_act=act, inplace=True),
        nnunet.SoftDiceLoss(act, ddp=False, inplace=True),
    ):
        module(x.sigmoid().log(), target).backward()
        assert leaf.grad is not None
