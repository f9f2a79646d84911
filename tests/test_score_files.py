"""`dice_core score`: two files of labels."""

import gzip
import json
import math

import nibabel
import numpy as np
import pytest

import dice_core
from dice_core import __main__, score_files

RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 205], np.uint8)[RNG.integers(0, 3, (4, 5, 6))]
PREDICTION = np.where(RNG.random(LABELS.shape) < 0.3, 1, LABELS)
PREDICTION[0, 0, 0] = 7


def saved(path, array, affine=None):
    """The path of a new file with this array."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, array)
    else:
        image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
        nibabel.save(image, path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return saved(tmp_path / "p.npy", PREDICTION), saved(tmp_path / "y.npy", LABELS)


def run(capsys, *arguments):
    """What the command prints."""
    __main__.main(["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert not err
    return out


def rows(capsys, *arguments):
    """The scores by label."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(run(capsys, *arguments, "--json"), parse_constant=refuse)
    return {value.pop("label"): value for value in values}


def refused(capsys, *arguments):
    """The sentence on standard error."""
    with pytest.raises(SystemExit) as stop:
        __main__.main(["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("dice_core score: ")
    return err.removeprefix("dice_core score: ").strip()


# ---- scores --------------------------------------------------------------------------------------


def test_scores_are_those_of_the_definition(files, capsys):
    found = rows(capsys, *files)
    assert list(found) == [0, 1, 7, 205]
    for label, row in found.items():
        p, y = label == PREDICTION, label == LABELS
        both = (p & y).sum()
        assert row["dice"] == 2 * both / (p.sum() + y.sum())
        assert row["iou"] == both / (p | y).sum()
        assert (row["predicted"], row["labelled"]) == (p.sum(), y.sum())
    assert found[7] == {"dice": 0, "iou": 0, "predicted": 1, "labelled": 0}


def test_scores_are_those_of_the_library(tmp_path, capsys):
    """With an ignored label, an absent class, and one that only the prediction has."""
    labels, prediction = RNG.integers(0, 4, (2, 6, 6, 6))
    prediction[labels == 2] = 2
    labels[labels == 2] = 0
    labels[0] = 9
    logits = np.moveaxis(np.eye(5, dtype=np.float32)[prediction], -1, 0)[None]
    expected = dice_core.score(logits, labels[None], ignore_label=9)
    paths = saved(tmp_path / "p.npy", prediction), saved(tmp_path / "y.npy", labels)
    found = rows(capsys, *paths, "--ignore-label", 9, "--classes", "0,1,2,3,4")
    for name in ("dice", "iou"):
        actual = [math.nan if row[name] is None else row[name] for row in found.values()]
        np.testing.assert_array_equal(actual, getattr(expected, name)[0])
    assert found[2]["dice"] == 0
    assert found[4]["dice"] is None


def test_the_table(tmp_path, capsys):
    y = np.repeat([0, 1], [3000, 1000])
    p = np.repeat([0, 1], [2000, 2000])
    paths = saved(tmp_path / "p.npy", p), saved(tmp_path / "y.npy", y)
    assert run(capsys, *paths, "--classes", "0,1,205").splitlines() == [
        "   label     Dice      IoU     predicted     in labels",
        "       0   0.8000   0.6667         2,000         3,000",
        "       1   0.6667   0.5000         2,000         1,000",
        "     205      nan      nan             0             0",
    ]


@pytest.mark.parametrize("name", ["y.npy", "y.npz", "y.nii", "y.nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_every_format_and_dtype(files, tmp_path, capsys, name, dtype):
    path = saved(tmp_path / name, LABELS.astype(dtype))
    assert run(capsys, files[0], path) == run(capsys, *files)


def test_other_dtypes(tmp_path, capsys):
    truth = np.array([[True, False, True]])
    for dtype in ("bool", "uint64", "int8", ">i4", "float16", "int64"):
        paths = saved(tmp_path / "p.npy", truth.astype(dtype)), saved(tmp_path / "y.npy", truth)
        assert {row["dice"] for row in rows(capsys, *paths).values()} == {1}


def test_labels_of_any_size(tmp_path, capsys):
    labels = np.array([-(2**62), -1, 0, 127, 2**40, 2**62])
    path = saved(tmp_path / "y.npy", labels)
    assert list(rows(capsys, path, path)) == labels.tolist()
    narrow = saved(tmp_path / "n.npy", np.arange(-128, 128).astype(np.int8))
    assert list(rows(capsys, narrow, narrow)) == list(range(-128, 128))


def test_blocks(files, capsys, monkeypatch):
    whole = run(capsys, *files)
    monkeypatch.setattr(score_files, "BLOCK", 60)
    assert run(capsys, *files) == whole


def test_a_last_axis_of_length_1_and_affines_within_tolerance(tmp_path, capsys):
    first = saved(tmp_path / "p.nii", LABELS[..., None])
    second = saved(tmp_path / "y.nii.gz", LABELS, np.eye(4) + 1e-5)
    assert {row["iou"] for row in rows(capsys, first, second).values()} == {1}


# ---- refusals ------------------------------------------------------------------------------------


def test_files_that_do_not_go_together(files, tmp_path, capsys):
    small = saved(tmp_path / "small.npy", LABELS[:2])
    assert "shape (2, 5, 6) and" in refused(capsys, small, files[1])
    first = saved(tmp_path / "a.nii", LABELS)
    far = saved(tmp_path / "b.nii", LABELS, np.diag([1, 1, 2, 1.0]))
    assert f"the affines of {first} and {far} differ by up to 1: " in refused(capsys, first, far)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([[1, 0.5]]), "holds 0.5, which is no label"),
        (np.full((2, 2), np.nan), "holds nan, which is no label"),
        (np.full((2, 2), 1e300), "holds 1e+300, which is no label"),
        (LABELS.astype(complex), "holds complex128, which are no labels"),
        (np.array(["liver"]), "holds <U5, which are no labels"),
        (np.zeros((2, 3, 4, 5), int), "has shape (2, 3, 4, 5); labels have one to three axes"),
        (np.zeros((), int), "has shape (); labels have one to three axes"),
        (np.zeros((0, 3), int), "has shape (0, 3) and no voxels"),
    ],
)
def test_arrays_that_are_no_labels(tmp_path, capsys, array, text):
    path = saved(tmp_path / "a.npy", array)
    assert f"{path} {text}" in refused(capsys, path, path)


def damaged(content):
    """The same bytes with one in the middle changed."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 255
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.nii", "a.nii.gz"])
def test_damaged_files(tmp_path, capsys, name):
    path = tmp_path / name
    saved(path, RNG.integers(0, 9, (20, 20, 20)).astype(np.uint8))
    whole = path.read_bytes()
    contents = [b"", b"labels", whole[: len(whole) // 2]]
    contents += [damaged(whole)] if name.endswith("z") else []  # those have a checksum
    for content in contents:
        path.write_bytes(content)
        assert f"{path} cannot be read: " in refused(capsys, path, path)


def test_a_damaged_checksum(tmp_path, capsys):
    path = tmp_path / "a.nii"
    saved(path, RNG.integers(0, 9, (20, 20, 20)).astype(np.uint8))
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[-8] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(packed)
    assert "CRC check failed" in refused(capsys, tmp_path / "a.nii.gz", path)


def test_other_files(files, tmp_path, capsys, monkeypatch):
    missing, text = tmp_path / "none.npy", tmp_path / "a.mha"
    text.write_text("labels")
    assert refused(capsys, missing, files[1]) == f"there is no file {missing}"
    assert refused(capsys, files[0], tmp_path).startswith(f"{tmp_path} is a folder")
    assert f"{text} is neither NIfTI" in refused(capsys, text, files[1])
    np.savez(tmp_path / "two.npz", a=LABELS, b=LABELS)
    assert "must hold one array, and holds 2: a, b" in refused(
        capsys, tmp_path / "two.npz", files[1]
    )
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    assert "cannot be read: " in refused(capsys, tmp_path / "objects.npy", files[1])
    nifti = saved(tmp_path / "a.nii", LABELS)
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    assert 'needs nibabel: pip install "dice_core[nifti]"' in refused(capsys, nifti, files[1])
