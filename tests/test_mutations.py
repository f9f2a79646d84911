"""The faults of the mutation test are in step with the code."""

import pytest
from mutations import FAULTS, ROOT, Fault, apply


def test_the_text_of_every_fault_occurs_once():
    texts = {name: (ROOT / name).read_text() for name in {fault.file for fault in FAULTS}}
    for fault in FAULTS:
        assert apply(fault, texts[fault.file]) != texts[fault.file]


def test_every_fault_has_a_name_and_tests_of_its_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 45
    for fault in FAULTS:
        named = [part for part in fault.tests.split() if part.startswith("tests/")]
        assert named
        assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("text", ["b", "a a"])
def test_another_text_is_an_error(text):
    with pytest.raises(ValueError, match=f"'a' occurs {text.count('a')} times in file"):
        apply(Fault("name", "file", "a", "b", "tests"), text)
