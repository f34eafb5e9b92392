"""A decoder's weights away from its device while it sleeps, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.models.qwen3_moe import Qwen3MoEModel

__all__ = ["HostWeights", "offload_weights", "restore_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWeights:
    """What is left of a sleeping decoder's weights.

    Attributes:
        level: 1: their values are here; 2: they were dropped.
        shapes: Of all parameters by name.
        tensors: Their values, in pinned memory where the decoder was on a GPU; empty on level 2.
    """

    level: int
    shapes: dict[str, torch.Size]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Host memory of the values."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@torch.no_grad()
def offload_weights(model: Qwen3MoEModel, *, level: int = 1) -> HostWeights:
    """Free the memory of a decoder's weights on its device; it cannot run until `restore_weights`.

    Args:
        model: The decoder.
        level: 1 keeps the values in host memory; 2 drops them, to be loaded again (levels as in vLLM).

    Returns:
        What `restore_weights` needs.

    Raises:
        ConfigError: The level is unknown, or the weights are away already.

    Runtime: waits for the device; frees the memory that torch keeps for reuse, too. Pinned memory is taken in powers of
        two for each parameter. CUDA graphs that were captured before are void. On a CPU values move without a copy.
    """
    if level not in (1, 2):
        raise ConfigError(f"level={level}; accepted are 1 (to host memory) and 2 (dropped)")
    if model.is_offloaded:
        raise ConfigError("the model's weights are offloaded already; restore them first")
    parameters = dict(model.named_parameters())
    device = model.embed_tokens.weight.device
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    if level == 1:
        for name, parameter in parameters.items():
            values = parameter.detach()
            if device.type == "cuda":
                values = torch.empty_like(values, device="cpu", pin_memory=True)
                values.copy_(parameter, non_blocking=True)
            tensors[name] = values
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for parameter in parameters.values():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model.is_offloaded = True
    return HostWeights(level=level, shapes=shapes, tensors=tensors)


@torch.no_grad()
def restore_weights(model: Qwen3MoEModel, host: HostWeights) -> None:
    """Give a sleeping decoder's weights memory on its device again, and their values where those were kept.

    Args:
        model: The decoder.
        host: Of `offload_weights`. After level 2 all weights are NaN: load them with `load_folder_weights`,
            `copy_weights` or `receive_weights` before the next step.

    Raises:
        ConfigError: The weights are not away, or `host` is of another model.

    Runtime: waits for the device; addresses are new, so that CUDA graphs must be captured again. Out of memory leaves the
        model asleep.
    """
    parameters = dict(model.named_parameters())
    if not model.is_offloaded:
        raise ConfigError("the model's weights are not offloaded; there is nothing to restore")
    if parameters.keys() != host.shapes.keys():
        raise ConfigError(
            f"host holds {len(host.shapes)} weights, the model has {len(parameters)}, of other names; pass what "
            "offload_weights returned for this model"
        )
    device = model.embed_tokens.weight.device
    restored: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if host.level == 1 and device.type != "cuda":
            restored[name] = host.tensors[name]
            continue
        restored[name] = torch.empty(host.shapes[name], dtype=parameter.dtype, device=device)
        if host.level == 1:
            restored[name].copy_(host.tensors[name], non_blocking=True)
        else:
            restored[name].fill_(torch.nan)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for name, parameter in parameters.items():
        parameter.data = restored[name]
    model.is_offloaded = False
