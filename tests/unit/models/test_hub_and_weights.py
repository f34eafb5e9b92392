"""From names to folders, and from tensors to weights: found, or refused with the way out."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models import (
    check_batch_invariance,
    copy_weights,
    find_model_folder,
    load_model,
)

SHAPE = TinyShape(num_experts=4, top_k=2, num_layers=2, dense_layers=(0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def test_folder_is_taken_as_it_is(folder: Path):
    assert find_model_folder(folder) == folder
    assert find_model_folder(str(folder)) == folder


def test_hub_name_is_fetched_without_foreign_files(monkeypatch: pytest.MonkeyPatch, folder: Path):
    asked: list[tuple[str, list[str]]] = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_model_folder("Qwen/Qwen3-30B-A3B") == folder
    assert find_model_folder("Qwen/Qwen3-30B-A3B", with_weights=False) == folder
    patterns = ["*.json", "*.jinja"]
    assert asked == [
        ("Qwen/Qwen3-30B-A3B", [*patterns, "*.safetensors"]),
        ("Qwen/Qwen3-30B-A3B", patterns),
    ]


def test_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ConfigError, match=r"'Qwen/none' is not a folder, and could not be fetched.*no connection"
    ):
        find_model_folder("Qwen/none")


@pytest.mark.parametrize("name", ["./nowhere", "no such model", "a/b/c", Path("Qwen/none")])
def test_what_is_neither_folder_nor_name_is_refused(name: str | Path):
    with pytest.raises(ConfigError, match="is not a folder; pass the folder"):
        find_model_folder(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_a_transformers_model_can_be_copied(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    model = load_model(folder, dtype=dtype, device=torch.device("cpu"))
    trainer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copy_weights(model, trainer.state_dict().items())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.5)
    copy_weights(model, trainer.state_dict().items())
    places = {**model.checkpoint_places(), **model.fused_places()}
    for name, tensor in trainer.state_dict().items():
        for place in places[name]:
            assert torch.equal(place, tensor.to(dtype).to(place.dtype)), name
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_unknown_name_and_other_shape_are_refused(folder: Path):
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"weight 'model.nothing' is not one of"):
        copy_weights(model, [("model.nothing", torch.zeros(1))])
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight has shape \(3,\)"):
        copy_weights(model, [("model.norm.weight", torch.zeros(3))])


def test_batch_invariance_is_tried_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from routing_replay.models import invariance

    model = load_model(
        folder, dtype=torch.float32, device=torch.device("cpu"), batch_invariant=True
    )
    check_batch_invariance(model)
    real = invariance.linear

    def by_position(
        x: torch.Tensor, weight: torch.Tensor, *, batch_invariant: bool
    ) -> torch.Tensor:
        out = real(x, weight, batch_invariant=batch_invariant)
        out[5] += 1e-6 * out[5].abs()
        return out

    monkeypatch.setattr(invariance, "linear", by_position)
    with pytest.raises(ConfigError, match="computes a row at position 5 otherwise"):
        check_batch_invariance(model)
    monkeypatch.undo()
    monkeypatch.setattr(
        invariance, "attend_block", lambda q, k, v, m: q + torch.arange(len(q))[:, None, None]
    )
    with pytest.raises(ConfigError, match="attention of 8 rows computes a row at position 1"):
        check_batch_invariance(model)
