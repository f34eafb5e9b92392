"""Steps before the first request: known experts are forced, and must come back from where they belong."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from routing_replay.capture import (
    BlockRef,
    CapturePipeline,
    ReplayBuffer,
    RowSpan,
    canary_ids,
    check_canary,
)
from routing_replay.engine.graphs import GraphShape
from routing_replay.engine.step_buffers import StepTensors
from routing_replay.engine.step_builder import StepBuilder
from routing_replay.models import StepInputs

__all__ = ["CanarySteps"]

_REQUEST = "canary"


class CanarySteps:
    """Runs real steps on block 0 and the ones after it, in which nothing is cached yet.

    Args:
        pipeline: What is to be proved.
        builder: Makes the inputs of steps.
        replay_buffer: Where forced ids are read.
        block_size: Tokens of a KV block.
    """

    def __init__(
        self,
        pipeline: CapturePipeline,
        builder: StepBuilder,
        replay_buffer: ReplayBuffer,
        *,
        block_size: int,
    ) -> None:
        self._pipeline = pipeline
        self._builder = builder
        self._replay_buffer = replay_buffer
        self._block_size = block_size

    def run_step(self, num_rows: int, run: Callable[[StepTensors, StepInputs], object]) -> None:
        """Prove a step that no graph runs.

        Args:
            num_rows: Its tokens.
            run: Runs a step whose experts are forced.

        Raises:
            CaptureError: A layer's experts did not come back, or came back from elsewhere; it is named.
        """
        expected = self._force(num_rows)
        tensors, step = self._builder.probe(num_rows)
        run(tensors, step)
        self._read_back(expected, num_rows, is_gathered=False, is_forced=True)

    def run_graph(
        self,
        shape: GraphShape,
        replay: Callable[[], object],
        *,
        num_rows: int,
        is_forced: bool,
    ) -> None:
        """Prove a graph. What one routes natively nobody knows; that every layer has written every row is checked.

        Args:
            shape: Of the graph.
            replay: Runs it.
            num_rows: Rows to read back, at most those of the shape.
            is_forced: Whether it forces experts.

        Raises:
            CaptureError: As `run_step`.
        """
        expected = self._force(num_rows)
        self._builder.inputs_of_shape(shape, capture_step=self._pipeline.claim_step())
        replay()
        self._read_back(expected, shape.num_tokens, is_gathered=True, is_forced=is_forced)

    def _force(self, num_rows: int) -> NDArray[np.int16]:
        expected = canary_ids(self._pipeline.device_cache.spec, num_rows)
        self._replay_buffer.fill(expected)
        return expected

    def _read_back(
        self, expected: NDArray[np.int16], num_reset: int, *, is_gathered: bool, is_forced: bool
    ) -> None:
        pipeline, num_rows = self._pipeline, len(expected)
        blocks = [BlockRef(index, 0) for index in range(-(-num_rows // self._block_size))]
        span = RowSpan(request_id=_REQUEST, start=0, num_rows=num_rows, blocks=blocks)
        pipeline.begin(_REQUEST, (), 0)
        ticket = pipeline.submit(
            [span], num_reset=num_reset, weights_version=0, is_gathered=is_gathered
        )
        errors = pipeline.errors(ticket)
        captured = pipeline.host_cache.take(_REQUEST, num_rows)
        pipeline.free(_REQUEST)
        if errors:
            raise errors[_REQUEST]
        if is_forced:
            check_canary(pipeline.device_cache.spec, expected, captured.ids)
