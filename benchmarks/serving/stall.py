"""The longest wait between tokens of other streams while the routing of a 32k-token context leaves the server.

python benchmarks/serving/stall.py --out docs/results/serving_stall.json

The long prompt's keys, values and rows are in the prefix cache, so that a request for it computes two tokens, in one step, and
then hands out every row. A row has as many bytes as one of Qwen3-30B-A3B (384: there 48 layers of top 8, here twelve of top
32); the model is small and random. Watchers and the long request are in two processes of their own.

What a request costs others has two parts. `gaps` are all their waits during it. The step that computes it is one of them, with or
without routing; `while_rows_leave` are the waits that begin after that step.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from lean_http import Answer, Connection
from load import CAPTURING, FORMATS
from record import arguments, percentiles, provenance, write
from server_process import ServerProcess

VOCABULARY = 1024


def save_model(folder: Path, *, layers: int, top_k: int, length: int) -> None:
    """Write a small random model that takes long contexts; each token goes to all experts, in an order of its own."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, num_experts=top_k, num_experts_per_tok=top_k,
        norm_topk_prob=True, max_position_embeddings=length, initializer_range=0.2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


async def watch(address: tuple[str, int], streams: int, pipe: Pipe) -> None:
    """Read streams without end, and tell when their tokens came once the parent has said so."""
    times: list[list[float]] = [[] for _ in range(streams)]
    is_told = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), is_told.set)

    async def read(index: int) -> None:
        body = {
            "prompt": [index + 1] * 8, "max_tokens": 100_000, "ignore_eos": True, "stream": True, "temperature": 1.0,
            "return_token_ids": True, "return_routed_experts": True, "routed_experts_format": "trace",
        }  # fmt: skip
        while not is_told.is_set():
            body["max_tokens"] = 4000
            async for _ in Connection(address).pieces("/v1/completions", body, Answer()):
                times[index].append(time.monotonic())
                if is_told.is_set():
                    return

    await asyncio.gather(*(read(index) for index in range(streams)))
    pipe.recv()
    pipe.send(times)


def watcher(address: tuple[str, int], streams: int, pipe: Pipe) -> None:
    """Entry of the watchers' process."""
    asyncio.run(watch(address, streams, pipe))


async def ask_long(
    address: tuple[str, int], prompt: Sequence[int], fields: dict[str, object]
) -> tuple[float, float, int]:
    """Ask for the long context; return when the request left, when its last byte came, and the body's bytes."""
    body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, **fields}
    data = json.dumps(body).encode()
    began = time.monotonic()
    connection = Connection(address)
    answer = await connection.post("/v1/completions", data)
    ended = time.monotonic()
    connection.close()
    if answer.status != 200 or not answer.is_whole:
        raise SystemExit(f"the long request failed: {answer.status} {answer.body[:300]}")
    return began, ended, len(answer.body)


def asker(
    address: tuple[str, int], prompt: Sequence[int], fields: dict[str, object], pipe: Pipe
) -> None:
    """Entry of the process that asks for the long context."""
    pipe.send(asyncio.run(ask_long(address, prompt, fields)))


Gap = tuple[float, float]


def gaps_within(times: Sequence[Sequence[float]], windows: Sequence[Gap]) -> list[Gap]:
    """Return the waits between neighbouring tokens of a stream that overlap a window."""
    return [
        (earlier, later)
        for stream in times
        for earlier, later in itertools.pairwise(stream)
        if any(earlier < end and later > begin for begin, end in windows)
    ]


def leaving(gaps: Sequence[Gap], window: Gap, computing_s: float) -> list[Gap]:
    """Return the waits of a request that begin after its own step, which is the longest of those that begin early enough.

    Args:
        gaps: Waits of all streams.
        window: When the request began and ended.
        computing_s: How long it takes without routing: no later wait is taken for its step.
    """
    begin, end = window
    early = [gap for gap in gaps if gap[0] < begin + computing_s and gap[1] > begin]
    computed = max(early, key=lambda gap: gap[1] - gap[0])[1] if early else begin
    return [gap for gap in gaps if computed <= gap[0] < end]


def measure(
    server: ServerProcess,
    prompt: Sequence[int],
    fields: dict[str, object] | None,
    options: argparse.Namespace,
    *,
    computing_s: float = 0.0,
) -> dict[str, object]:
    """Watch streams while the long context is asked for again and again; None: while nobody asks."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    watching = spawn.Process(target=watcher, args=(server.address, options.streams, theirs))
    watching.start()
    time.sleep(options.warm_seconds)
    windows: list[tuple[float, float]] = []
    num_bytes = 0
    for _ in range(options.repeats):
        if fields is None:
            began = time.monotonic()
            time.sleep(1.0)
            windows.append((began, time.monotonic()))
        else:
            answer_here, answer_there = spawn.Pipe()
            process = spawn.Process(
                target=asker, args=(server.address, prompt, fields, answer_there)
            )
            process.start()
            began, ended, num_bytes = answer_here.recv()
            process.join()
            windows.append((began, ended))
        time.sleep(0.3)
    mine.send("stop")
    times = mine.recv()
    watching.join()
    server.wait_idle()
    gaps = gaps_within(times, windows)
    after = (
        [gap for window in windows for gap in leaving(gaps, window, computing_s)]
        if computing_s
        else []
    )
    return {
        "while_rows_leave": percentiles([end - begin for begin, end in after]) if after else None,
        "num_while_rows_leave": len(after),
        "response_bytes": num_bytes,
        "response_ms": 1e3 * statistics.median(end - begin for begin, end in windows),
        "gaps": percentiles([end - begin for begin, end in gaps]),
        "num_gaps": len(gaps),
    }


def main() -> None:
    """Measure every format, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=32_002)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-seconds", type=float, default=5.0)
    parser.add_argument("--formats", help="names separated by semicolons; all if not given")
    options = arguments(parser)
    rng = random.Random(0)
    prompt = [rng.randrange(VOCABULARY) for _ in range(options.context)]
    length = options.context + 5000
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(
            Path(folder) / "model", layers=options.layers, top_k=options.top_k, length=length
        )
        words = (
            CAPTURING, "--max-model-len", str(length), "--num-kv-blocks", str((2 * length + 8 * 5000) // 16),
            "--max-num-batched-tokens", "2048", "--routed-experts-store", f"{folder}/store",
        )  # fmt: skip
        with ServerProcess(*words, model=f"{folder}/model") as server:
            began = time.monotonic()
            asyncio.run(ask_long(server.address, prompt, {"return_routed_experts": False}))
            print(
                f"prefill of {options.context} tokens: {time.monotonic() - began:.1f} s", flush=True
            )
            names = list(FORMATS) if options.formats is None else options.formats.split(";")
            arms: list[tuple[str, dict[str, object] | None]] = [
                ("nobody asks", None),
                ("asked without routing", {"return_routed_experts": False}),
                *((name, {"return_routed_experts": True, **FORMATS[name]}) for name in names),
            ]
            computing_s = 0.0
            for name, fields in arms:
                rows.append(
                    {
                        "case": name,
                        **measure(server, prompt, fields, options, computing_s=computing_s),
                    }
                )
                if name == "asked without routing":
                    computing_s = float(str(rows[-1]["response_ms"])) / 1e3
                print(rows[-1], flush=True)
    result = {
        **provenance(options.commit), "context": options.context, "streams": options.streams, "repeats": options.repeats,
        "model": f"random, {options.layers} layers, {options.top_k} experts, top {options.top_k}", "rows": rows,
    }  # fmt: skip
    write(options.out, result)


if __name__ == "__main__":
    main()
