"""SkyRL takes our arrays: over its wire, through its trace of turns, its checks and its packed batch."""

import json

import numpy as np
import orjson
import pytest
import torch
from skyrl.backends.skyrl_train.distributed.megatron.token_metadata import (
    align_packed_token_metadata,
    canonical_token_metadata_layout,
)
from skyrl.backends.skyrl_train.inference_servers.generate_wire import (
    decode_packed_routed_experts,
    load_packed_body,
    pack_routed_experts,
)
from skyrl.backends.skyrl_train.utils.packed_tensor import PackedTensor
from skyrl.backends.skyrl_train.utils.replay_utils import replay_padding_row
from skyrl.backends.skyrl_train.utils.routed_experts import (
    RoutedExpertTrace,
    compact_routed_expert_indices,
)
from skyrl.train.dataset.preprocess import (
    convert_prompts_responses_to_batch_tensors,
    make_router_padding_mask,
)
from skyrl.train.utils.trainer_utils import _validate_per_token_side_channels

from external.trace_cases import MODELS, random_trace, token_ids, with_other_id
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import to_skyrl, to_skyrl_generate

WIRE = "skyrl.backends.skyrl_train.inference_servers.generate_wire"
LENGTHS = ((3, 8), (6, 15), (1, 4))  # prompt tokens, all tokens


def _traces(model: str) -> list[RoutingTrace]:
    return [
        random_trace(model, seed=seed, num_tokens=num_tokens)
        for seed, (_, num_tokens) in enumerate(LENGTHS)
    ]


def _generator_output(routes: list[np.ndarray]) -> dict[str, object]:
    tokens = [token_ids(seed, num_tokens) for seed, (_, num_tokens) in enumerate(LENGTHS)]
    prompts = [ids[:count] for ids, (count, _) in zip(tokens, LENGTHS, strict=True)]
    responses = [ids[count:] for ids, (count, _) in zip(tokens, LENGTHS, strict=True)]
    return {
        "prompt_token_ids": prompts,
        "response_ids": responses,
        "loss_masks": [[1] * len(ids) for ids in responses],
        "rewards": [[0.0] * len(ids) for ids in responses],
        "rollout_expert_indices": routes,
    }


def _packed(routes: list[np.ndarray]) -> tuple[PackedTensor, torch.Tensor]:
    output = _generator_output(routes)
    tensors = convert_prompts_responses_to_batch_tensors(
        0,
        output["prompt_token_ids"],
        output["response_ids"],
        output["rewards"],
        output["loss_masks"],
        rollout_expert_indices=routes,
    )
    return tensors[6], tensors[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls("skyrl.backends.skyrl_train.utils.routed_experts.compact_routed_expert_indices")
def test_array_is_the_canonical_one(model: str):
    for trace in _traces(model):
        array = to_skyrl(trace, num_tokens=trace.num_rows + 1)
        theirs = compact_routed_expert_indices(array.astype(np.int64))
        assert (array.dtype, array.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(array, theirs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    f"{WIRE}.decode_packed_routed_experts",
    f"{WIRE}.load_packed_body",
    f"{WIRE}.pack_routed_experts",
)
def test_wire_of_skyrl_is_ours(model: str):
    trace = random_trace(model, seed=1, num_tokens=15)
    envelope = to_skyrl_generate(trace, num_tokens=15)
    assert envelope == pack_routed_experts(to_skyrl(trace, num_tokens=15))
    body = load_packed_body(orjson.dumps({"choices": [{"routed_experts": envelope}]}))
    decoded = decode_packed_routed_experts(body["choices"][0]["routed_experts"])
    assert np.array_equal(decoded[:, list(MODELS[model][2])], trace.ids)
    twin = to_skyrl_generate(with_other_id(trace, row=4, slot=1), num_tokens=15)
    assert twin != envelope


@pytest.mark.calls(f"{WIRE}.decode_packed_routed_experts")
def test_wire_refuses_the_dtype_of_the_model_where_the_rows_fit_a_smaller_one():
    """Why the dtype follows the largest id present, and not the number of experts."""
    trace = RoutingTrace.from_rows(
        np.array([[[3, 200]]]), token_ids=[5], layer_ids=[0], num_layers=1, num_experts=512
    )
    envelope = to_skyrl_generate(trace, num_tokens=2)
    assert decode_packed_routed_experts(json.loads(json.dumps(envelope))).tolist() == [[[3, 200]]]
    wide = pack_routed_experts(np.array([[[3, 300]]]))
    with pytest.raises(ValueError, match="non-canonical dtype int16; expected uint8"):
        decode_packed_routed_experts({**wide, "data": "AwDIAA=="})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "skyrl.backends.skyrl_train.utils.routed_experts.RoutedExpertTrace.record_generation",
    "skyrl.backends.skyrl_train.utils.routed_experts.RoutedExpertTrace.finalize",
)
def test_turns_are_joined_as_merge_joins_them(model: str):
    """Each turn asks for rows from where the last one ended, and gets the answered token's row."""
    tokens = token_ids(1, 20)
    whole = random_trace(model, seed=1, num_tokens=20)
    first, second = whole.slice(0, 8), whole.slice(8, 19)
    theirs = RoutedExpertTrace()
    theirs.record_generation(
        prompt_token_count=4,
        generated_token_count=5,
        routed_experts=decode_packed_routed_experts(to_skyrl_generate(first, num_tokens=9)),
    )
    assert theirs.prompt_start == 8
    theirs.record_generation(
        prompt_token_count=13,
        generated_token_count=7,
        routed_experts=decode_packed_routed_experts(
            to_skyrl_generate(second, num_tokens=20, prompt_start=8)
        ),
    )
    mask = [0] * 4 + [1] * 5 + [0] * 4 + [1] * 7
    final = theirs.finalize(token_count=20, loss_mask=mask)
    merged = first.merge(second, token_ids=tokens)
    assert np.array_equal(final, to_skyrl(merged, num_tokens=20, loss_mask=mask))
    assert np.array_equal(final[:, list(MODELS[model][2])], whole.ids)
    with pytest.raises(ValueError, match="prompt start exceeds prompt length"):
        theirs.record_generation(
            prompt_token_count=13, generated_token_count=1, routed_experts=final
        )


@pytest.mark.calls(
    "skyrl.backends.skyrl_train.utils.routed_experts.RoutedExpertTrace.finalize",
    "skyrl.train.utils.trainer_utils._validate_per_token_side_channels",
)
def test_prefix_ends_where_skyrl_accepts_that_it_ends():
    trace = random_trace("8x2_all_moe", seed=1, num_tokens=15, rows=9)
    mask = [0] * 6 + [1] * 4 + [0] * 5
    prefix = to_skyrl(trace, num_tokens=15, loss_mask=mask)
    theirs = RoutedExpertTrace()
    theirs.record_generation(prompt_token_count=6, generated_token_count=4, routed_experts=prefix)
    assert np.array_equal(theirs.finalize(token_count=15, loss_mask=mask), prefix)
    traces = _traces("8x2_all_moe")
    routes = [to_skyrl(item, num_tokens=item.num_rows + 1) for item in traces]
    output = _generator_output([routes[0], prefix, routes[2]])
    output["loss_masks"][1] = mask[6:]
    _validate_per_token_side_channels(output, False)
    output["loss_masks"][1] = [1] * 9
    with pytest.raises(AssertionError, match="stops short of loss-active token 14"):
        _validate_per_token_side_channels(output, False)
    with pytest.raises(ValueError, match="missing routed-expert row"):
        theirs.finalize(token_count=15, loss_mask=[1] * 15)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "skyrl.train.dataset.preprocess.convert_prompts_responses_to_batch_tensors",
    "skyrl.train.dataset.preprocess.make_router_padding_mask",
    "skyrl.train.utils.trainer_utils._validate_per_token_side_channels",
    "skyrl.backends.skyrl_train.distributed.megatron.token_metadata.align_packed_token_metadata",
)
def test_packed_batch_has_our_rows(model: str):
    layer_ids, top_k = list(MODELS[model][2]), MODELS[model][1]
    traces = _traces(model)
    routes = [to_skyrl(trace, num_tokens=trace.num_rows + 1) for trace in traces]
    _validate_per_token_side_channels(_generator_output(routes), False)
    packed, attention_mask = _packed(routes)
    assert packed.sequence_lengths.tolist() == [num_tokens for _, num_tokens in LENGTHS]
    mask = make_router_padding_mask(attention_mask, [len(item) for item in routes])
    for sequence, trace in enumerate(traces):
        segment = packed.segment(sequence)[:, layer_ids]
        assert np.array_equal(segment[:-1].numpy(), trace.ids)
        assert segment[-1].tolist() == [list(range(top_k))] * len(layer_ids)
        assert int((~mask[sequence]).sum()) == trace.num_rows
    layout = canonical_token_metadata_layout(attention_mask)
    filler = replay_padding_row(top_k, dtype=packed.dtype)
    aligned = align_packed_token_metadata(packed, layout, filler)
    for sequence, trace in enumerate(traces):
        assert np.array_equal(aligned[sequence, : trace.num_rows, layer_ids].numpy(), trace.ids)
    twin = [routes[0], to_skyrl(with_other_id(traces[1], row=9, slot=1), num_tokens=15), routes[2]]
    changed = torch.nonzero((_packed(twin)[0].values != packed.values).any(dim=-1)).tolist()
    assert changed == [[8 + 9, layer_ids[1]]]
