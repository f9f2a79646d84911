"""torch's CUDA tensors, for a torch that is built without CUDA: their memory is that of `memory`.

A DeviceTensor says that it is on "cuda:0". Operations on it are computed on the host by torch's own
kernels, and their results are DeviceTensors; an operation on tensors of different devices, which
torch would refuse, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dice_core.torch import operators

from . import memory

CUDA = torch.device("cuda", 0)
KERNELS = {  # of operators that access memory themselves, for all devices
    torch.ops.dice_core.statistics.default: operators._statistics,
    torch.ops.dice_core.statistics_grad.default: operators._statistics_grad,
}
UNINITIALIZED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
BETWEEN_DEVICES = ("aten::copy_", "aten::index", "aten::index_put_")


class DeviceTensor(Tensor):
    """A tensor on the emulated device; `host` is a tensor of the same memory."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype
        )
        return made

    def __init__(self, host: Tensor) -> None:
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> Tensor:  # type: ignore[override]
        copy: Tensor = Copied.apply(self, False)  # type: ignore[no-untyped-call]
        return copy

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return moved(self, *args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in KERNELS:
            with Devices():
                return KERNELS[function](*args, **kwargs)
        name = function._schema.name
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name not in BETWEEN_DEVICES and any(type(t) is Tensor and t.ndim for t in leaves):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        result = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if function._schema.is_mutable and name.endswith("_"):  # in place: the same object
            return args[0]
        if name.removeprefix("aten::") in UNINITIALIZED:
            return new(result)
        return tree_map(lambda t: on_device(t) if isinstance(t, Tensor) else t, result)


class Copied(torch.autograd.Function):
    """A copy on the device or on the host; its gradient is copied back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: bool) -> Tensor:
        ctx.device = device
        return copied_to_device(x) if device else x.host.clone()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.cpu() if ctx.device else copied_to_device(grad)), None


class Devices(TorchFunctionMode):
    """Functions with the device "cuda" give DeviceTensors."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.to, Tensor.cuda) and type(args[0]) is not DeviceTensor:
            return moved(*args, *(["cuda"] if function is Tensor.cuda else []), **kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        return new(result) if function.__name__ in UNINITIALIZED else copied_to_device(result)


def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to"""
    if args and isinstance(args[0], Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    copy = kwargs.pop("copy", False)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    options |= {} if memory_format is None else {"memory_format": memory_format}
    if options or copy:
        x = Tensor.to(x, **options, copy=copy)
    if device is None or device.type == x.device.type:
        return x
    result: Tensor = Copied.apply(x, device.type == "cuda")  # type: ignore[no-untyped-call]
    return result


def on_host(value: Any) -> Any:
    """A tensor's memory, and the host for the device."""
    if isinstance(value, DeviceTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) else value


def on_device(host: Tensor) -> DeviceTensor:
    """The result of an operation: views of device memory are that, anything else is copied."""
    if host.numel() and memory.is_live(host.data_ptr()):
        return DeviceTensor(host)
    return copied_to_device(host)


def copied_to_device(x: Tensor) -> DeviceTensor:
    """A copy with the same strides, if it is dense."""
    copy = new(x)
    copy.host.copy_(x.detach())
    return copy


def new(like: Tensor) -> DeviceTensor:
    """An uninitialized tensor on the device."""
    strides = torch.empty_like(like).stride()  # without gaps
    span = memory.span(like.shape, strides)
    size = span * like.element_size()
    raw = torch.from_numpy(memory.allocate(max(1, size)))
    flat = raw[:size].view(like.dtype)
    host = flat.as_strided(like.shape, strides) if span else torch.empty_like(like)
    return DeviceTensor(host)


def is_plain(real: Any) -> Any:
    """`operators.is_plain`, for which DeviceTensors are torch's own."""

    def is_plain(*tensors: Tensor) -> bool:
        if len({str(t.device) for t in tensors}) > 1:
            return False
        return bool(real(*(t.host if type(t) is DeviceTensor else t for t in tensors)))

    return is_plain
