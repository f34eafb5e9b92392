"""`routing-replay inspect` of engines' responses, where nothing but numpy is installed."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from routing_replay.cli import main
from unit.trace.importers.import_cases import SHAPES, npy_base64, random_ids, random_tokens

ROUTING = SHAPES["mixtral"]
CONFIG = {"model_type": "mixtral", "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip


def _run(*words: object) -> tuple[object, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as exit_info:
        main(["inspect", *map(str, words)])
    return exit_info.value.code, stdout.getvalue(), stderr.getvalue()


def _response(seed: int) -> tuple[dict[str, object], np.ndarray]:
    rng = np.random.default_rng(seed)
    prompt, completion = random_tokens(rng, 9), random_tokens(rng, 6)
    ids = random_ids(rng, 14, ROUTING)
    choice = {"token_ids": completion, "routed_experts": npy_base64(ids)}
    return {"prompt_token_ids": prompt, "choices": [choice]}, ids


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_correct_response_is_valid(tmp_path: Path, config: Path):
    body, _ = _response(0)
    (tmp_path / "response.json").write_text(json.dumps(body))
    code, out, _ = _run(tmp_path / "response.json", "--config", config, "--json")
    found = json.loads(out)
    assert (code, found["kind"], found["sources"]) == (0, "responses", ["vllm"])
    assert (found["rows"], found["findings"], found["problems"]) == (14, [], {})
    code, out, _ = _run(tmp_path / "response.json", "--config", config)
    assert code == 0
    assert out.rstrip().endswith("yes")


def test_a_wrong_response_names_the_fault(tmp_path: Path, config: Path):
    body, ids = _response(0)
    ids[:, 5] = 0
    body["choices"][0]["routed_experts"] = npy_base64(ids)  # pyright: ignore[reportIndexIssue]
    (tmp_path / "response.json").write_text(json.dumps(body))
    code, out, _ = _run(tmp_path / "response.json", "--config", config, "--json")
    (finding,) = json.loads(out)["findings"]
    assert (code, finding["code"], finding["layer_idx"], finding["where"]) == (1, "zero_layers", 5, "response")  # fmt: skip
    code, out, _ = _run(tmp_path / "response.json", "--config", config)
    assert code == 1
    assert "zero_layers: layers [5] hold 0 in all 14 rows" in out
    assert "known: vllm#35623" in out
    assert "PROBLEM" not in out  # the finding has said it


def test_many_responses_are_compared_with_each_other(tmp_path: Path, config: Path):
    bodies = [_response(seed) for seed in range(3)]
    lines = [json.dumps(body) for body, _ in bodies]
    file = tmp_path / "responses.jsonl"
    file.write_text("\n".join(lines) + "\n\n")
    assert _run(file, "--config", config)[0] == 0
    first, stolen = bodies[0][1], bodies[2][1]
    stolen[4:12] = first[4:12]
    bodies[2][0]["choices"][0]["routed_experts"] = npy_base64(stolen)  # pyright: ignore[reportIndexIssue]
    wrapped = {"response": bodies[2][0], "start": 0}
    file.write_text("\n".join([*lines[:2], json.dumps(wrapped)]))
    code, out, _ = _run(file, "--config", config)
    assert code == 1
    assert "rows_of_another_request" in out
    assert "'line 3' holds 8 rows of request 'line 1'" in out


def test_the_prompt_may_come_from_a_file(tmp_path: Path, config: Path):
    body, _ = _response(1)
    (tmp_path / "prompt.json").write_text(json.dumps(body.pop("prompt_token_ids")))
    (tmp_path / "r.json").write_text(json.dumps(body))
    code, out, _ = _run(tmp_path / "r.json", "--config", config)
    assert (code, "does not hold prompt_token_ids" in out) == (1, True)
    assert _run(tmp_path / "r.json", "--config", config, "--prompt", tmp_path / "prompt.json")[0] == 0  # fmt: skip
    code, out, _ = _run(tmp_path / "r.json", "--config", config, "--prompt", tmp_path / "prompt.json", "--start", 3)  # fmt: skip
    assert (code, "row_count" in out) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("r.json",), "pass --config"),
        (("r.json", "--config", "none.json"), "cannot be read"),
        (("bad.json", "--config", "config.json"), "is not JSON"),
        (("number.json", "--config", "config.json"), "is a int"),
        (("r.json", "--config", "config.json", "--prompt", "r.json"), "no list of token ids"),
        (("r.json", "--config", "config.json", "--prompt", "bad.json"), "cannot be read"),
        (("nowhere",), "does not exist"),
        (("r.json", "--start", "x"), "invalid int value"),
        ((), "required: PATH"),
    ],
)
def test_bad_arguments_exit_with_2(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(_response(0)[0]))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "number.json").write_text("3")
    assert config.exists()
    code, _, error = _run(*words)
    assert (code, message in error) == (2, True), error


ALONE = """
import sys
allowed = {*sys.stdlib_module_names, "numpy", "routing_replay"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
sys.meta_path.insert(0, Refuse())
from routing_replay.cli import main
main(sys.argv[1:])
"""


def test_it_works_where_numpy_alone_is_installed(tmp_path: Path, config: Path):
    (tmp_path / "r.json").write_text(json.dumps(_response(0)[0]))
    words = ["inspect", tmp_path / "r.json", "--config", config, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 14
    refused = subprocess.run(
        [sys.executable, "-c", ALONE, "doctor"], capture_output=True, text=True, check=False
    )
    assert (
        "missing: pip install 'routing-replay[demo]'" in refused.stderr
    )  # the twin: others do need more
