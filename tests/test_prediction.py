"""The benchmark's prediction from machine code: the way of a warp, the model, the command line."""

import subprocess
import sys
from dataclasses import replace

import pytest
from test_gpu_compile import COSTS, HOPPER, SLACK

from dice_core.bench import __main__, machine_code, prediction
from dice_core.bench.cases import CASES
from dice_core.gpu import plan as plans
from dice_core.gpu.plan import Plan
from dice_core.spec import Spec

pytestmark = pytest.mark.skipif(
    machine_code.disassembler() is None, reason="needs nvdisasm (of nvidia-cuda-nvdisasm)"
)

# ---- machine code ------------------------------------------------------------------------------

# A start, a loop with a branch over a short and a long side, and an end with a short loop.
CODE = """
	.section	.text.other,"ax",@progbits
        /*0000*/                   RET ;
	.section	.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDG.E R2, [R4] ;
        /*0030*/               @P1 BRA P2, `(.L_x_2) ;
        /*0040*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R2, R2 ;
        /*0070*/              @!P2 FADD R3, R3, R2 ;
        /*0080*/                   FMNMX R6, R6, R2, !PT ;
.L_x_3:
        /*0090*/              @!P0 BRA `(.L_x_1) ;
.L_x_9:
        /*00a0*/                   BRA.DIV UR4, `(.L_x_7) ;
.L_x_4:
        /*00b0*/                   STS [R1], RZ ;
        /*00c0*/               @P0 BRA `(.L_x_4) ;
        /*00d0*/               @P0 EXIT ;
        /*00e0*/                   STG.E [R4], R3 ;
        /*00f0*/                   EXIT ;
.L_x_7:
        /*0100*/                   SHFL.BFLY PT, R2, R2 ;
        /*0110*/                   BRA `(.L_x_4) ;
"""


def names(instructions):
    words = (text.split() for text in instructions)
    return [next(word for word in each if not word.startswith("@")) for each in words]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(machine_code, "disassembled", lambda cubin: CODE)
    log = "Used 40 registers, 16 stack, 1440 bytes smem, 8 bytes lmem; 24 bytes stack frame"
    return machine_code.Compiled("statistics", Plan("float32", "uint8", 1), "", log, b"")


def test_the_way_of_a_warp(kernel):
    assert names(kernel.round) == ["LDG.E", "BRA", "MUFU.EX2", "FADD", "FMNMX", "BRA"]
    assert names(kernel.fixed) == ["MOV", "BRA", "BRA.DIV", "STS", "BRA", "EXIT", "STG.E", "EXIT"]
    assert len(kernel.loop) == 7
    assert kernel.values == 2
    assert kernel.per_value == 3.5
    assert (kernel.registers, kernel.shared_bytes, kernel.local_bytes) == (40, 1440, 24)
    with pytest.raises(ValueError, match="no way from instruction 4 to 6"):
        kernel.code.way(4, 6)


def test_code_without_a_known_loop_is_refused(kernel):
    with pytest.raises(ValueError, match="no loop has an STG for each of 1 words"):
        kernel.code.hot_loop("gradient", kernel.plan)
    kernel.code.loops.append((3, 5))
    with pytest.raises(ValueError, match="the loop over voxels has a loop inside"):
        _ = kernel.round


def test_units_of_instructions(kernel):
    found = {unit: machine_code.count(kernel.round, unit_of) for unit, unit_of in UNITS.items()}
    assert found == {"ALU": 1, "FMA": 1, "MUFU": 1}
    assert machine_code.count(["I2FP.F32.U32 R1, R2", "I2F.U32 R1, R2"], UNITS["MUFU"]) == 1


# ---- the model ---------------------------------------------------------------------------------

UNITS = prediction.UNITS
H100 = prediction.GPUS["h100"]


def predicted(kernel, case, gpu=H100):
    x, y = prediction.layouts(case, kernel.plan.labels)
    job = prediction.job(x, y, kernel.plan.spec)
    return prediction.Prediction(gpu, prediction.work(kernel, x, y, job))


def test_a_prediction_by_hand(kernel):
    """Two samples of 5,000 voxels, of which each of five blocks has up to 1,024, a round."""
    case = replace(CASES["d"], shape=(2, 1, 5000))
    kernel = replace(kernel, plan=replace(kernel.plan, labels="int64", voxels=4, word=4))
    found = predicted(kernel, case)
    assert found.work.bytes == 2 * 5000 * (4 + 8)
    assert found.work.blocks == 10
    assert found.work.rounds == 8 * 10
    assert found.work.instructions("") == 8 * 10 * (6 + 8)
    # Each multiprocessor has a block at most.
    assert found.limits["issue"] == pytest.approx(8 * (6 + 8) / 4 / H100.clock)
    assert found.limits["MUFU"] == pytest.approx(8 * 1 * 32 / 16 / H100.clock)
    assert found.limits["memory"] == pytest.approx(120e3 / 3e12)
    assert found.limit == "memory"
    assert found.seconds == pytest.approx(120e3 / 3e12 + 2e-6)
    assert H100.resident_warps(kernel) == 48  # 65536 registers of 40 * 256


def test_the_layout_of_a_case_is_torch_s():
    for name in "aceh":
        case = CASES[name].with_sides(8)
        for array, layout in zip(
            case.tensors("int64"), prediction.layouts(case, "int64"), strict=True
        ):
            assert tuple(array.shape) == layout.shape
            assert tuple(step * array.itemsize for step in array.stride()) == layout.strides


@pytest.fixture(scope="module")
def wide():
    """A kernel of COSTS; a thread of it loads 8 voxels at once."""
    plan = plans.plan("bfloat16", "uint8", 4, Spec(), 1 << 20)
    return machine_code.compiled("gradient", plan, HOPPER)


def test_a_prediction_agrees_with_the_costs_and_is_plausible(wide):
    registers, per_value = COSTS["gradient", "bfloat16", "uint8", 4, Spec()]
    assert wide.registers <= SLACK * registers
    assert 0.5 * per_value < len(wide.round) / wide.values <= SLACK * per_value
    found = predicted(wide, replace(CASES["k"], dtype="bfloat16"))
    copied = found.work.bytes / H100.copy
    assert found.limits["memory"] == copied == pytest.approx(2**24 * (2 * 8 + 1) / 3e12)
    assert 1 <= found.of_copy < 3
    assert copied <= found.seconds < 3 * copied
    # An exponential of each value and a reciprocal of each voxel.
    assert machine_code.count(wide.round, "MUFU") == 8 * (4 + 1)
    assert 100 < len(wide.fixed) < 2000
    assert wide.local_bytes == 0


def test_a_longer_loop_takes_longer(wide):
    """The same with a voxel per thread: as many values, in more instructions. The memory is fast,
    for it is the limit of both on the GPUs of the table.
    """
    narrow = machine_code.compiled("gradient", replace(wide.plan, voxels=1, word=1), HOPPER)
    case = replace(CASES["k"], dtype="bfloat16")
    fast = replace(H100, copy=1e15)
    both = [predicted(kernel, case, fast) for kernel in (wide, narrow)]
    ratio = (len(narrow.round) / narrow.values) / (len(wide.round) / wide.values)
    assert ratio > 1.2
    issue = [found.limits["issue"] for found in both]
    assert issue[1] > 1.2 * issue[0]
    assert both[1].seconds > both[0].seconds


# ---- the command line --------------------------------------------------------------------------


def test_the_report_of_a_case(kernel, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        prediction, "_compiled", lambda kind, plan, capability: replace(kernel, plan=plan)
    )
    line = ["d", "--device", "cuda", "--predict", "a100,h100", "--only", "ours", "--labels"]
    __main__.main([*line, "uint8", "--markdown", str(tmp_path / "predicted.md")])
    text = capsys.readouterr().out
    assert text == (tmp_path / "predicted.md").read_text()
    tables = text.split("**")[1::2]
    assert [each.split(":")[0] for each in tables] == ["A100 SXM 80 GB", "H100 SXM"]
    assert text.count("| d Dice, forward ") == text.count("| d Dice, gradient ") == 2
    assert "A prediction, not a measurement" in text
    assert max(map(len, prediction.LEGEND.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--predict", "--predict: only with --device cuda"),
        ("--device cpu --predict", "--predict: only with --device cuda"),
        ("--device cuda --predict a", "argument --predict: a: no such GPU; choose from h100, "),
        ("--device cuda --predict --json x", "--predict: not with --step, --busy, --read, --json"),
        ("nnunet-step-14 --device cuda --predict", "--predict: nnunet-step-14 is a whole training"),
        ("z --device cuda --predict", "z: no such name; choose from a, b, c"),
        ("--device cuda --predict --only monai", "--predict: not of monai; --only ours, ours-ce"),
    ],
)
def test_bad_input_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(machine_code, "disassembler", lambda: None)
    monkeypatch.setattr(prediction, "_compiled", lambda *plan: machine_code.disassembled(b""))
    with pytest.raises(SystemExit) as stop:
        __main__.main(["d", "--device", "cuda", "--predict"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("--predict: needs nvdisasm: pip install ")


def test_it_needs_no_torch_and_names_the_compiler():
    absent = "import sys; sys.modules['torch'] = sys.modules['numba'] = None\n"
    code = absent + "from dice_core.bench import __main__\n__main__.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "d", "--device", "cuda", "--predict"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == '--predict needs numba: pip install "dice_core[gpu]"\n'
