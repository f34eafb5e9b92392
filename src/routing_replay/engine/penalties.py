"""Penalties on tokens that a request has seen, with vLLM's and OpenAI's definitions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.transfers import to_device

__all__ = ["TokenCounts", "penalize_rows"]

_FIRST_CAPACITY = 64


class TokenCounts:
    """The tokens of a request, on the device, where they are before the host knows them.

    Output tokens are kept by their place, not summed up: a step that is done again, or that goes beyond what is
    accepted in the end, writes the same places again and leaves nothing behind.

    Args:
        vocab_size: Tokens of the model.
        prompt_ids: The request's prompt.
        device: Where logits live.
    """

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int], device: torch.device) -> None:
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt[to_device(prompt_ids, torch.int64, device)] = True
        self._output_ids = torch.zeros(_FIRST_CAPACITY, dtype=torch.int64, device=device)
        self._num_output_tokens = 0

    def add(self, token_id: int) -> None:
        """Count a generated token that the host knows, the next one."""
        self._grow(self._num_output_tokens + 1)
        self._output_ids[self._num_output_tokens] = token_id
        self._num_output_tokens += 1

    def place(self, output_index: int, token_ids: Tensor) -> None:
        """Put output tokens in their places: sampled ones, or drafts before what follows them is sampled.

        Args:
            output_index: Which output token the first one is.
            token_ids: int64 `[n]` on the device.

        Runtime: no host sync; rarely allocates; not CUDA-graph safe.
        """
        end = output_index + token_ids.shape[0]
        self._grow(end)
        self._output_ids[output_index:end] = token_ids

    def output_ids(self, num_output_tokens: int | None = None) -> Tensor:
        """Return the first output tokens, int64 `[num_output_tokens]`, a view; None: those that were added."""
        count = self._num_output_tokens if num_output_tokens is None else num_output_tokens
        return self._output_ids[:count]

    def penalize(self, logits: Tensor, params: SamplingParams) -> Tensor:
        """Apply the penalties of a request for the tokens that were added.

        Args:
            logits: float32 `[vocab_size]`.
            params: See `penalize_rows`.

        Returns:
            New logits.

        Runtime: as `penalize_rows`.
        """
        return penalize_rows(logits[None], [params], [self], [self._num_output_tokens]).squeeze(0)

    def _grow(self, needed: int) -> None:
        capacity = len(self._output_ids)
        if needed > capacity:
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                grown = self._output_ids.new_zeros(max(needed, 2 * capacity))
                grown[:capacity] = self._output_ids
            self._output_ids = grown


def penalize_rows(
    logits: Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[TokenCounts],
    num_output_tokens: Sequence[int],
) -> Tensor:
    """Apply penalties to rows, each for its own request.

    Args:
        logits: float32 `[R, vocab_size]`.
        params: The repetition penalty divides positive and multiplies negative logits of tokens in prompt or output;
            the frequency penalty is subtracted once per occurrence in the output; the presence penalty once per token
            that occurs there.
        counts: Tokens of each row's request.
        num_output_tokens: How many of its output tokens come before the one to sample.

    Returns:
        New logits.

    Runtime: no host sync; allocates O(R*vocab_size); not CUDA-graph safe; bitwise deterministic for a row by itself.
    """
    device = logits.device

    def column(values: Sequence[float]) -> Tensor:
        return to_device(values, torch.float32, device)[:, None]

    seen = [item.output_ids(n) for item, n in zip(counts, num_output_tokens, strict=True)]
    in_output = torch.zeros_like(logits)
    if sum(num_output_tokens):
        # The lengths are known here: without the size, the device would be asked for it.
        rows = to_device(
            [row for row, n in enumerate(num_output_tokens) for _ in range(n)], torch.int64, device
        )
        places = rows * logits.shape[1] + torch.cat(seen)
        # Sums of ones are exact in every order.
        in_output.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
    occurs = in_output > 0
    factors = [item.repetition_penalty for item in params]
    if any(factor != 1.0 for factor in factors):
        factor = column(factors)
        scaled = torch.where(logits > 0, logits / factor, logits * factor)
        in_prompt = torch.stack([item.in_prompt for item in counts])
        logits = torch.where(occurs | in_prompt, scaled, logits)
    logits = logits - column([item.frequency_penalty for item in params]) * in_output
    return logits - column([item.presence_penalty for item in params]) * occurs
