"""The CUDA kernels compiled without a GPU: what the machine code may cost.

A kernel whose registers do not suffice, or whose loops the compiler did not unroll, keeps numbers
in slow memory; one that reads its logits a number at a time leaves the memory idle.
"""

import re
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from dice_core import _gpu_kernels, _gpu_plan
from dice_core.spec import Spec

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
from dice_core import _gpu_compile, _gpu_intrinsics

NVDISASM = next(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm*"), None)
HOPPER = (9, 0)
ASSEMBLED_WELL = re.compile(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")

# kernel, logits, labels, channels, sums -> at most so many registers, instructions per score in
# the loop over voxels. That loop also has what runs only for infinite logits and bad labels.
COSTS = {
    ("statistics", "float16", "uint8", 1, Spec()): (56, 25),
    ("statistics", "float16", "uint8", 2, Spec()): (64, 27),
    ("statistics", "bfloat16", "int16", 3, Spec(power=2)): (72, 24),
    ("statistics", "float16", "uint8", 4, Spec()): (72, 22),
    ("statistics", "float16", "int64", 5, Spec()): (96, 21),
    ("statistics", "float32", "uint8", 4, Spec()): (64, 22),
    ("statistics", "float32", "int64", 14, Spec()): (128, 20),
    ("statistics", "float16", "uint8", 20, Spec()): (112, 22),
    ("statistics", "float32", "uint32", 33, Spec(power=2)): (112, 24),
    ("statistics", "float16", "uint8", 150, Spec()): (152, 23),
    ("statistics", "float16", "uint8", 1000, Spec()): (255, 50),
    ("statistics", "float64", "int64", 5, Spec()): (128, None),
    ("gradient", "float16", "uint8", 1, Spec()): (72, 26),
    ("gradient", "bfloat16", "uint8", 2, Spec()): (80, 32),
    ("gradient", "float16", "int8", 3, Spec(power=2)): (104, 34),
    ("gradient", "float16", "uint8", 4, Spec()): (112, 28),
    ("gradient", "float16", "int64", 5, Spec()): (128, 27),
    ("gradient", "float32", "uint8", 4, Spec()): (80, 28),
    ("gradient", "float32", "int64", 14, Spec()): (104, 29),
    ("gradient", "bfloat16", "uint8", 20, Spec()): (112, 27),
    ("gradient", "float32", "uint32", 33, Spec(power=2)): (128, 30),
    ("gradient", "float16", "uint8", 150, Spec()): (144, 31),
    ("gradient", "float16", "uint8", 512, Spec()): (128, 30),
    ("gradient", "float64", "int64", 5, Spec()): (112, None),
    ("total", "float32", "uint8", 1, Spec()): (112, None),
    ("loss", "float32", "uint8", 1, Spec()): (128, None),
    ("statistics", "float16", "uint8", 1, Spec(gamma=0.0)): (64, 37),
    ("statistics", "float16", "uint8", 2, Spec(gamma=2.0)): (88, 43),
    ("statistics", "float16", "uint8", 4, Spec(gamma=0.0)): (104, 30),
    ("statistics", "float16", "uint8", 4, Spec(gamma=2.0)): (88, 33),
    ("statistics", "bfloat16", "int16", 5, Spec(power=2, gamma=0.5)): (80, 34),
    ("statistics", "float32", "int64", 14, Spec(gamma=0.0)): (152, 26),
    ("statistics", "float16", "uint8", 20, Spec(gamma=2.0)): (128, 31),
    ("statistics", "float16", "uint8", 150, Spec(gamma=0.0)): (192, 30),
    ("statistics", "float64", "int64", 5, Spec(gamma=2.0)): (152, None),
    ("gradient", "float16", "uint8", 1, Spec(gamma=2.0)): (88, 45),
    ("gradient", "bfloat16", "uint8", 2, Spec(gamma=0.0)): (72, 32),
    ("gradient", "float16", "int8", 3, Spec(power=2, gamma=2.0)): (112, 50),
    ("gradient", "float16", "uint8", 4, Spec(gamma=0.0)): (88, 29),
    ("gradient", "float16", "uint8", 4, Spec(gamma=2.0)): (88, 41),
    ("gradient", "float16", "int64", 5, Spec(power=2, gamma=0.5)): (96, 47),
    ("gradient", "float32", "int64", 14, Spec(gamma=0.0)): (104, 29),
    ("gradient", "bfloat16", "uint8", 20, Spec(gamma=2.0)): (112, 34),
    ("gradient", "float16", "uint8", 150, Spec(gamma=0.0)): (136, 31),
    ("gradient", "float16", "uint8", 512, Spec(gamma=2.0)): (144, 36),
    ("gradient", "float64", "int64", 5, Spec(gamma=2.0)): (120, None),
}
BINARY = Spec("sigmoid", binary_gamma=0.0)
EVERYTHING = Spec(gamma=2.0, smoothing=True, binary_gamma=2.0, dense=True)
COSTS |= {  # of the general kernels
    ("statistics", "float16", "uint8", 4, Spec(gamma=0.0, smoothing=True)): (80, 44),
    ("statistics", "float16", "uint8", 1, Spec(binary_gamma=0.0)): (80, 66),
    ("statistics", "float16", "uint8", 4, BINARY): (112, 84),
    ("statistics", "bfloat16", "uint8", 20, replace(BINARY, binary_gamma=0.5)): (112, 132),
    ("statistics", "float32", "float32", 3, Spec("sigmoid", dense=True)): (64, 33),
    ("statistics", "float16", "uint8", 14, Spec("none")): (120, None),
    ("statistics", "float32", "float16", 150, EVERYTHING): (152, 170),
    ("statistics", "float64", "float64", 3, Spec(gamma=0.0, dense=True)): (152, None),
    ("statistics", "float16", "uint8", 4, Spec("argmax")): (72, None),
    ("statistics", "float16", "uint8", 150, Spec("argmax")): (128, None),
    ("statistics", "float16", "uint8", 512, BINARY): (255, 100),
    ("gradient", "float16", "uint8", 4, Spec(gamma=0.0, smoothing=True)): (80, 96),
    ("gradient", "float16", "uint8", 1, Spec(binary_gamma=0.0)): (96, 90),
    ("gradient", "float16", "uint8", 4, BINARY): (144, 104),
    ("gradient", "float32", "float32", 3, Spec("sigmoid", dense=True)): (72, 48),
    ("gradient", "float16", "uint8", 14, Spec("none", power=2)): (80, None),
    ("gradient", "float32", "float16", 150, EVERYTHING): (112, 320),
}


class Compiled:
    """A kernel's assembly, machine code and the assembler's report."""

    def __init__(self, kind, plan, capability, folder):
        self.plan, self.ptx = plan, _gpu_compile.ptx(kind, plan, capability)
        cubin, self.log = _gpu_compile.link(self.ptx, capability)
        self.instructions, labels = [], {}
        for line in disassembled(cubin, folder).splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                self.instructions.append(instruction[1])
        jumps = (
            (labels[to], at)
            for at, text in enumerate(self.instructions)
            for to in re.findall(r"BRA.*`\((\.L_x_\d+)\)", text)
        )
        self.loops = [self.instructions[to:at] for to, at in jumps if to < at]

    @property
    def registers(self):
        return int(re.search(r"used (\d+) registers", self.log, re.IGNORECASE)[1])

    def count(self, pattern):
        return sum(bool(re.match(rf"(@!?U?P\d+ )?{pattern}", text)) for text in self.instructions)


def disassembled(cubin, folder):
    if NVDISASM is None:
        pytest.skip("needs nvdisasm (of nvidia-cuda-nvdisasm)")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [NVDISASM, "-c", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plan(logits, labels, channels, asked=_gpu_plan.PLAIN):
    return _gpu_plan.plan(logits, labels, channels, asked, _gpu_plan.WORD_BYTES)


@pytest.mark.parametrize("case", COSTS, ids=lambda case: "-".join(map(str, case)))
def test_numbers_stay_in_registers_and_words_are_wide(case, tmp_path):
    kind, *numbers = case
    made_for = plan(*numbers)
    made = Compiled(kind, made_for, HOPPER, tmp_path)
    registers, per_score = COSTS[case]
    assert ASSEMBLED_WELL.search(made.log)
    assert "__local_depot" not in made.ptx
    assert not made.count("(LDL|STL)")
    assert made.registers <= registers
    if kind in _gpu_kernels.OF_TOTALS:
        return
    size = made_for.voxels * _gpu_plan.ITEMSIZE[made_for.logits]
    width = {16: r"\S*\.128", 8: r"\S*\.64", 4: "", 2: r"\S*\.U16"}[size]
    assert made.count(rf"LDG\.E{width}") >= made_for.share
    if kind == "gradient":
        assert made.count(rf"STG\.E{width}") == made_for.share
    elif made_for.logits != "float64":
        assert not made.count("(DADD|DMUL|DFMA)")
    if per_score is not None:
        # The loop over voxels is the smallest with an exponential for every score, or more.
        background = made_for.classes - made_for.channels
        scores = (made_for.share + background) * made_for.voxels
        loops = (x for x in made.loops if sum("MUFU.EX2" in text for text in x) >= scores)
        assert len(min(loops, key=len)) / scores <= per_score


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
@pytest.mark.parametrize("kind", _gpu_kernels.OF_VOXELS)
def test_other_gpus(kind, capability, tmp_path):
    ptx = _gpu_compile.ptx(kind, plan("bfloat16", "uint8", 4), capability)
    cubin, log = _gpu_compile.link(ptx, capability)
    assert cubin[:4] == b"\x7fELF"
    assert ASSEMBLED_WELL.search(log)


def test_every_dtype_of_labels_has_a_kernel():
    for labels in ("bool", "uint8", "int16", "uint16", "int32", "uint64"):  # the others are above
        assert _gpu_compile.ptx("gradient", plan("float32", labels, 2), HOPPER)


def test_an_array_in_memory_is_found(tmp_path):
    """The checks above bite: more scores than there are registers for."""
    crowded = _gpu_plan.Plan("float16", "uint8", 40, voxels=8)
    log = Compiled("gradient", crowded, HOPPER, tmp_path).log
    assert not ASSEMBLED_WELL.search(log)


def test_numba_s_own_target_is_refused(monkeypatch):
    monkeypatch.setattr(_gpu_compile.cuda, "implementation", "Built-in")
    with pytest.raises(RuntimeError, match=r"deprecated; install NVIDIA's: pip install"):
        _gpu_compile.compile("total", plan("float32", "uint8", 1), HOPPER)


def test_constants_that_two_files_know():
    assert _gpu_intrinsics.WORD_BYTES == _gpu_plan.WORD_BYTES
    assert {name: real.bitwidth for name, real in _gpu_intrinsics.REAL.items()} == {
        name: max(32, 8 * size) for name, size in _gpu_plan.ITEMSIZE.items()
    }
