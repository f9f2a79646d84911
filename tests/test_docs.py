"""The documentation is correct: its code prints the output shown, and the files it names exist."""

import doctest
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import dice_core

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dice_core"
README = (ROOT / "README.md").read_text()
LOSSES = (ROOT / "docs" / "reference" / "losses.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# ---- code --------------------------------------------------------------------------------------


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
WITHOUT_SESSIONS = {  # pages whose Python is run by tests of their own
    "docs/why.md": "test_the_naive_code_is_one_loss",
    "docs/howto/trainers.md": "tests/test_trainers.py",
}


@functools.cache
def session(page):
    """The results of the examples of a page, which end where their block ends."""
    text = re.sub(r"^```.*$", "", (ROOT / page).read_text(), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
    return doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_the_examples_of_a_page_print_what_it_says(page):
    if "dice_core.dask" in (ROOT / page).read_text():
        pytest.importorskip("dask.array", reason="needs dask, of the extra dask")
    assert session(page).failed == 0


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readme_and_the_guides_have_examples():
    assert session("README.md").attempted > 15
    assert sum(bool(session(page).attempted) for page in PAGES if "/howto/" in page) > 8


@pytest.mark.parametrize(
    "page", [page for page in ["README.md", *PAGES] if page not in WITHOUT_SESSIONS]
)
def test_other_python_of_a_page_runs(page):
    """What is not a session runs as a script, block after block."""
    scope = {}
    for block in python_blocks(page):
        if not block.startswith(">>> "):
            try:
                exec(compile(block, page, "exec"), scope)
            except ModuleNotFoundError as error:
                if error.name.partition(".")[0] == "dice_core":
                    raise
                pytest.skip(f"{page} needs {error.name}, which is not installed")


def test_the_changed_line_of_the_readme():
    """After the change of import the line below it makes the same loss."""
    pytest.importorskip("monai", reason="needs monai, of the extra dev")
    lines = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    scripts = ["\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +")]
    made = []
    for script in scripts:
        exec(script, scope := {})
        made.append(scope["loss_function"])
    modules = [type(loss).__module__ for loss in made]
    assert modules == ["monai.losses.dice", "dice_core.compat.monai"]
    x = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(120).reshape(1, 1, 4, 5, 6) % 3
    torch.testing.assert_close(made[0](x, y), made[1](x, y))


def test_the_naive_code_is_one_loss():
    """The naive code computes the same loss as the dice_core code below it."""
    naive, ours = python_blocks("docs/why.md")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=generator).requires_grad_()
    y = torch.randint(3, (2, 4, 5), generator=generator)
    results = []
    for code in (naive, ours):
        x.grad = None
        scope = {
            "x": x,
            "y": y,
            "C": 3,
            "spatial": (2, 3),
            "one_hot": torch.nn.functional.one_hot,
            "dice_core": dice_core,
        }
        exec(code, scope)
        results.append((scope["loss"].detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


# ---- links and length --------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_links_lead_to_files(page):
    """Those between files of the checkout; the site's own are checked when it is built."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src(?:set)?=\"([^\"]+)\"", text):
        target = "".join(link)
        if not target.startswith(("http:", "https:", "mailto:")):
            folder = (ROOT / page).parent
            made = target.endswith("tutorial.ipynb")  # copied by docs/conf.py
            assert made or (folder / target).exists(), f"{page} links to {target}"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def is_source(name):
    """Whether a module is Python and does nothing when imported."""
    last = name.rpartition(".")[2]
    return last != "__main__" and not last.startswith("_cpu")


WALK = pkgutil.walk_packages(dice_core.__path__, "dice_core.")
MODULES = ["dice_core", *(name for _, name, _ in WALK if is_source(name))]


@functools.cache
def results_of(name):
    """The doctests of a module; skipped where it needs a package that is not installed."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "dice_core":
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    return doctest.testmod(module)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert results_of(name).failed == 0


def test_docstrings_of_packages_inside_are_tested():
    names = [name for name in MODULES if name.startswith("dice_core.torch")]
    attempted = {name: results_of(name).attempted for name in names}
    assert attempted["dice_core.torch.modules"] > 0
    assert sum(attempted.values()) >= 19


# ---- the table of losses -----------------------------------------------------------------------


def table_of_losses():
    lines = ["| term | loss | sums | source | peers |", "| --- | --- | --- | --- | --- |"]
    for entry in dice_core.losses.TERMS:
        cells = (f"`{entry.term.__name__}`", f"`{entry.formula}`", entry.statistics)
        lines.append(f"| {' | '.join((*cells, entry.source, entry.peers))} |")
    return "\n".join(lines)


def test_the_table_of_losses_is_the_list():
    assert table_of_losses() == re.search(r"<!-- losses -->\n\n(.*?)\n\n<!--", LOSSES, re.DOTALL)[1]


def test_every_term_names_its_source():
    for entry in dice_core.losses.TERMS:
        assert f"Source: {entry.source}." in entry.term.__doc__


# ---- maps and paths ----------------------------------------------------------------------------

FILE = r"[\w.]+\.(?:py|pyx|pyi|pxi|h|md|txt|toml)\b"


def section(text, heading):
    """The text below a heading, up to the next heading of its level."""
    return re.search(rf"^{heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


def files_of_tree(tree):
    """The paths that a drawn tree names: a folder ends in /, what is in it is indented."""
    paths, folder = [], ""
    for line in tree.splitlines():
        names = re.match(rf" *((?:(?:{FILE}|\w+/) *)+)", line)[1].split()
        inside = folder if line.startswith(" ") else ""
        paths += [inside + name for name in names]
        if names[0].endswith("/"):
            folder = names[0]
    return paths


def files_named(text):
    """The files and folders between backticks."""
    return re.findall(rf"`((?:\w+/)*(?:{FILE}|\w+/))`", text)


def sources():
    """The source files of the package, but for the `__init__.py` of folders."""
    every = (path for path in PACKAGE.rglob("*") if re.fullmatch(FILE, path.name))
    names = [path.relative_to(PACKAGE).as_posix() for path in every]
    return [name for name in names if "/" not in name or not name.endswith("__init__.py")]


def unnamed(paths):
    """The sources that no path covers; a folder covers its files if none of them is named."""
    listed = {path.partition("/")[0] for path in paths if not path.endswith("/")}
    folders = tuple(path for path in paths if path.endswith("/") and path[:-1] not in listed)
    return [name for name in sources() if name not in paths and not name.startswith(folders)]


TREE = files_of_tree(re.search(r"```text\n(.*?)```", section(CONTRIBUTING, "## Map"), re.DOTALL)[1])
ADD = re.findall(r"^## Add .*$", CONTRIBUTING, re.MULTILINE)


def missing(paths):
    """Of these paths those that are neither in the package nor in the checkout."""
    return [path for path in paths if not ((PACKAGE / path).exists() or (ROOT / path).exists())]


def test_contributing_maps_the_package():
    assert not missing(TREE)
    assert not unnamed(TREE)


@pytest.mark.parametrize("heading", ADD)
def test_written_paths_name_what_is_there(heading):
    paths = files_named(section(CONTRIBUTING, heading))
    assert paths
    assert not missing(paths)


def test_there_are_paths_for_a_loss_a_backend_and_a_sum():
    assert {"## Add a loss", "## Add a backend", "## Add a sum over voxels"} <= set(ADD)


def test_the_readers_find_what_they_look_for():
    tree = "a.py  b.pyx    text of c.py\nd/   text\n    e.h  f.pxi  text\n    g.py  text\nh/\n"
    assert files_of_tree(tree) == ["a.py", "b.pyx", "d/", "d/e.h", "d/f.pxi", "d/g.py", "h/"]
    assert files_named("`a.py`, `b/c.pxi`, `d/`, `Term` and `x.y`") == ["a.py", "b/c.pxi", "d/"]
    assert "api.py" in unnamed(["sums.py"])
    assert not any(name.startswith("losses/") for name in unnamed(["losses/"]))
    assert "losses/overlap.py" in unnamed(["losses/", "losses/terms.py"])
