"""Steps of dice_core with one thread and with all, on cores that are free and on cores that other
processes use too, as the workers of a DataLoader do.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from .cases import Case
from .devices import DEVICES
from .implementations import IMPLEMENTATIONS
from .measure import SAMPLE, Settings, rounds
from .results import CaseResult, Measurement

SETTLE = 0.05  # seconds until the scheduler has taken notice of what runs
# Computes while the last byte that it has read is 1. Its input ends with the process that started
# it, however that ends, and so does it.
NEIGHBOUR = """
import os, sys, threading
busy = threading.Event()
def listen():
    while byte := os.read(0, 1):
        busy.set() if byte == b"1" else busy.clear()
    os._exit(0)
threading.Thread(target=listen).start()
os.write(1, b"ready")
while busy.wait():
    for _ in range(10_000):
        pass
"""


@contextmanager
def neighbours(count: int) -> Iterator[Callable[[bool], None]]:
    """So many processes, which end with the context; the function makes them busy, or idle."""
    command = sys.executable, "-S", "-c", NEIGHBOUR
    started: list[subprocess.Popen[bytes]] = []

    def switch(busy: bool) -> None:
        for process in started:
            assert process.stdin is not None
            process.stdin.write(b"1" if busy else b"0")
        time.sleep(SETTLE)

    try:
        for _ in range(count):
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe))
        for process in started:
            assert process.stdout is not None
            process.stdout.read(1)
        yield switch
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


def times(case: Case, names: Sequence[str], settings: Settings) -> CaseResult:
    """Medians of rounds; each runs everything on free cores, and again on busy ones."""
    device = DEVICES[settings.device]
    inputs = device.inputs(*case.tensors(settings.labels))
    steps = {name: IMPLEMENTATIONS[name].step(inputs, case.shape[1]) for name in names}
    torch.set_num_threads(settings.threads)
    slowest = max(device.seconds(step, 1)["step"] for step in steps.values())
    repeats = math.ceil(SAMPLE / slowest)
    threads = {"one": 1, "all": settings.threads}
    order = [(name, number) for name in names for number in threads]
    samples: dict[tuple[str, str], list[float]] = {}
    done = 0
    with neighbours(settings.busy) as switch:
        for done in rounds(settings):
            for busy in (False, True):
                switch(busy)
                random.Random(done).shuffle(order)
                for name, number in order:
                    torch.set_num_threads(threads[number])
                    device.seconds(steps[name], 1)  # with the threads that it has from now on
                    what = f"{number} busy" if busy else number
                    seconds = device.seconds(steps[name], repeats)["step"]
                    samples.setdefault((name, what), []).append(seconds)
    rows: dict[str, Measurement] = {name: {"notes": []} for name in names}
    for (name, what), found in samples.items():
        rows[name][what] = median(found)
    return CaseResult(str(case), rows, done + 1, len(inputs), case.logits_bytes())
