"""From logits to tokens and their logprobs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.request import Request

__all__ = ["SampledToken", "sample"]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token.

    Attributes:
        token_id: The token.
        logprobs: The token and its alternatives, if the request asked for logprobs.
    """

    token_id: int
    logprobs: dict[int, Logprob] | None


def _keep_top_k(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    limits = [r.params.top_k if r.params.top_k > 0 else logits.shape[1] for r in requests]
    if min(limits) >= logits.shape[1]:
        return logits
    rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return logits.masked_fill(
        rank >= torch.tensor(limits, device=logits.device)[:, None], -torch.inf
    )


def _keep_top_p(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    limits = [request.params.top_p for request in requests]
    if min(limits) >= 1.0:
        return logits
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(dim=-1).gather(1, order)
    # A token stays if the more probable ones do not reach the limit without it; so the first always stays.
    limit = torch.tensor(limits, device=logits.device)[:, None]
    is_dropped = (probs.cumsum(dim=-1) - probs >= limit) & (limit < 1.0)
    return logits.masked_fill(
        torch.zeros_like(is_dropped).scatter(1, order, is_dropped), -torch.inf
    )


def _process(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    temperatures = torch.tensor(
        [r.params.temperature or 1.0 for r in requests], device=logits.device
    )
    return _keep_top_p(_keep_top_k(logits / temperatures[:, None], requests), requests)


def _choose(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Sample by exponential races: every request draws from its own generator, whatever runs beside it."""
    noise = torch.ones_like(logits)
    for row, request in enumerate(requests):
        if request.params.temperature > 0:
            noise[row].exponential_(generator=request.generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def _logprobs_of(logprobs: Tensor, chosen: int, num_alternatives: int) -> dict[int, Logprob]:
    top = logprobs.argsort(descending=True, stable=True)[:num_alternatives].tolist()
    values = logprobs[[chosen, *top]].tolist()
    rank = int((logprobs > logprobs[chosen]).sum()) + 1
    result = {chosen: Logprob(values[0], rank)}
    for position, (token_id, value) in enumerate(zip(top, values[1:], strict=True)):
        result.setdefault(token_id, Logprob(value, position + 1))
    return result


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
    token_ids: list[int] = chosen.tolist()
    if all(request.params.logprobs is None for request in requests):
        return [SampledToken(token_id, None) for token_id in token_ids]
    logprobs = (logits if mode is LogprobsMode.RAW else processed).log_softmax(dim=-1)
    chosen_logprobs = logprobs.gather(1, chosen[:, None])
    ranks = ((logprobs > chosen_logprobs).sum(dim=-1) + 1).tolist()
    values = chosen_logprobs.squeeze(1).tolist()
    sampled: list[SampledToken] = []
    for row, (request, token_id) in enumerate(zip(requests, token_ids, strict=True)):
        count = request.params.logprobs
        if count is None:
            sampled.append(SampledToken(token_id, None))
        elif count == 0:
            sampled.append(SampledToken(token_id, {token_id: Logprob(values[row], ranks[row])}))
        else:
            sampled.append(SampledToken(token_id, _logprobs_of(logprobs[row], token_id, count)))
    return sampled
