"""The engine's core: requests in, steps, finished requests out; shared by everything that serves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.engine.config import EngineConfig, resolve_config
from routing_replay.engine.kv_blocks import KVBlocks
from routing_replay.engine.request import Request
from routing_replay.engine.runner import ModelRunner
from routing_replay.engine.sampler import sample
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.scheduler import ScheduledRequest, Scheduler
from routing_replay.errors import CaptureError, ConfigError, TraceMismatchError
from routing_replay.kernels import MISSING_ID
from routing_replay.models import load_model
from routing_replay.trace import RoutingTrace

__all__ = ["EngineCore"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that request seeds differ for 2^64 requests


class EngineCore:
    """Scheduler, KV blocks and runner of one model.

    Args:
        folder: A Hugging Face Qwen3-MoE folder.
        dtype: torch.bfloat16 or torch.float32.
        device: Where the model runs.
        config: Settings.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, config: EngineConfig
    ) -> None:
        model = load_model(folder, dtype=dtype, device=device)
        self.model_config = model.config
        kv_heads_bytes = model.config.num_key_value_heads * model.config.head_dim * dtype.itemsize
        self.config = resolve_config(
            config, model.config, kv_bytes_per_token=2 * model.config.num_layers * kv_heads_bytes
        )
        self._engine_config = self.config.engine
        self.kv_blocks = KVBlocks(
            self.config.num_kv_blocks,
            self._engine_config.block_size,
            enable_prefix_caching=self._engine_config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(self.config, self.kv_blocks)
        self.runner = ModelRunner(model, self.config, device=device, dtype=dtype)
        self.weights_version = 0
        self._device = device
        self._num_requests = 0

    def make_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        replay: RoutingTrace | None = None,
    ) -> Request:
        """Check a prompt and make a request of it; nothing runs yet.

        Args:
            token_ids: The prompt.
            params: How to sample.
            prompt: Its text, if it was text.
            replay: Routing to force.

        Returns:
            The request.

        Raises:
            ConfigError: The prompt is empty or too long, or holds a token that the model does not have.
            TraceMismatchError: The trace does not fit the prompt or the model.
        """
        vocab_size = self.model_config.vocab_size
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"prompt token {position} is {token_id}; accepted are ids in [0, {vocab_size}): "
                    "use the model's own tokenizer"
                )
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
        self.scheduler.check(request)
        if replay is not None:
            request.forced_ids = self._forced_ids(request, replay)
        return request

    def run(self, requests: Sequence[Request]) -> dict[str, RoutingTrace | None]:
        """Run requests to their end.

        Args:
            requests: Made by `make_request`.

        Returns:
            The trace of each request by id; None without capture, or where the request failed.
        """
        for request in requests:
            self.scheduler.add(request)
        finished: dict[str, RoutingTrace | None] = {}
        try:
            while self.scheduler.has_work:
                finished.update(self.step())
        finally:
            # Whatever ends the loop early, no block and no row stays behind.
            for request in self.scheduler.clear():
                self._forget(request)
        return finished

    def step(self) -> dict[str, RoutingTrace | None]:
        """Run one step.

        Returns:
            The requests that it finished, with their traces.
        """
        parts, admitted = self.scheduler.schedule()
        pipeline = self.runner.pipeline
        if pipeline is not None:
            for request in admitted:
                num_hits = request.num_cached // self._engine_config.block_size
                pipeline.host_cache.begin(request.request_id, request.blocks[:num_hits])
        result = self.runner.run(parts)
        sampling = [part.request for part in parts if part.samples]
        sampled = sample(result.logits, sampling, self._engine_config.logprobs_mode)
        for part in parts:
            self._advance(part, result.errors)
        for request, token in zip(sampling, sampled, strict=True):
            if request.finish_reason is None:
                request.accept(token.token_id, token.logprobs)
        return {request.request_id: self._finish(request) for request in self.scheduler.retire()}

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.kv_blocks.reset_prefix_cache()

    def _advance(self, part: ScheduledRequest, errors: dict[str, CaptureError]) -> None:
        request = part.request
        request.num_computed = part.start + part.num_tokens
        error = errors.get(request.request_id)
        if error is not None:
            request.fail(error)
        else:
            self.kv_blocks.publish(request, part.start)

    def _finish(self, request: Request) -> RoutingTrace | None:
        pipeline = self.runner.pipeline
        trace: RoutingTrace | None = None
        if pipeline is not None and request.error is None:
            try:
                trace = pipeline.finish(
                    request.request_id, request.token_ids, weights_version=self.weights_version
                )
            except CaptureError as error:
                request.fail(error)
        self._forget(request)
        return trace

    def _forget(self, request: Request) -> None:
        if self.runner.pipeline is not None:
            self.runner.pipeline.host_cache.free(request.request_id)

    def _forced_ids(self, request: Request, trace: RoutingTrace) -> NDArray[np.int16]:
        """Check a trace against a request and return its ids, -1 in rows that are not valid."""
        spec = self.model_config.routing_spec
        expected = (spec.layer_ids, spec.num_layers, spec.num_experts, spec.top_k)
        found = (trace.layer_ids, trace.num_layers, trace.num_experts, trace.top_k)
        if expected != found:
            raise TraceMismatchError(
                f"the trace has (layer_ids, num_layers, num_experts, top_k) = {found}, the model {expected}; "
                "replay a trace of this model"
            )
        needed = request.max_len - 1
        if trace.start != 0 or trace.end < needed or not trace.is_complete:
            raise TraceMismatchError(
                f"the trace covers tokens [{trace.start}, {trace.end}), {int(trace.valid.sum())} of them valid; "
                f"{request.num_prompt_tokens} prompt tokens and max_tokens={request.params.max_tokens} need a valid "
                f"row for each of [0, {needed}): lower max_tokens, or merge the missing rows"
            )
        covered = min(request.num_prompt_tokens, trace.end)
        trace.slice(0, covered).validate(request.token_ids[:covered])
        ids = trace.ids.astype(np.int16)
        ids[~trace.valid] = MISSING_ID
        return ids
