"""Arrays as arguments: any layout, library and protocol, and what must be refused as an array."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import torch
from layouts import LAYOUTS, Array

import dice_core

from .cases import TV, Case

FLOATS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
FLOATS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


class Wrapper:
    """An array known by one protocol only."""

    def __init__(self, array: Array, protocol: str) -> None:
        self._array = array
        if protocol == "interface":
            self.__array_interface__ = array.__array_interface__


class Capsule:
    """An array known by DLPack only."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def tensor(array: Array) -> torch.Tensor:
    """A torch tensor of the same memory."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == FLOATS["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def layout_of(case: Case, array: Array) -> Array:
    """The same numbers in other memory."""
    if case.may(0.4):
        return array.copy()
    name = case.one(*LAYOUTS, "readonly", "padded")
    if name == "readonly":
        array = array.copy()
        array.flags.writeable = False
        return array
    if name == "padded" and array.ndim:  # rows with a gap
        wide = np.ones((*array.shape[:-1], array.shape[-1] + case.one(1, 3, 16)), array.dtype)
        wide[..., : array.shape[-1]] = array
        return wide[..., : array.shape[-1]]
    if name == "padded":
        return array.copy()
    return LAYOUTS[name](array.copy())


def mapped(array: Array) -> Array:
    """A memory-mapped copy."""
    with tempfile.TemporaryFile() as file:
        view = np.memmap(file, array.dtype, "w+", shape=array.shape)
    view[...] = array
    return view


def unaligned(array: Array) -> Array:
    """A copy one byte off."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def presented(case: Case, array: Array, name: str, face: str) -> Any:
    """The array as an argument: a NumPy array, a tensor, or another object with its memory.

    If the case says so it is one that must be refused.
    """
    if name in case.wrong:
        case.wrong.discard(name)
        return refused_array(case, array, name, face)
    if face == "torch" or (case.may(0.2) and array.dtype.name != "object"):
        view = array
        for _ in range(4):
            view = layout_of(case, array)
            if all(step >= 0 for step in view.strides):
                break
        else:
            view = array.copy()
        if not view.flags.writeable:
            view = view.copy()
        case.keep(name, view)
        case.note(f"{name}: tensor {array.dtype.name} {array.shape} strides {view.strides}")
        return tensor(view)
    view = layout_of(case, array)
    kind = case.one(*["array"] * 9, "memmap", "matrix", "interface", "dlpack", "memoryview")
    plain = array.dtype.name != "bfloat16"
    result: Any = view
    if kind == "memmap" and array.size:
        result = view = mapped(array)
    elif kind == "matrix" and array.ndim == 2:
        result = view = view.view(np.matrix)
    elif kind == "interface" and plain:
        result = Wrapper(view, kind)
    elif kind == "dlpack" and plain and view.flags.writeable:
        result = Capsule(view)
    elif kind == "memoryview" and array.size and plain:
        result = view.data
    case.keep(name, view)
    case.note(
        f"{name}: {type(result).__name__} {array.dtype.name} {array.shape} strides {view.strides}"
    )
    return result


@oracle.quiet
def refused_array(case: Case, array: Array, name: str, face: str) -> Any:
    """Something that must be refused as x or y, of the same shape where it has one."""
    wide = array.astype(np.float64) if array.dtype.name == "bfloat16" else array
    choices: dict[str, Callable[[], Any]] = {
        "list": lambda: wide.tolist(),
        "None": lambda: None,
        "number": lambda: 1.0,
        "text": lambda: "array",
        "dict": lambda: {},
        "type": lambda: np.ndarray,
        "object": lambda: wide.astype(object),
        "strings": lambda: wide.astype("U4"),
        "bytes": lambda: wide.astype("S4"),
        "datetime": lambda: np.zeros(array.shape, "M8[s]"),
        "timedelta": lambda: np.zeros(array.shape, "m8[s]"),
        "structured": lambda: np.zeros(array.shape, [("a", "f4")]),
        "void": lambda: np.zeros(array.shape, "V4"),
        "complex": lambda: wide.astype(np.complex64),
        "longdouble": lambda: wide.astype(np.longdouble),
        "masked": lambda: np.ma.masked_array(wide, wide == 0),
        "scalar": lambda: wide.dtype.type(0),
        "no axes": lambda: np.zeros((), wide.dtype),
        "one axis": lambda: np.zeros(7, wide.dtype),
        "more axes": lambda: wide[..., None, None],
    }
    if wide.dtype.itemsize > 1 and wide.size and wide.dtype.kind != "b":
        choices["big endian"] = lambda: wide.astype(wide.dtype.newbyteorder(">"))
        choices["unaligned"] = lambda: unaligned(wide)
    if face == "torch" or case.may(0.3):
        choices = {
            "complex tensor": lambda: torch.zeros(array.shape, dtype=torch.complex64),
            "meta": lambda: torch.zeros(array.shape, device="meta"),
            "sparse": lambda: torch.ones(array.shape).to_sparse(),
            "no axes tensor": lambda: torch.zeros(()),
            "more axes tensor": lambda: tensor(np.ascontiguousarray(wide))[..., None, None],
            "float8": lambda: torch.zeros(array.shape).to(torch.float8_e4m3fn),
        } | ({"array": lambda: array, **choices} if face == "torch" else {})
        if wide.dtype.kind in "fV":
            choices["requires grad"] = lambda: (
                tensor(wide.copy()).requires_grad_() if face != "torch" or name == "y" else None
            )
    if name == "x":
        choices["integers"] = lambda: (
            tensor(wide.astype(np.int32)) if face == "torch" else wide.astype(np.int32)
        )
        choices["channels"] = lambda: (
            torch.zeros(2, 0, 3) if face == "torch" else np.zeros((2, 0, 3), np.float32)
        )
    kind = case.one(*choices)
    result = choices[kind]()
    case.note(f"{name}: {kind}")
    types: tuple[type, ...] = TV
    if face == "torch":
        types = (*TV, NotImplementedError)
    if kind == "meta":
        types = (*types, dice_core.BackendError)
    case.refuse(types, "x", "y")  # a wrong shape or device of one is also one of the other
    return result


def array_of(value: Any) -> Array:
    """A NumPy array of the same memory."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(FLOATS["bfloat16"])
        return value.numpy()
    return np.asarray(value)


@oracle.quiet
def nan_alike(a: Array) -> Array:
    """The numbers, NaN all alike."""
    wide = np.asarray(a).astype(np.float64)
    return np.where(np.isnan(wide), np.nan, wide) + 0.0
