"""The runner: builds a step's inputs, runs the model, and collects routing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from routing_replay.capture import (
    BlockRef,
    CapturePipeline,
    DeviceCache,
    HostCache,
    ReplayBuffer,
    RowSpan,
    canary_ids,
    check_canary,
    check_capture_support,
)
from routing_replay.engine.config import ResolvedConfig, capture_features
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.sampler import score
from routing_replay.engine.scheduler import Schedule, ScheduledRequest
from routing_replay.errors import CaptureError
from routing_replay.kernels import MISSING_ID
from routing_replay.models import Qwen3MoEModel, RoutingBuffers, SequenceSpan, StepInputs

__all__ = ["ModelRunner", "StepResult"]


_SCORED_ROWS = 256


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        logits: float32 `[S, vocab_size]`, one row per part that samples, in order.
        prompt_logprobs: By request: the entries of the prompt tokens that follow the step's rows.
        errors: Requests whose routing was not captured.
    """

    logits: Tensor
    prompt_logprobs: dict[str, list[dict[int, Logprob]]]
    errors: dict[str, CaptureError]


class ModelRunner:
    """Runs steps of a model over a paged KV cache.

    Args:
        model: The decoder.
        config: Sizes of the cache and of a step.
        device: Where the model runs.
        dtype: Data type of keys and values.
    """

    def __init__(
        self,
        model: Qwen3MoEModel,
        config: ResolvedConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self._block_size = config.engine.block_size
        self._device = device
        spec = model.config.routing_spec
        num_rows = config.engine.max_num_batched_tokens
        self._kv_cache = torch.zeros(
            (
                model.config.num_layers,
                2,
                config.num_kv_blocks,
                self._block_size,
                model.config.num_key_value_heads,
                model.config.head_dim,
            ),
            dtype=dtype,
            device=device,
        )
        self._replay_buffer = ReplayBuffer(spec, num_rows=num_rows, device=device)
        self.pipeline: CapturePipeline | None = None
        if config.engine.enable_return_routed_experts:
            check_capture_support(capture_features(config.engine))
            self.pipeline = CapturePipeline(
                DeviceCache(spec, num_rows=num_rows, device=device),
                HostCache(spec, num_blocks=config.num_kv_blocks, block_size=self._block_size),
                uncached_prefix=config.engine.uncached_prefix,
            )
            self._run_canary(self.pipeline)

    @torch.inference_mode()
    def run(self, schedule: Schedule, *, weights_version: int) -> StepResult:
        """Run a step.

        Args:
            schedule: The step.
            weights_version: Version of the model's weights, for the rows.

        Returns:
            Logits of the parts that sample, logprobs of prompt tokens, and the requests whose rows were bad.
        """
        parts = schedule.parts
        for copy in schedule.copies:
            self._kv_cache[:, :, copy.target.block_id] = self._kv_cache[:, :, copy.source.block_id]
        spans = [
            RowSpan(
                request_id=part.request.request_id,
                start=part.start,
                num_rows=part.num_tokens,
                blocks=part.request.blocks,
            )
            for part in parts
        ]
        tokens = [
            part.request.token_ids[part.start : part.start + part.num_tokens] for part in parts
        ]
        step = self._step_inputs(spans, tokens)
        hidden_states = self._forward(step, is_forced=self._fill_replay_buffer(parts))
        errors: dict[str, CaptureError] = {}
        if self.pipeline is not None:
            errors = self.pipeline.collect(
                spans, num_reset=step.token_ids.shape[0], weights_version=weights_version
            )
        last_rows = [
            span.first_row + span.num_tokens - 1
            for span, part in zip(step.spans, parts, strict=True)
            if part.samples
        ]
        logits = self.model.compute_logits(hidden_states[last_rows])
        return StepResult(logits, self._score_prompts(parts, step, hidden_states), errors)

    def _score_prompts(
        self, parts: Sequence[ScheduledRequest], step: StepInputs, hidden_states: Tensor
    ) -> dict[str, list[dict[int, Logprob]]]:
        """Score the prompt tokens that follow the rows of a step, a few rows at a time: logits are large."""
        scored: dict[str, list[dict[int, Logprob]]] = {}
        for part, span in zip(parts, step.spans, strict=True):
            request, entries = part.request, list[dict[int, Logprob]]()
            rows = part.prompt_logprob_rows
            for low in range(rows.start, rows.stop, _SCORED_ROWS):
                high = min(low + _SCORED_ROWS, rows.stop)
                chunk = hidden_states[span.first_row + low : span.first_row + high]
                following = request.token_ids[part.start + low + 1 : part.start + high + 1]
                count = request.params.prompt_logprobs
                assert count is not None
                entries += score(self.model.compute_logits(chunk), following, count)
            if entries:
                scored[request.request_id] = entries
        return scored

    def _forward(self, step: StepInputs, *, is_forced: bool) -> Tensor:
        buffers = RoutingBuffers(
            device_cache=None if self.pipeline is None else self.pipeline.device_cache,
            replay_buffer=self._replay_buffer if is_forced else None,
        )
        return self.model(step, self._kv_cache, buffers)

    def _fill_replay_buffer(self, parts: Sequence[ScheduledRequest]) -> bool:
        """Place the step's forced ids; return whether any request is forced."""
        if all(part.request.forced_ids is None for part in parts):
            return False
        spec = self.model.config.routing_spec
        num_rows = sum(part.num_tokens for part in parts)
        rows = np.full((num_rows, spec.num_moe_layers, spec.top_k), MISSING_ID, np.int16)
        first = 0
        for part in parts:
            if part.request.forced_ids is not None:
                forced = part.request.forced_ids[part.start : part.start + part.num_tokens]
                rows[first : first + len(forced)] = forced
            first += part.num_tokens
        self._replay_buffer.fill(rows)
        return True

    def _step_inputs(self, spans: Sequence[RowSpan], tokens: Sequence[Sequence[int]]) -> StepInputs:
        """Flatten the sequences of a step."""
        size = self._block_size
        num_decodes = sum(span.num_rows == 1 for span in spans)
        positions = np.concatenate([np.arange(s.start, s.start + s.num_rows) for s in spans])
        widest = max(-(-(span.start + span.num_rows) // size) for span in spans)
        tables = np.zeros((len(spans), widest), np.int64)
        for row, span in enumerate(spans):
            used = -(-(span.start + span.num_rows) // size)
            tables[row, :used] = [block.block_id for block in span.blocks[:used]]
        owner = np.repeat(np.arange(len(spans)), [span.num_rows for span in spans])
        slots = tables[owner, positions // size] * size + positions % size
        ends = np.cumsum([span.num_rows for span in spans])
        context = np.array([span.start + span.num_rows for span in spans])
        mask = np.arange(widest * size) < context[:num_decodes, None]
        return StepInputs(
            token_ids=self._to_device(np.concatenate([np.asarray(t, np.int64) for t in tokens])),
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slots),
            block_tables=self._to_device(tables),
            spans=tuple(
                SequenceSpan(
                    first_row=int(end) - s.num_rows, num_tokens=s.num_rows, context_len=int(length)
                )
                for s, end, length in zip(spans, ends, context, strict=True)
            ),
            num_decodes=num_decodes,
            decode_mask=self._to_device(mask[:, None, None, :]),
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    @torch.inference_mode()
    def _run_canary(self, pipeline: CapturePipeline) -> None:
        """Force known ids through one real step and read them back (block 0 is written; nothing is cached yet)."""
        spec = self.model.config.routing_spec
        num_rows = min(self._block_size, spec.num_experts, pipeline.device_cache.num_rows)
        expected = canary_ids(spec, num_rows)
        span = RowSpan(request_id="canary", start=0, num_rows=num_rows, blocks=(BlockRef(0, 0),))
        step = self._step_inputs([span], [[0] * num_rows])
        self._replay_buffer.fill(expected)
        self._forward(step, is_forced=True)
        pipeline.host_cache.begin(span.request_id)
        errors = pipeline.collect([span], num_reset=num_rows, weights_version=0)
        captured = pipeline.host_cache.take(span.request_id, num_rows)
        pipeline.host_cache.free(span.request_id)
        if errors:
            raise errors[span.request_id]
        check_canary(spec, expected, captured.ids)
