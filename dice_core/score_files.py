"""Dice and IoU (Jaccard index) of each class, for a file of predicted and one of true labels.

With I the voxels that have the label in both, P in the prediction and Y in the labels,

    Dice = 2 I / (P + Y)        IoU = I / (P + Y - I)

A class that is predicted but absent from the labels, or there but not predicted, has 0. A class in
neither file, which only --classes lists, has nan (JSON: null). There is no mean over the classes.
Classes are listed by their labels, which need not be consecutive. The affines of two NIfTI files
must agree; NumPy files have none.
"""

from __future__ import annotations

import collections
import gzip
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK = 1 << 20  # voxels that are counted together
SPAN = 1 << 20  # of labels that are counted in a table
AFFINE = 1e-3  # the largest difference between affines, in millimetres


class Refused(Exception):
    """Why two files cannot be compared, a sentence."""


class ClassScore(NamedTuple):
    """A row of the table."""

    label: int
    dice: float
    iou: float
    predicted: int  # voxels
    labelled: int


def scores(
    prediction: str, labels: str, ignore_label: int | None = None, classes: Sequence[int] = ()
) -> list[ClassScore]:
    """The scores of these classes, or of all that are found. Raises Refused."""
    (first, affine), (second, other) = _read(Path(prediction)), _read(Path(labels))
    if first.shape != second.shape:
        raise Refused(
            f"{prediction} has shape {first.shape} and {labels} {second.shape}; resample one to "
            f"the other's voxels, with nearest-neighbour interpolation"
        )
    if affine is not None and other is not None:
        difference = np.abs(affine - other).max()
        if not difference <= AFFINE:
            raise Refused(
                f"the affines of {prediction} and {labels} differ by up to {difference:.3g}: their "
                f"voxels are at different places, so resample one to the other"
            )
    both: collections.Counter[int] = collections.Counter()
    predicted, labelled = both.copy(), both.copy()
    for p, y in zip(_blocks(first, prediction), _blocks(second, labels), strict=True):
        if ignore_label is not None:
            p, y = p[y != ignore_label], y[y != ignore_label]
        predicted.update(_counts(p))
        labelled.update(_counts(y))
        both.update(_counts(y[p == y]))
    found = sorted({*predicted, *labelled})
    return [_score(c, both[c], predicted[c], labelled[c]) for c in classes or found]


def as_text(rows: Sequence[ClassScore]) -> str:
    """A table."""
    lines = [f"{'label':>8}{'Dice':>9}{'IoU':>9}{'predicted':>14}{'in labels':>14}"]
    lines += [
        f"{row.label:>8}{row.dice:>9.4f}{row.iou:>9.4f}{row.predicted:>14,}{row.labelled:>14,}"
        for row in rows
    ]
    return "\n".join(lines)


def as_json(rows: Sequence[ClassScore]) -> str:
    """A list of objects."""
    values = [
        {name: None if value != value else value for name, value in row._asdict().items()}
        for row in rows
    ]
    return json.dumps(values, indent=2, allow_nan=False)


def _score(label: int, both: int, predicted: int, labelled: int) -> ClassScore:
    total = predicted + labelled
    dice, iou = (2 * both / total, both / (total - both)) if total else (math.nan, math.nan)
    return ClassScore(label, dice, iou, predicted, labelled)


def _counts(values: Array) -> dict[int, int]:
    """How often each integer is there."""
    if not values.size:
        return {}
    low, high = int(values.min()), int(values.max())
    if high - low < SPAN:
        wide = values if values.dtype == np.uint64 else values.astype(np.int64)
        counts = np.bincount((wide - wide.dtype.type(low)).astype(np.intp))
        return {low + int(at): int(counts[at]) for at in np.flatnonzero(counts)}
    found, numbers = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), numbers.tolist(), strict=True))


def _blocks(array: Array, name: str) -> Iterator[Array]:
    """Its voxels as integers, in C order, some at a time."""
    rows = max(1, BLOCK // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        block = np.asarray(array[start : start + rows]).reshape(-1)
        if block.dtype.kind == "f":
            with np.errstate(all="ignore"):
                wrong = ~((block == np.floor(block)) & (np.abs(block) <= 2**53))
            if wrong.any():
                raise Refused(
                    f"{name} holds {block[wrong][0]:g}, which is no label; labels are integers, in "
                    f"any dtype"
                )
            block = block.astype(np.int64)
        yield block.view(np.uint8) if block.dtype == bool else block


def _read(path: Path) -> tuple[Array, Array | None]:
    """An array of numbers with 1 to 3 axes, and the affine of a NIfTI file. Raises Refused."""
    if path.is_dir():
        raise Refused(f"{path} is a folder; score compares two files")
    if not path.exists():
        raise Refused(f"there is no file {path}")
    name = path.name.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            array, affine = _nifti(path)
        elif name.endswith((".npy", ".npz")):
            array, affine = _numpy(path), None
        else:
            raise Refused(f"{path} is neither NIfTI (.nii, .nii.gz) nor NumPy (.npy, .npz)")
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Refused(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if array.dtype.kind not in "biuf":
        raise Refused(f"{path} holds {array.dtype}, which are no labels; labels are integers")
    while array.ndim > 3 and array.shape[-1] == 1:  # as NIfTI files often have
        array = array[..., 0]
    if not 1 <= array.ndim <= 3:
        raise Refused(
            f"{path} has shape {array.shape}; labels have one to three axes: choose a volume, or "
            f"take the argmax over the channels"
        )
    if not array.size:
        raise Refused(f"{path} has shape {array.shape} and no voxels")
    return array, affine


def _numpy(path: Path) -> Array:
    if path.suffix.lower() == ".npy":
        return np.lib.format.open_memmap(path, mode="r")
    if not zipfile.is_zipfile(path):
        raise Refused(f"{path} cannot be read: it is no .npz archive")
    with np.load(path) as archive:
        if len(archive.files) != 1:
            names = ", ".join(archive.files) or "none"
            raise Refused(f"{path} must hold one array, and holds {len(archive.files)}: {names}")
        return np.asarray(archive[archive.files[0]])


def _nifti(path: Path) -> tuple[Array, Array | None]:
    try:
        import nibabel
    except ModuleNotFoundError:
        raise Refused(f'{path} needs nibabel: pip install "dice_core[nifti]"') from None
    try:
        nibabel.imageglobals.logger.disabled = True  # what it logs is in its exceptions too
        image: Any = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(str(error)) from error
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:  # nibabel does not read as far as the checksum
            while file.read(BLOCK):
                pass
    return array, image.affine
