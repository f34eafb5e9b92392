"""A request while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.capture import BlockRef
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.errors import CaptureError

__all__ = ["Request"]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """The state of a request; three integers say where it stands.

    Attributes:
        request_id: Unique in the engine.
        prompt: Text of the prompt, if it was text.
        token_ids: Prompt and generated tokens.
        num_prompt_tokens: P.
        params: How it is sampled.
        generator: Its own source of randomness.
        eos_token_ids: Tokens that end it.
        forced_ids: int16 `[rows, L, K]` experts to force, from token 0 on; None routes natively.
        num_computed: Tokens whose keys, values and routing rows exist.
        num_cached: Of these, how many came from the prefix cache.
        blocks: Its KV blocks in token order.
        logprobs: Per generated token.
        finish_reason: Set when it has ended.
        stop_reason: The stop token, if one was asked for and met.
        error: Why it failed.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    generator: torch.Generator
    eos_token_ids: tuple[int, ...]
    forced_ids: NDArray[np.int16] | None = None
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[BlockRef] = field(default_factory=list[BlockRef])
    logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: CaptureError | None = None

    @property
    def max_len(self) -> int:
        """Most tokens it can reach."""
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def output_ids(self) -> Sequence[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    def forced_bytes(self, start: int, stop: int) -> bytes:
        """Return the forced experts of tokens `[start, stop)`: part of what their KV depends on."""
        return b"" if self.forced_ids is None else self.forced_ids[start:stop].tobytes()

    def accept(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Append a sampled token and decide whether the request has ended."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif token_id in self.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"

    def fail(self, error: CaptureError) -> None:
        """End the request with an error."""
        self.finish_reason, self.error = "error", error
