"""The benchmark: its arithmetic, measurements of steps of known cost, and a quick run."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from dice_core.bench import (
    __main__,
    busy,
    cases,
    devices,
    floor,
    formulas,
    measure,
    networks,
    picture,
    plot,
    results,
    run,
    tables,
)
from dice_core.bench.implementations import IMPLEMENTATIONS, Implementation

# ---- tables ------------------------------------------------------------------------------------


@pytest.fixture
def result():
    """One case: ours forward 2 s and step 5 s, everyone else slower, one refusal."""
    measurements = {
        "ours": {"forward": 2, "backward": 3, "step": 5, "peak": 1, "kept": 0},
        "ours-out": {"step": 4, "peak": 0},
        "ours-ce": {"step": 6, "peak": 1},
        "monai": {"forward": 20, "backward": 30, "step": 50, "peak": 3, "kept": 2},
        "monai-ce": {"step": 60, "peak": 5},
        "naive": {"notes": ["ValueError: no"]},
        "compile-naive": {"forward": 8, "step": 40, "peak": 2.5},
        "compile-equal": {"forward": 10, "step": 30, "peak": 2},
        "floor": {"forward": 1, "step": 2.5},
    }
    return results.CaseResult("x[1]", measurements, rounds=7)


def rows(table):
    """The cells of a Markdown table, without its ruler."""
    _, _, header, _, *lines = table.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, *lines)]


def compared(title, result):
    return rows(tables.comparison(title, {"a": result}, *tables.COMPARISONS[title]))


def test_the_fastest_compiled_peer_of_each_quantity_is_compared(result):
    assert compared("forward", result) == [
        ["", "ms", "vs MONAI", "vs compile", "/ floor"],
        ["a", "2000", "10.0x", "4.00x", "2.00"],
    ]
    assert compared("step, fresh gradient", result) == [
        *[["", "ms", "vs MONAI", "vs compile", "/ floor", "peak", "MONAI peak", "compile peak"]],
        ["a", "5000", "10.0x", "6.00x", "2.00", "1.00", "3.00", "2.00"],
    ]
    assert compared("step, gradient into out=", result)[1][:4] == ["a", "4000", "12.5x", "7.50x"]


def test_compounds_are_compared_with_dice_alone(result):
    assert compared("step of Dice + cross-entropy, fresh gradient", result) == [
        ["", "ms", "of Dice", "vs MONAI", "/ floor", "peak", "MONAI peak"],
        ["a", "6000", "1.20x", "10.0x", "2.40", "1.00", "5.00"],
    ]


def test_a_refusal_is_a_note_and_a_row_without_numbers(result):
    report = results.Report({"processor": "P"}, {"a": result})
    found = rows(tables.details("a", result))
    assert found[1] == ["dice_core", "2000", "3000", "5000", "2.00", "2.00", "1.00", "0.00"]
    assert ["torch, naive", *["-"] * 7] in found
    text = tables.text(report)
    assert text.startswith("processor: P\n\n**a: x[1], 7 rounds**")
    assert text.endswith("\n- a torch, naive: ValueError: no\n")
    assert "in place**" not in text  # not measured


def test_json_has_everything(result, tmp_path):
    report = results.Report({"processor": "P"}, {"a": result})
    results.write(report, tmp_path / "x.json")
    assert results.read(tmp_path / "x.json") == report


# ---- implementations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "d", "h"])
def test_ours_and_the_naive_code_compute_the_formula(name):
    x, y = cases.CASES[name].with_sides(8).tensors("uint8")
    assert torch.allclose(formulas.dice_by_comparison(x, y), formulas.dice(x, y))
    for name, row in IMPLEMENTATIONS.items():
        if name.startswith(("ours", "naive")):
            *_, value = row.step([(x, y)], x.shape[1])()
            expected = getattr(formulas, row.formula)(x, y).item()
            assert float(value) == pytest.approx(expected, abs=1e-5), name


def test_successive_steps_take_successive_inputs():
    inputs = [cases.Case("", (1, 2, 8)).tensors("uint8")]
    inputs.append((-2 * inputs[0][0], inputs[0][1]))
    expected = [formulas.dice(x, y).item() for x, y in inputs] * 2
    for name in ("ours", "ours-out", "ours-over", "naive"):
        step = IMPLEMENTATIONS[name].step(inputs, 2)
        assert [float([*step()][-1]) for _ in expected] == pytest.approx(expected, abs=1e-6), name


def test_cases_are_what_they_say():
    x, y = cases.CASES["h"].with_sides(16).tensors("uint8")
    assert x.shape == (2, 5, 16, 16, 16)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert (y.dtype, y.min(), y.max()) == (torch.uint8, 0, 4)
    assert cases.CASES["i"].with_sides(2).tensors("int64")[0].dtype == torch.float16
    assert "".join(name for name in cases.CASES if name not in cases.STEPS) == "abcdefghijklm"


# ---- whole training steps ----------------------------------------------------------------------


TRAINED = [name for name, row in IMPLEMENTATIONS.items() if row.network]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_computes_its_loss_and_frees_its_gradients(name):
    row = IMPLEMENTATIONS[name]
    if why := row.unavailable():
        pytest.skip(why)
    case = next(case for case in cases.CASES.values() if case.network == row.network).with_side(8)
    x, y = case.tensors("int64")
    assert x.shape == (1, 1, 8, 8, 8)
    build, loss = row.build(case.shape[1])
    net = build(8)
    step = row.start((lambda side: net, loss), [(x, y)])()
    *_, value = (next(step) for _ in ("ready", "forward", "backward"))
    assert all(weight.grad is not None for weight in net.parameters())
    assert any(weight.grad.any() for weight in net.parameters())
    assert list(step) == []
    assert all(weight.grad is None for weight in net.parameters())
    logits = case.logits(x)
    assert logits.shape == case.shape
    expected = getattr(formulas, row.formula)(logits, y).item() + row.offset
    assert float(value) == pytest.approx(expected, abs=1e-4)


def test_depth_of_networks():
    assert [networks._levels(side) for side in (8, 16, 64, 96, 144)] == [2, 3, 5, 5, 5]


@pytest.fixture
def steps():
    """A report of whole steps: with nnU-Net's loss 4 s, ours 3, fused 1, none 2; the loss alone."""
    roles = {"theirs": 4, "ours": 3, "fused": 1, "none": 2}
    measurements = {f"nnunet-step-{role}": {"step": n, "peak": n} for role, n in roles.items()}
    of_step = results.CaseResult("P", measurements, 3, 1, 2**20, "nnunet-step")
    losses = {"monai-ce": {"step": 0.25}, "ours-ce": {"step": 0.125, "peak": 1}}
    alone = results.CaseResult("x[1]", losses, 3, 1, 2**20)
    return results.Report({"processor": "P"}, {"nnunet-step-105": of_step, "e": alone})


def test_what_a_step_saves(steps):
    assert rows(tables.savings(steps.cases)) == [
        ["", "of time", "of peak memory"],
        ["nnunet-step-105, dice_core", "25 %", "25 %"],
        ["nnunet-step-105, dice_core, fused head", "75 %", "75 %"],
    ]
    found = rows(tables.details("nnunet-step-105", steps.cases["nnunet-step-105"]))
    assert found[0] == ["", "step ms", "step / floor", "peak MiB", "peak"]
    assert found[3] == ["dice_core, fused head", "1000", "0.50", "1.00", "1.00"]
    text = tables.text(steps)
    assert text.count("| nnunet-step-105") == 2
    assert "| e " in text


def test_the_picture_shows_every_number(steps, tmp_path):
    figure = picture.drawn(steps, picture.THEMES["light"])
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == [
        *("4.00 s", "3.00 s", "1.00 s", "2.00 s", "4 MiB", "3 MiB", "1 MiB", "2 MiB"),
        *("250 ms", "125 ms", "1 MiB"),
    ]
    titles = [text.get_text() for text in figure.texts]
    assert titles == ["Training step, 105 classes", "The loss alone, 105 classes"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["nnU-Net's loss", "dice_core", "fused head", "no loss"]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [4, 3, 1, 2]
    picture.save(steps, tmp_path / "x.svg")
    light, dark = ((tmp_path / f"x-{name}.svg").read_text() for name in ("light", "dark"))
    for text, theme in ((light, "light"), (dark, "dark")):
        assert picture.THEMES[theme].ours in text
    assert light != dark


# ---- measuring ---------------------------------------------------------------------------------


def test_phases_are_timed_but_not_preparation(monkeypatch):
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

    found = devices.DEVICES["cpu"].seconds(step, 2)
    assert found == {"forward": 3, "backward": 256, "step": 259}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark")
def test_growth_of_memory():
    count = 9 << 20  # 36 MiB: larger blocks than malloc keeps, whatever it freed before
    x = torch.ones(count)

    def step():
        yield
        kept = torch.ones(2 * count)
        torch.ones(4 * count)
        yield
        yield kept
        torch.ones(8 * count)  # cleaning up is not included

    found = measure.growth(step, devices.DEVICES["cpu"], x.nbytes)
    assert found == {"peak": pytest.approx(6, rel=0.05), "kept": pytest.approx(2, rel=0.05)}


@pytest.fixture
def restored():
    """Restores the process-wide settings that a measurement changes."""
    threads = torch.get_num_threads()
    yield
    gc.enable()
    gc.unfreeze()
    torch.set_num_threads(threads)


def test_wrong_values_and_refusals_are_noted(monkeypatch, restored):
    def refuse(channels):
        raise ValueError(f"not for {channels}")

    wrong = Implementation("Wrong", lambda channels: lambda x, y: 1.01 * formulas.dice(x, y))
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", wrong)
    monkeypatch.setitem(IMPLEMENTATIONS, "refuses", Implementation("Refuses", refuse))
    names = ["naive", "wrong", "refuses"]
    settings = measure.Settings(rounds=2, memory=False)
    found = measure.times(cases.CASES["g"].with_sides(4), names, settings)
    assert found.measurements["naive"]["notes"] == []
    (note,) = found.measurements["wrong"]["notes"]
    assert note.startswith("its loss is ")
    assert found.measurements["refuses"] == {"notes": ["ValueError: not for 4"]}
    assert set(found.measurements["floor"]) == {"forward", "step"}
    assert found.rounds == 2


def test_times_are_medians(monkeypatch, restored):
    samples = [{"forward": n, "step": 10 * n} for n in (5.0, 1.0, 2.0)]
    monkeypatch.setattr(measure, "_samples", lambda steps, *_: dict.fromkeys(steps, samples))
    settings = measure.Settings(memory=False)
    found = measure.times(cases.CASES["g"].with_sides(4), ["naive"], settings)
    assert found.get("naive", "forward") == found.get("floor", "forward") == 2
    assert found.get("naive", "step") == 20


@pytest.mark.parametrize(
    ("value", "dtype", "wrong"),
    [
        (0.66671, torch.float32, False),
        (0.668, torch.float32, True),
        (0.67, torch.float16, False),
        (float("nan"), torch.float16, True),
    ],
)
def test_tolerance_of_values(value, dtype, wrong):
    assert bool(measure.wrong_value(value, 0.6667, dtype)) == wrong


def die(*arguments):
    os._exit(3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_work_is_done_in_a_process_of_its_own():
    assert run.in_fresh_process(devices.DEVICES["cpu"].spawn, os.getpid) != os.getpid()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(measure, "times", die)
    found = run.measured(cases.CASES["g"], ["ours"], measure.Settings())
    assert "process" in found.measurements["ours"]["notes"][0]
    assert "exit code 3" in tables.notes(results.Report({}, {"g": found}))


# ---- measuring on a fake GPU of known costs ---- ------------------------------------------------


class Gpu:
    """A fake torch.cuda, whose device works through its queue while the host continues."""

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
        return SimpleNamespace(
            name="Some GPU", major=9, minor=0, total_memory=64 << 30, L2_cache_size=self.l2
        )


@pytest.fixture
def gpu(monkeypatch):
    """Replaces torch.cuda; tensors stay on the host, which shares its clock with the GPU."""
    gpu = Gpu()
    for name in dir(Gpu):
        if hasattr(torch.cuda, name) and not name.startswith("__"):
            monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    monkeypatch.setattr(devices.Cuda, "place", "cpu")
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    return gpu


@pytest.mark.parametrize(
    ("l2", "free", "copies"),
    [(3 << 20, 120 << 20, 10), (3 << 20, 20 << 20, 5), (3 << 20, 1 << 20, 2), (1, 120 << 20, 2)],
    ids=["beyond the caches", "a third of the memory", "two at least", "two in any case"],
)
def test_copies_of_the_input(gpu, l2, free, copies):
    gpu.l2, gpu.free = l2, free
    x = torch.rand(1, 4, 1 << 16).transpose(1, 2)
    y = torch.zeros(1, 1 << 16, dtype=torch.int32)  # 1 MiB and a quarter, together
    inputs = devices.DEVICES["cuda"].inputs(x, y)
    assert len({array.data_ptr() for pair in inputs for array in pair}) == 2 * copies
    assert all(torch.equal(a, x) and a.stride() == x.stride() for a, _ in inputs)


def test_a_report_of_a_gpu(gpu, monkeypatch, restored):
    """Times are the device's, which does not wait for the host; memory is the allocator's."""

    def step():
        gpu.enqueue(10e-6, 100e-6)
        yield
        gpu.enqueue(30e-6, 2e-6)  # seconds of the host, of the device
        gpu.allocate(1)
        yield
        gpu.enqueue(50e-6, 8e-6)
        gpu.allocate(6)
        gpu.allocate(-6)
        yield torch.tensor(0.5)
        gpu.allocate(-1)

    row = Implementation("Some loss", lambda channels: None, start=lambda loss, inputs: step)
    monkeypatch.setitem(IMPLEMENTATIONS, "ours", row)
    monkeypatch.setattr(floor, "step", lambda read, inputs: step)
    monkeypatch.setattr(run, "in_fresh_process", lambda spawn, work, *rest: work(*rest))
    gpu.l2 = 48
    case = cases.Case("tiny", (1, 1, 2, 2), dtype="float64")
    report = run.report([case], ["ours"], measure.Settings(device="cuda", rounds=2))
    found = report.cases["tiny"]
    ours = {what: found.get("ours", what) for what in ("forward", "backward", "host")}
    assert ours == pytest.approx({"forward": 2e-6, "backward": 8e-6, "host": 80e-6})
    assert (found.get("ours", "peak"), found.get("ours", "kept")) == (7 / 32, 1 / 32)
    text = tables.text(report)
    assert "GPU: Some GPU, compute capability 9.0, 64 GiB, 0 MiB of L2 cache" in text
    assert "2 rounds, 3 copies of the input" in text
    assert "host us" in text


# ---- the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of one case: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    options = "--quick --only ours,ours-out,ours-over,naive --rounds 2 --json all.json"
    command = [sys.executable, "-m", "dice_core.bench", "d", *options.split()]
    command += ["--markdown", "all.md"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_quick_run_measures_time_and_memory(quick):
    found = json.loads((quick[0] / "all.json").read_text())
    assert found["cases"]["d"]["rounds"] == 2
    rows = found["cases"]["d"]["measurements"]
    least = rows.pop("floor")
    assert least["step"] > least["forward"] > 0
    for row in rows.values():
        assert row["notes"] == []
        assert row["step"] > 0
        assert row["value"] == pytest.approx(row["expected"], abs=1e-4)
    ours, naive = rows["ours"], rows["naive"]
    assert naive["peak"] >= naive["kept"] > 1 > ours["kept"] >= 0
    assert naive["peak"] > ours["peak"] > 0.9 > rows["ours-out"]["peak"]


def test_quick_run_prints_tables_and_writes_them(quick):
    folder, printed = quick
    assert (folder / "all.md").read_text() == printed
    assert f"torch {torch.__version__}" in printed
    assert "python -m dice_core.bench d --quick" in printed
    assert "**d: x[2, 1, 32, 32, 32] float32, sigmoid, 2 rounds**" in printed
    assert "**dice_core, step, gradient in place**" in printed


def test_quick_run_is_read_again_and_drawn(quick, monkeypatch, capsys):
    folder, printed = quick
    files = ("--read", str(folder / "all.json"), "--plot", str(folder / "bars.png"))
    monkeypatch.setattr(sys, "argv", ["bench", *files])
    __main__.main()
    assert capsys.readouterr().out == printed
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# ---- busy cores --------------------------------------------------------------------------------


def seconds_used(processes):
    return [sum(process.cpu_times()[:2]) for process in processes]


def test_busy_neighbours_compute_only_when_told():
    with busy.neighbours(2) as switch:
        found = psutil.Process().children()
        assert len(found) == 2
        before = seconds_used(found)
        switch(True)
        time.sleep(0.2)
        switch(False)
        during = seconds_used(found)
        time.sleep(0.1)
        assert all(a < b for a, b in zip(before, during, strict=True))
        assert seconds_used(found) == pytest.approx(during, abs=0.02)
    assert not any(process.is_running() for process in found)


def interrupt(switch, found):
    switch(True)
    found += psutil.Process().children()
    raise KeyboardInterrupt


def test_busy_neighbours_end_with_an_interrupted_measurement():
    found = []
    with pytest.raises(KeyboardInterrupt), busy.neighbours(1) as switch:
        interrupt(switch, found)
    assert len(found) == 1
    assert not found[0].is_running()


def abandon(pids):
    with busy.neighbours(1) as switch:
        switch(True)
        pids.send(psutil.Process().children()[0].pid)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_busy_neighbours_end_with_a_killed_process():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    killed = multiprocessing.get_context("fork").Process(target=abandon, args=(sender,))
    killed.start()
    pid = receiver.recv()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):  # the neighbour, if it has not ended yet
        psutil.Process(pid).wait(5)  # raises TimeoutExpired


def test_quick_run_on_busy_cores(tmp_path, monkeypatch, capsys, restored):
    monkeypatch.setattr(run, "in_fresh_process", lambda spawn, work, *rest: work(*rest))
    options = "d --quick --busy 1 --rounds 2 --threads 2 --json"
    monkeypatch.setattr(sys, "argv", ["bench", *options.split(), str(tmp_path / "busy.json")])
    __main__.main()
    rows = json.loads((tmp_path / "busy.json").read_text())["cases"]["d"]["measurements"]
    assert set(rows) == {"ours", "ours-out"}
    for row in rows.values():
        assert all(row[what] > 0 for what in ("one", "all", "one busy", "all busy"))
    header = "1 thread ms | all ms | 1 busy ms | all busy ms | all busy / all | 1 busy / all busy"
    assert header in capsys.readouterr().out


def test_ratios_of_busy_cores():
    row = {"one": 4.0, "all": 2.0, "one busy": 5.0, "all busy": 2.5}
    found = results.CaseResult("x[1]", {"ours": row}, rounds=3)
    cells = ["dice_core", "4000", "2000", "5000", "2500", "1.25x", "2.00x"]
    assert rows(tables.details("a", found))[1] == cells


def test_plot_without_a_value(result, tmp_path):
    plot.save(results.Report({"processor": "P", "date": ""}, {"a": result}), tmp_path / "x.svg")
    assert "torch, naive" in (tmp_path / "x.svg").read_text()


def stopped(arguments, capsys, monkeypatch):
    """The exit status of the command and what it writes on standard error."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["z"], "z: no such name; choose from a, b, c"),
        (["--only", "ours,mine"], "mine: no such name; choose from ours, ours-inplace, ours-out"),
        (["--rounds", "0"], "argument --rounds: 0 is not a positive integer"),
        (["--json", "nowhere/x.json"], "argument --json: there is no folder nowhere"),
        (["--step", "--side", "12"], "argument --side: 12 is not a multiple of 8"),
        (["--busy", "0"], "argument --busy: 0 is not a positive integer"),
        (["--busy", "-1"], "argument --busy: "),
        (["--busy", "x"], "argument --busy: x is not a positive integer"),
        (["--busy", "1", "--step"], "--busy: not with --step, --only, --plot or --device cuda"),
        (["--busy", "1", "nnunet-step-14"], "--busy: nnunet-step-14 is a whole training step"),
        (["--plot", "x.gif"], "--plot: x.gif does not end in .png, .svg or .pdf"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_named(arguments, message, capsys, monkeypatch):
    status, text = stopped(arguments, capsys, monkeypatch)
    assert status == 2
    assert message in text


def test_an_absent_peer_is_named(capsys, monkeypatch):
    def build(channels):
        import no_such_library

        return no_such_library

    monkeypatch.setitem(IMPLEMENTATIONS, "absent", Implementation("Absent Loss", build))
    status, text = stopped(["--only", "absent"], capsys, monkeypatch)
    assert status == 1
    assert "not measured: Absent Loss (No module named 'no_such_library')\nnothing was" in text


def test_without_a_gpu_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text = stopped(["--device", "cuda"], capsys, monkeypatch)
    assert status == 1
    assert text.startswith(f"--device cuda: torch {torch.__version__} finds no NVIDIA GPU; see ")


def test_help_lists_cases_and_implementations():
    text = __main__.parser().format_help()
    assert all(f"  {name:<20} {case}" in text for name, case in cases.CASES.items())
    assert all(f"  {name:<20} {row.title}" in text for name, row in IMPLEMENTATIONS.items())
    assert max(map(len, text.splitlines())) <= 100
