"""What a diagnosis is: findings, and what was looked at."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """A mistake: its name, which does not change between versions, what was found, and the remedy.

    The remedy is code for the arguments of the call, `x` and `y`.
    """

    name: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return "\n".join(
            [self.name, _wrapped(self.found, "  "), _wrapped(f"remedy: {self.remedy}", "  ")]
        )


class Diagnosis(tuple[Finding, ...]):
    """A tuple of findings, empty if nothing was found; prints as text, 100 columns wide.

    - looked_at: the arrays and options in words.
    - names: the findings' names.
    """

    looked_at: str

    def __new__(cls, findings: Iterable[Finding] = (), looked_at: str = "") -> Diagnosis:
        self = super().__new__(cls, findings)
        self.looked_at = looked_at
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self)

    def __repr__(self) -> str:
        if not self:
            return _wrapped(f"nothing found in {self.looked_at}")
        count = "1 finding" if len(self) == 1 else f"{len(self)} findings"
        return "\n".join([_wrapped(f"{count} in {self.looked_at}"), *map(str, self)])

    __str__ = __repr__


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        100,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
