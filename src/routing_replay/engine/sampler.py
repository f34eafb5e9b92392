"""From logits to tokens and their logprobs, without a host that waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.processing import is_processed, largest, process
from routing_replay.engine.request import Request
from routing_replay.engine.transfers import HostCopy, to_device
from routing_replay.errors import ConfigError
from routing_replay.kernels.sampling import PlainSamples, choose_tokens, log_softmax

__all__ = ["PendingSamples", "SampledToken", "launch_sample", "plain_inputs", "score"]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token.

    Attributes:
        token_id: The token.
        logprobs: The token and its alternatives, if the request asked for logprobs.
        is_finite: Whether the logits that it was drawn from are numbers.
    """

    token_id: int
    logprobs: dict[int, Logprob] | None
    is_finite: bool = True


@dataclass(frozen=True, slots=True)
class _Alternatives:
    """The most probable tokens of some rows, as many as the row of them that wants most."""

    rows: Sequence[int]
    token_ids: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class _Scores:
    """Logprobs and ranks of the tokens of rows, and the alternatives to them."""

    logprobs: Tensor
    ranks: Tensor
    alternatives: _Alternatives | None


class PendingSamples:
    """Sampled tokens on their way to the host.

    Args:
        samples: The tokens; and, if they were sampled as plain ones, their logprobs and ranks.
        scores: Logprobs and ranks where `samples` has none; and alternatives.
        mode: Which distribution logprobs belong to.
        counts: Per row: how many alternatives, None for no logprobs.
        logits: float32 `[S, V]` that the tokens are drawn from, to tell rows that are not finite where no logprob does.
    """

    def __init__(
        self,
        samples: PlainSamples | Tensor,
        scores: _Scores | None,
        mode: LogprobsMode,
        counts: Sequence[int | None],
        *,
        logits: Tensor,
    ) -> None:
        self._is_plain = isinstance(samples, PlainSamples)
        self._mode = mode
        self._counts = counts
        self._alternatives = None if scores is None else scores.alternatives
        if isinstance(samples, PlainSamples):
            self.token_ids = samples.token_ids
            """int64 `[S]` on the device: what the next step takes as its input."""
            tensors = [samples.packed]
        else:
            self.token_ids = samples
            tensors = [samples, logits.sum(dim=-1).isfinite()]
            if scores is not None:
                tensors += [scores.logprobs, scores.ranks]
        if self._alternatives is not None:
            tensors += [self._alternatives.token_ids, self._alternatives.logprobs]
        self._copy = HostCopy(*tensors)

    def wait(self) -> list[SampledToken]:
        """Return the tokens, once they are on the host."""
        tensors = self._copy.wait()
        if self._is_plain:
            samples = PlainSamples(tensors[0])
            is_raw = self._mode is LogprobsMode.RAW
            logprobs = samples.raw_logprobs if is_raw else samples.logprobs
            ranks = samples.ranks if is_raw else samples.processed_ranks
            are_finite = samples.raw_logprobs.isfinite()
            tensors = [samples.token_ids, are_finite, logprobs, ranks, *tensors[1:]]
        token_ids: list[int] = tensors[0].tolist()
        finite: list[bool] = tensors[1].tolist()
        if all(count is None for count in self._counts):
            return [
                SampledToken(token_id, None, is_finite)
                for token_id, is_finite in zip(token_ids, finite, strict=True)
            ]
        values: list[float] = tensors[2].tolist()
        ranks_of: list[int] = tensors[3].tolist()
        entries = [
            None if count is None else {token_id: Logprob(value, rank)}
            for token_id, value, rank, count in zip(
                token_ids, values, ranks_of, self._counts, strict=True
            )
        ]
        sampled = [SampledToken(*item) for item in zip(token_ids, entries, finite, strict=True)]
        if self._alternatives is not None:
            rows = self._alternatives.rows
            self._add(rows, sampled, tensors[-2].tolist(), tensors[-1].tolist())
        return sampled

    def _add(
        self,
        rows: Sequence[int],
        sampled: Sequence[SampledToken],
        token_ids: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
    ) -> None:
        """Put alternatives behind the tokens of their rows."""
        for row, own_ids, own_logprobs in zip(rows, token_ids, logprobs, strict=True):
            entry = sampled[row].logprobs
            assert entry is not None
            for position, token_id in enumerate(own_ids[: self._counts[row]]):
                entry.setdefault(token_id, Logprob(own_logprobs[position], position + 1))


def plain_inputs(
    requests: Sequence[Request], output_index: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Return what `sample_plain` takes beside the logits.

    Args:
        requests: The request of each row.
        output_index: Which output token of its request each row is.

    Returns:
        The rows' temperatures and their draws in [0, 1).
    """
    drawn = [_uniform(*row) for row in zip(requests, output_index, strict=True)]
    return [request.params.temperature for request in requests], drawn


def launch_sample(
    logits: Tensor,
    plain: PlainSamples | None,
    requests: Sequence[Request],
    mode: LogprobsMode,
    *,
    output_index: Sequence[int],
    uniform: Tensor | None = None,
) -> PendingSamples:
    """Sample the next token of each row, and send it on its way to the host.

    Args:
        logits: float32 `[S, V]`.
        plain: What `sample_plain` gave for these rows at their temperatures and draws, if it has run (in a CUDA graph,
            say); rows that ask for nothing else keep that. It is not written to.
        requests: The request of each row; under speculation a request has several.
        mode: Which distribution logprobs belong to.
        output_index: Which output token of its request each row is. Of a request with penalties the tokens before it
            must be in their places: sampled ones are put there by this function, drafts by the caller.
        uniform: float64 `[S]` on the device: the draws that `plain` was made with; None takes them from the requests.

    Returns:
        The tokens, on the device at once, on the host after `wait()`.

    Raises:
        ConfigError: The numbers of rows differ.

    Runtime: no host sync on a GPU; one asynchronous copy, two more with alternatives; allocates O(S*V) for rows that
        `plain` does not cover; not CUDA-graph safe itself; a row's tokens, logprobs and ranks are the same bits
        whatever stands beside it.
    """
    num_rows = len(requests)
    lengths = (len(logits), len(output_index), num_rows if plain is None else len(plain.packed))
    if any(length != num_rows for length in lengths):
        raise ConfigError(
            f"logits, output_index and plain have {lengths} rows for {num_rows} requests; accepted is one row each"
        )
    samples: PlainSamples | Tensor | None = plain
    scores: _Scores | None = None
    rows = _rows_of_their_own(requests, output_index, logits.shape[1], plain)
    if samples is None or rows:
        own = _Rows(logits, requests, output_index, uniform, rows)
        samples, scores = own.sample(mode)
        if plain is not None:
            samples = _placed(plain, rows, samples, scores, mode)
    counts = [request.params.logprobs for request in requests]
    pending = PendingSamples(samples, scores, mode, counts, logits=logits)
    for row, request in enumerate(requests):
        if request.token_counts is not None:
            request.token_counts.place(output_index[row], pending.token_ids[row : row + 1])
    return pending


def _rows_of_their_own(
    requests: Sequence[Request],
    output_index: Sequence[int],
    vocab_size: int,
    plain: PlainSamples | None,
) -> list[int]:
    """Rows that a plain sample does not answer."""
    return [
        row
        for row, (request, index) in enumerate(zip(requests, output_index, strict=True))
        if plain is None
        or bool(request.params.logprobs)
        or is_processed(request, index, vocab_size)
    ]


class _Rows:
    """The rows that torch processes, out of all rows of a step."""

    def __init__(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        output_index: Sequence[int],
        uniform: Tensor | None,
        rows: Sequence[int],
    ) -> None:
        is_all = len(rows) == len(requests)
        at = None if is_all else to_device(rows, torch.int64, logits.device)
        self._rows = rows
        self._logits = logits if at is None else logits[at]
        self._requests = [requests[row] for row in rows]
        self._output_index = [output_index[row] for row in rows]
        if uniform is not None:
            self._uniform = uniform if at is None else uniform[at]
        else:
            drawn = [_uniform(requests[row], output_index[row]) for row in rows]
            self._uniform = to_device(drawn, torch.float64, logits.device)

    def sample(self, mode: LogprobsMode) -> tuple[Tensor, _Scores | None]:
        """Return the tokens, and what is asked for beside them."""
        processed = process(self._logits, self._requests, self._output_index)
        is_greedy = [request.params.temperature == 0 for request in self._requests]
        token_ids = choose_tokens(processed, self._uniform, is_greedy)
        counts = [request.params.logprobs for request in self._requests]
        if all(count is None for count in counts):
            return token_ids, None
        logprobs = log_softmax(self._logits if mode is LogprobsMode.RAW else processed)
        return token_ids, _scores(logprobs, token_ids, counts, self._rows)


def _uniform(request: Request, output_index: int) -> float:
    """The request's number for an output token; none is used up where the most probable token is taken."""
    if request.params.temperature == 0:
        return 0.0
    return request.draws.at(output_index)


def _scores(
    logprobs: Tensor, token_ids: Tensor, counts: Sequence[int | None], rows: Sequence[int]
) -> _Scores:
    """Look tokens up in their rows' logprobs, float32 `[R, V]`, and the most probable ones where they are wanted."""
    values = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > values).sum(dim=-1) + 1
    wanting = [place for place, count in enumerate(counts) if count]
    if not wanting:
        return _Scores(values.squeeze(1), ranks, None)
    if len(wanting) < len(counts):
        logprobs = logprobs[to_device(wanting, torch.int64, logprobs.device)]
    most = max(count for count in counts if count is not None)
    likely = largest(logprobs, min(most, logprobs.shape[1]))
    alternatives = _Alternatives(
        [rows[place] for place in wanting], likely, logprobs.gather(1, likely)
    )
    return _Scores(values.squeeze(1), ranks, alternatives)


def _placed(
    plain: PlainSamples,
    rows: Sequence[int],
    token_ids: Tensor,
    scores: _Scores | None,
    mode: LogprobsMode,
) -> PlainSamples:
    """Put rows in their places among the plain ones, in a new buffer."""
    at = to_device(rows, torch.int64, plain.packed.device)
    own = PlainSamples(plain.packed[at])
    own.token_ids.copy_(token_ids)
    if scores is not None:
        is_raw = mode is LogprobsMode.RAW
        (own.raw_logprobs if is_raw else own.logprobs).copy_(scores.logprobs)
        (own.ranks if is_raw else own.processed_ranks).copy_(scores.ranks)
    return PlainSamples(plain.packed.index_copy(0, at, own.packed))


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

    Runtime: one host sync; allocates O(S*vocab_size); bitwise deterministic for a row by itself.
    """
    rows = range(len(token_ids))
    counts = [num_alternatives] * len(token_ids)
    chosen = to_device(token_ids, torch.int64, logits.device)
    scores = _scores(log_softmax(logits), chosen, counts, rows)
    pending = PendingSamples(chosen, scores, LogprobsMode.RAW, counts, logits=logits)
    return [token.logprobs for token in pending.wait() if token.logprobs is not None]
