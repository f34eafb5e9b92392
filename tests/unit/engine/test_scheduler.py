"""Steps fit their limits, the youngest gives way, and a fork takes the prompt over."""

from routing_replay.engine.config import EngineConfig, ResolvedConfig
from routing_replay.engine.draws import Draws
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.scheduler import Schedule, Scheduler


def _scheduler(num_blocks: int, **settings: int) -> Scheduler:
    config = ResolvedConfig(
        engine=EngineConfig(block_size=4, **settings), max_model_len=64, num_kv_blocks=num_blocks
    )
    return Scheduler(config, KVBlocks(num_blocks, 4, enable_prefix_caching=False))


def _request(name: str, length: int, parent: Request | None = None) -> Request:
    return Request(
        request_id=name,
        prompt=None,
        token_ids=list(range(1, length + 1)),
        num_prompt_tokens=length,
        params=SamplingParams(max_tokens=20),
        draws=Draws(0),
        eos_token_ids=(),
        parent=parent,
    )


def _run(schedule: Schedule) -> list[tuple[str, int, int]]:
    """Pretend to compute a step; every part that samples gets a token."""
    for part in schedule.parts:
        for _ in range(part.num_samples):
            part.request.token_ids.append(7)
            part.request.num_pending -= 1
    return [(part.request.request_id, part.start, part.num_tokens) for part in schedule.parts]


def test_long_prompts_are_chunked_beside_decodes():
    scheduler = _scheduler(32, max_num_batched_tokens=6, max_num_seqs=4)
    for name, length in (("a", 2), ("b", 9), ("c", 3)):
        scheduler.add(_request(name, length))
    assert _run(scheduler.schedule()) == [("a", 0, 2), ("b", 0, 4)]
    assert _run(scheduler.schedule()) == [("a", 2, 1), ("b", 4, 5)]
    assert _run(scheduler.schedule()) == [("a", 3, 1), ("b", 9, 1), ("c", 0, 3)]


def test_youngest_request_gives_way_and_is_computed_again_first():
    scheduler = _scheduler(4, max_num_batched_tokens=64, max_num_seqs=4)
    first, second = _request("a", 7), _request("b", 7)
    scheduler.add(first)
    scheduler.add(second)
    assert _run(scheduler.schedule()) == [("a", 0, 7), ("b", 0, 7)]
    assert _run(scheduler.schedule()) == [("a", 7, 1), ("b", 7, 1)]
    scheduler.add(_request("c", 1))
    # Both need a third block, and there is none: b gives its two back, and nobody starts in this step.
    assert _run(scheduler.schedule()) == [("a", 8, 1)]
    assert (second.blocks, second.num_computed, second.num_preemptions) == ([], 0, 1)
    assert (scheduler.num_running, scheduler.num_preemptions) == (1, 1)
    assert _run(scheduler.schedule()) == [("a", 9, 1)]  # one free block is not enough for b
    first.finish_reason = "stop"
    assert scheduler.retire() == [first]
    assert _run(scheduler.schedule()) == [
        ("c", 0, 1),
        ("b", 0, 9),
    ]  # one token goes first in a step


def test_a_lone_request_never_gives_way_to_itself():
    scheduler = _scheduler(7, max_num_batched_tokens=64, max_num_seqs=4)
    request = _request("a", 7)
    scheduler.add(request)
    for _ in range(20):
        _run(scheduler.schedule())
    assert (len(request.token_ids), request.num_preemptions) == (27, 0)


def test_fork_waits_for_the_prompt_and_shares_its_full_blocks():
    scheduler = _scheduler(16, max_num_batched_tokens=6, max_num_seqs=4)
    parent = _request("p", 10)
    child = _request("c", 10, parent)
    for request in (parent, child, _request("x", 1)):
        scheduler.add(request)
    assert _run(scheduler.schedule()) == [("p", 0, 6)]
    # The child waits; the request behind it does not wait for the child.
    assert _run(scheduler.schedule()) == [("x", 0, 1), ("p", 6, 4)]
    schedule = scheduler.schedule()
    assert _run(schedule) == [("p", 10, 1), ("x", 1, 1), ("c", 9, 1)]
    assert child.blocks[:2] == parent.blocks[:2]
    assert child.blocks[2] != parent.blocks[2]
    assert [(c.source, c.target) for c in schedule.copies] == [(parent.blocks[2], child.blocks[2])]
    assert child.num_cached == 9


def test_fork_of_a_prompt_that_fills_its_blocks_copies_none():
    scheduler = _scheduler(16, max_num_batched_tokens=64, max_num_seqs=4)
    parent = _request("p", 9)
    child = _request("c", 9, parent)
    scheduler.add(parent)
    scheduler.add(child)
    _run(scheduler.schedule())
    schedule = scheduler.schedule()
    assert (schedule.copies, schedule.parts[-1].start) == ([], 8)
    assert child.blocks[:2] == parent.blocks[:2]


def test_child_of_an_ended_parent_computes_the_prompt_itself():
    scheduler = _scheduler(16, max_num_batched_tokens=64, max_num_seqs=4)
    parent = _request("p", 5)
    child = _request("c", 5, parent)
    scheduler.add(parent)
    scheduler.add(child)
    assert scheduler.abort("p") is parent
    assert scheduler.abort("p") is None
    assert _run(scheduler.schedule()) == [("c", 0, 5)]


def test_shared_blocks_return_when_the_last_owner_ends():
    blocks = KVBlocks(8, 4, enable_prefix_caching=False)
    parent = _request("p", 10)
    child = _request("c", 10, parent)
    assert blocks.admit(parent)
    parent.num_computed = 10
    assert blocks.fork(parent, child)[0]
    assert blocks.num_free == 4
    blocks.free(parent)
    assert blocks.num_free == 5
    blocks.free(child)
    assert blocks.num_free == 8
