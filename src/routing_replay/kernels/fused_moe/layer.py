"""The experts of one layer as every backend takes them."""

from dataclasses import dataclass, field

from routing_replay.kernels.experts import ActivationType, ExpertWeights, SwigluParameters
from routing_replay.kernels.experts.config import ExpertsChoice, GemmTile

__all__ = ["ExpertsLayer", "choice_text"]


def _tile_text(tile: GemmTile) -> str:
    return (
        f'{{"depth":{tile.depth},"rows":{tile.rows},"stages":{tile.stages},"warps":{tile.warps}}}'
    )


def choice_text(choice: ExpertsChoice | None) -> str:
    """Write a choice as `ExpertsChoice.to_json` does, in steps that `torch.compile` can follow.

    Args:
        choice: What the caller fixes; None for nothing.

    Returns:
        JSON for the registered ops, which take no objects.

    Runtime: host only.
    """
    if choice is None:
        return "{}"
    parts: list[str] = []
    if choice.engine is not None:
        parts.append(f'"engine":"{choice.engine}"')
    if choice.gemm1 is not None:
        parts.append(f'"gemm1":{_tile_text(choice.gemm1)}')
    if choice.gemm2 is not None:
        parts.append(f'"gemm2":{_tile_text(choice.gemm2)}')
    if choice.tile_tokens is not None:
        parts.append(f'"tile_tokens":{choice.tile_tokens}')
    return "{" + ",".join(parts) + "}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLayer:
    """What a fused MoE runs once the tokens are routed.

    Attributes:
        weights: Weights of the experts on this rank, fused shared ones last.
        activation: Function between the GEMMs.
        parameters: Per-expert parameters of Swiglu.
        num_experts: Experts on all ranks, shared ones included; ids outside are not computed.
        local_expert_offset: First expert on this rank.
        use_routing_scales_on_input: Multiply the rows by their weight before GEMM 1, and sum with weight 1.
        batch_invariant: Make a row's bits independent of the other rows.
        choice: What the caller fixes of the kernels' configuration.
    """

    weights: ExpertWeights
    activation: ActivationType
    parameters: SwigluParameters
    num_experts: int
    local_expert_offset: int
    use_routing_scales_on_input: bool = False
    batch_invariant: bool = False
    choice: ExpertsChoice = field(default_factory=ExpertsChoice)

    @property
    def num_local_experts(self) -> int:
        """Experts on this rank, shared ones included."""
        return self.weights.gemm1_weights.shape[0]
