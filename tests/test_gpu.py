"""Arrays on a GPU through the public functions, the kernels running in a simulator."""

import gpu_simulator
import naive
import numpy as np
import pytest
import torch
from compare import assert_close
from emulated import memory
from emulated.arrays import DeviceArray
from gpu_simulator import Kernel

import dice_core
import dice_core.torch
from dice_core import _gpu, allocators, backends, buffers, calls, losses
from dice_core.gpu import driver
from dice_core.torch import loss as torch_loss


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_simulator.install(monkeypatch)
    caches = (backends._unavailable, backends._named, backends._first)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def example(*shape, dtype="float32"):
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape).astype(dtype)
    return x, rng.integers(0, max(2, shape[1]), (shape[0], *shape[2:])).astype(np.uint8)


def on_host(x, y, term=None, **options):
    """(loss, gradient) of the reference."""
    return dice_core.loss_and_grad(x, y, term, **options, backend="reference")


OPTIONS = {
    "plain": {},
    "weighted": {"weight": [1, 0, 2.5], "smooth": 1.0},
    "per_sample": {"reduction": "none", "ignore_channel": 1},
    "batch": {"reduction": "batch", "p": 2, "ignore_label": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient(options):
    x, y = example(2, 3, 5, 8)
    upstream = np.array([2, -3.0]) if options.get("reduction") == "none" else 2
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y[:, None])
    value = dice_core.loss(*on_gpu, **options)
    assert Kernel.launched == ("statistics", "loss")
    again, grad = dice_core.loss_and_grad(*on_gpu, grad_loss=upstream, **options)
    assert Kernel.launched[2:] == ("statistics", "loss", "gradient")
    expected, expected_grad = on_host(x, y, grad_loss=upstream, **options)
    for result in (value, again):
        assert isinstance(result, DeviceArray)
        assert result.dtype == np.float32
        assert_close(result.host, np.asarray(expected), rtol=1e-6)
    assert isinstance(grad, DeviceArray)
    assert_close(grad.host, expected_grad, rtol=1e-5, atol=1e-7)


def test_the_gradient_into_out_and_in_place():
    x, y = example(2, 3, 40)
    expected = on_host(x, y)[1]
    on_gpu, labels = DeviceArray.holding(x), DeviceArray.holding(y)
    out = DeviceArray.holding(np.zeros_like(x))
    assert dice_core.loss_and_grad(on_gpu, labels, out=out)[1] is out
    assert dice_core.loss_and_grad(on_gpu, labels, out=on_gpu)[1] is on_gpu
    for grad in (out, on_gpu):
        assert_close(grad.host, expected, rtol=1e-5, atol=1e-7)


def test_out_that_the_kernels_cannot_write():
    x, y = example(1, 3, 4, 6)
    out = DeviceArray.holding(np.zeros((1, 3, 5, 7), np.float32))[:, :, :4, :6]
    with pytest.raises(ValueError, match="out's voxels are not equally spaced"):
        dice_core.loss_and_grad(DeviceArray.holding(x), DeviceArray.holding(y), out=out)


@pytest.mark.parametrize("kind", [float, DeviceArray.holding])
def test_the_incoming_gradient_is_a_number_or_lies_on_the_device(kind):
    x, y = example(2, 3, 40)
    upstream = kind(np.asarray(-4, np.float32))
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y)
    grad = dice_core.loss_and_grad(*on_gpu, grad_loss=upstream)[1]
    expected = on_host(x, y, grad_loss=-4)[1]
    assert_close(grad.host, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("upstream", "what"),
    [(np.ones(3, np.float32), "shape"), (np.ones((), np.float64), "dtype")],
)
def test_an_incoming_gradient_that_does_not_fit(upstream, what):
    on_gpu = map(DeviceArray.holding, example(2, 3, 40))
    with pytest.raises(ValueError, match=f"grad_loss must have the loss's {what}"):
        dice_core.loss_and_grad(*on_gpu, grad_loss=DeviceArray.holding(upstream))


def test_statistics_of_tiles_add_up():
    x, y = example(2, 3, 6, 8)
    tiles = [
        (DeviceArray.holding(x[:, :, part]), DeviceArray.holding(y[:, part]))
        for part in (np.s_[:2], np.s_[2:])
    ]
    total = dice_core.statistics(*tiles[0]) + dice_core.statistics(*tiles[1])
    expected = dice_core.statistics(x, y, backend="reference")
    assert isinstance(total.intersection, DeviceArray)
    assert_close(total.array.host, expected.array, rtol=1e-6)
    grad = dice_core.gradient(*tiles[1], total, smooth=1, grad_loss=3)
    expected_grad = on_host(x, y, smooth=1, grad_loss=3)[1][:, :, 2:]
    assert_close(grad.host, expected_grad, rtol=1e-5, atol=1e-7)


def test_statistics_with_the_cross_entropy():
    x, y = example(2, 3, 5, 8)
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y)
    found = dice_core.statistics(*on_gpu, gamma=2)
    assert Kernel.launched == ("statistics", "total")
    expected = dice_core.statistics(x, y, gamma=2, backend="reference")
    assert isinstance(found.cross_entropy_sum, DeviceArray)
    assert_close(found.array.host, expected.array, rtol=1e-6)
    grad = dice_core.gradient(*on_gpu, found, smooth=1)
    assert_close(grad.host, on_host(x, y, smooth=1)[1], rtol=1e-5, atol=1e-7)


TERMS = {
    "label_smoothing": losses.CrossEntropy(label_smoothing=0.1),
    "compound": losses.Dice(smooth=1) + 0.5 * losses.Focal(gamma=2),
    "binary": losses.BinaryCrossEntropy(pos_weight=[1, 2, 3]),
    "sigmoid_focal": losses.Dice() + losses.SigmoidFocal(alpha=0.25),
}


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_any_loss(name, soft):
    x, y = example(2, 3, 5, 8)
    if soft:
        y = np.random.default_rng(2).random(x.shape).astype(np.float16)
    activation = "sigmoid" if "binary" in name or "sigmoid" in name else "softmax"
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y)
    value, grad = dice_core.loss_and_grad(*on_gpu, TERMS[name], activation=activation)
    assert Kernel.launched == ("statistics", "total", "gradient")
    expected, expected_grad = on_host(x, y, TERMS[name], activation=activation)
    assert_close(value.host, np.asarray(expected), rtol=1e-6)
    assert_close(grad.host, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "term",
    [losses.Dice(p=2), losses.Jaccard(smooth=(0, 1), ignore_channel=0, divisor="kept")],
    ids=str,
)
def test_a_ratio_of_soft_targets_stays_on_the_device(term):
    x, _ = example(2, 3, 5, 8)
    y = np.random.default_rng(2).random(x.shape).astype(np.float32)
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y)
    value, grad = dice_core.loss_and_grad(*on_gpu, term)
    assert Kernel.launched == ("statistics", "loss", "gradient")
    expected, expected_grad = on_host(x, y, term)
    assert_close(value.host, np.asarray(expected), rtol=1e-6)
    assert_close(grad.host, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_scores_of_decisions(activation):
    x, y = example(2, 3, 5, 8)
    y = y if activation == "softmax" else (y[:, None] == np.arange(3).reshape(3, 1, 1))
    on_gpu = DeviceArray.holding(x), DeviceArray.holding(y.astype(np.uint8))
    found = dice_core.score(*on_gpu, activation=activation)
    assert Kernel.launched == ("statistics", "total")
    expected = dice_core.score(x, y, activation=activation, backend="reference")
    assert_close(found.dice, expected.dice, rtol=1e-13)
    assert_close(found.iou, expected.iou, rtol=1e-13)


class TestLabelsOutOfRange:
    def tensors(self):
        x, y = example(2, 3, 4, 5)
        y[1, 2, [3, 4]] = 7
        return x, DeviceArray.holding(x), DeviceArray.holding(y[:, None])

    def test_make_the_loss_nan(self):
        _, *on_gpu = self.tensors()
        assert np.isnan(dice_core.loss(*on_gpu).host)
        each = dice_core.loss(*on_gpu, reduction="none").host
        assert np.isnan(each).tolist() == [False, True]

    @pytest.mark.parametrize(
        ("function", "variable"), [("loss", None), ("loss_and_grad", "1"), ("statistics", None)]
    )
    def test_raise_if_requested(self, monkeypatch, function, variable):
        x, *on_gpu = self.tensors()
        with pytest.raises(ValueError, match="2 labels outside") as on_host:
            dice_core.loss(x, on_gpu[1].host, backend="reference")
        if variable:
            monkeypatch.setenv(calls.CHECK, variable)
        with pytest.raises(ValueError, match="2 labels outside") as on_device:
            getattr(dice_core, function)(*on_gpu, check_labels=None if variable else True)
        assert str(on_device.value) == str(on_host.value)

    @pytest.mark.parametrize("variable", [None, "", "0"])
    def test_do_not_raise_otherwise(self, monkeypatch, variable):
        _, *on_gpu = self.tensors()
        if variable is not None:
            monkeypatch.setenv(calls.CHECK, variable)
        dice_core.loss(*on_gpu)
        monkeypatch.setenv(calls.CHECK, "1")
        dice_core.loss(*on_gpu, check_labels=False)

    def test_nan_logits_are_not_reported_as_labels_out_of_range(self):
        x, y = example(1, 2, 20)
        x[0, 0, 3] = np.nan
        on_gpu = DeviceArray.holding(x), DeviceArray.holding(y)
        assert np.isnan(dice_core.loss(*on_gpu, check_labels=True).host)


class TestRefusals:
    def refusal(self, x, y):
        with pytest.raises(dice_core.BackendError) as error:
            dice_core.loss(DeviceArray.holding(x), y, backend="cuda")
        return str(error.value)

    def test_strides(self):
        x, y = example(1, 3, 4, 8)
        wide = np.zeros((1, 3, 4, 9), np.float32)
        text = self.refusal(wide[..., :8], DeviceArray.holding(y))
        assert "x's voxels are not equally spaced" in text
        assert "call .contiguous() on it" in text
        text = self.refusal(x, DeviceArray.holding(np.zeros((1, 4, 9), np.uint8))[..., :8])
        assert "y's voxels are not equally spaced" in text

    def test_an_old_gpu(self, monkeypatch):
        monkeypatch.setattr(driver, "capability", lambda device: (7, 5))
        monkeypatch.setattr(driver, "name", lambda device: "Tesla T4")
        x, y = example(1, 3, 4, 9)
        text = self.refusal(x, DeviceArray.holding(y))
        assert "cuda:0 (Tesla T4) has compute capability 7.5, at least 8.0 is needed" in text

    def test_too_many_channels(self):
        x, y = example(1, 1025, 2)
        assert "supports at most 1024 channels" in self.refusal(x, DeviceArray.holding(y))

    def test_more_sums_than_shared_memory_holds(self):
        x = DeviceArray.holding(np.zeros((1, 800, 1)))
        sums = {"gamma": 0, "nll": True, "binary_gamma": 0}
        with pytest.raises(dice_core.BackendError, match="supports at most 768 channels"):
            dice_core.statistics(x, x, **sums, backend="cuda")


@pytest.mark.parametrize("ordered", [False, True])
def test_libraries_without_stream_order_are_synchronized(monkeypatch, ordered):
    waits = []
    note = staticmethod(lambda: waits.append(Kernel.launched[-1]))
    monkeypatch.setattr(Kernel, "synchronized", note)
    monkeypatch.setattr(allocators, "is_ordered", lambda buffer: ordered)
    x, y = map(DeviceArray.holding, example(2, 3, 4, 8))
    dice_core.loss_and_grad(x, y)
    dice_core.statistics(x, y)
    # Of sums and losses, the kernels wait before their scratch memory is freed, then the call.
    expected = ["loss", "loss", "gradient", "total", "total"]
    assert waits == ([] if ordered else expected)


@pytest.mark.parametrize("gamma", [None, 2])
def test_precompile_loads_what_is_launched(monkeypatch, gamma):
    loaded = set()

    class Recorded(Kernel):
        def __init__(self, kind, plan, capability):
            super().__init__(kind, plan, capability)
            loaded.add((kind, plan))

    monkeypatch.setattr(_gpu, "_kernel", Recorded)
    x, y = map(DeviceArray.holding, example(2, 3, 4, 8, dtype="float16"))
    if gamma is None:
        dice_core.precompile(x, y, p=2)
    else:
        dice_core.precompile(x, y, losses.Dice(p=2) + losses.Focal(gamma=gamma))
    assert Kernel.launched == ()
    ready = set(loaded)
    if gamma is None:
        dice_core.loss_and_grad(x, y, p=2)
    dice_core.gradient(x, y, dice_core.statistics(x, y, p=2, gamma=gamma))
    assert ready == loaded


@pytest.fixture
def torch_gpu(monkeypatch):
    """Tensors in host memory pass for the GPU's."""

    def of_torch(tensor, name, torch, real=buffers._of_torch):
        allocated[tensor.data_ptr()] = tensor.nbytes
        return real(tensor, name, torch)

    def layout(shape, steps, dtype, device, real=buffers._torch_layout):
        return real(shape, steps, dtype, gpu)

    class Device:
        type = "cuda"

        def __str__(self):
            return "cuda:0"

    gpu, allocated = Device(), dict(memory.LIVE)
    monkeypatch.setattr(memory, "LIVE", allocated)
    monkeypatch.setattr(buffers, "_of_torch", of_torch)
    monkeypatch.setattr(buffers, "_torch_layout", layout)
    monkeypatch.setattr(buffers, "_torch_stream", lambda torch, device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name, value in (("is_cpu", False), ("is_cuda", True)):
        answer = property(lambda self, value=value: value)
        monkeypatch.setattr(torch.Tensor, name, answer, raising=False)


@pytest.mark.parametrize(
    ("options", "dtype"),
    list(zip(OPTIONS.values(), ["float16", "float32", "float64", "float16"], strict=True)),
    ids=str,
)
def test_torch_takes_two_launches_forward_and_one_backward(torch_gpu, options, dtype):
    x, y = example(2, 3, 5, 8, dtype=dtype)
    upstream = torch.tensor([512.0, 3.0] if options.get("reduction") == "none" else 512.0)
    logits = torch.from_numpy(x).requires_grad_()
    value = torch_loss(logits, torch.from_numpy(y), **options)
    assert Kernel.launched == ("statistics", "loss")
    value.backward(upstream.to(value.dtype))
    assert Kernel.launched[2:] == ("gradient",)
    expected, grad = on_host(x, y, grad_loss=upstream.numpy(), **options)
    tolerance = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-12}[dtype]
    assert value.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert_close(value.detach().numpy(), np.asarray(expected), rtol=1e-6)
    assert logits.grad.dtype == logits.dtype
    assert_close(logits.grad.numpy(), grad, rtol=tolerance, atol=tolerance)


def test_torch_copies_weights_to_the_gpu_once(torch_gpu):
    x, y = map(torch.from_numpy, example(2, 3, 5, 8))
    allocators._copied.cache_clear()
    for _ in range(3):
        torch_loss(x, y, weight=[1, 2, 3])
    assert allocators._copied.cache_info().misses == 1


def test_torch_by_the_general_path(torch_gpu):
    x, y = example(2, 3, 5, 8)
    logits, weight = torch.from_numpy(x).requires_grad_(), torch.ones(3, requires_grad=True)
    torch_loss(logits, torch.from_numpy(y), weight=weight).backward()
    assert Kernel.launched == ("statistics", "total", "gradient")
    grad = on_host(x, y, weight=[1, 1, 1])[1]
    assert_close(logits.grad.numpy(), grad, rtol=1e-5, atol=1e-7)
    assert weight.grad is not None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_torch_differentiates_the_cross_entropy(torch_gpu, gamma):
    x, y = map(torch.from_numpy, example(2, 3, 5, 8, dtype="float64"))
    loss = []
    for statistics in (dice_core.torch.statistics, naive.statistics):
        x = x.detach().requires_grad_()
        i, p, t, h = statistics(x, y.long(), gamma=gamma)
        loss.append((i / (p + t)).mean() + h.sum() / t.sum())
        loss[-1].backward()
        loss.append(x.grad)
    assert Kernel.launched == ("statistics", "total", "gradient")
    assert_close(loss[0].detach(), loss[2].detach(), rtol=1e-13)
    assert_close(loss[1], loss[3], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("term", "options"),
    [(losses.Dice() + losses.CrossEntropy(label_smoothing=0.2), {}),
     (losses.Jaccard() + losses.BinaryCrossEntropy(), {"activation": "sigmoid"}),
     (losses.Tversky(alpha=0.3, beta=0.7), {"activation": "none"})],
)  # fmt: skip
def test_torch_differentiates_any_loss(torch_gpu, term, options):
    x, y = map(torch.from_numpy, example(2, 3, 5, 8, dtype="float64"))
    x = x.sigmoid() if options.get("activation") == "none" else x
    value, grad = on_host(x.numpy(), y.numpy(), term, **options)
    x = x.requires_grad_()
    found = dice_core.torch.loss(x, y.long(), term, **options)
    found.backward()
    assert Kernel.launched[0] == "statistics"
    assert_close(found.detach(), np.asarray(value), rtol=1e-13)
    assert_close(x.grad, grad, rtol=1e-11, atol=1e-14)


def test_torch_scores(torch_gpu):
    x, y = map(torch.from_numpy, example(2, 3, 5, 8))
    score = dice_core.torch.DiceScore()
    score.update(x, y)
    assert Kernel.launched == ("statistics", "total")
    expected = dice_core.score(x.numpy(), y.numpy(), pool="batch", backend="reference")
    assert_close(score.compute(), expected.dice[0], rtol=1e-13)


def test_torch_checks_labels_if_requested(torch_gpu):
    x, y = map(torch.from_numpy, example(2, 3, 5, 8))
    y[0, 1, 2] = 9
    assert torch_loss(x, y).isnan()
    with pytest.raises(ValueError, match=r"1 label outside .* the first is 9 at \(0, 1, 2\)"):
        torch_loss(x, y, check_labels=True)
