"""The loss, the Dice score and the gradient of a volume that need not fit in memory.

A volume of the size in gigabytes given on the command line is made block by block while it is read:
nested spheres, and logits of spheres that are a little displaced. Loss and score take one pass over
its blocks. The gradient is written to a zarr array, for no more than --gradient gigabytes.
"""

import argparse
import resource
import sys
import tempfile
import time
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.diagnostics import ProgressBar

import dice_core
import dice_core.dask
from dice_core.losses import CrossEntropy, Dice

CLASSES = 4
SIDE = 144  # of a block: 4 x 144^3 float32 logits are 48 MB
RADII = (0.45, 0.3, 0.2)
TERM = Dice(smooth=1) + CrossEntropy()

Array = np.ndarray[Any, Any]


def distance(block_info: Any, shift: float) -> Array:
    """The distance of each voxel of a block from the centre, in units of the volume's side."""
    side = block_info[None]["shape"][-1]
    ranges = block_info[None]["array-location"][-3:]
    axes = [np.arange(*ends, dtype=np.float32) / side - 0.5 - shift for ends in ranges]
    return np.sqrt(sum(x**2 for x in np.meshgrid(*axes, indexing="ij", sparse=True)))


def labels(block_info: Any = None) -> Array:
    r = distance(block_info, 0)
    return np.digitize(r, RADII).astype(np.uint8)[None]


def logits(block_info: Any = None) -> Array:
    r = distance(block_info, 0.01)
    middles = [(a + b) / 2 for a, b in zip((0.6, *RADII), (*RADII, 0), strict=True)]
    x = np.empty((1, CLASSES, *r.shape), np.float32)
    for c, middle in enumerate(middles):
        np.subtract(r, middle, out=x[0, c])
        np.abs(x[0, c], out=x[0, c])
        x[0, c] *= -40
    return x


def volume(gigabytes: float) -> tuple[Any, Any]:
    """Lazy logits (1, C, d, d, d) of this size and labels (1, d, d, d)."""
    side = round((gigabytes * 1e9 / (4 * CLASSES)) ** (1 / 3))
    (cuts,) = da.core.normalize_chunks(min(SIDE, side), (side,))
    x = da.map_blocks(logits, chunks=((1,), (CLASSES,), cuts, cuts, cuts), dtype=np.float32)
    y = da.map_blocks(labels, chunks=((1,), cuts, cuts, cuts), dtype=np.uint8)
    return x, y


def peak_megabytes() -> float:
    """The largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def report(begin: float) -> None:
    print(f"{time.perf_counter() - begin:.1f} s, peak resident memory {peak_megabytes():.0f} MB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gigabytes", nargs="?", type=float, default=1, help="of logits; default 1")
    parser.add_argument("--gradient", type=float, default=0.25, help="at most; default 0.25")
    options = parser.parse_args()

    begin = time.perf_counter()
    x, y = volume(options.gigabytes)
    print(f"logits {x.shape}: {x.nbytes / 1e9:.2f} GB in {x.npartitions} blocks")
    loss = dice_core.dask.loss(x, y, TERM)
    score = dice_core.dask.score(x, y)
    with ProgressBar():
        value, dice = dask.compute(loss, score.dice)
    print(f"loss {value:.6f}, Dice of each class {np.array2string(dice[0], precision=4)}")
    report(begin)

    begin = time.perf_counter()
    x, y = volume(min(options.gigabytes, options.gradient))
    print(f"gradient of {x.nbytes / 1e9:.2f} GB of logits into a zarr array: sums, then blocks")
    with ProgressBar(), tempfile.TemporaryDirectory() as folder:
        total = dice_core.dask.statistics(x, y, gamma=0).to_host()
        dice_core.dask.gradient(x, y, total, TERM).to_zarr(f"{folder}/dx.zarr")
    report(begin)


if __name__ == "__main__":
    main()
