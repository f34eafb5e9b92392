"""The examples for engines run as they are printed, and the table of findings names every one."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[4] / "docs" / "interop.md").read_text(encoding="utf-8")
SOURCES = Path(__file__).parents[4] / "src" / "routing_replay" / "trace" / "importers"


def _section(title: str) -> str:
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_examples_run():
    text = _section("The model") + _section("Engines")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/interop.md", "exec"), names)


def test_every_finding_is_explained():
    source = "".join(path.read_text() for path in sorted(SOURCES.glob("*.py")))
    codes = set(re.findall(r'code(?:=|, cause = )\(?\s*"([a-z_]+)"', source))
    codes |= set(re.findall(r'"([a-z_]+)" if (?:empty|physical) else "[a-z_]+"', source))
    codes |= set(re.findall(r'"[a-z_]+" if (?:empty|physical) else "([a-z_]+)"', source))
    assert len(codes) >= 20
    table = _section("What is wrong with this response?")
    named = set(re.findall(r"`([a-z_]+)`", table)) - {"config", "inspect"}
    assert named - {"routed_experts_prompt_start"} == codes
