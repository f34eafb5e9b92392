"""Layers that draft tokens: their numbers are Transformers' of the same weights, their routing is in no buffer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.capture import DeviceCache
from routing_replay.errors import ConfigError, UnsupportedModelError
from routing_replay.models import (
    Qwen3MoEModel,
    RoutingBuffers,
    SequenceSpan,
    StepInputs,
    copy_weights,
    load_model,
)

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=2)
CPU = torch.device("cpu")
TOKENS = 11
DEPTHS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two drafting layers, whose decoder layers are those of other random models."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)
    raw = json.loads((folder / "config.json").read_text())
    raw["num_nextn_predict_layers"] = DEPTHS
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for depth in range(DEPTHS):
        stem = f"model.layers.{SHAPE.num_layers + depth}"
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            noise = torch.randn(tensors[name].shape, generator=generator) * 0.1
            new = name.replace("model.layers.0", stem)
            tensors[new] = tensors[name.replace("layers.0", "layers.1")] * 0.9 + noise
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{stem}.{name}.weight"] = torch.rand(32, generator=generator) + 0.5
        tensors[f"{stem}.eh_proj.weight"] = torch.randn(32, 64, generator=generator) * 0.2
        tensors[f"{stem}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{stem}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    return folder


def _load(folder: Path, *, with_mtp: bool = True) -> Qwen3MoEModel:
    return load_model(folder, dtype=torch.float32, device=CPU, with_mtp=with_mtp)


def _step(token_ids: torch.Tensor) -> StepInputs:
    rows = torch.arange(len(token_ids))
    return StepInputs(
        token_ids=token_ids,
        positions=rows,
        slot_mapping=rows,
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        spans=(SequenceSpan(first_row=0, num_tokens=len(rows), context_len=len(rows)),),
        num_decodes=0,
        decode_mask=torch.zeros(0, 1, 1, 16, dtype=torch.bool),
    )


def _tokens() -> torch.Tensor:
    return torch.randint(4, 90, (TOKENS + DEPTHS,), generator=torch.Generator().manual_seed(2))


def _cache(layers: int) -> torch.Tensor:
    return torch.zeros(layers, 2, 1, 16, 2, 16)


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _expected(folder: Path, depth: int, hidden: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Hidden states before the shared norm, and logits, by a Transformers model of the drafting layer alone."""
    tensors = load_file(folder / "model.safetensors")
    stem = f"model.layers.{SHAPE.num_layers + depth}."
    raw = json.loads((folder / "config.json").read_text())
    raw["num_hidden_layers"] = 1
    alone = Qwen3MoeForCausalLM(Qwen3MoeConfig(**raw)).eval()
    state = alone.state_dict()
    names = {name.replace(stem, "model.layers.0."): tensor for name, tensor in tensors.items() if name.startswith(stem)}  # fmt: skip
    for expert in range(SHAPE.num_experts):
        prefix = "model.layers.0.mlp.experts"
        gate_up = [names[f"{prefix}.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")]
        state[f"{prefix}.gate_up_proj"][expert] = torch.cat(gate_up)
        state[f"{prefix}.down_proj"][expert] = names[f"{prefix}.{expert}.down_proj.weight"]
    for name, tensor in names.items():
        if name in state:
            state[name].copy_(tensor)
    state["model.norm.weight"].copy_(tensors[f"{stem}shared_head.norm.weight"])
    state["lm_head.weight"].copy_(tensors["lm_head.weight"])
    seen: list[torch.Tensor] = []
    alone.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedded = tensors["model.embed_tokens.weight"][after]
    pair = torch.cat(
        (_rms(embedded, tensors[f"{stem}enorm.weight"]), _rms(hidden, tensors[f"{stem}hnorm.weight"])), -1
    )  # fmt: skip
    with torch.no_grad():
        logits = alone(inputs_embeds=(pair @ tensors[f"{stem}eh_proj.weight"].t())[None]).logits[0]
    return seen[0][0], logits


def test_drafts_equal_transformers_at_every_depth(folder: Path):
    model, tokens, caches = _load(folder), _tokens(), _cache(DEPTHS)
    hidden = model(_step(tokens[:TOKENS]), _cache(2), RoutingBuffers())
    for depth in range(DEPTHS):
        after = tokens[1 + depth : 1 + depth + TOKENS]
        expected_hidden, expected = _expected(folder, depth, hidden, after)
        wrong = model.draft(_step(tokens[:TOKENS]), hidden, _cache(1)[0], depth=depth)
        hidden = model.draft(_step(after), hidden, caches[depth], depth=depth)
        logits = model.compute_draft_logits(hidden, depth=depth)
        torch.testing.assert_close(hidden, expected_hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert (model.compute_draft_logits(wrong, depth=depth) - expected).abs().max() > 0.1
    assert logits.dtype == torch.float32
    assert (caches != 0).flatten(1).any(1).all()


def test_drafts_in_pieces_equal_those_in_one(folder: Path):
    model, tokens = _load(folder), _tokens()
    hidden = model(_step(tokens[:TOKENS]), _cache(2), RoutingBuffers())
    whole = model.draft(_step(tokens[1 : 1 + TOKENS]), hidden, _cache(1)[0])
    cache = _cache(1)[0]
    model.draft(_step(tokens[1:TOKENS]), hidden[:-1], cache)
    last = StepInputs(
        token_ids=tokens[TOKENS : TOKENS + 1],
        positions=torch.tensor([TOKENS - 1]),
        slot_mapping=torch.tensor([TOKENS - 1]),
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        spans=(SequenceSpan(first_row=0, num_tokens=1, context_len=TOKENS),),
        num_decodes=1,
        decode_mask=(torch.arange(16) < TOKENS)[None, None, None],
    )
    found = model.draft(last, hidden[-1:], cache)
    torch.testing.assert_close(found, whole[-1:], atol=1e-5, rtol=1e-5)


def test_routing_of_drafting_layers_is_recorded_nowhere(folder: Path):
    model, tokens = _load(folder), _tokens()
    spec = model.config.routing_spec
    assert spec.layer_ids == (0, 1)
    cache = DeviceCache(spec, num_rows=TOKENS, device=CPU)
    buffers = RoutingBuffers(device_cache=cache)
    hidden = model(_step(tokens[:TOKENS]), _cache(2), buffers)
    recorded = [cache.layer(index).clone() for index in range(2)]
    assert all((ids >= 0).all() for ids in recorded)
    model.draft(_step(tokens[1 : 1 + TOKENS]), hidden, _cache(1)[0])
    for index, ids in enumerate(recorded):
        assert torch.equal(cache.layer(index), ids)
    plain = _load(folder, with_mtp=False)
    alone = DeviceCache(spec, num_rows=TOKENS, device=CPU)
    again = plain(_step(tokens[:TOKENS]), _cache(2), RoutingBuffers(device_cache=alone))
    assert torch.equal(again, hidden)
    assert all(torch.equal(alone.layer(index), recorded[index]) for index in range(2))


def test_layers_that_were_not_asked_for_are_left_out(folder: Path, tmp_path: Path):
    plain = _load(folder, with_mtp=False)
    assert not any("layers.2." in name for name in plain.checkpoint_places())
    with pytest.raises(ConfigError, match=r"depth=0, but the model was loaded with 0 layers"):
        plain.draft(_step(_tokens()), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ConfigError, match=r"depth=2, .* loaded with 2 layers"):
        _load(folder).compute_draft_logits(torch.zeros(1, 32), depth=2)
    other = save_tiny_model(tmp_path / "m", SHAPE)
    with pytest.raises(ConfigError, match="has no num_nextn_predict_layers"):
        _load(other)


def test_checkpoint_must_hold_the_whole_layer_and_equal_copies(folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.hnorm.weight"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 tensors \(model.layers.3.hnorm"):
        _load(other)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.shared_head.head.weight"][1, 2] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"layers.3.shared_head.head.weight differs from lm_head"
    ):
        _load(other)  # fmt: skip
    _load(other, with_mtp=False)
    tensors["model.layers.4.hnorm.weight"] = torch.zeros(32)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"1 unknown ones \(model.layers.4.hnorm"):
        _load(other, with_mtp=False)


def test_update_reaches_the_drafting_layers(folder: Path):
    model = _load(folder)
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    copy_weights(model, tensors.items())
    for name, found in model.checkpoint_places().items():
        assert all(torch.equal(place, tensors[name]) for place in found), name
    assert model.mtp_layers[1].eh_proj.weight.equal(tensors["model.layers.3.eh_proj.weight"])
    with pytest.raises(UnsupportedModelError, match="not one of the model's"):
        copy_weights(_load(folder, with_mtp=False), tensors.items())
