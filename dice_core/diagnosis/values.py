"""Findings of the facts about logits and targets that fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import losses
from ..losses import LinearOverlap, Term
from .facts import Facts
from .findings import Finding

ENOUGH = 32  # numbers, below which all may be alike by chance


def of_logits(facts: Facts, activation: str, dtype: str) -> Iterator[Finding]:
    """Findings of the logits."""
    if not facts.samples or not facts.voxels:
        text = f"there are no voxels: {facts.samples} samples of {facts.voxels} voxels"
        yield Finding("no_voxels", text, "leave empty batches and crops out")
        return
    for hits, kind in ((facts.nan, "nan_logits"), (facts.infinite, "infinite_logits")):
        if hits:
            text = f"{_plural(hits.count, 'logit')} at valid voxels {_are(hits)} "
            text += "NaN" if hits is facts.nan else "+inf, and the softmax over +inf is NaN"
            yield Finding(kind, f"{text}; the first is at {hits.position}", _OVERFLOW)
    if facts.masked and activation == "softmax" and facts.channels > 1:
        text = f"all logits of {_plural(facts.masked.count, 'valid voxel')} are -inf, whose softmax"
        text += f" is NaN; the first voxel is {_voxel(facts.masked.position)}"
        yield Finding("infinite_logits", text, _OVERFLOW)
    if facts.half_range and dtype == "float16":
        text = f"{_plural(facts.half_range.count, 'logit')} {_are(facts.half_range)} beyond half of"
        text += f" float16's largest number, 65504; {facts.half_range}"
        yield Finding("near_overflow", text, _OVERFLOW)
    low, high = facts.low.min(), facts.high.max()
    finite = not (facts.nan or facts.infinite or facts.masked)
    count = facts.samples * facts.voxels
    if finite and count >= ENOUGH and (facts.low == facts.high).all():
        values = ", ".join(f"{value + 0:g}" for value in facts.low[:5])
        more = ", ..." if facts.channels > 5 else ""
        text = f"the logits of each channel are the same at all {count} voxels: {values}{more}"
        remedy = (
            "look for a network whose output ignores its input: weights that are zero or not "
            "loaded, activations that died, images that are constant"
        )
        yield Finding("constant_logits", text, remedy)
    elif activation == "none":
        if facts.outside:
            text = f"{_plural(facts.outside.count, 'value')} of x {_are(facts.outside)} outside "
            text += '[0, 1], and activation="none" takes probabilities'
            remedy = 'activation="softmax", or activation="sigmoid" for classes that overlap'
            yield Finding("logits_as_probabilities", f"{text}; {facts.outside}", remedy)
    elif finite and low >= 0 and high <= 1 and count >= ENOUGH:
        inside = f"all values of x are in [{low:.3g}, {high:.3g}]"
        if facts.sums_to_one and activation == "softmax":
            best = math.e / (math.e + facts.channels - 1)
            text = (
                f"{inside} and sum to 1 over the channels: x has been through a softmax already, "
                f"and a second one gives no class more than {best:.3f}"
            )
            yield Finding("double_softmax", text, _NO_ACTIVATION.format("softmax"))
        elif facts.sums_to_one or (low < 0.1 and high > 0.9):
            text = f'{inside}: probabilities, and activation="{activation}" takes logits'
            kind = "softmax" if facts.sums_to_one else "sigmoid"
            yield Finding("probabilities_as_logits", text, _NO_ACTIVATION.format(kind))


_OVERFLOW = (
    "compute the last layer in float32, since x.float() is too late; look for a learning rate that "
    "is too high, or for inf and NaN in the images"
)
_NO_ACTIVATION = (
    "remove the {} at the end of the network; or, for a loss without cross-entropy, "
    'activation="none"'
)


def of_labels(facts: Facts, dtype: str, torch: bool) -> Iterator[Finding]:
    """Findings of class labels."""
    cast = "y.long()" if torch else "y.astype(np.int64)"
    total = facts.samples * facts.voxels
    if facts.fractional:
        text = (
            f"y holds class labels of dtype {dtype}, and {facts.fractional.count} of {total} are no"
            f" integers; {facts.fractional}"
        )
        remedy = (
            f"resample labels with nearest-neighbour interpolation and cast them, y = {cast}; a "
            f"soft target has x's shape"
        )
        if facts.channels == 1:
            remedy += ', with activation="sigmoid" for a single channel'
        yield Finding("fractional_labels", text, remedy)
    elif dtype.startswith(("float", "bfloat")):
        text = f"y holds class labels of dtype {dtype}"
        yield Finding("float_labels", text, f"y = {cast}; any integer dtype will do")
    if facts.wrong:
        values = sorted(facts.wrong_values.items(), key=lambda item: -item[1])
        which = ", ".join(f"{value:g} ({_plural(n, 'voxel')})" for value, n in values[:5])
        text = (
            f"{facts.wrong.count} of {total} labels are outside [0, {facts.end_of_labels}): {which}"
            f"{', ...' if len(values) > 5 else ''}; {facts.wrong}"
        )
        if facts.channels == 1:
            text += "; a single channel is two classes, background and foreground"
        remedy = "for bool y, view it as uint8 to use such bytes"
        yield Finding(
            "labels_out_of_range", text, remedy if dtype == "bool" else _for_labels(facts, cast)
        )
    counts = facts.targets.sum(0)
    valid = counts.sum()
    if valid >= ENOUGH and valid == counts.max() and not facts.wrong:
        text = f"all {valid:.0f} valid labels are {counts.argmax()}"
        remedy = (
            "if other classes should be there, look for labels that were scaled to [0, 1] before "
            "the cast to integers, and for an image and labels of different cases"
        )
        yield Finding("single_label", text, remedy)


def _for_labels(facts: Facts, cast: str) -> str:
    values, classes = set(facts.wrong_values), facts.classes
    counts = facts.targets.sum(0)
    if values == {255} and classes == 2 and not counts[1]:
        return (
            f"for a mask of 0 and 255, y = {cast.replace('y', '(y == 255)', 1)}; if 255 marks "
            f"voxels without a label, ignore_label=255"
        )
    if len(values) == 1 and (255 in values or min(values) < 0):
        return f"ignore_label={int(min(values))}, if it marks voxels without a label"
    if values == {classes} and not counts[0]:
        return f"y = y - 1, if labels start at 1; else the network needs {classes + 1} channels"
    largest = max(value for value in values) if values and not _has_nan(values) else math.inf
    if min(values, default=0) >= 0 and largest < classes + 1000:
        return (
            f"give the network {largest + 1:.0f} output channels, or map the labels to 0 to "
            f"{classes - 1}; one label may be ignored, ignore_label={min(values):.0f}"
        )
    return (
        f"map the labels to 0 to {classes - 1}, for example with np.searchsorted; one label may "
        f"be ignored, with ignore_label"
    )


def of_soft_targets(facts: Facts, activation: str, dtype: str) -> Iterator[Finding]:
    """Findings of soft, multi-label or one-hot targets."""
    values = facts.wrong_values
    whole = not _has_nan(values) and all(value == int(value) for value in values if _finite(value))
    if facts.wrong and facts.repeated and whole:
        text = f"y has x's shape and the same labels in each channel, up to {max(values):g}"
        yield Finding("labels_as_soft_targets", text, "y = y[:, 0]")
    elif facts.wrong:
        text = f"y has x's shape, and {_plural(facts.wrong.count, 'target')} {_are(facts.wrong)} "
        text += f"outside [0, 1]; {facts.wrong}"
        if set(values) == {255}:
            remedy = "y = y == 255 for a mask; ignore_label=255 if it marks voxels without a label"
        elif whole and dtype.startswith(("int", "uint")):
            remedy = (
                "class labels have the shape (N, *) or (N, 1, *); a multi-label target holds 0 or "
                "1, y = y > 0"
            )
        else:
            remedy = "give probabilities, y = y.clip(0, 1), and look for what made them others"
        yield Finding("targets_out_of_range", text, remedy)
    elif facts.not_one and activation == "softmax":
        text = (
            f"the classes of a softmax exclude each other, and the targets of "
            f"{_plural(facts.not_one.count, 'voxel')} do not sum to 1 over the channels; the first "
            f"sum is {facts.not_one.first:g} at {facts.not_one.position}"
        )
        remedy = (
            'activation="sigmoid" for classes that overlap; a channel for the background if it has '
            "none; if y holds class labels, x or y lacks an axis"
        )
        yield Finding("targets_do_not_sum_to_one", text, remedy)


def of_both(facts: Facts, term: Term, ignore_label: int | None) -> Iterator[Finding]:
    """Findings of what is left to compute a loss from."""
    empty = facts.ignored == facts.voxels
    if facts.voxels and empty.any():
        which = "all voxels of " + ("the batch" if empty.all() else _some("sample", empty))
        text = f"{which} are ignored, ignore_label={ignore_label}"
        remedy = (
            "leave such samples out, or sample patches with labels; ignore_label=None ignores no "
            "voxel"
        )
        yield Finding("all_ignored", text, remedy)
    try:
        term.check(facts.classes)
    except ValueError as error:
        remedy = f"{facts.classes} numbers, in the order of the classes, the background included"
        yield Finding("class_weights", str(error), remedy)
    if empty.all() or facts.wrong or facts.fractional:
        return
    for overlap in _parts(term):
        absent = _absent(facts, overlap, empty)
        if not absent.any():
            continue
        never = _some("class", ~facts.targets.any(0) & absent.any(0))
        names = [
            f"class {c} is absent from {_some('sample', absent[:, c])}"
            for c in np.flatnonzero(absent.any(0))[:3]
        ]
        count = int(absent.any(0).sum())
        text = "; ".join(names) + (f"; and {count - 3} classes more" if count > 3 else "")
        if overlap.pools_samples:
            text = f"{never} {'is' if count == 1 else 'are'} absent from the batch"
        text += (
            f". With smooth = 0 the loss of {overlap.name} is 1 for an absent class however little "
            f"is predicted, and has no gradient there"
        )
        remedy = (
            f'smooth=1 or smooth=1e-5; losses.{overlap.name}(absent="skip") leaves such classes out'
        )
        if not overlap.pools_samples and facts.samples > 1:
            remedy += '; reduction="batch" adds up the samples first'
        yield Finding("absent_classes", text, remedy)
        return


def _parts(term: Term) -> Iterator[LinearOverlap]:
    """The ratios whose value for an absent class would be 1."""
    for _, part in term.parts if isinstance(term, losses.Sum) else [(1.0, term)]:
        if (
            isinstance(part, LinearOverlap)
            and part.absent == "count"
            and part.pool in ("none", "batch")
        ):
            smooth = part.smooth if isinstance(part.smooth, (tuple, list)) else (part.smooth,)
            if float(smooth[0]) == 0:
                yield part


def _absent(facts: Facts, overlap: LinearOverlap, empty: Any) -> Any:
    """(N, C): which classes have no labels; for a loss of pooled samples (1, C)."""
    absent = facts.targets == 0
    absent[empty] = False
    if overlap.pools_samples:
        absent = (facts.targets.sum(0) == 0)[None]
    excluded = overlap.ignore_channel
    for channel in excluded if isinstance(excluded, tuple) else (excluded,):
        if 0 <= channel < facts.classes:
            absent[:, channel] = False
    return absent


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _are(hits: Any) -> str:
    return "is" if hits.count == 1 else "are"


def _some(what: str, chosen: Any) -> str:
    """The chosen ones by number: sample 1, samples 0, 3 and 7 more."""
    numbers = np.flatnonzero(chosen)
    plural = {"class": "classes"}.get(what, f"{what}s")
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    listed = ", ".join(map(str, numbers[:5]))
    return f"{what if len(numbers) == 1 else plural} {listed}{more}"


def _voxel(position: tuple[int, ...]) -> tuple[int, ...]:
    """The position without the channel."""
    return (position[0], *position[2:])


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _has_nan(values: Any) -> bool:
    return any(math.isnan(value) for value in values)
