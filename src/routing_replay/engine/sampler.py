"""From logits to tokens and their logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.request import Request

__all__ = ["SampledToken", "sample", "score"]

_TOKENS_PER_BLOCK = 128


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token.

    Attributes:
        token_id: The token.
        logprobs: The token and its alternatives, if the request asked for logprobs.
    """

    token_id: int
    logprobs: dict[int, Logprob] | None


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    return torch.tensor(values, device=logits.device)[:, None]


def _penalize(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Ban tokens that may not come yet, and apply penalties, row by row where a request asks for either."""
    changed: dict[int, Tensor] = {}
    for row, request in enumerate(requests):
        if request.token_counts is not None:
            changed[row] = request.token_counts.penalize(logits[row], request.params)
        banned = request.banned_token_ids
        if banned:
            changed[row] = changed.get(row, logits[row]).clone()
            changed[row][list(banned)] = -torch.inf
    if not changed:
        return logits
    logits = logits.clone()
    for row, values in changed.items():
        logits[row] = values
    return logits


def _keep_min_p(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    shares = [request.params.min_p for request in requests]
    if max(shares) == 0.0:
        return logits
    # p >= min_p * p_max, on logits; log(0) keeps every token.
    limit = logits.amax(dim=-1, keepdim=True) + _column(shares, logits).log()
    return logits.masked_fill(logits < limit, -torch.inf)


def _keep_top_k(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    limits = [r.params.top_k if r.params.top_k > 0 else logits.shape[1] for r in requests]
    if min(limits) >= logits.shape[1]:
        return logits
    rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return logits.masked_fill(rank >= _column(limits, logits), -torch.inf)


def _keep_top_p(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    limits = [request.params.top_p for request in requests]
    if min(limits) >= 1.0:
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(dim=-1).gather(1, order)
    # A token stays if the more probable ones do not reach the limit without it; so the first always stays.
    limit = _column(limits, logits)
    is_dropped = (probs.cumsum(dim=-1) - probs >= limit) & (limit < 1.0)
    return logits.masked_fill(
        torch.zeros_like(is_dropped).scatter(1, order, is_dropped), -torch.inf
    )


def _process(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    logits = _penalize(logits, requests)
    temperatures = [request.params.temperature or 1.0 for request in requests]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / _column(temperatures, logits)
    logits = _keep_min_p(logits, requests)
    return _keep_top_p(_keep_top_k(logits, requests), requests)


def _choose(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Draw by the inverse of the cumulative distribution: one number per request, from its own generator.

    So a token depends on its request alone, whatever runs beside it. Temperature 0 takes the first maximum.
    """
    draws = [request.params.temperature > 0 for request in requests]
    if not any(draws):
        return logits.argmax(dim=-1)
    probs = logits.softmax(dim=-1)
    uniform = torch.zeros(len(requests), 1, dtype=torch.float64, device=logits.device)
    for row, request in enumerate(requests):
        if draws[row]:
            uniform[row].uniform_(generator=request.generator)
    drawn = _inverse_cdf(probs, uniform)
    if all(draws):
        return drawn
    return torch.where(torch.tensor(draws, device=logits.device), drawn, logits.argmax(dim=-1))


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution of float32 `[S, V]` passes float64 `[S, 1]`, int64 `[S]`.

    Blocks of tokens first, then the tokens of one block: running sums over whole rows would take longer than all else
    that the sampler does.
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
    """The first entry of `[S, N]` above `[S, 1]`, at most the last one that adds anything."""
    found = torch.searchsorted(cumulative, target, right=True)
    # Rounding can bring a target up to the total, past the last entry of any probability.
    return torch.minimum(found, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()))


def _entries(
    logprobs: Tensor, chosen: Tensor, counts: Sequence[int | None]
) -> list[dict[int, Logprob] | None]:
    """For each row: the chosen token, and the most probable ones that are asked for."""
    values = logprobs.gather(1, chosen[:, None])
    ranks: list[int] = ((logprobs > values).sum(dim=-1) + 1).tolist()
    chosen_values: list[float] = values.squeeze(1).tolist()
    token_ids: list[int] = chosen.tolist()
    entries: list[dict[int, Logprob] | None] = []
    for row, count in enumerate(counts):
        if count is None:
            entries.append(None)
            continue
        entry = {token_ids[row]: Logprob(chosen_values[row], ranks[row])}
        if count:
            order = logprobs[row].argsort(descending=True, stable=True)[:count]
            top_values: list[float] = logprobs[row][order].tolist()
            for position, token_id in enumerate(order.tolist()):
                entry.setdefault(token_id, Logprob(top_values[position], position + 1))
        entries.append(entry)
    return entries


def sample(
    logits: Tensor, requests: Sequence[Request], mode: LogprobsMode
) -> Sequence[SampledToken]:
    """Sample the next token of each request.

    Args:
        logits: float32 `[S, vocab_size]`.
        requests: One per row; their generators advance.
        mode: Which distribution logprobs belong to.

    Returns:
        One token per row.

    Runtime: one host sync, more where logprobs are asked for; a token depends on its request's seed and logits alone.
    """
    if not requests:
        return []
    processed = _process(logits, requests)
    chosen = _choose(processed, requests)
    counts = [request.params.logprobs for request in requests]
    if all(count is None for count in counts):
        return [SampledToken(token_id, None) for token_id in chosen.tolist()]
    logprobs = (logits if mode is LogprobsMode.RAW else processed).log_softmax(dim=-1)
    entries = _entries(logprobs, chosen, counts)
    return [
        SampledToken(token_id, entry)
        for token_id, entry in zip(chosen.tolist(), entries, strict=True)
    ]


def score(
    logits: Tensor, token_ids: Sequence[int], num_alternatives: int
) -> list[dict[int, Logprob]]:
    """Return the logprobs of given tokens.

    Args:
        logits: float32 `[S, vocab_size]`.
        token_ids: The token that follows each row.
        num_alternatives: How many most probable tokens to return beside it.

    Returns:
        One entry per row.

    Runtime: host syncs; allocates O(S*vocab_size); bitwise deterministic.
    """
    chosen = torch.tensor(token_ids, device=logits.device)
    entries = _entries(logits.log_softmax(dim=-1), chosen, [num_alternatives] * len(token_ids))
    return [entry for entry in entries if entry is not None]
