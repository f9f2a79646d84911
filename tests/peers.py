"""Shared by the tests against other libraries' losses: random cases, and comparisons of losses and
gradients.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from compare import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With tensors this small, the overhead of several threads exceeds the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Random:
    """Random choices, shapes and tensors, reproducible from a seed."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def of(self, *choices: Any) -> Any:
        """One of them."""
        return self.python.choice(choices)

    def random(self) -> float:
        """In [0, 1)."""
        return self.python.random()

    def shape(self, *channels: int) -> tuple[int, ...]:
        """(N, C, *), with C one of `channels`."""
        samples, spatial = self.python.randint(1, 3), ((7,), (3, 12), (2, 3, 2))
        return (samples, self.of(*channels), *self.of(*spatial))

    def logits(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.torch, dtype=self.of(torch.float32, torch.float64))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.torch)

    def labels(self, shape: Sequence[int]) -> Tensor:
        """(N, 1, *) for logits of this shape."""
        return torch.randint(shape[1], (shape[0], 1, *shape[2:]), generator=self.torch)


def example(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits (N, C, *) and labels (N, 1, *), which are 0 or 1 for a single channel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    y = torch.randint(max(shape[1], 2), (shape[0], 1, *shape[2:]), generator=generator)
    return x, y


def one_hot(y: Tensor, classes: int) -> Tensor:
    """(N, classes, *) from labels (N, 1, *)."""
    return (y == torch.arange(classes).reshape(1, -1, *(1,) * (y.ndim - 2))).to(torch.uint8)


def differentiated(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A scalar loss, `function` of x, and its gradient."""
    x = x.detach().clone().requires_grad_()
    value = function(x)
    assert type(value) is torch.Tensor
    assert value.shape == ()
    (grad,) = torch.autograd.grad(value * 3.0, x)  # with an incoming gradient other than 1
    assert grad.dtype == x.dtype
    return value.detach(), grad / 3


def same(
    ours: Callable[[Tensor], Tensor],
    others: Callable[[Tensor], Tensor],
    x: Tensor,
    rtol: float,
    what: str,
) -> None:
    """Two losses agree in value and gradient; `rtol` of the latter is of its largest entry."""
    (value, grad), (other, other_grad) = differentiated(ours, x), differentiated(others, x)
    assert value.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32), what
    assert_close(value, other, rtol=rtol, atol=rtol, what=what)
    finite = other_grad.abs()[other_grad.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    # Where predictions are certain, the others' softmax gives 0 for a gradient of 1e-18.
    assert_close(grad, other_grad, rtol=0, atol=rtol * scale + 1e-17, what=f"gradient, {what}")


def same_compiled(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """torch.compile traces the loss without a graph break, and value and gradient stay the same."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    value, grad = differentiated(lambda x: loss(x, y), x)
    other, other_grad = differentiated(lambda x: compiled(x, y), x)
    assert_close(other, value, rtol=1e-6)
    assert_close(other_grad, grad, rtol=1e-6, atol=1e-9)


class Recorded(TorchDispatchMode):
    """Keeps the results of all torch operations alive, so that no memory is used twice."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.results: list[Any] = []

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.results.append(out)
        return out

    def large(self, x: Tensor) -> int:
        """How many storages of at least half the size of x there are, not counting x's own."""
        storages = [out.untyped_storage() for out in self.results if isinstance(out, torch.Tensor)]
        large = {each.data_ptr() for each in storages if each.nbytes() >= x.nbytes // 2}
        return len(large - {x.untyped_storage().data_ptr()})
