"""verl's agent loop takes our arrays: every row arrives at its token, in the padded and in the jagged batch."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopMetrics,
    AgentLoopOutput,
    AgentLoopWorker,
)
from verl.trainer.ppo.metric_utils import _compute_rollout_moe_load_counts
from verl.utils.megatron.router_replay_utils import (
    align_r3_router_replay_data,
    build_r3_replay_mask,
)
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.utils.padding import left_right_2_no_padding

from external.trace_cases import MODELS, random_trace, token_ids, with_other_id
from routing_replay.trace import RoutingTrace
from routing_replay.trace.export import to_verl, to_verl_batch

PROMPT_LENGTH, RESPONSE_LENGTH = 6, 9
LENGTHS = ((3, 8), (6, 15), (1, 4))  # prompt tokens, all tokens


class _Tokenizer:
    """The two attributes and the one method that verl's padding uses."""

    pad_token_id = 0
    padding_side = "right"

    def pad(
        self,
        encoded: dict[str, list[int]],
        *,
        padding: str,
        max_length: int,
        return_tensors: str,
        return_attention_mask: bool,
    ) -> dict[str, torch.Tensor]:
        assert (padding, return_tensors) == ("max_length", "pt")
        tokens = encoded["input_ids"]
        gap = [0] * (max_length - len(tokens))
        left = self.padding_side == "left"
        found = {"input_ids": torch.tensor([gap + tokens if left else tokens + gap])}
        if return_attention_mask:
            ones = [1] * len(tokens)
            found["attention_mask"] = torch.tensor([gap + ones if left else ones + gap])
        return found


def _worker() -> AgentLoopWorker:
    worker = object.__new__(AgentLoopWorker)
    worker.tokenizer = _Tokenizer()
    worker.processor = None
    worker.rollout_config = SimpleNamespace(
        prompt_length=PROMPT_LENGTH, response_length=RESPONSE_LENGTH
    )
    worker.reward_loop_worker_handles = None
    worker.distillation_enabled = False
    worker.mm_processor_kwargs = {}
    return worker


def _output(trace: RoutingTrace, *, seed: int, num_prompt: int, num_tokens: int) -> AgentLoopOutput:
    tokens = token_ids(seed, num_tokens)
    return AgentLoopOutput(
        prompt_ids=tokens[:num_prompt],
        response_ids=tokens[num_prompt:],
        response_mask=[1] * (num_tokens - num_prompt),
        routed_experts=to_verl(trace, num_tokens=num_tokens),
        metrics=AgentLoopMetrics(),
        num_turns=2,
    )


def _traces(model: str) -> list[RoutingTrace]:
    return [
        random_trace(model, seed=seed, num_tokens=num_tokens)
        for seed, (_, num_tokens) in enumerate(LENGTHS)
    ]


def _batch(traces: list[RoutingTrace]) -> object:
    worker = _worker()
    padded = []
    for seed, (trace, (num_prompt, num_tokens)) in enumerate(zip(traces, LENGTHS, strict=True)):
        output = _output(trace, seed=seed, num_prompt=num_prompt, num_tokens=num_tokens)
        padded.append(asyncio.run(worker._agent_loop_postprocess(output, False, raw_prompt="")))
    return worker._postprocess(padded).batch


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls("verl.experimental.agent_loop.agent_loop.AgentLoopOutput.as_dict")
def test_sample_of_the_queue_has_our_rows(model: str):
    _, top_k, layer_ids, num_layers = MODELS[model]
    trace = random_trace(model, seed=1, num_tokens=8)
    taken = _output(trace, seed=1, num_prompt=3, num_tokens=8).as_dict()["routed_experts"]
    assert (taken.dtype, tuple(taken.shape)) == (torch.int16, (8, num_layers, top_k))
    assert np.array_equal(taken[:7, list(layer_ids)].numpy(), trace.ids)
    assert not taken[7].any()
    twin = with_other_id(trace, row=5, slot=1)
    other = _output(twin, seed=1, num_prompt=3, num_tokens=8).as_dict()["routed_experts"]
    assert torch.nonzero((taken != other).any(dim=-1)).tolist() == [[5, layer_ids[1]]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "verl.experimental.agent_loop.agent_loop.AgentLoopWorker._agent_loop_postprocess",
    "verl.experimental.agent_loop.agent_loop.AgentLoopWorker._postprocess",
)
def test_padded_batch_of_verl_is_ours(model: str):
    traces = _traces(model)
    theirs = _batch(traces)["routed_experts"]
    ours = to_verl_batch(
        traces,
        num_prompt_tokens=[num_prompt for num_prompt, _ in LENGTHS],
        num_tokens=[num_tokens for _, num_tokens in LENGTHS],
        prompt_length=PROMPT_LENGTH,
        response_length=RESPONSE_LENGTH,
    )
    assert theirs.dtype == torch.int16
    assert np.array_equal(theirs.numpy(), ours)
    twins = [traces[0], with_other_id(traces[1], row=9, slot=0), traces[2]]
    changed = torch.nonzero((_batch(twins)["routed_experts"] != theirs).any(dim=-1)).tolist()
    assert changed == [[1, 9 + PROMPT_LENGTH - 6, MODELS[model][2][0]]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls(
    "verl.workers.utils.padding.left_right_2_no_padding",
    "verl.utils.megatron.router_replay_utils.align_r3_router_replay_data",
    "verl.utils.megatron.router_replay_utils.build_r3_replay_mask",
)
def test_jagged_batch_has_our_rows_where_verl_replays(model: str):
    traces, layer_ids = _traces(model), list(MODELS[model][2])
    data = left_right_2_no_padding(_batch(traces))
    aligned = align_r3_router_replay_data(data["routed_experts"], data["input_ids"])
    mask = build_r3_replay_mask(data["input_ids"], data["response_mask"])
    assert len(aligned.unbind()) == len(LENGTHS)
    for seed, (rows, replayed, tokens) in enumerate(
        zip(aligned.unbind(), mask.unbind(), data["input_ids"].unbind(), strict=True)
    ):
        num_tokens = LENGTHS[seed][1]
        assert tokens.tolist() == token_ids(seed, num_tokens)
        assert replayed.tolist() == [True] * (num_tokens - 1) + [False]
        assert np.array_equal(rows[replayed][:, layer_ids].numpy(), traces[seed].ids)


@pytest.mark.calls("verl.utils.megatron.router_replay_utils.align_r3_router_replay_data")
def test_alignment_takes_our_rows_and_refuses_fewer():
    trace = random_trace("8x2_all_moe", seed=1, num_tokens=8)

    def align(rows: np.ndarray) -> torch.Tensor:
        nested = torch.nested.as_nested_tensor([torch.from_numpy(rows)], layout=torch.jagged)
        inputs = torch.nested.as_nested_tensor([torch.arange(8)], layout=torch.jagged)
        return align_r3_router_replay_data(nested, inputs).unbind()[0]

    rows = to_verl(trace, num_tokens=8)
    assert np.array_equal(align(rows)[:7].numpy(), rows)
    with pytest.raises(RuntimeError, match="6 route rows for 8 input tokens"):
        align(rows[:6])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls("verl.trainer.ppo.metric_utils._compute_rollout_moe_load_counts")
def test_load_of_the_experts_is_counted_from_our_rows(model: str):
    num_experts, _, layer_ids, _ = MODELS[model]
    traces = _traces(model)
    batch = _batch(traces)
    counts = _compute_rollout_moe_load_counts(
        batch["routed_experts"], batch["response_mask"], num_experts
    )
    wanted = np.zeros((len(layer_ids), num_experts), dtype=int)
    for trace, (num_prompt, num_tokens) in zip(traces, LENGTHS, strict=True):
        for slot in range(len(layer_ids)):
            ids = trace.ids[num_prompt : num_tokens - 1, slot].ravel()
            wanted[slot] += np.bincount(ids, minlength=num_experts)
    assert np.array_equal(counts[list(layer_ids)].numpy(), wanted)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.calls("verl.workers.rollout.llm_server.FullyAsyncLLMServerClient.generate")
def test_interrupted_rollout_is_joined_as_merge_joins_it(
    model: str, monkeypatch: pytest.MonkeyPatch
):
    """Six tokens before the weights changed, five after; the engine returns all rows each time."""
    tokens = token_ids(1, 15)
    before = random_trace(model, seed=1, num_tokens=10)
    after = random_trace(model, seed=2, num_tokens=15)
    after = RoutingTrace.from_rows(
        after.ids,
        token_ids=tokens,
        layer_ids=after.layer_ids,
        num_layers=after.num_layers,
        num_experts=after.num_experts,
        weights_version=1,
    )
    answers = [
        TokenOutput(token_ids=tokens[4:10], routed_experts=to_verl(before, num_tokens=10),
                    stop_reason="aborted", num_preempted=0),
        TokenOutput(token_ids=tokens[10:], routed_experts=to_verl(after, num_tokens=15),
                    stop_reason="completed", num_preempted=0),
    ]  # fmt: skip

    async def generate(self: object, **_: object) -> TokenOutput:
        return answers.pop(0)

    async def no_wait(_: float) -> None:
        return None

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    monkeypatch.setattr(asyncio, "sleep", no_wait)
    client = object.__new__(FullyAsyncLLMServerClient)
    client.config = SimpleNamespace()
    client._only_hybrid = False
    joined = asyncio.run(
        client.generate("r", prompt_ids=tokens[:4], sampling_params={"max_tokens": 11})
    )
    assert joined.token_ids == tokens[4:]
    merged = before.merge(after.slice(9, 14), token_ids=tokens)
    assert merged.weights_version == ((0, 0), (9, 1))
    assert np.array_equal(joined.routed_experts, to_verl(merged, num_tokens=15))
    assert not np.array_equal(joined.routed_experts, to_verl(after, num_tokens=15))
