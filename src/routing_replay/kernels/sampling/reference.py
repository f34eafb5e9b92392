"""Sampling in plain torch: the inverse of the cumulative distribution, at one number for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlainSamples", "choose_reference", "inverse_cdf", "sample_plain_reference"]

_TOKENS_PER_BLOCK = 128


@dataclass(frozen=True, slots=True)
class PlainSamples:
    """Sampled tokens in one buffer, so that one copy brings all of it to the host.

    Attributes:
        packed: int64 `[B, 3]`, contiguous: the token, two float32 logprobs, two int32 ranks. Its first rows are the
            samples of the first rows: `PlainSamples(samples.packed[:n])`.
    """

    packed: Tensor

    @property
    def token_ids(self) -> Tensor:
        """The tokens, int64 `[B]`, a view."""
        return self.packed[:, 0]

    @property
    def raw_logprobs(self) -> Tensor:
        """The tokens' logprobs under the logits as given, float32 `[B]`, a view; NaN in a row with NaN or +inf."""
        return self.packed.view(torch.float32)[:, 2]

    @property
    def logprobs(self) -> Tensor:
        """The same under the logits divided by the temperature, float32 `[B]`, a view."""
        return self.packed.view(torch.float32)[:, 3]

    @property
    def ranks(self) -> Tensor:
        """One more than the tokens of a larger raw logprob, int32 `[B]`, a view."""
        return self.packed.view(torch.int32)[:, 4]

    @property
    def processed_ranks(self) -> Tensor:
        """The same for `logprobs`, int32 `[B]`, a view; it differs only where rounding makes ties."""
        return self.packed.view(torch.int32)[:, 5]


def sample_plain_reference(
    logits: Tensor, temperature: Tensor, uniform: Tensor, *, with_logprobs: bool = True
) -> PlainSamples:
    """Draw a token of each row.

    Args:
        logits: float32 `[B, V]`.
        temperature: float32 `[B]`; a row of 0 takes its first maximum.
        uniform: float64 `[B]` in [0, 1).
        with_logprobs: Also compute logprobs and ranks; they are NaN and 0 otherwise.

    Returns:
        The samples.

    Runtime: syncs on a GPU; allocates O(B*V); not CUDA-graph safe; bitwise deterministic, on a CPU also for a row by
        itself; no gradients.
    """
    is_greedy = temperature == 0
    scale = temperature.masked_fill(is_greedy, 1.0)
    is_scaled = bool((scale != 1).any())
    scaled = logits / scale[:, None] if is_scaled else logits
    samples = PlainSamples(torch.zeros(len(logits), 3, dtype=torch.int64, device=logits.device))
    samples.token_ids.copy_(choose_reference(scaled, uniform, is_greedy.tolist()))
    if not with_logprobs:
        samples.raw_logprobs.fill_(torch.nan)
        samples.logprobs.fill_(torch.nan)
        return samples
    chosen = samples.token_ids[:, None]
    raw_table = logits.log_softmax(dim=-1)
    table = scaled.log_softmax(dim=-1) if is_scaled else raw_table
    for values, ranks, logprobs in (
        (samples.raw_logprobs, samples.ranks, raw_table),
        (samples.logprobs, samples.processed_ranks, table),
    ):
        of_token = logprobs.gather(1, chosen)
        values.copy_(of_token.squeeze(1))
        ranks.copy_((logprobs > of_token).sum(dim=-1) + 1)
    return samples


def choose_reference(logits: Tensor, uniform: Tensor, is_greedy: Sequence[bool]) -> Tensor:
    """Draw a token of each row, or take its first maximum; neither is computed where no row asks for it.

    Args:
        logits: float32 `[B, V]`.
        uniform: float64 `[B]` in [0, 1).
        is_greedy: Per row: whether to take the first maximum.

    Returns:
        int64 `[B]`.

    Runtime: no host sync on a CPU; allocates O(B*V); not CUDA-graph safe; bitwise deterministic, on a CPU also for a
        row by itself; no gradients.
    """
    if all(is_greedy):
        return logits.argmax(dim=-1)
    drawn = inverse_cdf(logits.softmax(dim=-1), uniform[:, None])
    if not any(is_greedy):
        return drawn
    return torch.where(torch.tensor(is_greedy, device=logits.device), logits.argmax(dim=-1), drawn)


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Find the token at which the cumulative distribution passes a number.

    Blocks of tokens first, then the tokens of one block: running sums over whole rows would take longer than all else
    that a sampler does.

    Args:
        probs: float32 `[B, V]`, 0 or more; a row need not sum to 1.
        uniform: float64 `[B, 1]` in [0, 1).

    Returns:
        int64 `[B]`, never a token without probability.

    Runtime: no host sync; allocates O(B*V); CUDA-graph safe; bitwise deterministic; no gradients.
    """
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % _TOKENS_PER_BLOCK))
    blocks = blocks.unflatten(1, (-1, _TOKENS_PER_BLOCK))
    block_ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = block_ends[:, -1:].contiguous()
    block = _first_past(block_ends, uniform * total)
    before = torch.nn.functional.pad(block_ends, (1, 0)).gather(1, block)
    inside = blocks.take_along_dim(block[:, :, None], dim=1).squeeze(1).double().cumsum(dim=-1)
    # Rounding can also bring a target below the start of its block, to a token without any probability.
    target = (uniform * total - before).clamp_min(0.0)
    return (block * _TOKENS_PER_BLOCK + _first_past(inside, target)).squeeze(1)


def _first_past(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first entry of `[B, N]` above `[B, 1]`, at most the last one that adds anything."""
    found = torch.searchsorted(cumulative, target, right=True)
    # Rounding can bring a target up to the total, past the last entry of any probability.
    return torch.minimum(found, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))
