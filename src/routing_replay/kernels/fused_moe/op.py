"""`bf16_moe`: the fused MoE from router logits on."""

from torch import Tensor

from routing_replay.kernels.backend import Backend, choose_backend
from routing_replay.kernels.experts import ActivationType, SwigluParameters
from routing_replay.kernels.experts.config import ExpertsChoice
from routing_replay.kernels.fused_moe import flashinfer
from routing_replay.kernels.fused_moe.checks import (
    MoEShape,
    check_experts,
    check_rank,
    check_routing_logits,
    checked_routing,
)
from routing_replay.kernels.fused_moe.layer import choice_text
from routing_replay.kernels.fused_moe.registered import moe_op, unfinalized_op
from routing_replay.kernels.permutation.workspace import check_workspace
from routing_replay.kernels.routing import RoutingMethodType
from routing_replay.kernels.routing.checks import check_bias, check_replay_buffer

__all__ = ["bf16_moe"]


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
    use_routing_scales_on_input: bool = False,
    backend: str = Backend.AUTO,
    batch_invariant: bool = False,
    config: ExpertsChoice | None = None,
    workspace: Tensor | None = None,
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
            `hidden_states`, or float32 beside bfloat16 rows (same rounding; faster on a CPU without bfloat16). Weights that
            `prepare_weights` laid out for FlashInfer choose the backend `flashinfer`.
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
        gemm1_alpha: Swiglu slope, float32 or bfloat16 `[E_local]`, or None.
        gemm1_beta: Swiglu offset, float32 or bfloat16 `[E_local]`, or None.
        gemm1_clamp_limit: Swiglu clamp, float32 or bfloat16 `[E_local]`, or None.
        output: `[T, H]` to write into, dtype of `hidden_states`, or None. It is written directly, without a copy.
        routing_replay_in: int16 `[>= T, K]`, contiguous: global ids to use instead of selecting. A row whose first id
            is -1 routes natively. In other rows an id that is out of range or repeats gets weight 0; nothing is read
            out of bounds. Weights always come from `routing_logits`.
        gemm1_bias: `[E_local, 2I]` (or `I`), or None.
        gemm2_bias: `[E_local, H]`, or None.
        num_fused_shared_experts: S experts that every token goes to with weight 1; their weights follow the routed ones
            (`[E + S, ...]`), so that all experts must be on this rank. They are in no replay buffer.
        use_routing_scales_on_input: Multiply the rows by their weight (rounded to the dtype of `hidden_states`) before GEMM 1
            instead of after GEMM 2, as Llama 4 does; one expert a token alone. The sum then has weight 1.
        backend: A `Backend`.
        batch_invariant: Make the bits of a row independent of the rows beside it, and of how many they are (fixed row blocks
            in the reference, a configuration that does not depend on T on Triton; slower).
        config: Kernels and tiles of the Triton backend; what it leaves open, and None, is up to the tables. It changes no
            recorded id.
        workspace: Of `route_and_plan_workspace` for E_local + S experts, or None. With it the Triton backend routes and plans
            up to 256 tokens in one launch instead of two; the reference does not touch it.

    Returns:
        `[T, H]` in the dtype of `hidden_states` (a partial sum where `E_local < E`). With `do_finalize=False`:
        `gemm2_output` `[rows, H]`, `topk_weights` float32 `[T, K + S]` and `expanded_idx_to_permuted_idx` int32
        `[T * (K + S)]`, -1 for pairs that are not computed here. `rows` is the number of computed pairs in the reference;
        on Triton it is the `max_padded_tokens` of the plan, and rows that no pair names are undefined.

    Raises:
        ConfigError: An argument has the wrong dtype, shape, stride, device or value.

    Runtime: validation reads no device data. Backend `reference`: one host sync, allocates O(T*(E+K*(H+I))), not
        CUDA-graph safe, bitwise deterministic for one shape, no autograd through the registered op. Backend `triton`: no host
        sync; workspace `R * (H + I)` elements and `4 * R` bytes beside 8 bytes a pair, where `R = E' * tile + T * (K + S)` at
        most, with E' experts that the tokens can reach here; its size depends on shapes alone; CUDA-graph safe; bitwise
        deterministic from run to run (no atomics); nothing is launched for no tokens; no autograd.
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
        num_fused_shared_experts=num_fused_shared_experts,
    )
    routing = checked_routing(
        shape,
        routing_method_type=routing_method_type,
        groups=(n_group, topk_group),
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )
    check_routing_logits(shape, routing_logits, hidden_states)
    if backend == Backend.FLASHINFER or flashinfer.are_prepared(gemm1_weights):
        return flashinfer.launch(
            routing_logits, routing_bias, hidden_states, (gemm1_weights, gemm2_weights), shape, routing,
            activation_type=activation_type, do_finalize=do_finalize, routing_replay_out=routing_replay_out, output=output,
            parameters=SwigluParameters(alpha=gemm1_alpha, beta=gemm1_beta, limit=gemm1_clamp_limit),
            unsupported={
                "routing_replay_in": routing_replay_in, "gemm1_bias": gemm1_bias, "gemm2_bias": gemm2_bias,
                "num_fused_shared_experts": num_fused_shared_experts, "batch_invariant": batch_invariant,
                "use_routing_scales_on_input": use_routing_scales_on_input, "config": config, "workspace": workspace,
            },
        )  # fmt: skip
    check_experts(
        shape, hidden_states, (gemm1_weights, gemm2_weights), activation_type=activation_type,
        parameters={"gemm1_alpha": gemm1_alpha, "gemm1_beta": gemm1_beta, "gemm1_clamp_limit": gemm1_clamp_limit},
        biases=(gemm1_bias, gemm2_bias), output=output, use_routing_scales_on_input=use_routing_scales_on_input,
    )  # fmt: skip
    device = hidden_states.device
    check_bias(routing_bias, routing, device)
    for name, buffer in (
        ("routing_replay_out", routing_replay_out),
        ("routing_replay_in", routing_replay_in),
    ):
        check_replay_buffer(name, buffer, num_tokens=shape.num_tokens, top_k=top_k, device=device)
    check_workspace(workspace, local_num_experts + num_fused_shared_experts, device)
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
        use_routing_scales_on_input,
        str(choose_backend(backend, device, available=(Backend.REFERENCE, Backend.TRITON))),
        batch_invariant,
        choice_text(config),
        workspace,
    )
    if not do_finalize:
        return unfinalized_op(*arguments)
    if output is None:
        output = hidden_states.new_empty(hidden_states.shape)
    moe_op(output, *arguments)
    return output
