"""The page that specifies the store says what the code does."""

import re
from pathlib import Path

import pytest

from routing_replay.trace import RoutingTrace, TraceStoreReader, TraceStoreWriter
from routing_replay.trace._store_flushed import encode_mark
from unit.trace.trace_cases import random_trace

PAGE = Path(__file__).parents[2] / "docs" / "trace_store.md"


def test_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"trace": random_trace(3)}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["trace"], RoutingTrace)
    assert names["trace"].equals(random_trace(3))
    with TraceStoreReader("traces.rrs") as reader:
        assert reader.keys() == ("step-12/prompt-7/0",)


def test_store_has_the_files_of_the_page(tmp_path: Path):
    TraceStoreWriter(tmp_path / "s.rrs").close()
    named = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(file.name for file in (tmp_path / "s.rrs").iterdir())


def test_mark_has_the_bytes_of_the_page():
    page = PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"424 bytes of `index`[^`]*`([0-9a-f ]+)`", page)
    assert encode_mark(424) == bytes.fromhex(shown)
    assert encode_mark(425) != bytes.fromhex(shown)
