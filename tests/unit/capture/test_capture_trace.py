"""The figures of a profiler trace: waits are counted on the right stream, gaps at the right place."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "engine"))

from capture_trace import gap_figures, stream_figures


def _kernel(name: str, start: float, duration: float, stream: int = 7) -> dict[str, object]:
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def _wait(stream: int) -> dict[str, object]:
    return {"cat": "cuda_sync", "name": "Stream Wait Event", "args": {"stream": stream}}


def _steps(gather_gap: float, idle: float) -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    now = 0.0
    for _ in range(3):
        events += [_kernel("begin", now, 1), _kernel("gemm", now + 2, 10)]
        events.append(_kernel("gather", now + 12 + gather_gap, 3))
        now += 15 + gather_gap + idle
    return events


def test_gaps_are_those_between_steps_without_the_gather():
    found = gap_figures(list(reversed(_steps(0.5, 2.0))), "begin", "gather")
    assert (found["num_steps"], found["num_gathers"]) == (3, 3)
    assert found["gap_between_steps_us"] == {"median": 2.5, "p90": 2.5, "max": 2.5}
    assert found["gap_within_steps_us"] == {"median": 1.0, "p90": 1.0, "max": 1.0}
    assert found["gather_us"] == {"median": 3, "p90": 3, "max": 3}
    assert found["period_us"] == {"median": 17.5, "p90": 17.5, "max": 17.5}


def test_waits_of_the_forward_stream_are_told_from_those_of_the_copies():
    copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "args": {"stream": 9}}
    call = {"cat": "cuda_runtime", "name": "cudaStreamWaitEvent", "args": {}}
    events = [*_steps(1, 1), copy, _wait(9), _wait(9), call, call]
    found = stream_figures(events)
    assert found["forward_stream"] == 7
    assert (found["forward_waits"], found["copies_to_host_on_forward"]) == (0, 0)
    assert found["waits_by_stream"] == {"9": 2}
    assert found["wait_calls"] == 2
    assert stream_figures([*events, _wait(7)])["forward_waits"] == 1
