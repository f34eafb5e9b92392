"""From prompts to requests: everything that is checked before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.engine.config import EngineConfig
from routing_replay.engine.draws import Draws
from routing_replay.engine.penalties import TokenCounts
from routing_replay.engine.request import Request
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.stop_strings import StopStrings
from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.kernels import MISSING_ID
from routing_replay.models import MoEModelConfig
from routing_replay.trace import RoutingTrace

__all__ = ["Forcing", "Intake"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that request seeds differ for 2^64 requests


@dataclass(frozen=True, slots=True)
class Forcing:
    """Routing to force on a request.

    Attributes:
        trace: The experts, from token 0 on.
        on_missing: `"error"` refuses a trace that lacks a row which the request can come to need; `"native"` routes
            such rows natively.
    """

    trace: RoutingTrace
    on_missing: str = "error"

    def __post_init__(self) -> None:
        """Check the policy."""
        if self.on_missing not in ("error", "native"):
            raise ConfigError(
                f"on_missing={self.on_missing!r}; accepted in an engine are 'error' and 'native'"
            )


class Intake:
    """Makes requests for one model.

    Args:
        model_config: The model.
        config: Settings of the engine.
        device: Where tokens are counted for penalties.
        check: Refuses a request that can never run.
        make_decoder: Returns a function from a next token to the text that it adds; None without a tokenizer.
    """

    def __init__(
        self,
        model_config: MoEModelConfig,
        config: EngineConfig,
        *,
        device: torch.device,
        check: Callable[[Request], None],
        make_decoder: Callable[[], Callable[[int], str | None]] | None = None,
    ) -> None:
        self._model_config = model_config
        self._config = config
        self._device = device
        self._check = check
        self._make_decoder = make_decoder
        self._num_requests = 0

    def make_requests(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        forcing: Forcing | None = None,
    ) -> list[Request]:
        """Check a prompt and make requests of it, one for each of its n completions; nothing runs yet.

        Args:
            token_ids: The prompt.
            params: How to sample.
            prompt: Its text, if it was text.
            forcing: Routing to force.

        Returns:
            The requests; the first is the parent of the others, which take its computed prompt over.

        Raises:
            ConfigError: The prompt is empty or too long, or holds a token that the model does not have; or stop
                strings without a tokenizer.
            TraceMismatchError: The trace does not fit the prompt or the model.
        """
        self._check_tokens(token_ids, params)
        parent = self._make_request(token_ids, params, prompt)
        self._check(parent)
        if forcing is not None:
            parent.forced_ids = self._forced_ids(parent, forcing)
        requests = [parent]
        for index in range(1, params.n):
            seed = None if params.seed is None else (params.seed + index) % 2**63
            own = replace(params, seed=seed, prompt_logprobs=None)
            child = self._make_request(token_ids, own, prompt)
            child.parent, child.index, child.forced_ids = parent, index, parent.forced_ids
            requests.append(child)
        return requests

    def _check_tokens(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        vocab_size = self._model_config.vocab_size
        named = [("prompt token", *item) for item in enumerate(token_ids)]
        named += [("stop_token_ids entry", *item) for item in enumerate(params.stop_token_ids)]
        for what, position, token_id in named:
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"{what} {position} is {token_id}; accepted are ids in [0, {vocab_size}): "
                    "use the model's own tokenizer"
                )
        if params.stop and self._make_decoder is None:
            raise ConfigError(
                f"stop={params.stop!r} needs a tokenizer, and the model folder has no tokenizer.json; use stop_token_ids"
            )

    def _make_request(
        self, token_ids: Sequence[int], params: SamplingParams, prompt: str | None
    ) -> Request:
        self._num_requests += 1
        seed = params.seed
        if seed is None:
            seed = (self._config.seed + self._num_requests * _SEED_STRIDE) % 2**63
        request = Request(
            request_id=str(self._num_requests),
            prompt=prompt,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            draws=Draws(seed),
            eos_token_ids=self._model_config.eos_token_ids,
        )
        if params.has_penalties:
            vocab_size = self._model_config.vocab_size
            request.token_counts = TokenCounts(vocab_size, token_ids, self._device)
        if params.stop and self._make_decoder is not None:
            request.stop_strings = StopStrings(
                params.stop,
                include_in_text=params.include_stop_str_in_output,
                decode=self._make_decoder(),
            )
        return request

    def _forced_ids(self, request: Request, forcing: Forcing) -> NDArray[np.int16]:
        """Check a trace against a request and return its ids, -1 in rows that are not valid."""
        trace = forcing.trace
        spec = self._model_config.routing_spec
        expected = (spec.layer_ids, spec.num_layers, spec.num_experts, spec.top_k)
        found = (trace.layer_ids, trace.num_layers, trace.num_experts, trace.top_k)
        if expected != found:
            raise TraceMismatchError(
                f"the trace has (layer_ids, num_layers, num_experts, top_k) = {found}, the model {expected}; "
                "replay a trace of this model"
            )
        needed = request.max_len - 1
        is_whole = trace.start == 0 and trace.end >= needed and trace.is_complete
        if forcing.on_missing == "error" and not is_whole:
            raise TraceMismatchError(
                f"the trace covers tokens [{trace.start}, {trace.end}), {int(trace.valid.sum())} of them valid; "
                f"{request.num_prompt_tokens} prompt tokens and max_tokens={request.params.max_tokens} need a valid "
                f"row for each of [0, {needed}): lower max_tokens, merge the missing rows, or pass on_missing='native'"
            )
        covered = min(request.num_prompt_tokens, trace.end)
        if trace.start < covered:
            trace.slice(trace.start, covered).validate(request.token_ids[:covered])
        ids = np.full((trace.end, *trace.ids.shape[1:]), MISSING_ID, np.int16)
        ids[trace.start :][trace.valid] = trace.ids[trace.valid]
        return ids
