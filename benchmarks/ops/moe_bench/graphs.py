"""Times of CUDA graphs: several layers back to back in one graph, so that no launch waits for the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Captured", "GraphTimer", "Timer", "profiled"]

_WARM_UP_RUNS = 2


class Captured(Protocol):
    """Some calls that can be run again."""

    @property
    def outputs(self) -> Sequence[Tensor]:
        """What the calls return; every run writes the same tensors again."""
        ...

    def replay(self) -> None:
        """Run the calls once, and wait."""
        ...

    def times(self, count: int) -> list[float]:
        """Run them some times and return the microseconds of each run."""
        ...


class Timer(Protocol):
    """What turns calls into something that can be run again and timed."""

    def capture(self, calls: Sequence[Callable[[], Tensor]]) -> Captured:
        """Record calls in their order."""
        ...


class _CapturedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[Tensor]) -> None:
        self.outputs = outputs
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()
        torch.cuda.synchronize()

    def times(self, count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]  # fmt: skip
        for begin, end in events:
            begin.record()
            self._graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [1000 * begin.elapsed_time(end) for begin, end in events]


class GraphTimer:
    """Records calls as one CUDA graph and times its replays with events."""

    def capture(self, calls: Sequence[Callable[[], Tensor]]) -> _CapturedGraph:
        """Run the calls twice, outside the graph, so that kernels are built and tuned; then record them.

        Args:
            calls: Each returns a tensor that stays alive.

        Returns:
            The graph.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        return _CapturedGraph(graph, outputs)


@contextmanager
def profiled(is_on: bool) -> Iterator[None]:
    """Mark a region for a profiler that starts at cudaProfilerStart (`nsys -c cudaProfilerApi`, `ncu --profile-from-start off`)."""
    if is_on:
        torch.cuda.cudart().cudaProfilerStart()
    try:
        yield
    finally:
        if is_on:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
