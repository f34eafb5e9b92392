"""`routing-replay export` as a user runs it: what it writes for every format, and what it refuses."""

import base64
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from routing_replay.cli import main
from routing_replay.trace import (
    EXPORT_FORMATS,
    RolloutSample,
    RolloutWriter,
    RoutingTrace,
    TraceStoreWriter,
    save_trace,
)
from unit.trace.trace_cases import invalid_rows, random_trace, tokens_of

LENGTHS = {"a": (8, 3), "b": (5, 1), "c": (13, 12)}


@dataclass(frozen=True)
class Done:
    returncode: object
    stdout: str
    stderr: str


def _export(*words: object) -> Done:
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as exit_info:
        main(["export", *map(str, words)])
    return Done(exit_info.value.code, stdout.getvalue(), stderr.getvalue())


def _traces() -> dict[str, RoutingTrace]:
    return {key: random_trace(1, rows=tokens - 1) for key, (tokens, _) in LENGTHS.items()}


@pytest.fixture
def rollout(tmp_path: Path) -> Path:
    traces = _traces()
    with RolloutWriter(tmp_path / "rollout", facts={}) as writer:
        for key, (num_tokens, num_prompt) in LENGTHS.items():
            tokens = tuple(tokens_of(1, num_tokens))
            writer.append(
                RolloutSample(
                    key=key,
                    prompt_token_ids=tokens[:num_prompt],
                    token_ids=tokens[num_prompt:],
                    logprobs=(-0.5,) * (num_tokens - num_prompt),
                    trace=traces[key],
                )
            )
    return tmp_path / "rollout"


def _npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _all_layers_npy(data: bytes) -> np.ndarray:
    return _npy(data)[:, 1::2]


def _npz(data: bytes) -> np.ndarray:
    with np.load(io.BytesIO(data)) as arrays:
        assert int(arrays["num_experts"]) == 64
        return arrays["ids"]


def _safetensors(data: bytes) -> np.ndarray:
    from safetensors.numpy import load

    return load(data)["ids"]


def _prime_rl(data: bytes) -> np.ndarray:
    struct = json.loads(data)
    rows = np.frombuffer(base64.b64decode(struct["data"]), struct["dtype"]).reshape(struct["shape"])
    return rows[:-1, 1::2]


def _nemo_rl(data: bytes) -> np.ndarray:
    _, dtype, shape, text = data.decode().split(":")
    rows = np.frombuffer(base64.b64decode(text), dtype)
    return rows.reshape(tuple(map(int, shape.split("x"))))[:-1]


def _areal(data: bytes) -> np.ndarray:
    rows = _npy(data)
    return rows.reshape(len(rows), 6, 4)[:, 1::2]


def _megatron(data: bytes) -> np.ndarray:
    with np.load(io.BytesIO(data)) as arrays:
        return np.stack([arrays[name][:-1] for name in ("2", "4", "6")], axis=1)


def _vllm_generate(data: bytes) -> np.ndarray:
    field = json.loads(data)["routed_experts"]
    rows = np.frombuffer(base64.b64decode(field["data"]), field["dtype"])
    return rows.reshape(field["shape"])[:, 1::2]


def _vllm_split(data: bytes) -> np.ndarray:
    fields = json.loads(data)
    parts = (fields["prompt_routed_experts"], fields["routed_experts"])
    return np.concatenate([np.array(part, dtype=int).reshape(-1, 6, 4) for part in parts])[:, 1::2]


def _sglang(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i4").reshape(-1, 6, 4)[:, 1::2]


READERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "npz": _npz,
    "safetensors": _safetensors,
    "verl": _all_layers_npy,
    "slime": _all_layers_npy,
    "miles": _all_layers_npy,
    "prime-rl": _prime_rl,
    "nemo-rl": _nemo_rl,
    "skyrl": _all_layers_npy,
    "ms-swift": _all_layers_npy,
    "areal": _areal,
    "megatron": _megatron,
    "vllm": lambda data: _all_layers_npy(base64.b64decode(data)),
    "vllm-generate": _vllm_generate,
    "vllm-split": _vllm_split,
    "sglang": lambda data: _sglang(json.loads(data)["meta_info"]["routed_experts"]),
    "sglang-openai": lambda data: _sglang(json.loads(data)["sglext"]["routed_experts"]),
}


def test_every_format_is_read_below():
    assert set(READERS) == {item.name for item in EXPORT_FORMATS}


@pytest.mark.parametrize("name", READERS)
def test_export_writes_every_trace_of_a_rollout(rollout: Path, tmp_path: Path, name: str):
    done = _export(rollout, "--to", name, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["traces"] == 3
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert list(index.values()) == list(LENGTHS)
    for file, key in index.items():
        ids = READERS[name]((tmp_path / "out" / file).read_bytes())
        assert np.array_equal(ids, _traces()[key].ids)
    again = _export(rollout, "--to", name, "-o", tmp_path / "out")
    assert (again.returncode, "holds something already" in again.stderr) == (2, True)


def test_export_splits_at_the_prompt_of_each_sample(rollout: Path, tmp_path: Path):
    assert _export(rollout, "--to", "vllm-split", "-o", tmp_path / "out").returncode == 0
    for number, (num_tokens, num_prompt) in enumerate(LENGTHS.values()):
        fields = json.loads((tmp_path / "out" / f"{number:06d}.json").read_text())
        assert len(fields["prompt_routed_experts"]) == num_prompt
        assert len(fields["routed_experts"]) == num_tokens - num_prompt - 1


def test_export_of_one_trace_takes_its_lengths(tmp_path: Path):
    save_trace(random_trace(1), tmp_path / "t.rrt")
    for words, num_rows in (((), 7), (("--num-tokens", 7), 6), (("--num-tokens", 8), 7)):
        out = tmp_path / f"{len(words)}{num_rows}.npy"
        done = _export(tmp_path / "t.rrt", "--to", "slime", "-o", out, *words)
        assert (done.returncode, len(np.load(out))) == (0, num_rows)
    done = _export(tmp_path / "t.rrt", "--to", "slime", "-o", tmp_path / "x", "--num-tokens", 9)
    assert (done.returncode, "token index 7 is missing" in done.stderr) == (1, True)
    done = _export(tmp_path / "t.rrt", "--to", "vllm-split", "-o", tmp_path / "x")
    assert (done.returncode, "pass --num-prompt-tokens" in done.stderr) == (2, True)
    words = ("--to", "vllm-split", "-o", tmp_path / "y", "--num-prompt-tokens", 2)
    assert _export(tmp_path / "t.rrt", *words).returncode == 0


def test_export_refuses_lengths_for_many_traces(rollout: Path, tmp_path: Path):
    for word in ("--num-tokens", "--num-prompt-tokens"):
        done = _export(rollout, "--to", "verl", "-o", tmp_path / "out", word, 4)
        assert (done.returncode, "holds many traces" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_export_of_missing_rows_needs_a_policy_that_the_format_offers(tmp_path: Path):
    save_trace(invalid_rows(random_trace(1), [2]), tmp_path / "t.rrt")
    words = (tmp_path / "t.rrt", "-o", tmp_path / "out")
    assert "token index 2 is missing" in _export(*words, "--to", "nemo-rl").stderr
    done = _export(*words, "--to", "verl", "--on-missing", "native")
    assert (done.returncode, "not offered by the format verl" in done.stderr) == (2, True)
    assert _export(*words, "--to", "nemo-rl", "--on-missing", "native").returncode == 0
    assert (_nemo_rl((tmp_path / "out").read_bytes())[2] == -1).all()
    words = (tmp_path / "t.rrt", "-o", tmp_path / "m.npy", "--to", "miles")
    assert _export(*words, "--on-missing", "arange").returncode == 0
    assert (np.load(tmp_path / "m.npy")[2] == -1).all()


def test_export_refuses_an_unknown_format(rollout: Path, tmp_path: Path):
    done = _export(rollout, "--to", "pickle", "-o", tmp_path / "x")
    assert done.returncode == 2
    assert "accepted are npz" in done.stderr
    done = _export(tmp_path / "none", "--to", "verl", "-o", tmp_path / "x")
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)


def test_export_help_names_every_format():
    text = _export("--help").stdout
    assert "Example: routing-replay export" in text
    words = set(text.replace(",", " ").replace(".", " ").replace(":", " ").split())
    assert {item.name for item in EXPORT_FORMATS} <= words


def test_export_that_cannot_be_expressed_leaves_nothing(tmp_path: Path):
    with TraceStoreWriter(tmp_path / "t.rrs") as writer:
        writer.append("good", random_trace(1))
        writer.append("gap", invalid_rows(random_trace(1), [1]))
    done = _export(tmp_path / "t.rrs", "--to", "vllm", "-o", tmp_path / "out")
    assert (done.returncode, "token index 1 is missing" in done.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.rrs"]
    (tmp_path / "file").write_text("x")
    done = _export(tmp_path / "t.rrs", "--to", "npz", "-o", tmp_path / "file")
    assert (done.returncode, "is a file" in done.stderr) == (2, True)
    done = _export(tmp_path / "t.rrs", "--to", "npz", "-o", tmp_path / "out" / "deep")
    assert done.returncode == 0
    assert len(list((tmp_path / "out" / "deep").iterdir())) == 3
