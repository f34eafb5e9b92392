"""Every command as a user runs it: what it prints, what it writes, how it fails."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from routing_replay.cli.rollout import load_prompts
from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace import (
    EXPORT_FORMATS,
    RolloutReader,
    RolloutSample,
    RolloutWriter,
    RoutingTrace,
    TraceStoreReader,
    save_trace,
)

CODE = "import sys; from routing_replay.cli import main; main(sys.argv[1:])"


def _run(*words: object, code: str = CODE) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def rollout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout")
    prompts = folder / "prompts.jsonl"
    lines = [
        {
            "id": "chat",
            "messages": [{"role": "user", "content": "Ada has 3 pens and buys 4. How many?"}],
        },
        {"id": "text", "prompt": "<|user|>How many is 2 + 2?<|assistant|>"},
        {"prompt_token_ids": [5, 6, 7]},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    done = _run(
        "rollout", "tiny-moe", prompts, "-o", folder / "out", "--n", 2, "--max-tokens", 12, "--json"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["num_samples"], summary["num_failed"]) == (6, 0)
    return folder / "out"


def test_rollout_stores_tokens_logprobs_and_traces(rollout: Path):
    with RolloutReader(rollout) as reader:
        samples = {sample.key: sample for sample in reader}
        assert reader.facts["model"] == "tiny-moe"
    assert set(samples) == {"chat/0", "chat/1", "text/0", "text/1", "3/0", "3/1"}
    for sample in samples.values():
        assert len(sample.logprobs) == len(sample.token_ids) <= 12
        assert all(value <= 0 for value in sample.logprobs)
        assert sample.trace.num_rows == len(sample.all_token_ids) - 1
        assert sample.trace.ordered
    assert samples["3/0"].prompt_token_ids == (5, 6, 7)
    assert samples["chat/0"].text


def test_rollout_refuses_a_folder_that_is_not_empty(rollout: Path):
    done = _run("rollout", "tiny-moe", rollout.parent / "prompts.jsonl", "-o", rollout)
    assert done.returncode == 2
    assert "holds something already" in done.stderr


def test_audit_reports_and_writes_a_page(rollout: Path, tmp_path: Path):
    page = tmp_path / "new" / "report.html"
    done = _run("audit", rollout, "--model", "tiny-moe", "--report", page, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["exact"], result["num_wrong_ids"], result["coverage"]) == (True, 0, 1.0)
    assert "tiny-moe" in page.read_text()
    tables = _run("audit", rollout, "-m", "tiny-moe", "--max-samples", 2)
    assert tables.returncode == 0
    assert "exact: 0 wrong ids" in tables.stdout
    assert "KL (k3)" in tables.stdout


def test_audit_of_a_damaged_rollout_fails(rollout: Path, tmp_path: Path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(rollout, broken)
    data = bytearray((broken / "traces.rrs" / "data").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "traces.rrs" / "data").write_bytes(data)
    done = _run("audit", broken, "--model", "tiny-moe")
    assert done.returncode == 1
    assert "the file is damaged" in done.stderr
    looked = _run("inspect", broken, "--json")
    assert looked.returncode == 1
    assert "damaged" in looked.stderr + looked.stdout


def test_inspect_describes_rollout_store_and_trace(rollout: Path, tmp_path: Path):
    found = json.loads(_run("inspect", rollout, "--json").stdout)
    assert (found["kind"], found["samples"], found["traces"], found["problems"]) == (
        "rollout",
        6,
        6,
        {},
    )
    assert found["layouts"][0]["num_experts"] == 64
    store = json.loads(_run("inspect", rollout / "traces.rrs", "--json").stdout)
    assert (store["kind"], store["rows"]) == ("store", found["rows"])
    with TraceStoreReader(rollout / "traces.rrs") as reader:
        trace = reader["text/0"]
    save_trace(trace, tmp_path / "one.rrt")
    shown = _run("inspect", tmp_path / "one.rrt")
    assert shown.returncode == 0
    assert "top_k" in shown.stdout
    assert shown.stdout.rstrip().endswith("yes")
    (tmp_path / "bad.rrt").write_bytes((tmp_path / "one.rrt").read_bytes()[:-1])
    bad = _run("inspect", tmp_path / "bad.rrt")
    assert (bad.returncode, "error:" in bad.stderr) == (1, True)
    missing = _run("inspect", tmp_path / "none")
    assert (missing.returncode, "does not exist" in missing.stderr) == (2, True)


def test_inspect_loads_neither_torch_nor_transformers(rollout: Path):
    code = CODE.replace(
        "main(sys.argv[1:])",
        "\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)",
    )
    done = _run("inspect", rollout / "traces.rrs", code=code)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("name", [item.name for item in EXPORT_FORMATS])
def test_export_writes_every_trace_of_a_rollout(rollout: Path, tmp_path: Path, name: str):
    done = _run("export", rollout, "--to", name, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["traces"] == 6
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    with TraceStoreReader(rollout / "traces.rrs") as reader:
        for file, key in index.items():
            ids = _read_export(name, tmp_path / "out" / file)
            assert np.array_equal(ids, reader[key].ids)
    again = _run("export", rollout, "--to", name, "-o", tmp_path / "out")
    assert (again.returncode, "holds something already" in again.stderr) == (2, True)


def _read_export(name: str, path: Path) -> np.ndarray:
    if name == "npz":
        with np.load(path) as arrays:
            assert int(arrays["num_experts"]) == 64
            return arrays["ids"]
    if name == "safetensors":
        from safetensors.numpy import load_file

        return load_file(path)["ids"]
    return np.load(io.BytesIO(base64.b64decode(path.read_bytes())))


def test_export_for_vllm_fills_dense_layers_and_refuses_missing_rows():
    vllm = next(item for item in EXPORT_FORMATS if item.name == "vllm")
    ids = np.array([[[5, 2], [0, 7]], [[1, 3], [6, 4]]])
    facts = {"token_ids": [1, 2, 3], "layer_ids": [1, 3], "num_layers": 4, "num_experts": 8}
    trace = RoutingTrace.from_rows(ids, **facts)
    array = np.load(io.BytesIO(base64.b64decode(vllm.encode(trace))))
    assert array.dtype == np.uint8
    assert array.tolist() == [[[0, 1], [5, 2], [0, 1], [0, 7]], [[0, 1], [1, 3], [0, 1], [6, 4]]]
    with pytest.raises(TraceMismatchError, match="token index 1 is missing"):
        vllm.encode(RoutingTrace.from_rows(ids, valid=[True, False], **facts))
    with pytest.raises(TraceMismatchError, match="token index 0 is missing"):
        vllm.encode(RoutingTrace.from_rows(ids[1:], start=1, **facts))


def test_export_refuses_an_unknown_format(rollout: Path, tmp_path: Path):
    done = _run("export", rollout, "--to", "pickle", "-o", tmp_path / "x")
    assert done.returncode == 2
    assert "accepted are npz" in done.stderr


def test_doctor_tries_everything():
    done = _run("doctor", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 0, record
    works = {finding["feature"]: finding["works"] for finding in record["findings"]}
    assert works["engine with capture and forced routing"] is True
    assert works["replay in Transformers"] is True
    assert works["trace codec packed+zstd"] is True
    assert record["versions"]["torch"] != "not installed"
    assert "ok" in _run("doctor").stdout


@pytest.mark.parametrize("command", ["demo", "rollout", "audit", "inspect", "export", "doctor"])
def test_every_command_has_help_with_an_example(command: str):
    done = _run(command, "--help")
    assert done.returncode == 0
    assert f"Example: routing-replay {command}" in done.stdout
    assert "options options" not in done.stdout
    assert "--json" in done.stdout
    bad = _run(command, "--no-such-option")
    assert bad.returncode == 2


def test_unknown_command_is_refused_with_a_hint():
    done = _run("rolout")
    assert done.returncode == 2
    assert "did you mean 'rollout'" in done.stderr
    assert _run().returncode == 2
    assert _run("--help").returncode == 0
    assert "routing-replay" in _run("--version").stdout


def test_interruption_is_one_line(tmp_path: Path):
    code = (
        "import sys, routing_replay.cli.inspect as i\n"
        "def stop(options): raise KeyboardInterrupt\n"
        "i.run_inspect = stop\n" + CODE
    )
    done = _run("inspect", tmp_path, code=code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"prompt": "a", "messages": []}', "exactly one of them"), ("[1]", "exactly one of them"), ("{", "is not JSON"),
     ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "ids are unique"), ("", "holds no prompt")],
)  # fmt: skip
def test_bad_prompt_file_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)
    with pytest.raises(ConfigError, match=r"\*\.jsonl or \*\.txt"):
        load_prompts(tmp_path / "p.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert load_prompts(tmp_path / "p.txt") == {"1": "one", "3": "two"}


def _sample(key: str) -> RolloutSample:
    ids = np.array([[[5, 2]], [[1, 3]]])
    trace = RoutingTrace.from_rows(
        ids, token_ids=[1, 2, 3], layer_ids=[0], num_layers=1, num_experts=8
    )
    return RolloutSample(
        key=key, prompt_token_ids=(1, 2), token_ids=(3,), logprobs=(-0.5,), trace=trace
    )


def test_rollout_cut_off_by_a_kill_keeps_its_whole_samples(tmp_path: Path):
    with RolloutWriter(tmp_path / "r", facts={}) as writer:
        writer.append(_sample("a"))
        writer.append(_sample("b"))
    lines = (tmp_path / "r" / "samples.jsonl").read_text()
    first = lines.index("\n") + 1
    for size in range(first, len(lines)):
        (tmp_path / "r" / "samples.jsonl").write_text(lines[:size])
        with RolloutReader(tmp_path / "r") as reader:
            assert [sample.key for sample in reader] == ["a"]


def test_rollout_of_other_tokens_is_refused(tmp_path: Path):
    from dataclasses import replace

    with RolloutWriter(tmp_path / "r", facts={}) as writer:
        with pytest.raises(TraceMismatchError):
            writer.append(replace(_sample("a"), prompt_token_ids=(1, 9)))
        with pytest.raises(ConfigError, match="2 logprobs for 1 tokens"):
            writer.append(replace(_sample("a"), logprobs=(-0.5, -0.1)))
