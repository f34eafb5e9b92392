"""A random engine drives two pipelines, one that does all at once and one whose rows are late: they never differ."""

from dataclasses import dataclass

import numpy as np
import pytest

from routing_replay.capture import BlockRef, RowSpan
from unit.capture.in_flight import BLOCK, Rig, span

NUM_BLOCKS = 48
MAX_TOKENS = 22


@dataclass(slots=True)
class _Request:
    name: str
    blocks: list[BlockRef]
    num_rows: int
    seed: int


class _RandomEngine:
    """Begins, forks, hits prefixes, computes, rejects, preempts, aborts and finishes at random."""

    def __init__(self, seed: int, num_slots: int) -> None:
        self.rng = np.random.default_rng(seed)
        delays = np.random.default_rng(seed + 1)
        self.late = Rig(num_slots=num_slots, num_blocks=NUM_BLOCKS)
        self.late.staging.delays = iter(lambda: float(delays.random() ** 4 * 0.003), None)
        self.rigs = (Rig(is_inline=True, num_blocks=NUM_BLOCKS), self.late)
        self.running: list[_Request] = []
        self.free = list(range(NUM_BLOCKS))
        self.users = [0] * NUM_BLOCKS
        self.epochs = [0] * NUM_BLOCKS
        self.num_made = self.num_finished = self.num_hits = self.num_forks = 0

    def both(self, method: str, *arguments: object) -> object:
        """Call both pipelines and compare what they return."""
        inline, late = (getattr(rig.pipeline, method)(*arguments) for rig in self.rigs)
        assert inline == late, (method, arguments)
        return inline

    def take_block(self) -> BlockRef:
        block_id = self.free.pop(int(self.rng.integers(len(self.free))))
        self.users[block_id] += 1
        self.epochs[block_id] += 1
        return BlockRef(block_id, self.epochs[block_id])

    def drop_blocks(self, request: _Request) -> None:
        for block in request.blocks:
            self.users[block.block_id] -= 1
            if self.users[block.block_id] == 0:
                self.free.append(block.block_id)
        request.blocks = []

    def start(self) -> None:
        if len(self.running) >= 6 or len(self.free) < 20:
            return
        self.num_made += 1
        blocks: list[BlockRef] = []
        num_rows = 0
        if self.running and self.rng.random() < 0.7:
            parent = self.running[int(self.rng.integers(len(self.running)))]
            full = parent.blocks[: parent.num_rows // BLOCK]
            usable = self.both("num_usable_blocks", full)
            assert isinstance(usable, int)
            assert usable == len(full)
            blocks, num_rows = full[:usable], usable * BLOCK
            self.num_hits += usable
            for block in blocks:
                self.users[block.block_id] += 1
            rest = parent.num_rows % BLOCK
            if rest and usable == len(full) and self.rng.random() < 0.5:
                blocks = [*blocks, self.take_block()]
                self.both("copy_block", parent.blocks[usable], blocks[-1])
                num_rows += rest
                self.num_forks += 1
        request = _Request(f"r{self.num_made % 9}", blocks, num_rows, self.num_made)
        if any(other.name == request.name for other in self.running):
            self.drop_blocks(request)
            return
        self.both("begin", request.name, blocks, num_rows)
        self.running.append(request)

    def step(self) -> None:
        spans: list[RowSpan] = []
        for request in self.running:
            count = int(min(self.rng.choice([0, 1, 1, 1, 4]), MAX_TOKENS - request.num_rows))
            if count:
                spans.append(self.span_of(request, count))
        if spans:
            seed = int(self.rng.integers(1000))
            for rig in self.rigs:
                rig.step(*spans, seed=seed, version=seed)

    def span_of(self, request: _Request, count: int) -> RowSpan:
        start = request.num_rows
        request.num_rows += count
        while len(request.blocks) * BLOCK < request.num_rows:
            request.blocks.append(self.take_block())
        return span(request.name, start, count, request.blocks)

    def disturb(self) -> None:
        if not self.running:
            return
        request = self.running[int(self.rng.integers(len(self.running)))]
        kind = self.rng.random()
        own = [self.users[block.block_id] == 1 for block in request.blocks]
        if kind < 0.3 and request.num_rows > 2 and all(own):
            request.num_rows -= 1  # a rejected draft
            self.both("truncate", request.name, request.num_rows)
        elif kind < 0.5 and request.num_rows:
            self.drop_blocks(request)  # preempted: it is computed again
            request.num_rows = 0
        elif kind < 0.6:
            self.end(request)

    def end(self, request: _Request) -> None:
        self.running.remove(request)
        if self.rng.random() < 0.8:
            traces = [self.trace(rig, request) for rig in self.rigs]
            assert np.array_equal(traces[0][0], traces[1][0])
            assert traces[0][1] == traces[1][1]
            self.num_finished += 1
        self.both("free", request.name)
        self.drop_blocks(request)

    def trace(self, rig: Rig, request: _Request) -> tuple[np.ndarray, object]:
        num_rows = rig.pipeline.num_rows(request.name)
        trace = rig.pipeline.finish(request.name, list(range(num_rows + 1))).trace
        return trace.ids, trace.weights_version


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_late_rows_end_where_rows_that_are_never_late_do(seed: int, num_slots: int):
    engine = _RandomEngine(seed, num_slots)
    for _ in range(250):
        engine.start()
        engine.step()
        engine.disturb()
        for request in [r for r in engine.running if r.num_rows >= MAX_TOKENS - 1]:
            engine.end(request)
    for request in list(engine.running):
        engine.end(request)
    engine.late.pipeline.close()
    assert engine.num_finished > 20
    assert min(engine.num_hits, engine.num_forks) > 5
    assert engine.late.host_cache.num_requests == 0
