"""What it costs the server to make each form of routing: processor time from rows to the JSON text that is sent.

python benchmarks/serving/encode_speed.py --out docs/results/serving_encode.json

A short and a long response of a model of Qwen3-30B-A3B's layers, experts and K; experts are drawn with a liking of
each layer for some of them. Forms take turns, so that what the machine does meanwhile befalls all of them.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from load import FORMATS
from record import arguments, provenance, write

from routing_replay.engine import SamplingParams
from routing_replay.engine.serving import ModelCard, RoutedRows
from routing_replay.server.routing import (
    RoutingConfig,
    RoutingOptions,
    RoutingService,
    json_pieces,
)
from routing_replay.trace import ModelRouting

MODEL = ModelRouting(layer_ids=tuple(range(48)), num_layers=48, num_experts=128, top_k=8)
# Prompt and output tokens, and how often each form is made.
RESPONSES = {"short": (512, 256, 40), "long": (32_000, 768, 5)}


def card() -> ModelCard:
    """A model of the shape that is measured; only its routing counts."""
    return ModelCard(
        name="qwen3-30b-a3b", dtype="bfloat16", device="cpu", vocab_size=151_936, max_model_len=40_960, eos_token_ids=(),
        captures=True, routing=MODEL, weights_version=1, block_size=16, num_kv_blocks=1, version="",
    )  # fmt: skip


def random_rows(num_rows: int) -> RoutedRows:
    """Rows whose layers prefer some experts, as those of trained models do."""
    rng = np.random.default_rng(0)
    liking = rng.gumbel(size=(1, len(MODEL.layer_ids), MODEL.num_experts))
    ids = np.empty((num_rows, len(MODEL.layer_ids), MODEL.top_k), np.uint8)
    for start in range(0, num_rows, 1024):
        part = ids[start : start + 1024]
        scores = liking + rng.gumbel(size=(len(part), *liking.shape[1:]))
        part[:] = np.argpartition(-scores, MODEL.top_k, axis=-1)[..., : MODEL.top_k]
    valid = np.ones(num_rows, np.bool_)
    return RoutedRows(start=0, ids=ids, valid=valid, weights_version=((0, 1),))


async def response_bytes(
    service: RoutingService,
    fields: Mapping[str, object],
    tokens: tuple[list[int], list[int]],
    rows: RoutedRows,
) -> int:
    """Make a whole response of one completion, and return its length."""
    prompt, output = tokens
    options = RoutingOptions.model_validate({"return_routed_experts": True, **fields})
    plan = await service.plan(options, prompt, SamplingParams(), surface="completions")
    made = await plan.fields(0, output, rows, is_last=True)
    body = {"choices": [{"index": 0, **made.choice}], **made.response}
    return sum([len(piece) async for piece in json_pieces(body)])


async def measure(prompt_length: int, output_length: int, rounds: int) -> list[dict[str, object]]:
    """Return a row for each form."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(MODEL.num_experts, 100_000, prompt_length + output_length).tolist()
    parts = (tokens[:prompt_length], tokens[prompt_length:])
    rows = random_rows(len(tokens) - 1)
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = RoutingConfig(routed_experts_store=str(Path(folder) / "store"))
        service = RoutingService(card(), config)
        for number in range(rounds + 1):
            for name, fields in FORMATS.items():
                began = time.process_time()
                sizes[name] = await response_bytes(service, fields, parts, rows)
                if number:
                    seconds[name].append(time.process_time() - began)
        await service.close()
    count = len(rows.valid)
    return [
        {
            "format": name,
            "bytes_a_row": sizes[name] / count,
            "us_a_row": 1e6 * statistics.median(found) / count,
            "ms_a_response": 1e3 * statistics.median(found),
        }
        for name, found in seconds.items()
    ]


def main() -> None:
    """Measure both lengths, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    options = arguments(parser)
    responses: dict[str, object] = {}
    for name, (prompt, output, rounds) in RESPONSES.items():
        responses[name] = {"prompt": prompt, "output": output, "rounds": rounds, "forms": asyncio.run(measure(prompt, output, rounds))}  # fmt: skip
        print(name, responses[name], flush=True)
    write(
        options.out, {**provenance(options.commit), "model": asdict(MODEL), "responses": responses}
    )


if __name__ == "__main__":
    main()
