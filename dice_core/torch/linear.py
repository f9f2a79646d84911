"""The loss of the logits of a 1x1x1 convolution, which are computed block by block and not kept.

Two more torch operators, `dice_core::linear_statistics` and its vector-Jacobian product. A block of
voxels is one matrix product into a buffer that all blocks share, followed by a call of the kernels
on that buffer; in backward the gradient overwrites the logits there, and two more products give the
gradients of features and weight. The order of blocks depends on shapes alone. The gradients of
weight and bias are added up in float64, from products of at least float32, and rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import allocators, buffers, checks, spec
from ..buffers import Buffer
from ..calls import Call
from ..spec import Spec
from ..sums import Statistics
from . import operators, transforms
from .functional import of_sums
from .modules import Loss

# There are about so many blocks, fewer where they would be smaller than so many bytes: each costs
# several launches or, on a CPU, barriers between threads, which are slow where other processes need
# the cores.
BLOCKS = 32
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 8 << 20}

HALF = (torch.float16, torch.bfloat16)


class LinearLoss(torch.nn.Module):
    """The loss of the logits x of a 1x1x1 convolution, from its input: a fused classification head.

    Replaces, without holding the logits of the volume or their gradient::

        x = conv(features)  # a 1x1x1 convolution: (N, F, *) -> (N, C, *)
        value = loss(x, y)

    `loss` is a module such as `DiceCELoss`. Beside the gradients of features, weight and bias, what
    is allocated is about a thirtieth of the logits, and at least a few megabytes; between forward
    and backward nothing is kept but the arguments. `LinearHead` makes a network return them in
    training, and logits in evaluation; `examples/fused_head.py` trains such networks. The products
    follow torch's settings for matrix products (threads, TF32), which may differ from those for
    convolutions.

    >>> import torch, dice_core.torch
    >>> conv = torch.nn.Conv2d(8, 3, 1)
    >>> criterion = dice_core.torch.LinearLoss(dice_core.torch.DiceLoss(smooth=1))
    >>> features, y = torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    >>> value = criterion(features, conv.weight, conv.bias, y)
    >>> torch.allclose(value, criterion.loss(conv(features), y))
    True
    """

    output_type = tuple

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        if not isinstance(loss, Loss):
            raise TypeError(
                f"loss must be a dice_core.torch.Loss such as DiceCELoss(), got "
                f"{'the class ' if isinstance(loss, type) else ''}"
                f"{(loss if isinstance(loss, type) else type(loss)).__qualname__}"
            )
        if loss._options.inplace:
            raise ValueError(
                "loss has inplace=True, which has no meaning in LinearLoss: there are no logits "
                "that their gradient could overwrite"
            )
        self.loss = loss

    def forward(self, features: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        """The loss, as `loss` gives it for the logits.

        Parameters
        ----------
        features : (N, F, *)
            Input of the convolution, of any strides.
        weight : (C, F) or (C, F, 1, 1, 1)
            Its weight, with as many axes of length 1 as there are, and of features' dtype. Under
            autocast the dtypes may differ, and the product is in autocast's dtype, as that of the
            convolution is.
        bias : (C,) or None
            Its bias, likewise.
        y : (N, *), (N, 1, *) or (N, C, *)
            Labels or soft targets, as for `loss`.

        Gradients reach features, weight and bias, where they require grad, and class weights.

        Raises
        ------
        TypeError, ValueError, BackendError
            As `loss` does, and for features, weight and bias that do not fit together.
        NotImplementedError
            For a y that requires grad, a sharded weight, and forward-mode derivatives.
        RuntimeError
            In a second derivative.
        """
        loss = self.loss
        sums = linear_statistics(features, weight, bias, y, loss._spec, *loss._options.of_sums)
        term = loss.term
        if term.weights:
            term = term.like(features)
            term.check(sums.array.shape[2])
        return of_sums(sums, term, loss._options)


class LinearHead(torch.nn.Module):
    """A 1x1x1 convolution that returns what `LinearLoss` takes, (x, weight, bias), in training, and
    logits in evaluation: in place of the last layer of a network.

    It has the convolution's own parameters, under the same names.

    >>> import torch, dice_core.torch
    >>> head = dice_core.torch.LinearHead(torch.nn.Conv2d(8, 3, 1))
    >>> features, weight, bias = head(torch.zeros(1, 8, 4, 4))
    >>> head.eval()(features).shape
    torch.Size([1, 3, 4, 4])

    Raises
    ------
    TypeError
        For another module than `torch.nn.Conv1d`, `Conv2d` and `Conv3d`.
    ValueError
        For a convolution that mixes voxels, or not all channels.
    """

    def __init__(self, conv: torch.nn.Module) -> None:
        super().__init__()
        if not isinstance(conv, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            raise TypeError(
                f"conv must be a torch.nn.Conv1d, Conv2d or Conv3d, got {type(conv).__name__}"
            )
        several = any(size != 1 for size in (*conv.kernel_size, *conv.stride))
        padded = not isinstance(conv.padding, str) and any(conv.padding)
        if several or padded or conv.groups != 1:
            raise ValueError(
                f"conv must have kernel_size 1, stride 1, padding 0 and groups 1, got {conv}"
            )
        bias: Any = conv.bias
        self.weight = conv.weight
        self.register_parameter("bias", bias)
        self.train(conv.training)

    def forward(self, x: Tensor) -> Any:
        """(N, F, *) -> (x, weight, bias) in training, logits (N, C, *) in evaluation."""
        if self.training:
            return x, self.weight, self.bias
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[self.weight.ndim - 3]
        bias: Any = self.bias
        return convolve(x, self.weight, bias)


def linear_statistics(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    request: Spec,
    backend: str | None = None,
    num_threads: int | None = None,
    check_labels: bool | None = None,
) -> Statistics:
    """The sums of the logits, differentiable in features, weight and bias."""
    dtype = check(features, weight, bias, y)
    checks.backend(backend)
    request = spec.for_shapes(logits_shape(features, weight), y.shape, request)
    options = (*operators.spec_options(request), backend, num_threads, check_labels)
    array = torch.ops.dice_core.linear_statistics(features, weight, bias, y, dtype, *options)
    return Statistics(array, request, _name(dtype))


def logits_shape(features: Tensor, weight: Tensor) -> tuple[int, ...]:
    """(N, C, *)."""
    return features.shape[0], weight.shape[0], *features.shape[2:]


# ---- arguments -----------------------------------------------------------------------------------


def check(features: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> torch.dtype:
    """The dtype of the logits. Raises TypeError, ValueError or NotImplementedError."""
    tensors = {"features": features, "weight": weight, "y": y}
    if bias is not None:
        tensors["bias"] = bias
    for name, value in tensors.items():
        _check_tensor(value, name)
    for name, value in tensors.items():
        if value.device != features.device:
            raise ValueError(
                f"{name} is on {value.device} but features are on {features.device}; move it there"
            )
        if name != "y":
            operators.refuse_tangent(value)
            _refuse_torch_func(value, name)
    operators.refuse_grad(y)
    _check_shapes(features, weight, bias)
    return _logits_dtype(features, weight, bias)


def _refuse_torch_func(x: Tensor, name: str) -> None:
    """Raises NotImplementedError if torch.func differentiates with respect to x; `vmap` alone, and
    derivatives with respect to class weights, work.
    """
    if not transforms.is_active():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"dice_core does not support torch.func.grad, vjp, jacrev and hessian of {name}: "
                f"use backward(), torch.autograd.grad or torch.autograd.functional.jacobian"
            )
        x = functorch.get_unwrapped(x)


def _check_tensor(value: Any, name: str) -> None:
    """Raises TypeError unless this is a dense tensor, which holds floats unless it is y."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        buffers.of(value, name)  # which refuses it
    if hasattr(value, "full_tensor"):
        raise NotImplementedError(
            f"{name} is a {type(value).__name__}, a tensor that is distributed over processes: "
            f"pass {name}.full_tensor()"
        )
    dtype = _name(value.dtype)
    if name != "y" and dtype not in checks.FLOATS:
        floats = ", ".join(checks.FLOATS)
        raise TypeError(f"{name} must hold floating-point numbers ({floats}), got {dtype}")


def _check_shapes(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError if these are not the input, weight and bias of a 1x1x1 convolution."""
    shapes = tuple(features.shape), tuple(weight.shape)
    if features.ndim < 2 or shapes[0][1] == 0:
        raise ValueError(
            f"features must have the shape (N, F, d1, d2, ...), F > 0, got {shapes[0]}"
        )
    if weight.ndim < 2 or shapes[1][0] == 0 or math.prod(shapes[1][2:]) != 1:
        raise ValueError(
            f"weight must be that of a 1x1x1 convolution, of shape (C, F) or (C, F, 1, ...), "
            f"got {shapes[1]}"
        )
    if shapes[1][1] != shapes[0][1]:
        raise ValueError(
            f"weight takes {shapes[1][1]} channels, but features have {shapes[0][1]}: their shapes "
            f"are {shapes[1]} and {shapes[0]}"
        )
    if bias is not None and tuple(bias.shape) != shapes[1][:1]:
        raise ValueError(
            f"bias must have the shape {shapes[1][:1]} for weight of shape {shapes[1]}, "
            f"got {tuple(bias.shape)}"
        )


def _logits_dtype(features: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype that the convolution would give. Raises TypeError if it would not take these."""
    kind = features.device.type
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    dtype, mixed = features.dtype, [features.dtype]
    if autocast and dtype != torch.float64:
        dtype, mixed = torch.get_autocast_dtype(kind), [*HALF, torch.float32]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype not in mixed:
            raise TypeError(
                f"{name} must have features' dtype {_name(features.dtype)}, got "
                f"{_name(value.dtype)}"
            )
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- blocks --------------------------------------------------------------------------------------

Block = tuple[slice, ...]  # of samples and voxels: a slice of every axis but that of the channels


def _blocks(shape: Sequence[int], voxels: int) -> Iterator[Block]:
    """Slices that cover a volume of this shape in order, with at most so many voxels each: a run
    along one axis, at one place on the axes before it, and all of those after it.
    """
    length, inner = shape[0], math.prod(shape[1:])
    if length * inner <= voxels:
        yield tuple(slice(0, n) for n in shape)
    elif inner <= voxels:
        count = -(-length // (voxels // inner))
        run = -(-length // count)
        for start in range(0, length, run):
            rest = (slice(0, n) for n in shape[1:])
            yield slice(start, min(start + run, length)), *rest
    else:
        for i in range(length):
            for others in _blocks(shape[1:], voxels):
                yield slice(i, i + 1), *others


def _with_channels(block: Block) -> tuple[slice, ...]:
    return block[0], slice(None), *block[1:]


class _Head:
    """The arguments of a call: computes logits block by block in a single buffer."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        dtype: torch.dtype,
        options: tuple[Any, ...],
    ) -> None:
        self.features = features
        self.y = y
        self.options = options
        self.request = operators.spec_of(options)
        self.sums_shape = self.request.sums_shape(logits_shape(features, weight))
        self.weight = weight.flatten(1).to(dtype)
        self.bias = None if bias is None else bias.to(dtype)[:, None]
        shape = features.shape[0], *features.shape[2:]
        size = BLOCK_BYTES.get(features.device.type, 0)  # 0: a device that the kernels refuse
        least = size // (dtype.itemsize * max(self.weight.shape))
        self.blocks = list(_blocks(shape, max(1, least, math.prod(shape) // BLOCKS)))
        largest = max(math.prod(s.stop - s.start for s in block) for block in self.blocks)
        self.buffer = self.weight.new_empty(len(self.weight) * largest)

    def matrix(self, block: Block) -> Tensor:
        """The features, (F, voxels): a view, or if there is none a copy."""
        features = self.features[_with_channels(block)].movedim(1, 0)
        return features.reshape(len(features), math.prod(features.shape[1:])).to(self.weight.dtype)

    def logits(self, matrix: Tensor) -> Tensor:
        """The logits of these features, (C, voxels), in the buffer."""
        classes, voxels = len(self.weight), matrix.shape[1]
        x = self.buffer[: classes * voxels].view(classes, voxels)
        if self.bias is None:
            return torch.mm(self.weight, matrix, out=x)
        return torch.addmm(self.bias, self.weight, matrix, out=x)

    def call(self, x: Tensor, block: Block) -> tuple[Call, Buffer]:
        """The call of the kernels on these logits, with a Buffer for their gradient in place."""
        x = x.view(len(x), *(s.stop - s.start for s in block)).movedim(0, 1)
        y = self.y
        if self.request.soft_targets:
            y = y[_with_channels(block)]
        elif y.ndim == x.ndim:
            y = y[:, 0][block]
        else:
            y = y[block]
        return operators.call(x, y, self.options), buffers.of(x, "x")

    def refuse_targets(self) -> None:
        """Raises ValueError for out-of-range targets, with their position in the whole volume."""
        y, request = buffers.of(self.y, "y"), self.request
        if not request.soft_targets and self.y.ndim == self.features.ndim:
            y = replace(y, layout=y.layout.without_axis(1))
        checks.targets(y, request, self.sums_shape[2])


def _fill(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Fills out, (F, *), with the product of the matrices; in place where out can be one."""
    try:
        matrix = out.view(len(a), b.shape[1])
    except RuntimeError:  # for these strides there is no such view
        matrix = None
    if matrix is None or matrix.dtype != a.dtype:
        out.copy_((a @ b).view(out.shape))
    else:
        torch.mm(a, b, out=matrix)


# ---- the operators -------------------------------------------------------------------------------


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, whose own products have the dtypes of their arguments."""

    @functools.wraps(kernel)
    def wrapped(features: Tensor, *others: Any) -> Any:
        with torch.autocast(features.device.type, enabled=False):
            return kernel(features, *others)

    return wrapped


@_without_autocast
def _statistics(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    dtype: torch.dtype,
    *options: Any,
) -> Tensor:
    """(K, N, C) float64 on features' device."""
    head = _Head(features, weight, bias, y, dtype, options)
    sums = features.new_zeros(head.sums_shape, dtype=torch.float64)
    for block in head.blocks:
        call, _ = head.call(head.logits(head.matrix(block)), block)
        try:
            found = call.statistics().array
        except ValueError:  # its position is that in the block
            head.refuse_targets()
            raise
        sums[:, block[0]] += torch.as_tensor(found)
    return sums


@_without_autocast
def _statistics_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    cotangent: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
    *options: Any,
) -> list[Tensor]:
    """Those of the gradients of features, weight and bias that are needed."""
    head = _Head(features, weight, bias, y, dtype, options)
    grad_features = allocators.empty_like(features, "features") if needs[0] else None
    grad_weight = weight.new_zeros(head.weight.shape, dtype=torch.float64) if needs[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float64) if needs[2] else None
    wide = torch.float32 if dtype in HALF else dtype
    for block in head.blocks:
        matrix = head.matrix(block)
        x = head.logits(matrix)
        call, in_place = head.call(x, block)
        part = cotangent[:, block[0]].detach().contiguous()
        call.gradient(part.numpy() if part.is_cpu else part, None, in_place)
        if grad_features is not None:
            _fill(grad_features[_with_channels(block)].movedim(1, 0), head.weight.T, x)
        if grad_weight is not None:
            grad_weight += x.to(wide) @ matrix.T.to(wide)
        if grad_bias is not None:
            grad_bias += x.sum(1, dtype=wide)
    grads = []
    if grad_features is not None:
        grads.append(grad_features)
    if grad_weight is not None:
        grads.append(grad_weight.view(weight.shape).to(weight.dtype))
    if grad_bias is not None and bias is not None:
        grads.append(grad_bias.to(bias.dtype))
    return grads


def _fake_statistics(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    dtype: torch.dtype,
    *options: Any,
) -> Tensor:
    shape = logits_shape(features, weight)
    request = spec.for_shapes(shape, y.shape, operators.spec_of(options))
    return features.new_empty(request.sums_shape(shape), dtype=torch.float64)


def _fake_statistics_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    cotangent: Tensor,
    needs: list[bool],
    *options: Any,
) -> list[Tensor]:
    grads = []
    for needed, tensor in zip(needs, (features, weight, bias), strict=True):
        if needed and tensor is not None:
            empty = torch.empty_like(tensor)
            grads.append(empty if tensor is features else empty.contiguous())
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, bias, y, *ctx.options = inputs
    ctx.save_for_backward(features, weight, bias, y)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.dice_core.linear_statistics_grad(
        *ctx.saved_tensors, cotangent, needs, *ctx.options
    )
    grads = iter(grads)
    return *(next(grads) if each else None for each in needs), None, *(None for _ in ctx.options)


_ARGUMENTS = "Tensor features, Tensor weight, Tensor? bias, Tensor y"
operators.register(
    f"linear_statistics({_ARGUMENTS}, ScalarType dtype, {operators.OPTIONS}) -> Tensor",
    _statistics,
    _fake_statistics,
    _backward,
    _save,
)
operators.register(
    f"linear_statistics_grad({_ARGUMENTS}, Tensor cotangent, bool[] needs, ScalarType dtype, "
    f"{operators.OPTIONS}) -> Tensor[]",
    _statistics_grad,
    _fake_statistics_grad,
    operators.no_second_derivative,
)
