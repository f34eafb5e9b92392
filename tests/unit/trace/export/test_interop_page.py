"""The examples for trainers run as they are printed, and the table names what there is."""

import re
from pathlib import Path

from routing_replay.trace import EXPORT_FORMATS, export

PAGE = Path(__file__).parents[4] / "docs" / "interop.md"
TRAINERS = PAGE.read_text(encoding="utf-8").split("## Trainers\n", 1)[1].split("\n## ", 1)[0]


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", TRAINERS, re.DOTALL)
    assert len(blocks) == 10
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)


def test_table_names_every_format_and_function():
    lines = [line.split("|")[1:-1] for line in TRAINERS.splitlines() if line.startswith("| ")]
    formats = {name for line in lines[1:] for name in re.findall(r"`([^`]+)`", line[1])}
    assert formats == {item.name for item in EXPORT_FORMATS} - {"npz", "safetensors"}
    functions = {name for line in lines[1:] for name in re.findall(r"`([^`]+)`", line[2])}
    assert functions == {name for name in export.__all__ if name.startswith("to_")}
