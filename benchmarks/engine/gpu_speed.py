"""What capture costs on a GPU, and how near the engine comes to the memory's bandwidth, at a real model's sizes.

python benchmarks/engine/gpu_speed.py --out docs/results/engine_gpu.json --commit "$(git rev-parse HEAD)"

The model is Qwen3-30B-A3B's config with random weights, bfloat16. One engine has two runners that share weights, keys and
values: one captures, the other does not. They take turns, round by round, with fresh prompts; a ratio is formed within
a round, prefill and the host in it. `decode_step_ms` is the median time between tokens; `device_step_ms` that of the recorded
step alone, the gather of routing in it, replayed by both runners in turn and timed on the device. The floor of a decode
step is explained in benchmarks/README.md.
"""

import argparse
import copy
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from routing_replay import LLM, SamplingParams
from routing_replay.engine import EngineConfig, FinishedRequest
from routing_replay.engine.finishing import RowKeeper
from routing_replay.engine.graphs import CudaRecorder, GraphShape, StepGraphs
from routing_replay.engine.runner import ModelRunner

BYTES_PER_SECOND = {"NVIDIA H100 80GB HBM3": 3.106e12, "NVIDIA H200": 4.4e12}
PROMPT_TOKENS, NEW_TOKENS, LONG_PROMPT = 512, 256, 8192
PREFILL_STEPS = (16, 128, 512, 1024, 1100, 2048, 4096)
DEVICE_TURNS, DEVICE_STEPS = 24, 8
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "vocab_size": 151936, "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one runner.

    Attributes:
        seconds: From the first request to the last token.
        tokens: Generated.
        steps_ms: Times of the decode steps with every request running.
        host_us_per_token: CPU time of the process for each token.
        trace_us_per_row: Time to make the traces afterwards, which no step waits for, for each row of them.
    """

    seconds: float
    tokens: int
    steps_ms: list[float]
    host_us_per_token: float
    trace_us_per_row: float | None


def make_llm(arguments: argparse.Namespace, folder: Path) -> LLM:
    """The engine with capture."""
    model = {**MODEL, **({"num_hidden_layers": arguments.layers} if arguments.layers else {})}
    (folder / "config.json").write_text(json.dumps(model))
    most = max(arguments.concurrency)
    config = EngineConfig(
        load_format="dummy",
        enable_prefix_caching=False,
        max_num_seqs=most,
        max_num_batched_tokens=arguments.batched_tokens,
        max_model_len=LONG_PROMPT + 16,
        cuda_graph_sizes=tuple(arguments.concurrency),
        cuda_graph_tokens=arguments.graph_tokens,
        gpu_memory_utilization=arguments.memory,
    )
    return LLM(folder, device="cuda", enable_return_routed_experts=True, config=config)


def without_capture(runner: ModelRunner) -> ModelRunner:
    """A runner on the same weights, keys and values that captures nothing."""
    other = copy.copy(runner)
    other.pipeline = None
    assert runner.graphs is not None
    other.graphs = StepGraphs(runner.graphs.shapes, other._step_of, CudaRecorder())
    other.record_graphs()
    return other


def use(llm: LLM, runner: ModelRunner) -> None:
    """Let the engine run on one of the runners."""
    llm.core.runner = runner
    llm.core.rows = RowKeeper(runner.pipeline)


def run(llm: LLM, runner: ModelRunner, count: int, length: int, new: int, seed: int) -> Turn:
    """Serve `count` requests at once."""
    rng = random.Random(seed)
    core = llm.core
    use(llm, runner)
    params = SamplingParams(max_tokens=new, seed=seed, ignore_eos=True)
    requests = [
        core.make_requests([rng.randrange(MODEL["vocab_size"]) for _ in range(length)], params)[0]
        for _ in range(count)
    ]
    torch.cuda.synchronize()
    ends: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    for request in requests:
        core.scheduler.add(request)
    num_finished, ended = 0, list[FinishedRequest]()
    while core.has_work:
        finished = core.step()
        ended += finished
        failed = next((item.request.error for item in finished if item.request.error), None)
        if failed is not None:
            raise failed
        num_finished += len(finished)
        decodes = all(r.num_computed > length for r in requests)
        if decodes and not num_finished:
            ends.append(time.perf_counter())
    torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    steps_ms = [1e3 * (after - before) for before, after in itertools.pairwise(ends)]
    tokens = count * new
    return Turn(seconds, tokens, steps_ms, 1e6 * cpu / tokens, trace_time(ended))


def prefill_steps(llm: LLM, runner: ModelRunner) -> list[dict[str, float]]:
    """How long the host takes to launch a step of one prompt, and how long until the device has run it; `eager_*` without a graph."""
    eager = copy.copy(runner)
    eager.graphs = None
    rows: list[dict[str, float]] = []
    for length in PREFILL_STEPS:
        launch_ms, step_ms = prefill_step(llm, runner, length)
        eager_launch_ms, eager_step_ms = prefill_step(llm, eager, length)
        rows.append({
            "tokens": length, "launch_ms": launch_ms, "step_ms": step_ms,
            "eager_launch_ms": eager_launch_ms, "eager_step_ms": eager_step_ms,
        })  # fmt: skip
    return rows


def prefill_step(llm: LLM, runner: ModelRunner, length: int) -> tuple[float, float]:
    """Median milliseconds of the launch, and of the whole step."""
    core = llm.core
    use(llm, runner)
    rng = random.Random(5)
    launches, steps = list[float](), list[float]()
    for _ in range(7):
        prompt = [rng.randrange(MODEL["vocab_size"]) for _ in range(length)]
        request = core.make_requests(prompt, SamplingParams(max_tokens=1))[0]
        torch.cuda.synchronize()
        started = time.perf_counter()
        core.scheduler.add(request)
        core.step()
        launches.append(1e3 * (time.perf_counter() - started))
        torch.cuda.synchronize()
        steps.append(1e3 * (time.perf_counter() - started))
        while core.has_work:
            core.step()
    return round(statistics.median(launches[2:]), 3), round(statistics.median(steps[2:]), 3)


def trace_time(ended: list[FinishedRequest]) -> float | None:
    """Microseconds of a row to make the traces; None without capture."""
    started = time.perf_counter()
    rows = sum(item.trace.num_rows for item in ended if item.trace is not None)
    return 1e6 * (time.perf_counter() - started) / rows if rows else None


def median_of(values: list[float | None], digits: int) -> float | None:
    """The median, rounded; None where nothing was measured."""
    found = [value for value in values if value is not None]
    return round(statistics.median(found), digits) if found else None


@contextmanager
def decoding(llm: LLM, runner: ModelRunner, count: int) -> Iterator[None]:
    """Requests that all decode, the inputs of a step of them on the device; they are gone afterwards."""
    core, rng = llm.core, random.Random(77)
    use(llm, runner)
    params = SamplingParams(max_tokens=NEW_TOKENS, seed=0, ignore_eos=True)
    prompts = [[rng.randrange(MODEL["vocab_size"]) for _ in range(PROMPT_TOKENS)] for _ in range(count)]  # fmt: skip
    requests = [core.make_requests(prompt, params)[0] for prompt in prompts]
    for request in requests:
        core.scheduler.add(request)
    while any(request.num_computed <= PROMPT_TOKENS for request in requests):
        core.step()
    core.step()
    yield
    for request in requests:
        core.abort(request.request_id)


@torch.inference_mode()
def device_steps(llm: LLM, pair: tuple[ModelRunner, ModelRunner], count: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds of one decode step on the device, replayed by both runners in turn: median and percentiles."""
    times: dict[str, list[float]] = {"on": [], "off": []}
    with decoding(llm, pair[0], count):
        llm.core.settle()
        for number in range(DEVICE_TURNS):
            for name in ("on", "off") if number % 2 else ("off", "on"):
                runner = pair[name == "off"]
                assert runner.graphs is not None
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(DEVICE_STEPS):
                    runner.graphs.replay(GraphShape(count, is_decode=True), is_forced=False)
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end) / DEVICE_STEPS)
    return {name: spread_of(found) for name, found in times.items()}


def spread_of(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5)
    middle = statistics.median(values)
    return {"median": round(middle, 4), "p20": round(cuts[0], 4), "p80": round(cuts[3], 4)}


def kernel_times(llm: LLM, runner: ModelRunner, count: int) -> dict[str, object]:
    """Where a decode step's time goes: microseconds of a step by kernel, the largest first, and of all of them."""
    steps = 4
    with (
        decoding(llm, runner, count),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile,
    ):
        for _ in range(steps):
            llm.core.step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda item: -item.device_time_total)
    return {
        "kernels_us": round(sum(item.device_time_total for item in found) / steps, 1),
        "largest": {item.key[:90]: [round(item.device_time_total / steps, 1), item.count // steps] for item in found[:14]},
    }  # fmt: skip


def floor_ms(count: int, context: float, bandwidth: float) -> float:
    """The least time of a decode step: bytes of weights touched, of keys and values read, over the bandwidth."""
    hidden, size, experts, top_k = 2048, 768, 128, 8
    layers, heads, kv_heads, dim = int(MODEL["num_hidden_layers"]), 32, 4, 128
    touched = experts * (1 - (1 - top_k / experts) ** count)
    per_layer = (
        touched * 3 * hidden * size + hidden * (2 * heads + 2 * kv_heads) * dim + hidden * experts
    )
    weights = 2 * (layers * per_layer + hidden * int(MODEL["vocab_size"]))
    keys = 2 * layers * count * context * 2 * kv_heads * dim
    activations = 2 * layers * count * hidden * 8
    return 1e3 * (weights + keys + activations) / bandwidth


def interval(values: list[float]) -> list[float]:
    """The 95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(2000))
    return [round(means[49], 4), round(means[1949], 4)]


def compare(llm: LLM, pair: tuple[ModelRunner, ModelRunner], count: int, shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, object]:  # fmt: skip
    """Alternate both runners and form ratios round by round."""
    length, new = shape
    on, off = pair
    pipeline = on.pipeline
    assert pipeline is not None
    for runner in pair:
        run(llm, runner, count, length, min(new, 8), 999)
    before = pipeline.stats
    turns: dict[str, list[Turn]] = {"on": [], "off": []}
    # One request is a second's work, and noisier than many: more rounds cost little.
    for number in range(arguments.rounds * (4 if count == 1 else 1)):
        order = [("on", on), ("off", off)]
        for name, runner in order if number % 2 else reversed(order):
            turns[name].append(run(llm, runner, count, length, new, number))
    pipeline.drain()
    after = pipeline.stats
    ratios = [b.seconds / a.seconds for a, b in zip(turns["on"], turns["off"], strict=True)]
    rows = max(1, after.rows - before.rows)
    record: dict[str, object] = {
        "requests": count, "prompt_tokens": length, "new_tokens": new, "rounds": len(ratios),
        "on_over_off": round(statistics.fmean(ratios), 4), "interval_95": interval(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "bytes_per_row": round((after.bytes_copied - before.bytes_copied) / rows, 1),
        "capture_host_us_per_row": round(1e6 * (after.host_seconds - before.host_seconds) / rows, 2),
        "full_ring_waits": after.full_ring_waits - before.full_ring_waits,
        "full_ring_seconds": round(after.full_ring_seconds - before.full_ring_seconds, 4),
    }  # fmt: skip
    for name, found in turns.items():
        steps = [step for turn in found for step in turn.steps_ms]
        record[name] = {
            "tokens_per_second": round(statistics.median(turn.tokens / turn.seconds for turn in found), 1),
            "seconds": round(statistics.median(turn.seconds for turn in found), 4),
            "decode_step_ms": median_of([*steps], 4),
            "decode_step_spread_ms": spread_of(steps) if steps else None,
            "trace_us_per_row": median_of([turn.trace_us_per_row for turn in found], 2),
            "host_us_per_token": round(statistics.median(turn.host_us_per_token for turn in found), 1),
        }  # fmt: skip
    if new > 1:
        bandwidth = BYTES_PER_SECOND[torch.cuda.get_device_name()]
        least = floor_ms(count, length + new / 2, bandwidth)
        record["floor_ms"] = round(least, 4)
        record["device_step_ms"] = device_steps(llm, pair, count)
        record["decode_step"] = kernel_times(llm, on, count)
        record["share_of_floor"] = round(least / float(record["on"]["decode_step_ms"]), 4)  # pyright: ignore[reportIndexIssue]
    return record


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32, 128])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", type=float, default=0.95, help="share of the GPU's memory")
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--graph-tokens", type=lambda text: tuple(int(n) for n in text.split(",")), help="the engine's own")  # fmt: skip
    parser.add_argument("--layers", type=int, help="fewer decoder layers, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    if arguments.layers:
        MODEL["num_hidden_layers"] = arguments.layers
    started = time.perf_counter()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        llm = make_llm(arguments, Path(folder))
    on = llm.core.runner
    pair = (on, without_capture(on))
    result: dict[str, object] = {
        "commit": arguments.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "attention": "own Triton kernels",
        "model": MODEL,
        "kv_blocks": llm.core.kv_blocks.num_blocks,
        "start_seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    print(f"ready after {result['start_seconds']} s, {result['kv_blocks']} KV blocks", flush=True)
    result["prefill_steps"] = prefill_steps(llm, on)
    print(json.dumps(result["prefill_steps"]), flush=True)
    shapes = [(count, (PROMPT_TOKENS, NEW_TOKENS)) for count in arguments.concurrency]
    shapes += [(1, (LONG_PROMPT, 1)), (4, (LONG_PROMPT, 1))]
    for count, shape in shapes:
        rows.append(compare(llm, pair, count, shape, arguments))
        print(json.dumps(rows[-1]), flush=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
