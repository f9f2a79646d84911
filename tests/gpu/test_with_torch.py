"""The loss within torch: compilation, mixed precision, memory, distributed training."""

import gc
import time
from statistics import median

import pytest
import torch
from gpu.volumes import (
    DEVICE,
    LOGITS,
    Volume,
    assert_gradient,
    assert_sums,
    large,
    true_loss,
)

from dice_core import BackendError
from dice_core.torch import DiceLoss, statistics
from dice_core.torch import loss as dice_loss

pytestmark = pytest.mark.gpu

# The fields of a Spec; backend, num_threads, check_labels.
OPTIONS = ("softmax", 1, "-1", 2.0, False, None, False, "labels", None, None, None)


# ---- autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["statistics", "statistics_grad"])
def test_operators_are_well_formed(name):
    x, y = Volume(3, (4, 5)).tensors()
    if name == "statistics":
        operator, inputs = torch.ops.dice_core.statistics, (x.requires_grad_(), y)
    else:
        cotangent = torch.rand(4, 2, 3, dtype=torch.float64, device=DEVICE)
        operator, inputs = torch.ops.dice_core.statistics_grad, (x, y, cotangent)
    torch.library.opcheck(operator.default, (*inputs, *OPTIONS))


def test_second_derivatives_are_refused():
    x, y = Volume(3, (40,)).tensors()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(dice_loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


DENSE = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "batch-last": lambda x: x.movedim(0, 1).contiguous().movedim(1, 0),
}


@pytest.mark.parametrize("dense", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("logits", LOGITS)
def test_gradient_has_the_dtype_and_strides_of_the_logits(logits, dense):
    x, y = Volume(5, (6, 7, 8), logits).tensors()
    x = dense(x).requires_grad_()
    loss = 1000 * dice_loss(x, y)
    loss.backward()
    assert (x.grad.dtype, x.grad.stride()) == (x.dtype, x.stride())
    assert_gradient(x.grad, 1000 * true_loss(x, y)[1])


def test_strides_that_are_not_read_in_place_are_refused_with_the_remedy():
    x, y = Volume(5, (8, 7, 8)).tensors()
    with pytest.raises(BackendError, match=r"call \.contiguous\(\) on it"):
        dice_loss(x.transpose(2, 4), y)


def test_a_custom_loss():
    x, y = Volume(4, (40, 41)).tensors()

    def tversky(i, p, t):
        return (1 - i / (i + 0.3 * (p - i) + 0.7 * (t - i))).mean()

    x.requires_grad_()
    (grad,) = torch.autograd.grad(tversky(*statistics(x, y)), x)
    exact = x.detach().cpu().double().requires_grad_()
    s, onehot = exact.softmax(1), torch.nn.functional.one_hot(y.cpu().long(), 4).movedim(-1, 1)
    sums = ((s * onehot).sum((2, 3)), s.sum((2, 3)), onehot.sum((2, 3)))
    assert_gradient(grad, torch.autograd.grad(tversky(*sums), exact)[0])


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", ["float16", "float32"])
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_a_step_takes_one_gradient_and_forward_keeps_nothing(channels, logits):
    x, y = Volume(channels, (64, 128, 128), logits).tensors()
    x.requires_grad_()
    dice_loss(x, y).backward()
    x.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = dice_loss(x, y)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert kept < 2**20
    assert x.nbytes <= peak <= x.nbytes + 2**20


# ---- mixed precision ---------------------------------------------------------------------------


def test_loss_scale_reaches_the_gradient_before_it_is_rounded():
    """Without it these gradients underflow in float16."""
    x, y = Volume(4, large(64, 64, 64), "float16").tensors()
    x.requires_grad_()
    (dice_loss(x, y) * 2.0**20).backward()
    assert_gradient(x.grad, true_loss(x, y)[1] * 2.0**20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler(dtype):
    torch.manual_seed(0)
    image = torch.randn(2, 1, 16, 16, 16, device=DEVICE)
    y = (image[:, 0] > 0).to(torch.uint8)
    network = torch.nn.Conv3d(1, 2, 3, padding=1).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    scaler = torch.amp.GradScaler(DEVICE)
    with torch.autocast(DEVICE, dtype):
        logits = network(image)
        loss = dice_loss(logits, y)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)

    exact = torch.nn.Conv3d(1, 2, 3, padding=1).double()
    exact.load_state_dict(network.state_dict())
    s = exact(image.cpu().double()).softmax(1)
    onehot = torch.nn.functional.one_hot(y.cpu().long(), 2).movedim(-1, 1)
    volume = (2, 3, 4)
    expected = 1 - (2 * (s * onehot).sum(volume) / (s.sum(volume) + onehot.sum(volume))).mean()
    expected.backward()
    for ours, theirs in zip(network.parameters(), exact.parameters(), strict=True):
        worst = (ours.grad.cpu().double() - theirs.grad).abs().max()
        assert worst < 0.02 * theirs.grad.abs().max()
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale, "a gradient overflowed"


# ---- torch.compile -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_whole(mode):
    torch.compiler.reset()
    volume = Volume(4, (32, 33))
    criterion = DiceLoss(smooth=1)

    @torch.compile(fullgraph=True, mode=mode)
    def step(x, y):
        return criterion(2 * x, y)

    for seed in range(4):  # the first ones record a graph, the others replay it
        x, y = volume.tensors(seed)
        x.requires_grad_()
        loss = step(x, y)
        loss.backward()
        expected, grad = true_loss(2 * x.detach(), y, smooth=1)
        assert_sums(loss, expected, x.dtype, "loss")
        assert_gradient(x.grad, 2 * grad)


# ---- distribution ------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    """A process group with a single process."""
    import torch.distributed as dist

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    if not (dist.is_available() and getattr(dist, f"is_{backend}_available")()):
        pytest.skip(f"torch {torch.__version__} is built without {backend}")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of NCCL's, on how to name the device
def test_distributed_data_parallel(process_group):
    x, y = Volume(4, (32, 33)).tensors()
    network = torch.nn.Conv2d(4, 4, 1).to(DEVICE)
    grads = []
    for wrap in (lambda module: module, torch.nn.parallel.DistributedDataParallel):
        network.zero_grad()
        dice_loss(wrap(network)(x), y).backward()
        grads.append(network.weight.grad.clone())
    torch.testing.assert_close(*grads)


# ---- the host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 64, 128])
def test_host_cost_of_a_step_is_reported(side, record_property, capsys):
    """The time to enqueue forward and backward; printed without a limit."""
    x, y = Volume(4, (side,) * 3, "float16").tensors()
    x.requires_grad_()
    criterion, samples = DiceLoss(), []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            criterion(x, y).backward()
            x.grad = None
        samples.append((time.perf_counter() - start) / 10)
    record_property("host_us", 1e6 * median(samples))
    with capsys.disabled():
        print(f"\nhost cost of a step at {side}^3: {1e6 * median(samples):.1f} us")
