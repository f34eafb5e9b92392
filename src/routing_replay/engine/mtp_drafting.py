"""Drafts by the layers of the checkpoint that predict tokens further ahead."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from routing_replay.engine.config import ResolvedConfig
from routing_replay.engine.request import DraftTail, Request
from routing_replay.engine.scheduler import ScheduledRequest
from routing_replay.engine.step_builder import StepBuilder
from routing_replay.engine.transfers import to_device
from routing_replay.models import Qwen3MoEModel

__all__ = ["MtpDrafter"]


class MtpDrafter:
    """Runs the drafting layers behind a step, over the tokens that were accepted.

    The layer of depth d takes, for a token, what the depth before left for it and the embedding of the token d + 1 further
    on; for the last tokens of a request these are drafts themselves. Keys and values of such rows are computed again with
    the next step's, when the tokens are known: a request keeps the hidden states for it. So drafts are those of one pass over
    the whole request. Where tokens come from the prefix cache or a fork, keys and values of their last rows are those of
    whoever computed them, with the tokens that followed there: such a draft may be another, never a token that is returned.

    Args:
        model: Loaded with its drafting layers.
        config: Sizes of a step; `speculative_config` says how many layers draft.
        device: Where the model runs.
    """

    def __init__(
        self, model: Qwen3MoEModel, config: ResolvedConfig, *, device: torch.device
    ) -> None:
        speculation, engine = config.engine.speculation, config.engine
        assert speculation is not None
        self._model = model
        self._device = device
        self._num_depths = speculation.num_layers
        num_kept = engine.max_num_seqs * (self._num_depths - 1)
        self._builder = StepBuilder(
            max_num_rows=engine.max_num_batched_tokens + num_kept,
            max_num_seqs=engine.max_num_seqs,
            max_blocks=-(-config.max_model_len // engine.block_size),
            block_size=engine.block_size,
            device=device,
        )

    @torch.inference_mode()
    def draft(
        self,
        parts: Sequence[ScheduledRequest],
        ends: Sequence[int],
        hidden_states: Tensor,
        kv_cache: Tensor,
    ) -> None:
        """Draft for the requests of a step that have not ended, and leave the drafts with them.

        Args:
            parts: The step.
            ends: Of each part: one past its last accepted token.
            hidden_states: `[T, H]`, what the model returned for the step's rows.
            kv_cache: `[layers, 2, num_blocks, block_size, kv_heads, head_dim]`, the drafting layers' last.

        Runtime: one host sync; as many layers as tokens are drafted; not CUDA-graph safe.
        """
        work: list[tuple[ScheduledRequest, Tensor]] = []
        first = 0
        for part, end in zip(parts, ends, strict=True):
            if part.request.finish_reason is None:
                states = hidden_states[first : first + end - part.start]
                work.append(self._with_tail(part.request, part.start, end, states))
            first += part.num_tokens
        if not work:
            return
        work.sort(key=lambda item: item[0].num_tokens != 1)
        drafted = [part for part, _ in work]
        drafts = self._run(drafted, torch.cat([states for _, states in work]), kv_cache)
        for part, tokens in zip(drafted, drafts, strict=True):
            part.request.drafts = tokens

    def _with_tail(
        self, request: Request, start: int, end: int, states: Tensor
    ) -> tuple[ScheduledRequest, Tensor]:
        """The rows to run for a request: the step's, behind those whose following tokens were only drafts before."""
        tail, num_kept = request.draft_tail, self._num_depths - 1
        if tail is not None and tail.end == start:
            start -= len(tail.hidden_states)
            states = torch.cat((tail.hidden_states, states))
        # A copy: the step's own rows may stand where the next step writes.
        request.draft_tail = DraftTail(end, states[len(states) - min(num_kept, len(states)) :].clone())  # fmt: skip
        part = ScheduledRequest(
            request=request, start=start, num_tokens=end - start, num_samples=1, first_output=0
        )
        return part, states

    def _run(
        self, parts: Sequence[ScheduledRequest], states: Tensor, kv_cache: Tensor
    ) -> list[list[int]]:
        """Run every depth; return each part's drafts."""
        tensors, step = self._builder.build(parts)
        tokens, last_rows = tensors.given_tokens, tensors.sample_rows
        newest = [part.request.token_ids[part.end] for part in parts]
        following = to_device(newest, torch.int64, self._device)
        drafts: list[Tensor] = []
        for depth in range(self._num_depths):
            # Each row's token moves one further on; behind a request's last one comes what was drafted for it.
            tokens = tokens.roll(-1).index_copy(0, last_rows, following)
            layer = kv_cache.shape[0] - self._num_depths + depth
            states = self._model.draft(
                replace(step, token_ids=tokens), states, kv_cache[layer], depth=depth
            )
            logits = self._model.compute_draft_logits(states.index_select(0, last_rows), depth=depth)  # fmt: skip
            following = logits.argmax(dim=-1)
            drafts.append(following)
        return torch.stack(drafts, dim=1).tolist()
