"""The command line, `dice_core` or `python -m dice_core`: what is usable on this machine, the
benchmark, and the scores of label files.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import info, score_files


def parser() -> argparse.ArgumentParser:
    """The command line, but for the options of `bench`."""
    result = argparse.ArgumentParser(
        prog="dice_core", description=__doc__, epilog="Without a command, dice_core does info."
    )
    for_bug_reports = "print JSON, for scripts and bug reports"
    result.add_argument("--json", action="store_true", help=for_bug_reports)
    commands = result.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    about = "report the backends and why any is unavailable, the CPU, threads and versions"
    add = commands.add_parser("info", help=about, description=info.__doc__).add_argument
    add("--json", action="store_true", default=argparse.SUPPRESS, help=for_bug_reports)

    about = "measure time and peak memory beside other libraries (its own options: bench --help)"
    commands.add_parser("bench", help=about, add_help=False)

    add = commands.add_parser(
        "score",
        help="print Dice and IoU of each class for two files of labels",
        description=score_files.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_argument
    add("prediction", metavar="PREDICTION", help="the predicted labels: .nii, .nii.gz, .npy, .npz")
    add("labels", metavar="LABELS", help="the true labels, of the same shape")
    about = "leave out the voxels that have this label in LABELS"
    add("--ignore-label", type=int, metavar="L", help=about)
    about = "the classes to list, such as 1,2,205; by default all that are found in either file"
    add("--classes", type=_integers, metavar="LIST", help=about)
    about = "print JSON; a score that is not a number is null"
    add("--json", action="store_true", default=argparse.SUPPRESS, help=about)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        from .bench.__main__ import main as bench  # which reads its options itself

        bench(arguments[1:])
        return
    line = parser()
    options = line.parse_args(arguments)
    if options.command != "score":
        facts = info.report()
        _print(json.dumps(facts, indent=2) if options.json else info.as_text(facts))
        return
    try:
        scores = score_files.scores(
            options.prediction, options.labels, options.ignore_label, options.classes
        )
    except score_files.Refused as reason:
        line.exit(2, f"dice_core score: {reason}\n")
    _print(score_files.as_json(scores) if options.json else score_files.as_text(scores))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,205") from None


if __name__ == "__main__":
    main()
