"""Which tokens of which requests the next step computes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from routing_replay.engine.config import ResolvedConfig
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.request import Request
from routing_replay.errors import ConfigError

__all__ = ["ScheduledRequest", "Scheduler"]


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


class Scheduler:
    """Continuous batching: running requests first, then waiting ones in order, long prompts in chunks.

    A request is admitted once the KV cache has room for all it can come to need, so that it never has to give
    blocks back while it runs.

    Args:
        config: Limits of a step.
        kv_blocks: The KV cache's blocks.
    """

    def __init__(self, config: ResolvedConfig, kv_blocks: KVBlocks) -> None:
        self._config = config
        self._kv_blocks = kv_blocks
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

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

    def schedule(self) -> tuple[Sequence[ScheduledRequest], Sequence[Request]]:
        """Choose the next step.

        Returns:
            The step's parts, decoding requests first, and the requests that it admits.
        """
        budget = self._config.engine.max_num_batched_tokens
        parts: list[ScheduledRequest] = []
        for request in self._running:
            budget -= self._append(parts, request, budget)
        admitted: list[Request] = []
        while self._waiting and budget and len(self._running) < self._config.engine.max_num_seqs:
            request = self._waiting[0]
            if not self._kv_blocks.allocate(request):
                break
            self._running.append(self._waiting.popleft())
            admitted.append(request)
            budget -= self._append(parts, request, budget)
        parts.sort(key=lambda part: part.num_tokens != 1)
        return parts, admitted

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

    def clear(self) -> Sequence[Request]:
        """Drop all requests and free their blocks.

        Returns:
            The requests that were running.
        """
        dropped, self._running = self._running, []
        self._waiting.clear()
        for request in dropped:
            self._kv_blocks.free(request)
        return dropped

    @staticmethod
    def _append(parts: list[ScheduledRequest], request: Request, budget: int) -> int:
        count = min(len(request.token_ids) - request.num_computed, budget)
        if count:
            parts.append(ScheduledRequest(request, request.num_computed, count))
        return count
