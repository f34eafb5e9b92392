"""`bf16_moe`: the public entry point, its torch.library registration, and nothing else."""

import torch
from torch import Tensor

from routing_replay.kernels.backend import Backend, choose_backend
from routing_replay.kernels.experts import (
    ActivationType,
    ExpertWeights,
    SwigluParameters,
    combine_reference,
)
from routing_replay.kernels.fused_moe.checks import (
    MoEShape,
    check_moe_arguments,
    checked_routing,
)
from routing_replay.kernels.fused_moe.reference import MoEOptions, moe_reference
from routing_replay.kernels.routing import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing.checks import check_bias, check_replay_buffer

__all__ = ["bf16_moe"]


@torch.library.custom_op(
    "routing_replay::bf16_moe_unfinalized", mutates_args=("routing_replay_out",)
)
def _unfinalized_op(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    num_fused_shared_experts: int,
    local_expert_offset: int,
    routing_method_type: int,
    activation_type: int,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
    gemm1_alpha: Tensor | None,
    gemm1_beta: Tensor | None,
    gemm1_clamp_limit: Tensor | None,
    gemm1_bias: Tensor | None,
    gemm2_bias: Tensor | None,
    backend: str,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert backend == Backend.REFERENCE, backend
    return moe_reference(
        routing_logits,
        routing_bias,
        hidden_states,
        ExpertWeights(
            gemm1_weights=gemm1_weights,
            gemm2_weights=gemm2_weights,
            gemm1_bias=gemm1_bias,
            gemm2_bias=gemm2_bias,
        ),
        SwigluParameters(alpha=gemm1_alpha, beta=gemm1_beta, limit=gemm1_clamp_limit),
        MoEOptions(
            routing=RoutingMethod(
                type=RoutingMethodType(routing_method_type),
                num_experts=routing_logits.shape[1],
                top_k=top_k,
                n_group=n_group,
                topk_group=topk_group,
                routed_scaling_factor=routed_scaling_factor,
                norm_topk_prob=norm_topk_prob,
                num_fused_shared_experts=num_fused_shared_experts,
            ),
            activation=ActivationType(activation_type),
            local_expert_offset=local_expert_offset,
            batch_invariant=batch_invariant,
        ),
        routing_replay_out=routing_replay_out,
        routing_replay_in=routing_replay_in,
    )


@_unfinalized_op.register_fake
def _(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    num_fused_shared_experts: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, hidden_size = hidden_states.shape
    num_columns = top_k + num_fused_shared_experts
    # How many pairs are computed on this rank is known only once the tokens are routed.
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        hidden_states.new_empty(num_rows, hidden_size),
        hidden_states.new_empty(num_tokens, num_columns, dtype=torch.float32),
        hidden_states.new_empty(num_tokens * num_columns, dtype=torch.int32),
    )


@torch.library.custom_op("routing_replay::bf16_moe", mutates_args=("output", "routing_replay_out"))
def _moe_op(
    output: Tensor,
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    norm_topk_prob: bool,
    num_fused_shared_experts: int,
    local_expert_offset: int,
    routing_method_type: int,
    activation_type: int,
    routing_replay_out: Tensor | None,
    routing_replay_in: Tensor | None,
    gemm1_alpha: Tensor | None,
    gemm1_beta: Tensor | None,
    gemm1_clamp_limit: Tensor | None,
    gemm1_bias: Tensor | None,
    gemm2_bias: Tensor | None,
    backend: str,
    batch_invariant: bool,
) -> None:
    gemm2_output, topk_weights, permuted = _unfinalized_op(
        routing_logits,
        routing_bias,
        hidden_states,
        gemm1_weights,
        gemm2_weights,
        top_k,
        n_group,
        topk_group,
        routed_scaling_factor,
        norm_topk_prob,
        num_fused_shared_experts,
        local_expert_offset,
        routing_method_type,
        activation_type,
        routing_replay_out,
        routing_replay_in,
        gemm1_alpha,
        gemm1_beta,
        gemm1_clamp_limit,
        gemm1_bias,
        gemm2_bias,
        backend,
        batch_invariant,
    )
    output.copy_(combine_reference(gemm2_output, topk_weights, permuted))


@_moe_op.register_fake
def _(*_: object) -> None:
    return None


def bf16_moe(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
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
    routing_method_type: int = RoutingMethodType.Default,
    do_finalize: bool = True,
    activation_type: int = ActivationType.Swiglu,
    norm_topk_prob: bool = True,
    routing_replay_out: Tensor | None = None,
    gemm1_alpha: Tensor | None = None,
    gemm1_beta: Tensor | None = None,
    gemm1_clamp_limit: Tensor | None = None,
    output: Tensor | None = None,
    *,
    routing_replay_in: Tensor | None = None,
    gemm1_bias: Tensor | None = None,
    gemm2_bias: Tensor | None = None,
    num_fused_shared_experts: int = 0,
    backend: str = Backend.AUTO,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Route tokens, run their experts, and sum: a mixture-of-experts layer without its router GEMM.

    Names and order are those of FlashInfer's `trtllm_bf16_moe`, on plain row-major weights and without its arguments
    for shuffles, programmatic dependent launch and tuning. Numerics are those of Hugging Face: scores and weights
    float32, GEMM outputs rounded to the dtype of `hidden_states`.

    Args:
        routing_logits: `[T, E]` bfloat16 or float32.
        routing_bias: `[E]` float32 or bfloat16: added to the scores for selection alone (DeepSeekV3, MiniMax2, which
            needs one), or to the logits as the router's own bias (Renormalize: gpt-oss; TopK; TopKSigmoid). None otherwise.
        hidden_states: `[T, H]` bfloat16 or float32.
        gemm1_weights: `[E_local, 2I, H]`, rows `[gate; up]` (`[E_local, I, H]` without a gate), in the dtype of
            `hidden_states`, or float32 beside bfloat16 rows (same rounding; faster on a CPU without bfloat16).
        gemm2_weights: `[E_local, H, I]`, dtype of `gemm1_weights`.
        num_experts: E, experts of the model on all ranks.
        top_k: K, experts per token.
        n_group: Number of expert groups; None, 0 or 1 for none. DeepSeekV3 alone has more.
        topk_group: Number of groups that a token may use.
        intermediate_size: I, of one expert.
        local_expert_offset: First expert on this rank.
        local_num_experts: E_local, experts on this rank.
        routed_scaling_factor: Factor on the weights; only DeepSeekV3 and MiniMax2 routing apply one.
        routing_method_type: A `RoutingMethodType`.
        do_finalize: Return the summed output; False returns the parts of it.
        activation_type: An `ActivationType`.
        norm_topk_prob: Divide by the sum in SigmoidRenorm, DeepSeekV3 and MiniMax2; other methods decide by themselves.
        routing_replay_out: int16 `[>= T, K]`, contiguous: rows `[0, T)` receive the *global* ids in use, in rank order
            (forced rows: as given); later rows stay untouched. None costs nothing and changes no bit.
        gemm1_alpha: Swiglu slope, float32 `[E_local]`, or None.
        gemm1_beta: Swiglu offset, float32 `[E_local]`, or None.
        gemm1_clamp_limit: Swiglu clamp, float32 `[E_local]`, or None.
        output: `[T, H]` to write into, dtype of `hidden_states`, or None.
        routing_replay_in: int16 `[>= T, K]`, contiguous: global ids to use instead of selecting. A row whose first id
            is -1 routes natively. In other rows an id that is out of range or repeats gets weight 0; nothing is read
            out of bounds. Weights always come from `routing_logits`.
        gemm1_bias: `[E_local, 2I]` (or `I`), or None.
        gemm2_bias: `[E_local, H]`, or None.
        num_fused_shared_experts: S experts that every token goes to with weight 1; their weights follow the routed ones
            (`[E + S, ...]`), so that all experts must be on this rank. They are in no replay buffer.
        backend: A `Backend`.
        batch_invariant: Make the bits of a row independent of the rows beside it (fixed row blocks; slower).

    Returns:
        `[T, H]` in the dtype of `hidden_states` (a partial sum where `E_local < E`). With `do_finalize=False`:
        `gemm2_output` `[rows, H]`, `topk_weights` float32 `[T, K + S]` and `expanded_idx_to_permuted_idx` int32
        `[T * (K + S)]`, -1 for pairs that are not computed here.

    Raises:
        ConfigError: An argument has the wrong dtype, shape, stride, device or value.

    Runtime: validation reads no device data. Backend `reference`: one host sync, allocates O(T*(E+K*(H+I))), not
        CUDA-graph safe, bitwise deterministic for one shape, no autograd through the registered op.
    """
    shape = MoEShape(
        num_tokens=hidden_states.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_states.shape[1],
        intermediate_size=intermediate_size,
        local_expert_offset=local_expert_offset,
        local_num_experts=local_num_experts,
        num_fused_shared_experts=num_fused_shared_experts,
    )
    routing = checked_routing(
        shape,
        routing_method_type=routing_method_type,
        groups=(n_group, topk_group),
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )
    check_moe_arguments(
        shape,
        routing_logits,
        hidden_states,
        (gemm1_weights, gemm2_weights),
        activation_type=activation_type,
        per_expert={
            "gemm1_alpha": (gemm1_alpha, 0),
            "gemm1_beta": (gemm1_beta, 0),
            "gemm1_clamp_limit": (gemm1_clamp_limit, 0),
            "gemm1_bias": (gemm1_bias, gemm1_weights.shape[1] if gemm1_weights.ndim == 3 else 0),
            "gemm2_bias": (gemm2_bias, shape.hidden_size),
        },
        output=output,
    )
    device = hidden_states.device
    check_bias(routing_bias, routing, device)
    for name, buffer in (
        ("routing_replay_out", routing_replay_out),
        ("routing_replay_in", routing_replay_in),
    ):
        check_replay_buffer(name, buffer, num_tokens=shape.num_tokens, top_k=top_k, device=device)
    arguments = (
        routing_logits,
        routing_bias,
        hidden_states,
        gemm1_weights,
        gemm2_weights,
        top_k,
        routing.n_group,
        routing.topk_group,
        routing.routed_scaling_factor,
        norm_topk_prob,
        num_fused_shared_experts,
        local_expert_offset,
        int(routing_method_type),
        int(activation_type),
        routing_replay_out,
        routing_replay_in,
        gemm1_alpha,
        gemm1_beta,
        gemm1_clamp_limit,
        gemm1_bias,
        gemm2_bias,
        str(choose_backend(backend, device)),
        batch_invariant,
    )
    if not do_finalize:
        return _unfinalized_op(*arguments)
    if output is None:
        output = torch.empty_like(hidden_states)
    _moe_op(output, *arguments)
    return output
