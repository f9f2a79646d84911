"""Work in a process of its own, so that nothing one measurement leaves behind reaches the next."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class ProcessDied(RuntimeError):
    """The process ended before its work did, for want of memory perhaps."""


def fresh(work: Callable[..., Iterator[Any]], *arguments: Any, spawn: bool) -> Iterator[Any]:
    """What the generator function yields, run in a new process, a fork unless `spawn`.

    Raises ProcessDied if that ends by a signal or an exception.
    """
    context: Any = multiprocessing.get_context("spawn" if spawn else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
    finally:
        process.kill()
    if process.exitcode:
        raise ProcessDied(f"its process ended with exit code {process.exitcode}")


def _run(sender: Connection, work: Callable[..., Iterator[Any]], arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent is interrupted, and ends it
    for message in work(*arguments):
        sender.send(message)
