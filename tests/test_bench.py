"""The benchmark: its arithmetic, its measuring on steps whose cost is known, and a quick run."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dice_core.bench import (
    cases,
    device,
    floor,
    formulas,
    implementations,
    machine,
    measure,
    memory,
    processes,
    results,
    summary,
    tables,
)
from dice_core.bench.floor import Floor
from dice_core.bench.results import CaseResult, Measurement

# ---- arithmetic --------------------------------------------------------------------------------


def test_medians_of_phases_and_of_their_sum():
    assert results.medians([[1, 10], [2, 30], [9, 20]]) == [2, 20, 29]
    assert results.medians([[3], [1]]) == [2, 2]


@pytest.mark.parametrize(("a", "b", "expected"), [(6, 3, 2), (None, 3, None), (6, None, None)])
def test_ratio(a, b, expected):
    assert results.ratio(a, b) == expected


def test_floor_is_what_must_be_read_and_written():
    at_least = Floor(read_x=5, read_y=2, copy_x=11)
    assert at_least.forward == 5 + 2
    assert at_least.step == 5 + 2 + 2 + 11


def test_floor_takes_the_fastest_reader():
    seconds = {f"read x, {how}": 7 - i for i, how in enumerate(floor.READERS)}
    seconds |= {f"read y, {how}": 2 + i for i, how in enumerate(floor.READERS)}
    fastest = 8 - len(floor.READERS)
    assert floor.of(seconds | {"copy x": 9}) == Floor(fastest, 2, 9)


@pytest.fixture
def result():
    """One case: ours forward 2 s and step 5 s, everyone else slower."""
    return CaseResult(
        cases.CASES["a"],
        "int64",
        rounds=5,
        floor=Floor(0.5, 0.5, 1.0),
        x_bytes=10**9,
        measurements={
            "ours": Measurement(2, 3, 5, peak=1, kept=0),
            "ours-out": Measurement(step=4, peak=0),
            "ours-over": Measurement(step=3, peak=0),
            "monai": Measurement(20, 30, 50, peak=3, kept=2),
            "naive": Measurement(notes=["ValueError: no"]),
            "compile-naive": Measurement(8, 32, 40, peak=2.5),
            "compile-equal": Measurement(10, 20, 30, peak=2),
        },
    )


def test_summary_takes_the_fastest_compiled_peer_of_each_quantity(result):
    assert summary.speed(result, "forward") == summary.Speed("a", 2, 10, 4, "compile-naive", 2)
    fresh = summary.speed(result, "step, fresh gradient")
    assert fresh == summary.Speed("a", 5, 10, 6, "compile-equal", 2)
    out = summary.speed(result, "step, gradient into out=")
    assert out == summary.Speed("a", 4, 12.5, 7.5, "compile-equal", 1.6)
    over = summary.speed(result, "step, gradient over the logits")
    assert (over.seconds, over.over_compile) == (3, 10)
    assert summary.memory(result) == summary.Memory("a", 1, 0, 3, 2, "compile-equal")


def test_summary_of_what_was_not_measured(result):
    result.measurements = {"monai": result.measurements["monai"]}
    assert summary.speed(result, "forward") == summary.Speed("a", None, None, None, None, None)
    assert summary.memory(result) == summary.Memory("a", None, None, 3, None, None)


def test_a_refusal_is_a_footnote(result):
    table = tables.details(result, ["another", "ValueError: no"])
    assert ("torch, naive [2]", *["-"] * 7) in table.rows
    assert table.rows[0] == ("dice_core", "2000", "3000", "5000", "2.00", "2.00", "1.00", "0.00")
    assert "read 2.0, copy 1.0 GB/s" in table.title


def test_markdown_table():
    table = tables.Table("speed", ("case", "ms"), [("a", "1.00")])
    assert table.markdown() == "**speed**\n\n| case | ms |\n| --- | ---: |\n| a | 1.00 |"


@pytest.mark.parametrize(
    ("value", "single", "doubtful"),
    [
        (0.66671, True, False),
        (0.668, True, True),
        (0.67, False, False),
        (float("nan"), False, True),
    ],
)
def test_doubts(value, single, doubtful):
    assert bool(measure.doubts(value, 0.6667, single)) == doubtful


# ---- measuring ---------------------------------------------------------------------------------


def test_phases_are_timed_apart_and_preparation_is_not(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def step():
        clock.now += 100
        yield
        clock.now += 3
        yield
        clock.now += clock.now  # 103, then 409 seconds
        yield
        clock.now += 100

    assert device.DEVICES["cpu"].seconds(step, 2) == [3, (103 + 409) / 2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's high-water mark")
def test_growth_now_and_at_most():
    meter = memory.Meter()
    large = torch.ones(16 << 20)  # 64 MiB
    assert meter.growth() == pytest.approx(large.nbytes, rel=0.05)
    del large
    assert meter.growth() < 4 << 20
    assert meter.peak() == pytest.approx(64 << 20, rel=0.05)


def die():
    yield os.getpid()
    os._exit(3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_of_its_own_that_dies():
    messages = processes.fresh(die, spawn=device.DEVICES["cpu"].spawn)
    assert next(messages) != os.getpid()
    with pytest.raises(processes.ProcessDied, match="exit code 3"):
        next(messages)


@pytest.mark.parametrize("name", ["a", "d", "h"])
def test_ours_computes_the_formula(name):
    """Each of ours, and the two naive ones, give one loss; the one with autograd its gradient."""
    case = cases.CASES[name].with_sides(8)
    x, y = case.tensors("uint8")
    expected = formulas.dice(x, y).item()
    for row in implementations.named(["ours", "ours-out", "ours-over", "naive"]):
        *_, value = row.prepare([(x, y)])()
        assert float(value) == pytest.approx(expected, abs=1e-6), row.name
    assert formulas.dice_by_comparison(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_steps_take_the_inputs_in_turns():
    inputs = [cases.Case("", (1, 2, 8)).tensors("uint8")]
    inputs.append((-2 * inputs[0][0], inputs[0][1]))
    expected = [formulas.dice(x, y).item() for x, y in inputs] * 2
    for row in implementations.named(["ours", "ours-out", "ours-over", "naive"]):
        step = row.prepare(inputs)
        values = [float([*step()][-1]) for _ in expected]
        assert values == pytest.approx(expected, abs=1e-6), row.name


def test_cases_are_what_they_say():
    x, y = cases.CASES["h"].with_sides(16).tensors("uint8")
    assert x.shape == (2, 5, 16, 16, 16)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert (y.dtype, y.min(), y.max()) == (torch.uint8, 0, 4)
    assert cases.CASES["i"].with_sides(2).tensors("int64")[0].dtype == torch.float16


def test_large_cases_are_for_a_gpu():
    assert "".join(cases.default("cpu")) == "abcdefghi"
    assert "".join(cases.default("cuda")) == "abcdefghijkl"


# ---- measuring on a GPU that is told what everything takes --------------------------------------


class Gpu:
    """torch.cuda of a device that works through its queue while the host goes on."""

    version = "13.0"

    def __init__(self):
        self.host = self.idle_from = 0.0
        self.allocated = self.most = 0
        self.free, self.l2 = 30 << 20, 1 << 20

    def enqueue(self, host, device):
        self.host += host
        self.idle_from = max(self.idle_from, self.host) + device

    def allocate(self, size):
        self.allocated += size
        self.most = max(self.most, self.allocated)

    def synchronize(self):
        self.host = max(self.host, self.idle_from)

    def _sleep(self, cycles):
        self.enqueue(0, cycles / 2e9)

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.host, self.idle_from))

        def elapsed_time(other):
            assert other.at <= self.host, "not synchronised"
            return 1e3 * (other.at - event.at)

        event.elapsed_time = elapsed_time
        return event

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.most

    def reset_peak_memory_stats(self):
        self.most = self.allocated

    def mem_get_info(self):
        return self.free, 2 * self.free

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        assert index == 0
        return SimpleNamespace(
            name="Told GPU", major=9, minor=0, total_memory=64 << 30, L2_cache_size=self.l2
        )

    def is_available(self):
        return True


@pytest.fixture
def gpu(monkeypatch):
    """In the place of torch.cuda; tensors stay on the host, whose clock is the GPU's."""
    gpu = Gpu()
    for name in dir(Gpu):
        if hasattr(torch.cuda, name) and not name.startswith("__"):
            monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    monkeypatch.setattr(torch.version, "cuda", gpu.version)
    monkeypatch.setattr(device.Cuda, "place", "cpu")
    monkeypatch.setattr(device, "_driver", lambda: "580.1")
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    return gpu


@pytest.fixture
def step(gpu):
    """Forward: 30 us of the host, 2 of the device; backward: 50 and 8. Keeps a byte of seven."""

    def step():
        gpu.enqueue(10e-6, 100e-6)
        yield
        gpu.enqueue(30e-6, 2e-6)
        gpu.allocate(1)
        yield
        gpu.enqueue(50e-6, 8e-6)
        gpu.allocate(6)
        gpu.allocate(-6)
        yield torch.tensor(0.5)
        gpu.allocate(-1)

    return step


def test_phases_are_timed_on_the_device_which_does_not_wait_for_the_host(step):
    assert device.DEVICES["cuda"].seconds(step, 5) == pytest.approx([2e-6, 8e-6])


def test_a_step_costs_the_host_what_it_takes_to_enqueue(step):
    assert device.DEVICES["cuda"].host_seconds(step) == pytest.approx(80e-6)
    assert device.DEVICES["cpu"].host_seconds(step) is None


def test_growth_of_what_the_allocator_handed_out(gpu):
    gpu.allocate(100)
    gpu.allocate(-50)
    meter = device.DEVICES["cuda"].meter()
    gpu.allocate(7)
    gpu.allocate(-4)
    assert (meter.growth(), meter.peak()) == (3, 7)


@pytest.mark.parametrize(
    ("l2", "free", "copies"),
    [(3 << 20, 120 << 20, 10), (3 << 20, 20 << 20, 5), (3 << 20, 1 << 20, 2), (1, 120 << 20, 2)],
    ids=["beyond the caches", "a third of the memory", "two at least", "two in any case"],
)
def test_copies_of_the_input(gpu, l2, free, copies):
    gpu.l2, gpu.free = l2, free
    x = torch.rand(1, 4, 1 << 16).transpose(1, 2)
    y = torch.zeros(1, 1 << 16, dtype=torch.int32)  # 1 MiB and a quarter, together
    inputs = device.DEVICES["cuda"].inputs(x, y)
    assert len(inputs) == copies
    assert len({array.data_ptr() for pair in inputs for array in pair}) == 2 * copies
    assert all(torch.equal(a, x) and a.stride() == x.stride() for a, _ in inputs)


@pytest.fixture
def told(gpu, step, monkeypatch):
    """A report of one case on the GPU, whose only implementation is `step`."""
    row = implementations.Implementation("ours", "Told", "torch", lambda inputs: step)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "ours", row)
    monkeypatch.setattr(floor, "_one_phase", lambda function, arguments: step)
    monkeypatch.setattr(measure, "_settle", lambda settings: None)
    gpu.l2 = 48
    case = cases.Case("tiny", (1, 1, 2, 2), dtype="float64")
    settings = measure.Settings(device="cuda", rounds=2)
    *_, result = measure.times(case, ["ours"], settings)
    gc.enable()
    facts = machine.facts("cuda") | {"settings": {"threads": 1, "labels": "int64"}}
    return results.Report(facts, {}, {"tiny": result})


def test_a_case_on_the_device(told):
    result = told.cases["tiny"]
    found = result.measurements["ours"]
    assert (found.forward, found.backward) == pytest.approx((2e-6, 8e-6))
    assert found.host == pytest.approx(80e-6)
    assert (found.peak, found.kept) == (7 / 32, 1 / 32)
    assert result.copies == 3


def test_a_report_of_the_device(told):
    text = tables.markdown(told)
    assert text.startswith(
        "Told GPU, compute capability 9.0, 64 GiB, 0 MiB of L2 cache; driver 580.1, CUDA 13.0"
    )
    assert "| tiny | 80.0 | - | - |" in text
    assert "Times are the device's" in text
    table = tables.details(told.cases["tiny"], list(tables.notes(told)))
    assert tables.HOST in table.header
    assert "3 copies of the input in turns" in table.title
    assert summary.as_json(told)["summary"]["host"][0]["ours"] == pytest.approx(80e-6)


# ---- the command line --------------------------------------------------------------------------


def bench(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "dice_core.bench", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of two cases: its folder, its JSON and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    names = "ours,ours-out,ours-over,naive,smp"
    files = ("--json", "all.json", "--plot", "bars.png", "--markdown", "summary.md")
    run = bench("d", "h", "--quick", "--only", names, "--rounds", "2", *files, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder, json.loads((folder / "all.json").read_text()), run.stdout


def test_quick_run_measures_time_and_memory(quick):
    _, found, _ = quick
    assert list(found["cases"]) == ["d", "h"]
    for case in found["cases"].values():
        assert case["rounds"] == 2
        ours, out = case["measurements"]["ours"], case["measurements"]["ours-out"]
        assert min(ours["forward"], ours["backward"], out["step"]) > 0
        assert ours["step"] == pytest.approx(ours["forward"] + ours["backward"])
        assert all(seconds > 0 for seconds in case["floor"].values())
        for name, row in case["measurements"].items():
            if name != "smp":
                assert row["notes"] == []
                assert row["value"] == pytest.approx(row["expected"], abs=1e-4)
        naive = case["measurements"]["naive"]
        assert naive["peak"] >= naive["kept"] > 1 > ours["kept"] >= 0
        assert naive["peak"] > ours["peak"] > 0.9 > out["peak"]


def test_quick_run_summarises_what_it_measured(quick):
    _, found, _ = quick
    for row in found["summary"]["step, gradient into out="]:
        case = found["cases"][row["case"]]
        least = case["floor"]
        step = least["read_x"] + 2 * least["read_y"] + least["copy_x"]
        assert row["seconds"] == case["measurements"]["ours-out"]["step"]
        assert row["above_floor"] == pytest.approx(row["seconds"] / step)
        assert row["over_monai"] is row["over_compile"] is None


def test_quick_run_says_where_and_with_what(quick):
    _, found, printed = quick
    facts = found["facts"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["settings"]["labels"] == "int64"
    assert facts["cpu"] in printed
    assert "python -m dice_core.bench d h --quick" in printed
    not_measured = "smp" in found["unavailable"]
    assert ("not measured: SMP DiceLoss (" in printed) == not_measured


def test_quick_run_prints_tables_and_writes_the_summary(quick):
    folder, found, printed = quick
    written = (folder / "summary.md").read_text()
    for title in summary.QUANTITIES:
        assert f"dice_core, {title}" in printed
        assert f"**dice_core, {title}**" in written
    assert "d: x[2, 1, 32, 32, 32] float32, sigmoid, 2 rounds" in printed
    ours = 1e3 * found["cases"]["h"]["measurements"]["ours"]["forward"]
    (line, *_) = [line for line in written.splitlines() if line.startswith("| h |")]
    assert float(line.split("|")[2]) == pytest.approx(ours, rel=0.06)


def test_quick_run_draws_a_picture(quick):
    folder, _, _ = quick
    picture = (folder / "bars.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["z"], "there is no case z; there are\n  a  x[2, 5, 64, 128, 128] float32"),
        (["--only", "ours,mine"], "there is no implementation mine; there are\n  ours "),
        (["--only", "compile-monai", "--no-compile"], "--no-compile leaves nothing of --only"),
        (["--rounds", "0"], "argument --rounds: 0 is not a whole number from 1 up"),
        (["--json", "nowhere/x.json"], "argument --json: there is no folder nowhere"),
        (["--plot", "x.gif"], "argument --plot: x.gif does not end in .png, .svg, .pdf"),
        (["--budget", "0"], "argument --budget: 0 is not a number above 0"),
        (["--only", "ours,exacta"], "exacta cannot be measured on cpu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_named(arguments, message, capsys, monkeypatch, tmp_path):
    from dice_core.bench import __main__

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())


def test_an_absent_peer_is_no_result(capsys, monkeypatch):
    from dice_core.bench import __main__

    absent = implementations.Implementation("absent", "Absent Loss", "no_such_library.losses", None)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "absent", absent)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "absent"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "not measured: Absent Loss (not installed)\nnothing was measured\n" in message


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "is built without CUDA; https://pytorch.org/get-started has builds with it\n"),
        ("13.0", "torch finds no NVIDIA GPU; see whether `nvidia-smi` and CUDA_VISIBLE_DEVICES do"),
    ],
    ids=["torch", "GPU"],
)
def test_without_a_gpu_the_remedy_is_named(version, message, capsys, monkeypatch):
    from dice_core.bench import __main__

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device cuda: torch")
    assert message.strip() in line


def test_help_lists_cases_and_implementations():
    from dice_core.bench import __main__

    text = __main__.parser().format_help()
    for case in cases.CASES.values():
        assert f"  {case.name:<14} {case}" in text
    for row in implementations.IMPLEMENTATIONS.values():
        assert f"  {row.name:<14} {row.title}" in text
    assert max(map(len, text.splitlines())) <= 100
