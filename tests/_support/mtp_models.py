"""Random Qwen3-MoE checkpoints with layers that draft tokens."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from _support.tiny_models import TinyShape, save_tiny_model


def save_mtp_model(folder: Path, shape: TinyShape, *, depths: int, repeats: bool) -> Path:
    """Write a checkpoint whose drafting layers are random, or with `repeats` draft each token once more.

    With `repeats` the output projection is the embedding, so that the model itself likes to repeat its last token.
    """
    save_tiny_model(folder, shape)
    raw = json.loads((folder / "config.json").read_text())
    raw["num_nextn_predict_layers"] = depths
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    if repeats:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    size = tensors["model.norm.weight"].shape[0]
    for depth in range(depths):
        stem = f"model.layers.{shape.num_layers + depth}"
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            noise = torch.randn(tensors[name].shape, generator=generator) * 0.1
            tensors[name.replace("model.layers.0", stem)] = tensors[name] * 0.9 + noise
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{stem}.{name}.weight"] = torch.rand(size, generator=generator) + 0.5
        mixing = torch.randn(size, 2 * size, generator=generator) * 0.2
        if repeats:
            mixing = torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1)
            for name, tensor in tensors.items():
                if name.startswith(stem) and ("o_proj" in name or "down_proj" in name):
                    tensor.zero_()
        tensors[f"{stem}.eh_proj.weight"] = mixing
    save_file(tensors, folder / "model.safetensors")
    return folder
