"""The PTX of some CUDA kernels against the reference, and faults in it, which have to be found.

`test_gpu_ptx_all` has the kernels of all cases.
"""

import functools
import re

import gpu_simulator
import numpy as np
import pytest
from compare import assert_bitwise_equal, assert_close
from ptx import Fault

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
import gpu_ptx
import test_gpu_kernels as cases
from test_gpu_kernels import GENERAL, PLAIN, RATIOS, RTOL

from dice_core import _gpu


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_ptx.install(monkeypatch)
    cases.short_runs(monkeypatch)


# Plain and general sums, every dtype of logits, one lane and several.
FAMILIES = {
    **{name: PLAIN[name] for name in ("four_ignored", "two_lanes_focal", "two_focal")},
    **{name: GENERAL[name] for name in ("binary_softmax", "soft_half", "argmax")},
}


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_against_the_reference(case):
    cases.test_against_the_reference(*case)
    assert gpu_ptx.Kernel.executed.total() > 10_000


@pytest.mark.parametrize("name", ["four_ignored", "two_lanes_focal", "binary_softmax"])
def test_approximations_may_be_off(monkeypatch, name):
    """As far as their documentation allows; the tolerances of the exact ones hold."""
    monkeypatch.setattr(gpu_ptx.Kernel, "noise", 1)
    cases.test_against_the_reference(*FAMILIES[name])


@pytest.mark.parametrize("name", ["mean", "per_sample", "pooled"])
def test_the_loss(name):
    cases.test_the_loss_follows_in_the_second_launch(RATIOS[name], 3)


def test_bitwise_reproducible_in_any_order_of_blocks(monkeypatch):
    gpu_ptx.install(monkeypatch, warps=8)  # as on a GPU
    x, y, cotangent = cases.example("float16", "uint8", 4, 2600)
    sums, grad = cases.run(x, y, cotangent)
    assert_close(sums, cases.expected(x, y, cotangent)[0], rtol=1e-6, atol=1e-6)
    other_sums, other_grad = cases.run(x, y, cotangent)  # each launch has another seed
    assert_bitwise_equal(other_sums, sums)
    assert_bitwise_equal(other_grad, grad)


def test_gradients_in_place():
    x, y, cotangent = cases.example("float16", "uint8", 4, 600)
    at = cases.call(x, y)
    on_device = cases.on_gpu(cotangent[:3])
    _gpu.gradient(at.logits, at.labels, on_device, at.logits, at.spec, 1)
    assert_bitwise_equal(at.logits.owner.host, cases.run(x, y, cotangent)[1])


# dtype, voxels: the conversion of float32 numbers, and one that drops their last bits
TRUNCATED = {
    ("float16", 600): (
        r"cvt\.rn\.f16\.f32\s+(%h\d+), (%f\d+);",
        "{ .reg .b32 %bits; .reg .f32 %cut; mov.b32 %bits, \\2; and.b32 %bits, %bits, -8192;"
        " mov.b32 %cut, %bits; cvt.rn.f16.f32 \\1, %cut; }",
    ),
    ("bfloat16", 600): (
        r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%f\d+), (%f\d+);",
        "{ .reg .b32 %high; .reg .b32 %low; .reg .f32 %cut; .reg .f32 %other;"
        " mov.b32 %high, \\2; and.b32 %high, %high, -65536; mov.b32 %cut, %high;"
        " mov.b32 %low, \\3; and.b32 %low, %low, -65536; mov.b32 %other, %low;"
        " cvt.rn.bf16x2.f32 \\1, %cut, %other; }",
    ),
    ("bfloat16", 301): (
        r"cvt\.rn\.bf16\.f32\s+(%rs\d+), (%f\d+);",
        "{ .reg .b32 %bits; .reg .f32 %cut; mov.b32 %bits, \\2; and.b32 %bits, %bits, -65536;"
        " mov.b32 %cut, %bits; cvt.rn.bf16.f32 \\1, %cut; }",
    ),
}


@pytest.mark.parametrize(("dtype", "voxels"), TRUNCATED)
def test_gradients_are_rounded_to_nearest(monkeypatch, dtype, voxels):
    """Their error is at most half a unit in the last place, and that of the float32 number; that of
    truncated ones is not.
    """
    x, y, cotangent = cases.example(dtype, "uint8", 4, voxels)
    true_grad = cases.expected(x, y, cotangent)[1]
    assert_nearest(cases.run(x, y, cotangent)[1], true_grad)

    def change(kernel, source):
        truncated = (*TRUNCATED[dtype, voxels], None)
        return changed(source, *truncated) if kernel.kind == "gradient" else source

    monkeypatch.setattr(gpu_ptx.Kernel, "changed", change)
    monkeypatch.setattr(_gpu, "_job", functools.lru_cache(_gpu._Job))  # which keeps kernels
    with pytest.raises(AssertionError, match=r" differ \("):
        assert_nearest(cases.run(x, y, cotangent)[1], true_grad)


def assert_nearest(grad, true_grad):
    scale = np.abs(true_grad).max()
    unit, smallest = HALF_A_UNIT[str(grad.dtype)]
    assert_close(grad, true_grad, rtol=unit, atol=smallest + 2e-6 * scale)


# Of a number: relative, and for subnormal numbers absolute
HALF_A_UNIT = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}


# ---- faults --------------------------------------------------------------------------------------


def check_sums():
    """Statistics and gradient of four classes, of which the last block has few voxels."""
    x, y, cotangent = cases.example("float16", "uint8", 4, 600)
    y[y == 2] = 200
    options = {"ignore_label": 200}
    sums, grad = cases.run(x, y, cotangent, **options)
    true_sums, true_grad = cases.expected(x, y, cotangent, **options)
    assert_close(sums, true_sums, rtol=RTOL["float16"], atol=RTOL["float16"])
    assert_nearest(grad, true_grad)


def check_loss():
    cases.test_the_loss_follows_in_the_second_launch(RATIOS["mean"], 3)


def dropped(pattern, at=0):
    return pattern, "", at


R = r"%\w+"
# kind: {fault: (pattern, replacement, which of its occurrences; all if None)}
MUTANTS = {
    "statistics": {
        "barrier after the sums of warps dropped": dropped(r"bar\.sync\s+0;"),
        "loads of all threads": (rf"@{R} ld\.global", "ld.global", None),
        "loads of other threads": (rf"@({R}) ld\.global", r"@!\1 ld.global", None),
        "voxels of the next run": (rf"min\.s64(\s+{R}, {R}), ({R});", r"max.s64\1, \2;", 0),
        "store of the sums of a warp dropped": dropped(rf"st\.shared\.\w+\s+\[{R}(\+\d+)?\], {R};"),
        "label load narrowed": (r"ld\.global\.v2\.b32", "ld.global.v2.b16", 0),
        "logit load narrowed": (r"ld\.global\.v4\.b32", "ld.global.v4.b16", 0),
        "label compared with another class": (r"(setp\.eq\.s16\s.*), 1;", r"\1, 2;", 0),
        "range of labels smaller": (r"(setp\.lt\.u16\s.*), 4;", r"\1, 3;", 0),
        "last round left out": (rf"(setp\.gt\.s32\s+{R}, {R}, )0;(\s+@{R} bra)", r"\g<1>512;\2", 0),
        "another stride": (r"kernel_param_11\]", "kernel_param_10]", 0),
        "partial stored too far": (rf"(st\.global\.f32\s+\[{R}\+)16\]", r"\g<1>20]", 0),
        "warps exchange other lanes": (r"(mov\.u32\s+%r\d+, )16;", r"\g<1>8;", None),
        "exponential of another logit": (
            r"sub\.f32(\s+%f\d+), (%f\d+), ",
            r"sub.f32\1, \2, \2; //",
            1,
        ),
    },
    "gradient": {
        "barrier dropped": dropped(r"bar\.sync\s+0;"),
        "store shifted by a voxel": (rf"(st\.global\.v4\.b32\s+\[{R})\]", r"\1+2]", 0),
        "store shifted by a word": (rf"(st\.global\.v4\.b32\s+\[{R})\]", r"\1+16]", 0),
        "store of all threads": (rf"@{R} st\.global", "st.global", None),
        "cotangent of another sample": (r"kernel_param_3\]", "kernel_param_0]", 0),
    },
    "total": {
        "barrier dropped": dropped(r"bar\.sync\s+0;"),
        "partials read too far": (rf"(ld\.global\.f32\s+{R}, \[{R})\]", r"\1+4]", 0),
    },
    "loss": {
        "fence before the count dropped": dropped(r"membar\.gl;", 0),
        "fence after the count dropped": dropped(r"membar\.gl;", 1),
        "fences of a block only": (r"membar\.gl;", "membar.cta;", None),
        "barrier before the count dropped": dropped(r"bar\.sync\s+0;", 1),
        "barrier after the count dropped": dropped(r"bar\.sync\s+0;", 2),
        "relaxed loads plain": (r"ld\.relaxed\.gpu\.f64", "ld.global.f64", None),
        "count by two": (r"(atom\.global\.add\.u32\s.*), 1;", r"\1, 2;", 0),
        "count not atomic": (
            rf"atom\.global\.add\.u32\s+({R}), \[({R})\], 1;",
            r"{ .reg .b32 %next; ld.global.u32 \1, [\2]; add.u32 %next, \1, 1;"
            r" st.global.u32 [\2], %next; }",
            0,
        ),
        "last block misjudged": (rf"(add\.s64\s+{R}, {R}, -)1;(?=\s+ld\.shared)", r"\g<1>2;", 0),
    },
}


def changed(source, pattern, replacement, at):
    """The text with an occurrence of a pattern replaced, or all."""
    found = list(re.finditer(pattern, source))
    if not found:
        raise LookupError(pattern)
    for match in reversed(found if at is None else [found[at]]):
        source = source[: match.start()] + match.expand(replacement) + source[match.end() :]
    return source


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, fault) for kind, faults in MUTANTS.items() for fault in faults],
)
def test_faults_are_found(monkeypatch, kind, fault):
    def change(kernel, source):
        return changed(source, *MUTANTS[kind][fault]) if kernel.kind == kind else source

    monkeypatch.setattr(gpu_ptx.Kernel, "changed", change)
    with pytest.raises(AssertionError) as error:
        (check_loss if kind == "loss" else check_sums)()
    assert not re.match(r"line \d+", str(error.value))  # the changed PTX is valid
    assert error.type is Fault or " differ (" in str(error.value)


def test_the_checks_pass_without_a_fault():
    check_sums()
    gpu_simulator.Kernel.launched = ()
    check_loss()
