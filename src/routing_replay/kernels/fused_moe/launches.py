"""The fused MoE as launches: route, plan, GEMM 1 with its activation, GEMM 2, sum; or without a plan for a few tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts import SwigluParameters
from routing_replay.kernels.experts.choosing import choose_config
from routing_replay.kernels.experts.config import ExpertsConfig, ExpertsShape
from routing_replay.kernels.fused_moe.layer import ExpertsLayer
from routing_replay.kernels.permutation import PermutationPlan, PermutationShape
from routing_replay.kernels.routing import RoutingMethod

__all__ = [
    "choose_for",
    "moe_triton",
    "moe_triton_into",
    "routed_moe_triton",
    "routed_moe_triton_into",
]

# The number of tokens that a batch-invariant call is configured for, whatever it has.
_INVARIANT_TOKENS = 256
# Where kernels are interpreted there is no device to ask.
_NO_DEVICE = ((8, 0), None)
_ALIGNMENT_BYTES = 16

_Parts = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=64)
def _device_of(device: torch.device) -> tuple[tuple[int, int], str | None]:
    """Compute capability and name."""
    if device.type != "cuda":
        return _NO_DEVICE
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)


def _overlaps(device: torch.device) -> bool:
    """Whether kernels may start before the one ahead has ended: programmatic dependent launch, from sm_90 on."""
    return _device_of(device)[0] >= (9, 0)


def _only_portable(hidden_states: Tensor, layer: ExpertsLayer) -> str | None:
    """What of a call the portable engine alone can run."""
    if layer.use_routing_scales_on_input:
        return "use_routing_scales_on_input"
    weights = (layer.weights.gemm1_weights, layer.weights.gemm2_weights)
    if not all(tensor.is_contiguous() for tensor in weights):
        return "weights that are not contiguous"
    row_bytes = hidden_states.stride(0) * hidden_states.element_size()
    addresses = [tensor.data_ptr() for tensor in (hidden_states, *weights)]
    if any(number % _ALIGNMENT_BYTES for number in (row_bytes, *addresses)):
        return f"tensors whose rows do not start at multiples of {_ALIGNMENT_BYTES} bytes"
    return None


def choose_for(
    hidden_states: Tensor, top_k: int, layer: ExpertsLayer, *, is_summed: bool
) -> ExpertsConfig:
    """Choose kernels and tiles for a call.

    Args:
        hidden_states: `[T, H]`; its rows and its device count.
        top_k: Columns of the ids, shared experts included.
        layer: The experts, and what the caller fixed.
        is_summed: Whether the call sums the experts of a token.

    Returns:
        The configuration. It does not depend on T where the layer is batch-invariant.

    Raises:
        ConfigError: What the caller fixed cannot run.

    Runtime: host only; no sync.
    """
    choice = layer.choice
    weights = layer.weights
    needs_portable = _only_portable(hidden_states, layer)
    if needs_portable is not None:
        if choice.engine not in (None, "portable"):
            raise ConfigError(
                f"engine={choice.engine!r} with {needs_portable}; accepted is 'portable': name it, or leave it out"
            )
        choice = replace(choice, engine="portable")
    shape = ExpertsShape(
        num_tokens=_INVARIANT_TOKENS if layer.batch_invariant else hidden_states.shape[0],
        top_k=top_k,
        num_local_experts=layer.num_local_experts,
        hidden_size=hidden_states.shape[1],
        intermediate_size=weights.gemm2_weights.shape[2],
        is_gated=layer.activation.is_gated,
        num_experts=layer.num_experts,
        element_bytes=weights.gemm1_weights.element_size(),
        is_summed=is_summed,
    )
    capability, name = _device_of(hidden_states.device)
    return choose_config(shape, capability=capability, device_name=name, choice=choice)


def _launches(
    engine: str, row_scales: Tensor | None, *, overlap: bool
) -> tuple[Callable[..., None], Callable[..., None]]:
    """What launches GEMM 1 and GEMM 2."""
    if engine == "hopper":
        from routing_replay.kernels.experts import _hopper

        launch = partial(_hopper.launch_gemm, overlap=overlap)
        return launch, launch
    from routing_replay.kernels.experts import _triton

    first = partial(_triton.launch_gemm, row_scales=row_scales)
    return first, partial(_triton.launch_gemm, row_scales=None)


def _run_gemms(
    hidden_states: Tensor,
    plan: PermutationPlan,
    row_scales: Tensor | None,
    layer: ExpertsLayer,
    config: ExpertsConfig,
) -> Tensor:
    """Both GEMMs of the planned rows: `[max_padded_tokens, H]`."""
    overlap = _overlaps(hidden_states.device)
    launch_gemm1, launch_gemm2 = _launches(config.engine, row_scales, overlap=overlap)
    plan.require(tile_tokens=config.tile_tokens)
    weights = layer.weights
    num_rows = plan.shape.max_padded_tokens
    activated = hidden_states.new_empty(num_rows, weights.gemm2_weights.shape[2])
    launch_gemm1(
        hidden_states,
        weights.gemm1_weights,
        activated,
        plan,
        tile=config.gemm1,
        gather=True,
        activation=layer.activation,
        parameters=layer.parameters,
        bias=weights.gemm1_bias,
    )
    gemm2_output = hidden_states.new_empty(num_rows, hidden_states.shape[1])
    launch_gemm2(
        activated,
        weights.gemm2_weights,
        gemm2_output,
        plan,
        tile=config.gemm2,
        gather=False,
        activation=None,
        parameters=SwigluParameters(),
        bias=weights.gemm2_bias,
    )
    return gemm2_output


def _shape_of(topk_ids: Tensor, layer: ExpertsLayer, tile_tokens: int) -> PermutationShape:
    return PermutationShape(
        num_tokens=topk_ids.shape[0],
        top_k=topk_ids.shape[1],
        num_experts=layer.num_experts,
        local_expert_offset=layer.local_expert_offset,
        num_local_experts=layer.num_local_experts,
        tile_tokens=tile_tokens,
    )


def _run(
    hidden_states: Tensor,
    topk_weights: Tensor,
    plan: PermutationPlan,
    layer: ExpertsLayer,
    config: ExpertsConfig,
) -> _Parts:
    """Run the experts of planned pairs."""
    on_input = layer.use_routing_scales_on_input
    gemm2_output = _run_gemms(
        hidden_states, plan, topk_weights if on_input else None, layer, config
    )
    if on_input:
        topk_weights = torch.ones_like(topk_weights)
    return gemm2_output, topk_weights, plan.expanded_idx_to_permuted_idx


def _parts_of_nothing(hidden_states: Tensor, top_k: int) -> _Parts:
    """What a call without tokens gives."""
    weights = hidden_states.new_empty((0, top_k), dtype=torch.float32)
    return (
        hidden_states.new_empty(hidden_states.shape),
        weights,
        weights.new_empty(0, dtype=torch.int32),
    )


def _routed_buffers(routing_logits: Tensor, routing: RoutingMethod) -> tuple[Tensor, Tensor]:
    """Room for weights float32 and ids int32, `[T, K + S]`."""
    size = (routing_logits.shape[0], routing.num_columns)
    return (
        routing_logits.new_empty(size, dtype=torch.float32),
        routing_logits.new_empty(size, dtype=torch.int32),
    )


def _route_and_plan(
    routing_logits: Tensor,
    routing: RoutingMethod,
    layer: ExpertsLayer,
    config: ExpertsConfig,
    *,
    routing_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
    workspace: Tensor | None,
) -> tuple[Tensor, PermutationPlan]:
    """Weights float32 `[T, K + S]`, and the plan."""
    from routing_replay.kernels.permutation._triton_fused import launch_route_and_plan

    topk_weights, topk_ids = _routed_buffers(routing_logits, routing)
    plan = launch_route_and_plan(
        routing_logits,
        routing,
        topk_weights,
        topk_ids,
        _shape_of(topk_ids, layer, config.tile_tokens),
        routing_bias=routing_bias,
        routing_replay_in=routing_replay_in,
        routing_replay_out=routing_replay_out,
        workspace=workspace,
        launch_pdl=_overlaps(routing_logits.device),
    )
    return topk_weights, plan


def _run_vector(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    layer: ExpertsLayer,
    config: ExpertsConfig,
    output: Tensor,
    *,
    are_distinct: bool,
) -> None:
    """Run the experts of routed tokens without a plan, and sum them."""
    from routing_replay.kernels.experts._triton_vector import launch_vector_experts

    launch_vector_experts(
        hidden_states,
        topk_ids,
        topk_weights,
        layer.weights,
        hidden_states.new_empty(topk_ids.numel(), layer.weights.gemm2_weights.shape[2]),
        output,
        config=config,
        activation=layer.activation,
        parameters=layer.parameters,
        num_experts=layer.num_experts,
        local_expert_offset=layer.local_expert_offset,
        are_distinct=are_distinct,
        overlap=_overlaps(hidden_states.device),
    )


def _sum_into(output: Tensor, parts: _Parts) -> None:
    from routing_replay.kernels.experts._triton import launch_combine

    launch_combine(*parts, output, overlap=_overlaps(output.device))


def moe_triton(
    routing_logits: Tensor,
    hidden_states: Tensor,
    routing: RoutingMethod,
    layer: ExpertsLayer,
    *,
    routing_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
    workspace: Tensor | None = None,
) -> _Parts:
    """Everything of a fused MoE but the final sum, in three to five launches.

    Args:
        routing_logits: `[T, E]`; rows of consecutive elements, as all of these.
        hidden_states: `[T, H]`.
        routing: How logits become ids and weights.
        layer: The experts.
        routing_bias: `[E]`, or None.
        routing_replay_out: int16 `[>= T, K]`; rows `[0, T)` are overwritten with the ids in use.
        routing_replay_in: int16 `[>= T, K]` ids to force; a row that starts with -1 routes natively.
        workspace: Of `route_and_plan_workspace`, with which few tokens are routed and planned in one launch; or None.

    Returns:
        `gemm2_output` `[max_padded_tokens, H]` of the plan, its padding and its rows past the plan's end undefined;
        `topk_weights` float32 `[T, K + S]`; `expanded_idx_to_permuted_idx` int32 `[T * (K + S)]`.

    Raises:
        ConfigError: What the caller fixed of the configuration cannot run.

    Runtime: no sync; allocates `max_padded_tokens * (H + I)` elements beside the plan and the weights, sizes that do not
        depend on data; CUDA-graph safe; bitwise deterministic; no gradients. Nothing is launched for no tokens. From sm_90 on
        every launch is a programmatic dependent of the one ahead.
    """
    if routing_logits.shape[0] == 0:
        return _parts_of_nothing(hidden_states, routing.num_columns)
    config = choose_for(hidden_states, routing.num_columns, layer, is_summed=False)
    topk_weights, plan = _route_and_plan(
        routing_logits,
        routing,
        layer,
        config,
        routing_bias=routing_bias,
        routing_replay_out=routing_replay_out,
        routing_replay_in=routing_replay_in,
        workspace=workspace,
    )
    return _run(hidden_states, topk_weights, plan, layer, config)


def moe_triton_into(
    output: Tensor,
    routing_logits: Tensor,
    hidden_states: Tensor,
    routing: RoutingMethod,
    layer: ExpertsLayer,
    *,
    routing_bias: Tensor | None,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
    workspace: Tensor | None = None,
) -> None:
    """A whole fused MoE, in three to six launches.

    Args:
        output: `[T, H]`, overwritten; rows of consecutive elements.
        routing_logits: As `moe_triton`, and so are all below.
        hidden_states: `[T, H]`.
        routing: The method.
        layer: The experts.
        routing_bias: `[E]`, or None.
        routing_replay_out: int16 `[>= T, K]`, or None.
        routing_replay_in: int16 `[>= T, K]`, or None.
        workspace: Of `route_and_plan_workspace`, or None.

    Raises:
        ConfigError: What the caller fixed of the configuration cannot run.

    Runtime: as `moe_triton`; on the engine `vector` it allocates `T * (K + S) * I` elements and no plan.
    """
    if routing_logits.shape[0] == 0:
        return
    config = choose_for(hidden_states, routing.num_columns, layer, is_summed=True)
    if config.engine != "vector":
        topk_weights, plan = _route_and_plan(
            routing_logits,
            routing,
            layer,
            config,
            routing_bias=routing_bias,
            routing_replay_out=routing_replay_out,
            routing_replay_in=routing_replay_in,
            workspace=workspace,
        )
        _sum_into(output, _run(hidden_states, topk_weights, plan, layer, config))
        return
    from routing_replay.kernels.routing._triton import launch_route

    topk_weights, topk_ids = _routed_buffers(routing_logits, routing)
    launch_route(
        routing_logits,
        routing,
        topk_weights,
        topk_ids,
        routing_bias=routing_bias,
        routing_replay_out=routing_replay_out,
        routing_replay_in=routing_replay_in,
        launch_pdl=_overlaps(routing_logits.device),
    )
    are_distinct = routing_replay_in is None
    _run_vector(hidden_states, topk_ids, topk_weights, layer, config, output, are_distinct=are_distinct)  # fmt: skip


def _given(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    layer: ExpertsLayer,
    routing_replay_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Ids and weights of given routing, taken apart and recorded."""
    from routing_replay.kernels.fused_moe._triton import launch_given

    ids = torch.empty_like(topk_ids)
    weights = topk_ids.new_empty(topk_ids.shape, dtype=torch.float32)
    launch_given(
        topk_ids, topk_weights, ids, weights, routing_replay_out, num_experts=layer.num_experts
    )
    return ids, weights


def _run_given(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    layer: ExpertsLayer,
    config: ExpertsConfig,
) -> _Parts:
    from routing_replay.kernels.permutation._triton import launch_plan

    shape = _shape_of(ids, layer, config.tile_tokens)
    plan = launch_plan(ids, shape, are_distinct=False, launch_pdl=_overlaps(ids.device))
    return _run(hidden_states, weights, plan, layer, config)


def routed_moe_triton(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    hidden_states: Tensor,
    layer: ExpertsLayer,
    *,
    routing_replay_out: Tensor | None,
) -> _Parts:
    """Everything of a fused MoE that is given its routing, but the final sum, in four or five launches.

    Args:
        topk_ids: int32 `[T, K]`, contiguous: ids, or `(id << 16) | bits of the bfloat16 weight`.
        topk_weights: bfloat16 or float32 `[T, K]`, contiguous; None where they are packed.
        hidden_states: `[T, H]`.
        layer: The experts.
        routing_replay_out: int16 `[>= T, K]`; rows `[0, T)` are overwritten with the ids as given, -1 for one that is no int16.

    Returns:
        As `moe_triton`; weights of ids that do not count are 0.

    Raises:
        ConfigError: As `moe_triton`.

    Runtime: as `moe_triton`.
    """
    top_k = topk_ids.shape[1]
    if topk_ids.shape[0] == 0:
        return _parts_of_nothing(hidden_states, top_k)
    config = choose_for(hidden_states, top_k, layer, is_summed=False)
    ids, weights = _given(topk_ids, topk_weights, layer, routing_replay_out)
    return _run_given(hidden_states, ids, weights, layer, config)


def routed_moe_triton_into(
    output: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    hidden_states: Tensor,
    layer: ExpertsLayer,
    *,
    routing_replay_out: Tensor | None,
) -> None:
    """A whole fused MoE that is given its routing, in three to six launches.

    Args:
        output: `[T, H]`, overwritten; rows of consecutive elements.
        topk_ids: As `routed_moe_triton`, and so are all below.
        topk_weights: `[T, K]`, or None.
        hidden_states: `[T, H]`.
        layer: The experts.
        routing_replay_out: int16 `[>= T, K]`, or None.

    Raises:
        ConfigError: As `moe_triton`.

    Runtime: as `moe_triton_into`.
    """
    if topk_ids.shape[0] == 0:
        return
    config = choose_for(hidden_states, topk_ids.shape[1], layer, is_summed=True)
    ids, weights = _given(topk_ids, topk_weights, layer, routing_replay_out)
    if config.engine == "vector":
        _run_vector(hidden_states, ids, weights, layer, config, output, are_distinct=False)
        return
    _sum_into(output, _run_given(hidden_states, ids, weights, layer, config))
