"""The losses on (K, N, C) sums: values by hand, derivatives in two other ways, identities."""

import math

import mpmath
import numpy as np
import pytest
import torch
from compare import assert_bitwise_equal, assert_close
from pairwise import pairwise
from torch.nn import functional as F

import dice_core.torch
from dice_core import losses
from dice_core.allocators import quiet
from dice_core.calls import cotangent
from dice_core.losses import TERMS, CrossEntropy, Dice, Focal, Jaccard, Tversky
from dice_core.spec import Spec
from dice_core.sums import Statistics

EVERY_SUM = Spec(gamma=0.0, nll=True, binary_gamma=0.0)  # I, P, Y, H, L, B+, B-
WEIGHT = (0.2, 1.5, 0.7)
# The settings of each term, besides the shared ones.
OWN = {
    "Tversky": [{}, {"alpha": 0.3, "beta": 1.2}],
    "FocalTversky": [{}, {"gamma": 2}, {"of_mean": True}, {"of_mean": True, "gamma": 1.5}],
    "LogDice": [{}, {"eps": 0.3}],
    "GeneralizedDice": [{"weighting": w} for w in ("square", "simple", "uniform")],
    "CrossEntropy": [{}, {"label_smoothing": 0.2}, {"divisor": "weights"}],
    "Focal": [{}, {"gamma": 0.5}],
    "BinaryCrossEntropy": [{}, {"pos_weight": [3, 1, 2]}, {"ignore_channel": 0}],
    "SigmoidFocal": [{}, {"alpha": 0.25, "ignore_channel": (1, 2)}],
}
SHARED = {
    "overlap": [
        {},
        {"weight": WEIGHT},
        {"weight": WEIGHT, "divisor": "weights", "ignore_channel": 1},
        {"ignore_channel": (0, 2), "divisor": "kept"},
        {"ignore_channel": 3, "smooth": 1.0},
        {"smooth": (0.0, 1e-5), "absent": "skip"},
        {"smooth": 1e-5, "absent": "zero", "divisor": "kept"},
        {"absent": "one", "weight": WEIGHT},
        {"absent": "skip", "ignore_channel": 0, "weight": WEIGHT, "divisor": "weights"},
        {"floor": 6.0},
        {"floor": 1e-8, "smooth": 1.0},
    ],
    "voxels": [
        {},
        {"weight": WEIGHT},
        {"divisor": "one"},
    ],
}


def fits(own, shared, pool, reduction):
    if reduction == "none":
        return pool not in ("batch", "all")
    return reduction != "classes" or not (pool in ("classes", "all") or own.get("of_mean"))


def settings_of(kind):
    """Terms of a kind with every pair of settings."""
    shared = SHARED["voxels" if issubclass(kind, losses.VoxelLoss) else "overlap"]
    reductions = ("mean", "sum", "none", "classes")
    axes = (OWN.get(kind.__name__, [{}]), shared, kind.pools, reductions)
    for own, common, pool, reduction in pairwise(*axes, allowed=fits):
        yield kind(**{**own, **common}, pool=pool, reduction=reduction)


SETTINGS = [term for entry in TERMS for term in settings_of(entry.term)]
SETTINGS += [
    Dice(smooth=1) + 0.5 * CrossEntropy(weight=WEIGHT),
    2 * (Jaccard(pool="batch") + Tversky(pool="batch", reduction="sum") * 3) + Focal(),
    Dice(reduction="none") + CrossEntropy(pool="none", reduction="none"),
]


def value_of(term, sums):
    """The loss of (7, N, C) or (3, N, C), NumPy's or torch's."""
    with quiet(sums):
        return term.value(Statistics(sums, EVERY_SUM if len(sums) == 7 else Spec()))


def with_derivative(term, sums):
    with quiet(sums):
        return term.with_derivative(Statistics(sums, EVERY_SUM))


def random_sums(seed=0):
    """(7, 4, 3) with 0 <= I <= min(P, Y), one class empty and predicted empty."""
    rng = np.random.default_rng(seed)
    pred, target, *entropies = rng.random((6, 4, 3)) * 10
    intersection = np.minimum(pred, target) * rng.random((4, 3))
    sums = np.stack([intersection, pred, target, *entropies])
    sums[:, 2, 0] = 0
    sums[[0, 2, 3, 5], 1, 2] = 0  # absent, but predicted
    return sums


def upstream_for(value, seed=1):
    return np.random.default_rng(seed).standard_normal(np.shape(value))


DIFFERENTIATED = [0, 1, 3, 4, 5, 6]  # Y does not depend on the logits


@pytest.mark.parametrize("term", SETTINGS, ids=repr)
def test_derivative_is_torch_autograd(term):
    sums = random_sums()
    value, derivative = with_derivative(term, sums)
    assert_bitwise_equal(value, value_of(term, sums))
    assert np.shape(value) == term.shape(4, 3)
    upstream = upstream_for(value)
    tensor = torch.tensor(sums, requires_grad=True)
    theirs = value_of(term.with_weights([*map(torch.tensor, term.weights)]), tensor)
    assert_close(value, theirs.detach(), rtol=1e-14)
    (grad,) = torch.autograd.grad(theirs, tensor, torch.as_tensor(upstream))
    mine = cotangent(derivative, upstream)[DIFFERENTIATED]
    assert_close(mine, grad[DIFFERENTIATED], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("term", SETTINGS, ids=repr)
def test_derivative_is_finite_differences(term):
    sums = random_sums()
    sums[:2, :, 0] += 0.3  # away from 0/0, where the derivative is defined, not differentiated
    sums[2, :, 0] += 1
    sums[0] += 0.1
    if isinstance(term, losses.MCC):
        sums[2, 1, 2] = 1  # the root has no derivative at 0
        sums[1] = np.minimum(sums[1], sums[2].sum(-1, keepdims=True) / 2)
    value, derivative = with_derivative(term, sums)
    upstream = upstream_for(value)
    mine = cotangent(derivative, upstream)
    for index in np.ndindex(sums.shape):
        if index[0] not in DIFFERENTIATED:
            continue
        step = np.zeros_like(sums)
        step[index] = 1e-5
        low, high = value_of(term, sums - step), value_of(term, sums + step)
        difference = np.sum(upstream * (high - low)) / 2e-5
        assert_close(mine[index], difference, rtol=1e-6, atol=1e-8, what=str(index))


# ---- values --------------------------------------------------------------------------------------

# A sample, two classes: I, P, Y, H, L, B+, B-
ONE = np.array([[3.0, 1], [4, 2], [4, 3], [2, 6], [9, 5], [1, 2], [3, 4]])[:, None]


@pytest.mark.parametrize(
    ("term", "value"),
    [
        (Dice(), (0.25 + 0.6) / 2),
        (Dice(weight=[2, 1]), 2 * 0.25 + 0.6),
        (Dice(weight=[2, 1], divisor="weights"), (2 * 0.25 + 0.6) / 3),
        (Dice(weight=[2, 1], divisor="classes"), (2 * 0.25 + 0.6) / 2),
        (Dice(ignore_channel=1), 0.25 / 2),
        (Dice(ignore_channel=1, divisor="kept"), 0.25),
        (Dice(ignore_channel=[0, 1], divisor="kept"), 0),
        (Dice(ignore_channel=1, weight=[2, 1], divisor="weights"), 0.25),
        (Dice(smooth=1), (2 / 9 + 0.5) / 2),
        (Dice(smooth=(0, 1)), (1 - 6 / 9 + 1 - 2 / 6) / 2),
        (Dice(pool="classes"), 1 - 8 / 13),
        (Dice(pool="classes", weight=[1, 2]), 1 - (6 + 4) / (8 + 10)),
        (Dice(pool="classes", ignore_channel=0), 0.6),
        (Dice(reduction="classes"), [[0.25, 0.6]]),
        (Dice(floor=10), (1 - 6 / 10 + 1 - 2 / 10) / 2),
        (Jaccard(), (1 - 3 / 5 + 1 - 1 / 4) / 2),
        (Tversky(alpha=1, beta=0), (1 - 3 / 4 + 1 - 1 / 2) / 2),
        (losses.FocalTversky(alpha=1, beta=0, gamma=2), (1 / 16 + 1 / 4) / 2),
        (losses.FocalTversky(alpha=1, beta=0, gamma=2, of_mean=True), (3 / 8) ** 2),
        (losses.LogDice(), -(math.log(0.75) + math.log(0.4)) / 2),
        (losses.LogCoshDice(), (math.log(math.cosh(0.25)) + math.log(math.cosh(0.6))) / 2),
        (losses.GeneralizedDice(weighting="uniform"), 1 - 8 / 13),
        (losses.GeneralizedDice(), 1 - 2 * (3 / 16 + 1 / 9) / (8 / 16 + 5 / 9)),
        (losses.GeneralizedDice(weighting="simple"), 1 - 2 * (3 / 4 + 1 / 3) / (2 + 5 / 3)),
        (CrossEntropy(), 8 / 7),
        (CrossEntropy(weight=[1, 2]), 14 / 10),
        (CrossEntropy(weight=[1, 2], divisor="voxels"), 14 / 7),
        (CrossEntropy(reduction="classes"), [[2 / 7, 6 / 7]]),
        (CrossEntropy(divisor="one"), 8),
        (CrossEntropy(label_smoothing=0.5), (0.5 * 8 + 0.25 * 14) / 7),
        (losses.BinaryCrossEntropy(), 10 / 14),
        (losses.BinaryCrossEntropy(pos_weight=[2, 3]), (10 + 1 + 4) / 14),
        (losses.BinaryCrossEntropy(ignore_channel=0, weight=[5, 2]), 2 * 6 / 7),
        (losses.SigmoidFocal(alpha=0.25), (0.25 * 3 + 0.75 * 7) / 14),
        (losses.SigmoidFocal(divisor="one"), 10),
        (Dice() + 0.5 * CrossEntropy(), (0.25 + 0.6) / 2 + 4 / 7),
        (2 * (Dice() + CrossEntropy()), 0.25 + 0.6 + 16 / 7),
    ],
    ids=repr,
)
def test_by_hand(term, value):
    assert_close(value_of(term, ONE), np.asarray(value), rtol=1e-14)


def test_the_floor_of_a_large_negative_denominator():
    sums = np.array([7e4, -1e20, 5.0]).reshape(3, 1, 1)  # of "probabilities" that are negative
    assert_close(value_of(Dice(floor=1e-3), sums), np.asarray(1 - 1.4e5 / 1e-3), rtol=1e-14)


def test_matthews_correlation_is_scikit_learn_s_formula():
    i, p, y, v = 3.0, 4.0, 4.0, 7.0
    tp, fp, fn, tn = i, p - i, y - i, v - p - y + i
    q = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    each = value_of(losses.MCC(reduction="classes"), ONE)
    assert each[0, 0] == pytest.approx(1 - q)


def test_absent_classes():
    sums = np.array([[[2.0, 0.0, 0.0]], [[2.0, 1.0, 0.0]], [[4.0, 0.0, 0.0]]])
    values = {a: float(value_of(Dice(absent=a), sums)) for a in ("count", "skip", "zero", "one")}
    assert values == pytest.approx(
        {"count": (1 / 3 + 1) / 3, "skip": 1 / 3, "zero": 1 / 9, "one": 7 / 9}
    )
    nothing = np.zeros((3, 2, 3))
    assert value_of(Dice(absent="skip", reduction="none"), nothing).tolist() == [0, 0]


def test_an_absent_class_gets_the_weight_of_a_class_that_is_left():
    sums = np.array([[[0.0, 1, 3]], [[2.0, 1, 4]], [[0.0, 1, 4]]])
    term = losses.GeneralizedDice(ignore_channel=1)
    assert_close(value_of(term, sums), np.asarray(1 - 2 * 3 / (2 + 8)), rtol=1e-14)


def test_a_channel_may_be_ignored_twice():
    twice, once = (losses.BinaryCrossEntropy(ignore_channel=c) for c in ([0, 0], 0))
    assert value_of(twice, random_sums()) == value_of(once, random_sums())


def test_valid_voxels_of_soft_targets_are_the_mean_over_the_classes():
    sums = np.ones((5, 1, 3))
    sums[3], sums[4] = [1, 2, 3], [4, 5, 9]  # cross-entropy, valid voxels
    value = CrossEntropy().value(Statistics(sums, Spec(gamma=0.0, targets="soft")))
    assert float(value) == pytest.approx(6 / 6)


def test_a_perfect_prediction_has_loss_zero():
    sums = np.array([[[5.0, 0.0]]] * 3 + [[[0.0, 0.0]]] * 4)
    sums = np.concatenate([sums, sums[..., ::-1]], axis=1)
    for entry in TERMS:
        value, derivative = with_derivative(entry.term(), sums)
        assert value == pytest.approx(0, abs=1e-15)
        assert np.isfinite(derivative).all()
    _, derivative = with_derivative(Dice(), sums)
    assert not derivative[:, 0, 1].any()


def test_dice_and_jaccard_are_tversky():
    sums = random_sums()
    assert_close(value_of(Dice(smooth=2), sums), value_of(Tversky(smooth=1), sums), rtol=1e-13)
    assert_close(value_of(Jaccard(), sums), value_of(Tversky(alpha=1, beta=1), sums), rtol=1e-13)
    jaccard, dice = (value_of(kind(reduction="classes"), sums) for kind in (Jaccard, Dice))
    assert_close(jaccard, 2 * dice / (1 + dice), rtol=1e-13)


def test_cross_entropy_is_torch_s():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (2, 40), generator=generator)
    own = x.log_softmax(1).gather(1, y[:, None])[:, 0]
    one_hot = F.one_hot(y, 3).to(x)
    sums = np.zeros((7, 2, 3))
    sums[2], sums[3] = one_hot.sum(1), (one_hot * -own[..., None]).sum(1)
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    for w, mine in ((None, CrossEntropy()), (weight, CrossEntropy(weight=WEIGHT))):
        assert_close(value_of(mine, sums), F.cross_entropy(x, y, w), rtol=1e-13)
        alone = F.cross_entropy(x[:1], y[:1], w)
        each = CrossEntropy(weight=mine.weight, pool="none", reduction="none")
        assert_close(value_of(each, sums)[0], alone, rtol=1e-13)


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
def test_classes_permute(entry):
    sums, order = random_sums(), [2, 0, 1]
    weight = np.array(WEIGHT)
    before = value_of(entry.term(weight=weight), sums)
    after = value_of(entry.term(weight=weight[order]), sums[..., order])
    assert_close(after, before, rtol=1e-13)


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
def test_a_batch_is_one_large_sample(entry):
    sums = random_sums()
    pool = "all" if entry.term is losses.GeneralizedDice else "batch"
    pooled = value_of(entry.term(pool=pool), sums)
    assert np.shape(pooled) == ()
    assert_close(pooled, value_of(entry.term(), sums.sum(1, keepdims=True)), rtol=1e-13)


def test_reductions_agree():
    sums = random_sums()
    each = value_of(Dice(reduction="none"), sums)
    assert each.shape == (4,)
    assert_close(value_of(Dice(reduction="sum"), sums), each.sum(), rtol=1e-14)
    assert_close(value_of(Dice(), sums), each.mean(), rtol=1e-14)
    assert_close(value_of(Dice(reduction="classes"), sums).mean(1), each, rtol=1e-14)


def test_nan_stays_in_its_sample():
    sums = random_sums()
    sums[0, 1, 1] = np.nan
    each = value_of(Dice(reduction="none"), sums)
    assert np.isnan(each).tolist() == [False, True, False, False]


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
def test_empty_input(entry):
    """Without voxels the loss is 0; the mean over no samples is NaN."""
    assert value_of(entry.term(), np.zeros((7, 2, 3))) == 0
    value = value_of(entry.term(), np.zeros((7, 0, 3)))
    assert value == 0 if entry.term().pool == "batch" else math.isnan(value)


# ---- invalid settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dice(p=2) + Jaccard(), "Dice needs p = 2 and Jaccard needs p = 1"),
        (lambda: CrossEntropy() + Focal(), "CrossEntropy needs gamma = 0.0 and Focal needs gamma"),
        (
            lambda: Dice(reduction="none") + CrossEntropy(),
            r"Dice has reduction 'none' \(pool 'none'\), CrossEntropy has 'mean' \(pool 'batch'\)",
        ),
        (lambda: Dice(pool="both"), "pool must be one of 'none', 'batch', 'classes', 'all', got"),
        (lambda: Dice(absent="ignore"), "absent must be one of"),
        (lambda: Dice(divisor=2), "divisor must be one of"),
        (lambda: Dice(reduction="all"), "reduction must be one of"),
        (lambda: Dice(empty="zero"), "empty must be one of 'perfect', 'nan', got 'zero'"),
        (lambda: Dice(smooth=-1), "smooth must be finite and at least 0"),
        (lambda: Dice(smooth=(0, 1, 2)), "smooth must be a number or a pair"),
        (lambda: Dice(floor=-1), "floor must be finite and at least 0"),
        (lambda: Dice(p=0), "p must be an integer from 1"),
        (lambda: Dice(weight=[1, math.nan]), "weight must be finite"),
        (lambda: Dice(weight=[1, math.inf]), "weight must be finite"),
        (lambda: Dice(pool="batch", reduction="none"), "leaves no loss per sample"),
        (lambda: Dice(pool="all", reduction="classes"), "leaves no loss per class"),
        (lambda: CrossEntropy(reduction="none"), "leaves no loss per sample"),
        (lambda: losses.FocalTversky(of_mean=True, reduction="classes"), "no loss per class"),
        (lambda: losses.FocalTversky(gamma=-1), "gamma must be finite and at least 0"),
        (lambda: losses.LogDice(eps=0), "eps must lie between 0 and 1"),
        (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing must be at most 1"),
        (lambda: losses.SigmoidFocal(alpha=2), "alpha must be at most 1"),
        (lambda: losses.BinaryCrossEntropy(pos_weight=[1]).check(2), "must have 2 entries"),
        (lambda: losses.BinaryCrossEntropy(divisor="weights"), "divisor must be one of"),
        (lambda: losses.GeneralizedDice(pool="none"), "pool must be one of 'classes', 'all'"),
        (lambda: losses.GeneralizedDice(weighting="cubic"), "weighting must be one of"),
        (lambda: losses.MCC(p=2), "p must be 1 for MCC, got 2"),
        (lambda: -1 * Dice(), "a term's factor must be finite and at least 0"),
        (lambda: Dice(weight=WEIGHT).check(4), "weight must have 4 entries, one per class"),
        (lambda: (Dice(weight=WEIGHT) + Jaccard()).check(2), "weight must have 2 entries"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_term_adds_to_terms_alone():
    with pytest.raises(TypeError):
        Dice() + 1
    with pytest.raises(TypeError, match="a term's factor must be a number, got str"):
        Dice() * "2"


def test_the_sum_of_a_list():
    terms = [Dice(), 2 * CrossEntropy()]
    assert repr(sum(terms)) == "Dice() + 2 * CrossEntropy()"
    assert sum([terms[0]]) is terms[0]


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
def test_reduction_batch_is_the_mean_of_the_pooled_batch(entry):
    sums, term = random_sums(), entry.term(reduction="batch")
    assert term.reduction == "mean"
    assert term.pool in ("batch", "all")
    pooled = value_of(entry.term(), sums.sum(1, keepdims=True))
    assert_close(value_of(term, sums), pooled, rtol=1e-13)


def test_zero_by_zero():
    """Perfect with no derivative, or what floating-point division gives."""
    sums = np.array([[[0.0, 2]], [[0, 2]], [[0, 4]]])
    for kind in (Dice, Jaccard):
        value, derivative = kind(reduction="classes").with_derivative(Statistics(sums, Spec()))
        assert value[0, 0] == 0
        assert not derivative[:, 0, 0].any()
        nan = value_of(kind(reduction="classes", empty="nan"), sums)
        assert np.isnan(nan).tolist() == [[True, False]]
    for smooth, value in ((1, 0), ((1, 0), -math.inf), ((0, 1), 1)):
        assert value_of(Dice(smooth=smooth, empty="nan", reduction="classes"), sums)[0, 0] == value
    nothing = np.zeros((7, 1, 2))
    for kind in (CrossEntropy, Focal, losses.BinaryCrossEntropy, losses.SigmoidFocal):
        assert value_of(kind(), nothing) == 0
        assert math.isnan(value_of(kind(empty="nan"), nothing))


def test_soft_targets_squared():
    """The denominator's sum t^2 is a row of its own for soft targets, and Y for labels."""
    soft = Spec(p=2, targets="soft", target_square=True)
    sums = np.array([3.0, 4, 5, 2, 9])[:, None, None]  # I, P, Y, sum t^2, V
    term = Dice(p=2, target_square=True)
    assert term(Statistics(sums, soft)) == pytest.approx(1 - 6 / (4 + 2))
    assert term(Statistics(sums[:3], Spec(p=2))) == pytest.approx(1 - 6 / (4 + 5))


def test_a_term_says_which_statistics_it_lacks():
    sums = Statistics(random_sums()[:3], Spec())
    with pytest.raises(
        ValueError, match=r"Dice needs statistics with p = 2.*compute them with p=2"
    ):
        Dice(p=2)(sums)
    with pytest.raises(ValueError, match=r"CrossEntropy needs .* gamma = 0.0.*have gamma = None"):
        CrossEntropy()(sums)
    with pytest.raises(ValueError, match="weight must have 3 entries, one per class, got shape"):
        Dice(weight=[1, 2])(sums)


def test_text():
    term = Dice(smooth=1, weight=[1, 2]) + 0.5 * CrossEntropy()
    assert repr(term) == "Dice(weight=[1.0, 2.0], smooth=1.0) + 0.5 * CrossEntropy()"


def test_every_term_is_listed():
    def below(kind):
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    ours = [kind for kind in below(losses.Term) if kind.__module__.startswith("dice_core")]
    public = {kind for kind in ours if not kind.__name__.startswith("_")}
    bases = {losses.Sum, losses.Settings, losses.Overlap, losses.LinearOverlap, losses.VoxelLoss}
    assert public - bases == {entry.term for entry in TERMS}


# ---- NaN and excluded classes --------------------------------------------------------------------


@pytest.mark.parametrize("entry", TERMS, ids=lambda entry: entry.term.__name__)
@pytest.mark.parametrize("empty", ["perfect", "nan"])
def test_nan_is_never_a_number(entry, empty):
    sums = random_sums()
    sums[:, 0, 1] = np.nan
    term = entry.term(empty=empty)
    assert np.isnan(value_of(term, sums))
    value, _ = with_derivative(term, sums)
    assert np.isnan(value)


@pytest.mark.parametrize("empty", ["perfect", "nan"])
@pytest.mark.parametrize("kind", [Dice, losses.MCC, losses.LogDice, losses.FocalTversky])
def test_an_excluded_class_has_loss_zero(kind, empty):
    """Whatever its sums."""
    sums = random_sums() + 1  # no class is empty
    sums[:, :, 1] = np.nan
    term = kind(ignore_channel=[1], empty=empty, reduction="classes")
    sums[2, :, 1] = 5  # MCC needs the number of voxels
    value, derivative = with_derivative(term, sums)
    assert not value[:, 1].any()
    assert not derivative[:, :, 1].any()


def test_soft_targets_weigh_the_classes_by_their_sum():
    """GeneralizedDice divides by Y^2 whether its denominator has sum t or sum t^2."""
    sums = random_sums() + 1  # no class is empty
    spec = losses.GeneralizedDice(p=2, target_square=True).spec("softmax", None, "soft")
    rows = dict.fromkeys(spec.fields, sums[2])
    rows |= {"intersection": sums[0], "pred_sum": sums[1], "target_square_sum": sums[2] / 2}
    statistics = Statistics(np.stack([rows[name] for name in spec.fields]), spec)
    i, p, y = sums[:3]
    w = 1 / y**2
    expected = 1 - 2 * (w * i).sum(-1) / (w * (p + y / 2)).sum(-1)
    term = losses.GeneralizedDice(p=2, target_square=True, reduction="none")
    assert_close(term(statistics), expected, rtol=1e-13)


@pytest.mark.parametrize("size", [0, 1e-9, 1e-3, 0.5, 1, 30, 1e4])
def test_log_cosh_has_all_digits_and_never_overflows(size):
    """1 - q is far from [0, 1] for logits that are taken as probabilities."""
    with mpmath.workdps(40):
        expected = float(mpmath.log(mpmath.cosh(size)))
    for sign in (1, -1):
        value = losses.LogCoshDice.penalty.value(1 - sign * size, np.float64(sign * size))
        assert_close(value, expected, rtol=1e-15)


# ---- a term of one's own -------------------------------------------------------------------------


class OwnDice(losses.Term):
    """Dice, with nothing but its value."""

    needs = (("p", 1),)

    def value(self, sums):
        return (1 - 2 * sums.intersection / (sums.pred_sum + sums.target_sum)).mean()


def test_a_value_is_enough_in_torch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(3, (2, 4, 5), generator=generator)
    for own, ours in (
        (OwnDice(), Dice()),
        (0.5 * OwnDice() + CrossEntropy(), 0.5 * Dice() + CrossEntropy()),
    ):
        values = [dice_core.torch.loss(x, y, term) for term in (own, ours)]
        assert_close(values[0].detach(), values[1].detach(), rtol=1e-14)
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-16)
        assert_close(
            dice_core.loss(x.detach().numpy(), y.numpy(), own), values[1].item(), rtol=1e-14
        )


def test_gradients_of_arrays_need_its_derivative():
    x, y = np.zeros((1, 2, 3)), np.zeros((1, 3), int)
    with pytest.raises(
        NotImplementedError, match=r"^OwnDice defines no with_derivative, which grad"
    ):
        dice_core.loss_and_grad(x, y, OwnDice() + CrossEntropy())
