"""Megatron-Core's own routers on the CPU, one process wide."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


def start_parallel_state() -> None:
    """One rank of every kind."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def moe_config(
    num_layers: int, layer_ids: tuple[int, ...], num_experts: int, top_k: int, **changes: object
) -> TransformerConfig:
    """A config whose routers replay."""
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=num_experts,
        moe_router_topk=top_k,
        moe_router_load_balancing_type="none",
        moe_layer_freq=[int(idx in layer_ids) for idx in range(num_layers)],
        add_bias_linear=False,
        use_cpu_initialization=True,
        **{"moe_enable_routing_replay": True, "moe_router_pre_softmax": True, **changes},
    )


class Decoder(torch.nn.Module):
    """The routers of a decoder, where a model has them."""

    def __init__(self, config: TransformerConfig, layer_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.routers = torch.nn.ModuleList()
        for layer_idx in layer_ids:
            router = TopKRouter(config, pg_collection=get_default_pg_collection())
            router.set_layer_number(layer_idx + 1)
            self.routers.append(router)


class Model(torch.nn.Module):
    """What stands for a GPTModel: a `decoder`."""

    def __init__(self, config: TransformerConfig, layer_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = Decoder(config, layer_ids)


def routed_sets(router: TopKRouter, logits: torch.Tensor) -> list[list[set[int]]]:
    """The experts that a router sends every token to; logits `[S, B, E]`, result `[s][b]`."""
    _, routing_map = router.routing(logits)
    grid = routing_map.view(logits.shape)
    return [
        [set(torch.nonzero(token).flatten().tolist()) for token in position] for position in grid
    ]
