"""Takes nnU-Net's own commands from a data set to predictions, with its loss and with dice_core's.

Makes four training volumes and a test volume in which the labels are shells of brightness, then
plans and preprocesses them, and for each trainer trains two short epochs on the CPU, validates and
predicts. Last it predicts from a copy of the fused head's checkpoint that names nnU-Net's own
trainer, where dice_core's trainers cannot be found, and expects the same segmentation.

    python examples/nnunet_end_to_end.py --regions --ignore-label

The script needs dice_core, torch and nnunetv2 >= 2.8, and takes several minutes on two cores. All
files are below --folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

# For the folder of nnUNet_extTrainer. A user's file needs only the line that imports dice_core's;
# the classes here train for 2 epochs of 10 steps in place of 1000 of 250, from the same seed.
TRAINERS = """
import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from dice_core.compat.nnunet import nnUNetTrainerDiceCore, nnUNetTrainerDiceCoreFusedHead


class Short:
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 10, 2
        np.random.seed(0)
        torch.manual_seed(0)
        super().initialize()


class nnUNetTrainer_short(Short, nnUNetTrainer):
    pass


class nnUNetTrainerDiceCore_short(Short, nnUNetTrainerDiceCore):
    pass


class nnUNetTrainerDiceCoreFusedHead_short(Short, nnUNetTrainerDiceCoreFusedHead):
    pass
"""
NAMES = ("nnUNetTrainer", "nnUNetTrainerDiceCore", "nnUNetTrainerDiceCoreFusedHead")
DATASET = "Dataset001_Shells"
CASES = ("case_1", "case_2", "case_3", "case_4")
IGNORED = 3


def volume(seed: int, side: int) -> tuple[Any, Any]:
    """A noisy image, and the labels of a sphere and of the core inside it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1)
    distance = np.linalg.norm(grid - rng.uniform(0.4, 0.6, 3) * side, axis=-1) / side
    labels = (distance < 0.35).astype(np.uint8) + (distance < 0.2)
    return (labels + rng.normal(0, 0.3, labels.shape)).astype(np.float32), labels


def save(array: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


def read(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asanyarray(image.dataobj)


def make_data(raw: Path, regions: bool, ignore_label: bool) -> Any:
    """Write the data set, and return the labels of the test volume."""
    for seed, case in enumerate(CASES):
        image, labels = volume(seed, 24)
        if ignore_label:
            labels[:, :, ::4] = IGNORED  # as if these planes were not annotated
        save(image, raw / "imagesTr" / f"{case}_0000.nii.gz")
        save(labels, raw / "labelsTr" / f"{case}.nii.gz")
    image, labels = volume(9, 32)
    save(image, raw / "imagesTs" / "test_0000.nii.gz")
    names: dict[str, Any] = {"background": 0}
    names |= {"whole": [1, 2], "core": [2]} if regions else {"shell": 1, "core": 2}
    names |= {"ignore": IGNORED} if ignore_label else {}
    description = {
        "channel_names": {"0": "T1"},
        "labels": names,
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    description |= {"regions_class_order": [1, 2]} if regions else {}
    (raw / "dataset.json").write_text(json.dumps(description))
    return labels


def run(command: str, environment: dict[str, str], log: Path) -> None:
    """Run a command that is installed beside this Python."""
    print("+", command, flush=True)
    name, *arguments = command.split()
    with log.open("a") as output:
        program = str(Path(sys.executable).with_name(name))
        code = subprocess.run(
            [program, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code:
        raise SystemExit(f"{name} failed, and wrote:\n{log.read_text()[-5000:]}")


def dice(prediction: Any, truth: Any) -> list[float]:
    """Of the labels 1 and 2."""
    pairs = [(prediction == label, truth == label) for label in (1, 2)]
    return [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]


def end_to_end(folder: Path, regions: bool, ignore_label: bool) -> None:
    truth = make_data(folder / "raw" / DATASET, regions, ignore_label)
    trainers = folder / "trainers"
    trainers.mkdir()
    (trainers / "short.py").write_text(TRAINERS)
    plain = os.environ | {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_def_n_proc": "1",
    }
    plain.pop("nnUNet_extTrainer", None)
    extended = plain | {"nnUNet_extTrainer": str(trainers)}
    seeded = extended | {"nnUNet_n_proc_DA": "0"}  # augmentation in the process that has the seed
    log, images = folder / "log.txt", folder / "raw" / DATASET / "imagesTs"

    run("nnUNetv2_plan_and_preprocess -d 1 -c 3d_fullres -npfp 1 -np 1", plain, log)
    rows, segmentations = [], []
    for name in NAMES:
        run(f"nnUNetv2_train 1 3d_fullres all -device cpu -tr {name}_short", seeded, log)
        output = folder / "predictions" / name
        run(
            f"nnUNetv2_predict -d 1 -c 3d_fullres -f all -device cpu -tr {name}_short "
            f"-npp 1 -nps 1 -i {images} -o {output}",
            extended,
            log,
        )
        model = folder / "results" / DATASET / f"{name}_short__nnUNetPlans__3d_fullres"
        checkpoint = torch.load(model / "fold_all" / "checkpoint_final.pth", weights_only=False)
        summary = json.loads((model / "fold_all" / "validation" / "summary.json").read_text())
        segmentations.append(read(output / "test.nii.gz"))
        rows.append(
            (
                *checkpoint["logging"]["train_losses"],
                *checkpoint["logging"]["val_losses"],
                summary["foreground_mean"]["Dice"],
                np.mean(dice(segmentations[-1], truth)),
            )
        )

    # A copy of the last model that needs dice_core no more.
    shared = folder / "shared"
    shutil.copytree(model, shared)
    checkpoint["trainer_name"] = "nnUNetTrainer"
    torch.save(checkpoint, shared / "fold_all" / "checkpoint_final.pth")
    run(
        f"nnUNetv2_predict_from_modelfolder -m {shared} -f all -device cpu "
        f"-npp 1 -nps 1 -i {images} -o {folder / 'predictions' / 'shared'}",
        plain,
        log,
    )
    again = read(folder / "predictions" / "shared" / "test.nii.gz")
    same = np.array_equal(again, segmentations[-1])

    kind = ("regions" if regions else "labels") + (" with an ignore label" if ignore_label else "")
    print(f"\n{kind:30}    training loss  validation loss   Dice: val.  test")
    for name, (*losses, validation, test) in zip(NAMES, rows, strict=True):
        cells = "".join(f"{each:9.4f}" for each in losses)
        print(f"{name:30}{cells}    {validation:9.3f} {test:5.3f}")
    print(f"predicted as nnUNetTrainer: {'the same' if same else 'ANOTHER'} segmentation")
    stock, *others = np.array([row[:2] for row in rows])
    difference = max(np.abs(each - stock).max() for each in others)
    print(f"training losses differ from nnU-Net's by at most {difference:.1e}")
    if not same or difference > 1e-2:
        raise SystemExit("FAILED")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regions", action="store_true", help="whole and core, which overlap")
    parser.add_argument("--ignore-label", action="store_true", help="planes without annotation")
    parser.add_argument("--folder", type=Path, help="new or empty (default: a temporary one)")
    args = parser.parse_args()
    if args.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            end_to_end(Path(folder), args.regions, args.ignore_label)
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        if any(args.folder.iterdir()):
            parser.error(f"--folder must be empty: {args.folder}")
        end_to_end(args.folder.absolute(), args.regions, args.ignore_label)


if __name__ == "__main__":
    main()
