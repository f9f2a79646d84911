"""Processes, threads, signals and the limits of the machine: each scenario in a process of its own,
with a time limit.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest

from dice_core import _cpu

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux's /proc, fork and limits"
)
LIMIT = 60  # seconds, many times what is needed
CGROUPS = Path("/sys/fs/cgroup")


def run(scenario: str, *arguments: object, **environment: str) -> str:
    """What the scenario printed; asserts that it ended well, in time."""
    done = subprocess.run(
        [sys.executable, processes.__file__, scenario, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize(
    "scenario",
    [
        "fork",
        "fork_during_a_call",
        "server",
        "benchmark",
        "processes_limit",
        "memory_limit",
        "cores",
        "interrupt",
    ],
)
def test_process(scenario):
    run(scenario)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool(method):
    run("pool", method)


def test_fork_after_torch_has_used_the_same_openmp_runtime():
    run("with_torch", LD_PRELOAD=_cpu.openmp()[1])


def test_subinterpreter():
    run("subinterpreter")


@pytest.mark.parametrize(
    "variables",
    [
        "OMP_NUM_THREADS=junk OMP_SCHEDULE=junk OMP_PLACES=junk OMP_STACKSIZE=junk",
        "OMP_NUM_THREADS=-1 OMP_STACKSIZE=-1 OMP_THREAD_LIMIT=-1 OMP_MAX_ACTIVE_LEVELS=-1",
        "OMP_NUM_THREADS=99999999999 OMP_STACKSIZE=99999999999999999G OMP_PROC_BIND=close",
        "OMP_DYNAMIC=true OMP_CANCELLATION=true OMP_WAIT_POLICY=active OMP_NESTED=true",
        "OMP_THREAD_LIMIT=3 OMP_PROC_BIND=spread OMP_STACKSIZE=1M",
        "OMP_THREAD_LIMIT=1 OMP_STACKSIZE=1",
        "OMP_MAX_ACTIVE_LEVELS=0",
        "OMP_STACKSIZE=1000G",
    ],
)
def test_environment(variables):
    run("environment", **dict(pair.split("=") for pair in variables.split()))


def test_memory_does_not_grow():
    run("memory", 5000)


# ---- control groups ----------------------------------------------------------------------------


@contextlib.contextmanager
def group(controller: str, **limits: object) -> Iterator[Path]:
    """A new control group of version 1 with these limits; skips where none can be made."""
    folder = CGROUPS / controller / f"dice_core_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    try:
        for name, value in limits.items():
            (folder / f"{controller}.{name}").write_text(str(value))
        yield folder
    finally:
        folder.rmdir()


def test_quota():
    with group("cpu", cfs_period_us=100_000, cfs_quota_us=100_000) as folder:
        run("quota", folder)


def test_limit_on_processes():
    with group("pids", max=8) as folder:
        run("group_limit", folder)
