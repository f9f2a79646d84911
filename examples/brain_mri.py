"""Segment grey and white matter in a T1 brain MRI with a small 3-D U-Net and a loss of dice_core.

The network is trained on random patches of the left hemisphere and tested on the right one. By
default it segments the MNI152 template, which is part of nilearn, so nothing is downloaded:

    python examples/brain_mri.py

It also takes your own NIfTI image and label map (classes 0, 1, 2, ... on the same grid):

    python examples/brain_mri.py --volume t1.nii.gz --labels labels.nii.gz

The loss is Dice plus cross-entropy. --loss dice is Dice alone, --loss dice-focal has focal loss in
place of cross-entropy. With several names, one network is trained for each, from the same initial
weights, and the results are compared. The optimizer and its settings are nnU-Net's.

The script needs dice_core, torch, nilearn, matplotlib and tqdm, on Linux or macOS. It prints the
Dice of each class on the held-out hemisphere and draws the segmentation. On the template, the exit
status is 1 if the Dice of a class is below 0.93.

The template is left-right symmetric and its labels follow its intensities closely. So the result
shows that the loss trains a network, not how well the network would do on another subject.
"""

import argparse
import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dice_core.torch import DiceCELoss, DiceFocalLoss, DiceLoss, DiceScore

RESOLUTION = 2  # of the template, in mm
PATCH = 16  # voxels along each side
BATCH = 32
REQUIRED_DICE = 0.93
LOSSES: dict[str, Callable[..., nn.Module]] = {  # smooth > 0, since a patch may lack a class
    "dice": partial(DiceLoss, smooth=1.0),
    "dice-ce": partial(DiceCELoss, smooth=1.0),
    "dice-focal": partial(DiceFocalLoss, smooth=1.0),
}


class InputError(Exception):
    """An option or a file cannot be used; the message says why."""


@dataclass(frozen=True)
class Scan:
    """An image and its labels; the axes run to the right, to the front and upwards (RAS)."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, ...]
    classes: tuple[str, ...]

    @property
    def middle(self) -> int:
        """The first sagittal plane of the held-out right half."""
        return self.image.shape[0] // 2


def load_template() -> Scan:
    """Load the MNI152 template, each voxel labelled with its most probable tissue."""
    from nilearn import datasets  # slow to import, and not needed for other files

    image = datasets.load_mni152_template(resolution=RESOLUTION)
    grey = datasets.load_mni152_gm_template(resolution=RESOLUTION).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=RESOLUTION).get_fdata()
    labels = np.argmax([1 - grey - white, grey, white], axis=0)
    return Scan(image.get_fdata(), labels, image.header.get_zooms(), ("other", "grey", "white"))


def read_nifti(path: Path) -> nib.spatialimages.SpatialImage:
    """Read a 3-D NIfTI file and reorient it to RAS."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        nifti: Any = nib.load(path)
        if len(nifti.shape) != 3:
            raise InputError(f"{path} is not 3-D: its shape is {nifti.shape}")
        nifti = nib.as_closest_canonical(nifti)
        nifti.get_fdata()  # cached; a damaged file fails only when its data are read
    except InputError:
        raise
    except Exception as error:  # nibabel's errors for damaged files have no narrower base class
        raise InputError(f"cannot read {path} as NIfTI: {error}") from error
    return nifti


def load_files(volume: Path, label_map: Path) -> Scan:
    """Load the user's image and label map, and check that a network can be trained on them."""
    image, labels = read_nifti(volume), read_nifti(label_map)
    if image.shape != labels.shape:
        raise InputError(f"shapes differ: volume {image.shape}, labels {labels.shape} (as RAS)")
    if not np.allclose(image.affine, labels.affine, atol=1e-3):
        raise InputError("affines differ: the volume and the labels are not on the same grid")
    minimum = (2 * PATCH, PATCH, PATCH)  # each half must hold a patch
    if any(size < least for size, least in zip(image.shape, minimum, strict=True)):
        raise InputError(f"volume too small: {image.shape} (as RAS), the minimum is {minimum}")

    intensities, middle = image.get_fdata(), image.shape[0] // 2
    if not np.isfinite(intensities).all():
        raise InputError("the volume has NaN or infinite intensities")
    if np.ptp(intensities[:middle]) == 0:
        raise InputError("the volume is constant in its left (training) half")
    classes = count_classes(labels.get_fdata(), middle)
    names = tuple(f"class {label}" for label in range(classes))
    return Scan(intensities, labels.get_fdata().astype(int), image.header.get_zooms(), names)


def count_classes(labels: np.ndarray, middle: int) -> int:
    """Check that the labels are 0..C-1 and all occur in the training half, and return C."""
    values = np.unique(labels).tolist()
    if not all(value.is_integer() for value in values):
        raise InputError("the labels are not integers")
    if values[0] < 0:
        raise InputError(f"the labels are negative: the lowest is {values[0]:.0f}")
    if len(values) == 1:
        raise InputError(f"the labels have only one class: every voxel is {values[0]:.0f}")
    classes = int(values[-1]) + 1
    present = set(np.unique(labels[:middle]).tolist())
    if len(present) < classes:
        absent = (str(label) for label in range(classes) if label not in present)
        named = ", ".join(islice(absent, 5)) + (", ..." if next(absent, None) else "")
        raise InputError(
            f"the labels go up to {classes - 1}, but the left (training) half has no voxel of "
            f"class {named}"
        )
    return classes


def double_conv(channels_in: int, channels_out: int) -> nn.Sequential:
    """Two 3x3x3 convolutions, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for channels in (channels_in, channels_out):
        layers.append(nn.Conv3d(channels, channels_out, kernel_size=3, padding=1, bias=False))
        layers.append(nn.BatchNorm3d(channels_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A 3-D U-Net of three resolutions; the sides of its input must be multiples of `STRIDE`."""

    STRIDE = 4

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.fine_encoder = double_conv(1, width)
        self.middle_encoder = double_conv(width, 2 * width)
        self.coarse = double_conv(2 * width, 4 * width)
        self.middle_decoder = double_conv(2 * width + 4 * width, 2 * width)
        self.fine_decoder = double_conv(width + 2 * width, width)
        self.head = nn.Conv3d(width, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine_encoder(image)
        middle = self.middle_encoder(F.max_pool3d(fine, 2))
        coarse = self.coarse(F.max_pool3d(middle, 2))
        middle = self.middle_decoder(torch.cat([middle, upsample(coarse)], dim=1))
        fine = self.fine_decoder(torch.cat([fine, upsample(middle)], dim=1))
        logits: Tensor = self.head(fine)
        return logits


def upsample(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2)


def random_patches(image: Tensor, labels: Tensor, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of patches, each around a random voxel of a random class other than 0."""
    voxels = [(labels == label).nonzero() for label in range(1, classes)]
    last_corner = torch.tensor(image.shape) - PATCH
    while True:
        boxes = []
        for _ in range(BATCH):
            choices = voxels[torch.randint(len(voxels), ())]
            centre = choices[torch.randint(len(choices), ())]
            corner = (centre - PATCH // 2).clamp(min=0).minimum(last_corner)
            boxes.append(tuple(slice(start, start + PATCH) for start in corner.tolist()))
        yield (
            torch.stack([image[box] for box in boxes])[:, None],
            torch.stack([labels[box] for box in boxes]),
        )


def train(
    net: UNet, image: Tensor, labels: Tensor, classes: int, steps: int, loss_name: str
) -> None:
    """Train the network on random patches, showing the loss and the mean Dice of each batch."""
    loss_function, score = LOSSES[loss_name](inplace=True), DiceScore()
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.01, momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    batches = islice(random_patches(image, labels, classes), steps)
    net.train()
    progress = tqdm(batches, desc=f"training, {loss_name}", total=steps, unit="step")
    for patches, targets in progress:
        logits = net(patches)
        loss = loss_function(logits, targets)
        dice = score(logits, targets)[1:].nanmean()  # before their gradient overwrites the logits
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), max_norm=12)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", dice=f"{dice.item():.3f}")


@torch.inference_mode()
def segment(net: UNet, image: Tensor) -> Tensor:
    """Label every voxel of an image of any size, in one pass."""
    padding = [end for size in reversed(image.shape) for end in (0, -size % UNet.STRIDE)]
    logits = net.eval()(F.pad(image[None, None], padding, mode="replicate"))
    return logits[0].argmax(dim=0)[tuple(slice(size) for size in image.shape)]


def dice_scores(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """The Dice of two label maps, for each class from 1 up; NaN for a class in neither of them."""
    scores = []
    for label in range(1, classes):
        predicted, true = prediction == label, truth == label
        scores.append(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
    return torch.stack(scores)


def apply_thresholds(image: Tensor, low: float, high: float) -> Tensor:
    return (image > low).long() + (image > high).long()


def best_thresholds(image: Tensor, labels: Tensor) -> tuple[float, float]:
    """Find the intensities that best separate other from grey and grey from white matter."""

    def dice(label: int, low: float, high: float) -> float:
        return dice_scores(apply_thresholds(image, low, high), labels, 3)[label - 1].item()

    candidates = torch.linspace(image.min().item(), image.max().item(), 200)[1:-1].tolist()
    # The Dice of white matter depends on the upper threshold alone, so that is chosen first.
    high = max(candidates, key=lambda value: dice(2, value, value))
    low = max(candidates, key=lambda value: dice(1, min(value, high), high))
    return min(low, high), high


def draw(scan: Scan, prediction: np.ndarray, title: str, output: Path) -> None:
    """Save three planes of image, truth, prediction and error, the held-out half in colour."""
    truth = scan.labels.copy()
    truth[: scan.middle] = 0  # no colour on the half that the network was trained on
    predicted = np.zeros_like(truth)
    predicted[scan.middle :] = prediction
    error_colour = len(scan.classes)
    columns = {
        "image": np.zeros_like(truth),
        "truth": truth,
        "prediction": predicted,
        "error": np.where(predicted != truth, error_colour, 0),
    }
    class_colours = colormaps["tab10"](np.arange(len(scan.classes) - 1) % 10)
    palette = np.vstack([(0, 0, 0, 0), class_colours, (1, 0, 0.2, 1)])

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(3, len(columns))
    darkest, brightest = np.percentile(scan.image, (0.5, 99.8))
    planes = {"axial": (2, "L", "R"), "coronal": (1, "L", "R"), "sagittal": (0, "P", "A")}
    for panels, (plane, (axis, start, end)) in zip(grid, planes.items(), strict=True):
        across, up = (other for other in range(3) if other != axis)
        index = int((truth > 0).sum(axis=(across, up)).argmax())  # the plane with most labels
        panels[0].set_ylabel(plane)
        for panel, (name, colours) in zip(panels, columns.items(), strict=True):
            grey = scan.image.take(index, axis).T
            panel.imshow(grey, "gray", vmin=darkest, vmax=brightest, origin="lower")
            panel.imshow(palette[colours.take(index, axis).T], origin="lower")
            panel.set_aspect(scan.spacing[up] / scan.spacing[across])
            panel.set(xticks=[], yticks=[], title=name if plane == "axial" else "")
            if across == 0:
                panel.axvspan(-0.5, scan.middle - 0.5, color="black", alpha=0.5, linewidth=0)
            for side, letter in ((0.03, start), (0.93, end)):
                panel.text(side, 0.03, letter, color="white", transform=panel.transAxes)
    names = (*scan.classes[1:], "wrong class")
    handles = [Patch(color=palette[i], label=name) for i, name in enumerate(names, start=1)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    figure.savefig(output, format="png", dpi=110)


def peak_memory() -> float:
    """The peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def print_table(classes: tuple[str, ...], columns: dict[str, Tensor]) -> None:
    print("Dice on the held-out right hemisphere")
    print(" " * 12 + "".join(f"{name:>12}" for name in columns))
    for row, name in enumerate(classes[1:]):
        print(f"{name:<12}" + "".join(f"{scores[row]:12.3f}" for scores in columns.values()))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volume", type=Path, help="3-D NIfTI image (default: MNI152 template)")
    parser.add_argument("--labels", type=Path, help="NIfTI label map on the grid of the volume")
    parser.add_argument(
        "--loss", nargs="+", choices=LOSSES, default=["dice-ce"], help="one or several (dice-ce)"
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("brain_mri.png"), help="picture (%(default)s)"
    )
    return parser.parse_args(argv)


def load_scan(args: argparse.Namespace) -> Scan:
    """Check all options before any training, and load the files."""
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise InputError(f"--output must be a file in an existing folder, not {args.output}")
    if (args.volume is None) != (args.labels is None):
        raise InputError("--volume and --labels must be given together")
    return load_template() if args.volume is None else load_files(args.volume, args.labels)


def run(scan: Scan, args: argparse.Namespace) -> bool:
    """Train, test, print and draw; return whether the held-out Dice is high enough."""
    start = time.perf_counter()
    built_in, classes = args.volume is None, len(scan.classes)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    training_half = scan.image[: scan.middle]
    image = torch.from_numpy((scan.image - training_half.mean()) / training_half.std()).float()
    labels = torch.from_numpy(scan.labels)
    train_image, test_image = image[: scan.middle], image[scan.middle :]
    train_labels, test_labels = labels[: scan.middle], labels[scan.middle :]

    # 3-D convolutions on a CPU are much faster in the channels-last layout.
    untrained = UNet(classes).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    net = copy.deepcopy(untrained)
    results = {"untrained": dice_scores(segment(net, test_image), test_labels, classes)}
    if built_in:
        thresholded = apply_thresholds(test_image, *best_thresholds(train_image, train_labels))
        results["thresholds"] = dice_scores(thresholded, test_labels, classes)
    else:
        print("no thresholds baseline: it is only for the three classes of the template")
    state, seconds = torch.get_rng_state(), {}
    for name in args.loss:
        net = copy.deepcopy(untrained)
        torch.set_rng_state(state)  # the same patches for every loss
        begin = time.perf_counter()
        train(net, train_image, train_labels, classes, args.steps, name)
        seconds[name] = time.perf_counter() - begin
        prediction = segment(net, test_image)
        results[name] = scores = dice_scores(prediction, test_labels, classes)

    title = f"Right hemisphere, held out: mean Dice {scores.nanmean():.3f} (training half darkened)"
    draw(scan, prediction.numpy(), title, args.output)
    print_table(scan.classes, results)
    print("training took " + ", ".join(f"{t:.0f} s ({name})" for name, t in seconds.items()))
    print(f"wall time {time.perf_counter() - start:.0f} s, peak memory {peak_memory():.0f} MiB")
    print(f"picture in {args.output}")
    return not built_in or all((results[name] >= REQUIRED_DICE).all() for name in args.loss)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        scan = load_scan(args)
    except InputError as error:
        message = " ".join(str(error).split())  # on one line, unlike some of nibabel's
        print(f"brain_mri.py: error: {message}", file=sys.stderr)
        return 2
    if run(scan, args):
        return 0
    print(f"FAILED: a class has a held-out Dice below {REQUIRED_DICE}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
