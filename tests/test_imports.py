"""Imports within dice_core only point down, and importing it loads no heavy library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dice_core

PACKAGE = Path(__file__).parents[1] / "dice_core"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted(PACKAGE.glob("_*.pyx"))

# The layers, from the public interfaces down to memory access.
ARRAYS = {"allocators", "buffers"}
ARROWS = {
    "__init__": {
        *("api", "torch.__init__", "dask", "jax", "compat.__init__", "losses.__init__"),
        *("backends", "sums", "diagnosis.__init__"),
    },
    "__main__": {"info", "score_files", "bench.__main__"},
    "info": {"__init__", "backends", "threads"},
    "score_files": set(),
    "diagnosis.__init__": {
        *("diagnosis.shapes", "diagnosis.values", "diagnosis.facts", "diagnosis.findings"),
        *("losses.__init__", "checks", *ARRAYS),
    },
    "diagnosis.values": {"diagnosis.facts", "diagnosis.findings", "losses.__init__"},
    "diagnosis.shapes": {"diagnosis.findings"},
    "diagnosis.facts": set(),
    "diagnosis.findings": set(),
    "api": {"calls", "losses.__init__", "sums", "spec", "checks", "allocators"},
    "jax": {"calls", "losses.__init__", "spec", "checks", "buffers"},
    "dask": {"api", "calls", "losses.__init__", "sums", "spec", "checks", "allocators"},
    "torch.__init__": {"torch.functional", "torch.linear", "torch.modules", "torch.metrics"},
    "torch.linear": {
        *("torch.modules", "torch.functional", "torch.operators", "torch.transforms"),
        *("calls", "sums", "spec", "checks"),
        *ARRAYS,
    },
    "torch.modules": {
        *("torch.functional", "losses.__init__", "losses.terms", "checks"),
    },
    "torch.metrics": {"torch.operators", "torch.processes", "spec", "checks", "threads"},
    "torch.functional": {
        *("torch.operators", "torch.processes", "torch.dtensors"),
        *("calls", "losses.__init__", "losses.terms"),
        *("sums", "spec", "checks", "threads"),
        *ARRAYS,
    },
    "torch.processes": {"losses.__init__", "sums"},
    "torch.dtensors": {"sums", "spec"},
    "torch.transforms": set(),
    "torch.operators": {
        *("torch.dtensors", "torch.transforms"),
        *("calls", "losses.terms", "sums", "spec", "checks"),
        *ARRAYS,
    },
    "calls": {"backends", "sums", "spec", "checks", "threads", *ARRAYS},
    "backends": {"spec", "checks"},
    "losses.__init__": {"losses.overlap", "losses.cross_entropy", "losses.terms", "checks"},
    "losses.overlap": {"losses.penalties", "losses.terms", "sums", "checks"},
    "losses.cross_entropy": {"losses.terms", "sums", "spec", "checks"},
    "losses.penalties": {"losses.terms"},
    "losses.terms": {"sums", "spec", "checks", "allocators"},
    "sums": {"spec", *ARRAYS},
    "spec": {"checks", "buffers"},
    "checks": ARRAYS,
    "allocators": {"buffers"},
    "buffers": set(),
    "threads": set(),
    "_reference": set(),
    "_gpu": {"gpu.plan", "gpu.kernels", "gpu.cache", "gpu.driver", "gpu.toolkit", "spec", *ARRAYS},
    "gpu.__init__": set(),
    "gpu.kernels": {"gpu.plan", "gpu.blocks", "gpu.general", "gpu.plain", "gpu.totals"},
    "gpu.general": {"gpu.plan"},
    "gpu.plain": {"gpu.plan"},
    "gpu.blocks": {"gpu.plan"},
    "gpu.totals": {"gpu.plan"},
    "gpu.plan": {"spec"},
    "gpu.intrinsics": set(),
    "gpu.compile": {"gpu.plan", "gpu.kernels", "gpu.intrinsics"},
    "gpu.cache": {"gpu.plan", "gpu.compile", "gpu.driver", "gpu.toolkit"},
    "gpu.driver": set(),
    "gpu.toolkit": set(),
}
IN_BENCH = {
    "__init__": set(),
    "__main__": {
        "cases",
        "implementations",
        "measure",
        "picture",
        "plot",
        "prediction",
        "results",
        "run",
        "tables",
    },
    "prediction": {"cases", "implementations", "machine_code", "tables"},
    "machine_code": set(),
    "run": {"busy", "cases", "devices", "implementations", "machine", "measure", "results"},
    "busy": {"cases", "devices", "implementations", "measure", "results"},
    "machine": {"measure"},
    "measure": {"cases", "devices", "floor", "formulas", "implementations", "results"},
    "tables": {"implementations", "results"},
    "plot": {"implementations", "results"},
    "picture": {"results"},
    "results": {"implementations"},
    "floor": {"implementations"},
    "devices": {"implementations"},
    "implementations": {"formulas", "networks"},
    "cases": {"networks"},
    "networks": set(),
    "formulas": set(),
}
TRANSLATIONS = {
    *("torch.__init__", "torch.functional", "torch.linear", "torch.operators", "compat._shared"),
    *("losses.__init__", "losses.penalties", "losses.terms", "sums", "spec", "checks", "threads"),
}
ARROWS |= {f"compat.{name}": TRANSLATIONS for name in ("monai", "nnunet", "smp")}
ARROWS |= {
    "compat.__init__": {"torch.__init__"},
    "compat._shared": TRANSLATIONS - {"compat._shared"},
}
ARROWS |= {f"bench.{name}": {f"bench.{other}" for other in IN_BENCH[name]} for name in IN_BENCH}
ARROWS["bench.__main__"] |= {"threads"}
ARROWS["bench.implementations"] |= {
    *("api", "torch.__init__", "compat.monai", "compat.nnunet", "losses.__init__"),
}
ARROWS["bench.networks"] |= {"torch.__init__"}
ARROWS["bench.prediction"] |= {"_gpu", "gpu.plan", "spec", "buffers"}
ARROWS["bench.machine_code"] |= {"gpu.compile", "gpu.kernels", "gpu.plan"}
ARROWS["bench.machine"] |= {"backends", "threads"}


def name_of(path):
    """A module's name inside the package: api, bench.cases."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path) for path in (*SOURCES, *KERNELS)}


def imports(source, inside="dice_core"):
    """The package's modules that a module of this package of it imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = inside.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            paths = [[*filter(None, module), alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in paths:
            if first == "dice_core":
                ways = (
                    ".".join([*rest[:n], *end]) for n in (2, 1, 0) for end in ((), ("__init__",))
                )
                found.add(next(way for way in ways if way in MODULES))
    return found


def pyx_imports(source):
    """The modules that Cython text imports, as written."""
    lines = re.findall(r"^\s*(?:from\s+(\S+)\s+c?import\b|c?import\s+(\S+))", source, re.MULTILINE)
    return {name for pair in lines for name in pair if name}


def of_the_package(module):
    return module.startswith(".") or module.split(".")[0] == "dice_core"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_point_down(path):
    name = name_of(path)
    assert name in ARROWS, f"{name} has no place in the drawing of arrows yet"
    inside = ".".join(["dice_core", *path.relative_to(PACKAGE).parts[:-1]])
    assert imports(path.read_text(), inside) <= ARROWS[name]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_nothing_of_the_package(path):
    assert not list(filter(of_the_package, pyx_imports(path.read_text())))


def test_every_module_of_the_drawing_is_there():
    assert {"api", "torch.__init__", "_reference", "_cpu"} <= MODULES
    assert set(ARROWS) <= MODULES


def test_arrows_have_no_loop():
    above = dict(ARROWS)
    while leaves := {name for name, below in above.items() if not below & set(above)}:
        for name in leaves:
            del above[name]
    assert not above


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from . import spec, backends", {"spec", "backends"}),
        ("from .api import loss", {"api"}),
        ("def f():\n    from .torch import loss", {"torch.__init__"}),
        ("if TYPE_CHECKING:\n    import dice_core.api as a", {"api"}),
        ("from dice_core import buffers, loss", {"buffers", "__init__"}),
        ("from dice_core.threads import resolve", {"threads"}),
        ("import dice_core", {"__init__"}),
        ("import numpy, torch\nfrom torch import api", set()),
    ],
)
def test_the_reader_finds_imports(source, found):
    assert imports(source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from . import cases, floor", {"bench.cases", "bench.floor"}),
        ("from .cases import Case", {"bench.cases"}),
        ("from .. import api, bench", {"api", "bench.__init__"}),
        ("from ..torch import loss", {"torch.__init__"}),
        ("from .. import loss", {"__init__"}),
        ("from dice_core.bench.run import cases", {"bench.run"}),
        ("from . import nothing", {"bench.__init__"}),
    ],
)
def test_the_reader_finds_imports_of_a_package_inside(source, found):
    assert imports(source, "dice_core.bench") == found


def test_the_reader_finds_what_is_forbidden():
    assert imports("from .api import loss") - ARROWS["spec"] == {"api"}
    assert imports("from . import api") - ARROWS["torch.operators"] == {"api"}
    assert imports("import dice_core.torch") - ARROWS["api"] == {"torch.__init__"}


@pytest.mark.parametrize(
    "line",
    [
        "from .spec import classes",
        "from . cimport _gpu",
        "    import dice_core.spec",
        "from dice_core.buffers import of",
        "cimport dice_core",
    ],
)
def test_the_reader_finds_what_is_forbidden_to_kernels(line):
    assert any(map(of_the_package, pyx_imports(f"from libc.stdlib cimport free\n{line}\n")))


# ---- modules loaded by an import ---------------------------------------------------------------

HEAVY = {"torch", "nibabel", "dask", "jax", "numba", "cupy", "scipy", "matplotlib", "rich"}


def modules_after(statements, cwd):
    """The top-level modules of a new interpreter that ran the statements."""
    show = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{statements}\n{show}"],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(run.stdout.split())


def test_importing_the_package_imports_numpy_and_nothing_heavier(tmp_path):
    modules = modules_after("import dice_core", tmp_path)
    assert {"dice_core", "numpy"} <= modules
    assert not modules & HEAVY


def test_importing_the_package_leaves_the_benchmark_out(tmp_path):
    use = "import sys, dice_core\nassert not any('bench' in name for name in sys.modules)"
    assert "dice_core" in modules_after(use, tmp_path)


def test_using_the_package_imports_nothing_heavier(tmp_path):
    use = (
        "import dice_core, numpy as np\n"
        "x, y = np.zeros((1, 2, 3), np.float32), np.zeros((1, 3), np.uint8)\n"
        "dice_core.loss_and_grad(x, y)"
    )
    assert not modules_after(use, tmp_path) & HEAVY


def test_torch_is_imported_on_access_to_the_attribute(tmp_path):
    use = "import dice_core\nassert dice_core.torch.__name__ == 'dice_core.torch'"
    assert "torch" in modules_after(use, tmp_path)


def test_dir_lists_the_public_names():
    assert set(dice_core.__all__) <= set(dir(dice_core))
    assert {"loss", "gradient", "statistics", "torch", "__version__"} <= set(dir(dice_core))
    assert all(hasattr(dice_core, name) for name in dir(dice_core))
    assert {"Dice", "CrossEntropy", "TERMS"} <= set(dir(dice_core.losses))
    assert not {"np", "annotations", "copy", "terms"} & set(dir(dice_core.losses))


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import inspect, pydoc
import dice_core
assert "torch" not in dir(dice_core)
assert not hasattr(dice_core, "torch") and not hasattr(dice_core, "compat")
assert "loss" in dict(inspect.getmembers(dice_core))
assert "loss_and_grad" in pydoc.render_doc(dice_core)
from dice_core import *
for name in ("torch", "compat.monai", "compat.nnunet", "compat.smp"):
    try:
        __import__(f"dice_core.{name}")
    except ImportError as error:
        assert "need PyTorch, which is not installed: pip install torch" in str(error), error
    else:
        raise AssertionError(name)
try:
    dice_core.torch
except AttributeError as error:
    assert "pip install torch" in str(error)
print("passed")
"""


def test_the_package_works_without_torch(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH]
    run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert run.stdout == "passed\n"


@pytest.mark.parametrize("name", ["tensorflow", "Loss"])
def test_unknown_attribute(name):
    with pytest.raises(AttributeError, match=f"^module 'dice_core' has no attribute '{name}'$"):
        getattr(dice_core, name)
