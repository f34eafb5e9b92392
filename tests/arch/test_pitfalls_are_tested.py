"""docs/pitfalls.md names a test for each known fault: every number is there, and every test exists."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TESTS = REPOSITORY / "tests"
DOCUMENT = REPOSITORY / "docs" / "pitfalls.md"
NUM_PITFALLS = 31
WITHOUT_TEST = {"9", "11"}


def names_of_tests(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]  # fmt: skip


def unknown_tests(text: str) -> list[str]:
    """Return the tests that a document names and that do not exist."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    return [
        f"{path}::{name}"
        for path, name in named
        if not (TESTS / path).is_file() or name not in names_of_tests((TESTS / path).read_text())
    ]


def rows(text: str) -> dict[str, str]:
    return {
        cells[1].strip(): cells[3] for line in text.splitlines() if len(cells := line.split("|")) == 5
    }  # fmt: skip


def test_the_checks_see_bad_examples():
    assert unknown_tests("`kernels/test_routing.py::test_none_such`, `no/file.py::test_x`") == [
        "kernels/test_routing.py::test_none_such",
        "no/file.py::test_x",
    ]
    assert names_of_tests("def test_a(): ...\ndef test_a(): ...\n") == ["test_a", "test_a"]


def test_every_named_test_exists():
    assert unknown_tests(DOCUMENT.read_text()) == []


def test_every_pitfall_has_a_test_or_a_reason():
    found = rows(DOCUMENT.read_text())
    numbers = [number for number in found if number.isdigit()]
    assert numbers == [str(number) for number in range(1, NUM_PITFALLS + 1)]
    for number in numbers:
        has_test = "::test_" in found[number]
        assert has_test == (number not in WITHOUT_TEST), f"pitfall {number}"
        assert has_test or re.search(r"Cannot occur|Not at run time", found[number])


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda p: str(p.relative_to(TESTS)))  # fmt: skip
def test_no_test_hides_another(path: Path):
    assert [name for name, count in Counter(names_of_tests(path.read_text())).items() if count > 1] == []  # fmt: skip
