"""The decoder's parts: one GEMM for three projections, tables instead of angles, the paged op where a step asks for it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from _support.tiny_models import TinyShape, save_tiny_model
from routing_replay.errors import ConfigError
from routing_replay.models import RoutingBuffers, SequenceSpan, StepInputs, load_model
from routing_replay.models.layers import MoEBlock, rotary_tables
from routing_replay.models.lm_head import lm_head_dtype, project
from routing_replay.models.places import checkpoint_places

SHAPE = TinyShape(num_experts=8, top_k=2, num_layers=3, dense_layers=(0,))
CPU = torch.device("cpu")
SIZE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), SHAPE)


def _step(parts: list[tuple[int, int]], *, seed: int = 0) -> StepInputs:
    """Sequences of (tokens in the step, tokens after it), their blocks shuffled."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // SIZE) for _, length in parts]
    order = torch.randperm(sum(blocks), generator=generator)
    tables = torch.zeros(len(parts), max(blocks), dtype=torch.int64)
    spans, positions, slots, first = [], [], [], 0
    for row, (count, length) in enumerate(parts):
        tables[row, : blocks[row]] = order[sum(blocks[:row]) : sum(blocks[: row + 1])]
        at = torch.arange(length - count, length)
        positions.append(at)
        slots.append(tables[row, at // SIZE] * SIZE + at % SIZE)
        spans.append(SequenceSpan(first_row=first, num_tokens=count, context_len=length))
        first += count
    decodes = [length for count, length in parts if count == 1]
    mask = torch.arange(max(blocks) * SIZE) < torch.tensor(decodes)[:, None]
    return StepInputs(
        token_ids=torch.randint(4, 90, (first,), generator=generator),
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        spans=tuple(spans),
        num_decodes=len(decodes),
        decode_mask=mask[:, None, None],
    )


def _with_device_tables(step: StepInputs) -> StepInputs:
    counts = torch.tensor([0, *(span.num_tokens for span in step.spans)])
    return replace(
        step,
        block_tables=step.block_tables.int(),
        query_starts=counts.cumsum(0).int(),
        context_lens=torch.tensor([span.context_len for span in step.spans], dtype=torch.int32),
        max_query_len=int(counts.max()),
    )


def _cache(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 2, 16, SIZE, 2, 16, generator=generator)


@pytest.mark.parametrize("parts", [[(1, 9), (1, 3), (5, 21)], [(1, 17)], [(16, 16), (2, 10)]])
def test_paged_op_and_spans_agree(folder: Path, parts: list[tuple[int, int]]):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    step = _step(parts)
    caches = _cache(model), _cache(model)
    by_spans = model(step, caches[0], RoutingBuffers())
    by_op = model(_with_device_tables(step), caches[1], RoutingBuffers())
    torch.testing.assert_close(by_op, by_spans, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(caches[1], caches[0], atol=2e-5, rtol=1e-5)
    shorter = _with_device_tables(step)
    assert shorter.context_lens is not None
    shorter.context_lens[-1] -= 1
    other = model(shorter, _cache(model), RoutingBuffers())
    assert (other - by_spans).abs().max() > 1e-3


def test_padding_rows_leave_the_cache_and_the_live_rows_alone(folder: Path):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    step = _with_device_tables(_step([(1, 9), (1, 3)]))
    assert step.query_starts is not None
    assert step.context_lens is not None
    padded = replace(
        step,
        token_ids=torch.cat([step.token_ids, torch.zeros(2, dtype=torch.int64)]),
        positions=torch.cat([step.positions, torch.zeros(2, dtype=torch.int64)]),
        slot_mapping=torch.cat([step.slot_mapping, torch.tensor([-1, -1])]),
        block_tables=torch.cat([step.block_tables, torch.zeros_like(step.block_tables)]),
        query_starts=torch.arange(5, dtype=torch.int32),
        context_lens=torch.cat([step.context_lens, torch.zeros(2, dtype=torch.int32)]),
    )
    caches = _cache(model), _cache(model)
    alone = model(step, caches[0], RoutingBuffers())
    beside = model(padded, caches[1], RoutingBuffers())
    torch.testing.assert_close(beside[:2], alone, atol=1e-5, rtol=1e-5)
    assert beside.isfinite().all()
    torch.testing.assert_close(caches[1], caches[0], atol=1e-5, rtol=1e-5)
    touched = (caches[1] != _cache(model)).any(-1).any(-1)
    assert touched.sum() == 3 * 2 * 2


def test_tables_hold_the_angles_of_every_position():
    cos, sin = rotary_tables(16, 1e4, num_positions=300, dtype=torch.float64, device=CPU)
    frequency = 1e4 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    for position in (0, 1, 255, 299):
        angle = (position * frequency).repeat(2)
        torch.testing.assert_close(cos[position], angle.cos(), atol=2e-5, rtol=0)
        torch.testing.assert_close(sin[position], angle.sin(), atol=2e-5, rtol=0)
    rounded = rotary_tables(16, 1e4, num_positions=300, dtype=torch.bfloat16, device=CPU)
    exact = rotary_tables(16, 1e4, num_positions=300, dtype=torch.float32, device=CPU)
    assert torch.equal(rounded[0], exact[0].bfloat16())
    assert torch.equal(rounded[1], exact[1].bfloat16())


def test_projections_are_rows_of_one_weight(folder: Path):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    places = model.checkpoint_places()
    attention = model.layers[1].self_attn
    parts = [places[f"model.layers.1.self_attn.{kind}_proj.weight"][0] for kind in "qkv"]
    assert [len(part) for part in parts] == [64, 32, 32]
    assert torch.equal(torch.cat(parts), attention.qkv_proj.weight)
    assert all(place.is_contiguous() for found in places.values() for place in found)
    assert "model.layers.1.self_attn.qkv_proj.weight" not in places


def test_biases_of_projections_have_places(folder: Path):
    config = load_model(folder, dtype=torch.float32, device=CPU).config
    bias = torch.arange(128.0)
    name = "layers.2.self_attn.qkv_proj.bias"
    places = checkpoint_places(config, [("embed_tokens.weight", bias), (name, bias)])
    stem = "model.layers.2.self_attn"
    assert places[f"{stem}.q_proj.bias"][0].tolist() == list(range(64))
    assert places[f"{stem}.k_proj.bias"][0].tolist() == list(range(64, 96))
    assert places[f"{stem}.v_proj.bias"][0].tolist() == list(range(96, 128))


def test_output_projection_is_float32_where_torch_cannot_widen_the_sums():
    assert lm_head_dtype(torch.bfloat16, CPU) == torch.float32
    assert lm_head_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    rows = torch.randn(19, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = rows.double() @ weight.double().t()
    for batch_invariant in (False, True):
        found = project(rows, weight, batch_invariant=batch_invariant)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="columns of the weight"):
        project(rows[:, :7], weight)


def test_tied_embedding_is_one_tensor_where_dtypes_allow(tmp_path: Path):
    from routing_replay.assets import tiny_moe_path

    tied = load_model(tiny_moe_path(), dtype=torch.float32, device=CPU)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert len(tied.checkpoint_places()["model.embed_tokens.weight"]) == 1
    apart = load_model(tiny_moe_path(), dtype=torch.bfloat16, device=CPU)
    assert apart.lm_head.weight.dtype == torch.float32
    assert len(apart.checkpoint_places()["model.embed_tokens.weight"]) == 2
    assert torch.equal(apart.lm_head.weight, apart.embed_tokens.weight.float())


def test_workspace_stays_off_the_cpu(folder: Path):
    model = load_model(folder, dtype=torch.float32, device=CPU)
    assert model.workspace is None
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    assert len(blocks) == 2
    assert all(block.workspace is None for block in blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_gpu_decoder_agrees_with_the_cpu(folder: Path, batch_invariant: bool):
    step = _step([(1, 9), (1, 3), (5, 21)])
    device = torch.device("cuda")
    model = load_model(folder, dtype=torch.bfloat16, device=device, batch_invariant=batch_invariant)
    assert model.workspace is not None
    assert model.lm_head.weight.dtype == torch.bfloat16
    reference = load_model(folder, dtype=torch.float32, device=CPU)
    tables = _with_device_tables(step)
    tensors = {
        name: getattr(tables, name).to(device)
        for name in ("token_ids", "positions", "slot_mapping", "block_tables", "query_starts", "context_lens", "decode_mask")
    }  # fmt: skip
    with torch.inference_mode():
        hidden = model(
            replace(tables, **tensors), _cache(model).to(device).bfloat16(), RoutingBuffers()
        )
        expected = reference(step, _cache(model), RoutingBuffers())
        logits = model.compute_logits(hidden)
    assert logits.dtype == torch.float32
    assert (hidden.cpu().float() - expected).abs().median() < 0.05
    exact = hidden.double() @ model.lm_head.weight.double().t()
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-4)
