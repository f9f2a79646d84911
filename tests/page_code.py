"""Writes the Python of the README and of the documentation's pages as modules, one for each page.

    python tests/page_code.py FOLDER && mypy --allow-untyped-defs --allow-untyped-calls FOLDER

Type errors in examples are found that way. Output of sessions is left out.
"""

import doctest
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNTYPED = {"why", "trainers"}  # naive code without its imports; libraries without types


def code_of(text: str) -> str:
    """The Python blocks of a page, in order."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    parts = []
    for block in blocks:
        if block.startswith(">>> "):
            examples = doctest.DocTestParser().get_examples(block)
            parts += [example.source for example in examples if example.exc_msg is None]
        else:
            parts.append(block)
    return "".join(parts)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        code = code_of(page.read_text())
        if code and page.stem not in UNTYPED:
            (folder / f"page_{page.stem}.py").write_text(code)


if __name__ == "__main__":
    main()
