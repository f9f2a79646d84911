"""The code in the README and in docstrings runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import dice_core

ROOT = Path(__file__).parents[1]


def test_readme():
    failed, attempted = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert attempted > 15
    assert failed == 0


def test_readme_code_is_doctested_or_naive():
    """Beside the first table, every Python block is a doctest."""
    text = (ROOT / "README.md").read_text().split("</table>")[1]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    assert all(block.startswith(">>> ") for block in blocks)


def table_of_losses():
    lines = ["| term | loss | sums | source | elsewhere |", "| --- | --- | --- | --- | --- |"]
    for entry in dice_core.losses.TERMS:
        cells = (f"`{entry.term.__name__}`", f"`{entry.formula}`", entry.statistics)
        lines.append(f"| {' | '.join((*cells, entry.source, entry.elsewhere))} |")
    return "\n".join(lines)


def test_the_table_of_losses_is_the_list():
    text = (ROOT / "README.md").read_text()
    assert table_of_losses() == re.search(r"<!-- losses -->\n\n(.*?)\n\n<!--", text, re.DOTALL)[1]


def test_every_term_names_its_source():
    for entry in dice_core.losses.TERMS:
        assert f"Source: {entry.source}." in entry.term.__doc__


MODULES = [name for _, name, _ in pkgutil.iter_modules(dice_core.__path__) if name != "__main__"]


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("_cpu")])
def test_docstrings(name):
    module = importlib.import_module(f"dice_core.{name}")
    assert doctest.testmod(module).failed == 0


def test_the_first_table_is_one_loss():
    """The naive code beside ours computes ours."""
    import torch

    text = (ROOT / "README.md").read_text().split("</table>")[0]
    naive, ours = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
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
