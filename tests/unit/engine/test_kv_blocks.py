"""Blocks are shared by equal prefixes, and by nothing else."""

import numpy as np

from routing_replay.engine.draws import Draws
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams


def _request(
    name: str, tokens: list[int], *, max_tokens: int = 1, forced: int | None = None
) -> Request:
    ids = None if forced is None else np.full((len(tokens) + 8, 1, 1), forced, np.int16)
    return Request(
        request_id=name,
        prompt=None,
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        draws=Draws(0),
        eos_token_ids=(),
        forced_ids=ids,
    )


def _compute(blocks: KVBlocks, request: Request) -> None:
    assert blocks.admit(request)
    before, request.num_computed = request.num_computed, request.num_prompt_tokens
    blocks.publish(request, before, request.num_computed)


def _hits(blocks: KVBlocks, request: Request) -> int:
    assert blocks.admit(request)
    return request.num_computed


def test_equal_prefix_is_reused_but_never_the_last_prompt_token():
    blocks = KVBlocks(16, 4, enable_prefix_caching=True)
    first = _request("a", list(range(8)))
    _compute(blocks, first)
    assert _hits(blocks, _request("b", list(range(8)))) == 4
    longer = _request("c", list(range(9)))
    assert _hits(blocks, longer) == 8
    assert longer.blocks[:2] == first.blocks[:2]


def test_other_parent_other_routing_or_no_cache_does_not_hit():
    blocks = KVBlocks(32, 4, enable_prefix_caching=True)
    _compute(blocks, _request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert _hits(blocks, _request("b", [0, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    assert _hits(blocks, _request("c", [1, 2, 3, 4, 5, 6, 7, 8, 9], forced=3)) == 0
    _compute(blocks, _request("d", [1, 2, 3, 4, 5, 6, 7, 8, 9], forced=4))
    assert _hits(blocks, _request("e", [1, 2, 3, 4, 5, 6, 7, 8, 9], forced=4)) == 8
    off = KVBlocks(32, 4, enable_prefix_caching=False)
    _compute(off, _request("a", list(range(9))))
    assert _hits(off, _request("b", list(range(9)))) == 0


def test_reused_block_advances_its_epoch_and_loses_its_prefix():
    blocks = KVBlocks(3, 4, enable_prefix_caching=True)
    first = _request("a", list(range(9)))
    _compute(blocks, first)
    old = list(first.blocks)
    blocks.free(first)
    again = _request("b", list(range(9)))
    assert _hits(blocks, again) == 8
    blocks.free(again)
    other = _request("c", list(range(20, 29)))
    _compute(blocks, other)
    assert {b.block_id for b in other.blocks} == {b.block_id for b in old}
    assert not set(other.blocks) & set(old)
    blocks.free(other)
    assert _hits(blocks, _request("d", list(range(9)))) == 0


def test_allocate_changes_nothing_when_there_is_no_room():
    blocks = KVBlocks(3, 4, enable_prefix_caching=True)
    first = _request("a", list(range(9)))
    _compute(blocks, first)
    blocks.free(first)
    assert not blocks.admit(_request("b", list(range(13))))
    assert blocks.num_free == 3
    assert _hits(blocks, _request("c", list(range(9)))) == 8


def test_reset_prefix_cache_forgets_prefixes():
    blocks = KVBlocks(8, 4, enable_prefix_caching=True)
    _compute(blocks, _request("a", list(range(9))))
    blocks.reset_prefix_cache()
    assert _hits(blocks, _request("b", list(range(9)))) == 0
