"""Every command as a user runs it: what it prints, what it writes, how it fails."""

import io
import json
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from routing_replay.cli import main
from routing_replay.cli.attempts import AttemptError
from routing_replay.cli.doctor import DoctorOptions, run_doctor
from routing_replay.cli.prompts import load_prompts
from routing_replay.cli.provenance import checkout_commit
from routing_replay.errors import ConfigError, IntegrationError, TraceMismatchError
from routing_replay.trace import (
    RolloutReader,
    RolloutSample,
    RolloutWriter,
    RoutingTrace,
    TraceStoreReader,
    TraceStoreWriter,
    save_trace,
)

CODE = "import sys; from routing_replay.cli import main; main(sys.argv[1:])"


@dataclass(frozen=True)
class Done:
    returncode: object
    stdout: str
    stderr: str


def _run(*words: object) -> Done:
    """Run a command in this process: starting a fresh one takes seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as exit_info:
        main(list(map(str, words)))
    return Done(exit_info.value.code, stdout.getvalue(), stderr.getvalue())


def _spawn(*words: object, code: str = CODE) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own."""
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


def test_rollout_refuses_an_unknown_codec_before_it_generates(rollout: Path, tmp_path: Path):
    prompts = rollout.parent / "prompts.jsonl"
    done = _run("rollout", "tiny-moe", prompts, "-o", tmp_path / "x", "--codec", "zip")
    assert (done.returncode, "invalid choice 'zip'" in done.stderr) == (2, True)
    assert not (tmp_path / "x").exists()


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
    assert "replay: 0 wrong ids" in tables.stdout
    assert tables.stdout.endswith("exact\n")
    assert "k3, nats a token" in tables.stdout


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
    done = _spawn("inspect", rollout / "traces.rrs", code=code)
    assert done.stdout.splitlines()[-1] == "False False"


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


@pytest.mark.parametrize(
    "command", ["demo", "rollout", "audit", "inspect", "export", "tune", "doctor"]
)
def test_every_command_has_help_with_an_example(command: str):
    done = _run(command, "--help")
    assert done.returncode == 0
    assert f"Example: routing-replay {command}" in done.stdout
    assert "options options" not in done.stdout
    assert "--json" in done.stdout
    assert "--no-json" not in done.stdout
    bad = _run(command, "--no-such-option")
    assert bad.returncode == 2


def test_unknown_command_is_refused_with_a_hint():
    done = _run("rolout")
    assert done.returncode == 2
    assert "did you mean 'rollout'" in done.stderr
    assert _run().returncode == 2
    assert _run("--help").returncode == 0
    assert "routing-replay" in _run("--version").stdout


def test_closed_pipe_is_no_message(tmp_path: Path):
    with TraceStoreWriter(tmp_path / "t.rrs"):
        pass
    words = [sys.executable, "-c", CODE, "inspect", str(tmp_path / "t.rrs")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert (running.wait(timeout=30), running.stderr.read()) == (1, b"")


def test_interruption_is_one_line(tmp_path: Path):
    code = (
        "import sys, routing_replay.cli.inspect as i\n"
        "def stop(options): raise KeyboardInterrupt\n"
        "i.run_inspect = stop\n" + CODE
    )
    done = _spawn("inspect", tmp_path, code=code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"prompt": "a", "messages": []}', "exactly one of them"), ("[1]", "exactly one of them"), ("{", "is not JSON"),
     ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "ids are unique"), ("", "holds no prompt"),
     ('{"prompt": "a"}\n{"id": 1, "prompt": "b"}', "ids are unique"), ('{"prompt": 3}', "prompt is 3; accepted is a text"),
     ('{"prompt": ""}', "a text that is not empty"), ('{"messages": "x"}', 'messages is "x"; accepted is a list'),
     ('{"messages": [3]}', "accepted is a list of"), ('{"messages": [{"role": "user"}]}', "accepted is a list of"),
     ('{"messages": [{"role": "user", "content": null}]}', "accepted is a list of"), ('{"messages": []}', "a list of"),
     ('{"prompt_token_ids": ["a"]}', "list of token ids"), ('{"prompt_token_ids": []}', "list of token ids"),
     ('{"prompt_token_ids": [1.5]}', "list of token ids"), ('{"prompt_token_ids": [true]}', "list of token ids"),
     ('{"prompt_token_ids": [-1]}', "list of token ids"), ('{"id": [1], "prompt": "a"}', "a text or an integer")],
)  # fmt: skip
def test_bad_prompt_file_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)


def test_prompt_files_that_are_no_prompt_files_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\*\.jsonl or \*\.txt"):
        load_prompts(tmp_path / "p.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="in UTF-8"):
        load_prompts(tmp_path / "p.txt")


def test_prompts_keep_their_names_and_kinds(tmp_path: Path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\u2028three\r\n")
    found = load_prompts(tmp_path / "p.txt")
    assert (found.names, found.texts) == (("1", "3"), {"1": "one", "3": "two\u2028three"})
    turns = [{"role": "user", "content": "hi"}]
    lines = [{"prompt_token_ids": [3, 4]}, {"id": "b", "messages": turns}, {"id": 7, "prompt": "x"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_prompts(tmp_path / "p.jsonl")
    assert found.names == ("1", "b", "7")
    assert (found.token_ids, found.conversations, found.texts) == (
        {"1": [3, 4]},
        {"b": turns},
        {"7": "x"},
    )


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ('{"prompt_token_ids": [99999]}', (), "accepted are ids in [0, 512)"),
        ('{"prompt": "a"}', ("--device", "nonsense"), "device='nonsense' cannot be used"),
        ('{"prompt": "a"}', ("--n", 0), "n=0; accepted is 1 or more"),
        ('{"prompt": "a"}', ("--max-num-seqs", 0), "max_num_seqs=0"),
        ('{"prompt": "a"}', ("--dtype", "float8"), "invalid choice 'float8'"),
    ],
)
def test_rollout_that_is_refused_leaves_nothing(
    tmp_path: Path, line: str, words: tuple[object, ...], message: str
):
    (tmp_path / "p.jsonl").write_text(line)
    done = _run("rollout", "tiny-moe", tmp_path / "p.jsonl", "-o", tmp_path / "out", *words)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_rollout_passes_its_settings_on(tmp_path: Path):
    (tmp_path / "p.txt").write_text("<|user|>How many is 2 + 2?<|assistant|>\n")
    words = ("--max-tokens", 9, "--ignore-eos", "--stop", "+", "=", "--min-tokens", 3, "--dtype", "float32",
             "--temperature", 0.5, "--codec", "packed+zstd", "--seed", 4)  # fmt: skip
    done = _run("rollout", "tiny-moe", tmp_path / "p.txt", "-o", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    with RolloutReader(tmp_path / "out") as reader:
        (sample,) = reader
        facts = reader.facts
    assert not sample.trace.ordered
    assert 3 <= len(sample.token_ids) <= 9
    assert (facts["dtype"], facts["stop"], facts["seed"], facts["temperature"]) == (
        "float32",
        ["+", "="],
        4,
        0.5,
    )
    assert facts["logprobs_mode"] == "raw_logprobs"


SLOW = CODE.replace(
    "main(sys.argv[1:])",
    """
import signal
import time
from routing_replay.engine import LLM
# A shell's background jobs ignore the signal, and so would the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
each = LLM.generate_each
def slowly(self, *args, **kwargs):
    for number, item in enumerate(each(self, *args, **kwargs)):
        yield item
        print(number, flush=True)
        time.sleep(60 if number == 2 else 0)
LLM.generate_each = slowly
main(sys.argv[1:])""",
)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_rollout_that_is_stopped_keeps_what_it_had(tmp_path: Path, kind: signal.Signals):
    (tmp_path / "p.txt").write_text("".join(f"<|user|>{i} + {i}<|assistant|>\n" for i in range(6)))
    words = ("rollout", "tiny-moe", tmp_path / "p.txt", "-o", tmp_path / "out", "--max-tokens", 6)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for line in running.stdout:
            if line.strip() == "2":
                running.send_signal(kind)
                break
        code, errors = running.wait(timeout=30), running.stderr.read()
    assert (code, errors) == ((-9, "") if kind is signal.SIGKILL else (130, "interrupted\n"))
    with RolloutReader(tmp_path / "out") as reader:
        assert len(list(reader)) == 3
    looked = _run("inspect", tmp_path / "out", "--json")
    assert (looked.returncode, json.loads(looked.stdout)["samples"]) == (0, 3)


@pytest.mark.parametrize(
    ("command", "missing"),
    [("audit", "transformers"), ("rollout", "tokenizers"), ("export", "tyro"), ("demo", "torch")],
)
def test_missing_package_is_one_line(tmp_path: Path, command: str, missing: str):
    (tmp_path / "p.txt").write_text("a\n")
    words = {"audit": (tmp_path, "-m", "tiny-moe"), "rollout": ("tiny-moe", tmp_path / "p.txt", "-o", tmp_path / "x"),
             "export": (tmp_path,), "demo": ()}  # fmt: skip
    done = _spawn(
        command, *words[command], code=f"import sys; sys.modules[{missing!r}] = None\n{CODE}"
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: routing-replay {command} needs {missing}")
    assert "pip install 'routing-replay[demo]'" in done.stderr


def test_audit_says_when_traces_hold_no_order(rollout: Path, tmp_path: Path):
    with (
        RolloutReader(rollout) as reader,
        RolloutWriter(tmp_path / "sets", facts=reader.facts, codec="packed") as writer,
    ):
        for sample in reader:
            writer.append(sample)
    done = _run("audit", tmp_path / "sets", "-m", "tiny-moe")
    assert done.returncode == 0, done.stderr
    assert "as sets" in done.stdout
    assert "as sets" not in _run("audit", rollout, "-m", "tiny-moe").stdout


def test_audit_says_when_sampling_left_the_models_distribution(rollout: Path, tmp_path: Path):
    shutil.copytree(rollout, tmp_path / "warm")
    facts = json.loads((tmp_path / "warm" / "rollout.json").read_text())
    audited = _run("audit", rollout, "-m", "tiny-moe", "--json")
    assert json.loads(audited.stdout)["caveats"] == []
    (tmp_path / "warm" / "rollout.json").write_text(json.dumps({**facts, "temperature": 0.7}))
    page = tmp_path / "page.html"
    done = _run("audit", tmp_path / "warm", "-m", "tiny-moe", "--report", page)
    assert "sampled with temperature 0.7" in " ".join(done.stdout.split())
    assert "sampled with temperature 0.7" in page.read_text()


def test_audit_refuses_logprobs_of_another_distribution(rollout: Path, tmp_path: Path):
    with (
        RolloutReader(rollout) as reader,
        RolloutWriter(
            tmp_path / "r", facts={**reader.facts, "logprobs_mode": "processed_logprobs"}
        ) as writer,
    ):
        for sample in reader:
            writer.append(sample)
    done = _run("audit", tmp_path / "r", "-m", "tiny-moe")
    assert (done.returncode, "logprobs_mode='processed_logprobs'" in done.stderr) == (2, True)


def test_audit_refuses_one_sample(rollout: Path):
    done = _run("audit", rollout, "-m", "tiny-moe", "--max-samples", 1)
    assert (done.returncode, "max_samples=1; accepted is 2 or more" in done.stderr) == (2, True)


def test_doctor_reports_what_fails_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def wrong() -> str:
        raise AttemptError("other rows")

    def missing() -> str:
        raise ModuleNotFoundError("no", name="triton")

    def codec() -> str:
        raise IntegrationError("zstd needs the package zstandard")

    monkeypatch.setattr(
        "routing_replay.cli.doctor.ATTEMPTS",
        (("a", wrong), ("b", missing), ("c", codec), ("d", lambda: "fine")),
    )
    assert run_doctor(DoctorOptions(json=True)) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["works"] for finding in findings] == [False, None, None, True]
    assert "other rows" in findings[0]["detail"]
    assert findings[1]["detail"].endswith("pip install triton")


def test_commit_is_that_of_the_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = checkout_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 12
    package = tmp_path / "site-packages" / "routing_replay"
    package.mkdir(parents=True)
    monkeypatch.setattr("routing_replay.__file__", str(package / "__init__.py"))
    (tmp_path / ".git").mkdir()
    assert checkout_commit() is None


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


def test_rollout_is_flushed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = RolloutWriter(tmp_path / "r", facts={})
    flushed: list[int] = []
    flush = writer.flush
    monkeypatch.setattr(writer, "flush", lambda: (flushed.append(len(flushed)), flush()))
    for number in range(130):
        writer.append(_sample(str(number)))
    assert len(flushed) == 2
    writer.close()
    writer.close()
    with RolloutReader(tmp_path / "r") as reader:
        assert len(list(reader)) == 130


def test_rollout_of_other_tokens_is_refused(tmp_path: Path):
    from dataclasses import replace

    with RolloutWriter(tmp_path / "r", facts={}) as writer:
        with pytest.raises(TraceMismatchError):
            writer.append(replace(_sample("a"), prompt_token_ids=(1, 9)))
        with pytest.raises(ConfigError, match="2 logprobs for 1 tokens"):
            writer.append(replace(_sample("a"), logprobs=(-0.5, -0.1)))
