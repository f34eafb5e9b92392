"""`bf16_routed_moe`: the fused MoE from given experts and weights on."""

from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.kernels.backend import Backend, choose_backend
from routing_replay.kernels.experts import ActivationType
from routing_replay.kernels.experts.config import ExpertsChoice
from routing_replay.kernels.fused_moe.checks import (
    MoEShape,
    check_experts,
    check_given_routing,
    check_rank,
)
from routing_replay.kernels.fused_moe.layer import choice_text
from routing_replay.kernels.fused_moe.registered import routed_moe_op, routed_unfinalized_op
from routing_replay.kernels.routing.checks import check_replay_buffer

__all__ = ["bf16_routed_moe"]


def _ids_and_weights(topk_ids: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(topk_ids, Tensor):
        return topk_ids, None
    if len(topk_ids) != 2:
        raise ConfigError(
            f"topk_ids holds {len(topk_ids)} tensors; accepted are a packed tensor, or ids and weights"
        )
    return topk_ids


def bf16_routed_moe(
    topk_ids: Tensor | tuple[Tensor, Tensor],
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None = None,
    routing_method_type: int = 0,
    do_finalize: bool = True,
    activation_type: int = ActivationType.Swiglu,
    routing_replay_out: Tensor | None = None,
    gemm1_alpha: Tensor | None = None,
    gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None,
    output: Tensor | None = None,
    *,
    gemm1_bias: Tensor | None = None,
    gemm2_bias: Tensor | None = None,
    use_routing_scales_on_input: bool = False,
    backend: str = Backend.AUTO,
    batch_invariant: bool = False,
    config: ExpertsChoice | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Run the experts of tokens that were routed elsewhere, and sum: `bf16_moe` without its router.

    Names and order are those of FlashInfer's `trtllm_bf16_routed_moe`, on plain row-major weights and without its arguments
    for shuffles, programmatic dependent launch, adapters and tuning. Unlike there, the given ids are recorded.

    Args:
        topk_ids: int32 `[T, K]`, contiguous, each `(id << 16) | bits of the bfloat16 weight`; or a tuple of ids int32 `[T, K]`
            and weights bfloat16 or float32 `[T, K]`, both contiguous. Ids are *global*. One outside `[0, E)`, such as the
            -1 of an all-to-all's padding, and one that came before in its row, are not computed and have weight 0.
        hidden_states: `[T, H]` bfloat16 or float32.
        gemm1_weights: As in `bf16_moe`.
        gemm2_weights: As in `bf16_moe`.
        num_experts: E, experts of the model on all ranks.
        top_k: K, columns of the ids.
        n_group: Unused, as the next one: the experts are chosen.
        topk_group: Unused.
        intermediate_size: I, of one expert.
        local_expert_offset: First expert on this rank.
        local_num_experts: E_local, experts on this rank.
        routed_scaling_factor: Unused, as the next one: the weights are taken as they are.
        routing_method_type: Unused.
        do_finalize: Return the summed output; False returns the parts of it.
        activation_type: An `ActivationType`.
        routing_replay_out: int16 `[>= T, K]`, contiguous: rows `[0, T)` receive the ids as given (-1 stays -1; an id that is no
            int16 becomes -1); later rows stay untouched. None costs nothing and changes no bit.
        gemm1_alpha: As in `bf16_moe`, as the next two.
        gemm1_beta: Swiglu offset.
        gemm1_clamp_limit: Swiglu clamp.
        output: `[T, H]` to write into, dtype of `hidden_states`, or None.
        gemm1_bias: `[E_local, 2I]` (or `I`), or None.
        gemm2_bias: `[E_local, H]`, or None.
        use_routing_scales_on_input: As in `bf16_moe`.
        backend: A `Backend`.
        batch_invariant: As in `bf16_moe`.
        config: As in `bf16_moe`.

    Returns:
        As `bf16_moe`, with K columns of weights.

    Raises:
        ConfigError: An argument has the wrong dtype, shape, stride, device or value.

    Runtime: as `bf16_moe`.
    """
    check_rank(hidden_states)
    shape = MoEShape(
        num_tokens=hidden_states.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_states.shape[1],
        intermediate_size=intermediate_size,
        local_expert_offset=local_expert_offset,
        local_num_experts=local_num_experts,
    )
    ids, weights = _ids_and_weights(topk_ids)
    check_given_routing(shape, ids, weights, hidden_states)
    check_experts(
        shape,
        hidden_states,
        (gemm1_weights, gemm2_weights),
        activation_type=activation_type,
        parameters={
            "gemm1_alpha": gemm1_alpha,
            "gemm1_beta": gemm1_beta,
            "gemm1_clamp_limit": gemm1_clamp_limit,
        },
        biases=(gemm1_bias, gemm2_bias),
        output=output,
        use_routing_scales_on_input=use_routing_scales_on_input,
    )
    device = hidden_states.device
    check_replay_buffer(
        "routing_replay_out",
        routing_replay_out,
        num_tokens=shape.num_tokens,
        top_k=top_k,
        device=device,
    )
    arguments = (
        ids,
        weights,
        hidden_states,
        gemm1_weights,
        gemm2_weights,
        num_experts,
        local_expert_offset,
        int(activation_type),
        routing_replay_out,
        gemm1_alpha,
        gemm1_beta,
        gemm1_clamp_limit,
        gemm1_bias,
        gemm2_bias,
        use_routing_scales_on_input,
        str(choose_backend(backend, device, available=(Backend.REFERENCE, Backend.TRITON))),
        batch_invariant,
        choice_text(config),
    )
    if not do_finalize:
        return routed_unfinalized_op(*arguments)
    if output is None:
        output = hidden_states.new_empty(hidden_states.shape)
    routed_moe_op(output, *arguments)
    return output
