"""One of the two processes of test_broadcast.py: a trainer that sends, or a decoder that receives."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from routing_replay.errors import UnsupportedModelError
from routing_replay.models import (
    WeightInfo,
    broadcast,
    broadcast_weights,
    describe_weights,
    load_model,
    receive_weights,
)


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New weights, of three dtypes and none of them contiguous in memory."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    new = {}
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        wide = torch.stack((tensor, tensor * 1.5 - 0.25), dim=-1).to(dtypes[index % 3])
        new[name] = wide[..., 1]
    return new


def main(rank: int, folder: Path, work: Path) -> None:
    """Send or receive all weights, in several messages."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{work / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    broadcast._BUCKET_BYTES = 1000  # pyright: ignore[reportPrivateUsage]
    tensors = changed(load_file(folder / "model.safetensors"))
    metadata = describe_weights(tensors.items())
    if rank == 1:
        broadcast_weights(iter(tensors.items()), group=None, src=1)
    else:
        model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        wrong = WeightInfo(name="model.norm.weight", dtype="float32", shape=(3,))
        try:
            receive_weights(model, [*metadata, wrong], group=None, src=1)
        except UnsupportedModelError:
            assert all(torch.equal(before[name], now) for name, now in model.named_parameters())
        else:
            raise AssertionError("metadata of another model were taken")
        receive_weights(model, metadata, group=None, src=1)
        places = model.checkpoint_places()
        save_file(
            {name: found[0].clone() for name, found in places.items()}, work / "got.safetensors"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
