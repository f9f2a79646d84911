"""Time and peak memory of the Dice loss and its gradient: dice_core beside the installed peers and
the floor, the least time that the memory of this machine or its GPU allows. With --step, whole
training steps of networks instead: the network, the loss and the backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .. import threads
from . import results, tables
from .cases import CASES, GPU_SIZED, STEPS
from .implementations import IMPLEMENTATIONS

QUICK_CASES, QUICK_SIDE = ("a", "d"), 32
BUSY_ROWS = ("ours", "ours-out")  # measured with --busy
LOSS_ALONE = "e"  # measured beside whole steps, with these losses
MODELLED = ("h100", "h200", "a100")  # by --predict
PREDICTED = ("ours", "ours-ce")  # by default, of
PREDICTABLE = (*PREDICTED, "ours-focal")
LOSSES_ALONE = ("ours-ce", "ours-ce-inplace", "monai-ce", "nnunet-ce", "naive-ce")


PICTURE = """\
The picture in the documentation, and the numbers in it; --read draws it again from them:
  python -m dice_core.bench --step --json docs/images/step.json --plot docs/images/step.svg
  python -m dice_core.bench --read docs/images/step.json --plot docs/images/step.svg"""
PLOT_HELP = """draw a bar chart (.png, .svg or .pdf); of whole steps two, NAME-light and NAME-dark,
for pages with a light and a dark background"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [f"  {case.name:<20} {case}" for case in CASES.values()]
    rows = [f"  {name:<20} {row.title}" for name, row in IMPLEMENTATIONS.items()]
    result = argparse.ArgumentParser(
        prog="python -m dice_core.bench",
        description=__doc__,
        epilog="\n".join(
            ["cases:", *names, "", "implementations:", *rows, "", PICTURE, "", tables.LEGEND]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    large = ", ".join(GPU_SIZED)
    text = f"names from the list below (default: all but whole steps; {large} only on cuda)"
    add("cases", nargs="*", metavar="CASE", help=text)
    add("--step", action="store_true", help=f"whole training steps, and case {LOSS_ALONE} too")
    text = "voxels along each axis of the patch of whole steps, a multiple of 8 (default: 64)"
    add("--side", type=_side, metavar="N", help=text)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--only", metavar="NAMES", help="implementations from the list below, comma-separated")
    add("--labels", choices=("int64", "uint8"), default="int64", help="default: %(default)s")
    add("--threads", type=_count, metavar="N", help="default: OMP_NUM_THREADS, else all cores")
    add("--rounds", type=_count, metavar="N", help="at most N rounds of a case (default: 30)")
    add("--budget", type=float, metavar="S", help="seconds for the rounds of a case (default: 20)")
    text = "ours with one thread and with all, while N other processes use the cores, and without"
    add("--busy", type=_count, metavar="N", help=text)
    text = "cases a and d or, with --step, its cases, small; 3 rounds; no torch.compile"
    add("--quick", action="store_true", help=text)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--no-memory", action="store_true", help="measure time only")
    add("--json", type=_file, metavar="FILE", help="write all measurements, times in seconds")
    add(
        "--read", type=Path, metavar="FILE", help="measure nothing, show a report written by --json"
    )
    modelled = ", ".join(MODELLED)
    text = f"""with --device cuda, needs no GPU: the times that a model predicts from the kernels'
machine code for these GPUs, comma-separated, of {modelled} (default: all)"""
    add("--predict", nargs="?", const=",".join(MODELLED), type=_gpus, metavar="GPUS", help=text)
    add("--markdown", type=_file, metavar="FILE", help="write the printed report")
    add("--plot", type=_file, metavar="FILE", help=PLOT_HELP)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    line = parser()
    options = line.parse_args(arguments)
    quick, cuda = options.quick, options.device == "cuda"
    every = [name for name in CASES if name not in STEPS and (cuda or name not in GPU_SIZED)]
    only = options.only.split(",") if options.only else list(IMPLEMENTATIONS)
    if options.step:
        every = [*STEPS, LOSS_ALONE]
        if not options.only:
            only = [n for n, row in IMPLEMENTATIONS.items() if row.network or n in LOSSES_ALONE]
    elif quick:
        every = [*QUICK_CASES]
    if options.busy:
        if options.step or options.only or options.plot or cuda:
            line.error("--busy: not with --step, --only, --plot or --device cuda")
        only = [*BUSY_ROWS]
    if options.predict:
        if not cuda:
            line.error("--predict: only with --device cuda")
        if options.step or options.busy or options.read or options.json or options.plot:
            line.error("--predict: not with --step, --busy, --read, --json or --plot")
        only = only if options.only else [*PREDICTED]
        if unknown := ", ".join(name for name in only if name not in PREDICTABLE):
            line.error(f"--predict: not of {unknown}; --only {', '.join(PREDICTABLE)}")
    for chosen, table in ((options.cases, CASES), (only, IMPLEMENTATIONS)):
        if unknown := ", ".join(name for name in chosen if name not in table):
            line.error(f"{unknown}: no such name; choose from {', '.join(table)}")
    cases = [CASES[name] for name in dict.fromkeys(options.cases or every)]
    for option in ("busy", "predict"):
        if getattr(options, option) and (named := [case.name for case in cases if case.network]):
            line.error(f"--{option}: {named[0]} is a whole training step")
    if quick:
        cases = [case.with_sides(QUICK_SIDE) for case in cases]
    if options.side:
        cases = [case.with_side(options.side) if case.network else case for case in cases]
    if options.no_compile or (quick and not options.only):
        only = [name for name in only if not IMPLEMENTATIONS[name].compiled]
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        line.error(f"--plot: {options.plot} does not end in .png, .svg or .pdf")

    if options.predict:
        try:
            from . import prediction

            text = prediction.report(cases, only, options.labels, options.predict)
        except ModuleNotFoundError as error:
            line.exit(1, f'--predict needs {error.name}: pip install "dice_core[gpu]"\n')
        except (FileNotFoundError, RuntimeError) as error:  # no disassembler, no compiler
            line.exit(1, f"--predict: {error}\n")
        print(text, end="")
        if options.markdown:
            options.markdown.write_text(text)
        return

    try:  # imported late: these imports take seconds
        import torch

        from . import picture, plot, run
        from .measure import Settings
    except ModuleNotFoundError as error:
        line.exit(1, f'{line.prog} needs {error.name}: pip install "dice_core[bench]"\n')
    if options.read:
        report = results.read(options.read)
    elif cuda and not torch.cuda.is_available():
        why = "see `nvidia-smi`, and that torch is built with CUDA"
        line.exit(1, f"--device cuda: torch {torch.__version__} finds no NVIDIA GPU; {why}\n")
    else:
        settings = Settings(
            device=options.device,
            labels=options.labels,
            threads=options.threads or threads.resolve(None),
            rounds=options.rounds or (3 if quick else 30),
            budget=options.budget or (1.0 if quick else 20.0),
            memory=not (options.no_memory or options.busy),
            busy=options.busy or 0,
        )
        report = run.report(cases, list(dict.fromkeys(only)), settings)
    if not report.cases:
        line.exit(1, f"{tables.heading(report)}\nnothing was measured\n")

    text = tables.text(report)
    print(text, end="")
    if options.json:
        results.write(report, options.json)
    if options.markdown:
        options.markdown.write_text(text)
    if options.plot:
        steps = any(result.network == "nnunet-step" for result in report.cases.values())
        (picture if steps else plot).save(report, options.plot)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def _side(text: str) -> int:
    if (side := _count(text)) % 8:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8")
    return side


def _gpus(text: str) -> list[str]:
    if unknown := ", ".join(name for name in text.split(",") if name not in MODELLED):
        which = ", ".join(MODELLED)
        raise argparse.ArgumentTypeError(f"{unknown}: no such GPU; choose from {which}")
    return text.split(",")


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


if __name__ == "__main__":
    main()
