"""A request while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture import BlockRef
from routing_replay.engine.draws import Draws
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.penalties import TokenCounts
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.speculation import PromptLookup
from routing_replay.engine.stop_strings import StopStrings
from routing_replay.errors import RoutingReplayError

__all__ = ["DraftTail", "Request"]


@dataclass(frozen=True, slots=True)
class DraftTail:
    """Hidden states of a request's last computed tokens.

    Attributes:
        end: One past the last of them.
        hidden_states: `[n, H]`, on the device.
    """

    end: int
    hidden_states: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """The state of a request; three integers say where it stands.

    Attributes:
        request_id: Unique in the engine.
        prompt: Text of the prompt, if it was text.
        token_ids: Prompt and generated tokens.
        num_prompt_tokens: P.
        params: How it is sampled.
        draws: Its own source of randomness.
        eos_token_ids: Tokens that end it.
        parent: The first of the n samples of its prompt, if it is another one of them.
        index: Which of the n samples it is.
        stop_strings: Looks for `params.stop` in the text, if there is any.
        token_counts: Tokens seen so far, if penalties need them.
        forced_ids: int16 `[rows, L, K]` experts to force, from token 0 on, -1 in native rows; tokens past its end
            route natively. None routes all tokens natively.
        num_computed: Tokens whose keys, values and routing rows exist, or are being computed by a step in flight.
        num_pending: Tokens that steps in flight are sampling.
        slot: Its place among the running requests, -1 while it waits.
        num_cached: Prompt tokens that the prefix cache, or a fork, gave it at first.
        num_preemptions: How often it had to give its blocks back.
        lookup: Finds its drafts, once it had to; None before, and where its engine does not speculate by lookup.
        drafts: What the model's own layers have drafted behind its last token.
        draft_tail: What these layers need of its last computed tokens to go on; None without them.
        num_draft_tokens: Drafts that steps have computed for it.
        num_accepted_tokens: Those of them that are among its tokens.
        blocks: Its KV blocks in token order.
        prefix_generation: How often the prefix cache had been reset when it was given its first blocks.
        block_hashes: Chained hashes of its first full blocks.
        logprobs: Per generated token.
        prompt_logprobs: Per prompt token from the second on.
        finish_reason: Set when it has ended.
        stop_reason: The stop token or string, if one was asked for and met.
        error: Why it failed.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    draws: Draws
    eos_token_ids: tuple[int, ...]
    parent: "Request | None" = None
    index: int = 0
    stop_strings: StopStrings | None = None
    token_counts: TokenCounts | None = None
    forced_ids: NDArray[np.int16] | None = None
    num_computed: int = 0
    num_pending: int = 0
    slot: int = -1
    num_cached: int | None = None
    num_preemptions: int = 0
    lookup: PromptLookup | None = None
    drafts: Sequence[int] = ()
    draft_tail: DraftTail | None = None
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    blocks: list[BlockRef] = field(default_factory=list[BlockRef])
    prefix_generation: int = 0
    block_hashes: list[bytes] = field(default_factory=list[bytes])
    logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: RoutingReplayError | None = None

    @property
    def max_len(self) -> int:
        """Most tokens it can reach."""
        return self.num_prompt_tokens + self.params.max_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that it has, those in flight among them."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """Tokens that it has and must compute: all, but never the last one that it can reach."""
        return min(self.num_tokens, self.max_len - 1)

    @property
    def output_ids(self) -> Sequence[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, counted, those in flight among them."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def waits_for_parent(self) -> bool:
        """Whether the prompt that it can take over is still being computed."""
        parent = self.parent
        return (
            parent is not None
            and self.num_preemptions == 0
            and parent.finish_reason is None
            and parent.num_computed < parent.num_prompt_tokens
        )

    @property
    def can_fork(self) -> bool:
        """Whether its parent holds the computed prompt."""
        parent = self.parent
        return (
            parent is not None
            and self.num_preemptions == 0
            and bool(parent.blocks)
            and parent.num_computed >= parent.num_prompt_tokens
        )

    @property
    def skips_prefix_cache(self) -> bool:
        """Whether it must compute every prompt token, because their logits are asked for and not all there."""
        is_scored = len(self.prompt_logprobs) >= self.num_prompt_tokens - 1
        return self.params.prompt_logprobs is not None and not is_scored

    def forced_bytes(self, start: int, stop: int) -> bytes:
        """Return the forced experts of tokens `[start, stop)`: part of what their KV depends on."""
        if self.forced_ids is None:
            return b""
        forced = self.forced_ids[start:stop]
        # Rows that are all native depend on nothing forced; the hash chain covers what lies before them.
        return forced.tobytes() if (forced >= 0).any() else b""

    def accept(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Append a sampled token, which is no longer in flight, and decide whether the request has ended."""
        self.token_ids.append(token_id)
        self.num_pending -= 1
        if logprobs is not None:
            self.logprobs.append(logprobs)
        # Tokens still in flight are not part of its length: they may never come to be.
        is_long_enough = len(self.token_ids) - self.num_prompt_tokens >= self.params.min_tokens
        found = None
        if self.stop_strings is not None:
            found = self.stop_strings.add(token_id, may_stop=is_long_enough)
        if token_id in self.eos_token_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif token_id in self.params.stop_token_ids and is_long_enough:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif found is not None:
            self.finish_reason, self.stop_reason = "stop", found
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"

    def fail(self, error: RoutingReplayError) -> None:
        """End the request with an error."""
        self.finish_reason, self.error = "error", error
