"""Automatic mixed precision: half logits as they are, the loss scale before rounding, overflow."""

import naive
import pytest
import torch
from torch import nn

from dice_core.compat import monai, nnunet
from dice_core.torch import DiceCELoss, DiceLoss, loss

SCALE = 2.0**16  # GradScaler's first


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1))


def batch():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, 8, 8, 8, generator=generator)
    return image, torch.randint(3, (2, 1, 8, 8, 8), generator=generator)


CRITERIA = {
    "DiceLoss": lambda: DiceLoss(smooth=1),
    "DiceCELoss": lambda: DiceCELoss(smooth=1),
    "in place": lambda: DiceCELoss(smooth=1, inplace=True),
    "monai": lambda: monai.DiceCELoss(to_onehot_y=True, softmax=True),
    "nnunet": lambda: nnunet.DC_and_CE_loss({"ddp": False}, {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_autocast_leaves_half_logits_as_they_are(name, dtype):
    criterion, net, (image, y) = CRITERIA[name](), network(), batch()
    with torch.autocast("cpu", dtype=dtype):
        x = net(image)
        assert x.dtype == dtype
        before = x.detach().clone()
        value = criterion(x, y)
    assert value.dtype == torch.float32
    outside = before.clone().requires_grad_()
    assert torch.equal(value, criterion(outside * 1, y))
    grads = []
    x.register_hook(lambda grad: grads.append(grad.clone()))
    (SCALE * value).backward()
    (SCALE * criterion(outside * 1, y)).backward()
    assert grads[0].dtype == dtype
    assert torch.equal(grads[0], outside.grad)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def relative_error(grad, truth, where):
    """The root mean square of the error, relative to that of the truth, over some voxels."""
    where = where.expand(truth.shape)
    return ((grad - truth)[where].norm() / truth[where].norm()).item()


@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_scale_is_a_factor_before_rounding(inplace):
    """Per voxel, the gradient of a volume is at the end of the range of float16."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(1, 128, 128, 128, generator=generator) < 0.02).long()
    leaf = torch.randn(1, 2, 128, 128, 128, generator=generator).half().requires_grad_()
    truth = leaf.detach().double().requires_grad_()
    naive.dice_loss(truth, y).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss(leaf * 1, y, inplace=inplace)).backward()
    scaled, leaf.grad = leaf.grad.double() / SCALE, None
    loss(leaf, y).backward()
    unscaled = leaf.grad.double()
    foreground = y[:, None] == 1
    assert relative_error(scaled, truth.grad, foreground) < 1e-3
    assert relative_error(scaled, truth.grad, ~foreground) < 1e-3
    # What a scale that multiplies the rounded gradient would leave of it:
    assert relative_error(unscaled, truth.grad, ~foreground) > 0.3


@pytest.mark.parametrize("cause", ["logits", "scale"])
@pytest.mark.parametrize("name", CRITERIA)
def test_an_overflow_reaches_the_scaler(name, cause):
    """The step is skipped, and the scale is halved."""
    criterion, net, (image, y) = CRITERIA[name](), network(), batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40 if cause == "scale" else SCALE)
    if cause == "logits":
        with torch.no_grad():
            net[2].bias[1] = 1e6  # beyond float16
    before = [p.detach().clone() for p in net.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        value = criterion(net(image), y)
    scale = scaler.get_scale()
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_training_with_a_scaler_learns():
    net, (image, y) = network(), batch()
    criterion, y = DiceCELoss(smooth=1, inplace=True), (image > 0).long()
    optimizer, scaler = torch.optim.Adam(net.parameters(), lr=0.05), torch.amp.GradScaler("cpu")
    values = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            value = criterion(net(image), y)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
