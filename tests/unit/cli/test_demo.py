"""The command line: exit codes, and the demo's checks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from routing_replay.cli.demo import DemoOptions, demo_checks, run_demo
from routing_replay.errors import ConfigError
from routing_replay.replay import Interval
from routing_replay.report import AuditResult, Comparison
from routing_replay.trace import RolloutReader


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from routing_replay.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )


def test_bad_arguments_exit_with_2():
    for words in (("demo", "--sed", "1"), ("demo", "--num-problems", "1"), ("dmo",)):
        done = _command(*words)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr


def _result() -> AuditResult:
    same = Comparison(
        kl_k3=1e-6,
        kl_k1=0.0,
        f2=0.0,
        mean_abs_dlogp=1e-4,
        mean_abs_dp=1e-5,
        token_mult_prob_error=1.0,
        mismatch_pairs=0.0,
        mismatch_tokens=0.0,
        mismatch_per_layer=(),
        overlap_per_layer=(),
    )
    return AuditResult(
        num_response_tokens=5000,
        num_rows=9000,
        native=same,
        replayed=same,
        control=same,
        kl_ratio=Interval(value=0.5, low=0.4, high=0.6),
        kl_wrong_rows=1.0,
        coverage=1.0,
        fallback=0.0,
        num_wrong_ids=0,
    )


def test_every_check_passes_on_a_good_result():
    assert all(check.passed for check in demo_checks(_result()))


@pytest.mark.parametrize(
    "change",
    [
        {"coverage": 0.999},
        {"num_wrong_ids": 1},
        {"kl_wrong_rows": 1e-7},
        {"num_response_tokens": 4095},
    ],
)
def test_each_check_fails_on_its_own(change: dict[str, float]):
    failed = [check for check in demo_checks(replace(_result(), **change)) if not check.passed]
    assert len(failed) == 1


def test_short_demo_writes_its_figures_and_fails_for_too_few_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = DemoOptions(num_problems=4, output=tmp_path / "new", json=True)
    assert run_demo(options) == 1
    record = json.loads((options.output / "demo.json").read_text())
    assert "Routing replay demo" in (options.output / "report.html").read_text()
    with RolloutReader(options.output / "rollout") as rollout:
        assert len(list(rollout)) == 4
        assert rollout.facts["dtype"] == "bfloat16"
    assert json.loads(capsys.readouterr().out) == record
    assert run_demo(options) == 1  # a second demo takes the place of the first
    capsys.readouterr()
    assert [check["passed"] for check in record["checks"]] == [True, True, True, False]
    assert record["coverage"] == 1.0
    assert set(record["seconds"]) == {"load", "generate", "audit", "total"}


def test_demo_keeps_a_folder_that_is_not_its_own(tmp_path: Path):
    (tmp_path / "rollout").mkdir()
    (tmp_path / "rollout" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds something already"):
        run_demo(DemoOptions(num_problems=4, output=tmp_path))
    assert (tmp_path / "rollout" / "mine.txt").read_text() == "x"
