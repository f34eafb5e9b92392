"""Which tokens of which requests the next step computes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from routing_replay.engine.config import ResolvedConfig
from routing_replay.engine.kv_blocks import BlockCopy, KVBlocks
from routing_replay.engine.request import Request
from routing_replay.errors import ConfigError

__all__ = ["Schedule", "ScheduledRequest", "Scheduler"]


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part of a step: tokens `[start, start + num_tokens)`.

    Attributes:
        request: The request.
        start: Its first token in the step.
        num_tokens: How many.
    """

    request: Request
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step computes the request's last token, so that the next one can be sampled."""
        return self.start + self.num_tokens == len(self.request.token_ids)

    @property
    def prompt_logprob_rows(self) -> range:
        """Rows of the part whose logits are asked for because the next prompt token is not scored yet."""
        request = self.request
        if request.params.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(request.prompt_logprobs))
        last = min(self.start + self.num_tokens, request.num_prompt_tokens - 1)
        return range(first - self.start, max(first, last) - self.start)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step.

    Attributes:
        parts: What it computes, requests with one token first.
        admitted: Requests that it starts, or starts again after a preemption.
        copies: Blocks to copy before it runs.
    """

    parts: Sequence[ScheduledRequest]
    admitted: Sequence[Request]
    copies: Sequence[BlockCopy]


class Scheduler:
    """Continuous batching: running requests first, then waiting ones in order, long prompts in chunks.

    Where the KV cache runs out, the request that was admitted last gives its blocks back and waits to be computed
    again; what it has sampled stays.

    Args:
        config: Limits of a step.
        kv_blocks: The KV cache's blocks.
    """

    def __init__(self, config: ResolvedConfig, kv_blocks: KVBlocks) -> None:
        self._config = config
        self._kv_blocks = kv_blocks
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._running)

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Args:
            request: A new request.

        Raises:
            ConfigError: It is empty, or longer than a sequence or the KV cache may be.
        """
        if request.num_prompt_tokens == 0:
            raise ConfigError(
                f"request {request.request_id!r} has an empty prompt; pass at least one token"
            )
        if request.num_to_compute == 0:
            raise ConfigError(
                f"request {request.request_id!r} has 1 prompt token and max_tokens=0; a prompt that is only scored "
                "has at least 2 tokens"
            )
        limit = self._config.max_model_len
        if request.max_len > limit:
            raise ConfigError(
                f"request {request.request_id!r} has {request.num_prompt_tokens} prompt tokens and "
                f"max_tokens={request.params.max_tokens}, {request.max_len} in all; accepted are at most "
                f"max_model_len={limit}: shorten the prompt or lower max_tokens"
            )
        needed = self._kv_blocks.blocks_for(request.max_len)
        if needed > self._kv_blocks.num_blocks:
            raise ConfigError(
                f"request {request.request_id!r} needs {needed} KV blocks of {self._kv_blocks.block_size} tokens for "
                f"{request.max_len} tokens, the cache has {self._kv_blocks.num_blocks}; raise num_kv_blocks or lower "
                "max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request that has passed `check`.

        Args:
            request: A new request.
        """
        self._waiting.append(request)

    def schedule(self) -> Schedule:
        """Choose the next step.

        Returns:
            The step; without parts only if no request waits or runs.
        """
        budget = self._config.engine.max_num_batched_tokens
        parts: list[ScheduledRequest] = []
        num_preemptions = self.num_preemptions
        position = 0
        while position < len(self._running):  # preemption shortens the list behind the position
            request = self._running[position]
            count = min(request.num_to_compute - request.num_computed, budget)
            if count and self._make_room(request, request.num_computed + count):
                parts.append(ScheduledRequest(request, request.num_computed, count))
                budget -= count
            position += 1
        admitted: list[Request] = []
        copies: list[BlockCopy] = []
        if num_preemptions == self.num_preemptions:
            self._admit(parts, admitted, copies, budget)
        parts.sort(key=lambda part: part.num_tokens != 1)
        return Schedule(parts, admitted, copies)

    def retire(self) -> Sequence[Request]:
        """Take finished requests out of the running ones and free their blocks.

        Returns:
            The finished requests.
        """
        finished = [request for request in self._running if request.finish_reason is not None]
        self._running = [request for request in self._running if request.finish_reason is None]
        for request in finished:
            self._kv_blocks.free(request)
        return finished

    def abort(self, request_id: str) -> Request | None:
        """End a request between two steps and free its blocks.

        Args:
            request_id: A waiting or running request.

        Returns:
            The request, or None if there is none of that name.
        """
        for request in (*self._running, *self._waiting):
            if request.request_id == request_id:
                request.finish_reason = "abort"
                (self._running if request in self._running else self._waiting).remove(request)
                self._kv_blocks.free(request)
                return request
        return None

    def clear(self) -> Sequence[Request]:
        """Drop all requests and free their blocks.

        Returns:
            The requests that were running or waiting.
        """
        dropped = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        for request in dropped:
            self._kv_blocks.free(request)
        return dropped

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request its blocks; return False if it was itself the one to give way."""
        while not self._kv_blocks.grow(request, num_tokens):
            victim = self._running.pop()
            self._kv_blocks.free(victim)
            victim.num_computed = 0
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self._waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def _admit(
        self,
        parts: list[ScheduledRequest],
        admitted: list[Request],
        copies: list[BlockCopy],
        budget: int,
    ) -> None:
        """Start waiting requests in order; only those that wait for their parent's prompt are passed over."""
        held: list[Request] = []
        while self._waiting and budget and len(self._running) < self._config.engine.max_num_seqs:
            request = self._waiting[0]
            if request.waits_for_parent:
                held.append(self._waiting.popleft())
                continue
            if not self._start(request, copies):
                break
            self._running.append(self._waiting.popleft())
            admitted.append(request)
            if request.num_cached is None:
                request.num_cached = min(request.num_computed, request.num_prompt_tokens)
            count = min(request.num_to_compute - request.num_computed, budget)
            parts.append(ScheduledRequest(request, request.num_computed, count))
            budget -= count
        self._waiting.extendleft(reversed(held))

    def _start(self, request: Request, copies: list[BlockCopy]) -> bool:
        """Give a waiting request its blocks, those of its parent's prompt if it can take them over."""
        if not request.can_fork:
            return self._kv_blocks.admit(request)
        assert request.parent is not None
        has_room, new_copies = self._kv_blocks.fork(request.parent, request)
        copies.extend(new_copies)
        return has_room
