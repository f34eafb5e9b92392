"""The example in the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]):
    match = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert match is not None
    exec(compile(match[1], str(README), "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "1.0"
