"""How much memory the KV cache may take."""

import gc

import torch

from routing_replay.capture import DeviceCache
from routing_replay.engine.config import EngineConfig, longest_sequence
from routing_replay.engine.step_builder import StepBuilder
from routing_replay.errors import ConfigError
from routing_replay.models import Qwen3MoEModel, RoutingBuffers

__all__ = ["kv_cache_bytes"]

_CPU_BYTES = 1 << 30
_GRAPH_BYTES = 1 << 30  # what CUDA graphs, and libraries that are loaded late, still take


def kv_cache_bytes(config: EngineConfig, model: Qwen3MoEModel, device: torch.device) -> int:
    """Return the upper bound on the KV cache.

    On a GPU, the largest step is run once on a small cache; what it and the weights leave of the share of memory that the
    engine may use is for the cache.

    Args:
        config: The settings.
        model: The decoder, loaded.
        device: Where it runs.

    Returns:
        Bytes.

    Raises:
        ConfigError: Weights and the largest step leave nothing.

    Runtime: on a GPU one step, synchronous.
    """
    if config.num_kv_blocks is not None or config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes or _CPU_BYTES
    if device.type != "cuda":
        return _CPU_BYTES
    peak = _peak_bytes(config, model, device)
    _, total = torch.cuda.mem_get_info(device)
    left = int(total * config.gpu_memory_utilization) - peak - _GRAPH_BYTES
    if left <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {total >> 20} MiB leaves nothing for the KV cache: "
            f"weights and a step of {config.max_num_batched_tokens} tokens take {peak >> 20} MiB; raise it, lower "
            "max_num_batched_tokens, or use a smaller model"
        )
    return left


@torch.inference_mode()
def _peak_bytes(config: EngineConfig, model: Qwen3MoEModel, device: torch.device) -> int:
    """Most bytes in use while the largest step runs, weights included, what other programs have included."""
    model_config, size = model.config, config.block_size
    num_rows = config.max_num_batched_tokens
    longest = min(num_rows, longest_sequence(config, model_config))
    num_blocks = -(-longest // size)
    builder = StepBuilder(
        max_num_rows=num_rows,
        max_num_seqs=max(config.max_num_seqs, -(-num_rows // longest)),
        max_blocks=num_blocks,
        block_size=size,
        device=device,
    )
    heads, head_dim = model_config.num_key_value_heads, model_config.head_dim
    shape = (model_config.num_layers, 2, num_blocks, size, heads, head_dim)
    kv_cache = torch.zeros(shape, dtype=model.dtype, device=device)
    caches = [DeviceCache(model_config.routing_spec, num_rows=num_rows, device=device)]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _, step = builder.probe(num_rows)
    hidden_states = model(step, kv_cache, RoutingBuffers(device_cache=caches[0]))
    speculation = config.speculation
    num_samples = config.max_num_seqs * (
        1 + (speculation.num_speculative_tokens if speculation else 0)
    )
    num_samples = min(num_samples, num_rows)
    model.compute_logits(hidden_states[:num_samples])
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del hidden_states, step, kv_cache, builder, caches
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # The device cache and the replay buffer of the engine, and the sampler's copies of the logits.
    rows_bytes = 2 * 2 * model_config.routing_spec.num_moe_layers * num_rows * model_config.top_k
    sampled_bytes = 3 * 4 * num_samples * model_config.vocab_size
    return total - free + step_bytes + rows_bytes + sampled_bytes
