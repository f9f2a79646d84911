"""`python -m dice_core`: the report that users attach to bug reports."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import dice_core
from dice_core import __main__, backends, info, threads

ENVIRONMENTS = {
    "plain": {},
    "set": {"OMP_NUM_THREADS": "3", "DICE_CORE_BACKEND": "reference"},
    "useless": {"OMP_NUM_THREADS": "many", "DICE_CORE_BACKEND": "nonesuch"},
}


@pytest.fixture(scope="module", params=ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def environment(request):
    return request.param


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """Runs the module in this environment, outside the source tree."""
    inherited = {name: os.environ[name] for name in os.environ if name not in ENVIRONMENTS["set"]}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "dice_core", *arguments],
            env=inherited | environment,
            cwd=tmp_path_factory.mktemp("elsewhere"),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    return run


@pytest.fixture(scope="module")
def facts(run):
    return json.loads(run("--json"))


@pytest.fixture(scope="module")
def lines(run):
    return run().splitlines()


@pytest.fixture(scope="module")
def kernels():
    """The first CPU kernels that run here."""
    usable = (row for row in backends.BUILT_IN if row.device == "cpu" and not row.unavailable())
    return next(usable).load()


# ---- --json ------------------------------------------------------------------------------------


def test_json_lists_every_backend_in_order(facts):
    assert list(facts["backends"].items()) == [
        (row.name, {"description": row.description, "unavailable": row.unavailable()})
        for row in backends.table()
    ]


def test_json_reports_the_processor_level_and_openmp(facts, kernels):
    version, _ = kernels.openmp()
    assert facts["cpu"]["level"] == kernels.LEVEL
    assert facts["cpu"]["openmp"] == version
    assert isinstance(facts["cpu"]["openmp_library"], str)


def test_json_reports_the_environment(facts, environment):
    omp = environment.get("OMP_NUM_THREADS")
    cores = threads.available_cores()
    assert facts["DICE_CORE_BACKEND"] == environment.get("DICE_CORE_BACKEND")
    assert facts["threads"] == {
        "default": 3 if omp == "3" else cores,
        "available_cores": cores,
        "OMP_NUM_THREADS": omp,
    }


def test_json_reports_versions(facts):
    assert facts["dice_core"] == dice_core.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert facts["versions"]["numpy"] == np.__version__
    assert set(facts["versions"]) >= {"torch", "numba", "cupy"}
    of_machine = platform.system(), platform.release(), platform.machine()
    assert facts["platform"].startswith("-".join(of_machine))


# ---- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", backends.BUILT_IN, ids=lambda row: row.name)
def test_text_has_every_backend_with_its_state(lines, row):
    state = "; ".join(row.unavailable()) or "usable"
    if row.name == "reference":
        state = "usable, only if requested by name"
    (line,) = [line for line in lines if line.split()[:1] == [row.name] and state in line]
    assert line.split(maxsplit=1)[1].startswith(row.description)
    assert line.endswith(f" {state}")


def test_text_has_level_openmp_and_threads(lines, facts):
    cpu = facts["cpu"]
    openmp = f"{cpu['openmp']} ({cpu['openmp_library']})"
    assert f"  level       {cpu['level']}" in lines
    assert f"  OpenMP      {openmp if cpu['openmp'] else 'none: single-threaded'}" in lines
    (line,) = [line for line in lines if line.startswith("  threads ")]
    count, omp = facts["threads"], facts["threads"]["OMP_NUM_THREADS"]
    assert f" {count['default']} by default ({count['available_cores']} cores available, " in line
    assert line.endswith(f"OMP_NUM_THREADS = {omp})" if omp else "OMP_NUM_THREADS is not set)")


def test_text_has_the_requested_backend(lines, environment):
    asked = environment.get("DICE_CORE_BACKEND")
    text = f"DICE_CORE_BACKEND = {asked}" if asked else "DICE_CORE_BACKEND is not set"
    assert f"  {text}" in lines


def test_text_has_versions(lines, facts):
    assert lines[0] == f"dice_core {dice_core.__version__} on {facts['platform']}"
    listed = dict(line.split(maxsplit=1) for line in lines[lines.index("versions") + 1 :])
    assert listed == {
        name: version or "not installed" for name, version in facts["versions"].items()
    }


# ---- other packages' backends, other machines --------------------------------------------------


def test_another_package_s_backend_runs_only_if_requested():
    rows = {"plugged": {"description": "from plug-in", "unavailable": []}}
    assert "  plugged     from plug-in" + 26 * " " + "usable, only if requested by name" in report(
        backends=rows
    )


def report(**changes):
    return info.as_text(info.report() | changes).splitlines()


def test_long_names_and_descriptions_stay_apart():
    name, description, reason = "a-backend-of-many-letters", "from " + "a-package-" * 5, "no luck"
    rows = {name: {"description": description, "unavailable": [reason, "none"]}}
    (line,) = [line for line in report(backends=rows) if name in line]
    assert line.split() == [name, *description.split(), "no", "luck;", "none"]


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (None, "  no compiled kernels"),
        (
            {"level": "arm64", "openmp": 0, "openmp_library": ""},
            "  OpenMP      none: single-threaded",
        ),
    ],
    ids=["no_kernels", "no_openmp"],
)
def test_text_of_a_lesser_installation(cpu, expected):
    assert expected in report(cpu=cpu)


# ---- commands ----------------------------------------------------------------------------------


def printed(capsys, *arguments):
    __main__.main(arguments)
    return capsys.readouterr().out


def test_info_is_the_default_command(capsys):
    text = info.as_text(info.report()) + "\n"
    assert printed(capsys) == printed(capsys, "info") == text
    for arguments in (["--json"], ["info", "--json"], ["--json", "info"]):
        assert json.loads(printed(capsys, *arguments)) == info.report()


def test_bench_has_its_own_options(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["bench", "--device", "cuda", "nonsense"])
    assert stop.value.code == 2
    assert "nonsense: no such name; choose from a, b, c" in capsys.readouterr().err


def test_help_states_what_score_gives_for_absent_classes(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["score", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "A class that is predicted but absent from the labels, or there but not" in text
    assert "neither file, which only --classes lists, has nan" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [["nonsense"], ["score", "a.npy"], ["score", "--classes=x"]])
def test_wrong_arguments_are_refused_by_argparse(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(arguments)
    assert stop.value.code == 2
    assert "usage: dice_core" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-W", "error", "-m", "dice_core"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
