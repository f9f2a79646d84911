"""threads: the number of threads that a call uses."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dice_core
import dice_core.torch
from dice_core import _cpu, backends, threads

CGROUP_QUOTA = threads._cgroup_quota  # the fixture below replaces it


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Twelve cores, no quota, nothing in the environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: None)
    threads._omp_num_threads.cache_clear()
    yield
    threads._omp_num_threads.cache_clear()


# ---- precedence --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [1, 5, 64, np.int64(7)], ids=str)
def test_the_argument_comes_first(monkeypatch, given):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.resolve(given) == given


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("3", 3), ("100", 100), ("4,2", 4), (" 5 ", 5), ("6 , 2", 6)],
)
def test_the_environment_comes_second(monkeypatch, variable, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads.resolve(None) == expected


@pytest.mark.parametrize("variable", ["abc", "0", "", " ", "-1", "1.5", ",2", "0,2", "²"])
def test_an_unusable_environment_is_passed_over(monkeypatch, variable):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads.resolve(None) == 12


def test_the_available_cores_come_last():
    assert threads.resolve(None) == threads.available_cores() == 12


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (0, ValueError, "num_threads must be at least 1, got 0"),
        (-2, ValueError, "num_threads must be at least 1, got -2"),
        (True, TypeError, "num_threads must be an integer, got bool"),
        (1.5, TypeError, "num_threads must be an integer, got float"),
        ("2", TypeError, "num_threads must be an integer, got str"),
    ],
    ids=repr,
)
def test_refused(given, error, text):
    with pytest.raises(error) as caught:
        threads.resolve(given)
    assert str(caught.value) == text


# ---- available cores ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        ({0, 5, 7}, None, 3),
        ({0, 5, 7}, 2.0, 2),
        ({0, 5, 7}, 1.5, 2),
        ({0, 5, 7}, 0.25, 1),
        ({0, 5, 7}, 64.0, 3),
        ({9}, 4.0, 1),
    ],
)
def test_cores_are_bounded_by_affinity_and_quota(monkeypatch, affinity, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)
    assert threads.available_cores() == expected


@pytest.mark.parametrize(("count", "expected"), [(7, 7), (None, 1)], ids=["known", "unknown"])
def test_cores_where_there_is_no_affinity(monkeypatch, count, expected):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert threads.available_cores() == expected


# ---- control groups ----------------------------------------------------------------------------


@pytest.fixture
def quota(tmp_path):
    """Writes a tree of files and the process's groups, and reads the quota."""

    def read(membership, files):
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        proc = tmp_path / "cgroup"
        if membership is not None:
            proc.write_text(membership)
        return CGROUP_QUOTA(tmp_path / "fs", proc)

    return read


V2 = {
    "own": ("0::/job\n", {"job/cpu.max": "150000 100000"}, 1.5),
    "root": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
    "parent_is_smaller": ("0::/a/b\n", {"a/cpu.max": "2000 1000", "a/b/cpu.max": "9000 1000"}, 2),
    "child_is_smaller": ("0::/a/b\n", {"a/cpu.max": "9000 1000", "a/b/cpu.max": "3000 1000"}, 3),
    "parent_has_the_only_one": ("0::/a/b\n", {"a/cpu.max": "2000 1000", "a/b/cpu.max": "max 7"}, 2),
    "group_lies_outside_the_mount": ("0::/docker/1\n", {"cpu.max": "4000 1000"}, 4),
    "another_group_s": ("0::/a\n", {"b/cpu.max": "1000 1000"}, None),
    "max": ("0::/a\n", {"a/cpu.max": "max 100000"}, None),
    "nothing_there": ("0::/a\n", {}, None),
    "empty_file": ("0::/a\n", {"a/cpu.max": ""}, None),
}
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"
V1_GROUPS = "5:memory:/m\n4:cpu,cpuacct:/a/b\n1:name=systemd:/s\n"
V1 = {
    "own": (V1_GROUPS, {f"cpu/a/b/{QUOTA}": 3000, f"cpu/a/b/{PERIOD}": 2000}, 1.5),
    "parent": (V1_GROUPS, {f"cpu/a/{QUOTA}": 6000, f"cpu/a/{PERIOD}": 2000}, 3),
    "mount": (V1_GROUPS, {f"cpu/{QUOTA}": 8000, f"cpu/{PERIOD}": 2000}, 4),
    "unlimited": (V1_GROUPS, {f"cpu/a/b/{QUOTA}": -1, f"cpu/a/b/{PERIOD}": 2000}, None),
    "no_period": (V1_GROUPS, {f"cpu/a/b/{QUOTA}": 3000}, None),
    "another_controller_s": ("5:memory:/m\n", {f"cpu/m/{QUOTA}": 1, f"cpu/m/{PERIOD}": 1}, None),
}
HYBRID = (
    f"{V1_GROUPS}0::/job\n",
    {f"cpu/a/b/{QUOTA}": 6000, f"cpu/a/b/{PERIOD}": 2000, "job/cpu.max": "2000 1000"},
    2,
)
NO_PROC = (None, {"cpu.max": "1000 1000"}, None)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [*V2.values(), *V1.values(), HYBRID, NO_PROC],
    ids=[*(f"v2-{name}" for name in V2), *(f"v1-{name}" for name in V1), "both", "no_proc"],
)
def test_cgroup_quota(quota, membership, files, expected):
    assert quota(membership, files) == expected


# ---- the number passed to backends -------------------------------------------------------------


@pytest.fixture
def passed(monkeypatch):
    """The numbers of threads passed to backends, in order."""
    record = []

    def statistics(logits, labels, sums, spec, count):
        np.asarray(sums)[:] = 1
        record.append(count)

    def gradient(logits, labels, cotangent, grad, spec, count):
        np.asarray(grad)[:] = 0
        record.append(count)

    kernels = SimpleNamespace(statistics=statistics, gradient=gradient)
    monkeypatch.setattr(backends, "select", lambda signature, name: kernels)
    return record


@pytest.fixture
def torch_threads():
    """A torch setting that differs from every other default."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    yield before + 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("given", [None, 3], ids=["default", "given"])
def test_torch_uses_its_own_setting_unless_told(passed, torch_threads, given):
    x = torch.zeros(1, 2, 4, requires_grad=True)
    y = torch.zeros(1, 4, dtype=torch.uint8)
    dice_core.torch.loss(x, y, num_threads=given).backward()
    assert passed == [given or torch_threads] * 2


@pytest.mark.parametrize(("given", "expected"), [(None, 12), (3, 3)], ids=["default", "given"])
def test_arrays_use_the_available_cores_unless_told(passed, given, expected):
    x, y = np.zeros((1, 2, 4), np.float32), np.zeros((1, 4), np.uint8)
    dice_core.loss_and_grad(x, y, num_threads=given)
    sums = dice_core.statistics(x, y, num_threads=given)
    dice_core.gradient(x, y, sums, num_threads=given)
    assert passed == [expected] * 4


COUNT_THREADS = """
import os, numpy as np, dice_core
x, y = np.zeros((1, 2, 200_000), np.float32), np.zeros((1, 200_000), np.uint8)
before = len(os.listdir("/proc/self/task"))
dice_core.loss(x, y, num_threads={})
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.skipif(not _cpu.openmp()[0], reason="built without OpenMP")
@pytest.mark.parametrize("count", [1, 3])
def test_as_many_threads_run_as_asked_for(count):
    command = sys.executable, "-c", COUNT_THREADS.format(count)
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout) == count - 1  # beside the caller's own
