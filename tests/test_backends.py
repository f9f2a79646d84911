"""backends: which kernels run a call, and the message if none supports it."""

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dice_core
import dice_core.torch
from dice_core import _cpu, backends, buffers, spec

X, Y = np.zeros((2, 3, 4), np.float32), np.zeros((2, 4), np.uint8)
ROWS = {row.name: row for row in backends.BUILT_IN}
CPU = [row for row in backends.BUILT_IN if row.device == "cpu" and row.automatic]
CPU_NAMES = [row.name for row in CPU]
LEVELS = [row for row in CPU if row.level]


@pytest.fixture(autouse=True)
def no_backend_requested(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def fresh():
    """Clears the caches of modules, entry points and selections, before and after."""
    caches = (backends._unavailable, backends._entry_points, backends._named, backends._first)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def record(monkeypatch):
    """The names of the backends whose kernels ran, in order."""
    ran = []
    for row in backends.BUILT_IN:
        if row.unavailable():
            continue
        for function in ("statistics", "loss", "gradient"):
            if real := getattr(row.load(), function, None):
                monkeypatch.setattr(row.load(), function, recorder(row.name, real, ran))
    return ran


def recorder(name, real, ran):
    def function(*args):
        ran.append(name)
        return real(*args)

    return function


def signature(x=X, y=Y):
    layouts = buffers.of(x, "x").layout, buffers.of(y, "y").layout
    return spec.signature(*layouts, spec.Spec(ignore_label=-1))


def cuda_array(shape, typestr):
    """A CUDA array whose memory is never accessed."""
    interface = {"shape": shape, "typestr": typestr, "data": (4096, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=interface)


CUDA_X, CUDA_Y = cuda_array((2, 3, 4), "<f4"), cuda_array((2, 4), "|u1")


def usable(name):
    return not ROWS[name].unavailable()


def message(error, function, *args, **options):
    with pytest.raises(error) as caught:
        function(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


# ---- precedence --------------------------------------------------------------------------------


def test_the_table_in_order():
    assert [row.name for row in backends.table()][:5] == [
        "cuda",
        "cpu-avx512",
        "cpu-avx2",
        "cpu",
        "reference",
    ]


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        ("cpu", "reference", "cpu"),
        ("reference", "cpu", "reference"),
        (None, "cpu", "cpu"),
        (None, "reference", "reference"),
        (None, "", next(filter(usable, CPU_NAMES))),
        (None, None, next(filter(usable, CPU_NAMES))),
    ],
)
def test_argument_then_environment_then_first_usable(
    monkeypatch, record, argument, variable, expected
):
    if variable is not None:
        monkeypatch.setenv(backends.VARIABLE, variable)
    dice_core.loss_and_grad(X, Y, backend=argument)
    assert record == [expected] * 2


def test_the_environment_is_read_at_each_call(monkeypatch, record):
    for name in ("reference", "cpu", "reference"):
        monkeypatch.setenv(backends.VARIABLE, name)
        dice_core.loss(X, Y)
    assert record == ["reference", "cpu", "reference"]


def test_a_tile_s_gradient_takes_the_argument(record):
    statistics = dice_core.statistics(X, Y, backend="reference")
    dice_core.gradient(X, Y, statistics, backend="reference")
    assert record == ["reference"] * 2


def test_torch_passes_the_argument_to_both_passes(record):
    x = torch.zeros(2, 3, 4, requires_grad=True)
    dice_core.torch.loss(x, torch.from_numpy(Y), backend="reference").backward()
    assert record == ["reference"] * 2


@pytest.mark.parametrize("name", CPU_NAMES)
def test_a_forced_level_is_the_one_that_runs(record, name):
    if reasons := ROWS[name].unavailable():
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    dice_core.loss_and_grad(X, Y, backend=name)
    assert record == [name] * 2
    levels = [ROWS[name].level] if ROWS[name].level else ["x86-64", "arm64", "generic"]
    assert ROWS[name].load().LEVEL in levels


def test_reference_is_never_chosen_automatically(monkeypatch):
    alone = (ROWS["reference"],)
    monkeypatch.setattr(backends, "BUILT_IN", alone)
    text = message(dice_core.BackendError, dice_core.loss, X, Y)
    assert "  reference: runs only if requested by name" in text.splitlines()
    dice_core.loss(X, Y, backend="reference")


# ---- refusals ----------------------------------------------------------------------------------

NAMES = "cuda, cpu-avx512, cpu-avx2, cpu, reference"


@pytest.mark.parametrize("function", [dice_core.loss, dice_core.loss_and_grad])
@pytest.mark.parametrize("variable", [None, "cpu"], ids=["unset", "set"])
def test_unknown_argument(monkeypatch, function, variable):
    if variable:
        monkeypatch.setenv(backends.VARIABLE, variable)
    text = message(ValueError, function, X, Y, backend="gpu")
    assert text == f"backend=gpu is not a backend; choose from {NAMES}"


def test_unknown_environment(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "avx2")
    text = message(ValueError, dice_core.loss, X, Y)
    assert text == f"DICE_CORE_BACKEND=avx2 is not a backend; choose from {NAMES}"


LOGITS = "logits  float32 (2, 3, 4) on {}, strides (12, 4, 1)"
LABELS = "labels  uint8 (2, 4) on {}, strides (4, 1)"
LAST = "`python -m dice_core` lists every backend of this machine."


@pytest.mark.parametrize("source", ["backend", "DICE_CORE_BACKEND"])
def test_explicit_refusal(monkeypatch, source):
    options = {"backend": "cpu"}
    if source == backends.VARIABLE:
        monkeypatch.setenv(source, options.pop("backend"))
    text = message(dice_core.BackendError, dice_core.loss, CUDA_X, CUDA_Y, **options)
    assert text.splitlines() == [
        f"{source}=cpu does not support this call",
        f"    {LOGITS.format('cuda:0')}",
        f"    {LABELS.format('cuda:0')}",
        "    softmax, p = 1, ignore_label = -1",
        "  cpu: reads cpu memory, but the logits are on cuda:0",
        LAST,
    ]


def test_cuda_says_why_it_does_not_take_host_memory():
    text = message(dice_core.BackendError, dice_core.loss, X, Y, backend="cuda")
    assert LOGITS.format("cpu") in text
    assert "  cuda: reads cuda memory, but the logits are on cpu" in text


@pytest.mark.parametrize("function", [dice_core.loss, dice_core.loss_and_grad])
def test_automatic_refusal_explains_every_row(monkeypatch, function):
    no_gpu = "dice_core._gpu_of_no_installation"
    gpu = backends.Backend("cuda", no_gpu, "cuda", "", remedy=" (a remedy)")
    monkeypatch.setattr(backends, "BUILT_IN", (gpu, *backends.BUILT_IN[1:]))
    lines = message(dice_core.BackendError, function, CUDA_X, CUDA_Y).splitlines()
    assert lines[:4] == [
        "no backend supports this call",
        f"    {LOGITS.format('cuda:0')}",
        f"    {LABELS.format('cuda:0')}",
        "    softmax, p = 1, ignore_label = -1",
    ]
    assert lines[4] == f"  cuda: {no_gpu} is not part of this installation (a remedy)"
    for line, name in zip(lines[5:-2], CPU_NAMES, strict=True):
        assert line.startswith(f"  {name}: reads cpu memory, but the logits are on cuda:0")
    assert lines[-2:] == ["  reference: runs only if requested by name", LAST]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "out_is_x"])
def test_a_refusal_leaves_the_logits_alone(overwrite):
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    out = x if overwrite else None
    text = message(dice_core.BackendError, dice_core.loss_and_grad, x, Y, out=out, backend="cuda")
    assert "    logits  bfloat16 (2, 3, 4) on cpu, strides (12, 4, 1)" in text.splitlines()
    assert (x == 1).all()


def test_more_axes_than_the_cpu_takes():
    at = signature()
    wide = buffers.Layout((1,) * 65, (4,) * 65, "float32", 4, "cpu")
    text = message(dice_core.BackendError, backends.select, replace(at, logits=wide), "cpu")
    assert "  cpu: supports at most 64 axes, not 65" in text.splitlines()


def test_more_classes_than_the_cpu_takes():
    at = signature()
    wide = buffers.Layout((0, 2**24 + 1), (4, 4), "float32", 4, "cpu")
    text = message(dice_core.BackendError, backends.select, replace(at, logits=wide), "cpu")
    assert "  cpu: supports at most 16777216 classes, not 16777217" in text.splitlines()


# ---- modules -----------------------------------------------------------------------------------


@pytest.fixture
def imported(monkeypatch):
    """The names of imported modules; those of levels are fakes, which any processor runs."""
    names = []
    real = importlib.import_module
    stand_ins = {row.module: SimpleNamespace(unsupported=lambda signature: []) for row in LEVELS}

    def import_module(name):
        names.append(name)
        return stand_ins[name] if name in stand_ins else real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    return names


@pytest.mark.parametrize("name", [row.name for row in LEVELS])
@pytest.mark.parametrize("runs", [False, True], ids=["lacks", "has"])
def test_a_level_is_imported_only_if_the_processor_has_it(monkeypatch, imported, name, runs):
    monkeypatch.setattr(_cpu, "processor_runs", lambda level: runs)
    row = ROWS[name]
    reasons = row.unsupported(signature())
    assert reasons == ([] if runs else [f"needs a processor that supports {row.level}"])
    assert (row.module in imported) == runs


@pytest.mark.parametrize("runs", [False, True], ids=["lacks", "has"])
def test_requesting_a_level_the_processor_lacks(monkeypatch, imported, runs):
    monkeypatch.setattr(_cpu, "processor_runs", lambda level: runs)
    row = ROWS["cpu-avx512"]
    if runs:
        assert backends.select(signature(), row.name) is importlib.import_module(row.module)
    else:
        text = message(dice_core.BackendError, backends.select, signature(), row.name)
        assert "  cpu-avx512: needs a processor that supports x86-64-v4" in text.splitlines()


def test_selection_skips_levels_the_processor_lacks(monkeypatch, imported):
    monkeypatch.setattr(_cpu, "processor_runs", lambda level: level == "x86-64-v3")
    assert backends.select(signature()) is importlib.import_module("dice_core._cpu_avx2")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "fake_kernels is not part of this installation; a remedy"),
        ("import no_such_module_at_all", "needs the module no_such_module_at_all"),
        ("raise ImportError('libfake.so: bad')", "fake_kernels failed to load: libfake.so: bad"),
        ("raise OSError('no driver')", "fake_kernels failed to load: no driver"),
    ],
    ids=["missing", "needs_another", "import_error", "other_error"],
)
def test_a_module_that_does_not_load_says_so(tmp_path, monkeypatch, source, reason):
    if source is not None:
        (tmp_path / "fake_kernels.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    row = backends.Backend("fake", "fake_kernels", None, "", remedy="; a remedy")
    assert row.unavailable() == [reason]
    assert row.unsupported(signature()) == [reason]


# ---- other packages' backends ------------------------------------------------------------------

PLUG_IN = """
import numpy as np

def statistics(logits, labels, sums, spec, threads):
    np.asarray(sums)[:] = [[[1.0]], [[2.0]], [[3.0]]]
    return 0

def gradient(logits, labels, cotangent, grad, spec, threads):
    np.asarray(grad)[:] = 5
    return 0

def unsupported(signature):
    return [] if signature.logits.dtype == "float32" else ["wants float32"]
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """An installed distribution with a backend `plugged` and a broken one."""
    meta = tmp_path / "dice_plug_in-1.0.dist-info"
    meta.mkdir()
    (tmp_path / "dice_plug_in_kernels.py").write_text(PLUG_IN)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: dice-plug-in\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(
        "[dice_core.backends]\nplugged = dice_plug_in_kernels\nbroken = dice_plug_in_missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_an_uninstalled_plug_in_is_unknown():
    message(ValueError, dice_core.loss, X, Y, backend="plugged")


def test_a_plug_in_is_listed_last(plug_in):
    built_in = len(backends.BUILT_IN)
    rows = {row.name: row for row in list(backends.table())[built_in:]}
    assert {"plugged", "broken"} <= set(rows)
    assert rows["plugged"].description == "from dice-plug-in"
    assert rows["plugged"].unavailable() == []
    assert rows["broken"].unavailable() == ["dice_plug_in_missing is not part of this installation"]


def test_a_plug_in_runs_if_requested(plug_in):
    value, grad = dice_core.loss_and_grad(X, Y, backend="plugged")
    assert value == pytest.approx(1 - 2 / 5)
    assert (grad == 5).all()
    sums = dice_core.statistics(X, Y, backend="plugged")
    assert (sums.intersection == 1).all()
    assert (sums.target_sum == 3).all()


def test_a_plug_in_refuses_for_itself(plug_in):
    text = message(dice_core.BackendError, dice_core.loss, X.astype("f8"), Y, backend="plugged")
    assert "  plugged: wants float32" in text.splitlines()


def test_a_plug_in_is_imported_only_if_requested(plug_in, monkeypatch):
    """Not because it is installed: not even where no built-in backend supports the call."""
    monkeypatch.delitem(sys.modules, "dice_plug_in_kernels", raising=False)
    monkeypatch.setattr(backends, "BUILT_IN", (ROWS["reference"],))
    text = message(dice_core.BackendError, dice_core.loss, X, Y)
    assert "  plugged: runs only if requested by name" in text.splitlines()
    message(ValueError, dice_core.loss, X, Y, backend="plug")
    assert "dice_plug_in_kernels" not in sys.modules
    monkeypatch.setenv(backends.VARIABLE, "plugged")
    assert dice_core.loss(X, Y) == pytest.approx(1 - 2 / 5)
    assert "dice_plug_in_kernels" in sys.modules


def test_a_plug_in_cannot_take_the_name_of_a_built_in_backend(plug_in, tmp_path, record):
    points = tmp_path / "dice_plug_in-1.0.dist-info" / "entry_points.txt"
    points.write_text("[dice_core.backends]\ncpu = dice_plug_in_kernels\n")
    dice_core.loss(X, Y, backend="cpu")
    assert record == ["cpu"]
