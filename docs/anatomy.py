"""Draws the memory of one training step of Dice plus cross-entropy, for the page "Why".

Every operation's result is recorded when it is allocated and when it is freed; sizes are in units
of the logits. The build of the site calls `draw`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode

import dice_core.torch

CLASSES = 14
SHAPE = (1, CLASSES, 32, 32, 32)
INK = {"light": "#1f2328", "dark": "#e6edf3"}
NAIVE, OURS = "#d55e00", "#2b8cd9"  # told apart by the colour-blind, on white and on black
LABELS = {  # of the operations that allocate something of the size of the logits
    "aten._softmax.default": "softmax",
    "aten.zeros.default": "one-hot (int64)",
    "aten._to_copy.default": "one-hot (float)",
    "aten.mul.Tensor": "product",
    "aten._log_softmax.default": "log-softmax",
    "aten._log_softmax_backward_data.default": "gradients",
    "dice_core.statistics_grad.default": "gradient",
}


class Event(NamedTuple):
    """An operation, and what is allocated after it, in units of the logits."""

    operation: str
    live: float


class Recorder(TorchDispatchMode):
    """Records the storages that operations have made and nobody has freed, after each of them."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.live: dict[int, int] = {}
        self.events = [Event("", 0)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, then records."""
        given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.events.append(Event(str(func), sum(self.live.values()) / self.unit))
        return results


def naive(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Dice plus cross-entropy, written as in most libraries."""
    probabilities = x.softmax(1)
    one_hot = torch.nn.functional.one_hot(y, CLASSES).movedim(-1, 1).to(x.dtype)
    axes = tuple(range(2, x.ndim))
    intersection = (probabilities * one_hot).sum(axes)
    dice = 1 - 2 * intersection / (probabilities.sum(axes) + one_hot.sum(axes))
    return dice.mean() + torch.nn.functional.cross_entropy(x, y)


ours = dice_core.torch.DiceCELoss()


def record(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[list[Event], int]:
    """The operations of a step, and the number of those of the forward pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator).requires_grad_()
    y = torch.randint(CLASSES, (SHAPE[0], *SHAPE[2:]), generator=generator)
    with Recorder(x.nbytes) as recorder:
        value = loss(x, y)
        forward = len(recorder.events)
        value.backward()
    return recorder.events, forward


def changes(events: list[Event], forward: int) -> tuple[list[float], list[Event]]:
    """The operations after which the memory has changed; forward and backward take 0 to 1 each."""
    place, kept = [0.0], [events[0]]
    for i, event in enumerate(events[1:], 1):
        if abs(event.live - kept[-1].live) > 0.1 or i in (forward - 1, len(events) - 1):
            kept.append(event)
            place.append(i)
    first = sum(p < forward for p in place)
    scale = [(k + 1) / first for k in range(first)]
    scale += [1 + (k + 1) / (len(place) - first) for k in range(len(place) - first)]
    return scale, kept


def figure(variant: str) -> Figure:
    """The memory of both, step by step."""
    ink = INK[variant]
    style = {
        "font.size": 13,
        "text.color": ink,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "svg.hashsalt": "dice_core",
    }
    with mpl.rc_context(style):
        picture = Figure(figsize=(8, 4.4), layout="constrained")
        axes = picture.subplots()
        for loss, colour, name in ((naive, NAIVE, "usual code"), (ours, OURS, "dice_core")):
            events, forward = record(loss)
            place, kept = changes(events, forward)
            heights = [event.live for event in kept]
            axes.step(place, heights, where="post", color=colour, linewidth=2.5, label=name)
            axes.fill_between(place, heights, step="post", color=colour, alpha=0.15)
            for i in range(1, len(kept) - 1):
                event = kept[i]
                if event.live > kept[i - 1].live + 0.1 and event.operation in LABELS:
                    above = kept[i + 1].live < event.live  # where nothing is drawn
                    axes.annotate(
                        LABELS[event.operation],
                        (place[i], event.live),
                        (4, 4 if above else -5),
                        textcoords="offset points",
                        verticalalignment="bottom" if above else "top",
                        fontsize=12,
                    )
        axes.axvline(1, color=ink, linewidth=1, linestyle=":")
        axes.set(xlim=(0, 2.15), ylim=(0, None), ylabel="memory, in units of the logits")
        axes.set_xticks([0.5, 1.5], ["forward", "backward"])
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
    return picture


def draw(folder: Path) -> None:
    """Writes anatomy-light.svg and anatomy-dark.svg."""
    for variant in INK:
        figure(variant).savefig(
            folder / f"anatomy-{variant}.svg", transparent=True, metadata={"Date": None}
        )
