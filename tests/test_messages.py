"""The messages for invalid arguments."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dice_core
import dice_core.torch
from dice_core import buffers, checks, losses
from dice_core.spec import Spec
from dice_core.sums import Statistics

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
Y = RNG.integers(0, 3, (2, 4, 5)).astype(np.uint8)


def message(error, function, *args, **options):
    """The text of the error, of exactly this type."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


def torch_loss(x, y, **options):
    return dice_core.torch.loss(torch.as_tensor(x), torch.as_tensor(y), **options)


def torch_statistics(x, y, **options):
    return dice_core.torch.statistics(torch.as_tensor(x), torch.as_tensor(y), **options)


def of_statistics(x, y, term=None, **options):
    return losses.of(term, **options)(dice_core.statistics(x, y))


def gradient_of_statistics(x, y, term=None, **options):
    return dice_core.gradient(x, y, dice_core.statistics(x, y), term, **options)


def module(x, y, **options):
    return dice_core.torch.DiceLoss(**options)


def module_call(x, y, **options):
    return module(x, y, **options)(torch.as_tensor(x), torch.as_tensor(y))


def named(*functions):
    return pytest.mark.parametrize("function", functions, ids=lambda function: function.__name__)


SUMMING = (
    dice_core.loss,
    dice_core.loss_and_grad,
    dice_core.statistics,
    torch_loss,
    torch_statistics,
)
SCORING = (
    dice_core.loss,
    dice_core.loss_and_grad,
    of_statistics,
    gradient_of_statistics,
    torch_loss,
)


def cases(**named_cases):
    first = next(iter(named_cases.values()))
    names = ("x", "y", "error", "text") if len(first) == 4 else ("options", "error", "text")
    return pytest.mark.parametrize(names, named_cases.values(), ids=named_cases)


# ---- shapes and dtypes -------------------------------------------------------------------------


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


@named(*SUMMING)
@cases(
    one_axis=(
        zeros(3),
        zeros(3, dtype="uint8"),
        ValueError,
        "x must have at least two axes, (N, C, d1, d2, ...), got shape (3,)",
    ),
    no_channels=(
        zeros(2, 0, 4),
        zeros(2, 4, dtype="uint8"),
        ValueError,
        "x must have at least one channel, got shape (2, 0, 4)",
    ),
    other_space=(
        zeros(2, 3, 4, 5),
        zeros(2, 5, 4, dtype="uint8"),
        ValueError,
        "y must have shape (2, 4, 5) or (2, 1, 4, 5) for x of shape (2, 3, 4, 5), got (2, 5, 4); "
        "soft targets have x's shape",
    ),
    other_batch=(
        zeros(2, 3, 4),
        zeros(1, 4, dtype="uint8"),
        ValueError,
        "y must have shape (2, 4) or (2, 1, 4) for x of shape (2, 3, 4), got (1, 4); "
        "soft targets have x's shape",
    ),
    two_label_channels=(
        zeros(2, 3, 4),
        zeros(2, 2, 4, dtype="uint8"),
        ValueError,
        "y must have shape (2, 4) or (2, 1, 4) for x of shape (2, 3, 4), got (2, 2, 4); "
        "soft targets have x's shape",
    ),
    no_batch_axis=(
        zeros(3, 4, 5),
        zeros(4, 5, dtype="uint8"),
        ValueError,
        "y must have shape (3, 5) or (3, 1, 5) for x of shape (3, 4, 5), got (4, 5); "
        "a missing batch axis? x[None] and y[None] add one",
    ),
    channels_last=(
        zeros(2, 3, 4, 5),
        zeros(2, 4, 5, 3, dtype="uint8"),
        ValueError,
        "y must have shape (2, 4, 5) or (2, 1, 4, 5) for x of shape (2, 3, 4, 5), got "
        "(2, 4, 5, 3); channels last? y.movedim(-1, 1), or numpy.moveaxis(y, -1, 1), is a view",
    ),
    no_spatial_axes=(
        zeros(2, 3),
        zeros(2, 4, dtype="uint8"),
        ValueError,
        "y must have shape (2,) or (2, 1) for x of shape (2, 3), got (2, 4); "
        "soft targets have x's shape",
    ),
    complex_targets=(
        zeros(2, 3, 4),
        zeros(2, 3, 4, dtype="complex64"),
        TypeError,
        "y must hold integer or bool class labels, got complex64",
    ),
    integer_logits=(
        zeros(2, 3, 4, dtype="int32"),
        zeros(2, 4, dtype="uint8"),
        TypeError,
        "x must hold floating-point logits (float16, bfloat16, float32, float64), got int32",
    ),
    complex_logits=(
        zeros(2, 3, 4, dtype="complex64"),
        zeros(2, 4, dtype="uint8"),
        TypeError,
        "x must hold floating-point logits (float16, bfloat16, float32, float64), got complex64",
    ),
    float_labels=(
        zeros(2, 3, 4),
        zeros(2, 4),
        TypeError,
        "y must hold integer or bool class labels, got float32; cast them to an integer dtype",
    ),
    complex_labels=(
        zeros(2, 3, 4),
        zeros(2, 4, dtype="complex64"),
        TypeError,
        "y must hold integer or bool class labels, got complex64",
    ),
)
def test_arrays_that_do_not_fit(function, x, y, error, text):
    assert message(error, function, x, y) == text


@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics, torch_statistics)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"activation": "sigmoid"},
            "y must have x's shape (2, 1, 4) for a single channel with activation 'sigmoid', "
            "got (2, 4)",
        ),
        (
            {"activation": "relu"},
            "activation must be one of 'softmax', 'sigmoid', 'none', got 'relu'",
        ),
    ],
    ids=["single channel", "unknown"],
)
def test_activations(function, options, text):
    x, y = zeros(2, 1, 4), zeros(2, 4, dtype="uint8")
    assert message(ValueError, function, x, y, **options) == text


@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics, torch_statistics)
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_soft_targets_outside_their_range(function, dtype):
    y = zeros(2, 3, 4, dtype=dtype)
    y[0, 1, 2], y[1, 2, 3], y[1, 1, 1] = -3, 2, 7
    assert message(ValueError, function, zeros(2, 3, 4), y, ignore_label=7) == (
        f"y has 2 values outside [0, 1] (7 is ignored); the first is {y[0, 1, 2]} at (0, 1, 2)"
    )


@pytest.mark.parametrize(
    ("term", "options", "text"),
    [
        (
            losses.Dice,
            {},
            "term must be a loss such as dice_core.losses.Dice(), got the class Dice",
        ),
        ("dice", {}, "term must be a loss such as dice_core.losses.Dice(), got str"),
        (
            losses.Dice(),
            {"smooth": 1},
            "smooth cannot be combined with term=: give it to the term, Dice(smooth=...)",
        ),
        (
            losses.Dice() + losses.Focal(),
            {"weight": [1, 2, 3]},
            "weight cannot be combined with term=: give it to the term, Dice + Focal(weight=...)",
        ),
    ],
    ids=["class", "name", "p", "weight"],
)
@named(dice_core.loss, dice_core.loss_and_grad)
def test_values_that_are_not_terms(function, term, options, text):
    assert message(TypeError, function, X, Y, term, **options) == text


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (
            losses.Dice(p=2),
            "Dice needs statistics with p = 2, but these have p = 1; compute them with p=2",
        ),
        (
            losses.Dice() + losses.Focal(gamma=2),
            "Dice + Focal needs statistics with gamma = 2.0, but these have gamma = None; "
            "compute them with gamma=2.0",
        ),
        (
            losses.Dice(weight=[1, 2]),
            "weight must have 3 entries, one per class, got shape (2,)",
        ),
    ],
    ids=["p", "gamma", "weight"],
)
@named(of_statistics, gradient_of_statistics)
def test_statistics_without_what_a_term_needs(function, term, text):
    assert message(ValueError, function, X, Y, term) == text


def test_statistics_that_were_not_summed():
    with pytest.raises(AttributeError) as caught:
        _ = dice_core.statistics(X, Y).cross_entropy_sum
    assert str(caught.value) == (
        "these statistics have no cross_entropy_sum (they have intersection, pred_sum, "
        "target_sum); compute them with gamma=0"
    )


@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics)
@pytest.mark.parametrize("name", ["x", "y"])
def test_lists_are_not_arrays(function, name):
    arrays = {"x": X, "y": Y} | {name: [0, 1]}
    assert message(TypeError, function, **arrays) == (
        f"{name} must be an array (NumPy, torch, CuPy, DLPack), got list; "
        f"lists and numbers are not converted, since that would copy"
    )


@named(dice_core.torch.loss, dice_core.torch.statistics, dice_core.torch.DiceLoss().forward)
@pytest.mark.parametrize("name", ["x", "y"])
def test_torch_functions_require_tensors(function, name):
    arrays = {"x": torch.as_tensor(X), "y": torch.as_tensor(Y)} | {name: X}
    assert message(TypeError, function, **arrays) == (
        f"{name} must be a torch tensor, got ndarray; dice_core.loss takes other arrays"
    )


# ---- labels ------------------------------------------------------------------------------------


def labels(dtype, *values, first=23):
    """Class 1 everywhere but for these values in a row; voxel 23 is (1, 0, 3)."""
    y = np.ones((2, 4, 5), dtype)
    y.reshape(-1)[first : first + len(values)] = values
    return y


TX, TY = torch.from_numpy(X), torch.from_numpy(Y)
MINUS_ONE, NOTHING = "-1 is ignored", "no label is ignored"


@named(*SUMMING)
@pytest.mark.parametrize(
    ("y", "ignore_label", "count", "ignored", "first"),
    [
        (labels("uint8", 255), -1, "1 label", "-1 is ignored; ignore_label=255?", 255),
        (labels("uint8", 3, 255), 255, "1 label", "255 is ignored", 3),
        (labels("uint8", 3), None, "1 label", NOTHING, 3),
        (labels("int8", -5), None, "1 label", NOTHING, -5),
        (labels("int8", -1, -1), None, "2 labels", NOTHING, -1),
        (labels("int8", 127, -128), -1, "2 labels", MINUS_ONE, 127),
        (labels("int16", -2, -1, 9), -1, "2 labels", MINUS_ONE, -2),
        (labels("uint16", 40000), 1, "1 label", "1 is ignored", 40000),
        (labels("int32", *[3] * 9), 0, "9 labels", "0 is ignored", 3),
        (labels("uint32", 2**32 - 1), -1, "1 label", MINUS_ONE, 2**32 - 1),
        (labels("int64", -(2**63)), -1, "1 label", MINUS_ONE, -(2**63)),
        (labels("int64", 2**32), 0, "1 label", "0 is ignored", 2**32),
        (labels("uint64", 2**63 + 1), -1, "1 label", MINUS_ONE, 2**63 + 1),
        (labels("uint64", 2**64 - 1), -1, "1 label", MINUS_ONE, 2**64 - 1),
        (labels("uint64", 2**64 - 1), None, "1 label", NOTHING, 2**64 - 1),
    ],
    ids=lambda value: value.dtype.name if isinstance(value, np.ndarray) else None,
)
def test_labels_out_of_range(function, y, ignore_label, count, ignored, first):
    assert message(ValueError, function, X, y, ignore_label=ignore_label) == (
        f"y has {count} outside [0, 3) ({ignored}); the first is {first} at (1, 0, 3)"
    )


def test_an_ignored_label_is_not_the_first_out_of_range():
    text = message(ValueError, dice_core.loss, X, labels("int8", -1, 7))
    assert text.endswith("the first is 7 at (1, 0, 4)")


@pytest.mark.parametrize(
    ("shape", "position"),
    [((3,), (1,)), ((3, 1), (1, 0)), ((3, 6), (1, 5)), ((3, 1, 2, 3), (1, 0, 1, 2))],
    ids=str,
)
def test_the_position_is_an_index_into_y_as_given(shape, position):
    y = np.zeros(shape, np.uint8)
    y[position] = 9
    space = {(3,): (), (3, 1): (), (3, 6): (6,), (3, 1, 2, 3): (2, 3)}[shape]
    text = message(ValueError, dice_core.loss, np.zeros((3, 2, *space), np.float32), y)
    assert text.endswith(f"the first is 9 at {position}")


def test_a_single_channel_has_two_classes():
    text = message(ValueError, dice_core.loss, X[:, :1], labels("uint8", 2))
    assert text == "y has 1 label outside [0, 2) (-1 is ignored); the first is 2 at (1, 0, 3)"


@named(*SUMMING)
@pytest.mark.parametrize("channels", [1, 2])
def test_bool_labels_are_always_in_range(function, channels):
    function(X[:, :channels], Y > 0, ignore_label=None)


@named(*SUMMING)
def test_bfloat16_targets_out_of_range(function):
    """NumPy, which writes the message, has no such numbers."""
    y = torch.zeros(TX.shape, dtype=torch.bfloat16)
    y[1, 2, 3, 4], y[1, 0, 0, 0] = 1.5, -1
    assert message(ValueError, function, TX, y) == (
        "y has 1 value outside [0, 1] (-1 is ignored); the first is 1.5 at (1, 2, 3, 4)"
    )


def nested(layout):
    return torch.nested.nested_tensor([TX[0], TX[1]], layout=layout)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@named(*SUMMING)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(function, layout):
    remedy = "torch.nested.to_padded_tensor gives a plain one"
    text = message(TypeError, function, nested(layout), TY)
    assert text == f"x is a nested tensor; {remedy}"
    text = message(TypeError, function, TX, nested(layout))
    assert text == f"y is a nested tensor; {remedy}"


WITHOUT_MEMORY = (
    "{} is a {} without memory: torch traces or transforms it (dice_core.torch takes such "
    "tensors), or its storage was freed"
)


@named(*SUMMING)
@pytest.mark.parametrize("name", ["x", "y"])
def test_tensors_whose_storage_was_freed(function, name):
    arrays = {"x": TX.clone(), "y": TY.clone()}
    arrays[name].untyped_storage().resize_(0)
    assert message(TypeError, function, **arrays) == WITHOUT_MEMORY.format(name, "Tensor")


def test_storage_freed_before_the_backward_pass():
    x = TX.clone().requires_grad_()
    value = torch_loss(x, TY)
    x.untyped_storage().resize_(0)
    assert message(TypeError, value.backward) == WITHOUT_MEMORY.format("x", "Tensor")


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics)
def test_tensors_without_memory(function):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(TX)
    assert message(TypeError, function, fake, TY) == WITHOUT_MEMORY.format("x", "FakeTensor")
    text = message(TypeError, torch.func.vmap(lambda x: function(x, TY)), TX[None])
    assert text == WITHOUT_MEMORY.format("x", "Tensor")


def score(x, y, **options):
    return dice_core.score(x, y, **options)


def bytes_as_bool(*values):
    return labels("uint8", *values).view(bool)


@named(*SUMMING, score)
@pytest.mark.parametrize("ignore_label", [None, 255])
@pytest.mark.parametrize("values", [(2, 0), (2, 255), (255, 1), (0, 128)], ids=str)
def test_bytes_that_are_not_bool(function, values, ignore_label):
    """NumPy and torch disagree about such bytes, as do compilers."""
    wrong = [value for value in values if value > 1]
    at = 23 + values.index(wrong[0])
    text = message(ValueError, function, X, bytes_as_bool(*values), ignore_label=ignore_label)
    assert text == (
        f"y is bool and has {len(wrong)} label{'s'[: len(wrong) > 1]} whose byte is neither 0 nor "
        f"1; the first is {wrong[0]} at (1, 0, {at - 20}); view y as uint8 to use such numbers"
    )


@named(*SUMMING)
def test_soft_targets_whose_bytes_are_not_bool(function):
    y = np.stack([bytes_as_bool(2, 255), bytes_as_bool(1, 3), bytes_as_bool()], 1)
    assert message(ValueError, function, X, y) == (
        "y is bool and has 3 values whose byte is neither 0 nor 1; the first is 2 at (1, 0, 0, 3); "
        "view y as uint8 to use such numbers"
    )


def test_binary_targets_whose_bytes_are_not_bool():
    y = np.stack([bytes_as_bool(2)] * 3, 1)
    y, request = buffers.of(y, "y"), Spec(targets="binary")
    assert message(ValueError, checks.targets, y, request, 3).startswith(
        "y is bool and has 3 values whose byte is neither 0 nor 1; the first is 2 at (1, 0, 0, 3)"
    )


def test_a_count_that_cannot_be_reproduced_blames_nobody():
    y = buffers.of(Y, "y")
    assert message(ValueError, checks.targets, y, Spec(ignore_label=-1), 3, 2) == (
        "y had 2 labels outside [0, 3) (-1 is ignored) when it was summed and has none now: it "
        "must not change during a call"
    )


def test_out_of_range_labels_leave_x_alone():
    x, y = X.copy(), labels("uint8", 9)
    message(ValueError, dice_core.loss_and_grad, x, y, out=x)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, labels("uint8", 9))


# ---- options -----------------------------------------------------------------------------------

NAN = float("nan")


@named(*SUMMING, module_call)
@cases(
    p_zero=({"p": 0}, ValueError, "p must be an integer from 1 to 2**31 - 1, got 0"),
    p_negative=({"p": -1}, ValueError, "p must be an integer from 1 to 2**31 - 1, got -1"),
    p_large=({"p": 2**31}, ValueError, f"p must be an integer from 1 to 2**31 - 1, got {2**31}"),
    p_float=({"p": 1.5}, TypeError, "p must be an integer, got float"),
    p_bool=({"p": True}, TypeError, "p must be an integer, got bool"),
    p_text=({"p": "2"}, TypeError, "p must be an integer, got str"),
    label_float=({"ignore_label": 1.0}, TypeError, "ignore_label must be an integer, got float"),
    label_bool=({"ignore_label": False}, TypeError, "ignore_label must be an integer, got bool"),
    label_text=({"ignore_label": "1"}, TypeError, "ignore_label must be an integer, got str"),
)
def test_options_of_the_sums(function, options, error, text):
    assert message(error, function, X, Y, **options) == text


@named(*SUMMING)
@cases(
    zero=({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
    bool=({"num_threads": True}, TypeError, "num_threads must be an integer, got bool"),
    float=({"num_threads": 1.5}, TypeError, "num_threads must be an integer, got float"),
)
def test_threads(function, options, error, text):
    assert message(error, function, X, Y, **options) == text


REDUCTIONS = "reduction must be one of 'mean', 'sum', 'none', 'classes', 'batch', got "
NUMBERS = "weight must be numbers, one per class, got "


@named(*SCORING, module)
@cases(
    smooth_negative=(
        {"smooth": -1},
        ValueError,
        "smooth must be finite and at least 0, got -1.0",
    ),
    smooth_nan=({"smooth": NAN}, ValueError, "smooth must be finite and at least 0, got nan"),
    smooth_inf=(
        {"smooth": float("inf")},
        ValueError,
        "smooth must be finite and at least 0, got inf",
    ),
    smooth_huge=(
        {"smooth": 10**400},
        ValueError,
        "smooth must be finite and at least 0, got inf",
    ),
    smooth_text=({"smooth": "a lot"}, TypeError, "smooth must be a number, got str"),
    smooth_none=({"smooth": None}, TypeError, "smooth must be a number, got NoneType"),
    channel_float=(
        {"ignore_channel": 0.0},
        TypeError,
        "ignore_channel must be an integer, got float",
    ),
    channel_bool=(
        {"ignore_channel": True},
        TypeError,
        "ignore_channel must be an integer, got bool",
    ),
    channel_none=(
        {"ignore_channel": None},
        TypeError,
        "ignore_channel must be an integer, got NoneType",
    ),
    reduction=({"reduction": "average"}, ValueError, REDUCTIONS + "'average'"),
    reduction_none=({"reduction": None}, ValueError, REDUCTIONS + "None"),
    weight_nan=(
        {"weight": [1, NAN, 2]},
        ValueError,
        "weight must be finite, got [1.0, nan, 2.0]",
    ),
    weight_text=({"weight": "uniform"}, TypeError, NUMBERS + "'uniform'"),
    weight_ragged=({"weight": [1, [2], 3]}, TypeError, NUMBERS + "[1, [2], 3]"),
    weight_dict=({"weight": {0: 1}}, TypeError, NUMBERS + "{0: 1}"),
    weight_complex=({"weight": np.array([1j])}, TypeError, NUMBERS + "array([0.+1.j])"),
)
def test_options_of_the_score(function, options, error, text):
    assert message(error, function, X, Y, **options) == text


@named(*SCORING, module_call)
@pytest.mark.parametrize(
    ("channels", "weight", "text"),
    [
        (3, [1, 2], "weight must have 3 entries, one per class, got shape (2,)"),
        (3, [[1, 2, 3]], "weight must have 3 entries, one per class, got shape (1, 3)"),
        (3, 1.0, "weight must have 3 entries, one per class, got shape ()"),
        (
            1,
            [1],
            "weight must have 2 entries, one per class "
            "(one channel is two classes, background and foreground), got shape (1,)",
        ),
    ],
    ids=["short", "two_axes", "number", "one_channel"],
)
def test_weight_of_another_shape(function, channels, weight, text):
    assert message(ValueError, function, X[:, :channels], Y % 2, weight=weight) == text


def test_tensor_weight_of_another_shape():
    weight = torch.ones(2, requires_grad=True)
    text = message(ValueError, torch_loss, X, Y, weight=weight)
    assert text == "weight must have 3 entries, one per class, got shape (2,)"


@named(*SUMMING, module_call)
def test_ignored_labels_beyond_any_target(function):
    function(X, Y, ignore_label=-(2**1022))
    text = message(ValueError, function, X, Y, ignore_label=10**400)
    assert text == "ignore_label must lie within float64's range, got 1329 bits"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: dice_core.loss(X, Y, backend=["cpu"]),
            "backend must be a name or None, got list",
        ),
        (
            lambda: dice_core.loss(X, Y, smooth=np.array([1.0, 2])),
            "smooth must be a number, got array([1., 2.])",
        ),
        (
            lambda: dice_core.gradient(X, Y, "sums"),
            "statistics must be those of dice_core.statistics, got str",
        ),
        (
            lambda: losses.Dice()(X),
            "statistics must be those of dice_core.statistics, got ndarray",
        ),
        (
            lambda: dice_core.torch.DeepSupervision(losses.Dice()),
            "loss must be a module such as DiceLoss(), got Dice",
        ),
        (
            lambda: dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss(), "12"),
            "weights must be numbers, one for each output, got str",
        ),
        (
            lambda: dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss(), 3),
            "weights must be numbers, one for each output, got int",
        ),
        (
            lambda: dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss())([X], "y"),
            "outputs must be a sequence of Tensors, got a ndarray in it",
        ),
        (
            lambda: dice_core.torch.DeepSupervision(dice_core.torch.DiceLoss())([TX], "y"),
            "y must be a sequence of Tensors, got a str in it",
        ),
        (
            lambda: dice_core.loss(X, Y, check_labels="0"),
            "check_labels must be True or False, got str",
        ),
        (
            lambda: dice_core.torch.DiceLoss(check_labels=2),
            "check_labels must be True or False, got int",
        ),
        (lambda: dice_core.statistics(X, Y, nll="no"), "nll must be True or False, got str"),
        (
            lambda: dice_core.torch.statistics(TX, TY, target_square=torch.ones(3)),
            "target_square must be True or False, got Tensor",
        ),
        (
            lambda: losses.Dice(target_square=np.ones(3)),
            "target_square must be True or False, got ndarray",
        ),
        (
            lambda: losses.FocalTversky(of_mean="no"),
            "of_mean must be True or False, got str",
        ),
        (lambda: dice_core.torch.DiceScore(iou=None), "iou must be True or False, got NoneType"),
        (
            lambda: dice_core.loss(X, Y, weight=np.ma.masked_array([1, 2, 3], [0, 1, 0])),
            "weight is a masked array, whose mask would be ignored",
        ),
        (
            lambda: dice_core.loss_and_grad(X, Y, grad_loss=np.ma.masked_array(1.0, True)),
            "grad_loss is a masked array, whose mask would be ignored",
        ),
        (
            lambda: dice_core.loss_and_grad(X, Y, grad_loss=[torch.ones(1, requires_grad=True)]),
            "grad_loss must be numbers, got list",
        ),
        (
            lambda: torch_loss(X, Y, weight=torch.ones(3).to_sparse()),
            "weight must be a dense tensor",
        ),
        (
            lambda: torch_loss(X, Y, weight=torch.ones(3, device="meta")),
            "weight is on the meta device, where it has no numbers",
        ),
        (
            lambda: dice_core.loss_and_grad(X, Y, out=TX.clone().requires_grad_()),
            "out requires grad, and no gradient would reach it: pass out.detach(), or "
            "compute with it in torch, outside the loss",
        ),
        (lambda: dice_core.loss(np.ndarray, Y), "x must be an array, got the class ndarray"),
        (lambda: dice_core.loss(TX, torch.Tensor), "y must be an array, got the class Tensor"),
        (
            lambda: dice_core.torch.Loss(None),
            "term must be a loss such as dice_core.losses.Dice(), got None",
        ),
        (
            lambda: torch_loss(X, Y, weight=torch.ones(3, dtype=torch.complex64)),
            "weight must be numbers, one per class, got torch.complex64",
        ),
        (
            lambda: dice_core.loss(X, Y, weight=torch.ones(3, requires_grad=True)),
            "weight requires grad, and no gradient would reach it: pass weight.detach(), or "
            "compute with it in torch, outside the loss",
        ),
    ],
)
def test_arguments_of_a_wrong_kind(call, text):
    assert message(TypeError, call) == text


# ---- out and grad_loss -------------------------------------------------------------------------

MEMORY = np.zeros(2 * X.size + 1, np.float32)
IN_MEMORY = MEMORY[: X.size].reshape(X.shape)


def readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def cuda_array(a, device=0):
    """An array on another device, whose memory is never accessed."""
    interface = {"shape": a.shape, "typestr": a.dtype.str, "data": (4096, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=interface, device=SimpleNamespace(id=device))


OUT = {
    "list": (
        X,
        [0.0],
        TypeError,
        "out must be an array (NumPy, torch, CuPy, DLPack), got list; "
        "lists and numbers are not converted, since that would copy",
    ),
    "shape": (
        X,
        np.empty((2, 3, 5, 4), np.float32),
        ValueError,
        "out must have x's shape (2, 3, 4, 5), got (2, 3, 5, 4)",
    ),
    "dtype": (
        X,
        np.empty(X.shape, np.float64),
        ValueError,
        "out must have x's dtype float32, got float64",
    ),
    "device": (
        X,
        cuda_array(X),
        ValueError,
        "out must have x's device cpu, got cuda:0",
    ),
    "readonly": (X, readonly(X), ValueError, "out is read-only"),
    "partly_x": (
        IN_MEMORY,
        MEMORY[1 : X.size + 1].reshape(X.shape),
        ValueError,
        "out overlaps x; it must be x itself or share no memory with it",
    ),
    "x_reversed": (
        IN_MEMORY,
        IN_MEMORY[::-1],
        ValueError,
        "out overlaps x; it must be x itself or share no memory with it",
    ),
    "x_in_another_order": (
        IN_MEMORY,
        MEMORY[: X.size].reshape(X.shape, order="F"),
        ValueError,
        "out overlaps x; it must be x itself or share no memory with it",
    ),
    "itself": (
        X,
        np.lib.stride_tricks.as_strided(MEMORY, X.shape, (0, 80, 20, 4)),
        ValueError,
        "out must not have elements that share memory (strides (0, 80, 20, 4))",
    ),
}


@named(dice_core.loss_and_grad, gradient_of_statistics)
@pytest.mark.parametrize(("x", "out", "error", "text"), OUT.values(), ids=OUT)
def test_out_that_does_not_fit(function, x, out, error, text):
    before = x.copy()
    assert message(error, function, x, Y, out=out) == text
    np.testing.assert_array_equal(x, before)


@named(dice_core.loss_and_grad, gradient_of_statistics)
@pytest.mark.parametrize("start", [0, 40, X.size - 1])
def test_out_that_overlaps_y(function, start):
    out = np.zeros(X.size + Y.size, np.float32)
    y = out.view(np.int32)[start : start + 40].reshape(Y.shape)
    text = message(ValueError, function, X, y, out=out[: X.size].reshape(X.shape))
    assert text == "out overlaps y"
    assert not out.any()


def test_out_may_be_x_or_interleaved_with_it():
    _, expected = dice_core.loss_and_grad(X, Y)
    both = np.stack([X, X], -1)
    for x, out in ((both[..., 0], both[..., 1]), (both[..., 0], both[..., 0])):
        _, given = dice_core.loss_and_grad(x, Y, out=out)
        assert given is out
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-8)


@named(dice_core.loss_and_grad, gradient_of_statistics)
@cases(
    vector=(
        {"grad_loss": [1, 2]},
        ValueError,
        "grad_loss must have the loss's shape (), got (2,)",
    ),
    too_long=(
        {"grad_loss": [1, 2, 3], "reduction": "none"},
        ValueError,
        "grad_loss must have the loss's shape (2,), got (3,)",
    ),
    text=({"grad_loss": "one"}, TypeError, "grad_loss must be numbers, got str"),
    complex=({"grad_loss": np.array(1j)}, TypeError, "grad_loss must be numbers, got ndarray"),
)
def test_grad_loss(function, options, error, text):
    assert message(error, function, X, Y, **options) == text


# ---- devices and autograd ----------------------------------------------------------------------


@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics)
@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (cuda_array(X), Y, "x is on cuda:0 but y is on cpu; move y to x's device"),
        (X, cuda_array(Y), "x is on cpu but y is on cuda:0; move y to x's device"),
        (
            cuda_array(X),
            cuda_array(Y, 1),
            "x is on cuda:0 but y is on cuda:1; move y to x's device",
        ),
    ],
    ids=["x", "y", "two"],
)
def test_arrays_on_different_devices(function, x, y, text):
    assert message(ValueError, function, x, y) == text


@named(dice_core.loss, dice_core.loss_and_grad, dice_core.statistics)
def test_tensors_that_require_grad_are_refused(function):
    x = torch.from_numpy(X.copy()).requires_grad_()
    assert message(TypeError, function, x, Y) == (
        "x requires grad, but the functions of dice_core do not record gradients: "
        "use dice_core.torch.loss, or pass x.detach()"
    )
    function(x.detach(), Y)


def test_second_derivative():
    x = torch.zeros(1, 2, 3, requires_grad=True)
    loss = dice_core.torch.loss(x, torch.zeros(1, 3, dtype=torch.uint8))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    text = message(RuntimeError, grad.sum().backward)
    assert text == "dice_core computes first derivatives only and cannot be differentiated twice"


# ---- statistics of several tiles ---------------------------------------------------------------

SUMS = "softmax, p = {}, ignore_label = {}"


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            dice_core.statistics(X, Y, p=2),
            f"sums: {SUMS.format(1, -1)} and {SUMS.format(2, -1)}",
        ),
        (
            dice_core.statistics(X, Y, ignore_label=None),
            f"sums: {SUMS.format(1, -1)} and {SUMS.format(1, None)}",
        ),
        (
            dice_core.statistics(X.astype("f8"), Y),
            "logits' dtypes: float32 and float64",
        ),
        (
            dice_core.statistics(X[:1], Y[:1]),
            "shapes (K, N, C): (3, 2, 3) and (3, 1, 3)",
        ),
        (
            dice_core.statistics(X[:, :2], Y % 2),
            "shapes (K, N, C): (3, 2, 3) and (3, 2, 2)",
        ),
        (
            dice_core.torch.statistics(TX, TY),
            "kinds of arrays: others and torch's",
        ),
    ],
    ids=["p", "ignore_label", "dtype", "samples", "classes", "library"],
)
def test_statistics_that_cannot_be_added(other, text):
    given = message(ValueError, dice_core.statistics(X, Y).__add__, other)
    assert given == f"cannot add statistics with different {text}"


@pytest.mark.parametrize(
    ("array", "shape"), [(None, ()), (np.zeros((3, 2)), (3, 2)), (np.zeros((4, 2, 3)), (4, 2, 3))]
)
def test_statistics_of_another_shape(array, shape):
    text = message(ValueError, losses.Dice(), Statistics(array, Spec()))
    assert text == f"statistics must have the shape (3, N, C) of their sums, got {shape}"


def test_factors_that_overflow():
    text = message(ValueError, (1e300 * losses.Dice()).__mul__, 1e300)
    assert text == "a term's factor must be finite and at least 0, got inf"


def test_statistics_add_to_nothing_else():
    with pytest.raises(TypeError, match="unsupported operand"):
        dice_core.statistics(X, Y) + 1


@pytest.mark.parametrize(
    ("x", "y", "parts"),
    [
        (X[:1], Y[:1], ["(3, 1, 3)", "(3, 2, 3)"]),
        (X[:, :2], Y % 2, ["(3, 2, 2)", "(3, 2, 3)"]),
        (X, np.stack([Y == 0, Y == 1, Y == 2], 1), ["soft targets", "(3, 2, 3)"]),
        (X.astype("f8"), Y, ["float64", "float32"]),
    ],
    ids=["samples", "classes", "targets", "dtype"],
)
def test_a_tile_that_does_not_fit(x, y, parts):
    text = message(ValueError, dice_core.gradient, x, y, dice_core.statistics(X, Y))
    found, expected = text.split(", not ")
    assert found.startswith("x and y do not match these statistics: ")
    assert parts[0] in found
    assert parts[1] in expected
    assert "Spec(" not in text
