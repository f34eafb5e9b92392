"""`routing-replay tune` where there is no GPU: its options, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routing_replay.cli.tune import TuneOptions, layer_of, parse_tune, run_tune, tokens_of
from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.kernels.experts.tables import LayerShape

OUT = Path("t.json")
CODE = "import sys; from routing_replay.cli import main; main(sys.argv[1:])"


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, "tune", *words], capture_output=True, text=True, check=False
    )


def test_tune_documents_itself():
    done = _run("--help")
    assert done.returncode == 0
    for word in (
        "--hidden-size",
        "--tokens",
        "--budget-seconds",
        "--out",
        "qwen3-30b-a3b",
        "--json",
    ):
        assert word in done.stdout
    assert "Example: routing-replay tune" in done.stdout
    assert "--no-json" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_clear_line(tmp_path: Path):
    done = _run("--like", "olmoe", "--tokens", "1,8", "--out", str(tmp_path / "t.json"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: tuning times kernels on a GPU")
    assert "run it on a machine that has one" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_tune_needs_torch_alone():
    code = CODE + "\nfinally: print('tyro' in sys.modules, 'triton' in sys.modules)"
    code = code.replace("main(sys.argv[1:])", "\ntry: main(sys.argv[1:])")
    words = [sys.executable, "-c", code, "tune", "--like", "olmoe", "--device", "63", "--out", "t"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "False False\n")


def test_tune_needs_a_file_and_knows_its_models(tmp_path: Path):
    assert _run("--like", "olmoe").returncode == 2
    unknown = _run("--like", "no-such-model", "--out", str(tmp_path / "t.json"))
    assert unknown.returncode == 2


def test_tokens_are_read():
    assert tokens_of("1") == (1,)
    assert tokens_of("1, 2,4096") == (1, 2, 4096)
    assert tokens_of(TuneOptions(out=OUT).tokens)[-1] == 16384


@pytest.mark.parametrize(
    "text", ["", "0", "1,,2", "2,1", "1,1", "-1", "1.5", "one", "1 2", "\u0661"]
)
def test_bad_tokens_are_refused(text: str):
    with pytest.raises(ConfigError) as caught:
        tokens_of(text)
    assert f"tokens={text!r}" in str(caught.value)


def test_like_gives_sizes_and_what_is_given_replaces_them():
    assert layer_of(TuneOptions(out=OUT, like="deepseek-v3-ep8")) == LayerShape(
        hidden_size=7168, intermediate_size=2048, num_experts=256, num_local_experts=32, top_k=8
    )
    changed = layer_of(TuneOptions(out=OUT, like="olmoe", top_k=4, num_experts=32, not_gated=True))
    assert changed == LayerShape(
        hidden_size=2048, intermediate_size=1024, num_experts=32, num_local_experts=32, top_k=4, is_gated=False
    )  # fmt: skip


def test_parsed_options_are_those_of_the_words():
    assert parse_tune(["--out", "t.json"]) == TuneOptions(out=OUT)
    words = (
        "-o t.json --like olmoe --top-k 4 --not-gated --tokens 1,2 --budget-seconds 3.5 --seed 7"
    )
    assert parse_tune(words.split()) == TuneOptions(
        out=OUT, like="olmoe", top_k=4, not_gated=True, tokens="1,2", budget_seconds=3.5, seed=7
    )


def test_layer_without_like_needs_every_size():
    with pytest.raises(ConfigError, match="--intermediate-size, --num-experts"):
        layer_of(TuneOptions(out=OUT, hidden_size=64, top_k=2))
    whole = TuneOptions(out=OUT, hidden_size=64, intermediate_size=64, num_experts=8, top_k=2)
    assert layer_of(whole).num_local_experts == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hidden_size": 0}, "hidden_size=0"), ({"top_k": 65}, "top_k=65"), ({"num_local_experts": 65}, "num_local_experts=65")],
)  # fmt: skip
def test_impossible_layer_is_refused(options: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        layer_of(TuneOptions(out=OUT, like="olmoe", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"budget_seconds": 0.0}, "budget_seconds=0.0"), ({"seed": -1}, "seed=-1"), ({"device": -1}, "device=-1")],
)  # fmt: skip
def test_options_are_checked_before_a_gpu_is_looked_for(options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        run_tune(TuneOptions(out=OUT, like="olmoe", **options))  # type: ignore[arg-type]


def test_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="like='gpt'; accepted are qwen3-30b-a3b"):
        layer_of(TuneOptions(out=OUT, like="gpt"))


def test_device_that_is_not_there_is_refused():
    with pytest.raises(RoutingReplayError, match="device=63 is asked for"):
        run_tune(TuneOptions(out=OUT, like="olmoe", device=63))
