"""The runner: launches steps on the device, and collects what they sample and how they route."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from routing_replay.capture import (
    CapturePipeline,
    DeviceCache,
    HostCache,
    ReplayBuffer,
    StepTicket,
    check_capture_support,
)
from routing_replay.engine.canary_steps import CanarySteps
from routing_replay.engine.config import ResolvedConfig, capture_features
from routing_replay.engine.graphs import GraphShape, StepGraphs, graph_shapes, recorder_of
from routing_replay.engine.mtp_drafting import MtpDrafter
from routing_replay.engine.outputs import Logprob
from routing_replay.engine.sampler import PendingSamples, launch_sample, score
from routing_replay.engine.scheduler import Schedule, ScheduledRequest
from routing_replay.engine.step_buffers import StepTensors
from routing_replay.engine.step_builder import StepBuilder, row_spans
from routing_replay.engine.transfers import to_device
from routing_replay.kernels import MISSING_ID
from routing_replay.kernels.sampling import PlainSamples, sample_plain
from routing_replay.models import Qwen3MoEModel, RoutingBuffers, SequenceSpan, StepInputs

__all__ = ["LaunchedStep", "ModelRunner"]

_SCORED_ROWS = 256


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device may still be running.

    Attributes:
        schedule: What it computes.
        samples: The tokens, once they are there; None where none is sampled.
        ticket: Its routing, once it is on the host; None without capture.
        prompt_logprobs: By request: the entries of the prompt tokens that follow the step's rows.
        hidden_states: `[>= T, H]`, where the model's own layers draft; None elsewhere. The next step writes over it.
    """

    schedule: Schedule
    samples: PendingSamples | None
    ticket: StepTicket | None
    prompt_logprobs: Mapping[str, list[dict[int, Logprob]]]
    hidden_states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Logits, and on a GPU the tokens drawn plainly from them."""

    logits: Tensor
    plain: PlainSamples | None


@dataclass(frozen=True, slots=True)
class _Computed:
    """What a step, or the graph of one, leaves on the device; the graph of decode steps draws, too."""

    hidden_states: Tensor
    drawn: _Drawn | None


class ModelRunner:
    """Launches steps of a model over a paged KV cache, as CUDA graphs where there is a GPU and a graph holds them.

    Attributes:
        pipeline: Where rows go; None without capture.
        graphs: What is recorded; None where nothing is.
        num_graph_steps: How many steps each graph has run, by shape and whether any experts were forced.

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
        self._config = config
        self._device = device
        self._dtype = dtype
        engine = config.engine
        self._block_size = engine.block_size
        spec = model.config.routing_spec
        num_rows = engine.max_num_batched_tokens
        self._builder = StepBuilder(
            max_num_rows=num_rows,
            max_num_seqs=engine.max_num_seqs,
            max_blocks=-(-config.max_model_len // engine.block_size),
            block_size=engine.block_size,
            device=device,
        )
        speculation = engine.speculation
        self._num_draft_layers = 0 if speculation is None else speculation.num_layers
        self._drafter = MtpDrafter(model, config, device=device) if self._num_draft_layers else None
        self._kv_cache = self._make_kv_cache()
        self._replay_buffer = ReplayBuffer(spec, num_rows=num_rows, device=device)
        self.pipeline: CapturePipeline | None = None
        if engine.enable_return_routed_experts:
            check_capture_support(capture_features(engine))
            self.pipeline = CapturePipeline(
                DeviceCache(spec, num_rows=num_rows, device=device),
                HostCache(spec, num_blocks=config.num_kv_blocks, block_size=engine.block_size),
                uncached_prefix=engine.uncached_prefix,
            )
        recorder, shapes = recorder_of(device), graph_shapes(engine)
        self.graphs: StepGraphs[_Computed] | None = None
        if recorder is not None and shapes:
            self.graphs = StepGraphs(shapes, self._step_of, recorder)
        self.num_graph_steps: Counter[tuple[GraphShape, bool]] = Counter()
        self._warm_up()

    @torch.inference_mode()
    def launch(self, schedule: Schedule, *, weights_version: int) -> LaunchedStep:
        """Launch a step.

        Args:
            schedule: The step.
            weights_version: Version of the model's weights, for the rows.

        Returns:
            The step; its results are waited for with `LaunchedStep.samples` and the pipeline's `errors`.

        Runtime: waits for the device only where prompt tokens are scored, a request wants more than a plain draw, or all
            staging slots of the capture pipeline are in use.
        """
        parts = schedule.parts
        for copy in schedule.copies:
            self._kv_cache[:, :, copy.target.block_id] = self._kv_cache[:, :, copy.source.block_id]
        is_forced = self._fill_replay_buffer(parts)
        shape = self._shape_of(parts)
        number = 0 if self.pipeline is None else self.pipeline.claim_step()
        tensors, step = self._builder.build(parts, shape=shape, capture_step=number)
        if shape is None:
            computed = _Computed(self._run_model(tensors, step, is_forced=is_forced), None)
        else:
            assert self.graphs is not None
            computed = self.graphs.replay(shape, is_forced=is_forced)
            self.num_graph_steps[shape, is_forced] += 1
        hidden_states = computed.hidden_states
        drawn = computed.drawn or self._draw(tensors, hidden_states)
        ticket: StepTicket | None = None
        if self.pipeline is not None:
            ticket = self.pipeline.submit(
                row_spans(parts),
                num_reset=len(tensors.positions),
                weights_version=weights_version,
                is_gathered=shape is not None,
            )
        samples = self._sample(parts, tensors, drawn)
        scored = self._score_prompts(parts, step.spans, hidden_states)
        return LaunchedStep(schedule, samples, ticket, scored, None if self._drafter is None else hidden_states)  # fmt: skip

    def draft(self, launched: LaunchedStep, ends: Sequence[int]) -> None:
        """Let the model's own layers draft for the requests of a step, before the next step; without them do nothing.

        Args:
            launched: The step; its requests have their new tokens.
            ends: Of each part of it: one past its last accepted token.

        Runtime: one host sync where it drafts.
        """
        if self._drafter is not None and launched.hidden_states is not None:
            parts = launched.schedule.parts
            self._drafter.draft(parts, ends, launched.hidden_states, self._kv_cache)

    def release(self) -> None:
        """Give back the memory of keys, values and graphs; `acquire` makes them anew.

        Runtime: synchronous.
        """
        if self.graphs is not None:
            self.graphs.clear()
        self._kv_cache = torch.empty(0, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def acquire(self) -> None:
        """Make keys, values and graphs anew, after `release` or where the model's weights have moved.

        Runtime: synchronous; as long as the start of the engine without loading.
        """
        self._kv_cache = self._make_kv_cache()
        self._warm_up()

    def recover(self) -> None:
        """Put what a failed step may have left half done back to where a step expects it.

        Runtime: synchronous.
        """
        if self.pipeline is not None:
            self.pipeline.device_cache.reset()
        if self.model.workspace is not None:
            self.model.workspace.zero_()  # the counters of a launch that did not come to its end
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_kv_cache(self) -> Tensor:
        config = self.model.config
        shape = (config.num_layers + self._num_draft_layers, 2, self._config.num_kv_blocks, self._block_size,
                 config.num_key_value_heads, config.head_dim)  # fmt: skip
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _shape_of(self, parts: Sequence[ScheduledRequest]) -> GraphShape | None:
        """The graph for a step, or None."""
        if self.graphs is None:
            return None
        is_decode = all(part.num_tokens == part.num_samples == 1 for part in parts)
        return self.graphs.shape_of(sum(part.num_tokens for part in parts), is_decode=is_decode)

    def _step_of(self, shape: GraphShape) -> Callable[[bool], _Computed]:
        """What the graph of a shape runs; how many rows of a step are sampled is known only of decodes."""
        tensors, step = self._builder.inputs_of_shape(shape)

        def run(is_forced: bool) -> _Computed:
            hidden_states = self._run_model(tensors, step, is_forced=is_forced)
            if self.pipeline is not None:
                self.pipeline.staging.gather(shape.num_tokens, tensors.capture_step)
            return _Computed(hidden_states, self._draw(tensors, hidden_states) if shape.is_decode else None)  # fmt: skip

        return run

    def _run_model(self, tensors: StepTensors, step: StepInputs, *, is_forced: bool) -> Tensor:
        """Tokens in, hidden states `[T, H]` out."""
        buffers = RoutingBuffers(
            device_cache=None if self.pipeline is None else self.pipeline.device_cache,
            replay_buffer=self._replay_buffer if is_forced else None,
        )
        tokens = self._builder.buffers.all_tokens.index_select(0, tensors.token_source)
        return self.model(replace(step, token_ids=tokens), self._kv_cache, buffers)

    def _draw(self, tensors: StepTensors, hidden_states: Tensor) -> _Drawn:
        """Draw a token of every row that is sampled, and keep it for the next step to read."""
        logits = self.model.compute_logits(hidden_states.index_select(0, tensors.sample_rows))
        if self._device.type != "cuda":
            return _Drawn(logits, None)
        plain = sample_plain(logits, tensors.temperature, tensors.uniform)
        kept = self._builder.buffers.sampled_tokens
        kept.index_copy_(0, tensors.sample_slots, plain.token_ids)
        return _Drawn(logits, plain)

    def _sample(
        self, parts: Sequence[ScheduledRequest], tensors: StepTensors, drawn: _Drawn
    ) -> PendingSamples | None:
        """Finish what the step has drawn plainly, and keep the tokens for the next step to read."""
        rows = [(part, index) for part in parts for index in range(part.num_samples)]
        count = len(rows)
        if not count:
            return None
        plain = None if drawn.plain is None else PlainSamples(drawn.plain.packed[:count])
        for part in parts:
            counts = part.request.token_counts
            if counts is not None and part.drafts:
                # What follows a draft is penalized for it.
                drafts = to_device(part.drafts, torch.int64, self._device)
                counts.place(part.first_output, drafts)
        samples = launch_sample(
            drawn.logits[:count],
            plain,
            [part.request for part, _ in rows],
            self._config.engine.logprobs_mode,
            output_index=[part.first_output + index for part, index in rows],
            uniform=tensors.uniform[:count],
        )
        if plain is None or samples.token_ids.data_ptr() != plain.token_ids.data_ptr():
            # Rows that ask for more than a plain draw have another token than the one that the step itself has kept.
            self._builder.buffers.sampled_tokens[tensors.sample_slots[:count]] = samples.token_ids
        return samples

    def _score_prompts(
        self,
        parts: Sequence[ScheduledRequest],
        spans: Sequence[SequenceSpan],
        hidden_states: Tensor,
    ) -> dict[str, list[dict[int, Logprob]]]:
        """Score the prompt tokens that follow the rows of a step, a few rows at a time: logits are large."""
        scored: dict[str, list[dict[int, Logprob]]] = {}
        for part, span in zip(parts, spans, strict=True):
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

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record all graphs anew.

        Runtime: synchronous; for each shape and form the time of two launches without a graph.
        """
        if self.graphs is not None:
            self.graphs.clear()
            self.graphs.record_all(forced=self._forms)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what the runs ahead of recordings had on a stream that no step uses
        if self.pipeline is not None:
            # Recording has run the layers outside of any step.
            self.pipeline.device_cache.reset()

    @property
    def _forms(self) -> Sequence[bool]:
        """Whether experts are forced: without capture nobody is."""
        return (False,) if self.pipeline is None else (False, True)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Record the graphs, and prove on real steps that every layer's experts come back from where they belong."""
        self.record_graphs()
        if self.pipeline is None:
            return
        canary = CanarySteps(self.pipeline, self._builder, self._replay_buffer, block_size=self._block_size)  # fmt: skip
        num_experts = self.model.config.routing_spec.num_experts
        num_rows = min(self._block_size, num_experts, self._config.engine.max_num_batched_tokens)
        canary.run_step(num_rows, partial(self._run_model, is_forced=True))
        if self.graphs is None:
            return
        num_places = self._config.num_kv_blocks * self._block_size
        for (shape, is_forced), replay in self.graphs.recorded.items():
            num_rows = min(shape.num_tokens, num_places)
            canary.run_graph(shape, replay, num_rows=num_rows, is_forced=is_forced)
