"""Validation of arguments, and the error messages."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import allocators, buffers
from .buffers import Buffer

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))

# ---- numbers and names ---------------------------------------------------------------------------


def number(value: Any, name: str, largest: float = math.inf) -> float:
    """A finite number from 0 to `largest`."""
    if isinstance(value, (str, bytes, bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    no_gradient(value, name)
    try:
        result = float(value)
    except OverflowError:  # an int beyond any float
        result = math.inf
    except (TypeError, ValueError, RuntimeError):  # an array of several
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not (math.isfinite(result) and result >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {result}")
    if result > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {result}")
    return result


def no_gradient(value: Any, name: str) -> None:
    """Raises TypeError for a tensor that requires grad where no gradient would reach it."""
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(
            f"{name} requires grad, and no gradient would reach it: pass {name}.detach(), or "
            f"compute with it in torch, outside the loss"
        )


def integer(value: Any, name: str) -> int:
    """Any integer."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None


def power(p: Any) -> int:
    """The exponent p of the probabilities, an integer from 1."""
    value = integer(p, "p")
    if not 1 <= value < 2**31:
        raise ValueError(f"p must be an integer from 1 to 2**31 - 1, got {value}")
    return value


def ignore_label(label: Any) -> int | None:
    """Any integer that floating-point targets may be equal to, or None for no ignored label."""
    if label is None:
        return None
    value = integer(label, "ignore_label")
    if value.bit_length() > 1023:
        raise ValueError(
            f"ignore_label must lie within float64's range, got {value.bit_length()} bits"
        )
    return value


def ignore_channel(channels: Any) -> int | tuple[int, ...]:
    """Any integer, or several as a tuple; those outside [0, C) have no effect."""
    if isinstance(channels, (tuple, list, set, frozenset, range)) or np.ndim(channels) == 1:
        return tuple(integer(channel, "ignore_channel") for channel in channels)
    return integer(channels, "ignore_channel")


def flag(value: Any, name: str) -> bool:
    """True or False, or 1 or 0."""
    if isinstance(value, (bool, np.bool_, int)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def one_of(value: Any, name: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if the value is not one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def backend(name: Any) -> None:
    """Raises TypeError if this is neither a string nor None."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend must be a name or None, got {type(name).__name__}")


def output_weights(values: Any) -> list[float]:
    """The weights of several outputs: finite numbers from 0."""
    no_gradient(values, "weights")
    no_mask(values, "weights")
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"weights must be numbers, one for each output, got {type(values).__name__}"
        )
    return [number(value, "weights") for value in values]


def all_are(kind: type, values: Any, name: str) -> None:
    """Raises TypeError unless this is a sequence of instances of `kind`."""
    if not isinstance(values, Sequence):
        raise TypeError(
            f"{name} must be a sequence of {kind.__name__}s, got {type(values).__name__}"
        )
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be a sequence of {kind.__name__}s, got a {type(value).__name__} in it"
            )


# ---- arrays of a call ----------------------------------------------------------------------------


def shapes(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    """x is (N, C, *) with C >= 1; y is (N, *), (N, 1, *) or, soft targets, like x."""
    if len(x) < 2:
        raise ValueError(f"x must have at least two axes, (N, C, d1, d2, ...), got shape {x}")
    if x[1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {x}")
    labels = (x[0], *x[2:]), (x[0], 1, *x[2:])
    if y in (*labels, x):
        return
    remedy = "soft targets have x's shape"
    if y in (x[1:], (1, *x[1:])) or (len(y) == len(x) and y[1:] == x):
        remedy = "a missing batch axis? x[None] and y[None] add one"
    elif len(y) == len(x) and (y[0], y[-1], *y[1:-1]) == x:
        remedy = "channels last? y.movedim(-1, 1), or numpy.moveaxis(y, -1, 1), is a view"
    raise ValueError(
        f"y must have shape {labels[0]} or {labels[1]} for x of shape {x}, got {y}; {remedy}"
    )


def dtypes(x: str, y: str, soft_targets: bool) -> None:
    """x holds floating-point numbers; y integers or, soft targets, any numbers."""
    if x not in FLOATS:
        raise TypeError(f"x must hold floating-point logits ({', '.join(FLOATS)}), got {x}")
    if y not in INTEGERS and not (soft_targets and y in FLOATS):
        remedy = "; cast them to an integer dtype" if y in FLOATS else ""
        raise TypeError(f"y must hold integer or bool class labels, got {y}{remedy}")


def same_device(x: str, y: str) -> None:
    """x and y are on the same device."""
    if x != y:
        raise ValueError(f"x is on {x} but y is on {y}; move y to x's device")


def out(target: Buffer, x: Buffer, y: Buffer) -> None:
    """`out` is like x, writable, and either x itself or shares no memory with x and y."""
    for what in ("shape", "dtype", "device"):
        if getattr(target, what) != getattr(x, what):
            raise ValueError(
                f"out must have x's {what} {getattr(x, what)}, got {getattr(target, what)}"
            )
    if target.readonly:
        raise ValueError("out is read-only")
    if buffers.may_overlap_itself(target.layout):
        raise ValueError(f"out must not have elements that share memory (strides {target.strides})")
    is_x = (target.address, target.strides) == (x.address, x.strides)
    if not is_x and buffers.may_overlap(target, x):
        raise ValueError("out overlaps x; it must be x itself or share no memory with it")
    if buffers.may_overlap(target, y):
        raise ValueError("out overlaps y")


def targets(y: Buffer, spec: Any, classes: int, found: int = 0) -> None:
    """Raises ValueError if there are labels that are neither a class nor the ignore label, or soft
    targets outside [0, 1] (binary ones other than 0 and 1), or bytes of a bool array other than 0
    and 1; the message gives their number, the first one and its position.

    `found`: their number as counted by a kernel; 0 if it is not known.
    """
    ignored, soft = spec.ignore_label, spec.soft_targets
    array = allocators.to_host(y)
    is_bool = array.dtype == bool
    if is_bool:
        array = array.view(np.uint8)
    position, total, first = None, 0, None
    for n, sample in enumerate(array):  # one sample at a time: a mask of all of y could be large
        if y.dtype == "bfloat16" and sample.dtype == np.uint16:
            sample = (sample.astype(np.uint32) << 16).view(np.float32)
        if soft and sample.dtype.kind not in "iu":  # half precision would round the ignore label
            sample = sample.astype(np.float64)
        wrong = ~(sample <= 1) if soft or is_bool else sample >= classes
        wrong |= sample < 0
        if spec.targets == "binary":
            wrong |= (sample > 0) & (sample < 1)
        if ignored is not None and not is_bool:
            wrong &= sample != ignored
        if position is None and wrong.any():
            position = (n, *map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
            first = sample[position[1:]]
            if found:
                break
        total += int(wrong.sum())
    if position is None and not found:
        return
    found = found or total
    kind, allowed = ("value", "[0, 1]") if soft else ("label", f"[0, {classes})")
    kind, allowed = kind + "s"[: found != 1], "0 and 1" if spec.targets == "binary" else allowed
    note = "no label is ignored" if ignored is None else f"{ignored} is ignored"
    if position is None:
        raise ValueError(
            f"y had {found} {kind} outside {allowed} ({note}) when it was summed and has none now: "
            f"it must not change during a call"
        )
    has_channel_axis = len(y.owner.shape) > len(position)
    where = (position[0], 0, *position[1:]) if has_channel_axis else position
    if is_bool:
        raise ValueError(
            f"y is bool and has {found} {kind} whose byte is neither 0 nor 1; the first is {first} "
            f"at {where}; view y as uint8 to use such numbers"
        )
    if not soft and first == 255 and ignored != 255:
        note += "; ignore_label=255?"
    raise ValueError(
        f"y has {found} {kind} outside {allowed} ({note}); the first is {first} at {where}"
    )


# ---- class weights and incoming gradients --------------------------------------------------------


def weight(values: Any, name: str = "weight") -> np.ndarray[Any, np.dtype[np.float64]]:
    """Finite numbers in float64."""
    no_mask(values, name)
    try:
        array = np.asarray(values)
        if array.dtype != np.float64:
            with allocators.quiet(array):
                array = array.astype(np.float64, casting="same_kind")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers, one per class, got {values!r}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array.tolist()}")
    return array


def no_mask(values: Any, name: str) -> None:
    """Raises TypeError for a masked array, whose mask would be ignored."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored")


def weight_shape(values: Any, classes: int, name: str = "weight") -> None:
    """An array, of any library, has one entry per class."""
    if tuple(values.shape) != (classes,):
        note = " (one channel is two classes, background and foreground)" if classes == 2 else ""
        raise ValueError(
            f"{name} must have {classes} entries, one per class{note}, "
            f"got shape {tuple(values.shape)}"
        )


def grad_loss(values: Any, shape: tuple[int, ...], dtype: str = "float64") -> Any:
    """The incoming gradient of a loss of this shape, in this dtype."""
    no_gradient(values, "grad_loss")
    no_mask(values, "grad_loss")
    try:
        array = np.asarray(values)
        if array.dtype != dtype:
            with allocators.quiet(array):
                array = array.astype(dtype, casting="same_kind")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"grad_loss must be numbers, got {type(values).__name__}") from None
    if array.shape not in ((), shape):
        raise ValueError(f"grad_loss must have the loss's shape {shape}, got {array.shape}")
    return np.broadcast_to(array, shape)


def device_grad_loss(values: Buffer, shape: tuple[int, ...], dtype: str, device: str) -> None:
    """An incoming gradient on the logits' device fits a loss of this shape and dtype."""
    for what, expected, got in (
        ("shape", shape, values.shape),
        ("dtype", dtype, values.dtype),
        ("device", device, values.device),
    ):
        if got != expected:
            raise ValueError(f"grad_loss must have the loss's {what} {expected}, got {got}")
