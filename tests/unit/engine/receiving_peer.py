"""One of the two processes of test_weights.py: a trainer that sends, or an engine that receives."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from routing_replay import LLM, SamplingParams
from routing_replay.models import broadcast_weights, describe_weights


def main(rank: int, old: Path, new: Path, work: Path) -> None:
    """Send the new weights, or take them over the old ones and generate."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{work / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    tensors = load_file(new / "model.safetensors")
    if rank == 1:
        broadcast_weights(tensors.items(), group=None, src=1)
    else:
        llm = LLM(old, dtype="float32", device="cpu", enable_return_routed_experts=True)
        llm.receive_weights(describe_weights(tensors.items()), src=1, weights_version=4)
        output = llm.generate([[4, 5, 6]], SamplingParams(temperature=0.0, max_tokens=9))[0]
        told = {
            "tokens": output.outputs[0].token_ids,
            "versions": output.outputs[0].routing.weights_version,
        }
        (work / "told.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(Path, sys.argv[2:]))
