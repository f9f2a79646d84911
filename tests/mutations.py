"""Mutation test: deliberate faults, one at a time, each of which some test must detect.

    pip install cython cmake ninja
    python -m tests.mutations [--only NAME] [--jobs N]

Every fault is patched into a copy of the repository, in build/mutations/, which has its own build
of the kernels. The fault's own tests run first, then the whole suite. A run of all faults writes
tests/mutations.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "mutations"
REPORT = ROOT / "tests" / "mutations.md"
LOWEST_LEVEL = "_cpu"  # its module, which is always imported
# Left out, since a fault is compiled for the selected level only, in half the time.
LEVELS_AGREE = "tests/test_kernels.py::test_levels_agree_in_float64"
FIRST_LIMIT, SUITE_LIMIT = 600, 1800  # seconds of tests; a fault that makes them hang is detected


@dataclass(frozen=True)
class Fault:
    """A text, which occurs once in a file, and what replaces it; and the tests to run first."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


FAULTS = (
    # ---- CPU kernels ----
    Fault(
        "softmax without a maximum for too large spreads",
        "dice_core/_cpu.pyx",
        "LARGEST_SUM 7.9e13",
        "LARGEST_SUM 7.9e37",
        "tests/test_kernels.py -k test_logits_of_any_size",
    ),
    Fault(
        "the softmax beside binary terms without a maximum for very negative logits",
        "dice_core/_cpu.pyx",
        "SMALLEST_UNSHIFTED_SUM 1.1e-7",
        "SMALLEST_UNSHIFTED_SUM 0",
        "tests/test_kernels.py -k test_binary_terms_of_logits_far_from_zero",
    ),
    Fault(
        "ignored voxels have a binary cross-entropy",
        "dice_core/cpu/binary.pxi",
        "negative[k] + andnot(ignored, andnot(own, v))",
        "negative[k] + andnot(own, v)",
        "tests/test_kernels.py -k test_binary_terms_of_logits_far_from_zero",
    ),
    Fault(
        "-log of a probability next to an underflowed one",
        "dice_core/cpu/softmax.pxi",
        "        exact = less(constant(&zero, SMALLEST_EXACT), own)",
        "        exact = zero",
        "tests/test_kernels.py -k test_binary_terms_of_logits_far_from_zero",
    ),
    Fault(
        "ignored voxels count in the sums",
        "dice_core/cpu/softmax.pxi",
        "scale[0] = andnot(less(label, zero), (zero + 1) / total)",
        "scale[0] = (zero + 1) / total",
        "tests/test_kernels.py -k test_cross_entropy",
    ),
    Fault(
        "-log of an underflowed probability",
        "dice_core/cpu/softmax.pxi",
        "if any_greater(zero - own, -SMALLEST_EXACT):",
        "if any_greater(zero - own, 0):",
        "tests/test_kernels.py -k 'test_logits_of_any_size or test_cross_entropy'",
    ),
    Fault(
        "a probability of two classes is never 0",
        "dice_core/cpu/softmax.pxi",
        "e[i] = andnot(less(highest, v), one)",
        "e[i] = one",
        "tests/test_kernels.py -k underflow_to_zero",
    ),
    Fault(
        "the focal modulation of many classes is lost in the gradient",
        "dice_core/cpu/plain.pxi",
        "slope[i] * nll[i] if q.focal else slope[i]",
        "slope[i]",
        "tests/test_kernels.py",
    ),
    Fault(
        "the softmax of many classes drops the last",
        "dice_core/cpu/softmax.pxi",
        "    for c in range(q.classes):\n        following",
        "    for c in range(q.classes - 1):\n        following",
        "tests/test_kernels.py -k test_channels_and_powers",
    ),
    Fault(
        "ignored voxels multiplied by 0 instead of cleared",
        "dice_core/cpu/chunk.pxi",
        "    if ignored:\n        clear_ignored(q, whole, label, words)\n    run_lines(",
        "    run_lines(",
        "tests/test_kernels.py -k test_ignored_voxels_have_no_effect",
    ),
    Fault(
        "the padding of a ragged end is not cleared",
        "dice_core/cpu/chunk.pxi",
        "    ignored = ignored or n < whole\n",
        "",
        "tests/test_kernels.py -k test_nan_stays",
    ),
    Fault(
        "partial sums of chunks added in float32",
        "dice_core/cpu/chunk.pxi",
        "    cdef double total\n",
        "    cdef float total\n",
        "tests/test_kernels.py -k 'test_channels_and_powers or cannot_represent'",
    ),
    Fault(
        "the chunks of the first sample for every sample",
        "dice_core/cpu/chunk.pxi",
        "partial[(n * q.chunks + j) * width",
        "partial[j * width",
        "tests/test_kernels.py -k test_spatial_axes",
    ),
    Fault(
        "the cotangents of the first block of samples for every block",
        "dice_core/cpu/samples.pxi",
        "cotangent + first * q.classes, <float *>t.e",
        "cotangent, <float *>t.e",
        "tests/test_kernels.py -k few_voxels",
    ),
    Fault(
        "NaN of few voxels reaches only the sums of their own classes",
        "dice_core/cpu/samples.pxi",
        "        spread_nan(q, n * q.classes, sums, sums_row)",
        "        pass",
        "tests/test_kernels.py -k few_voxels",
    ),
    Fault(
        "label C is a class",
        "dice_core/cpu/labels.pxi",
        "return highest < q.label_limit and rest == 0",
        "return highest <= q.label_limit and rest == 0",
        "tests/test_messages.py -k test_labels_out_of_range",
    ),
    Fault(
        "the upper half of a 64-bit label is not compared with the number of classes",
        "dice_core/cpu/labels.pxi",
        "(low < limit) & (high == 0)",
        "(low < limit)",
        "tests/test_kernels.py -k label",
    ),
    Fault(
        "the upper half of a 64-bit label is not compared with the ignore label",
        "dice_core/cpu/labels.pxi",
        "has_ignore & (low == ignore_low) & (high == ignore_high)",
        "has_ignore & (low == ignore_low)",
        "tests/test_kernels.py -k label",
    ),
    Fault(
        "an ignore label that the labels' dtype lacks wraps around",
        "dice_core/_cpu.pyx",
        "q.has_ignore = ignore is not None and low <= ignore <= high",
        "q.has_ignore = ignore is not None",
        "tests/test_kernels.py tests/test_messages.py -k label",
    ),
    Fault(
        "negative labels are classes if there are many",
        "dice_core/_cpu.pyx",
        "q.label_limit = min(high + 1, q.classes)",
        "q.label_limit = q.classes",
        "tests/test_kernels.py -k test_a_negative_label",
    ),
    Fault(
        "soft targets of int16 read with the stride of int32",
        "dice_core/cpu/labels.pxi",
        "<const int16_t *>y, stride // 2",
        "<const int16_t *>y, stride // 4",
        "tests/test_kernels.py -k test_dtypes_of_soft_targets",
    ),
    Fault(
        "axes merged whatever the strides of the labels",
        "dice_core/cpu/memory.pxi",
        "            and axes.labels[last] == axes.size[i] * axes.labels[i]\n",
        "",
        "tests/test_kernels.py -k test_layouts",
    ),
    Fault(
        "the gradient is scattered with the strides of the logits",
        "dice_core/cpu/memory.pxi",
        "q.axes.grad[q.axes.count - 1] //",
        "q.axes.logits[q.axes.count - 1] //",
        "tests/test_kernels.py -k test_gradient_goes_into_any_strides",
    ),
    Fault(
        "a transpose drops its ragged last rows",
        "dice_core/cpu/memory.pxi",
        "for i in range(0, rows, 4):",
        "for i in range(0, rows - 3, 4):",
        "tests/test_kernels.py -k test_ragged",
    ),
    Fault(
        "the last of equal logits wins",
        "dice_core/cpu/general.pxi",
        "larger = less(top, v)",
        "larger = andnot(less(v, top), equal(v, v))",
        "tests/test_loss.py tests/test_kernels.py -k 'score or decisions'",
    ),
    Fault(
        "a loss per sample adds up over the samples",
        "dice_core/cpu/ratio.pxi",
        "                c = 0\n                total = 0\n",
        "                c = 0\n",
        "tests/test_kernels.py -k test_a_ratio",
    ),
    Fault(
        "a slightly wrong coefficient of exp",
        "dice_core/cpu/simd.pxi",
        "<float>0.4999914765357971",
        "<float>0.5",
        "tests/test_kernels.py -k test_worst_ulp",
    ),
    Fault(
        "exp never underflows",
        "dice_core/cpu/simd.pxi",
        "<float>-88.02969",
        "<float>-87.0",
        "tests/test_kernels.py -k test_probabilities_underflow_to_zero",
    ),
    Fault(
        "bfloat16 gradients: ties rounded up, not to even",
        "dice_core/cpu/simd.h",
        "(b + 0x7fff + ((b >> 16) & 1)) >> 16",
        "(b + 0x8000) >> 16",
        "tests/test_kernels.py -k test_gradients_are_rounded",
    ),
    Fault(
        "non-temporal stores into channels that are not aligned",
        "dice_core/_cpu.pyx",
        " | <uintptr_t>q.grad_c) % CACHE_LINE",
        ") % CACHE_LINE",
        "tests/test_kernels.py -k test_gradient_into",
    ),
    Fault(
        "the threads share one scratch",
        "dice_core/_cpu.pyx",
        "            at += size\n",
        "",
        "tests/test_kernels.py -k threads",
    ),
    Fault(
        "num_threads is ignored",
        "dice_core/_cpu.pyx",
        "min(worth, threads, q.items)",
        "min(worth, q.items)",
        "tests/test_threads.py -k asked_for",
    ),
    # ---- GPU kernels, in the simulator ----
    Fault(
        "the gradient of the own class from 1 - s",
        "dice_core/cpu/plain.pxi",
        "dot[k] = own[k] * rest[k] - slope",
        "dot[k] = own[k] * (zero + 1 - s) - slope",
        "tests/test_precision.py -k twice",
    ),
    Fault(
        "an infinite factor of targets of 0",
        "dice_core/cpu/general.pxi",
        "a = and_mask(less(zero, t), a * t)",
        "a = a * t",
        "tests/test_precision.py -k neither",
    ),
    Fault(
        "a forked process uses the threads of its parent",
        "dice_core/cpu/parallel.h",
        "single_threaded = single_threaded || has_started || parent_has_threads();",
        "single_threaded = 0;",
        "tests/test_processes.py -k test_process",
    ),
    Fault(
        "signals wait for the end of a call",
        "dice_core/cpu/parallel.h",
        "interrupted = PyErr_CheckSignals() != 0;",
        "interrupted = 0;",
        "tests/test_processes.py -k interrupt",
    ),
    Fault(
        "the denominator of a ratio is taken for positive",
        "dice_core/cpu/ratio.pxi",
        "low = less(quotient, zero + 0.5)",
        "low = less(of_score, den * 0.5)",
        "tests/test_kernels.py -k negative_denominator",
    ),
    Fault(
        "the derivative of a tiny score from 1 minus it",
        "dice_core/cpu/ratio.pxi",
        "low = less(quotient, zero + 0.5)",
        "low = less(quotient, zero)",
        "tests/test_precision.py -k digits",
    ),
    Fault(
        "GPU: the cotangent of the cross-entropy is that of target_sum",
        "dice_core/gpu/blocks.py",
        "if k > int32(1) else k",
        "if k > int32(2) else k",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: lanes that share a voxel add each other's sums",
        "dice_core/gpu/blocks.py",
        "(WARP // LANES).bit_length() - 1",
        "WARP.bit_length() - 1",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: an odd number of sums loses the last",
        "dice_core/gpu/blocks.py",
        "range((SUMS + (2 << k) - 1) >> (k + 1))",
        "range(SUMS >> (k + 1))",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: no barrier before the tables are added",
        "dice_core/gpu/blocks.py",
        "table[at] + number\n        cuda.syncthreads()\n",
        "table[at] + number\n",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: labels out of range make no sum NaN",
        "dice_core/gpu/blocks.py",
        "real(NAN) if any_out_of_range else own[i]",
        "own[i]",
        "tests/test_gpu_kernels.py -k test_labels_out_of_range",
    ),
    Fault(
        "GPU: the totals have only the first runs",
        "dice_core/gpu/totals.py",
        "r = int32(r + int32(LOADS * WARPS))",
        "r = int32(runs)",
        "tests/test_gpu_kernels.py -k test_many_runs",
    ),
    Fault(
        "GPU: every sample has the incoming gradient of the first",
        "dice_core/gpu/blocks.py",
        "load_real(scale, sample * scale_n)",
        "load_real(scale, int64(0))",
        "tests/test_gpu_kernels.py -k test_a_scale",
    ),
    Fault(
        "GPU: no derivative is stored for the fourth sum",
        "dice_core/gpu/totals.py",
        "k = int64(3)\n",
        "k = int64(4)\n",
        "tests/test_gpu_kernels.py -k test_a_loss_has_no_derivative",
    ),
    Fault(
        "GPU: the label of an ignored voxel counts",
        "dice_core/gpu/plain.py",
        "valid = inside & in_range & (label != ignored)",
        "valid = inside & in_range",
        "tests/test_gpu_kernels.py -k 'ignored or test_against_the_reference'",
    ),
    Fault(
        "GPU: words wider than the alignment of the rows",
        "dice_core/_gpu.py",
        "while size % count or any(",
        "while size % count and any(",
        "tests/test_gpu_kernels.py -k 'are_loaded or test_against_the_reference'",
    ),
    Fault(
        "GPU: a thread takes its words from one place",
        "dice_core/gpu/kernels.py",
        "x_at + int64(w * SPACING) * x_v",
        "x_at + int64(w) * x_v",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: voxels beyond a block's run are loaded and counted",
        "dice_core/gpu/kernels.py",
        "left = int32(remaining - place)",
        "left = int32(remaining)",
        "tests/test_gpu_kernels.py -k test_against_the_reference",
    ),
    Fault(
        "GPU: the cache does not know for which processor a kernel was compiled",
        "dice_core/gpu/cache.py",
        "repr((kind, plan, capability, _origin()))",
        "repr((kind, plan, _origin()))",
        "tests/test_gpu_launch.py -k test_another",
    ),
    Fault(
        "GPU: the kernels do not wait for the incoming gradient",
        "dice_core/_gpu.py",
        "(grad, cotangent, scale))",
        "(grad, cotangent))",
        "tests/test_gpu.py tests/test_gpu_launch.py -k 'stream or wait or order'",
    ),
    Fault(
        "GPU: scratch memory is reused while the kernels run",
        "dice_core/_gpu.py",
        "    if not allocators.is_ordered(logits):\n",
        "    if False:\n",
        "tests/test_gpu.py -k order",
    ),
    # ---- losses ----
    Fault(
        "the gradient of an absent class is kept",
        "dice_core/losses/overlap.py",
        "share = xp.where(absent, 0.0, share)",
        "share = share * 1.0",
        "tests/test_losses.py",
    ),
    Fault(
        "divisor 'kept' counts the excluded classes",
        "dice_core/losses/overlap.py",
        'kept = classes - len(out) if divisor == "kept" else classes',
        "kept = classes",
        "tests/test_kernels.py -k test_a_ratio",
    ),
    Fault(
        "divisor 'weights' includes the weights of excluded classes",
        "dice_core/losses/overlap.py",
        "included = weight if kept is None else weight * kept",
        "included = weight",
        "tests/test_losses.py",
    ),
    Fault(
        "an excluded class lends its weight to the others",
        "dice_core/losses/overlap.py",
        "xp.amax(weight if kept is None else weight * kept, -1)",
        "xp.amax(weight, -1)",
        "tests/test_losses.py",
    ),
    Fault(
        "the mean over samples is their sum in the ratio of the kernels",
        "dice_core/losses/overlap.py",
        "share = share / max(rows, 1)",
        "share = share * 1",
        "tests/test_kernels.py -k test_a_ratio",
    ),
    Fault(
        "smooth in the numerator only, in the ratio of the kernels",
        "dice_core/losses/overlap.py",
        "share, start, excess, below, num, den",
        "share, start, excess, 0.0, num, den",
        "tests/test_kernels.py -k test_a_ratio",
    ),
    Fault(
        "a channel that is ignored twice is subtracted twice",
        "dice_core/losses/cross_entropy.py",
        "max(like.shape[1] - len(set(out)), 1)",
        "max(like.shape[1] - len(out), 1)",
        "tests/test_losses.py",
    ),
    Fault(
        "a weighted cross-entropy is not divided by its weights",
        "dice_core/losses/cross_entropy.py",
        "(target_sum if self.weight is None else target_sum * self.weight).sum(-1)",
        "target_sum.sum(-1)",
        "tests/test_losses.py",
    ),
    Fault(
        "label smoothing keeps the whole of the hard label",
        "dice_core/losses/cross_entropy.py",
        "(1 - smoothing) * weight",
        "weight",
        "tests/test_losses.py",
    ),
    Fault(
        "the factor of a term multiplies its value, not its derivative",
        "dice_core/losses/terms.py",
        "value, derivative = factor * value, factor * derivative",
        "value = factor * value",
        "tests/test_losses.py",
    ),
    Fault(
        "every term of a sum has the weights of the first",
        "dice_core/losses/terms.py",
        "            weights = weights[count:]\n",
        "",
        "tests/test_losses.py tests/test_torch.py",
    ),
    # ---- checks, specs, buffers, allocators ----
    Fault(
        "infinite settings are accepted",
        "dice_core/checks.py",
        "if not (math.isfinite(result) and result >= 0):",
        "if result < 0:",
        "tests/test_messages.py",
    ),
    Fault(
        "out may overlap y",
        "dice_core/checks.py",
        "if buffers.may_overlap(target, y):",
        "if False:",
        "tests/test_messages.py -k overlap",
    ),
    Fault(
        "two GPUs are one device",
        "dice_core/checks.py",
        '    if x != y:\n        raise ValueError(f"x is on',
        '    if x[:4] != y[:4]:\n        raise ValueError(f"x is on',
        "tests/test_messages.py -k devices",
    ),
    Fault(
        "arrays that touch overlap, on a device",
        "dice_core/buffers.py",
        "a.address + a_end <= b.address + b_first or b.address + b_end <=",
        "a.address + a_end < b.address + b_first or b.address + b_end <",
        "tests/test_buffers.py -k overlap",
    ),
    Fault(
        "an axis of one element makes an array overlap itself",
        "dice_core/buffers.py",
        "zip(a.strides, a.shape, strict=True) if n > 1)\n    spans",
        "zip(a.strides, a.shape, strict=True))\n    spans",
        "tests/test_buffers.py -k overlap",
    ),
    Fault(
        "strided arrays are copied silently",
        "dice_core/buffers.py",
        "    flags = array.flags\n",
        "    array = np.ascontiguousarray(array)\n    flags = array.flags\n",
        "tests/test_buffers.py",
    ),
    Fault(
        "the gradient is C-contiguous whatever the logits' memory format",
        "dice_core/allocators.py",
        "np.empty_like(like.owner, subok=False)",
        "np.empty(like.shape, like.owner.dtype)",
        "tests/test_loss.py -k strides",
    ),
    Fault(
        "labels of a single channel are soft targets",
        "dice_core/spec.py",
        "soft = y == x and (x[1] > 1 or one_class)",
        "soft = y == x",
        "tests/test_torch.py -k test_label_dtypes",
    ),
    Fault(
        "class weights may be infinite",
        "dice_core/checks.py",
        "if not np.isfinite(array).all():",
        "if np.isnan(array).any():",
        "tests/test_losses.py -k test_messages",
    ),
    Fault(
        "the gradient of a memory-mapped file is mapped too",
        "dice_core/allocators.py",
        "np.empty_like(like.owner, subok=False)",
        "np.empty_like(like.owner)",
        "tests/test_buffers.py -k memmap",
    ),
    # ---- calls, threads, backends, sums ----
    Fault(
        "the incoming gradient of the samples multiplies the classes",
        "dice_core/calls.py",
        "grad_loss if grad_loss.ndim == 2 else grad_loss[..., None]",
        "grad_loss",
        "tests/test_loss.py -k test_incoming_gradient",
    ),
    Fault(
        "DICE_CORE_CHECK=0 requests the check",
        "dice_core/calls.py",
        'not in ("", "0")',
        'not in ("",)',
        "tests/test_gpu.py",
    ),
    Fault(
        "a cotangent of any strides is read as if contiguous",
        "dice_core/calls.py",
        "buffers.of(np.ascontiguousarray(derivative), ",
        "buffers.of(derivative, ",
        "tests/test_loss.py -k test_a_derivative",
    ),
    Fault(
        "the quotas of the groups above are overlooked",
        "dice_core/threads.py",
        "return [group, *group.parents]",
        "return [group]",
        "tests/test_threads.py -k quota",
    ),
    Fault(
        "a backend that lacks a module says that it is not installed itself",
        "dice_core/backends.py",
        "if error.name != row.module:",
        "if error.name == row.module:",
        "tests/test_backends.py -k load",
    ),
    Fault(
        "a quota of one and a half cores is one",
        "dice_core/threads.py",
        "math.ceil(quota)",
        "int(quota)",
        "tests/test_threads.py",
    ),
    Fault(
        "plug-ins are tried before the built-in backends",
        "dice_core/backends.py",
        "    yield from BUILT_IN\n    yield from _entry_points()\n",
        "    yield from _entry_points()\n    yield from BUILT_IN\n",
        "tests/test_backends.py",
    ),
    Fault(
        "statistics of different sums add up",
        "dice_core/sums.py",
        '            ("sums", self.spec, other.spec),\n',
        "",
        "tests/test_messages.py -k added",
    ),
    Fault(
        "the number of valid voxels of soft targets is that of class 0",
        "dice_core/sums.py",
        "self.array[-1].mean(-1) if",
        "self.array[-1][:, 0] if",
        "tests/test_losses.py -k valid_voxels",
    ),
    # ---- torch and compat ----
    Fault(
        "the incoming gradient multiplies the rounded gradient",
        "dice_core/torch/functional.py",
        'call.gradient(derivative, scale, buffers.of(grad, "grad"))',
        'call.gradient(derivative, None, buffers.of(grad, "grad"))\n'
        "        grad *= grad_output.view(-1, *[1] * (x.ndim - 1))",
        "tests/test_torch.py -k upstream",
    ),
    Fault(
        "a graph keeps the arrays that hooks have moved",
        "dice_core/torch/functional.py",
        "        call.logits.owner = call.labels.owner = None  # only",
        "        # only",
        "tests/test_torch.py -k keep",
    ),
    Fault(
        "torch losses run on one thread by default",
        "dice_core/torch/functional.py",
        "count = num_threads or torch.get_num_threads()",
        "count = num_threads or 1",
        "tests/test_threads.py -k torch",
    ),
    Fault(
        "the strides of unpacked tensors are those before",
        "dice_core/torch/functional.py",
        "            and (x.stride(), y.stride()) == ctx.strides\n",
        "",
        "tests/test_torch.py -k hook",
    ),
    Fault(
        "the loss of half-precision logits is in half precision",
        "dice_core/torch/functional.py",
        'value if sums.dtype == "float64" else value.float()',
        "value.to(getattr(torch, sums.dtype))",
        "tests/test_torch.py -k half",
    ),
    Fault(
        "logits are overwritten without a new version",
        "dice_core/torch/functional.py",
        "    allocators.mark_changed(x)\n",
        "",
        "tests/test_inplace.py",
    ),
    Fault(
        "recomputed logits are overwritten",
        "dice_core/torch/functional.py",
        " and ctx.storage == StorageWeakRef(x.untyped_storage())",
        "",
        "tests/test_inplace.py",
    ),
    Fault(
        "a leaf is overwritten",
        "dice_core/torch/functional.py",
        "if base.is_leaf:",
        "if base.is_leaf and base is not x:",
        "tests/test_inplace.py",
    ),
    Fault(
        "an axis of vmap comes after the samples",
        "dice_core/torch/transforms.py",
        "return array.movedim(batch, samples)",
        "return array.movedim(batch, samples + 1)",
        "tests/test_transforms.py",
    ),
    Fault(
        "the gradient of a sum over ranks is that of one rank's loss",
        "dice_core/torch/processes.py",
        "return ctx.size * grad",
        "return grad",
        "tests/test_distributed.py",
    ),
    Fault(
        "sums of shards in space are those of samples",
        "dice_core/torch/dtensors.py",
        "Shard(1) if placement.is_shard(0) else Partial()",
        "Shard(1)",
        "tests/test_distributed.py",
    ),
    Fault(
        "the gradient of a tensor is C-contiguous",
        "dice_core/allocators.py",
        "torch.empty_like(array, requires_grad=False)",
        "torch.empty_like(array, requires_grad=False, memory_format=torch.contiguous_format)",
        "tests/test_torch.py -k memory_format",
    ),
    Fault(
        "the mean of a metric counts samples without a score",
        "dice_core/torch/metrics.py",
        "(den > 0).to(den)",
        "torch.ones_like(den)",
        "tests/test_loss.py -k score",
    ),
    Fault(
        "outputs of weight 0 are computed",
        "dice_core/torch/modules.py",
        "strict=True) if w]",
        "strict=True)]",
        "tests/test_torch.py -k deep",
    ),
    Fault(
        "fractions in a mask are taken for 1",
        "dice_core/compat/_shared.py",
        "torch.where(valid == 1, y, torch.where(valid == 0, ignored, refused))",
        "torch.where(valid == 0, ignored, y)",
        "tests/test_compat_monai.py tests/test_compat_nnunet.py -k mask",
    ),
    Fault(
        "nnU-Net: ranks are pooled without batch_dice",
        "dice_core/compat/nnunet.py",
        "        pooled = self.ddp and self.batch_dice\n",
        "        pooled = self.ddp\n",
        "tests/test_compat_nnunet.py",
    ),
    Fault(
        "MONAI: squared_pred does not square soft targets",
        "dice_core/compat/monai.py",
        "square = self.squared_pred and not call.labels and call.y.is_floating_point()",
        "square = False",
        "tests/test_compat_monai.py",
    ),
    Fault(
        "SMP: a class that is listed twice counts once",
        "dice_core/compat/smp.py",
        "picked.new_zeros(channels).index_add(0, index, picked)",
        "picked.new_zeros(channels).index_copy(0, index, picked)",
        "tests/test_compat_smp.py",
    ),
    # ---- benchmark ----
    Fault(
        "benchmark: the first of the rounds for their median",
        "dice_core/bench/measure.py",
        "median(times[what] for times in of_rounds)",
        "next(times[what] for times in of_rounds)",
        "tests/test_bench.py -k median",
    ),
    Fault(
        "benchmark: a wrong loss is not noted",
        "dice_core/bench/measure.py",
        "if abs(value - expected) <= tolerance:",
        "if not abs(value - expected) > 1e9 * tolerance:",
        "tests/test_bench.py",
    ),
    Fault(
        "benchmark: a ratio upside down",
        "dice_core/bench/results.py",
        "above / below",
        "below / above",
        "tests/test_bench.py",
    ),
)


# ---- a copy with its own build -------------------------------------------------------------------


class Copy:
    """A copy of the working tree with its own build and interpreter."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.build_folder = folder / "build"
        self.python = folder / ".venv" / "bin" / "python"
        self._synchronize()
        self._make_environment()
        if not (self.build_folder / "build.ninja").exists():
            self._configure()

    def _synchronize(self) -> None:
        """Copies the files that differ, and deletes those that are no longer there."""
        listed = _output("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
        names = {name for name in listed if (ROOT / name).is_file()}
        for name in names:
            to = self.root / name
            content = (ROOT / name).read_bytes()
            if name == "CMakeLists.txt":  # half the time to compile, and fused multiply-adds
                content = content.replace(b" -O3 ", b" -O1 -fexpensive-optimizations ")
            if not to.exists() or to.read_bytes() != content:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(content)
        for folder in ("dice_core", "tests"):
            for path in (self.root / folder).rglob("*.p*"):
                if path.suffix != ".pyc" and str(path.relative_to(self.root)) not in names:
                    path.unlink()

    def _make_environment(self) -> None:
        """An environment that finds the copy first, then this process's packages, with their import
        hooks but that of an editable installation of this one.
        """
        if not self.python.exists():
            _output(sys.executable, "-m", "venv", "--without-pip", self.root / ".venv")
        script = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(_output(self.python, "-c", script).strip())
        paths = [path for path in map(Path, filter(None, sys.path)) if path.is_dir()]
        paths = [self.root, *(path for path in paths if path != ROOT)]
        files = (file for path in paths for file in path.glob("*.pth"))
        others = (file.read_text() for file in files if "dice_core" not in file.name)
        hooks = [
            line for text in others for line in text.splitlines() if line.startswith("import ")
        ]
        (packages / "mutations.pth").write_text("\n".join(map(str, [*paths, *hooks])))
        libraries = [path / "nvidia" for path in paths if (path / "nvidia").is_dir()]
        if libraries and not (packages / "nvidia").exists():  # cuda.pathfinder searches only here
            (packages / "nvidia").symlink_to(libraries[0])

    def _configure(self) -> None:
        _output(
            *("cmake", "-G", "Ninja", "-S", self.root, "-B", self.build_folder),
            f"-DPython_EXECUTABLE={self.python}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.root / 'dice_core'}",
        )

    def build(self, *levels: str) -> bool:
        """Builds these levels; False if that failed."""
        command = ["cmake", "--build", str(self.build_folder), "--target", *levels]
        return subprocess.run(command, capture_output=True).returncode == 0

    @contextlib.contextmanager
    def patched(self, fault: Fault) -> Iterator[None]:
        """The copy with this fault."""
        path = self.root / fault.file
        text = path.read_text()
        path.write_text(apply(fault, text))
        try:
            yield
        finally:
            path.write_text(text)

    def failure(self, tests: str, limit: float) -> str:
        """The first test that fails, or another reason; empty if all pass."""
        command = [self.python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["--ignore=tests/test_mutations.py", f"--deselect={LEVELS_AGREE}"]
        command += shlex.split(tests)
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
            return f"more than {limit:.0f} s"
        if process.returncode == 0:
            return ""
        if process.returncode < 0:
            return f"the process died of signal {-process.returncode}"
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if process.returncode > 2 or not failed:
            raise RuntimeError(f"pytest {tests}: {output[-4000:]}")
        return failed[1].removeprefix("tests/")


def apply(fault: Fault, text: str) -> str:
    """The text of its file with the fault. Raises ValueError unless the old text occurs once."""
    count = text.count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {count} times in {fault.file}")
    return text.replace(fault.old, fault.new)


def _selected_level() -> str:
    """The module of the kernels that this machine selects."""
    from dice_core import backends

    rows = (row for row in backends.BUILT_IN if row.device == "cpu" and not row.unavailable())
    return next(rows).module.removeprefix("dice_core.")


def _output(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of a fault."""

    fault: Fault
    killed_by: str  # the test, or another reason; empty if the fault survived
    seconds: float


def run(copy: Copy, fault: Fault) -> Result:
    """Tries the fault's own tests, then the whole suite."""
    start = time.perf_counter()
    with copy.patched(fault):
        if not copy.build(_selected_level()):
            raise RuntimeError(f"{fault.name}: does not compile")
        found = copy.failure(f"-n 0 {fault.tests}", FIRST_LIMIT) or copy.failure("", SUITE_LIMIT)
    result = Result(fault, found, time.perf_counter() - start)
    print(f"{result.seconds:5.0f} s  {fault.name}: {found or 'SURVIVED'}", flush=True)
    return result


def report(results: list[Result]) -> str:
    """A Markdown table."""
    from dice_core.bench import machine, measure

    killed = sum(bool(result.killed_by) for result in results)
    lines = [
        f"# {killed} of {len(results)} deliberate faults are detected",
        "",
        f"`python -m tests.mutations` on {datetime.date.today()}: "
        f"{machine.facts(measure.Settings())['processor']}, Python {platform.python_version()}, "
        f"kernels of `{_selected_level()}`. The time is that of compiling and of all tests up to "
        f"the one that fails.",
        "",
        "| fault | file | detected by | seconds |",
        "| --- | --- | --- | ---: |",
    ]
    for result in results:
        fault, killed_by = result.fault, result.killed_by.replace("|", "\\|")
        found = f"`{killed_by}`" if "::" in killed_by else killed_by or "**nothing**"
        lines.append(f"| {fault.name} | `{fault.file}` | {found} | {result.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", action="append", help="part of a fault's name, several times")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are tested at a time")
    given = parser.parse_args()
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        sys.exit("needs the build tools: pip install cython cmake ninja")
    faults = [f for f in FAULTS if not given.only or any(part in f.name for part in given.only)]
    copies: queue.Queue[Copy] = queue.Queue()
    for k in range(given.jobs):
        copies.put(copy := Copy(WORK / str(k)))
        if not copy.build(LOWEST_LEVEL, _selected_level()):
            sys.exit(f"the kernels do not compile in {copy.build_folder}")
    wrong = copy.failure("" if not given.only else f"-n 0 {faults[0].tests}", SUITE_LIMIT)
    if wrong:
        sys.exit(f"without any fault there is a failure: {wrong}")

    def task(fault: Fault) -> Result:
        copy = copies.get()
        try:
            return run(copy, fault)
        finally:
            copies.put(copy)

    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        results = list(pool.map(task, faults))
    if not given.only:
        REPORT.write_text(report(results))
    return sum(not result.killed_by for result in results)


if __name__ == "__main__":
    sys.exit(main())
