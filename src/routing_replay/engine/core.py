"""The engine's core: requests in, steps, finished requests out; shared by everything that serves."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.engine.config import EngineConfig, resolve_config
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.penalties import TokenCounts
from routing_replay.engine.request import Request
from routing_replay.engine.runner import ModelRunner, StepResult
from routing_replay.engine.sampler import sample
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.scheduler import Schedule, Scheduler
from routing_replay.engine.stop_strings import StopStrings
from routing_replay.errors import CaptureError, ConfigError, TraceMismatchError
from routing_replay.kernels import MISSING_ID
from routing_replay.models import check_batch_invariance, copy_weights, load_model
from routing_replay.trace import RoutingTrace

__all__ = ["EngineCore", "FinishedRequest", "Forcing"]

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


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended.

    Attributes:
        request: The request.
        trace: Its routing; None without capture, or where it failed or never computed a token.
    """

    request: Request
    trace: RoutingTrace | None


class EngineCore:
    """Scheduler, KV blocks and runner of one model.

    Args:
        folder: A Hugging Face Qwen3-MoE folder.
        dtype: torch.bfloat16 or torch.float32.
        device: Where the model runs.
        config: Settings.
        make_decoder: Returns a function from a next token to the text that it adds; None without a tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        config: EngineConfig,
        make_decoder: Callable[[], Callable[[int], str | None]] | None = None,
    ) -> None:
        model = load_model(
            folder, dtype=dtype, device=device, batch_invariant=config.batch_invariant
        )
        if config.batch_invariant:
            check_batch_invariance(model)
        self.model_config = model.config
        kv_heads_bytes = model.config.num_key_value_heads * model.config.head_dim * dtype.itemsize
        self.config = resolve_config(
            config, model.config, kv_bytes_per_token=2 * model.config.num_layers * kv_heads_bytes
        )
        self._engine_config = self.config.engine
        self.runner = ModelRunner(model, self.config, device=device, dtype=dtype)
        pipeline = self.runner.pipeline
        self.kv_blocks = KVBlocks(
            self.config.num_kv_blocks,
            self._engine_config.block_size,
            enable_prefix_caching=self._engine_config.enable_prefix_caching,
            num_usable=None if pipeline is None else pipeline.num_usable_blocks,
        )
        self.scheduler = Scheduler(self.config, self.kv_blocks)
        self.weights_version = 0
        self._make_decoder = make_decoder
        self._device = device
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
        self.scheduler.check(parent)
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

    def run(self, requests: Sequence[Request]) -> Generator[FinishedRequest, None, None]:
        """Run requests to their end.

        Args:
            requests: Made by `make_requests`.

        Yields:
            Each request as it ends. Whatever ends the iteration early, no block and no row stays behind.
        """
        for request in requests:
            self.scheduler.add(request)
        try:
            while self.scheduler.has_work:
                yield from self.step()
        finally:
            for request in self.scheduler.clear():
                self._forget(request)

    def step(self) -> list[FinishedRequest]:
        """Run one step.

        Returns:
            The requests that it finished.
        """
        schedule = self.scheduler.schedule()
        self._begin(schedule)
        result = self.runner.run(schedule, weights_version=self.weights_version)
        self._advance(schedule, result)
        sampling = [part.request for part in schedule.parts if part.samples]
        sampled = sample(result.logits, sampling, self._engine_config.logprobs_mode)
        for request, token in zip(sampling, sampled, strict=True):
            if request.finish_reason is None:
                request.accept(token.token_id, token.logprobs)
        return [self._finish(request) for request in self.scheduler.retire()]

    def abort(self, request_id: str) -> FinishedRequest | None:
        """End a request early and free what it holds.

        Args:
            request_id: A waiting or running request.

        Returns:
            The request with what it has computed, or None if there is none of that name.
        """
        request = self.scheduler.abort(request_id)
        return None if request is None else self._finish(request)

    def update_weights(
        self, tensors: Iterable[tuple[str, Tensor]], *, weights_version: int
    ) -> None:
        """Replace weights between two steps; rows computed from now on carry the new version.

        Cached prefixes are forgotten. Running requests keep the keys, values and rows that they have.

        Args:
            tensors: Names as in a Hugging Face checkpoint, and the new values; others stay as they are.
            weights_version: The new version, 0 or more.

        Raises:
            ConfigError: The version is negative.
            UnsupportedModelError: A name is unknown or a shape differs; tensors before it have been copied.
        """
        if weights_version < 0:
            raise ConfigError(f"weights_version={weights_version}; accepted is 0 or more")
        copy_weights(self.runner.model, tensors)
        self.weights_version = weights_version
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.kv_blocks.reset_prefix_cache()

    def _check_tokens(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        vocab_size = self.model_config.vocab_size
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
            seed = (self._engine_config.seed + self._num_requests * _SEED_STRIDE) % 2**63
        request = Request(
            request_id=str(self._num_requests),
            prompt=prompt,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            generator=torch.Generator(self._device).manual_seed(seed),
            eos_token_ids=self.model_config.eos_token_ids,
        )
        if params.has_penalties:
            vocab_size = self.model_config.vocab_size
            request.token_counts = TokenCounts(vocab_size, token_ids, self._device)
        if params.stop and self._make_decoder is not None:
            request.stop_strings = StopStrings(
                params.stop,
                include_in_text=params.include_stop_str_in_output,
                decode=self._make_decoder(),
            )
        return request

    def _begin(self, schedule: Schedule) -> None:
        """Copy the rows of forked blocks, and give new requests the rows that they did not compute."""
        pipeline = self.runner.pipeline
        if pipeline is None:
            return
        for copy in schedule.copies:
            pipeline.host_cache.copy_block(copy.source, copy.target)
        for request in schedule.admitted:
            num_blocks = self.kv_blocks.blocks_for(request.num_computed)
            prefix = request.blocks[:num_blocks]
            try:
                pipeline.begin(request.request_id, prefix, request.num_computed)
            except CaptureError as error:
                request.fail(error)

    def _advance(self, schedule: Schedule, result: StepResult) -> None:
        for part in schedule.parts:
            request = part.request
            request.num_computed = part.start + part.num_tokens
            request.prompt_logprobs.extend(result.prompt_logprobs.get(request.request_id, ()))
            error = result.errors.get(request.request_id)
            if error is not None:
                request.fail(error)
            if request.error is None:
                self.kv_blocks.publish(request, part.start)
            if request.params.max_tokens == 0 and request.num_computed == request.num_to_compute:
                request.finish_reason = request.finish_reason or "length"

    def _finish(self, request: Request) -> FinishedRequest:
        pipeline = self.runner.pipeline
        trace: RoutingTrace | None = None
        if pipeline is not None and request.error is None:
            # An aborted request may not have come to its last token; what it has is returned.
            num_tokens = len(request.token_ids)
            if request.finish_reason == "abort":
                num_tokens = min(num_tokens, pipeline.num_rows(request.request_id) + 1)
            try:
                if num_tokens > 1:
                    trace = pipeline.finish(request.request_id, request.token_ids[:num_tokens])
            except CaptureError as error:
                request.fail(error)
        self._forget(request)
        return FinishedRequest(request, trace)

    def _forget(self, request: Request) -> None:
        if self.runner.pipeline is not None:
            self.runner.pipeline.host_cache.free(request.request_id)

    def _forced_ids(self, request: Request, forcing: Forcing) -> NDArray[np.int16]:
        """Check a trace against a request and return its ids, -1 in rows that are not valid."""
        trace = forcing.trace
        spec = self.model_config.routing_spec
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
