"""`diagnose`: the classic mistakes in logits, targets and options, and their remedies."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import allocators, buffers, checks, losses
from ..buffers import Buffer
from ..losses import Term
from . import shapes, values
from .facts import Facts, numpy_of
from .findings import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]


def diagnose(
    x: Any,
    y: Any,
    term: Term | None = None,
    *,
    weight: Any = None,
    ignore_channel: Any = -1,
    ignore_label: int | None = -1,
    smooth: float | tuple[float, float] = 0.0,
    p: int = 1,
    reduction: str = "mean",
    activation: str = "softmax",
) -> Diagnosis:
    """The classic mistakes in the arguments of `loss`, found by looking at the arrays, and their
    remedies. Nothing is found for logits and targets as they should be.

    It takes what `loss` takes, and also what `loss` refuses: any shapes, integers as logits, labels
    of any value, tensors that require grad. Where one view of the arrays makes their shapes fit,
    that view is looked at further, and positions are those in it. Arrays on a device are copied to
    the host; memory for a block of the arrays is all that is needed beside them, and for a sample
    if its voxels are not contiguous.

    >>> import numpy as np, dice_core
    >>> x = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
    >>> y = np.arange(128).reshape(2, 8, 8) % 3
    >>> dice_core.diagnose(x, y).names
    ()
    >>> y[0, 0, 0] = 255
    >>> dice_core.diagnose(x, y).names
    ('labels_out_of_range',)

    Parameters
    ----------
    x, y, term, weight, ignore_channel, ignore_label, smooth, p, reduction, activation
        As in `loss`.

    Returns
    -------
    Diagnosis, a tuple of findings, each with `name`, `found` and `remedy`; it prints as text. The
    names are:

    - Axes: ``missing_batch_axis``, ``missing_channel_axis``, ``channels_last``, ``label_axes``
      (axes of length 1), ``shapes_differ`` (none of these).
    - Arrays: ``swapped_arguments`` (labels as x, logits as y), ``integer_logits``,
      ``different_devices``, ``target_requires_grad``.
    - Logits: ``double_softmax`` (they sum to 1 over the channels), ``probabilities_as_logits``,
      ``logits_as_probabilities`` (activation "none"), ``constant_logits``, ``nan_logits``,
      ``infinite_logits``, ``near_overflow`` (float16).
    - Labels: ``labels_out_of_range`` (255, -100, labels from 1, two classes in a single channel),
      ``float_labels``, ``fractional_labels``, ``single_label``.
    - Soft, multi-label and one-hot targets: ``targets_out_of_range``, ``labels_as_soft_targets``,
      ``targets_do_not_sum_to_one`` (with softmax).
    - What is left: ``no_voxels``, ``all_ignored``, ``absent_classes`` (with smooth = 0),
      ``class_weights``.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong kind, which no look at the numbers would explain: x or y that is no
        array or holds no numbers, an unknown activation, a negative smooth.
    """
    term = losses.of(term, weight, ignore_channel, smooth, p, reduction).like(np.empty(0))
    request = term.spec(activation, ignore_label)
    logits, targets = _buffer(x, "x"), _buffer(y, "y")
    torch = hasattr(x, "movedim")
    found: list[Finding] = []
    if logits.device != targets.device:
        text = f"x is on {logits.device} and y on {targets.device}"
        found.append(Finding("different_devices", text, "y = y.to(x.device)"))
    if getattr(y, "requires_grad", False) is True:
        text = "y requires grad, and no loss has a gradient with respect to its target"
        found.append(Finding("target_requires_grad", text, "y = y.detach()"))
    two_classes = request.classes(1) == 2
    if logits.dtype in checks.INTEGERS:
        text = f"x holds {logits.dtype}, not logits"
        if targets.dtype in checks.FLOATS and shapes.fit(targets.shape, logits.shape, two_classes):
            found.append(
                Finding("swapped_arguments", f"{text}, and y {targets.dtype}", "x, y = y, x")
            )
            logits, targets = targets, logits
        else:
            remedy = "pass what the network gives before argmax or a threshold, or x.float()"
            found.append(Finding("integer_logits", text, remedy))
    arrays = [numpy_of(allocators.to_host(each), each.dtype) for each in (logits, targets)]
    fitted = shapes.fitted(arrays[0], arrays[1], two_classes, torch)
    looked_at = f"x {logits.dtype} {logits.shape}{{}}; y {targets.dtype} {targets.shape}{{}}"
    looked_at += f"; {request.activation}, ignore_label={request.ignore_label}"
    if isinstance(fitted, Finding):
        return Diagnosis([*found, fitted], looked_at.format("", ""))
    a, b, mistake = fitted
    if mistake is None and a.shape == b.shape and _is_channels_last(b):
        code = "x.movedim(-1, 1), y.movedim(-1, 1)"
        code = code if torch else "np.moveaxis(x, -1, 1), np.moveaxis(y, -1, 1)"
        text = f"y has shape {b.shape}, and sums to 1 over its last axis, not over axis 1"
        mistake = Finding(shapes.CHANNELS_LAST, text, f"x, y = {code}")
        a, b = np.moveaxis(a, -1, 1), np.moveaxis(b, -1, 1)
    found += [mistake] if mistake else []
    soft = a.shape == b.shape and (a.shape[1] > 1 or not two_classes)
    b = b.reshape(a.shape if soft else (a.shape[0], *a.shape[2:])) if b.ndim == a.ndim else b
    classes, softmax = request.classes(a.shape[1]), activation == "softmax"
    facts = Facts(a, b, classes, soft, softmax, request.ignore_label)
    found += values.of_logits(facts, activation, logits.dtype)
    if soft:
        found += values.of_soft_targets(facts, activation, targets.dtype)
    else:
        found += values.of_labels(facts, targets.dtype, torch)
    found += values.of_both(facts, term, request.ignore_label)
    return Diagnosis(found, looked_at.format(*_ranges(facts)))


def _buffer(array: Any, name: str) -> Buffer:
    """The Buffer of an array of numbers in memory. Raises TypeError for anything else."""
    buffer = buffers.of(array, name)
    if buffer.dtype not in (*checks.FLOATS, *checks.INTEGERS):
        raise TypeError(
            f"{name} must hold numbers ({', '.join((*checks.FLOATS, *checks.INTEGERS))}), got "
            f"{buffer.dtype}"
        )
    if buffer.device == "meta":
        raise TypeError(f"{name} is on the meta device and holds no numbers to look at")
    return buffer


def _is_channels_last(y: Any) -> bool:
    """Whether a target is one-hot over its last axis, which is the shorter one, not over axis 1."""
    if y.ndim < 3 or not 1 < y.shape[-1] < y.shape[1] or y.size < values.ENOUGH or y.dtype.names:
        return False
    return all(
        bool(((sample == 0) | (sample == 1)).all()) and bool((sample.sum(-1) == 1).all())
        for sample in y
    ) and not all(bool((sample.sum(0) == 1).all()) for sample in y)


def _ranges(facts: Facts) -> tuple[str, str]:
    """The values of x and y in words."""
    low, high = facts.low.min(initial=np.inf), facts.high.max(initial=-np.inf)
    of_x = f", values {low:.3g} to {high:.3g}" if low <= high else ""
    counts = facts.targets.sum(0)
    if facts.soft:
        return of_x, f", targets of {np.count_nonzero(counts)} of {facts.classes} classes"
    return of_x, f", labels of {np.count_nonzero(counts)} of {facts.classes} classes"
