"""What a request's settings make of its logits before a token is drawn: bans, penalties, temperature and cuts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from routing_replay.engine.penalties import TokenCounts, penalize_rows
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.transfers import to_device

__all__ = ["is_processed", "keep_likely", "largest", "process"]

_MOST_CANDIDATES = 1024
_MASS_ONE = 2.0**44  # V tokens of it sum up in 62 bits


def is_processed(request: Request, output_index: int, vocab_size: int) -> bool:
    """Return whether more than the temperature changes the logits of an output token.

    Args:
        request: The request.
        output_index: Which of its output tokens.
        vocab_size: Tokens of the model.

    Returns:
        False where the token is drawn from the softmax of all logits.
    """
    params = request.params
    return (
        request.token_counts is not None
        or params.min_p > 0.0
        or params.top_p < 1.0
        or 0 < params.top_k < vocab_size
        or bool(_banned(request, output_index))
    )


def process(logits: Tensor, requests: Sequence[Request], output_index: Sequence[int]) -> Tensor:
    """Return the logits that tokens are drawn from.

    Args:
        logits: float32 `[R, V]`.
        requests: One per row.
        output_index: Which output token each row is.

    Returns:
        `logits`, or new ones where anything changes them; -inf where a token may not come.

    Runtime: no host sync; allocates O(R*V); not CUDA-graph safe; bitwise deterministic for a row by itself.
    """
    logits = _ban(_penalize(logits, requests, output_index), requests, output_index)
    params = [request.params for request in requests]
    temperatures = [item.temperature or 1.0 for item in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / _column(temperatures, logits)
    logits = _keep_min_p(logits, params)
    if logits.device.type == "cpu":
        return _keep_top_p(_keep_top_k(logits, params), params)
    return keep_likely(logits, params)


def _column(values: Sequence[float] | Sequence[int], logits: Tensor) -> Tensor:
    dtype = torch.int64 if isinstance(values[0], int) else torch.float32
    return to_device(values, dtype, logits.device)[:, None]


def _penalize(logits: Tensor, requests: Sequence[Request], output_index: Sequence[int]) -> Tensor:
    rows = [row for row, request in enumerate(requests) if request.token_counts is not None]
    if not rows:
        return logits
    counts: list[TokenCounts] = [
        request.token_counts for request in requests if request.token_counts is not None
    ]
    params = [requests[row].params for row in rows]
    before = [output_index[row] for row in rows]
    if len(rows) == len(requests):
        return penalize_rows(logits, params, counts, before)
    at = to_device(rows, torch.int64, logits.device)
    return logits.index_copy(0, at, penalize_rows(logits[at], params, counts, before))


def _banned(request: Request, output_index: int) -> Sequence[int]:
    """Tokens that may not come yet, because they would end the output before `min_tokens`."""
    if output_index >= request.params.min_tokens:
        return ()
    eos = () if request.params.ignore_eos else request.eos_token_ids
    return (*eos, *request.params.stop_token_ids)


def _ban(logits: Tensor, requests: Sequence[Request], output_index: Sequence[int]) -> Tensor:
    banned = [
        (row, token_id)
        for row, (request, index) in enumerate(zip(requests, output_index, strict=True))
        for token_id in _banned(request, index)
    ]
    if not banned:
        return logits
    rows = to_device([row for row, _ in banned], torch.int64, logits.device)
    token_ids = to_device([token_id for _, token_id in banned], torch.int64, logits.device)
    infinity = torch.full((len(banned),), -torch.inf, device=logits.device)
    return logits.index_put((rows, token_ids), infinity)


def _keep_min_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    shares = [item.min_p for item in params]
    if max(shares) == 0.0:
        return logits
    # p >= min_p * p_max, on logits; log(0) keeps every token.
    limit = logits.amax(dim=-1, keepdim=True) + _column(shares, logits).log()
    return logits.masked_fill(logits < limit, -torch.inf)


def _keep_top_k(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    limits = [item.top_k if item.top_k > 0 else logits.shape[1] for item in params]
    if min(limits) >= logits.shape[1]:
        return logits
    rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return logits.masked_fill(rank >= _column(limits, logits), -torch.inf)


def _keep_top_p(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    limits = [item.top_p for item in params]
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


def keep_likely(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Cut rows to their top-k, then to their top-p tokens, with bits that do not depend on the other rows.

    A GPU sums up floats in an order that depends on the number of rows; here sums are those of integers.

    Args:
        logits: float32 `[R, V]`.
        params: Of each row.

    Returns:
        `logits`, or new ones with -inf in place of the tokens that are cut off.

    Runtime: no host sync; allocates O(R*V); not CUDA-graph safe; bitwise deterministic for a row by itself.
    """
    vocab_size = logits.shape[1]
    limits = [item.top_k if 0 < item.top_k < vocab_size else vocab_size for item in params]
    rows = [row for row, item in enumerate(params) if limits[row] < vocab_size or item.top_p < 1.0]
    few = [row for row in rows if limits[row] <= _MOST_CANDIDATES]
    many = [row for row in rows if limits[row] > _MOST_CANDIDATES]
    for group in (few, many):
        if not group:
            continue
        count = min(max(limits[row] for row in group), vocab_size)
        at = to_device(group, torch.int64, logits.device)
        top_k = _column([limits[row] for row in group], logits)
        top_p = _column([params[row].top_p for row in group], logits)
        logits = logits.index_copy(0, at, _keep_candidates(logits[at], count, top_k, top_p))
    return logits


def _keep_candidates(logits: Tensor, count: int, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Cut rows that keep at most `count` tokens."""
    token_ids = largest(logits, count)
    values = logits.gather(1, token_ids)
    in_top_k = torch.arange(count, device=logits.device) < top_k
    # A row of -inf alone has no probabilities; it stays what it is.
    weights = (values - values[:, :1]).exp().nan_to_num(0.0).double()
    masses = (weights * _MASS_ONE).long() * in_top_k
    ends = masses.cumsum(dim=-1)
    # A token stays if the more probable ones do not reach the limit without it; so the first always stays.
    limit = top_p * ends[:, -1:].double()
    stays = in_top_k & (((ends - masses).double() < limit) | (top_p >= 1.0))
    kept = values.masked_fill(~stays, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(1, token_ids, kept)


def largest(values: Tensor, count: int) -> Tensor:
    """Find the largest entries of each row.

    Args:
        values: float32 `[R, V]`.
        count: How many, at most V.

    Returns:
        int64 `[R, count]`: their places, the largest first, equal ones in the order of their places.

    Runtime: no host sync; allocates O(R*V); CUDA-graph safe; exact.
    """
    size = values.shape[1]
    if count > min(_MOST_CANDIDATES, size // 2):
        return values.argsort(dim=-1, descending=True, stable=True)[:, :count]
    # torch.topk leaves open which of equal entries comes first: keys that hold value and place are never equal.
    bits = (values + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    place = torch.arange(size - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) | place
    return size - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
