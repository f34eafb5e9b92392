"""Compare the Triton gather with the reference on a GPU, time both phases in a CUDA graph, and write JSON.

python benchmarks/ops/check_gather_rows.py --out gather_rows.json --commit "$(git rev-parse HEAD)"
"""

import argparse
import json
from pathlib import Path

import torch
import triton

from routing_replay.kernels import gather_rows
from routing_replay.kernels.gather import gather_rows_reference

# layers, cache rows, K, E, live rows: Qwen3-30B-A3B decode and prefill, DeepSeek-V3, the embedded model.
SHAPES = (
    (48, 8192, 8, 128, 1),
    (48, 8192, 8, 128, 256),
    (48, 8192, 8, 128, 8192),
    (58, 8192, 8, 256, 256),
    (10, 4096, 4, 32, 128),
)


def check_and_time(shape: tuple[int, ...]) -> dict[str, object]:
    """Return one row of the result; raises where kernel and reference differ."""
    layers, capacity, top_k, num_experts, live = shape
    cache = torch.randint(-2, num_experts + 1, (layers, capacity, top_k), device="cuda").to(
        torch.int16
    )
    distinct = torch.rand(layers, capacity, num_experts, device="cuda").argsort(-1)[..., :top_k]
    cache[:, ::2] = distinct[:, ::2].to(torch.int16)
    row_idx = torch.randperm(live, device="cuda")
    dtype = torch.uint8 if num_experts <= 255 else torch.int16
    results: list[tuple[torch.Tensor, ...]] = []
    for is_kernel in (True, False):
        own = cache.clone()
        rows = torch.full((live + 1, layers, top_k), 77, dtype=dtype, device="cuda")
        flags = torch.full((live + 1,), 77, dtype=torch.uint8, device="cuda")
        if is_kernel:
            gather_rows(
                own,
                row_idx,
                rows_out=rows,
                flags_out=flags,
                num_reset=live,
                num_experts=num_experts,
            )
        else:
            gather_rows_reference(own, row_idx, rows, flags, live, num_experts)
        results.append((own, rows, flags))
    for kernel, reference in zip(*results, strict=True):
        assert torch.equal(kernel, reference), shape
    own, rows, flags = results[0]
    num_good = int((flags[:live] == 0).sum())

    def call() -> None:
        gather_rows(
            own, row_idx, rows_out=rows, flags_out=flags, num_reset=live, num_experts=num_experts
        )

    milliseconds = triton.testing.do_bench_cudagraph(call, quantiles=[0.5, 0.2, 0.8])
    names = ("median_us", "p20_us", "p80_us")
    timed = {name: round(1000 * value, 2) for name, value in zip(names, milliseconds, strict=True)}
    return {"L_N_K_E_rows": list(shape), "equal_to_reference": True, "good_rows": num_good, **timed}


def main() -> None:
    """Check and time every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record = {
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cache": "warm",
        "rows": [check_and_time(shape) for shape in SHAPES],
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
