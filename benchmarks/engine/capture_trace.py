"""What a torch.profiler trace says of the stream that the model runs on."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["gap_figures", "stream_figures"]

Event = Mapping[str, Any]


def stream_figures(events: Sequence[Event]) -> dict[str, object]:
    """Count waits by stream.

    Args:
        events: `traceEvents` of a trace with synchronisation events.

    Returns:
        The forward stream (that of most kernels), the streams of copies to the host, and how often each stream waited
        for an event of another. `forward_waits` is what must be 0; `waits_by_stream` shows that waits are seen at all.
        Some versions of the tracer leave waits out: `wait_calls` then says that the host asked for no more of them than
        there were copies, each of which needs one.
    """
    copies = Counter(
        event["args"]["stream"]
        for event in events
        if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]
    )
    waits = Counter(
        event["args"].get("stream")
        for event in events
        if event.get("cat") == "cuda_sync" and "Stream Wait" in event["name"]
    )
    forward = _forward_stream(events)
    wait_calls = sum("StreamWaitEvent" in event.get("name", "") for event in events)
    return {
        "forward_stream": forward,
        "copies_to_host_by_stream": dict(copies),
        "waits_by_stream": {str(stream): count for stream, count in waits.items()},
        "forward_waits": waits[forward],
        "wait_calls": wait_calls,
        "copies_to_host_on_forward": copies[forward],
    }


def gap_figures(events: Sequence[Event], begin_name: str, gather_name: str) -> dict[str, object]:
    """Measure idle time between kernels of the forward stream.

    Args:
        events: `traceEvents`.
        begin_name: Part of the name of a step's first kernel.
        gather_name: Part of the name of the gather.

    Returns:
        Microseconds: periods of steps; idle time between two steps, the gather's own time not counted; idle time
        within a step; the gather's duration.
    """
    forward = _forward_stream(events)
    kernels = sorted(
        (event for event in events if event.get("cat") == "kernel" and event["args"]["stream"] == forward),
        key=lambda event: event["ts"],
    )  # fmt: skip
    begins = [event["ts"] for event in kernels if begin_name in event["name"]]
    gathers = [event["dur"] for event in kernels if gather_name in event["name"]]
    between: list[float] = []
    within: list[float] = []
    since_step = 0.0
    for before, after in pairwise(kernels):
        gap = max(0.0, after["ts"] - before["ts"] - before["dur"])
        is_gather = gather_name in after["name"]
        if is_gather:
            since_step += gap
        elif begin_name in after["name"]:
            between.append(since_step + gap)
            since_step = 0.0
        else:
            within.append(gap)
    periods = [b - a for a, b in pairwise(begins)]
    return {
        "num_steps": len(begins),
        "num_gathers": len(gathers),
        "period_us": _spread(periods),
        "gap_between_steps_us": _spread(between),
        "gap_within_steps_us": _spread(within),
        "gather_us": _spread(gathers),
    }


def _forward_stream(events: Sequence[Event]) -> object:
    streams = Counter(event["args"]["stream"] for event in events if event.get("cat") == "kernel")
    return streams.most_common(1)[0][0] if streams else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "max": ordered[-1],
    }
