"""Batches: which token of which sequence every row belongs to."""

import numpy as np
import pytest

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace.export import (
    to_megatron,
    to_megatron_batch,
    to_verl,
    to_verl_batch,
)
from unit.trace.trace_cases import invalid_rows, random_trace


def test_verl_batch_pads_prompts_left_and_responses_right():
    traces = (random_trace(1), random_trace(2, rows=4), random_trace(3, rows=6))
    prompts, tokens = (3, 1, 4), (8, 5, 7)
    batch = to_verl_batch(
        traces, num_prompt_tokens=prompts, num_tokens=tokens, prompt_length=4, response_length=5
    )
    assert (batch.dtype, batch.shape) == (np.int16, (3, 9, 6, 4))
    for row, (trace, num_prompt, num_tokens) in enumerate(
        zip(traces, prompts, tokens, strict=True)
    ):
        alone = to_verl(trace, num_tokens=num_tokens)
        for position in range(9):
            token_idx = position - (4 - num_prompt)
            inside = 0 <= token_idx < num_tokens - 1
            assert np.array_equal(
                batch[row, position], alone[token_idx] if inside else np.zeros((6, 4))
            )


def test_verl_batch_refuses_what_verl_would_cut():
    lengths = {"num_prompt_tokens": [3], "num_tokens": [8]}
    with pytest.raises(ConfigError, match="sequence 0 has 3 prompt tokens of 8"):
        to_verl_batch([random_trace(1)], **lengths, prompt_length=3, response_length=4)
    with pytest.raises(ConfigError, match="prompt_length=2"):
        to_verl_batch([random_trace(1)], **lengths, prompt_length=2, response_length=9)
    with pytest.raises(TraceMismatchError, match=r"traces\[1\] has top_k = 2"):
        to_verl_batch(
            [random_trace(1), random_trace(1, top_k=2)],
            num_prompt_tokens=[3, 3],
            num_tokens=[8, 8],
            prompt_length=3,
            response_length=5,
        )


def test_megatron_targets_are_keyed_by_layer_number():
    trace = random_trace(1, layer_ids=(1, 2, 5), num_layers=7)
    targets = to_megatron(trace, num_tokens=8)
    assert list(targets) == [2, 3, 6]
    for slot, layer_number in enumerate((2, 3, 6)):
        target = targets[layer_number]
        assert (target.dtype, target.shape) == (np.int64, (8, 4))
        assert target.flags.c_contiguous
        assert np.array_equal(target[:7], trace.ids[:, slot])
        assert target[7].tolist() == [0, 1, 2, 3]
    assert np.array_equal(to_megatron(trace, num_tokens=7)[6], trace.ids[:, 2])
    with pytest.raises(TraceMismatchError, match="token index 2 is missing"):
        to_megatron(invalid_rows(trace, [2]), num_tokens=8)


def test_megatron_batch_is_laid_out_tokens_first():
    traces, tokens = (random_trace(1), random_trace(2, rows=3)), (8, 4)
    batch = to_megatron_batch(traces, num_tokens=tokens, seq_len=10)
    assert sorted(batch.targets) == [2, 4, 6]
    hidden = np.empty((2, 10, 3), dtype=object)
    for sequence in range(2):
        for token_idx in range(10):
            for slot in range(3):
                hidden[sequence, token_idx, slot] = (sequence, token_idx, slot)
    flat = hidden.transpose(1, 0, 2).reshape(20, 3)  # what Megatron does with [B, S, H] data
    for slot, layer_number in enumerate((2, 4, 6)):
        for row, target in enumerate(batch.targets[layer_number]):
            sequence, token_idx, own_slot = flat[row, slot]
            assert own_slot == slot
            captured = token_idx < tokens[sequence] - 1
            assert batch.padding_mask[sequence, token_idx] == (not captured)
            wanted = traces[sequence].ids[token_idx, slot] if captured else np.arange(4)
            assert np.array_equal(target, wanted)


def test_megatron_batch_has_distinct_ids_everywhere():
    batch = to_megatron_batch([random_trace(1, rows=2)], num_tokens=[3], seq_len=64)
    for target in batch.targets.values():
        assert all(len(set(row)) == 4 for row in target.tolist())
    assert batch.padding_mask.sum() == 62


def test_megatron_batch_takes_a_captured_last_row():
    batch = to_megatron_batch([random_trace(1)], num_tokens=[7], seq_len=8)
    assert batch.padding_mask.tolist() == [[False] * 7 + [True]]
    with pytest.raises(ConfigError, match="seq_len=6 but a sequence has 7 tokens"):
        to_megatron_batch([random_trace(1)], num_tokens=[7], seq_len=6)
