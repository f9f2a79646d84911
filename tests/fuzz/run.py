"""Makes the calls, counts their outcomes and prints the failures."""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from . import array_calls, compat_calls, torch_calls
from .cases import Case, Skip
from .judge import is_ours, refused

CALLS: tuple[tuple[Callable[[Case], None], int], ...] = (
    (array_calls.loss, 20),
    (array_calls.loss_and_grad, 30),
    (array_calls.statistics, 12),
    (array_calls.gradient, 12),
    (array_calls.score, 6),
    (array_calls.precompile, 2),
    (array_calls.diagnose, 6),
    (array_calls.absurd, 1),
    (torch_calls.torch_loss, 14),
    (torch_calls.torch_statistics, 8),
    (torch_calls.module, 10),
    (torch_calls.supervision, 2),
    (torch_calls.metric, 4),
    (torch_calls.second_derivative, 1),
    (compat_calls.compat, 16),
)


def call(seed: int, index: int) -> tuple[str, str]:
    """The outcome of one call, and what is wrong with it, if anything."""
    case = Case(seed, index)
    function = case.random.choices([f for f, _ in CALLS], [weight for _, weight in CALLS])[0]
    with warnings.catch_warnings(), np.errstate(all="warn", under="ignore"):
        warnings.simplefilter("error")
        try:
            function(case)
            case.check_memory()
            outcome = "right" if not case.reasons else f"accepted: {case.reasons[0]}"
        except Skip as reason:
            outcome = f"accepted: {reason}"
        except Exception as error:
            try:
                if isinstance(error, AssertionError) and not is_ours(error):
                    raise
                outcome = refused(case, error)
                case.check_memory()
            except AssertionError as failure:
                return failed(case, function, seed, index, failure)
    return f"{function.__name__}: {outcome}", ""


def failed(
    case: Case, function: Callable[[Case], None], seed: int, index: int, error: Exception
) -> tuple[str, str]:
    """The outcome of a failed call, and how to repeat it."""
    text = str(error) or repr(error)
    details = "\n    ".join(case.text)
    return f"{function.__name__}: FAILED", (
        f"python -m tests.fuzz --seed {seed} --only {index}\n"
        f"  {function.__name__}: {text}\n    {details}"
    )


def calls(seed: int, indices: range) -> tuple[collections.Counter[str], list[str]]:
    """Counts by outcome, and failures."""
    torch.set_num_threads(2)
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    for index in indices:
        outcome, failure = call(seed, index)
        counts[outcome] += 1
        if failure:
            failures.append(failure)
            if len(failures) > 100:
                break
    return counts, failures


def _calls(job: tuple[int, range]) -> tuple[collections.Counter[str], list[str]]:
    return calls(*job)


def main() -> int:
    """Runs the calls and prints counts by outcome; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, help="the index of the only call to make")
    options = parser.parse_args()
    if options.only is not None:
        outcome, failure = call(options.seed, options.only)
        print(failure or outcome)
        return bool(failure)
    start, counts, failures = time.monotonic(), collections.Counter[str](), []
    step = 500
    jobs = [(options.seed, range(i, min(i + step, options.n))) for i in range(0, options.n, step)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for some, wrong in pool.imap_unordered(_calls, jobs):
            counts += some
            failures += wrong
            for failure in wrong:
                print(failure, flush=True)
    total: collections.Counter[str] = collections.Counter()
    for outcome, count in counts.items():
        total[outcome.partition(": ")[2]] += count
    for outcome, count in sorted(total.items()):
        print(f"{count:9,}  {outcome}")
    for outcome, count in sorted(counts.items()):
        print(f"{count:9,}  {outcome}")
    seconds = time.monotonic() - start
    print(f"{sum(total.values()):,} calls with seed {options.seed} in {seconds:.0f} s")
    return bool(failures)
