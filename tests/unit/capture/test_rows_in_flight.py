"""Rows on their way: nothing is lost, mixed up or waited for without need, whatever the copies and the host do."""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from routing_replay.capture import BlockRef, UncachedPrefix
from routing_replay.errors import CaptureError, ConfigError
from unit.capture.in_flight import BLOCK, LIMIT_SECONDS, Rig, blocks_at, ids_of, rows_of, span


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.staging.open()
        rig.pipeline.close()


def _rig(rigs: list[Rig], **settings: object) -> Rig:
    rigs.append(Rig(**settings))  # pyright: ignore[reportArgumentType]
    return rigs[-1]


def _tokens(num_rows: int) -> list[int]:
    return list(range(num_rows + 1))


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_rows_of_interleaved_requests_come_back_exactly(rigs: list[Rig], num_slots: int):
    rig = _rig(rigs, num_slots=num_slots, num_blocks=64)
    rng = np.random.default_rng(0)
    lengths: dict[str, int] = {}
    blocks = {f"r{i}": blocks_at(*range(8 * i, 8 * i + 8)) for i in range(5)}
    for name in blocks:
        rig.pipeline.begin(name, (), 0)
        lengths[name] = 0
    num_flags = 0
    for version in range(40):
        spans = []
        for name in rng.permutation(list(blocks))[: rng.integers(1, 6)].tolist():
            count = int(min(rng.integers(1, 4), 32 - lengths[name]))
            if count:
                spans.append(span(name, lengths[name], count, blocks[name]))
                lengths[name] += count
        num_padding = int(rng.integers(0, 3))
        ticket = rig.step(*spans, version=version, num_padding=num_padding)
        num_flags += ticket.num_rows and ticket.num_rows + num_padding
    for name, length in lengths.items():
        trace = rig.pipeline.finish(name, _tokens(length)).trace
        assert np.array_equal(trace.ids, rows_of(name, length))
        assert trace.is_complete
    rig.pipeline.drain()
    stats = rig.pipeline.stats
    assert (stats.steps, stats.rows) == (40, sum(lengths.values()))
    assert stats.bytes_copied == stats.rows * 3 * 2 + num_flags
    assert stats.host_seconds > 0


def test_steps_that_gather_themselves_go_where_their_input_says(rigs: list[Rig]):
    rig = _rig(rigs, num_slots=3)
    blocks = blocks_at(*range(6))
    rig.pipeline.begin("a", (), 0)
    for index in range(12):  # graphs with a bucket of four rows and other steps, in turn
        rig.step(span("a", index, 1, blocks), num_padding=3, is_graph=index % 3 > 0)
    trace = rig.pipeline.finish("a", _tokens(12)).trace
    assert np.array_equal(trace.ids, rows_of("a", 12))
    assert trace.is_complete


@pytest.mark.parametrize("error", [1, 3, -3])
def test_rows_of_another_step_fail_their_requests(rigs: list[Rig], error: int):
    """Also where they lie in the slot of this one: the ring has three."""
    rig = _rig(rigs, num_slots=3)
    blocks = blocks_at(0, 1)
    rig.pipeline.begin("a", (), 0)
    good = [rig.step(span("a", index, 1, blocks), is_graph=True) for index in range(3)]
    assert not any(rig.pipeline.errors(ticket) for ticket in good)
    ticket = rig.step(span("a", 3, 1, blocks), is_graph=True, step_error=error)
    assert (
        f"the rows of step 3 were asked for, those of step {3 + error if error % 3 == 0 else 0} came"
        in str(rig.pipeline.errors(ticket)["a"])
    )
    assert "a" in rig.pipeline.errors(rig.step(span("a", 4, 1, blocks), is_graph=True))


def test_full_ring_delays_the_submitter_alone_and_is_counted(rigs: list[Rig]):
    rig = _rig(rigs, num_slots=2, is_open=False)
    blocks = blocks_at(0, 1)
    rig.pipeline.begin("a", (), 0)
    for start in range(2):
        rig.step(span("a", start, 1, blocks))
    assert rig.pipeline.stats.full_ring_waits == 0
    assert len(rig.staging.gates) == 2
    opener = threading.Timer(0.2, rig.staging.gates[0].set)
    opener.start()
    rig.step(span("a", 2, 1, blocks))  # returns once the first slot is free, not before
    opener.join()
    assert len(rig.staging.gates) == 3
    assert rig.pipeline.stats.full_ring_waits == 1
    assert 0.1 < rig.pipeline.stats.full_ring_seconds < LIMIT_SECONDS
    rig.staging.open()
    assert np.array_equal(rig.pipeline.finish("a", _tokens(3)).trace.ids, rows_of("a", 3))


def test_copies_that_arrive_out_of_order_are_taken_in_order(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    block = blocks_at(0)
    rig.pipeline.begin("a", (), 0)
    first = rig.step(span("a", 0, 2, block), seed=1)
    second = rig.step(span("a", 2, 2, block), seed=1, bad_row=1)
    rig.staging.gates[1].set()
    time.sleep(0.05)
    assert rig.host_cache.num_rows("a") == 0
    rig.staging.gates[0].set()
    assert dict(rig.pipeline.errors(first)) == {}
    assert list(rig.pipeline.errors(second)) == ["a"]
    assert np.array_equal(rig.host_cache.take("a", 2).ids, rows_of("a", 2, seed=1))


def test_finish_waits_for_its_own_rows_and_returns_none_past_them(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    block = blocks_at(0)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 3, block))
    rig.step(span("a", 3, 1, block))  # one token past the end, never to arrive in this test
    opener = threading.Timer(0.1, rig.staging.gates[0].set)
    opener.start()
    trace = rig.pipeline.finish("a", _tokens(3)).trace
    opener.join()
    assert np.array_equal(trace.ids, rows_of("a", 3))
    assert not rig.staging.gates[1].is_set()
    rig.staging.open()
    rig.pipeline.drain()
    assert rig.pipeline.num_rows("a") == 4
    assert rig.pipeline.finish("a", _tokens(3)).trace.num_rows == 3


def test_rows_of_rejected_drafts_give_way_to_those_of_the_tokens_that_follow(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    blocks = blocks_at(0, 1)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 5, blocks), seed=1)  # three drafts, of which none is accepted
    rig.pipeline.truncate("a", 2)
    rig.step(span("a", 2, 3, blocks), seed=2, version=9)
    rig.staging.open()
    assert rig.pipeline.num_rows("a") == 5
    trace = rig.pipeline.finish("a", _tokens(5)).trace
    expected = np.concatenate([rows_of("a", 2, seed=1), rows_of("a", 5, seed=2)[2:]])
    assert np.array_equal(trace.ids, expected)
    assert trace.weights_version == ((0, 0), (2, 9))
    rig.pipeline.begin("hit", blocks[:1], BLOCK)
    assert np.array_equal(rig.pipeline.finish("hit", _tokens(4)).trace.ids, expected[:4])


def test_request_freed_between_submit_and_arrival_leaves_nothing_behind(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    block, later = blocks_at(0), blocks_at(0, epoch=2)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 3, block), seed=1)
    rig.pipeline.free("a")
    rig.pipeline.free("a")
    late = rig.step(span("a", 3, 1, block), seed=1)  # an overlapped engine had launched it already
    rig.pipeline.begin("a", (), 0)  # the same name for another request
    rig.step(span("a", 0, 2, later), seed=2)
    rig.staging.open()
    assert dict(rig.pipeline.errors(late)) == {}
    assert rig.pipeline.num_rows("a") == 2
    assert np.array_equal(rig.pipeline.finish("a", _tokens(2)).trace.ids, rows_of("a", 2, seed=2))
    rig.pipeline.free("a")
    rig.pipeline.drain()
    assert rig.host_cache.num_requests == 0
    with pytest.raises(CaptureError, match="'a' holds no rows"):
        rig.pipeline.finish("a", _tokens(2))


def test_prefix_hit_uses_blocks_whose_rows_are_on_their_way(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    blocks = blocks_at(3, 5, 7)
    rig.pipeline.begin("a", (), 0)
    assert rig.pipeline.num_usable_blocks(blocks) == 0
    rig.step(span("a", 0, 6, blocks))
    assert (
        rig.pipeline.num_usable_blocks(blocks[:2]) == 1
    )  # half of the second is not even computed
    rig.step(span("a", 6, 3, blocks))
    assert rig.pipeline.num_usable_blocks(blocks[:2]) == 2
    assert rig.pipeline.num_usable_blocks(blocks) == 2
    assert rig.pipeline.num_usable_blocks(blocks_at(3, epoch=2)) == 0
    rig.pipeline.begin("hit", blocks[:2], 2 * BLOCK)
    rig.staging.open()
    assert np.array_equal(rig.pipeline.finish("hit", _tokens(8)).trace.ids, rows_of("a", 8))
    assert rig.pipeline.num_usable_blocks(blocks) == 2


def test_fork_copies_rows_that_are_on_their_way(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    blocks, fork, second = blocks_at(0), BlockRef(9, 4), BlockRef(10, 1)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 3, blocks))
    rig.pipeline.copy_block(blocks[0], fork)
    rig.pipeline.begin("child", [fork], 3)
    rig.step(span("a", 3, 1, blocks), span("child", 3, 1, [fork]))
    rig.pipeline.copy_block(fork, second)
    for block in (blocks[0], fork, second):
        assert rig.pipeline.num_usable_blocks([block]) == 1
    rig.staging.open()
    rows = rig.pipeline.finish("child", _tokens(4)).trace.ids
    assert np.array_equal(rows, np.concatenate([rows_of("a", 3), rows_of("child", 4)[3:]]))
    rig.pipeline.begin("hit", [second], BLOCK)
    assert np.array_equal(rig.pipeline.finish("hit", _tokens(4)).trace.ids, rows)


def test_prefix_whose_rows_turn_out_bad_fails_the_request_that_hit_it(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    first, own = blocks_at(0), blocks_at(0, 1)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 4, first), bad_row=2)
    assert rig.pipeline.num_usable_blocks(first) == 1
    rig.pipeline.begin("hit", first, BLOCK)
    ticket = rig.step(span("hit", 4, 1, own))
    rig.staging.open()
    assert "hit KV block 0 of epoch 1" in str(rig.pipeline.errors(ticket)["hit"])
    with pytest.raises(CaptureError, match="hit KV block 0"):
        rig.pipeline.finish("hit", _tokens(5))
    assert rig.pipeline.num_usable_blocks(first) == 0


def test_failed_request_stays_failed_until_it_is_freed(rigs: list[Rig]):
    rig = _rig(rigs)
    block, other = blocks_at(0, 1), blocks_at(2, 3)
    for name in ("a", "b"):
        rig.pipeline.begin(name, (), 0)
    bad = rig.step(span("a", 0, 2, block), span("b", 0, 2, other), bad_row=1)
    good = rig.step(span("a", 2, 1, block), span("b", 2, 1, other))
    assert list(rig.pipeline.errors(bad)) == list(rig.pipeline.errors(good)) == ["a"]
    message = str(rig.pipeline.errors(bad)["a"])
    assert "token index 1: decoder layer 2 wrote no ids" in message
    with pytest.raises(CaptureError, match="token index 1: decoder layer 2"):
        rig.pipeline.finish("a", _tokens(3))
    assert not rig.host_cache.held_rows(block[0]).any()
    assert np.array_equal(rig.pipeline.finish("b", _tokens(3)).trace.ids, rows_of("b", 3))
    rig.pipeline.free("a")
    rig.pipeline.begin("a", (), 0)
    assert dict(rig.pipeline.errors(rig.step(span("a", 0, 2, block)))) == {}


def test_preempted_request_keeps_its_rows_while_they_are_on_their_way(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    first, again = blocks_at(0), blocks_at(1, 2)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 4, first), seed=1)
    rig.pipeline.begin("a", (), 0)  # it waited without blocks, and is computed again
    rig.step(span("a", 0, 5, again), seed=2)
    rig.staging.open()
    expected = np.concatenate([rows_of("a", 4, seed=1), rows_of("a", 5, seed=2)[4:]])
    assert np.array_equal(rig.pipeline.finish("a", _tokens(5)).trace.ids, expected)
    rig.pipeline.begin("hit", again[:1], BLOCK)
    assert np.array_equal(rig.pipeline.finish("hit", _tokens(4)).trace.ids, rows_of("a", 4, seed=2))


def test_step_may_be_changed_by_its_owner_once_it_is_submitted(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    blocks = blocks_at(0, 1)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 6, blocks))
    blocks.clear()
    rig.staging.open()
    rig.pipeline.drain()
    assert rig.host_cache.held_rows(BlockRef(0, 1)).all()
    assert rig.host_cache.held_rows(BlockRef(1, 1)).tolist() == [True, True, False, False]


def test_span_longer_than_its_blocks_is_refused_before_anything_happens(rigs: list[Rig]):
    rig = _rig(rigs)
    rig.pipeline.begin("a", (), 0)
    with pytest.raises(ConfigError, match=r"tokens \[2, 9\), but its 2 KV blocks of 4 tokens"):
        rig.step(span("a", 2, 7, blocks_at(0, 1)))
    assert rig.pipeline.stats.steps == 0


def test_missing_rows_of_a_prefix_are_marked_where_the_policy_says_so(rigs: list[Rig]):
    rig = _rig(rigs, policy=UncachedPrefix.MISSING)
    blocks = blocks_at(0, 1)
    assert rig.pipeline.num_usable_blocks(blocks[:1]) == 1
    rig.pipeline.begin("a", blocks[:1], BLOCK)
    rig.step(span("a", 4, 2, blocks))
    trace = rig.pipeline.finish("a", _tokens(6)).trace
    assert trace.valid.tolist() == [False] * 4 + [True] * 2
    assert np.array_equal(trace.ids[4:], [ids_of("a", 4), ids_of("a", 5)])


def _calls(rig: Rig) -> dict[str, object]:
    blocks = blocks_at(0)
    return {
        "submit": lambda: rig.step(span("a", 3, 1, blocks)),
        "begin": lambda: rig.pipeline.begin("new", (), 0),
        "copy_block": lambda: rig.pipeline.copy_block(blocks[0], BlockRef(1, 1)),
        "truncate": lambda: rig.pipeline.truncate("a", 1),
        "num_rows": lambda: rig.pipeline.num_rows("a"),
        "finish": lambda: rig.pipeline.finish("a", _tokens(3)),
        "free": lambda: rig.pipeline.free("a"),
        "drain": rig.pipeline.drain,
    }


def test_every_call_after_the_thread_has_died_says_so(rigs: list[Rig]):
    rig = _rig(rigs, num_slots=2, is_open=False)
    rig.pipeline.begin("a", (), 0)
    ticket = rig.step(span("a", 0, 3, blocks_at(0)))
    rig.staging.failure = RuntimeError("device lost")
    dying = threading.Timer(0.1, rig.staging.open)
    dying.start()
    with pytest.raises(CaptureError, match="has stopped: RuntimeError: device lost"):
        rig.pipeline.errors(ticket)  # was waiting when it died
    dying.join()
    for name, call in _calls(rig).items():
        with pytest.raises(CaptureError, match="RuntimeError: device lost") as caught:
            call()  # pyright: ignore[reportCallIssue]
        assert caught.value.__cause__ is rig.staging.failure, name
    assert rig.pipeline.stats.steps == 1
    rig.pipeline.close()
    rig.pipeline.close()


def test_full_ring_of_a_dead_thread_raises_instead_of_waiting(rigs: list[Rig]):
    rig = _rig(rigs, num_slots=1, is_open=False)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 1, blocks_at(0)))
    rig.staging.failure = KeyError("lost")
    threading.Timer(0.1, rig.staging.open).start()
    with pytest.raises(CaptureError, match="KeyError"):
        rig.step(span("a", 1, 1, blocks_at(0)))


def test_close_finishes_what_was_asked_for_and_takes_no_more(rigs: list[Rig]):
    rig = _rig(rigs, is_open=False)
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 3, blocks_at(0)))
    threading.Timer(0.05, rig.staging.open).start()
    rig.pipeline.close()
    assert np.array_equal(rig.host_cache.take("a", 3).ids, rows_of("a", 3))
    assert rig.pipeline.finish("a", _tokens(3)).trace.num_rows == 3  # its rows are here
    with pytest.raises(CaptureError, match="pipeline is closed"):
        rig.pipeline.begin("b", (), 0)


def test_pipeline_that_is_dropped_leaves_no_thread():
    before = set(threading.enumerate())
    rig = Rig()
    rig.pipeline.begin("a", (), 0)
    rig.step(span("a", 0, 3, blocks_at(0)))
    rig.pipeline.drain()
    (thread,) = set(threading.enumerate()) - before
    del rig
    gc.collect()
    thread.join(LIMIT_SECONDS)
    assert not thread.is_alive()


def test_ten_thousand_requests_in_flight_leave_memory_flat(rigs: list[Rig]):
    rig = _rig(rigs, num_slots=4, num_blocks=32)
    pipeline = rig.pipeline

    def serve(count: int) -> None:
        for index in range(count):
            name, epoch = f"{index % 977}:{index}", index + 1 + serve_offset[0]
            blocks = [BlockRef(2 * (index % 16), epoch), BlockRef(2 * (index % 16) + 1, epoch)]
            pipeline.begin(name, (), 0)
            pipeline.submit([span(name, 0, 5, blocks)], num_reset=5, weights_version=0)
            pipeline.submit([span(name, 5, 1, blocks)], num_reset=1, weights_version=0)
            pipeline.free(name)
            rig.staging.gates.clear()  # the test's own
        serve_offset[0] += count

    serve_offset = [0]
    rig.cache.gather = lambda num_rows, *, num_reset, out: out.flags.zero_()  # pyright: ignore[reportAttributeAccessIssue]
    serve(1000)
    pipeline.drain()
    before = _resident_bytes()
    serve(9000)
    pipeline.drain()
    assert _resident_bytes() - before < 2e6
    assert rig.host_cache.num_requests == 0
    assert rig.host_cache.nbytes == 0
    pipeline.free("x")
    pending = pipeline._pending  # pyright: ignore[reportPrivateUsage]
    assert len(pending._requests) <= 1  # pyright: ignore[reportPrivateUsage]
    assert len(pending._order) <= 1  # pyright: ignore[reportPrivateUsage]


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_requests_of_a_large_step_do_not_wait_for_its_blocks(
    rigs: list[Rig], monkeypatch: pytest.MonkeyPatch
):
    rig = _rig(rigs, num_rows=320, num_blocks=80, num_slots=2)
    write_blocks, may_write = rig.host_cache.write_blocks, threading.Event()

    def late(*given: object, **named: object) -> None:
        assert may_write.wait(LIMIT_SECONDS)
        write_blocks(*given, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(rig.host_cache, "write_blocks", late)
    blocks = blocks_at(*range(75))
    rig.pipeline.begin("a", (), 0, num_expected=300)
    ticket = rig.step(span("a", 0, 300, blocks), version=3)
    assert dict(rig.pipeline.errors(ticket)) == {}
    assert np.array_equal(rig.pipeline.finish("a", _tokens(300)).trace.ids, rows_of("a", 300))
    assert not rig.host_cache.held_rows(blocks[0]).any()
    assert rig.pipeline.num_usable_blocks(blocks) == 75, "they are on their way"
    rig.pipeline.begin("hit", blocks[:70], 70 * BLOCK)
    rig.pipeline.free("a")
    rig.step(span("hit", 280, 1, blocks))
    threading.Timer(0.05, may_write.set).start()
    rig.step(
        span("hit", 281, 1, blocks)
    )  # takes the first slot again: only when its blocks are written
    assert may_write.is_set()
    trace = rig.pipeline.finish("hit", _tokens(282)).trace
    assert np.array_equal(trace.ids[:280], rows_of("a", 280))
    assert np.array_equal(trace.ids[280:], rows_of("hit", 282)[280:])
    assert trace.weights_version == ((0, 3), (280, 0))
