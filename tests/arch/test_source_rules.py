"""The rules of the house, applied to every source file; each checker is shown a bad example first."""

from pathlib import Path

import pytest

import routing_replay
from _support import arch

ROOT = Path(routing_replay.__file__).parent
REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(ROOT.rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_size_checker_sees_a_bad_example():
    body = "\n".join(f"    x{i} = {i}" for i in range(90))
    assert arch.size_problems(f"def f(a, b, c, d, e, g, h):\n{body}\n", file_limit=50) == [
        "91 lines, at most 50",
        "f has 90 lines, at most 80",
        "f has 7 positional parameters, at most 6",
    ]


def test_class_checker_sees_a_bad_example():
    methods = "\n".join(f"    def m{i}(self): ..." for i in range(16))
    inits = "\n".join(f"        self.a{i}{': int' if i % 2 else ''} = {i}" for i in range(21))
    assert len(arch.class_problems(f"class C:\n    def __init__(self):\n{inits}\n{methods}\n")) == 2


def test_docstring_checker_sees_a_bad_example():
    source = '"""M."""\n__all__ = ["f", "g"]\ndef f(x: Tensor): ...\ndef g(x: Tensor):\n    """G.\n\n    More.\n    """\n'
    assert arch.docstring_problems(source, needs_runtime=True) == [
        "f has no docstring",
        "g has arguments but no Args: section",
        "g takes tensors but has no Runtime: line",
    ]


def test_docstring_checker_sees_missing_returns_and_raises():
    source = '"""M."""\n__all__ = ["f"]\ndef f() -> int:\n    """F.\n\n    More.\n    """\n    raise ConfigError("x")\n'
    assert arch.docstring_problems(source, needs_runtime=True) == [
        "f returns something but has no Returns: section",
        "f raises but has no Raises: section",
    ]


def test_todo_checker_sees_a_bad_example():
    source = f"# {'TO'}DO: later\n# {'TO'}DO: https://example.org/issues/1\n"
    assert arch.todo_problems(source) == ["line 1: a TODO without a link to its issue"]


def test_export_checker_sees_a_bad_example():
    assert arch.package_export_problems('__all__ = ["a"]\nfrom routing_replay.x import b\n')
    assert arch.package_export_problems("from routing_replay.x import b\n") == ["no __all__"]


def test_call_checker_sees_a_bad_example():
    assert len(arch.banned_calls("import os\nprint(os.environ['A'])\n", allow_print=False)) == 2
    assert arch.banned_calls("from os import environ as e\n", allow_print=False)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_source_file_keeps_the_rules(path: Path):
    source = path.read_text()
    in_kernels = "kernels" in path.parts
    in_cli = "cli" in path.parts
    limit = 800 if path.name.startswith("_triton") else 600
    assert arch.size_problems(source, file_limit=limit) == []
    assert arch.class_problems(source) == []
    assert arch.docstring_problems(source, needs_runtime=in_kernels) == []
    assert arch.banned_calls(source, allow_print=in_cli) == []
    assert arch.todo_problems(source) == []
    assert path.stem not in arch.BANNED_FILES


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_test_file_keeps_the_size_limit(path: Path):
    assert arch.size_problems(path.read_text(), file_limit=600) == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=_name)
def test_package_exports_what_it_says(path: Path):
    assert arch.package_export_problems(path.read_text()) == []
