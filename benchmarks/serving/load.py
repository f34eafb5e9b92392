"""Load on loopback: every row compared with offline generation, latencies of streams, and what returning routing costs.

python benchmarks/serving/load.py --out docs/results/serving_load.json            as committed: an hour on two cores
python benchmarks/serving/load.py --requests 400 --rounds 2 --round-requests 128 --out /tmp/load.json

Phases are rows, cost and formats; those that `--phases` leaves out stay in the file as they are, each with its commit. Rows are
compared under `--batch-invariant`, where a request's bits do not depend on what runs beside it. Costs are ratios
within a round of alternating runs; the driver shares the machine with the server. Processor time is that of the server and
its engine, without what the driver and others take; shared cores make it vary all the same.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from lean_http import Answer, Connection
from record import arguments, interval_of_median, paired_ratio, percentiles, provenance, write
from server_process import ServerProcess
from workload import Request, offline, requests

from routing_replay import RoutingTrace
from routing_replay.client import (
    AsyncRoutingReplayClient,
    Completion,
    RoutingRequest,
    ServerConfig,
    join_chunks,
)
from routing_replay.errors import RoutingReplayError

CAPTURING = "--enable-return-routed-experts"
FORMATS: dict[str, dict[str, object]] = {
    "vllm": {"routed_experts_format": "vllm"},
    "object": {"routed_experts_format": "object"},
    "vllm_split": {"routed_experts_format": "vllm_split"},
    "sglang": {"routed_experts_format": "sglang"},
    "nemo_rl": {"routed_experts_format": "nemo_rl"},
    "trace, raw": {"routed_experts_format": "trace", "routed_experts_codec": "raw"},
    "trace, raw+zstd": {"routed_experts_format": "trace", "routed_experts_codec": "raw+zstd"},
    "trace, packed": {"routed_experts_format": "trace", "routed_experts_codec": "packed"},
    "trace, packed+zstd": {"routed_experts_format": "trace", "routed_experts_codec": "packed+zstd"},
    "trace, store": {"routed_experts_format": "trace", "routed_experts_delivery": "store"},
}
PHASES = ("rows", "cost", "formats")
ALONE = 16
OURS = FORMATS["trace, packed+zstd"]


async def compare_rows(
    server: ServerProcess, asked: Sequence[Request], streams: int
) -> dict[str, object]:
    """Run every request as a stream and return what came back, by request."""
    config = ServerConfig(url=server.url, max_concurrency=streams)
    found: dict[int, Completion] = {}
    failed: dict[int, str] = {}
    source = iter(enumerate(asked))

    async def work(client: AsyncRoutingReplayClient) -> None:
        for index, request in source:
            try:
                chunks = [
                    chunk
                    async for chunk in client.stream(
                        request.prompt,
                        routing=RoutingRequest(codec="raw"),
                        seed=request.seed,
                        max_tokens=request.max_tokens,
                        ignore_eos=True,
                    )
                ]
                found[index] = join_chunks(chunks)[0]
            except RoutingReplayError as err:
                failed[index] = str(err)
            if len(found) % 1000 == 0:
                print(f"{len(found)} streams done", flush=True)

    began = time.perf_counter()
    async with AsyncRoutingReplayClient(config) as client, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(work(client))
    return {"seconds": time.perf_counter() - began, "found": found, "failed": failed}


def rows_phase(count: int, streams: int) -> dict[str, object]:
    """Compare each stream's tokens and rows with offline generation, position by position."""
    asked = requests(count)
    words = (
        CAPTURING,
        "--batch-invariant",
        "--max-num-seqs",
        str(streams),
        "--max-queued-requests",
        str(streams),
    )
    with ServerProcess(*words) as server:
        ran = asyncio.run(compare_rows(server, asked, streams))
        idle_after = server.wait_idle()
    found, failed = ran["found"], ran["failed"]
    assert isinstance(found, dict)
    assert isinstance(failed, dict)
    print("comparing with offline generation", flush=True)
    expected = offline(asked, batch_invariant=True, max_num_seqs=streams)
    other_tokens, other_rows, rows_equal = 0, 0, 0
    for index, (tokens, trace) in enumerate(expected):
        if index not in found:
            continue
        mine = found[index]
        other_tokens += mine.token_ids != tokens
        same = isinstance(mine.trace, RoutingTrace) and mine.trace.equals(trace)
        other_rows += not same
        rows_equal += trace.num_rows if same else 0
    twin = found[0].trace.equals(expected[1][1]) if len(found) > 1 else False
    return {
        "streams": streams,
        "requests": count,
        "lost": count - len(found),
        "errors": sorted(set(failed.values()))[:5],
        "other_tokens": other_tokens,
        "mixed_up": other_rows,
        "rows_equal": rows_equal,
        "twin_differs": not twin,
        "seconds": ran["seconds"],
        "seconds_until_idle": idle_after,
    }


async def run_round(
    address: tuple[str, int], bodies: Sequence[dict[str, object]], concurrency: int
) -> tuple[float, list[Answer]]:
    """Send bodies over `concurrency` connections; return seconds and answers."""
    answers: list[Answer] = []
    source = iter(bodies)

    async def work() -> None:
        connection = Connection(address)
        for body in source:
            answers.append(await connection.post("/v1/completions", body))
        connection.close()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    seconds = time.perf_counter() - began
    bad = [answer.status for answer in answers if answer.status != 200 or not answer.is_whole]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(answers)} requests failed: {bad[:5]}")
    return seconds, answers


def timed_round(
    server: ServerProcess, asked: Sequence[Request], fields: dict[str, object], concurrency: int
) -> tuple[float, float, list[Answer]]:
    """Run a round; return tokens a second, microseconds of the server's processor time a token, and answers."""
    bodies = [request.body(**fields) for request in asked]
    tokens, before = sum(request.max_tokens for request in asked), server.cpu_seconds()
    seconds, answers = asyncio.run(run_round(server.address, bodies, concurrency))
    return tokens / seconds, 1e6 * (server.cpu_seconds() - before) / tokens, answers


async def forget_prompts(address: tuple[str, int]) -> None:
    """Empty the prefix cache."""
    connection = Connection(address)
    answer = await connection.post("/reset_prefix_cache", {})
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"the prefix cache was not reset: {answer.status} {answer.body[:300]}")


def cost_phase(options: argparse.Namespace) -> dict[str, object]:
    """Throughput without capture, with capture alone, and with routing returned, in turn."""
    rates: dict[str, list[float]] = {"no capture": [], "captured": [], "returned": []}
    work: dict[str, list[float]] = {name: [] for name in rates}
    latency: dict[str, list[Answer]] = {"captured": [], "returned": []}
    seats = ("--max-num-seqs", str(options.streams), "--max-queued-requests", str(options.streams))
    with ExitStack() as stack:
        plain = stack.enter_context(ServerProcess(*seats))
        capturing = stack.enter_context(ServerProcess(CAPTURING, *seats))
        arms = {
            "no capture": (plain, {}),
            "captured": (capturing, {"return_routed_experts": False}),
            "returned": (capturing, {"return_routed_experts": True, **OURS}),
        }
        for number in range(options.rounds + 1):
            asked = requests(options.round_requests, seed=number + 1, max_tokens=options.max_tokens)
            for name in sorted(arms, reverse=bool(number % 2)):
                server, fields = arms[name]
                # Two arms share a server: without this, the one that comes second finds its prompts computed.
                asyncio.run(forget_prompts(server.address))
                rate, cpu, _ = timed_round(server, asked, fields, options.streams)
                if number:  # the first round warms up
                    rates[name].append(rate)
                    work[name].append(cpu)
                    print(f"round {number}, {name}: {rates[name][-1]:.0f} tokens/s", flush=True)
        for number in range(2):
            for name in ("captured", "returned"):
                asked = requests(
                    options.round_requests, seed=1000 + number, max_tokens=options.max_tokens
                )
                fields = {**arms[name][1], "stream": True, "return_token_ids": True}
                bodies = [request.body(**fields) for request in asked]
                asyncio.run(forget_prompts(capturing.address))
                _, answers = asyncio.run(run_round(capturing.address, bodies, options.streams))
                latency[name] += answers
    return {
        "concurrency": options.streams,
        "requests_a_round": options.round_requests,
        "max_tokens": options.max_tokens,
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "returned_over_captured": paired_ratio(rates["returned"], rates["captured"]),
        "returned_over_no_capture": paired_ratio(rates["returned"], rates["no capture"]),
        "cpu_us_a_token": {name: statistics.median(found) for name, found in work.items()},
        "cpu_returned_over_captured": paired_ratio(work["returned"], work["captured"]),
        "cpu_returned_over_no_capture": paired_ratio(work["returned"], work["no capture"]),
        "streams": {name: _latencies(answers) for name, answers in latency.items()},
    }


def _latencies(answers: Sequence[Answer]) -> dict[str, object]:
    first = [answer.pieces[0][0] - answer.sent_at for answer in answers]
    between = [
        later[0] - earlier[0]
        for answer in answers
        for earlier, later in zip(answer.pieces, answer.pieces[1:], strict=False)
    ]
    return {"time_to_first_token": percentiles(first), "between_tokens": percentiles(between)}


async def added_ms(
    address: tuple[str, int], asked: Sequence[Request], sides: dict[str, dict[str, object]]
) -> list[float]:
    """What routing adds to a request that is alone: differences between neighbours, each request twice, in either order."""
    connection = Connection(address)
    added: list[float] = []
    for index, request in enumerate(asked):
        seconds: dict[str, float] = {}
        for side in sorted(sides, reverse=bool(index % 2)):
            seconds[side] = (
                await connection.post("/v1/completions", request.body(**sides[side]))
            ).seconds
        added.append(1e3 * (seconds["with"] - seconds["without"]))
    connection.close()
    return added


def formats_phase(options: argparse.Namespace, store: str) -> list[dict[str, object]]:
    """Bytes, latency and throughput of every format beside the same requests without routing."""
    seats = ("--max-num-seqs", str(options.streams), "--max-queued-requests", str(options.streams))
    asked = requests(options.round_requests // 4, seed=500, max_tokens=options.max_tokens)
    rows = sum(len(request.prompt) + request.max_tokens - 1 for request in asked)
    table: list[dict[str, object]] = []
    with ServerProcess(CAPTURING, *seats, "--routed-experts-store", store) as server:
        for name, fields in FORMATS.items():
            rates: dict[str, list[float]] = {"with": [], "without": []}
            work: dict[str, list[float]] = {"with": [], "without": []}
            sides = {
                "with": {"return_routed_experts": True, **fields},
                "without": {"return_routed_experts": False},
            }
            sizes, added = {"with": 0, "without": 0}, list[float]()
            for number in range(options.rounds + 1):
                for side in sorted(rates, reverse=bool(number % 2)):
                    rate, cpu, answers = timed_round(server, asked, sides[side], options.streams)
                    if number:
                        rates[side].append(rate)
                        work[side].append(cpu)
                        sizes[side] = sum(len(answer.body) for answer in answers)
                if number:
                    added += asyncio.run(added_ms(server.address, asked[:ALONE], sides))
            table.append({
                "format": name,
                "bytes_a_row": (sizes["with"] - sizes["without"]) / rows,
                "ms_alone": interval_of_median(added),
                "throughput": paired_ratio(rates["with"], rates["without"]),
                "cpu": paired_ratio(work["with"], work["without"]),
            })  # fmt: skip
            print(
                table[-1]["format"], table[-1]["bytes_a_row"], table[-1]["throughput"], flush=True
            )
    return table


def main() -> None:
    """Run the phases that are asked for, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--round-requests", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--phases", default=",".join(PHASES))
    options = arguments(parser)
    torch.set_num_threads(1)
    made = provenance(options.commit)
    phases = options.phases.split(",")
    earlier = json.loads(options.out.read_text()) if options.out.is_file() else {}
    commits = {**earlier.get("commits", {}), **dict.fromkeys(phases, made["commit"])}
    kept = {phase: earlier[phase] for phase in PHASES if phase in earlier and phase not in phases}
    result: dict[str, object] = {**made, "commits": commits, "model": "tiny-moe, bfloat16", **kept}
    with tempfile.TemporaryDirectory() as folder:
        run: dict[str, Callable[[], object]] = {
            "rows": lambda: rows_phase(options.requests, options.streams),
            "cost": lambda: cost_phase(options),
            "formats": lambda: formats_phase(options, f"{folder}/store"),
        }
        for phase in phases:
            result[phase] = run[phase]()
            print(phase, result[phase], flush=True)
            write(options.out, result)


if __name__ == "__main__":
    main()
