"""From a schedule to the inputs of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from routing_replay.capture import BlockRef, RowSpan
from routing_replay.engine.draws import Draws
from routing_replay.engine.graphs import GraphShape
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import plain_inputs
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.engine.scheduler import ScheduledRequest
from routing_replay.engine.step_buffers import StepArrays, StepBuffers, StepSize, StepTensors
from routing_replay.models import SequenceSpan, StepInputs

__all__ = ["StepBuilder", "row_spans"]


def row_spans(parts: Sequence[ScheduledRequest]) -> list[RowSpan]:
    """Return which rows of a step belong to which request.

    Args:
        parts: The step, in order.

    Returns:
        One span for each part.
    """
    return [
        RowSpan(
            request_id=part.request.request_id,
            start=part.start,
            num_rows=part.num_tokens,
            blocks=part.request.blocks,
        )
        for part in parts
    ]


@dataclass(slots=True)
class _TableRow:
    """What the host's table holds for a slot: the list of blocks that it was written from, and how many of them."""

    blocks: list[BlockRef] | None = None
    count: int = 0


class StepBuilder:
    """Fills the inputs of steps; keeps a block table for each slot of a running request.

    Args:
        max_num_rows: Rows of the largest step.
        max_num_seqs: Most running requests.
        max_blocks: Blocks of the longest sequence.
        block_size: Tokens of a block.
        device: Where the model runs.
    """

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._max_num_seqs = max_num_seqs
        self.buffers = StepBuffers(
            StepSize(max_num_rows, max_num_seqs, max_num_rows),
            max_blocks=max_blocks,
            num_slots=max_num_seqs + 1,
            device=device,
        )
        self._tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._table_rows = [_TableRow() for _ in range(max_num_seqs)]

    def build(
        self,
        parts: Sequence[ScheduledRequest],
        *,
        shape: GraphShape | None = None,
        capture_step: int = 0,
    ) -> tuple[StepTensors, StepInputs]:
        """Fill the inputs of a step and copy them to the device.

        Args:
            parts: The step, requests with one token first.
            shape: The graph that will run it, with tokens and sequences to fill up to; None adds none.
            capture_step: The number under which a graph's routing leaves.

        Returns:
            The device's tensors, and what the model is given, but for tokens that are still being sampled. Those of one shape
            are at the same addresses in every step; of a shape that is no decode but for what a token is sampled with.

        Runtime: one asynchronous copy to the device.
        """
        size = self._size(parts, shape)
        arrays = self.buffers.arrays(size)
        self._fill_rows(arrays, parts)
        self._fill_samples(arrays, parts)
        arrays.capture_step[0] = capture_step
        tensors = self.buffers.upload(size)
        return tensors, self._inputs(arrays, tensors, parts, shape)

    def _size(self, parts: Sequence[ScheduledRequest], shape: GraphShape | None) -> StepSize:
        num_samples = sum(part.num_samples for part in parts)
        if shape is None:
            return StepSize(sum(part.num_tokens for part in parts), len(parts), num_samples)
        count = shape.num_tokens
        return StepSize(count, min(count, self._max_num_seqs), count if shape.is_decode else num_samples)  # fmt: skip

    def inputs_of_shape(
        self, shape: GraphShape, *, capture_step: int = 0
    ) -> tuple[StepTensors, StepInputs]:
        """Return a step of padding alone, for a CUDA graph to be recorded with.

        Args:
            shape: Of the graph.
            capture_step: As for `build`.

        Returns:
            As `build`.
        """
        return self.build((), shape=shape, capture_step=capture_step)

    def probe(self, num_rows: int) -> tuple[StepTensors, StepInputs]:
        """Return a step of token 0 alone, in sequences as long as they may be, for what has to be tried before requests come.

        Args:
            num_rows: Its tokens, at most those of the largest step.

        Returns:
            As `build`; keys and values go to the first blocks.
        """
        longest = self._tables.shape[1] * self._block_size
        parts: list[ScheduledRequest] = []
        for slot, first in enumerate(range(0, num_rows, longest)):
            count = min(longest, num_rows - first)
            request = Request(
                request_id=f"probe-{slot}",
                prompt=None,
                token_ids=[0] * count,
                num_prompt_tokens=count,
                params=SamplingParams(max_tokens=1, temperature=0.0),
                draws=Draws(0),
                eos_token_ids=(),
                slot=slot,
                blocks=[BlockRef(index, 0) for index in range(-(-count // self._block_size))],
            )
            part = ScheduledRequest(
                request=request, start=0, num_tokens=count, num_samples=1, first_output=0
            )
            parts.append(part)
        return self.build(parts)

    def _fill_rows(self, arrays: StepArrays, parts: Sequence[ScheduledRequest]) -> None:
        size, num_parts = self._block_size, len(parts)
        counts = np.array([part.num_tokens for part in parts], np.int64)
        starts = np.array([part.start for part in parts], np.int64)
        ends = np.cumsum(counts)
        num_rows = int(counts.sum())
        for index, part in enumerate(parts):
            arrays.block_tables[index] = self._table(part.request)
        owner = np.repeat(np.arange(num_parts), counts)
        positions = np.arange(num_rows) + np.repeat(starts - (ends - counts), counts)
        blocks = arrays.block_tables[owner, positions // size].astype(np.int64)
        arrays.positions[:num_rows] = positions
        arrays.slot_mapping[:num_rows] = blocks * size + positions % size
        arrays.query_starts[0] = 0
        arrays.query_starts[1 : num_parts + 1] = ends
        arrays.context_lens[:num_parts] = starts + counts
        self._fill_tokens(arrays, parts)
        self._pad_rows(arrays, num_rows, num_parts)

    def _pad_rows(self, arrays: StepArrays, num_rows: int, num_parts: int) -> None:
        """Tokens whose keys and values go nowhere, in sequences of a row, or none, that attend to nothing; the rest in none."""
        arrays.given_tokens[num_rows:] = 0
        arrays.token_source[num_rows:] = self._given(num_rows, len(arrays.token_source))
        arrays.positions[num_rows:] = 0
        arrays.slot_mapping[num_rows:] = -1
        arrays.block_tables[num_parts:] = 0
        arrays.context_lens[num_parts:] = 0
        num_padding = len(arrays.query_starts) - num_parts - 1
        starts = num_rows + 1 + np.arange(num_padding)
        arrays.query_starts[num_parts + 1 :] = np.minimum(starts, len(arrays.positions))

    def _given(self, first: int, end: int) -> NDArray[np.int64]:
        """Where the given tokens of rows stand."""
        return self.buffers.first_given + np.arange(first, end)

    def _fill_tokens(self, arrays: StepArrays, parts: Sequence[ScheduledRequest]) -> None:
        """Tokens that are known are given; one that is still being sampled is read from its slot."""
        first = 0
        for part in parts:
            end = first + part.num_tokens
            known = part.input_tokens
            arrays.given_tokens[first : first + len(known)] = known
            arrays.token_source[first:end] = self._given(first, end)
            if len(known) < part.num_tokens:
                arrays.given_tokens[end - 1] = 0
                arrays.token_source[end - 1] = part.request.slot
            first = end

    def _fill_samples(self, arrays: StepArrays, parts: Sequence[ScheduledRequest]) -> None:
        rows: list[int] = []
        end = 0
        for part in parts:
            end += part.num_tokens
            rows += range(end - part.num_samples, end)
        requests = [part.request for part in parts for _ in range(part.num_samples)]
        output_index = [part.first_output + i for part in parts for i in range(part.num_samples)]
        count = len(rows)
        arrays.sample_rows[:count] = rows
        arrays.sample_slots[:count] = [request.slot for request in requests]
        arrays.temperature[:count], arrays.uniform[:count] = plain_inputs(requests, output_index)
        arrays.sample_rows[count:] = np.arange(count, len(arrays.sample_rows))
        arrays.sample_slots[count:] = self._max_num_seqs  # a slot that nobody reads
        arrays.temperature[count:] = 0.0
        arrays.uniform[count:] = 0.0

    def _table(self, request: Request) -> NDArray[np.int32]:
        """The block table of a running request; only blocks that are new to it are written."""
        row, state = self._tables[request.slot], self._table_rows[request.slot]
        if state.blocks is not request.blocks:  # a request is given a new list whenever it starts
            state.blocks, state.count = request.blocks, 0
        for index in range(state.count, len(request.blocks)):
            row[index] = request.blocks[index].block_id
        state.count = len(request.blocks)
        return row

    @property
    def _is_laid_out_by_spans(self) -> bool:
        """Whether steps that no graph runs go to attention by spans on the host."""
        return self._device.type == "cpu"

    def _num_blocks(self, spans: Sequence[SequenceSpan]) -> int:
        """Blocks of the longest context."""
        return max((-(-span.context_len // self._block_size) for span in spans), default=0)

    def _inputs(
        self,
        arrays: StepArrays,
        tensors: StepTensors,
        parts: Sequence[ScheduledRequest],
        shape: GraphShape | None,
    ) -> StepInputs:
        ends = arrays.query_starts[1:]
        spans = tuple(
            SequenceSpan(
                first_row=int(end) - part.num_tokens,
                num_tokens=part.num_tokens,
                context_len=part.start + part.num_tokens,
            )
            for part, end in zip(parts, ends, strict=False)
        )
        num_decodes = sum(part.num_tokens == 1 for part in parts)
        max_query_len = max((part.num_tokens for part in parts), default=1)
        if shape is not None:  # whatever sequences its rows belong to
            max_query_len = 1 if shape.is_decode else shape.num_tokens
        block_tables, decode_mask = tensors.block_tables, None
        query_starts, context_lens = tensors.query_starts, tensors.context_lens
        if shape is None and self._is_laid_out_by_spans:
            query_starts = context_lens = None
            block_tables = block_tables[:, : self._num_blocks(spans)].long()
            # A long prompt beside them does not make the decodes' padding longer.
            widest = self._num_blocks(spans[:num_decodes]) * self._block_size
            mask = np.arange(widest) < arrays.context_lens[:num_decodes, None]
            decode_mask = torch.from_numpy(mask[:, None, None, :])
        return StepInputs(
            token_ids=tensors.given_tokens,
            positions=tensors.positions,
            slot_mapping=tensors.slot_mapping,
            block_tables=block_tables,
            spans=spans,
            num_decodes=num_decodes,
            decode_mask=decode_mask,
            query_starts=query_starts,
            context_lens=context_lens,
            max_query_len=max_query_len,
        )
