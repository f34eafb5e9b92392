"""A decoder that sleeps holds no weights, refuses to run, and wakes with the same bits."""

from pathlib import Path

import pytest
import torch

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.assets import tiny_moe_path
from routing_replay.errors import ConfigError
from routing_replay.models import (
    Qwen3MoEModel,
    RoutingBuffers,
    SequenceSpan,
    StepInputs,
    copy_weights,
    load_folder_weights,
    load_model,
    offload_weights,
    restore_weights,
)

SHAPE = TinyShape(num_experts=4, top_k=2, num_layers=2, dense_layers=(0,))
CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's memory")],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _load(folder: Path, device: str = "cpu") -> Qwen3MoEModel:
    return load_model(folder, dtype=torch.bfloat16, device=torch.device(device))


def _logits(model: Qwen3MoEModel) -> torch.Tensor:
    device = model.embed_tokens.weight.device
    rows = torch.arange(5, device=device)
    step = StepInputs(
        token_ids=rows + 4,
        positions=rows,
        slot_mapping=rows,
        block_tables=torch.zeros(1, 1, dtype=torch.int64, device=device),
        spans=(SequenceSpan(first_row=0, num_tokens=5, context_len=5),),
        num_decodes=0,
        decode_mask=torch.zeros(0, 1, 1, 8, dtype=torch.bool, device=device),
    )
    config = model.config
    shape = (config.num_layers, 2, 1, 8, config.num_key_value_heads, config.head_dim)
    cache = torch.zeros(shape, dtype=model.dtype, device=device)
    return model.compute_logits(model(step, cache, RoutingBuffers()))


def _held(model: Qwen3MoEModel) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_weights_come_back_bit_by_bit(folder: Path, device: str):
    model = _load(folder, device)
    expected, size = _logits(model), _held(model)
    host = offload_weights(model)
    assert _held(model) == 0
    assert host.num_bytes == size
    assert all(tensor.is_pinned() == (device == "cuda") for tensor in host.tensors.values())
    with pytest.raises(ConfigError, match="offloaded; call restore_weights first"):
        _logits(model)
    restore_weights(model, host)
    assert _held(model) == size
    assert torch.equal(_logits(model), expected)
    assert {p.device.type for p in model.parameters()} == {device}


@pytest.mark.parametrize("device", DEVICES)
def test_dropped_weights_are_nan_until_they_are_loaded(folder: Path, device: str):
    model = _load(folder, device)
    expected = _logits(model)
    host = offload_weights(model, level=2)
    assert (_held(model), host.num_bytes) == (0, 0)
    with pytest.raises(ConfigError, match="call restore_weights first"):
        load_folder_weights(model, folder)
    with pytest.raises(ConfigError, match="call restore_weights first"):
        copy_weights(model, [])
    restore_weights(model, host)
    assert all(parameter.isnan().all() for parameter in model.parameters())
    assert not _logits(model).isfinite().any()
    load_folder_weights(model, folder)
    assert torch.equal(_logits(model), expected)


def test_tied_weights_stay_tied():
    model = load_model(tiny_moe_path(), dtype=torch.float32, device=CPU)
    expected = _logits(model)
    for level in (1, 2):
        restore_weights(model, offload_weights(model, level=level))
        assert model.lm_head.weight is model.embed_tokens.weight
        if level == 2:
            load_folder_weights(model, tiny_moe_path())
        assert torch.equal(_logits(model), expected)


def test_wrong_order_is_refused(folder: Path):
    model = _load(folder)
    with pytest.raises(ConfigError, match=r"level=3; accepted are 1 .* and 2"):
        offload_weights(model, level=3)
    host = offload_weights(model)
    with pytest.raises(ConfigError, match="offloaded already"):
        offload_weights(model)
    other = _load(tiny_moe_path())
    with pytest.raises(ConfigError, match="nothing to restore"):
        restore_weights(other, host)
    foreign = offload_weights(other)
    with pytest.raises(ConfigError, match="of other names"):
        restore_weights(model, foreign)
    restore_weights(model, host)
    restore_weights(other, foreign)
