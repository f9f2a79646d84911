"""Work on the GPU: bitwise reproducible, in the order of the caller's streams, in CUDA graphs."""

import os
import subprocess
import sys

import emulated
import pytest
import torch
from gpu.volumes import (
    DEVICE,
    LOGITS,
    Volume,
    assert_bitwise_equal,
    assert_gradient,
    assert_sums,
    large,
    true_loss,
)

from dice_core.torch import DiceLoss
from dice_core.torch import loss as dice_loss

pytestmark = pytest.mark.gpu

RUNS = 20
LONG = 100_000_000  # clock cycles, about 50 ms: work that does not wait for them sees old data


def step(x, y, **options):
    """(loss, gradient)."""
    x = x.detach().requires_grad_()
    loss = dice_loss(x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def assert_step(found, x, y):
    """(loss, gradient) are those of x and y."""
    loss, grad = true_loss(x, y)
    assert_sums(found[0], loss, x.dtype, "loss")
    assert_gradient(found[1], grad)


def assert_same_step(found, expected, what):
    assert_bitwise_equal(found[0], expected[0], f"loss of {what}")
    assert_bitwise_equal(found[1], expected[1], f"gradient of {what}")


# ---- reproducibility -----------------------------------------------------------------------------


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("channels", [2, 5, 33])
def test_every_run_is_bitwise_equal(channels, logits):
    x, y = Volume(channels, large(64, 64, 61), logits).tensors()
    first = step(x, y)
    for run in range(1, 3 if emulated.active else RUNS):
        assert_same_step(step(x, y), first, f"run {run}")


def test_two_concurrent_streams_are_bitwise_equal():
    x, y = Volume(5, (96, 96, 95), "float16").tensors()
    first = step(x, y)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for run in range(RUNS):
        with torch.cuda.stream(streams[run % 2]):
            found.append(step(x, y))
    torch.cuda.synchronize()
    for run, each in enumerate(found):
        assert_same_step(each, first, f"run {run}")


def test_other_work_on_the_device_does_not_change_results():
    x, y = Volume(5, (96, 96, 95), "bfloat16").tensors()
    first = step(x, y)
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(20):
            a @ a
    found = [step(x, y) for _ in range(RUNS)]
    torch.cuda.synchronize()
    for run, each in enumerate(found):
        assert_same_step(each, first, f"run {run}")


# ---- the caller's stream -----------------------------------------------------------------------


def test_work_goes_on_the_current_stream():
    """The data arrive late on this stream: work on another stream would read zeros."""
    x, y = Volume(4, (64, 65)).tensors()
    late = torch.zeros_like(x), torch.zeros_like(y)
    step(*late)  # compiled
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for to, what in zip(late, (x, y), strict=True):
            to.copy_(what)
        found = step(*late)
    stream.synchronize()
    assert_step(found, x, y)


def test_backward_runs_on_the_stream_of_forward():
    x, y = Volume(4, (64, 65)).tensors()
    leaf = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        loss = dice_loss(leaf * 1, y)
    (grad,) = torch.autograd.grad(loss, leaf)  # autograd makes this stream wait
    torch.cuda.synchronize()
    assert_step((loss, grad), x, y)


def test_nothing_synchronizes():
    x, y = Volume(4, (64, 65)).tensors()
    step(x, y)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    done = torch.cuda.Event()
    step(x, y)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_torch_sees_no_synchronization():
    x, y = Volume(4, (64, 65)).tensors()
    weight = [1.0, 2.0, 3.0, 4.0]
    step(x, y, weight=weight)  # the weight is copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y)
        step(x, y, weight=weight)
        step(x, y, weight=torch.tensor(weight))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- CUDA graphs -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch's own, on streams
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_a_captured_step_replays_on_changed_inputs(channels):
    volume = Volume(channels, (48, 49), "float16")
    x, y = volume.tensors()
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        dice_loss(x, y).mul(1000).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = dice_loss(x, y)
        loss.mul(1000).backward()
    for seed in (1, 2, 3):
        new_x, new_y = volume.tensors(seed)
        with torch.no_grad():
            x.copy_(new_x)
            y.copy_(new_y)
        graph.replay()
        torch.cuda.synchronize()
        expected, grad = true_loss(new_x, new_y)
        assert_sums(loss, expected, x.dtype, "loss")
        assert_gradient(x.grad, 1000 * grad)


@pytest.mark.filterwarnings("ignore")
def test_a_graphed_module():
    volume = Volume(4, (48, 49))
    x, y = volume.tensors()
    sample = x.clone().requires_grad_(), y.clone()
    criterion = torch.cuda.make_graphed_callables(DiceLoss(), sample)
    for seed in (1, 2):
        x, y = volume.tensors(seed)
        leaf = x.clone().requires_grad_()
        loss = criterion(leaf, y)
        loss.backward()
        assert_step((loss, leaf.grad), x, y)


# ---- compilation -------------------------------------------------------------------------------

PRECOMPILE = """
import os, torch, dice_core, dice_core.torch
from dice_core.losses import Dice, Focal
x = torch.randn(1, 6, 40, 41, device="cuda", dtype=torch.float16)
y = torch.zeros(1, 40, 41, device="cuda", dtype=torch.int16)
dice_core.precompile(x, y, p=2)
dice_core.precompile(x, y, Dice(p=2) + Focal(gamma=2))
before = sorted(os.listdir(os.environ["DICE_CORE_CACHE_DIR"]))
dice_core.torch.loss(x.requires_grad_(), y, p=2).backward()
dice_core.torch.statistics(x, y, p=2).array.sum().backward()
dice_core.torch.statistics(x, y, p=2, gamma=2).array.sum().backward()
after = sorted(os.listdir(os.environ["DICE_CORE_CACHE_DIR"]))
assert before, "nothing was cached"
assert after == before, "a call compiled more"
"""


def test_precompile_leaves_nothing_to_compile(tmp_path):
    environment = os.environ | {"DICE_CORE_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PRECOMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    without_numba = (
        "import sys\n" + PRECOMPILE + 'assert "numba" not in sys.modules, "numba was needed"'
    )
    run = subprocess.run(
        [sys.executable, "-c", without_numba], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
