"""What tests/test_processes.py does to a process: each function here runs in one of its own.

``python tests/processes.py memory 100000`` runs one by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import dice_core
from dice_core import backends, buffers, calls, spec, threads

LIMIT = 20  # seconds for a forked process, which is killed then


def volume() -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels with enough work for 16 threads."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, 64, 64, 64), np.float32)
    return x, rng.integers(0, 2, (2, 64, 64, 64), np.uint8)


def digest(num_threads: int | None = None) -> str:
    """Of a loss and its gradient."""
    value, grad = dice_core.loss_and_grad(*volume(), num_threads=num_threads)
    return hashlib.sha256(value.tobytes() + grad.tobytes()).hexdigest()


def digest_of_kernels(num_threads: int) -> str:
    """Of the sums, from the kernels themselves."""
    x, y = volume()
    logits, labels = buffers.of(x, "x"), buffers.of(y, "y")
    call = spec.signature(logits.layout, labels.layout, spec.checked())
    sums = np.empty(call.sums_shape)
    kernels = backends.select(call)
    kernels.statistics(logits, labels, buffers.of(sums, "sums"), call.spec, num_threads)
    return hashlib.sha256(sums.tobytes()).hexdigest()


def running() -> int:
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


def started(num_threads: int) -> int:
    """By how many threads a call makes this process larger."""
    before = running()
    digest(num_threads)
    return running() - before


def forked(function: Callable[[], bool]) -> None:
    """Asserts that the function returns True in a forked process, in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork where there are threads
        child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        right = False
        try:
            right = function()
        finally:
            os._exit(0 if right else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the forked process ended with status {status}"


# ---- fork --------------------------------------------------------------------------------------


def fork() -> None:
    """Of a process that has run on two threads, and of its child."""
    expected, sums = digest(1), digest_of_kernels(1)
    assert started(2) > 0

    def child() -> bool:
        return (
            digest(2) == digest(3) == digest() == expected
            and digest_of_kernels(2) == sums
            and running() == 1
        )

    def parent() -> bool:
        forked(child)
        return child()

    forked(parent)
    assert digest(2) == expected


def fork_during_a_call() -> None:
    expected, stop = digest(2), threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            digest(2)

    other = threading.Thread(target=repeat)
    other.start()
    try:
        for _ in range(5):
            time.sleep(0.02)
            forked(lambda: digest(2) == expected)
    finally:
        stop.set()
        other.join()


def pool(method: str) -> None:
    """multiprocessing.Pool, of a process that has run on two threads."""
    expected = digest(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        workers = multiprocessing.get_context(method).Pool(2)
    with workers:
        assert workers.map_async(digest, [None, 1, 2, 5]).get(LIMIT) == [expected] * 4


def server() -> None:
    """A fork server has imported the package but used no threads: its children may use them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "dice_core"])
    with context.Pool(1) as workers:
        assert workers.apply_async(started, [4]).get(LIMIT) == 3


def benchmark() -> None:
    """The processes in which the benchmark measures may use threads."""
    from dice_core.bench.run import in_fresh_process

    digest(1)  # loads the kernels
    assert [in_fresh_process(False, started, 2) for _ in range(8)] == [1] * 8


def with_torch() -> None:
    """torch has used the OpenMP runtime that the kernels use, before they were loaded."""
    import torch
    from torch.utils.data import DataLoader

    import dice_core.torch

    torch.set_num_threads(2)
    before = running()
    torch.ones(1 << 22).exp()
    assert running() > before

    def child() -> bool:
        return digest(2) == digest(1) and running() == 1

    forked(child)
    expected = digest(2)
    for _ in range(2):  # the second time after a call with autograd
        counts: Any = [None, 1, 2, 5]
        data: Any = DataLoader(
            counts, 2, num_workers=2, collate_fn=_digests, multiprocessing_context="fork"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert [item for batch in data for item in batch] == [expected] * 4
        x, y = map(torch.from_numpy, volume())
        dice_core.torch.loss(x.requires_grad_(), y).backward()


def _digests(counts: list[int | None]) -> list[str]:
    signal.alarm(LIMIT)
    return [digest(count) for count in counts]


# ---- interpreters, threads and limits ----------------------------------------------------------


def subinterpreter() -> None:
    """Calls after a subinterpreter exists, and in it."""
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    interpreters = importlib.import_module(name)
    other = interpreters.create()
    assert digest(2) == digest(1)
    program = f"import sys; sys.path[:] = {sys.path}; {IN_SUBINTERPRETER}"
    assert interpreters.run_string(other, program) is None
    assert digest(2) == digest(1)


IN_SUBINTERPRETER = """
try:
    import numpy, numpy.random
except (ImportError, RuntimeError):
    pass  # NumPy refuses
else:
    import dice_core, processes
    try:
        assert processes.digest(2) == processes.digest(1)
    except dice_core.BackendError as error:
        assert "one interpreter per process" in str(error)
"""


def processes_limit() -> None:
    """RLIMIT_NPROC, which root ignores; with it gone, threads are used again."""
    expected = digest(1)
    if os.getuid() == 0:
        os.setuid(1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    before = running()
    assert digest(2) == digest(16) == expected
    assert running() == before
    resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    assert digest(16) == expected
    assert running() > before


def memory_limit() -> None:
    """RLIMIT_AS: no memory for the stacks of threads, then none for scratch."""
    expected = digest(1)
    x, y = np.zeros((1, 1 << 20, 1), np.float32), np.zeros((1, 1), np.uint8)
    call = calls.call(x, y, spec.checked())
    cotangent, grad = np.zeros(call.shape), buffers.of(x, "out")
    with open("/proc/self/statm") as sizes:
        size = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20), resource.RLIM_INFINITY))
    before = running()
    assert digest(16) == expected
    assert running() == before
    raised: type[BaseException] | None = None
    try:
        call.gradient(cotangent, None, grad)
    except MemoryError as error:
        raised = type(error)
    assert raised is MemoryError  # not NumPy's subclass of it
    assert digest(1) == expected


def group_limit(folder: str) -> None:
    """No more threads than a control group allows."""
    expected = digest(1)
    with open(os.path.join(folder, "cgroup.procs"), "w") as members:
        members.write("0")
    for count in (2, 4, 8, 16):
        assert digest(count) == expected


def quota(folder: str) -> None:
    """Of one core, for a process in a control group."""
    with open(os.path.join(folder, "cgroup.procs"), "w") as members:
        members.write("0")
    assert threads.available_cores() == threads.resolve(None) == 1
    assert digest() == digest(4)


def cores() -> None:
    """One core, 16 threads on it, and calls from several threads at once."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert threads.resolve(None) == 1
    expected = digest()
    assert digest(16) == expected
    found: list[str] = []
    callers = [threading.Thread(target=lambda: found.append(digest(4))) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [expected] * 8


def environment() -> None:
    """Whatever the variables of OpenMP are."""
    expected = digest(1)
    assert digest(2) == digest(16) == digest() == digest(3) == expected
    found: list[str] = []
    call = threading.Thread(target=lambda: found.append(digest(5)))
    call.start()
    call.join()
    assert found == [expected]


# ---- signals -----------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Sends SIGINT after so many seconds, and asserts that the call ends at once."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        delay = time.monotonic() - sent[0]
        assert delay < 1, f"the call ended {delay:.2f} s after the signal"
        print(f"{delay:.3f} s")
    else:
        raise AssertionError("the call was not interrupted")
    finally:
        timer.join()


def interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    expected = digest(1)
    # some 15 seconds of work, in a few bytes
    x = np.broadcast_to(np.float32(0.5), (8, 2, 512, 512, 512))
    y = np.broadcast_to(np.uint8(1), (8, 512, 512, 512))
    for count in (1, 2, 5):
        with interrupted(0.3):
            dice_core.loss(x, y, num_threads=count)
        assert digest(count) == expected
    with interrupted(0.3):
        dice_core.statistics(x, y, num_threads=2)

    # in place: what was not reached stays as it was
    term = dice_core.losses.SigmoidFocal(gamma=1.3)
    x = np.full((1, 2, 1 << 25), 0.5, np.float16)
    y = np.ones((1, 1 << 25), np.uint8)
    sums = dice_core.statistics(x[..., :1000], y[..., :1000], binary_gamma=1.3)
    with interrupted(0.1):  # on the slowest level, which takes a second
        dice_core.gradient(x, y, sums, term=term, out=x, num_threads=1, backend="cpu")
    assert x[0, 0, 0] != 0.5
    assert x[0, 1, -1] == 0.5
    assert digest(2) == expected

    # a handler that raises nothing
    handled: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    expected = dice_core.loss(x, y, term, num_threads=1)
    while len(handled) < 3:
        assert dice_core.loss(x, y, term, num_threads=2) == expected
    signal.setitimer(signal.ITIMER_REAL, 0)


# ---- memory ------------------------------------------------------------------------------------


def memory(count: int) -> None:
    """The resident memory does not grow with the number of calls, refused ones included."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 2, 64, 512)).astype(np.float32)  # work for two threads
    y = rng.integers(0, 2, (1, 64, 512), np.uint8)
    bad = np.full_like(y, 7)

    def call(i: int) -> None:
        if i % 8 == 0:
            with contextlib.suppress(ValueError):
                dice_core.loss(x, bad, num_threads=2)
        elif i % 8 == 1:
            dice_core.loss(x, y, dice_core.losses.Dice() + dice_core.losses.CrossEntropy())
        else:
            dice_core.loss_and_grad(x, y, num_threads=1 + i % 2)

    def resident() -> int:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[1]) * resource.getpagesize()

    for i in range(1000):
        call(i)
    before = resident()
    for i in range(count):
        call(i)
    growth = resident() - before
    print(f"{count} calls: {growth / 1024:.0f} KiB more than after the first 1000")
    assert growth < 1 << 20


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    partial(globals()[name], *(int(a) if a.isdecimal() else a for a in arguments))()
