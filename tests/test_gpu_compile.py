"""The CUDA kernels compiled without a GPU: limits on the cost of the machine code.

A kernel that needs more registers than available, or whose loops the compiler did not unroll, keeps
its arrays in slow local memory; one that loads its logits one at a time wastes bandwidth.
"""

import re
from dataclasses import replace

import pytest

from dice_core.gpu import kernels
from dice_core.gpu import plan as plans
from dice_core.gpu.plan import Plan
from dice_core.gpu.totals import LOADS
from dice_core.spec import Spec

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
from dice_core.bench.machine_code import compiled, count, disassembler
from dice_core.gpu import compile as compiler
from dice_core.gpu import intrinsics

HOPPER = (9, 0)
ASSEMBLED_WELL = re.compile(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")

# Registers, and instructions per value in the loop over voxels, as numba-cuda 0.30 with NVVM and
# nvJitLink 13.5 compile them. Other versions change them by a few percent; a loop that is not
# unrolled, or a wider type, by far more.
SLACK = 1.15
VOXELS = 2**20
BINARY = Spec("sigmoid", binary_gamma=0.0, targets="soft")
EVERYTHING = Spec(gamma=2.0, nll=True, binary_gamma=2.0, targets="soft", target_square=True)
# One of each path through the kernels, with every dtype, vector width and number of lanes.
COSTS = {
    ("statistics", "float16", "bool", 1, Spec(gamma=2.0)): (40, 35.4),
    ("statistics", "float16", "uint8", 4, Spec()): (51, 15.1),
    ("statistics", "float32", "int64", 14, Spec(gamma=0.0)): (122, 19.7),
    ("statistics", "bfloat16", "int16", 20, Spec(p=2, gamma=0.5)): (94, 27.1),
    ("statistics", "float16", "uint16", 150, Spec()): (119, 13.8),
    ("statistics", "float32", "int64", 150, Spec(gamma=0.0)): (162, 20.0),
    ("statistics", "float16", "uint8", 105, Spec()): (107, 13.6),
    ("gradient", "float16", "uint8", 105, Spec()): (114, 23.3),
    ("gradient", "float16", "int8", 1, Spec()): (48, 26.4),
    ("gradient", "bfloat16", "uint8", 4, Spec()): (72, 20.7),
    ("gradient", "float32", "uint64", 14, Spec(gamma=0.0)): (80, 22.2),
    ("gradient", "float32", "uint32", 33, Spec(p=2, gamma=0.5)): (85, 34.0),
    ("gradient", "float16", "uint8", 150, Spec()): (95, 23.6),
    ("gradient", "float64", "int32", 5, Spec(gamma=2.0)): (116, 77.0),
    ("loss", "float64", "uint8", 1, Spec()): (89, None),
    ("statistics", "float16", "float16", 4, BINARY): (94, 62.9),
    ("statistics", "float32", "bfloat16", 3, replace(EVERYTHING, targets="binary")): (76, 97.3),
    ("statistics", "float16", "uint8", 150, Spec("argmax")): (79, 26.5),
    ("gradient", "float16", "uint8", 1, Spec(binary_gamma=0.0)): (63, 62.1),
    ("gradient", "bfloat16", "float32", 3, Spec("sigmoid", targets="soft")): (40, 34.5),
    ("gradient", "float32", "float64", 150, EVERYTHING): (78, 183.2),
    # Of the most instructions per value, where loops are the first not to be unrolled.
    ("gradient", "float32", "uint8", 4, Spec("sigmoid", binary_gamma=2.5)): (92, 67.0),
    ("statistics", "float64", "float64", 14, replace(BINARY, binary_gamma=2.5)): (192, 175.7),
    ("gradient", "float64", "uint8", 3, Spec("sigmoid", binary_gamma=2.0)): (100, 140.3),
    ("gradient", "float64", "float64", 150, replace(EVERYTHING, binary_gamma=2.5)): (126, 399.0),
    ("gradient", "float64", "uint8", 2, Spec(gamma=0.5, binary_gamma=2.5)): (100, 455.0),
}


def plan(logits, labels, channels, spec):
    return plans.plan(logits, labels, channels, spec, VOXELS)


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (of nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("case", COSTS, ids=lambda case: "-".join(map(str, case)))
def test_values_stay_in_registers_and_accesses_are_wide(case):
    kind, *options = case
    kernel = compiled(kind, plan(*options), HOPPER)
    everything = kernel.code.everything
    registers, per_value = COSTS[case]
    assert ASSEMBLED_WELL.search(kernel.log)
    assert "__local_depot" not in kernel.ptx
    assert not count(everything, "(LDL|STL)")
    assert kernel.registers <= SLACK * registers
    if kind in kernels.OF_TOTALS:
        return
    assert_accesses_are_wide(kernel)
    if kind == "statistics" and kernel.plan.logits != "float64":
        assert not count(everything, "(DADD|DMUL|DFMA)")
    assert kernel.per_value <= SLACK * per_value


def assert_accesses_are_wide(kernel):
    """Each word of the logits is loaded, and of the gradient stored, by one instruction."""
    size = kernel.plan.word * plans.ITEMSIZE[kernel.plan.logits]
    width = {16: r"\S*\.128", 8: r"\S*\.64", 4: "", 2: r"\S*\.U16"}[size]
    words = kernel.plan.lane_channels * kernel.plan.voxels // kernel.plan.word
    assert count(kernel.code.everything, rf"LDG\.E{width}") >= words
    if kernel.kind == "gradient":
        assert count(kernel.code.everything, rf"STG\.E{width}") == words


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (of nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("kind", kernels.OF_VOXELS)
def test_other_layouts_cost_little_more(kind):
    """Odd numbers of voxels, of which every logit is loaded alone, and channels last."""
    aligned = compiled(kind, plan("float16", "uint8", 4, Spec()), HOPPER)
    for contiguous, adjacent in (("voxels", 1), ("channels", 4)):
        of_layout = plans.plan("float16", "uint8", 4, Spec(), VOXELS, contiguous, adjacent)
        kernel = compiled(kind, of_layout, HOPPER)
        assert_accesses_are_wide(kernel)
        assert ASSEMBLED_WELL.search(kernel.log)
        assert kernel.per_value <= 1.2 * aligned.per_value


# Instructions of a warp outside the loop over voxels, which small volumes pay for in every block.
FIXED = {
    ("statistics", "float16", "uint8", 1): 162,
    ("statistics", "float16", "uint8", 4): 187,
    ("statistics", "float32", "uint8", 14): 329,
    ("statistics", "float16", "uint8", 105): 343,
    ("statistics", "float16", "uint8", 150): 413,
    ("gradient", "float16", "uint8", 4): 130,
    ("gradient", "float32", "uint8", 150): 286,
}


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (of nvidia-cuda-nvdisasm)")
@pytest.mark.parametrize("case", FIXED, ids=lambda case: "-".join(map(str, case)))
def test_a_block_starts_and_ends_in_few_instructions(case):
    kind, *options = case
    kernel = compiled(kind, plan(*options, Spec()), HOPPER)
    assert len(kernel.fixed) <= SLACK * FIXED[case]
    assert not any("CALL" in text for text in kernel.fixed)  # of a division of 64-bit integers


@pytest.mark.skipif(disassembler() is None, reason="needs nvdisasm (of nvidia-cuda-nvdisasm)")
def test_the_second_launch_loads_partials_at_a_time():
    """Its loads are issued before the first of them is used."""
    code = compiled("total", plan("float32", "uint8", 4, Spec()), HOPPER).code
    (loop,) = code.loops
    kinds = [text for text in code.instructions[slice(*loop)] if re.search("LDG|F2F", text)]
    assert ["LDG" in text for text in kinds] == [True] * LOADS + [False] * LOADS
    assert len(code.instructions) <= SLACK * 318


@pytest.mark.parametrize(
    ("channels", "shuffles"), [(4, 6 + 3 + 2 + 1 + 1), (14, 21 + 11 + 6 + 3 + 2)]
)
def test_a_warp_adds_its_sums_by_halves(channels, shuffles):
    """12 or 42 sums: not five shuffles each."""
    text = compiler.ptx("statistics", plan("float16", "uint8", channels, Spec()), HOPPER)
    assert text.count("shfl.sync") == shuffles


def test_every_dtype_is_compiled_above():
    assert {labels for _, _, labels, _, _ in COSTS} == {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *plans.ITEMSIZE,
    }
    assert {logits for _, logits, _, _, _ in COSTS} == {*plans.ITEMSIZE}


@pytest.mark.parametrize(("kind", "capability"), [("statistics", (8, 0)), ("gradient", (12, 0))])
def test_other_gpus(kind, capability):
    ptx = compiler.ptx(kind, plan("bfloat16", "uint8", 4, Spec()), capability)
    cubin, log = compiler.link(ptx, capability)
    assert cubin[:4] == b"\x7fELF"
    assert ASSEMBLED_WELL.search(log)


def test_an_array_in_local_memory_is_found():
    """The checks above can fail: more values than there are registers."""
    crowded = Plan("float16", "uint8", 40, voxels=8, word=8)
    kernel = compiled("gradient", crowded, HOPPER)
    assert not ASSEMBLED_WELL.search(kernel.log)
    assert kernel.local_bytes


@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("spec", [Spec(), EVERYTHING])
def test_a_kernels_parameters_are_the_declared_arguments(kind, spec):
    made_for = plan("float16", "uint8", 4, spec)
    code = kernels.kernel(kind, made_for, compiler.operations(made_for)).__code__
    declared = kernels.ARGUMENTS[kind]
    assert code.co_varnames[: code.co_argcount] == tuple(declared.kinds)
    types = compiler.signature(kind).args
    codes = "".join("d" if each == compiler.float64 else "q" for each in types)
    assert codes == declared.format


def test_numba_s_own_target_is_refused(monkeypatch):
    monkeypatch.setattr(compiler.cuda, "implementation", "Built-in")
    with pytest.raises(RuntimeError, match=r"deprecated; install NVIDIA's: pip install"):
        compiler.compile("total", plan("float32", "uint8", 1, Spec()), HOPPER)


def test_the_linker_s_errors_are_in_the_message():
    text = compiler.ptx("total", plan("float32", "uint8", 1, Spec()), HOPPER)
    linker = r"nvJitLink 1\d\.\d+ failed for compute capability 9\.0 \(ERROR_PTX_COMPILE \(4\)\): "
    broken = text.replace("ret;", "no_such_instruction;")
    with pytest.raises(RuntimeError, match=linker + r"(?s:.*)no_such_instruction"):
        compiler.link(broken, HOPPER)
    later = re.sub(r"\.version \d+\.\d+", ".version 99.9", text)
    with pytest.raises(RuntimeError, match=r"Unsupported \.version 99\.9(?s:.*)new environment\.$"):
        compiler.link(later, HOPPER)


def test_a_gpu_that_the_linker_does_not_know(monkeypatch):
    """Pretended: nvJitLink 12.9 really fails for 99.0, and aborts the process when next used."""

    def create(count, options):
        raise compiler.nvjitlink.nvJitLinkError(16)

    monkeypatch.setattr(compiler.nvjitlink, "create", create)
    unknown = r"failed for compute capability 99\.0 \(ERROR_UNRECOGNIZED_ARCH \(16\)\)$"
    with pytest.raises(RuntimeError, match=unknown):
        compiler.link("", (99, 0))


def test_constants_that_two_files_know():
    assert intrinsics.WORD_BYTES == plans.WORD_BYTES
    assert {name: real.bitwidth for name, real in intrinsics.REAL.items()} == {
        name: max(32, 8 * size) for name, size in plans.ITEMSIZE.items()
    }
