"""Axes that are missing, superfluous or in another order, and the views that fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .findings import Finding

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

NO_BATCH, NO_CHANNELS = "missing_batch_axis", "missing_channel_axis"
CHANNELS_LAST, OTHER_AXES, UNLIKE = "channels_last", "label_axes", "shapes_differ"


def fit(x: Shape, y: Shape, two_classes: bool) -> bool:
    """Whether x is (N, C, *) and y (N, *), (N, 1, *) or x's shape. `two_classes`: whether a single
    channel is two classes, with labels.
    """
    if len(x) < 2 or x[1] == 0:
        return False
    if x[1] == 1 and not two_classes:
        return y == x
    return y in ((x[0], *x[2:]), (x[0], 1, *x[2:]), x)


def fitted(
    x: Array, y: Array, two_classes: bool, torch: bool
) -> tuple[Array, Array, Finding | None] | Finding:
    """Views of x and y that fit together, and the mistake that they mend; or only the mistake if no
    view does. `torch`: whether the remedy is for tensors.
    """
    if fit(x.shape, y.shape, two_classes):
        return x, y, None
    shapes = f"x has shape {x.shape} and y {y.shape}"
    for name, text, code, views in _ways(x, y, torch):
        try:
            new_x, new_y = views()
        except (ValueError, IndexError):  # too few axes
            continue
        if fit(new_x.shape, new_y.shape, two_classes):
            return new_x, new_y, Finding(name, f"{shapes}: {text}", code)
    return Finding(UNLIKE, f"{shapes}: {_difference(x.shape, y.shape)}", _FIT)


_FIT = (
    "x must be (N, C, *) and y (N, *) or (N, 1, *) with class labels, or (N, C, *) with a soft or "
    "one-hot target; crop, pad or resample both alike, and labels with nearest-neighbour "
    "interpolation"
)


def _ways(
    x: Array, y: Array, torch: bool
) -> Iterator[tuple[str, str, str, Callable[[], tuple[Array, Array]]]]:
    """Names, explanations, remedies in code, and the views; the likeliest first."""
    last = "the channels are the last axis of"

    def move(name: str) -> str:
        return f"{name}.movedim(-1, 1)" if torch else f"np.moveaxis({name}, -1, 1)"

    def moved(array: Array) -> Array:
        return np.moveaxis(array, -1, 1)

    yield CHANNELS_LAST, f"{last} x", f"x = {move('x')}", lambda: (moved(x), y)
    yield CHANNELS_LAST, f"{last} y", f"y = {move('y')}", lambda: (x, moved(y))
    both = f"x, y = {move('x')}, {move('y')}"
    yield CHANNELS_LAST, f"{last} both", both, lambda: (moved(x), moved(y))
    batch = "the batch axis is missing in"
    yield NO_BATCH, f"{batch} both", "x, y = x[None], y[None]", lambda: (x[None], y[None])
    yield NO_BATCH, f"{batch} x", "x = x[None]", lambda: (x[None], y)
    yield NO_BATCH, f"{batch} y", "y = y[None]", lambda: (x, y[None])
    channels = "the channel axis is missing in"
    yield NO_CHANNELS, f"{channels} x", "x = x[:, None]", lambda: (x[:, None], y)
    yield NO_CHANNELS, f"{channels} y", "y = y[:, None]", lambda: (x, y[:, None])
    both = "x, y = x[:, None], y[:, None]"
    yield NO_CHANNELS, f"{channels} both", both, lambda: (x[:, None], y[:, None])
    if x.ndim >= 2 and y.size == math.prod((x.shape[0], *x.shape[2:])) and _same_axes(x, y):
        labels = (x.shape[0], *x.shape[2:])
        text = f"class labels have the shape {labels}, but for axes of length 1"
        yield OTHER_AXES, text, f"y = y.reshape({labels})", lambda: (x, y.reshape(labels))


def _same_axes(x: Array, y: Array) -> bool:
    """Whether the axes other than x's channels are the same, but for those of length 1."""
    return [n for n in y.shape if n > 1] == [n for n in (x.shape[0], *x.shape[2:]) if n > 1]


def _difference(x: Shape, y: Shape) -> str:
    if len(x) < 2:
        return "x has too few axes"
    batch, channels, *space = x
    if not channels:
        return "x has no channels"
    labels = (batch, *space)
    if len(y) == len(x) and (y[0], *y[2:]) == labels:
        return f"x has {channels} channels and y {y[1]}, which is neither {channels} nor 1"
    of_y = y[2:] if len(y) == len(x) else y[1:]
    if not y or y[0] != batch:
        return "the numbers of samples differ, or axes do"
    if len(of_y) != len(space):
        return "the numbers of axes do not go together"
    if sorted(of_y) == sorted(space):
        return f"the spatial axes {tuple(of_y)} of y are in another order than x's {tuple(space)}"
    return f"the spatial axes differ, {tuple(space)} and {tuple(of_y)}"
