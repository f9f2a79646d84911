"""Tests of examples/brain_mri.py: its messages for unusable input, and a very short training."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

SCRIPT = Path(__file__).parents[1] / "examples" / "brain_mri.py"
SHAPE = (36, 20, 18)


@pytest.fixture(scope="module")
def brain_mri() -> ModuleType:
    """The script as a module, as a process for each message would import torch each time."""
    spec = importlib.util.spec_from_file_location("brain_mri", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["brain_mri"] = module  # its dataclass looks itself up here
    spec.loader.exec_module(module)
    yield module
    del sys.modules["brain_mri"]


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def make_labels(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Three classes in shells around the middle of each half."""
    x, y, z = np.indices(shape)
    x = np.minimum(x, shape[0] - 1 - x)
    radius = np.hypot(np.hypot(x - shape[0] / 4, y - shape[1] / 2), z - shape[2] / 2)
    return (radius < 8).astype(np.int16) + (radius < 5)


def make_volume(labels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 5, labels.shape)
    return (100 * labels + noise).astype(np.float32)


def with_value(data: np.ndarray, value: float) -> np.ndarray:
    data = data.astype(np.float32)
    data[3, 4, 5] = value
    return data


LABELS = make_labels()
VOLUME = make_volume(LABELS)
SMALL = make_labels((31, 20, 18))
GAP = np.where(LABELS == 1, 3, LABELS)
ONE_SIDED = np.where(np.arange(SHAPE[0])[:, None, None] < 18, np.minimum(LABELS, 1), LABELS)
FOUR_D = VOLUME[..., None]

UNUSABLE = {
    "volume not 3-D": (FOUR_D, LABELS, "volume.nii is not 3-D: its shape is (36, 20, 18, 1)"),
    "labels not 3-D": (VOLUME, LABELS[0], "labels.nii is not 3-D"),
    "shapes differ": (
        VOLUME,
        LABELS[:-1],
        "shapes differ: volume (36, 20, 18), labels (35, 20, 18)",
    ),
    "not integers": (VOLUME, with_value(LABELS, 0.5), "the labels are not integers"),
    "labels NaN": (VOLUME, with_value(LABELS, np.nan), "the labels are not integers"),
    "negative": (VOLUME, LABELS - 1, "the labels are negative: the lowest is -1"),
    "one class": (VOLUME, np.ones_like(LABELS), "only one class: every voxel is 1"),
    "gap": (VOLUME, GAP, "go up to 3, but the left (training) half has no voxel of class 1"),
    "large gap": (VOLUME, LABELS * 5000, "has no voxel of class 1, 2, 3, 4, 5, ..."),
    "one-sided": (VOLUME, ONE_SIDED, "the left (training) half has no voxel of class 2"),
    "too small": (
        make_volume(SMALL),
        SMALL,
        "too small: (31, 20, 18) (as RAS), the minimum is (32,",
    ),
    "NaN": (with_value(VOLUME, np.nan), LABELS, "NaN or infinite intensities"),
    "infinite": (with_value(VOLUME, np.inf), LABELS, "NaN or infinite intensities"),
    "constant": (np.full_like(VOLUME, 7), LABELS, "the volume is constant"),
}


def check_error(
    brain_mri: ModuleType, capsys: pytest.CaptureFixture, args: list, text: str
) -> None:
    """Expect exit status 2, one line on stderr that holds the text, and nothing on stdout."""
    assert brain_mri.main([str(arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("brain_mri.py: error: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("case", UNUSABLE)
def test_says_what_is_wrong_with_the_data(brain_mri, tmp_path, capsys, case):
    volume, labels, text = UNUSABLE[case]
    volume = save(tmp_path / "volume.nii", volume)
    labels = save(tmp_path / "labels.nii", labels)
    check_error(brain_mri, capsys, ["--volume", volume, "--labels", labels], text)


def test_says_that_affines_differ(brain_mri, tmp_path, capsys):
    volume = save(tmp_path / "volume.nii", VOLUME)
    labels = save(tmp_path / "labels.nii", LABELS, np.diag([2.0, 2, 2, 1]))
    check_error(brain_mri, capsys, ["--volume", volume, "--labels", labels], "affines differ")


def test_says_that_a_file_is_not_nifti(brain_mri, tmp_path, capsys):
    volume = save(tmp_path / "volume.nii", VOLUME)
    text = tmp_path / "text.nii"
    text.write_text("not an image\n")
    cut_off = tmp_path / "cut_off.nii"
    cut_off.write_bytes(volume.read_bytes()[:1000])
    for labels in (text, cut_off):
        args = ["--volume", volume, "--labels", labels]
        check_error(brain_mri, capsys, args, f"cannot read {labels} as NIfTI: ")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--volume", "a.nii"], "--volume and --labels must be given together"),
        (["--labels", "a.nii"], "--volume and --labels must be given together"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--output", "no/such/folder/a.png"], "--output must be a file in an existing folder"),
    ],
)
def test_says_what_is_wrong_with_the_options(brain_mri, capsys, args, text):
    check_error(brain_mri, capsys, args, text)


def run_script(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_missing_file_ends_the_process_without_traceback(tmp_path):
    missing = tmp_path / "missing.nii"
    done = run_script("--volume", missing, "--labels", missing)
    assert done.returncode == 2
    assert done.stderr == f"brain_mri.py: error: no such file: {missing}\n"


@pytest.mark.slow
def test_trains_and_draws(tmp_path):
    # A first axis that runs to the left and oblong voxels, as many real files have.
    affine = np.diag([-1.0, 1, 2, 1])
    volume = save(tmp_path / "volume.nii.gz", VOLUME, affine)
    labels = save(tmp_path / "labels.nii.gz", LABELS, affine)
    output = tmp_path / "picture.png"
    done = run_script("--volume", volume, "--labels", labels, "--steps", 3, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("class ")]
    assert [row[:2] for row in rows] == [["class", "1"], ["class", "2"]]
    assert all(0 <= float(score) <= 1 for row in rows for score in row[2:])
    for text in ("no thresholds baseline", "wall time", "peak memory", f"picture in {output}"):
        assert text in done.stdout
    picture = imread(output)
    assert min(picture.shape[:2]) > 500
    assert picture[..., :3].std() > 0.05
