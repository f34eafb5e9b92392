"""Everything that runs a model takes the GPU where there is one, and says which device it took."""

import json
from pathlib import Path

import pytest
import torch

from routing_replay.assets import tiny_moe_path
from routing_replay.cli.audit import AuditOptions, run_audit
from routing_replay.cli.demo import DemoOptions, run_demo
from routing_replay.cli.rollout import RolloutOptions, run_rollout
from routing_replay.engine import LLM, device, usable_device
from routing_replay.errors import ConfigError
from routing_replay.trace import RolloutReader


@pytest.mark.parametrize(("has_gpu", "name"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_torch_sees_one(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, name: str
):
    monkeypatch.undo()  # what keeps other tests on the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert device.auto_device() == name


def test_auto_is_resolved_to_a_device():
    assert usable_device("auto") == torch.device("cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    return path


def _rollout(prompts: Path) -> Path:
    out = prompts.with_suffix(".rollout")
    run_rollout(RolloutOptions(model="tiny-moe", prompts=prompts, output=out, max_tokens=4))
    return out


def test_rollout_names_the_device_that_it_took(prompts: Path):
    with RolloutReader(_rollout(prompts)) as reader:
        assert reader.facts["device"] == "cpu"


def test_default_is_auto_everywhere(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine whose automatic choice does not work: whoever asks for it fails, who names the CPU does not."""
    rollout = _rollout(prompts)
    monkeypatch.setattr(device, "auto_device", lambda: "nonsense")
    for run in (
        lambda: LLM(tiny_moe_path()),
        lambda: run_demo(DemoOptions(output=tmp_path / "demo")),
        lambda: run_audit(AuditOptions(rollout=rollout, model="tiny-moe")),
        lambda: _rollout(prompts.rename(tmp_path / "again.jsonl")),
    ):
        with pytest.raises(ConfigError, match="device='nonsense' cannot be used"):
            run()
    assert LLM(tiny_moe_path(), device="cpu").core.runner.model.norm.weight.device.type == "cpu"
    assert run_audit(AuditOptions(rollout=rollout, model="tiny-moe", device="cpu")) == 0


def test_demo_names_the_device(tmp_path: Path):
    run_demo(DemoOptions(num_problems=2, output=tmp_path, device="cpu", json=True))
    assert json.loads((tmp_path / "demo.json").read_text())["machine"]["device"] == "cpu"
