"""Whether this machine's GEMMs and attention compute every row of a block alike, as batch invariance needs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels import ROW_BLOCK, linear
from routing_replay.models.attention import ATTENTION_ROWS, ATTENTION_SPAN, attend_block
from routing_replay.models.layers import Linear, MoEBlock
from routing_replay.models.lm_head import project
from routing_replay.models.qwen3_moe import Qwen3MoEModel

__all__ = ["check_batch_invariance"]


def _gemms(model: Qwen3MoEModel) -> Iterator[tuple[Tensor, Callable[..., Tensor]]]:
    """One weight of each shape, and what multiplies rows by it."""
    seen: set[tuple[int, ...]] = set()
    for module in model.modules():
        weights: tuple[Tensor, ...] = ()
        if isinstance(module, Linear):
            weights = (module.weight,)
        elif isinstance(module, MoEBlock):
            weights = (module.gate_up_proj[0], module.down_proj[0])
        for weight in weights:
            if tuple(weight.shape) not in seen:
                seen.add(tuple(weight.shape))
                yield weight, linear
    yield model.lm_head.weight, project


def _first_difference(rows: int, compute: Callable[[int], Tensor]) -> int | None:
    """The first position at which a row comes out otherwise than at position 0."""
    expected = compute(0)
    for position in range(1, rows):
        if not torch.equal(compute(position), expected):
            return position
    return None


def _refuse(what: str, position: int) -> ConfigError:
    return ConfigError(
        f"batch_invariant=True, but on this machine with {torch.get_num_threads()} threads {what} computes a row at "
        f"position {position} otherwise than at position 0; use one thread (torch.set_num_threads(1)), or "
        "batch_invariant=False"
    )


@torch.inference_mode()
def check_batch_invariance(model: Qwen3MoEModel) -> None:
    """Try every GEMM shape of a model, and its attention, with one row at all positions among random others.

    Args:
        model: A loaded decoder.

    Raises:
        ConfigError: A row's bits depend on its position or on its neighbours.

    Runtime: a block of rows for each shape and position; host syncs; the global random state stays as it is.
    """
    generator = torch.Generator().manual_seed(0)
    device = model.embed_tokens.weight.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for weight, multiply in _gemms(model):
        row = random(weight.shape[1]).to(model.dtype)

        def at(
            position: int,
            weight: Tensor = weight,
            row: Tensor = row,
            multiply: Callable[..., Tensor] = multiply,
        ) -> Tensor:
            rows = random(ROW_BLOCK, weight.shape[1]).to(model.dtype)
            rows[position] = row
            return multiply(rows, weight, batch_invariant=True)[position]

        position = _first_difference(ROW_BLOCK, at)
        if position is not None:
            raise _refuse(
                f"a GEMM of [{ROW_BLOCK}, {weight.shape[1]}] x {list(weight.shape)}^T", position
            )
    if device.type == "cuda":
        return  # paged_attention is batch-invariant by its construction, and needs no attempt
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    query = random(heads, config.head_dim).to(model.dtype)
    keys = random(2, ATTENTION_SPAN, kv_heads, config.head_dim).to(model.dtype)

    def attend_at(position: int) -> Tensor:
        queries = random(ATTENTION_ROWS, heads, config.head_dim).to(model.dtype)
        context = random(2, ATTENTION_ROWS, ATTENTION_SPAN, kv_heads, config.head_dim)
        context = context.to(model.dtype)
        queries[position], context[:, position] = query, keys
        mask = torch.ones(ATTENTION_ROWS, ATTENTION_SPAN, dtype=torch.bool, device=device)
        mask[position, ATTENTION_SPAN // 2 :] = False
        return attend_block(queries, context[0], context[1], mask)[position]

    position = _first_difference(ATTENTION_ROWS, attend_at)
    if position is not None:
        raise _refuse(f"attention of {ATTENTION_ROWS} rows", position)
