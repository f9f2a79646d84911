"""The benchmark: its arithmetic, its measuring on steps whose cost is known, and a quick run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dice_core.bench import (
    cases,
    floor,
    formulas,
    implementations,
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
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)

    def step():
        clock.now += 100
        yield
        clock.now += 3
        yield
        clock.now += clock.now  # 103, then 409 seconds
        yield
        clock.now += 100

    assert measure.seconds(step, 2) == [3, (103 + 409) / 2]


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
    messages = processes.fresh(die)
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
        *_, value = row.prepare(x, y)()
        assert float(value) == pytest.approx(expected, abs=1e-6), row.name
    assert formulas.dice_by_comparison(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_cases_are_what_they_say():
    x, y = cases.CASES["h"].with_sides(16).tensors("uint8")
    assert x.shape == (2, 5, 16, 16, 16)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert (y.dtype, y.min(), y.max()) == (torch.uint8, 0, 4)
    assert cases.CASES["i"].with_sides(2).tensors("int64")[0].dtype == torch.float16


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


def test_help_lists_cases_and_implementations():
    from dice_core.bench import __main__

    text = __main__.parser().format_help()
    for case in cases.CASES.values():
        assert f"  {case.name:<14} {case}" in text
    for row in implementations.IMPLEMENTATIONS.values():
        assert f"  {row.name:<14} {row.title}" in text
    assert max(map(len, text.splitlines())) <= 100
