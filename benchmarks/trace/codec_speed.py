"""Measure the trace codecs: bytes a token, and megabytes of raw ids a second each way on one thread; write JSON.

Encoding and decoding are those of a whole file: packing, checksums, and the validation of every id are in the times.

python benchmarks/trace/codec_speed.py --output docs/results/trace_codecs.json
"""

import argparse
import json
from math import comb, log2
from pathlib import Path

import zstandard
from measuring import provenance, seconds, skewed_trace

from routing_replay.trace import CODEC_NAMES, RoutingTrace, decode_trace, encode_trace

# layers, E, K: Qwen3-30B-A3B, DeepSeek-V3, Qwen3-Next, Kimi-K3
SHAPES = ((48, 128, 8), (58, 256, 8), (48, 512, 10), (92, 896, 16))
ROWS = 2048


def measure_codec(trace: RoutingTrace, codec: str) -> dict[str, float]:
    """Encode and decode a trace, the same bytes each time."""
    data = encode_trace(trace, codec=codec)
    wanted = trace.as_sets() if "packed" in codec else trace
    assert decode_trace(data).equals(wanted)
    return {
        "bytes_per_token": len(data) / trace.num_rows,
        "encode_mb_per_s": trace.ids.nbytes
        / seconds(lambda: encode_trace(trace, codec=codec), 7)
        / 1e6,
        "decode_mb_per_s": trace.ids.nbytes / seconds(lambda: decode_trace(data), 7) / 1e6,
    }


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    result: dict[str, object] = {
        **provenance(),
        "zstandard": zstandard.__version__,
        "rows": ROWS,
    }
    shapes: dict[str, object] = {}
    for layers, num_experts, top_k in SHAPES:
        trace = skewed_trace(ROWS, layers=layers, num_experts=num_experts, top_k=top_k)
        entropy_bytes = layers * log2(comb(num_experts, top_k)) / 8
        codecs = {codec: measure_codec(trace, codec) for codec in CODEC_NAMES}
        width = (comb(num_experts, top_k) - 1).bit_length()
        shapes[f"L{layers} E{num_experts} K{top_k}"] = {
            "raw_id_bytes_per_token": trace.ids[:1].nbytes,
            "set_entropy_bytes_per_token": entropy_bytes,
            "packed_id_bytes_per_token": layers * width / 8,
            "packed_over_entropy": layers * width / 8 / entropy_bytes,
            "codecs": codecs,
        }
        for codec, row in codecs.items():
            print(
                f"L{layers} E{num_experts} K{top_k} {codec}: "
                + ", ".join(f"{k} {v:.1f}" for k, v in row.items())
            )
    result["shapes"] = shapes
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
