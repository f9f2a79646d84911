"""A report as a bar chart: the time of a step and its peak memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from .implementations import IMPLEMENTATIONS
from .results import Report


def save(report: Report, path: Path) -> None:
    """Writes the chart in the format given by the suffix of `path`."""
    results = list(report.cases.values())
    names = [name for name in IMPLEMENTATIONS if any(name in r.measurements for r in results)]
    figure = Figure(figsize=(max(8, 1.6 * len(results) + 3), 8), layout="constrained")
    time, memory = figure.subplots(2, sharex=True)
    width, colours = 0.8 / len(names), colormaps["tab20"]
    for i, name in enumerate(names):
        positions = [k + (i + 0.5) * width - 0.4 for k in range(len(results))]
        for axes, heights in (
            (time, [r.ratio(name, "floor", "step") for r in results]),
            (memory, [r.get(name, "peak") for r in results]),
        ):
            bars = [float("nan") if height is None else height for height in heights]
            axes.bar(positions, bars, width, color=colours(i), label=IMPLEMENTATIONS[name].title)
    time.set_yscale("log")
    time.set_ylabel("time of a step / floor")
    memory.set_ylabel("peak memory of a step / logits")
    for axes in (time, memory):
        axes.axhline(1, color="black", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_xticks(range(len(results)), list(report.cases))
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    where = report.facts.get("GPU", report.facts["processor"])
    figure.suptitle(f"{where}; {report.facts['date']}", fontsize="medium", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
