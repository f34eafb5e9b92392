"""A stand-in for the device side whose copies arrive when a test says so."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from routing_replay.capture import (
    BlockRef,
    CapturePipeline,
    DeviceCache,
    HostCache,
    HostRows,
    RoutingSpec,
    RowSpan,
    StepRows,
    StepTicket,
    UncachedPrefix,
)

SPEC = RoutingSpec(layer_ids=(1, 2, 4), num_layers=5, num_experts=16, top_k=2)
BLOCK = 4
LIMIT_SECONDS = 20.0


class GatedStaging:
    """Slots that are filled at once and arrive when their gate opens, in any order."""

    is_asynchronous = True

    def __init__(self, device_cache: DeviceCache, num_slots: int, *, is_open: bool = True) -> None:
        self.num_slots = num_slots
        self.is_open = is_open
        self.gates: list[threading.Event] = []
        self.failure: BaseException | None = None
        self.delays: Iterator[float] | None = None
        self._device_cache = device_cache
        self._of_slot = [threading.Event()] * num_slots
        shape = (device_cache.num_rows, SPEC.num_moe_layers, SPEC.top_k)
        self._slots = [
            StepRows(
                torch.full(shape, 250, dtype=torch.uint8),
                torch.full((shape[0],), 8, dtype=torch.uint8),
            )
            for _ in range(num_slots)
        ]
        self._stamps = [-1] * num_slots

    def launch(self, slot: int, num_rows: int, num_reset: int) -> None:
        """Fill a slot; whatever still read its old rows would now read poison."""
        self._slots[slot].rows.fill_(250)
        self._slots[slot].flags.fill_(8)
        self._device_cache.gather(num_rows, num_reset=num_reset, out=self._slots[slot])
        self.send(slot, num_rows, num_reset)

    def gather(self, num_rows: int, step: torch.Tensor) -> None:
        """Fill the slot of the step that a tensor names, as a graph does."""
        slot = int(step) % self.num_slots
        at = self._slots[slot]
        self._stamps[slot] = int(step)
        at.rows.fill_(250)
        at.flags.fill_(8)
        self._device_cache.gather(num_rows, num_reset=num_rows, out=at)

    def send(self, slot: int, num_rows: int, num_gathered: int) -> None:
        """Put a gate before a slot."""
        del num_rows, num_gathered
        gate = threading.Event()
        if self.is_open:
            gate.set()
        self.gates.append(gate)
        self._of_slot[slot] = gate

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Wait for the gate."""
        if not self._of_slot[slot].wait(LIMIT_SECONDS):
            raise TimeoutError(f"no test opened the gate of slot {slot}")
        if self.failure is not None:
            raise self.failure
        if self.delays is not None:
            time.sleep(next(self.delays))
        at = self._slots[slot]
        return HostRows(at.rows[:num_rows].numpy(), at.flags[:num_rows].numpy(), self._stamps[slot])

    def open(self) -> None:
        """Let everything arrive, now and later."""
        self.is_open = True
        for gate in self.gates:
            gate.set()


class Rig:
    """A pipeline over a gated staging, and a step that writes ids which a test can predict."""

    def __init__(
        self,
        *,
        num_slots: int = 3,
        num_rows: int = 32,
        num_blocks: int = 16,
        is_open: bool = True,
        policy: UncachedPrefix = UncachedPrefix.RECOMPUTE,
        is_inline: bool = False,
    ) -> None:
        self.cache = DeviceCache(SPEC, num_rows=num_rows, device=torch.device("cpu"))
        self.host_cache = HostCache(SPEC, num_blocks=num_blocks, block_size=BLOCK)
        self.staging = GatedStaging(self.cache, num_slots, is_open=is_open)
        self.pipeline = CapturePipeline(
            self.cache,
            self.host_cache,
            uncached_prefix=policy,
            staging=None if is_inline else self.staging,
        )

    def step(
        self,
        *spans: RowSpan,
        seed: int = 0,
        version: int = 0,
        bad_row: int | None = None,
        num_padding: int = 1,
        is_graph: bool = False,
        step_error: int = 0,
    ) -> StepTicket:
        """Write what the layers of a step would write, and submit it; a graph gathers it, under the number that it is told."""
        rows = [ids_of(span.request_id, span.start + i, seed) for span in spans for i in range(span.num_rows)]  # fmt: skip
        for layer in range(SPEC.num_moe_layers):
            for index, row in enumerate(rows):
                self.cache.layer(layer)[index] = torch.from_numpy(row[layer].astype(np.int16))
        if bad_row is not None:
            self.cache.layer(1)[bad_row] = -1
        num_reset = len(rows) + num_padding
        if is_graph:
            self.pipeline.staging.gather(
                num_reset, torch.tensor([self.pipeline.claim_step() + step_error])
            )
        return self.pipeline.submit(
            spans, num_reset=num_reset, weights_version=version, is_gathered=is_graph
        )


def ids_of(request_id: str, token_index: int, seed: int = 0) -> np.ndarray:
    """The experts `[L, K]` of a token, different for every request, token, layer and seed."""
    base = sum(request_id.encode()) * 5 + token_index * 3 + seed * 7
    first = (base + np.arange(SPEC.num_moe_layers) * 2) % SPEC.num_experts
    return np.stack([first, (first + 1 + token_index % 5) % SPEC.num_experts], axis=-1)


def rows_of(request_id: str, num_rows: int, seed: int = 0) -> np.ndarray:
    """The experts `[n, L, K]` of a request's first tokens."""
    return np.stack([ids_of(request_id, index, seed) for index in range(num_rows)])


def span(request_id: str, start: int, num_rows: int, blocks: list[BlockRef]) -> RowSpan:
    """A part of a step."""
    return RowSpan(request_id=request_id, start=start, num_rows=num_rows, blocks=blocks)


def blocks_at(*block_ids: int, epoch: int = 1) -> list[BlockRef]:
    """Blocks of one epoch."""
    return [BlockRef(block_id, epoch) for block_id in block_ids]
