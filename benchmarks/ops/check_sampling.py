"""Check the sampling kernels against plain torch on a GPU, then time them in a CUDA graph; write JSON.

python benchmarks/ops/check_sampling.py --out docs/results/sampling.json --commit "$(git rev-parse HEAD)"

No time is written unless every check passes. Times are per `sample_plain` with logprobs and ranks in a CUDA graph of 10
calls: on inputs taken in turn (of one row all fit into the L2 cache, of 32 rows and more they do not), and on one input.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.draws import Draws
from routing_replay.engine.penalties import TokenCounts
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import launch_sample
from routing_replay.engine.sampling_params import SamplingParams
from routing_replay.kernels.sampling import (
    PlainSamples,
    choose_tokens,
    log_softmax,
    sample_plain,
    sample_plain_reference,
)
from routing_replay.kernels.sampling._triton import CHUNK, launch_sample_plain

VOCAB_SIZE = 151_936
VOCAB_SIZES = (1, 2, 1000, 4096, 4097, 50_257, VOCAB_SIZE)
TIMED_ROWS = (1, 32, 128, 256)
LAST = 1 - 2.0**-53
INFINITY = float("inf")
LOGPROB_TOLERANCE = 2e-6  # of 1 + |logprob|
# Sums of float32 probabilities, in torch, are off by as much as this; a draw so near to an edge may go either way.
EDGE = 2e-6
GRAPH_CALLS = 10
SWEEP = ((2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_of(kind: str, num_rows: int, vocab_size: int) -> Inputs:
    """Return logits, temperatures and draws: ordinary ones, or those on which samplers have been wrong."""
    logits = 3 * torch.randn(num_rows, vocab_size, device="cuda")
    uniform = torch.rand(num_rows, dtype=torch.float64, device="cuda")
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.5], device="cuda").repeat(num_rows)[:num_rows]
    if kind == "ties":
        logits = logits.round()
    elif kind == "masked":
        keep = torch.rand(num_rows, vocab_size, device="cuda") < 0.001
        keep[torch.arange(num_rows), torch.randint(vocab_size, (num_rows,))] = True
        logits = logits.masked_fill(~keep, -INFINITY)
    elif kind == "one_hot":
        place = torch.randint(vocab_size, (num_rows, 1), device="cuda")
        logits = torch.full_like(logits, -INFINITY).scatter(1, place, 2.0)
    elif kind == "peaked":
        logits = 20 * logits
    elif kind == "equal":
        logits = torch.full_like(logits, -7.0)
    elif kind == "dense":  # one bit apart: temperatures make ties of them
        logits = (16 + torch.arange(vocab_size, device="cuda") * 2.0**-19).repeat(num_rows, 1)
    elif kind == "first":
        uniform.zero_()
    elif kind == "last":
        uniform.fill_(LAST)
    return logits, temperature, uniform


KINDS = ("random", "ties", "masked", "one_hot", "peaked", "equal", "dense", "first", "last")


def check_tokens(kind: str, given: Inputs) -> int:
    """Compare with torch; return how many tokens differ because the draw lies on an edge of the distribution."""
    logits, temperature, uniform = given
    found = sample_plain(*given)
    expected = sample_plain_reference(*given)
    tokens = found.token_ids
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    is_greedy = temperature == 0
    assert torch.equal(tokens[is_greedy], expected.token_ids[is_greedy]), "greedy tokens differ"
    scale = temperature.masked_fill(is_greedy, 1.0)
    probs = (logits / scale[:, None]).double().softmax(-1)
    chosen = tokens[:, None]
    assert (probs.gather(1, chosen) > 0).all(), "a token without probability"
    ends = probs.cumsum(-1)
    end = ends.gather(1, chosen).squeeze(1)
    start = end - probs.gather(1, chosen).squeeze(1)
    is_inside = (uniform >= start - EDGE) & (uniform < end + EDGE)
    assert (is_inside | is_greedy).all(), "a token far from its draw"
    differing = tokens != expected.token_ids
    near = ((uniform - start).abs() < EDGE) | ((uniform - end).abs() < EDGE)
    assert (near | ~differing).all(), "tokens differ"
    if kind in ("one_hot", "equal"):
        assert not differing.any(), "tokens differ on exact probabilities"
    check_logprobs(found, logits, logits / scale[:, None])
    greedy = (temperature == 0).tolist()
    again = choose_tokens((logits / scale[:, None]), uniform, greedy)
    assert torch.equal(again, tokens), "choose_tokens differs from sample_plain"
    assert torch.equal(sample_plain(*given, with_logprobs=False).token_ids, tokens)
    return int(differing.sum())


def check_logprobs(found: PlainSamples, logits: Tensor, scaled: Tensor) -> None:
    """Logprobs against float64; ranks exactly, among the logprobs of the same kernels."""
    chosen = found.token_ids[:, None]
    for rows, values, ranks in (
        (logits, found.raw_logprobs, found.ranks),
        (scaled, found.logprobs, found.processed_ranks),
    ):
        table = log_softmax(rows)
        exact = rows.double().log_softmax(-1)
        error = (table - exact).abs() / (1 + exact.abs())
        error = error.masked_fill(exact == -INFINITY, 0)
        assert torch.equal(table == -INFINITY, exact == -INFINITY), "tokens without probability"
        assert error.max() < LOGPROB_TOLERANCE, f"logprobs are off by {float(error.max())}"
        assert torch.equal(table.gather(1, chosen).squeeze(1), values), "logprobs differ"
        assert torch.equal((table > values[:, None]).sum(-1).int() + 1, ranks), "ranks differ"


def check_bad_rows() -> None:
    """A row with NaN or +inf, or of -inf alone, says so and leaves its neighbours alone."""
    logits, temperature, uniform = inputs_of("random", 12, VOCAB_SIZE)
    good = sample_plain(logits, temperature, uniform).packed
    logits[1, 77] = float("nan")
    logits[3, -1] = INFINITY
    logits[5] = -INFINITY
    logits[7] = float("nan")
    found = sample_plain(logits, temperature, uniform)
    is_bad = torch.arange(12, device="cuda") % 2 == 1
    is_bad[9:] = False
    assert torch.equal(found.raw_logprobs.isnan(), is_bad)
    assert torch.equal(found.logprobs.isnan(), is_bad)
    assert ((found.token_ids >= 0) & (found.token_ids < VOCAB_SIZE)).all()
    assert torch.equal(found.packed[~is_bad], good[~is_bad])
    assert torch.equal(log_softmax(logits).isnan().all(-1), is_bad)


def check_independence() -> None:
    """A row's bits depend on itself alone: not on the batch, its place, strides or alignment."""
    for vocab_size in (50_257, VOCAB_SIZE):
        given = inputs_of("random", 256, vocab_size)
        together = sample_plain(*given).packed
        table = log_softmax(given[0])
        for row in (0, 1, 2, 3, 97, 255):
            alone = [item[row : row + 1].clone() for item in given]
            assert torch.equal(sample_plain(*alone).packed, together[row : row + 1])
            assert torch.equal(log_softmax(alone[0]), table[row : row + 1])
        order = torch.randperm(256, device="cuda")
        moved = sample_plain(*(item[order] for item in given)).packed
        assert torch.equal(moved, together[order])
        wide = torch.full((256, vocab_size + 3), 50.0, device="cuda")
        wide[:, 1 : 1 + vocab_size] = given[0]
        strided = sample_plain(wide[:, 1 : 1 + vocab_size], *given[1:]).packed
        assert torch.equal(strided, together)
        for _ in range(20):
            assert torch.equal(sample_plain(*given).packed, together)


def check_graph() -> None:
    """A captured call reads new inputs at each replay and gives the bits of an eager one."""
    static = inputs_of("random", 64, VOCAB_SIZE)
    sample_plain(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = sample_plain(*static)
    for kind in KINDS:
        given = inputs_of(kind, 64, VOCAB_SIZE)
        for target, source in zip(static, given, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(samples.packed, sample_plain(*given).packed), kind


def chi_square() -> dict[str, float]:
    """Draw often from a small vocabulary; return the statistic, in standard deviations from its mean."""
    found: dict[str, float] = {}
    count, size = 200_000, 64
    logits = 2 * torch.randn(size, device="cuda")
    for temperature in (0.5, 1.0, 2.0):
        uniform = torch.rand(count, dtype=torch.float64, device="cuda")
        scale = torch.full((count,), temperature, device="cuda")
        tokens = sample_plain(logits.repeat(count, 1), scale, uniform).token_ids
        expected = (logits.double() / temperature).softmax(0) * count
        counted = torch.bincount(tokens, minlength=size)
        is_usable = expected > 5
        terms = ((counted - expected) ** 2 / expected)[is_usable]
        freedom = len(terms) - 1
        deviations = (float(terms.sum()) - freedom) / (2 * freedom) ** 0.5
        assert abs(deviations) < 5, f"chi-square is {deviations} deviations off"
        found[str(temperature)] = round(deviations, 2)
    return found


def _request(seed: int, settings: dict[str, object]) -> Request:
    params = SamplingParams(**settings)  # pyright: ignore[reportArgumentType]
    names = Request.__dataclass_fields__
    source = (
        {"draws": Draws(seed)} if "draws" in names else {"generator": torch.Generator().manual_seed(seed)}
    )  # fmt: skip
    request = Request(
        request_id=str(seed), prompt=None, token_ids=[1, 2], num_prompt_tokens=2, params=params, eos_token_ids=(4,),
        **source,
    )  # fmt: skip
    if params.has_penalties:
        request.token_counts = TokenCounts(VOCAB_SIZE, [1, 2], torch.device("cuda"))
    return request


def check_requests() -> None:
    """`launch_sample` gives each request, beside others and beside plain rows, what it gets alone; without a sync."""
    settings: Sequence[dict[str, object]] = (
        {}, {"temperature": 0.0, "logprobs": 0}, {"temperature": 0.7, "logprobs": 0}, {"top_k": 20, "top_p": 0.95},
        {"top_k": 5000, "logprobs": 2}, {"top_p": 0.8, "logprobs": 0}, {"min_p": 0.1, "logprobs": 20},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.3}, {"min_tokens": 2, "stop_token_ids": (3, 8)},
    )  # fmt: skip
    logits = 3 * torch.randn(len(settings), VOCAB_SIZE, device="cuda")
    index = [0] * len(settings)
    drawn = [Draws(seed).at(0) for seed in range(len(settings))]
    uniform = torch.tensor(drawn, dtype=torch.float64, device="cuda")
    temperature = torch.tensor([item.get("temperature", 1.0) for item in settings], device="cuda")
    plain = sample_plain(logits, temperature, uniform)
    for mode in LogprobsMode:
        alone = [
            launch_sample(
                logits[row : row + 1], None, [_request(row, item)], mode, output_index=[0]
            ).wait()[0]
            for row, item in enumerate(settings)
        ]
        requests = [_request(row, item) for row, item in enumerate(settings)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        given = launch_sample(logits, plain, requests, mode, output_index=index, uniform=uniform)
        own = launch_sample(logits, None, requests, mode, output_index=index, uniform=uniform)
        torch.cuda.set_sync_debug_mode("default")
        assert given.wait() == own.wait() == alone
        assert given.token_ids.tolist() == [token.token_id for token in alone]


def graph_time(call: Callable[[int], object], repeats: int = 50) -> dict[str, float]:
    """Time a call inside a CUDA graph of `GRAPH_CALLS` calls, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(GRAPH_CALLS):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(GRAPH_CALLS):
            call(index)
    samples: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1000 * start.elapsed_time(end) / GRAPH_CALLS)
    twentieths = statistics.quantiles(samples, n=20)
    return {
        "median_us": round(statistics.median(samples), 2),
        "p20_us": round(twentieths[3], 2),
        "p80_us": round(twentieths[15], 2),
    }


def timed_inputs(num_rows: int, spread: float, temperature: float) -> list[Inputs]:
    """Return inputs for the calls of a graph, at most 1.3 GB of them."""
    copies = max(1, min(GRAPH_CALLS, 2048 // num_rows))
    scale = torch.full((num_rows,), temperature, device="cuda")
    return [
        (
            spread * torch.randn(num_rows, VOCAB_SIZE, device="cuda"),
            scale,
            torch.rand(num_rows, dtype=torch.float64, device="cuda"),
        )
        for _ in range(copies)
    ]


def time_rows(num_rows: int) -> list[dict[str, object]]:
    """Time ordinary logits, and flat ones, whose drawn tokens have so low a rank that every chunk is read twice."""
    rows: list[dict[str, object]] = []
    for name, spread, temperature in (
        ("peaked", 8.0, 1.0),
        ("peaked, temperature 0.7", 8.0, 0.7),
        ("peaked, greedy", 8.0, 0.0),
        ("flat", 1.0, 1.0),
    ):
        given = timed_inputs(num_rows, spread, temperature)
        in_turn = graph_time(lambda index, given=given: sample_plain(*given[index % len(given)]))
        one_input = graph_time(lambda _, given=given: sample_plain(*given[0]))
        tokens = graph_time(
            lambda index, given=given: sample_plain(*given[index % len(given)], with_logprobs=False)
        )
        megabytes = num_rows * VOCAB_SIZE * 4 / 1e6
        rows.append(
            {
                "rows": num_rows,
                "logits": name,
                "logits_mb": round(megabytes, 1),
                "in_turn": in_turn,
                "one_input": one_input,
                "in_turn_without_logprobs": tokens,
                "tb_per_s_of_one_read": round(megabytes / in_turn["median_us"], 3),
            }
        )
    given = timed_inputs(num_rows, 8.0, 1.0)
    table = graph_time(lambda index: log_softmax(given[index % len(given)][0]))
    rows.append({"rows": num_rows, "op": "log_softmax", "in_turn": table})
    rows.append({"rows": num_rows, "op": "torch", **time_torch(given[0])})
    return rows


def time_torch(given: Inputs) -> dict[str, float]:
    """Time what torch needs for the tokens alone; its reference syncs, so it runs outside a graph."""
    taken = triton.testing.do_bench(
        lambda: sample_plain_reference(*given, with_logprobs=False), return_mode="median"
    )
    return {"median_us": round(1000 * taken, 2)}


def sweep(num_rows: int) -> list[dict[str, object]]:
    """Time other tiles of the first and last kernel."""
    given = timed_inputs(num_rows, 8.0, 1.0)
    packed = torch.empty((num_rows, 3), dtype=torch.int64, device="cuda")
    rows: list[dict[str, object]] = []
    for chunk, warps in SWEEP:
        taken = graph_time(
            lambda index, chunk=chunk, warps=warps: launch_sample_plain(
                *given[index % len(given)], packed, chunk=chunk, chunk_warps=warps
            )
        )
        rows.append({"rows": num_rows, "chunk": chunk, "chunk_warps": warps, **taken})
    return rows


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    on_edges = {
        f"{kind}, V {vocab_size}": check_tokens(kind, inputs_of(kind, num_rows, vocab_size))
        for kind in KINDS
        for vocab_size in VOCAB_SIZES
        for num_rows in (1, 33)
    }
    check_bad_rows()
    check_independence()
    check_graph()
    check_requests()
    record: dict[str, object] = {
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vocab_size": VOCAB_SIZE,
        "chunk": CHUNK,
        "tokens_that_differ_on_an_edge": sum(on_edges.values()),
        "chi_square_deviations": chi_square(),
        "equal_to_reference": True,
        "independent_of_neighbours": True,
        "equal_in_a_graph": True,
        "rows": [row for num_rows in TIMED_ROWS for row in time_rows(num_rows)],
    }
    if arguments.sweep:
        record["sweep"] = [row for num_rows in (1, 128) for row in sweep(num_rows)]
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
