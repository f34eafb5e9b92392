"""Check the capture pipeline on a GPU: rows exact under CUDA graphs, the forward stream never held up; times; JSON.

python benchmarks/engine/check_capture.py --out capture.json --commit "$(git rev-parse HEAD)"
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from capture_trace import gap_figures, stream_figures
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture import (
    BlockRef,
    CapturePipeline,
    CudaStaging,
    DeviceCache,
    HostCache,
    HostRows,
    ReplayBuffer,
    RoutingSpec,
    RowSpan,
)
from routing_replay.kernels.gather import gather_rows_reference, gather_step

# Qwen3-30B-A3B.
SPEC = RoutingSpec(layer_ids=tuple(range(48)), num_layers=48, num_experts=128, top_k=8)
BUCKETS = (1, 8, 32, 128, 4096)
TIMED_ROWS = (1, 32, 128, 4096)
BLOCK_SIZE = 16
HIDDEN = 4096
DEVICE = torch.device("cuda")


@triton.jit
def _begin_step_kernel(seed_ptr):  # noqa: ANN001, ANN202
    tl.store(seed_ptr, tl.load(seed_ptr) + 1)


@triton.jit
def _write_ids_kernel(out_ptr, seed_ptr, layer, E: tl.constexpr, K: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0)
    column = tl.arange(0, K)
    first = tl.load(seed_ptr) * 31 + row * 17 + layer * 13
    tl.store(out_ptr + row * K + column, ((first + column * 5) % E).to(tl.int16))


def expected_rows(seeds: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ids `[n, L, K]` that steps `seeds` write into their cache rows `rows`."""
    first = seeds[:, None, None] * 31 + rows[:, None, None] * 17
    layers = np.arange(SPEC.num_moe_layers)[:, None] * 13
    return (first + layers + np.arange(SPEC.top_k) * 5) % SPEC.num_experts


class StandInModel:
    """CUDA graphs that write other ids at every replay, with GEMMs between the layers.

    Args:
        device_cache: Where the layers write.
        num_gemms: GEMMs of a layer, `[bucket, 4096] x [4096, 4096]`.
        buckets: Rows of the graphs.
    """

    def __init__(
        self, device_cache: DeviceCache, *, num_gemms: int, buckets: Sequence[int] = BUCKETS
    ) -> None:
        self.seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self._weight = torch.randn(HIDDEN, HIDDEN, device=DEVICE, dtype=torch.bfloat16) / 64
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._hidden = torch.randn(max(buckets), HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        for bucket in sorted(buckets, reverse=True):
            self._forward(device_cache, bucket, num_gemms)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._forward(device_cache, bucket, num_gemms)
            self._graphs[bucket] = graph
        torch.cuda.synchronize()
        self.seed.zero_()
        self.num_steps = 0

    def _forward(self, device_cache: DeviceCache, bucket: int, num_gemms: int) -> None:
        _begin_step_kernel[(1,)](self.seed)
        hidden = self._hidden[:bucket]
        for layer in range(SPEC.num_moe_layers):
            for _ in range(num_gemms):
                hidden = hidden @ self._weight
            _write_ids_kernel[(bucket,)](
                device_cache.layer(layer), self.seed, layer, E=SPEC.num_experts, K=SPEC.top_k
            )

    def replay(self, num_rows: int) -> int:
        """Launch the smallest graph that holds the rows; return its rows."""
        bucket = next(size for size in BUCKETS if size >= num_rows and size in self._graphs)
        self._graphs[bucket].replay()
        self.num_steps += 1
        return bucket


class SlowStaging:
    """The ring with an artificially slow host behind it.

    Args:
        staging: The ring.
        seconds: How much longer each step takes the host.
    """

    is_asynchronous = True

    def __init__(self, staging: CudaStaging, seconds: float) -> None:
        self._staging = staging
        self._seconds = seconds

    @property
    def num_slots(self) -> int:
        """Slots of the ring."""
        return self._staging.num_slots

    def launch(self, slot: int, num_rows: int, num_reset: int) -> None:
        """Launch as the ring does."""
        self._staging.launch(slot, num_rows, num_reset)

    def gather(self, num_rows: int, step: Tensor) -> None:
        """Gather as the ring does."""
        self._staging.gather(num_rows, step)

    def send(self, slot: int, num_rows: int, num_gathered: int) -> None:
        """Send as the ring does."""
        self._staging.send(slot, num_rows, num_gathered)

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Wait as the ring does, and then some."""
        arrived = self._staging.wait(slot, num_rows)
        time.sleep(self._seconds)
        return arrived


@dataclass(slots=True)
class Running:
    """A request of the stand-in engine."""

    name: str
    length: int
    blocks: list[BlockRef]
    chunk: int = 1
    seeds: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class StandInEngine:
    """Requests of random lengths that come and go, two steps behind what is launched; every trace is compared.

    Args:
        num_slots: Of the ring.
        slow_seconds: How much longer each step takes the host.
        num_gemms: Of a layer of the model.
    """

    def __init__(self, *, num_slots: int, slow_seconds: float = 0.0, num_gemms: int = 1) -> None:
        cache = DeviceCache(SPEC, num_rows=max(BUCKETS), device=DEVICE)
        self.model = StandInModel(cache, num_gemms=num_gemms)
        num_blocks = 4096
        host_cache = HostCache(SPEC, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        staging = SlowStaging(CudaStaging(cache, num_slots), slow_seconds)
        self.pipeline = CapturePipeline(
            cache, host_cache, staging=staging if slow_seconds else None, num_slots=num_slots
        )
        self._rng = np.random.default_rng(num_slots)
        self._free = list(range(num_blocks))
        self._epochs = [0] * num_blocks
        self._running: list[Running] = []
        self._ended: list[tuple[int, Running]] = []
        self._num_made = 0
        self.num_compared = 0
        self.rows_compared = 0

    def run(self, num_steps: int) -> list[float]:
        """Run steps; return the milliseconds of each graph on the forward stream."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * num_steps)]
        for step in range(num_steps):
            self._admit(step)
            spans = self._spans()
            num_rows = sum(span.num_rows for span in spans)
            events[2 * step].record()
            bucket = self.model.replay(num_rows)
            events[2 * step + 1].record()
            self.pipeline.submit(spans, num_reset=bucket, weights_version=0)
            self._note(spans)
            self._retire(step)
        for request in (*self._running, *(request for _, request in self._ended)):
            self._finish(request)
        self._running, self._ended = [], []
        self.pipeline.drain()
        torch.cuda.synchronize()
        return [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(num_steps)]

    def _admit(self, step: int) -> None:
        target = int(self._rng.choice([1, 5, 30, 128]))
        while len(self._running) < target and len(self._running) < 128:
            self._start(int(self._rng.integers(2, 60)), chunk=1)
            if self._rng.random() < 0.3:
                break
        if step % 40 == 0:
            self._start(700, chunk=int(self._rng.integers(200, 700)))

    def _start(self, length: int, chunk: int) -> None:
        count = -(-length // BLOCK_SIZE)
        if count > len(self._free):
            return
        blocks = []
        for block_id in [self._free.pop(0) for _ in range(count)]:
            self._epochs[block_id] += 1
            blocks.append(BlockRef(block_id, self._epochs[block_id]))
        self._num_made += 1
        self._running.append(Running(str(self._num_made), length, blocks, chunk))
        self.pipeline.begin(self._running[-1].name, (), 0)

    def _spans(self) -> list[RowSpan]:
        return [
            RowSpan(
                request_id=request.name,
                start=len(request.rows),
                num_rows=min(request.chunk, request.length - len(request.rows)),
                blocks=request.blocks,
            )
            for request in self._running
        ]

    def _note(self, spans: Sequence[RowSpan]) -> None:
        first = 0
        for request, span in zip(self._running, spans, strict=True):
            request.seeds += [self.model.num_steps] * span.num_rows
            request.rows += range(first, first + span.num_rows)
            first += span.num_rows

    def _retire(self, step: int) -> None:
        """Finish a request two steps after its last one, so that the host runs ahead of the rows."""
        self._ended += [(step, r) for r in self._running if len(r.rows) == r.length]
        self._running = [r for r in self._running if len(r.rows) < r.length]
        while self._ended and self._ended[0][0] <= step - 2:
            self._finish(self._ended.pop(0)[1])

    def _finish(self, request: Running) -> None:
        num_rows = len(request.rows)
        trace = self.pipeline.finish(request.name, list(range(num_rows + 1))).trace
        self.pipeline.free(request.name)
        self._free += [block.block_id for block in request.blocks]
        expected = expected_rows(np.array(request.seeds), np.array(request.rows))
        if not np.array_equal(trace.ids.astype(np.int64), expected):
            wrong = np.flatnonzero((trace.ids != expected).any(axis=(1, 2)))
            raise AssertionError(
                f"request {request.name}: rows {wrong[:8].tolist()} of {num_rows} differ"
            )
        self.num_compared += 1
        self.rows_compared += num_rows


def check_exact(num_steps: int) -> list[dict[str, object]]:
    """Compare every row of every request, for rings of 2 to 4 slots."""
    results: list[dict[str, object]] = []
    for num_slots in (2, 3, 4):
        engine = StandInEngine(num_slots=num_slots)
        engine.run(num_steps)
        stats = asdict(engine.pipeline.stats)
        engine.pipeline.close()
        compared = {"requests_equal": engine.num_compared, "rows_equal": engine.rows_compared}
        results.append({"num_slots": num_slots, **compared, **stats})
    return results


def check_slow_host(num_steps: int) -> dict[str, object]:
    """Compare the graphs' own time, and every row, with a host that takes 10 ms longer for each step."""
    figures: dict[str, object] = {}
    for name, seconds in (("plain", 0.0), ("slow_10ms", 0.01)):
        engine = StandInEngine(num_slots=3, slow_seconds=seconds)
        engine.run(50)
        started = time.perf_counter()
        milliseconds = engine.run(num_steps)
        elapsed = time.perf_counter() - started
        stats = asdict(engine.pipeline.stats)
        engine.pipeline.close()
        figures[name] = {
            "graph_ms_median": statistics.median(milliseconds),
            "graph_ms_p90": float(np.percentile(milliseconds, 90)),
            "wall_ms_per_step": 1000 * elapsed / num_steps,
            "requests_equal": engine.num_compared,
            "rows_equal": engine.rows_compared,
            **stats,
        }
    return figures


def _decode_spans(num_rows: int, step: int, blocks: Sequence[Sequence[BlockRef]]) -> list[RowSpan]:
    """Decoding requests; from 4096 rows on, prompts in chunks of 512."""
    each = 1 if num_rows < 4096 else 512
    return [
        RowSpan(request_id=str(i), start=step * each, num_rows=each, blocks=blocks[i])
        for i in range(num_rows // each)
    ]


def _requests(pipeline: CapturePipeline, num_rows: int) -> list[list[BlockRef]]:
    """Begin requests that share no block; their blocks are used in turn, as in a long run."""
    count = num_rows if num_rows < 4096 else num_rows // 512
    own = [[BlockRef(8 * i + j, 1) for j in range(8)] * 4096 for i in range(count)]
    for i in range(count):
        pipeline.begin(str(i), (), 0)
    return own


def _steps(
    model: StandInModel, pipeline: CapturePipeline | None, num_rows: int, num_steps: int
) -> float:
    """Run decode steps as fast as they go; return milliseconds a step on the forward stream."""
    blocks = [] if pipeline is None else _requests(pipeline, num_rows)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for step in range(num_steps):
        bucket = model.replay(num_rows)
        if pipeline is not None:
            spans = _decode_spans(num_rows, step, blocks)
            pipeline.submit(spans, num_reset=bucket, weights_version=0)
    end.record()
    torch.cuda.synchronize()
    if pipeline is not None:
        for i in range(len(blocks)):
            pipeline.free(str(i))
        pipeline.drain()
    return begin.elapsed_time(end) / num_steps


def _host_cache() -> HostCache:
    return HostCache(SPEC, num_blocks=8 * 128, block_size=BLOCK_SIZE)


def check_streams(num_steps: int) -> dict[str, object]:
    """Trace decode steps with and without capture: waits, gaps and periods of the forward stream; paired timings."""
    cache = DeviceCache(SPEC, num_rows=max(BUCKETS), device=DEVICE)
    model = StandInModel(cache, num_gemms=3)
    pipeline = CapturePipeline(cache, _host_cache())
    figures: dict[str, object] = {}
    for num_rows in (1, 32, 128):
        for is_on in (False, True):  # warm
            _steps(model, pipeline if is_on else None, num_rows, 20)
        traced = {
            name: _traced(partial(_steps, model, used, num_rows, 60))
            for name, used in (("off", None), ("on", pipeline))
        }
        off, on = [], []
        for _ in range(8):
            off.append(_steps(model, None, num_rows, num_steps))
            on.append(_steps(model, pipeline, num_rows, num_steps))
        ratios = sorted(a / b for a, b in zip(off, on, strict=True))
        figures[f"rows_{num_rows}"] = {
            "trace_off": traced["off"],
            "trace_on": traced["on"],
            "step_ms_off": off,
            "step_ms_on": on,
            "speed_on_over_off": {
                "median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]
            },
        }  # fmt: skip
    figures["stats"] = asdict(pipeline.stats)
    pipeline.close()
    return figures


def _traced(run: Callable[[], object]) -> dict[str, object]:
    """Run under torch.profiler; return what the trace says of the forward stream."""
    config = torch._C._profiler._ExperimentalConfig(enable_cuda_sync_events=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return {**stream_figures(events), **gap_figures(events, "_begin_step_kernel", "_gather_rows_kernel")}  # fmt: skip


def time_host(num_steps: int) -> dict[str, object]:
    """Time the engine's own thread in `submit`, and the other one for each step."""
    cache = DeviceCache(SPEC, num_rows=max(BUCKETS), device=DEVICE)
    model = StandInModel(cache, num_gemms=0)
    figures: dict[str, object] = {}
    for num_rows in TIMED_ROWS:
        pipeline = CapturePipeline(cache, _host_cache())
        blocks = _requests(pipeline, num_rows)
        submits: list[float] = []
        steps = num_steps if num_rows < 4096 else 30
        for step in range(steps):
            bucket = model.replay(num_rows)
            spans = _decode_spans(num_rows, step, blocks)
            started = time.perf_counter()
            pipeline.submit(spans, num_reset=bucket, weights_version=0)
            submits.append(1e6 * (time.perf_counter() - started))
            pipeline.drain()
        seconds = pipeline.stats.host_seconds
        pipeline.close()
        figures[f"rows_{num_rows}"] = {
            "submit_us_median": statistics.median(submits[10:]),
            "submit_us_p90": float(np.percentile(submits[10:], 90)),
            "host_us_per_step": 1e6 * seconds / steps,
            "host_us_per_row": 1e6 * seconds / steps / num_rows,
        }
    return figures


def check_gather() -> list[dict[str, object]]:
    """Compare the step's gather with the reference, good rows and bad ones, and time it in a graph."""
    results: list[dict[str, object]] = []
    for spec_experts in (128, 256):
        for live in TIMED_ROWS:
            bucket = min(live + 3, 4096)
            cache = torch.rand(48, 4096, spec_experts, device=DEVICE).argsort(-1)[..., :8]
            cache = cache.to(torch.int16).contiguous()
            bad = torch.randint(-2, spec_experts + 1, cache.shape, device=DEVICE).to(torch.int16)
            cache[:, 1:bucket:3] = bad[:, 1:bucket:3]
            found: list[tuple[torch.Tensor, ...]] = []
            for is_kernel in (True, False):
                own = cache.clone()
                dtype = torch.uint8 if spec_experts <= 255 else torch.int16
                rows = torch.full((4096, 48, 8), 77, dtype=dtype, device=DEVICE)
                flags = torch.full((4101,), 77, dtype=torch.uint8, device=DEVICE)[5:]
                if is_kernel:
                    gather_step(own, num_rows=live, num_reset=bucket, rows_out=rows, flags_out=flags, num_experts=spec_experts)  # fmt: skip
                else:
                    gather_rows_reference(own, slice(live), rows, flags, bucket, spec_experts)
                found.append((own, rows, flags))
            for kernel, reference in zip(*found, strict=True):
                assert torch.equal(kernel, reference), (spec_experts, live)
            own, rows, flags = found[0]
            milliseconds = triton.testing.do_bench_cudagraph(
                lambda own=own, rows=rows, flags=flags, live=live, bucket=bucket, experts=spec_experts: (
                    gather_step(own, num_rows=live, num_reset=bucket, rows_out=rows, flags_out=flags, num_experts=experts)
                )
            )  # fmt: skip
            results.append({"E": spec_experts, "rows": live, "equal": True, "median_us": 1000 * milliseconds})  # fmt: skip
    return results


def check_gather_sizes() -> dict[str, object]:
    """Compare the step's gather with the reference on models of other depths and top-k: a tile of another shape each."""
    sizes = list(itertools.product((2, 3, 6, 8, 48), (2, 8, 10), (1, 255, 257, 512)))
    for layers, top_k, live in sizes:
        bucket = live + 3
        cache = torch.rand(layers, 600, 64, device=DEVICE).argsort(-1)[..., :top_k].short()
        bad = torch.randint(-2, 65, cache.shape, device=DEVICE).short()
        cache[:, 1:bucket:3] = bad[:, 1:bucket:3]
        found: list[tuple[torch.Tensor, ...]] = []
        for is_kernel in (True, False):
            own = cache.contiguous().clone()
            rows = torch.full((600, layers, top_k), 77, dtype=torch.uint8, device=DEVICE)
            flags = torch.full((605,), 77, dtype=torch.uint8, device=DEVICE)[5:]
            if is_kernel:
                gather_step(
                    own,
                    num_rows=live,
                    num_reset=bucket,
                    rows_out=rows,
                    flags_out=flags,
                    num_experts=64,
                )
            else:
                gather_rows_reference(own, slice(live), rows, flags, bucket, 64)
            found.append((own, rows, flags))
        for kernel, reference in zip(*found, strict=True):
            assert torch.equal(kernel, reference), (layers, top_k, live)
    return {"sizes_equal": len(sizes)}


def check_replay_buffer(num_steps: int) -> dict[str, object]:
    """Fill the replay buffer before every graph replay and compare what each graph saw."""
    count = 512
    buffer = ReplayBuffer(SPEC, num_rows=count, device=DEVICE)
    seen = torch.zeros(SPEC.num_moe_layers, count, SPEC.top_k, dtype=torch.int16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(SPEC.num_moe_layers):
            seen[layer].copy_(buffer.layer(layer))
    rng = np.random.default_rng(0)
    rows = np.empty((count, SPEC.num_moe_layers, SPEC.top_k), np.int16)
    kept: list[tuple[torch.Tensor, NDArray[np.int16]]] = []
    microseconds: dict[int, list[float]] = {}
    num_equal = 0
    for step in range(num_steps):
        num_rows = int(rng.choice([0, 1, 32, 128, 512]))
        rows[:num_rows] = rng.integers(-1, 128, (num_rows, *rows.shape[1:]), np.int16)
        started = time.perf_counter()
        buffer.fill(rows[:num_rows])
        microseconds.setdefault(num_rows, []).append(1e6 * (time.perf_counter() - started))
        graph.replay()
        expected = np.full_like(rows, -1)
        expected[:num_rows] = rows[:num_rows]
        rows[:] = 99  # the caller's own again
        kept.append((seen.clone(), expected))
        if len(kept) == 32 or step == num_steps - 1:
            for snapshot, wanted in kept:
                assert np.array_equal(snapshot.transpose(0, 1).cpu().numpy(), wanted), step
                num_equal += 1
            kept.clear()
    return {
        "steps_equal": num_equal,
        "fill_us_median": {n: statistics.median(v) for n, v in sorted(microseconds.items())},
    }


def main() -> None:
    """Run every check, or those that are named; write what was found even where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--steps", type=int, default=3000, help="steps of each exact run")
    parser.add_argument("--only", help="names of checks, with commas between them")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    checks: dict[str, Callable[[], object]] = {
        "gather": check_gather,
        "gather_sizes": check_gather_sizes,
        "exact": lambda: check_exact(arguments.steps),
        "slow_host": lambda: check_slow_host(300),
        "streams": lambda: check_streams(300),
        "host_time": lambda: time_host(400),
        "replay_buffer": lambda: check_replay_buffer(400),
    }
    record: dict[str, object] = {
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": "stand-in of 48 layers, 128 experts, top 8; GEMMs of 4096 x 4096 between the layers",
    }
    failures: list[str] = []
    for name in arguments.only.split(",") if arguments.only else checks:
        started = time.perf_counter()
        try:
            record[name] = checks[name]()
        except Exception as error:  # one check must not hide what the others find
            traceback.print_exc()
            record[name] = {"failed": f"{type(error).__name__}: {error}"}
            failures.append(name)
        print(f"{name}: {time.perf_counter() - started:.1f} s", json.dumps(record[name]), flush=True)  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
