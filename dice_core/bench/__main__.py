"""Time and peak memory of the Dice loss and its gradient: dice_core beside the installed peers,
and the least that the memory of this machine, or of its GPU, allows.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from .. import threads
from . import cases, implementations

QUICK_CASES, QUICK_SIDE = ("a", "d"), 32
PICTURES = (".png", ".svg", ".pdf")
EXTRA = 'pip install "dice_core[bench]"'

EXPLANATION = """\
time         Of a step: forward, then backward into a fresh gradient, as torch does by default.
             Everything runs once per round, in changing order, in one process per case; medians.
             Warm-up and torch.compile come before the rounds.
memory       Growth of a fresh process over one step (peak) and what its forward leaves for backward
             (kept), in units of the logits' bytes.
floor        Forward: the time to read logits and labels. Step: that, then reading the labels again
             and copying the logits. Measured in the same rounds by the same threads.
cuda         Time is the device's, by events around each phase, the host about 10 ms ahead; the
             host's, what it takes to enqueue a step, is told beside it. Steps take copies of the
             input in turns, together larger than the L2 cache. Memory is what torch's allocator
             hands out.
environment  It decides what a fresh tensor costs. By default glibc maps a large one anew and every
             page of it faults. With freed memory used again, everybody is faster:
             GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
             The report says what is set.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [f"  {case.name:<14} {case}" for case in cases.CASES.values()]
    rows = [f"  {row.name:<14} {row.title}" for row in implementations.IMPLEMENTATIONS.values()]
    result = argparse.ArgumentParser(
        prog="python -m dice_core.bench",
        description=__doc__,
        epilog="\n".join(["cases:", *names, "", "implementations:", *rows, "", EXPLANATION]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    large = ", ".join(cases.GPU_SIZED)
    text = f"names from the list below (default: all; {large} only on cuda)"
    add("cases", nargs="*", metavar="CASE", help=text)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--only", metavar="NAMES", help="implementations from the list below, commas between")
    add("--labels", choices=cases.LABELS, default="int64", help="dtype (default: %(default)s)")
    add("--threads", type=_count, metavar="N", help="default: OMP_NUM_THREADS, else all cores")
    add("--rounds", type=_count, metavar="N", help="at most so many (default: 30)")
    add("--budget", type=_seconds, metavar="S", help="seconds of rounds, 5 at least (default: 20)")
    add("--quick", action="store_true", help="cases a and d, small; 3 rounds; no torch.compile")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--no-memory", action="store_true", help="measure time alone")
    add("--json", type=_file, metavar="FILE", help="write everything, times in seconds")
    add("--markdown", type=_file, metavar="FILE", help="write the summary; - prints it")
    add("--plot", type=_picture, metavar="FILE", help="draw it (.png, .svg or .pdf)")
    return result


def main() -> None:
    """Runs what the command line asks for."""
    line = parser()
    options = line.parse_args()
    try:
        default = QUICK_CASES if options.quick else cases.default(options.device)
        chosen = cases.named(options.cases or default)
        only = options.only.split(",") if options.only else implementations.of(options.device)
        rows = implementations.named(only)
    except ValueError as error:
        line.error(str(error))
    if options.quick:
        chosen = [case.with_sides(QUICK_SIDE) for case in chosen]
    if options.no_compile or (options.quick and not options.only):
        rows = [row for row in rows if not row.compiled]
    if not rows:
        line.error("--no-compile leaves nothing of --only")
    elsewhere = [row.name for row in rows if row.device not in (None, options.device)]
    if elsewhere:
        line.error(f"{', '.join(elsewhere)} cannot be measured on {options.device}")

    try:  # only now: these imports take seconds
        from rich.console import Console

        from . import plot, run, summary, tables
        from .device import DEVICES
        from .measure import Settings
    except ModuleNotFoundError as error:
        line.exit(1, f"{line.prog} needs {error.name}: {EXTRA}\n")
    reason = DEVICES[options.device].unusable()
    if reason:
        line.exit(1, f"--device {options.device}: {reason}\n")
    settings = Settings(
        device=options.device,
        memory=not options.no_memory,
        labels=options.labels,
        threads=options.threads or threads.resolve(None),
        rounds=options.rounds or (3 if options.quick else 30),
        budget=options.budget or (1.0 if options.quick else 20.0),
    )
    report = run.report(chosen, rows, settings)
    if not report.cases:
        line.exit(1, "\n".join([*tables.heading(report), "nothing was measured\n"]))

    if options.json:
        options.json.write_text(json.dumps(summary.as_json(report), indent=2) + "\n")
    if options.plot:
        plot.save(report, options.plot)
    if options.markdown and str(options.markdown) != "-":
        options.markdown.write_text(tables.markdown(report))
    if str(options.markdown) == "-":
        print(tables.markdown(report), end="")
    else:
        tables.show(report, Console())


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _picture(text: str) -> Path:
    if not text.endswith(PICTURES):
        raise argparse.ArgumentTypeError(f"{text} does not end in {', '.join(PICTURES)}")
    return _file(text)


if __name__ == "__main__":
    main()
