"""The layers that are measured, under the names of the models that have them."""

from dataclasses import dataclass

from routing_replay.kernels import RoutingMethod, RoutingMethodType

__all__ = ["SHAPES", "TOKENS", "LayerShape"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a step, where none are named."""

_FEW_LAYERS_FROM_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One layer on one rank.

    Attributes:
        name: Model, and how it is split.
        hidden_size: H.
        intermediate_size: I of one expert, on this rank.
        num_local_experts: Experts on this rank, the first of the model.
        routing: How the layer routes; `num_experts` in it counts the experts of all ranks.
        copies: Layers with weights and routing of their own that one graph goes through, so that weights are cold: what
            lies between two uses of a layer exceeds the 50 MB of an H100's L2 many times.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    routing: RoutingMethod
    copies: int

    @property
    def has_all_experts(self) -> bool:
        """Whether no expert is on another rank."""
        return self.num_local_experts == self.routing.num_experts

    @property
    def has_softmax_routing(self) -> bool:
        """Whether the router is a softmax, its top-k, and a division by the sum."""
        return self.routing.type is RoutingMethodType.RenormalizeNaive

    def layers(self, num_tokens: int) -> int:
        """Layers of one graph: fewer where one layer alone reads gigabytes."""
        return min(self.copies, 2) if num_tokens >= _FEW_LAYERS_FROM_TOKENS else self.copies


def _softmax(num_experts: int, top_k: int) -> RoutingMethod:
    kind = RoutingMethodType.RenormalizeNaive
    return RoutingMethod(type=kind, num_experts=num_experts, top_k=top_k)


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape(
            name="qwen3_30b_a3b",
            hidden_size=2048,
            intermediate_size=768,
            num_local_experts=128,
            routing=_softmax(128, 8),
            copies=8,
        ),
        LayerShape(
            name="olmoe",
            hidden_size=2048,
            intermediate_size=1024,
            num_local_experts=64,
            routing=_softmax(64, 8),
            copies=8,
        ),
        LayerShape(
            name="mixtral_tp2",
            hidden_size=4096,
            intermediate_size=7168,
            num_local_experts=8,
            routing=_softmax(8, 2),
            copies=4,
        ),
        LayerShape(
            name="deepseek_v3_tp8",
            hidden_size=7168,
            intermediate_size=256,
            num_local_experts=256,
            routing=_softmax(256, 8),
            copies=4,
        ),
        LayerShape(
            name="deepseek_v3_ep8",
            hidden_size=7168,
            intermediate_size=2048,
            num_local_experts=32,
            routing=RoutingMethod(
                type=RoutingMethodType.DeepSeekV3,
                num_experts=256,
                top_k=8,
                n_group=8,
                topk_group=4,
                routed_scaling_factor=2.5,
            ),
            copies=4,
        ),
    )
}
"""Shapes by name. The first four route by softmax, so that every peer can; the last has DeepSeek-V3's own router."""
