"""Checks which functions of a peer a test calls, and writes what ran as JSON.

    pytest -p external.result_plugin --result docs/results/interop_verl.json tests/external/verl

The tests of this folder run a peer's own code, each in an environment of its own; `make test` leaves them out.
"""

import inspect
import json
import pkgutil
import sys
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType

import pytest

from routing_replay.cli.provenance import versions

PEERS = ("verl", "skyrl", "megatron-core", "torch", "tensordict", "transformers", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="JSON file for what ran")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "calls(*names): functions of the peer that a test calls")
    config.pluginmanager.register(_Recorder(config.getoption("--result")), "result_recorder")


def _named(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("calls") for name in mark.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail a test that passes without having called what it says that it calls."""
    # Before the test, which may put something else in the function's place.
    wanted = {name: inspect.unwrap(pkgutil.resolve_name(name)).__code__ for name in _named(item)}
    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
    missed = [name for name, code in wanted.items() if code not in called]
    assert not missed, f"the test says that it calls {missed}, and does not"


class _Recorder:
    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._calls: dict[str, list[str]] = {}
        self._outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._calls = {item.nodeid: _named(item) for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        if self._path is None or not self._outcomes:
            return
        passed = [nodeid for nodeid, outcome in self._outcomes.items() if outcome == "passed"]
        tests: dict[str, dict[str, int]] = {}
        for nodeid, outcome in self._outcomes.items():
            counts = tests.setdefault(nodeid.split("[")[0], {"cases": 0, "passed": 0})
            counts["cases"] += 1
            counts["passed"] += outcome == "passed"
        result = {
            "versions": versions(*PEERS),
            "cases": len(self._outcomes),
            "passed": len(passed),
            "functions_called": sorted({name for nodeid in passed for name in self._calls[nodeid]}),
            "tests": tests,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(result, indent=2) + "\n")
