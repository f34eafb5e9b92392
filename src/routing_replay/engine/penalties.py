"""Penalties on tokens that a request has seen, with vLLM's and OpenAI's definitions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from routing_replay.engine.sampling_params import SamplingParams

__all__ = ["TokenCounts"]


class TokenCounts:
    """How often each token occurred in a request.

    Args:
        vocab_size: Tokens of the model.
        prompt_ids: The request's prompt.
        device: Where logits live.
    """

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int], device: torch.device) -> None:
        self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._in_prompt[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        self._in_output = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        self._in_output[token_id] += 1

    def penalize(self, logits: Tensor, params: SamplingParams) -> Tensor:
        """Apply the penalties of a request.

        Args:
            logits: float32 `[vocab_size]`.
            params: The repetition penalty divides positive and multiplies negative logits of tokens in prompt or
                output; the frequency penalty is subtracted once per occurrence in the output; the presence penalty
                once per token that occurs there.

        Returns:
            New logits.

        Runtime: no host sync; allocates O(vocab_size); CUDA-graph safe; bitwise deterministic.
        """
        occurs = self._in_output > 0
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            scaled = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(occurs | self._in_prompt, scaled, logits)
        logits = logits - params.frequency_penalty * self._in_output
        return logits - params.presence_penalty * occurs
