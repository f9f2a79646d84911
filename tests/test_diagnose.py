"""`diagnose`: every classic mistake is found and named, its remedy works, and what is right is not
suspected.
"""

import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import torch

import dice_core
from dice_core import losses
from dice_core.diagnosis import Diagnosis, Finding, diagnose, facts

RNG = np.random.default_rng(0)
SHAPE = (2, 3, 6, 7, 8)
X = RNG.standard_normal(SHAPE).astype(np.float32)
Y = RNG.integers(0, 3, (2, 6, 7, 8)).astype(np.uint8)
ONE_HOT = np.moveaxis(np.eye(3, dtype=np.uint8)[Y], -1, 1)
MULTI_LABEL = RNG.integers(0, 2, SHAPE).astype(np.uint8)
PROBABILITIES = np.exp(X) / np.exp(X).sum(1, keepdims=True)
SIGMOID = 1 / (1 + np.exp(-3 * X))
SOFT = np.moveaxis(RNG.dirichlet([1, 1, 1], (2, 6, 7, 8)), -1, 1).astype(np.float32)


def last(array):
    return np.moveaxis(array, 1, -1)


def with_values(array, value, places=((0, 0, 0, 0), (1, 2, 3, 4))):
    """A copy of labels, or of logits for every channel, with this value at some voxels."""
    new = array.astype(np.int64) if array.dtype.kind in "iu" else array.copy()
    for n, *voxel in places:
        new[(n, ..., *voxel)] = value
    return new


# ---- what is right -------------------------------------------------------------------------------

RIGHT = {
    "random logits": (X, Y, {}),
    "a trained network": (20.0 * (ONE_HOT - 0.5) + X, Y, {}),
    "a trained network, half precision": ((20.0 * (ONE_HOT - 0.5)).astype(np.float16), Y, {}),
    "labels with a channel axis": (X, Y[:, None], {}),
    "labels of another dtype": (X, Y.astype(np.int64), {}),
    "bool labels": (X[:, :2], Y > 1, {}),
    "one-hot": (X, ONE_HOT, {}),
    "one-hot floats": (X, ONE_HOT.astype(np.float32), {}),
    "soft targets": (X, SOFT, {}),
    "half-precision soft targets": (X, SOFT.astype(np.float16), {}),
    "multi-label": (X, MULTI_LABEL, {"activation": "sigmoid"}),
    "labels with sigmoid": (X, Y, {"activation": "sigmoid"}),
    "probabilities": (PROBABILITIES, Y, {"activation": "none"}),
    "probabilities of classes that overlap": (SIGMOID, MULTI_LABEL, {"activation": "none"}),
    "one channel, two classes": (X[:, :1], Y > 1, {}),
    "one channel, sigmoid": (X[:, :1], (Y > 1)[:, None], {"activation": "sigmoid"}),
    "ignored labels": (X, with_values(Y, 255), {"ignore_label": 255}),
    "ignored logits of NaN": (with_values(X, np.nan), with_values(Y, -1), {}),
    "masked classes": (np.concatenate([X, np.full_like(X[:, :1], -np.inf)], 1), ONE_HOT, {}),
    "absent classes with smooth": (X, Y // 2, {"smooth": 1e-5}),
    "absent classes, skipped": (X, Y // 2, {"term": losses.Dice(absent="skip")}),
    "absent classes of cross-entropy": (X, Y // 2, {"term": losses.CrossEntropy()}),
    "absent classes, ignored": (X, Y // 2, {"ignore_channel": (2,)}),
    "absent from a sample, batch": (X, Y * np.uint8([[[[0]]], [[[1]]]]), {"reduction": "batch"}),
    "few voxels": (np.zeros((1, 2, 3)), np.array([[0, 1, 1]]), {}),
    "no spatial axes": (X.reshape(2, 3, -1)[..., 0], np.array([1, 2]), {"smooth": 1}),
    "small positive logits": (np.abs(X) / 10, Y, {}),
}
RIGHT["masked classes"] = (RIGHT["masked classes"][0], Y, {"smooth": 1})


@pytest.mark.parametrize(("x", "y", "options"), RIGHT.values(), ids=RIGHT)
def test_nothing_is_found_in_what_is_right(x, y, options):
    found = diagnose(x, y, **options)
    assert found == ()
    assert str(found).startswith("nothing found in x ")
    assert np.isfinite(dice_core.loss(x, y, **options))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_random_calls(seed):
    rng = np.random.default_rng(seed)
    channels, space = rng.integers(2, 6), tuple(rng.integers(4, 9, rng.integers(1, 4)))
    x = rng.standard_normal((3, channels, *space)) * rng.choice([0.01, 1, 30])
    y = rng.integers(0, channels, (3, *space))
    assert diagnose(x, y, smooth=1).names == ()
    y = rng.integers(0, 2, x.shape)
    assert diagnose(x, y, smooth=1, activation="sigmoid").names == ()


def test_nothing_is_found_in_an_untrained_network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 3, 1)
    )
    images = torch.rand(2, 1, 8, 8, 8)
    assert diagnose(network(images), (3 * images[:, 0]).long()).names == ()


def test_nothing_is_found_while_a_model_is_trained():
    """Softmax regression: voxels of three brightnesses."""
    images = RNG.random((2, 1, 8, 8, 8))
    labels = (3 * images[:, 0]).astype(np.uint8)
    centred = 2 * images - 1
    features = np.concatenate([centred, centred**2, np.ones_like(images)], 1)
    weight = np.zeros((3, 3))
    for step in range(401):
        logits = np.einsum("kc,nc...->nk...", weight, features)
        if step % 100 == 50:
            assert diagnose(logits, labels).names == ()
        loss, grad = dice_core.loss_and_grad(logits, labels)
        weight -= 1000 * np.einsum("nkzyx,nczyx->kc", grad, features)
    assert loss < 0.3
    assert diagnose(logits, labels).names == ()


# ---- mistakes ------------------------------------------------------------------------------------

HUGE = X.copy()
HUGE[1, 2, 3, 4, 5] = 60000
MISTAKES = {
    # name of the finding, x, y, options, text of what was found, text of the remedy
    "no batch axis": ("missing_batch_axis", X[0], Y[0], {}, "missing in both", "x[None], y[None]"),
    "no batch axis of logits": (
        "missing_batch_axis", X[0], ONE_HOT[:1], {}, "missing in x", "x = x[None]",
    ),
    "no batch axis of labels": (
        "missing_batch_axis", X[:1], Y[0], {}, "missing in y", "y = y[None]",
    ),
    "no channel axis": (
        "missing_channel_axis", X[:, 0], (Y > 1)[:, None], {}, "missing in x", "x = x[:, None]",
    ),
    "no channel axis, sigmoid": (
        "missing_channel_axis", X[:, :1], Y > 1, {"activation": "sigmoid"}, "missing in y",
        "y = y[:, None]",
    ),
    "channels last": (
        "channels_last", last(X), Y, {}, "the last axis of x", "x = np.moveaxis(x, -1, 1)",
    ),
    "channels last, labels": (
        "channels_last", X, last(ONE_HOT), {}, "last axis of y", "y = np.moveaxis(y, -1, 1)",
    ),
    "channels last, both": (
        "channels_last", last(X), Y[..., None], {}, "last axis of both", "np.moveaxis(y, -1, 1)",
    ),
    "channels last, one-hot, silent": (
        "channels_last", last(X), last(ONE_HOT), {}, "sums to 1 over its last axis", "np.moveaxis",
    ),
    "superfluous axes": (
        "label_axes", X, Y[:, None, None], {}, "axes of length 1", "y.reshape((2, 6, 7, 8))",
    ),
    "other spatial axes": ("shapes_differ", X, Y[:, 1:], {}, "(6, 7, 8) and (5, 7, 8)", "crop"),
    "exchanged axes": ("shapes_differ", X, Y.swapaxes(1, 3), {}, "another order", "(N, *)"),
    "other channels": ("shapes_differ", X, ONE_HOT[:, :2], {}, "3 channels and y 2", "(N, C, *)"),
    "other samples": ("shapes_differ", X, Y[:1], {}, "numbers of samples differ", "(N, *)"),
    "no axes": ("shapes_differ", X[0, 0, 0, 0, 0], Y[0, 0], {}, "too few axes", "(N, C, *)"),
    "no channels": ("shapes_differ", X[:, :0], Y, {}, "no channels", "(N, C, *)"),
    "swapped": ("swapped_arguments", Y, X, {}, "x holds uint8", "x, y = y, x"),
    "integers": ("integer_logits", X.astype(int), Y, {}, "x holds int64", "before argmax"),
    "double softmax": (
        "double_softmax", PROBABILITIES, Y, {}, "no class more than 0.576", 'activation="none"',
    ),
    "softmax and sigmoid": (
        "probabilities_as_logits", PROBABILITIES, Y, {"activation": "sigmoid"}, "probabilities",
        "remove the softmax",
    ),
    "double sigmoid": (
        "probabilities_as_logits", SIGMOID, MULTI_LABEL, {"activation": "sigmoid"},
        "probabilities", "remove the sigmoid",
    ),
    "logits as probabilities": (
        "logits_as_probabilities", X, Y, {"activation": "none"}, "outside [0, 1]", "softmax",
    ),
    "above 1": (
        "logits_as_probabilities", 1.5 * PROBABILITIES, Y, {"activation": "none"}, "outside [0, 1]",
        "sigmoid",
    ),
    "constant": (
        "constant_logits", np.ones_like(X) * np.arange(3.0).reshape(3, 1, 1, 1), Y, {},
        "same at all 672 voxels: 0, 1, 2", "ignores its input",
    ),
    "NaN": (
        "nan_logits", with_values(X, np.nan), Y, {}, "6 logits at valid voxels are NaN; the first "
        "is at (0, 0, 0, 0, 0)", "float32",
    ),
    "+inf": (
        "infinite_logits", with_values(X, np.inf), Y, {}, "6 logits at valid voxels are +inf",
        "float32",
    ),
    "-inf": (
        "infinite_logits", with_values(X, -np.inf), Y, {}, "2 valid voxels are -inf", "float32",
    ),
    "half overflow": (
        "near_overflow", HUGE.astype(np.float16), Y, {}, "1 logit is beyond half of float16's "
        "largest number, 65504; the first is 60000 at (1, 2, 3, 4, 5)", "float32",
    ),
    "255": (
        "labels_out_of_range", X, with_values(Y, 255), {}, "2 of 672 labels are outside [0, 3): 255"
        " (2 voxels); the first is 255 at (0, 0, 0, 0)", "ignore_label=255",
    ),
    "-100": (
        "labels_out_of_range", X, with_values(Y, -100), {}, "-100 (2 voxels)", "ignore_label=-100",
    ),
    "from 1": ("labels_out_of_range", X, Y + 1, {}, "3 (2", "y = y - 1"),
    "more classes": (
        "labels_out_of_range", X, with_values(Y, 4), {}, "4 (2 voxels)", "5 output channels",
    ),
    "bytes of a bool array": (
        "labels_out_of_range", X, Y.view(bool), {}, "outside [0, 2): 2 (", "as uint8",
    ),
    "many labels": (
        "labels_out_of_range", X, Y.astype(np.int64) * 5000, {}, "5000 (", "np.searchsorted",
    ),
    "mask of 255": (
        "labels_out_of_range", X[:, :2], (Y > 1) * 255, {}, "255 (", "(y == 255).astype(np.int64)",
    ),
    "three classes in a channel": (
        "labels_out_of_range", X[:, :1], Y, {}, "two classes, background and foreground",
        "3 output",
    ),
    "float labels": ("float_labels", X, Y.astype(np.float32), {}, "float32", "y.astype(np.int64)"),
    "resampled labels": (
        "fractional_labels", X, with_values(Y.astype(float), 0.5), {}, "2 of 672", "nearest",
    ),
    "one label": ("single_label", X, Y * 0, {"smooth": 1}, "all 672 valid labels are 0", "cast"),
    "soft out of range": (
        "targets_out_of_range", X, SOFT * 2 - 1, {}, "targets are outside [0, 1]", "clip",
    ),
    "soft NaN": (
        "targets_out_of_range", X, SOFT + np.nan, {}, "2016 targets are outside", "clip",
    ),
    "one-hot times 255": ("targets_out_of_range", X, ONE_HOT * 255, {}, "255 at", "y == 255"),
    "counts as targets": (
        "targets_out_of_range", X, MULTI_LABEL * (1 + MULTI_LABEL[::-1]), {}, "2 at", "y = y > 0",
    ),
    "repeated labels": (
        "labels_as_soft_targets", X, np.repeat(Y[:, None], 3, 1), {}, "each channel", "y = y[:, 0]",
    ),
    "overlapping classes": (
        "targets_do_not_sum_to_one", X, MULTI_LABEL, {}, "exclude each other", "sigmoid",
    ),
    "no background": (
        "targets_do_not_sum_to_one", X[:, :2], ONE_HOT[:, 1:], {}, "the first sum is 0", "channel",
    ),
    "no voxels": ("no_voxels", X[:, :, :0], Y[:, :0], {}, "2 samples of 0 voxels", "empty"),
    "no samples": ("no_voxels", X[:0], Y[:0], {}, "0 samples of 336 voxels", "empty"),
    "all ignored": (
        "all_ignored", X, Y * 0 + 255, {"ignore_label": 255}, "all voxels of the batch are ignored",
        "ignore_label=None",
    ),
    "a sample ignored": (
        "all_ignored", X, np.stack([Y[0] * 0 + 9, Y[1]]), {"ignore_label": 9}, "of sample 0 are",
        "leave such samples out",
    ),
    "all ignored, soft": (
        "all_ignored", X, ONE_HOT * 0 + 9, {"ignore_label": 9}, "voxels of the batch", "leave",
    ),
    "absent": (
        "absent_classes", X, np.stack([Y[0] // 2, Y[1]]), {}, "class 2 is absent from sample 0. "
        "With smooth = 0 the loss of Dice is 1", "smooth=1",
    ),
    "absent, cross-entropy beside": (
        "absent_classes", X, Y // 2, {"term": losses.Tversky() + losses.CrossEntropy()},
        "class 2 is absent from samples 0, 1", 'losses.Tversky(absent="skip")',
    ),
    "absent from the batch": (
        "absent_classes", X, Y // 2, {"reduction": "batch"}, "class 2 is absent from the batch",
        "smooth=1",
    ),
    "absent, soft": (
        "absent_classes", X, np.minimum(MULTI_LABEL, [[[[[1]]], [[[1]]], [[[0]]]]]),
        {"activation": "sigmoid"}, "class 2 is absent from samples 0, 1", "smooth=1",
    ),
    "weights": ("class_weights", X, Y, {"weight": [1, 2]}, "3 entries", "background included"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "x", "y", "options", "found", "remedy"), MISTAKES.values(), ids=MISTAKES
)
def test_mistakes_are_found(name, x, y, options, found, remedy):
    (finding,) = (each for each in diagnose(x, y, **options) if each.name == name)
    assert found in finding.found
    assert remedy in finding.remedy
    beside = {"single_label", "absent_classes", "integer_logits", name}
    assert set(diagnose(x, y, **options).names) <= beside


def test_the_docstring_lists_the_names():
    listed = set(re.findall(r"``(\w+)``", diagnose.__doc__))
    names = {row[0] for row in MISTAKES.values()} | {"different_devices", "target_requires_grad"}
    assert listed == names


AS_CODE = r"(x|y|x, y) = [\w., ()\[\]:-]+$"  # remedies that are code and nothing else
CODE = [
    name
    for name, (kind, x, y, options, *_) in MISTAKES.items()
    if any(f.name == kind and re.match(AS_CODE, f.remedy) for f in diagnose(x, y, **options))
]


def test_most_remedies_of_axes_are_code():
    assert len(CODE) >= 11


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("library", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_remedies_that_are_code_work(name, library):
    kind, x, y, options, *_ = MISTAKES[name]
    scope = {"x": library(x), "y": library(y), "np": np}
    (finding,) = (each for each in diagnose(scope["x"], scope["y"], **options) if each.name == kind)
    exec(finding.remedy, scope)
    assert kind not in diagnose(scope["x"], scope["y"], **options).names
    assert np.isfinite(dice_core.loss(scope["x"], scope["y"], **options))


def test_several_mistakes_are_found_at_once():
    found = diagnose(last(PROBABILITIES), with_values(Y, 255).astype(np.float32))
    assert found.names == (
        "channels_last", "double_softmax", "float_labels", "labels_out_of_range",
    )  # fmt: skip


def test_an_ignored_sample_has_no_absent_classes():
    labels = np.stack([Y[0] * 0 + 9, Y[1]])
    assert diagnose(X, labels, ignore_label=9).names == ("all_ignored",)


def test_what_loss_refuses_is_found_and_what_is_nan_is_found():
    for _, x, y, options, *_ in MISTAKES.values():
        try:
            value = dice_core.loss(x, y, **options)
        except (TypeError, ValueError):
            value = np.nan
        assert np.isfinite(value) or diagnose(x, y, **options)


# ---- arrays of other libraries, sizes ------------------------------------------------------------


def test_tensors():
    x, y = torch.tensor(X, requires_grad=True), torch.tensor(Y)
    assert diagnose(x, y) == diagnose(x * 1, y.long()) == ()
    assert diagnose(x.bfloat16(), y) == ()
    assert diagnose(torch.tensor(PROBABILITIES).bfloat16(), y).names == ("double_softmax",)
    assert diagnose(torch.tensor(PROBABILITIES).half(), y).names == ("double_softmax",)
    (finding,) = diagnose(x, y.float())
    assert "y.long()" in finding.remedy
    target = torch.tensor(SOFT, requires_grad=True)
    assert diagnose(x, target).names == ("target_requires_grad",)
    assert diagnose(x, target.detach().bfloat16()).names == ()
    labels = diagnose(x, torch.tensor(with_values(Y, 255)).bfloat16())
    assert labels.names == ("float_labels", "labels_out_of_range")


def test_bfloat16_of_numpy():
    probabilities = PROBABILITIES.astype(ml_dtypes.bfloat16)
    assert diagnose(probabilities, Y).names == ("double_softmax",)


def test_devices(monkeypatch):
    """The device of one is read from its Buffer; there is no GPU here."""
    from dice_core import diagnosis

    original = diagnosis._buffer

    class Far:
        def __init__(self, buffer):
            self.buffer, self.device = buffer, "cuda:0"

        def __getattr__(self, name):
            return getattr(self.buffer, name)

    def buffer(array, name):
        found = original(array, name)
        return Far(found) if name == "x" else found

    monkeypatch.setattr(diagnosis, "_buffer", buffer)
    monkeypatch.setattr(diagnosis.allocators, "to_host", lambda each: each.owner)
    (finding,) = diagnose(X, Y)
    assert finding.name == "different_devices"
    assert finding.found == "x is on cuda:0 and y on cpu"


@pytest.mark.parametrize("block", [1, 7, 100, 1000, 5000])
def test_blocks_make_no_difference(monkeypatch, block):
    rows = [row for row in MISTAKES.values() if row[0] not in ("label_axes", "shapes_differ")]
    rows = [(x, y, options) for _, x, y, options, *_ in rows if block > 50 or x.size == 0]
    rows += [(X[:, :, :2], with_values(Y, 255)[:, :2], {}), (X, ONE_HOT, {})]
    whole = [diagnose(x, y, **options) for x, y, options in rows]
    monkeypatch.setattr(facts, "BLOCK", block)
    assert [str(diagnose(x, y, **options)) for x, y, options in rows] == list(map(str, whole))


def test_many_samples_of_one_voxel():
    x, y = RNG.standard_normal((20000, 3)), RNG.integers(0, 3, 20000)
    assert diagnose(x, y, smooth=1) == ()
    y[12345] = 255
    (finding,) = diagnose(x, y, smooth=1)
    assert "the first is 255 at (12345,)" in finding.found
    (finding,) = diagnose(x, y % 2)
    assert "class 1 is absent from samples" in finding.found
    assert "more" in finding.found


def test_the_arrays_are_not_changed():
    x, y = X.copy(), with_values(Y, 255)
    before = x.tobytes(), y.tobytes()
    x.flags.writeable = y.flags.writeable = False
    assert diagnose(x, y)
    assert (x.tobytes(), y.tobytes()) == before


# ---- the result, and wrong arguments -------------------------------------------------------------


def test_a_diagnosis_is_a_tuple_that_prints_as_text(capsys):
    found = diagnose(X, with_values(Y, 255))
    print(found)
    text = capsys.readouterr().out
    assert text == f"{found!r}\n"
    (finding,) = found
    assert isinstance(found, tuple)
    assert isinstance(finding, Finding)
    assert max(map(len, text.splitlines())) <= 100
    assert re.sub(r"\s+", " ", text).strip() == (
        f"1 finding in x float32 {SHAPE}, values {X.min():.3g} to {X.max():.3g}; y int64 "
        f"{Y.shape}, labels of 3 of 3 classes; softmax, ignore_label=-1 labels_out_of_range "
        f"{finding.found} remedy: {finding.remedy}"
    )
    assert "\nlabels_out_of_range\n  2 of 672 labels are outside " in text
    assert "\n  remedy: ignore_label=255" in text
    assert str(diagnose(last(X), with_values(Y, 255))).startswith("2 findings in x ")
    again = pickle.loads(pickle.dumps(found))
    assert (again, str(again), type(again)) == (found, str(found), Diagnosis)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((X.tolist(), Y), {}, TypeError, "x must be an array"),
        ((X, None), {}, TypeError, "y must be an array"),
        ((X.astype(complex), Y), {}, TypeError, "x must hold numbers"),
        ((X, Y.astype("U3")), {}, TypeError, "y must hold numbers"),
        ((torch.zeros(2, 3, device="meta"), Y), {}, TypeError, "x is on the meta device"),
        ((X, np.ma.masked_array(Y)), {}, TypeError, "y is a masked array"),
        ((X, Y), {"activation": "relu"}, ValueError, "activation must be one of"),
        ((X, Y), {"ignore_label": 0.5}, TypeError, "ignore_label must be an integer"),
        ((X, Y), {"smooth": -1}, ValueError, "smooth must be finite"),
        ((X, Y, "dice"), {}, TypeError, "term must be a loss"),
        ((X, Y, losses.Dice()), {"p": 2}, TypeError, "p cannot be combined with term="),
    ],
)
def test_arguments_of_a_wrong_kind(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        diagnose(*arguments, **options)
