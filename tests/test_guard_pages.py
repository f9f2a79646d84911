"""Kernels between unreadable pages; `guard_pages.py` makes the calls, in a process that may die."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and mprotect")

ROOT = Path(__file__).parents[1]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_kernels_stay_inside_their_arrays():
    code, out, error = run("-m", "tests.guard_pages", "--n", "1500", "--seed", "1")
    assert code == 0, error
    assert "1,500 calls" in out
    counts = {name: int(n.replace(",", "")) for n, name in re.findall(r" *([\d,]+) (.+)\n", out)}
    assert counts["compared with the reference"] > 1000
    for kind in ("sums", "gradient", "in place", "score"):
        assert counts[kind] > 250


FAULTS = """
import ctypes, os, sys
sys.path.insert(0, "tests")
import guard_pages
pages = guard_pages.Pages()

def read(first, offset):
    ctypes.string_at(first + offset, 1)

def write(first, offset):
    ctypes.memset(first + offset, 0, 1)

def write_input(first, offset):
    pages.writable(False)
    ctypes.memset(first + offset, 0, 1)

def outcome(fault, first, offset):
    child = os.fork()
    if child == 0:
        fault(first, offset)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for sign in (1, -1):
    for at_end, outside in ((True, 30), (False, -1)):
        a = pages.array((3, 5), [5 * sign, sign], "int16", at_end)
        first = a.ctypes.data if sign > 0 else a.ctypes.data - 28
        inside = [outcome(fault, first, at) for fault in (read, write) for at in (0, 29)]
        beyond = [outcome(fault, first, outside) for fault in (read, write)]
        print(*inside, *beyond, outcome(write_input, first, 0))
"""


def test_one_byte_beyond_an_array_is_deadly():
    code, out, error = run("-c", FAULTS)
    assert code == 0, error
    dies = -signal.SIGSEGV
    assert out.splitlines() == [f"0 0 0 0 {dies} {dies} {dies}"] * 4


@pytest.mark.parametrize(
    ("fault", "end"),
    [("os.kill(os.getpid(), 11)", "died of signal 11"), ("raise AssertionError", "failed")],
)
def test_a_fatal_call_can_be_repeated(fault, end):
    program = f"""
import os, sys
sys.path.insert(0, "tests")
import guard_pages
sys.argv = ["guard_pages", "--n", "9", "--seed", "3"]
class Case(guard_pages.Case):
    def __init__(self, seed, number, pages):
        super().__init__(seed, number, pages)
        if number == 5:
            {fault}
guard_pages.Case = Case
sys.exit(guard_pages.main())
"""
    code, _, error = run("-c", program)
    assert code == 1
    assert f"call 5 {end}; to repeat it: " in error
    assert "python -m tests.guard_pages --seed 3 --first 5 --n 1\n" in error
