"""The expert computation in plain torch: sort by expert, GEMM 1, activation, GEMM 2, weighted sum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.kernels.experts.activation import (
    ActivationType,
    SwigluParameters,
    apply_activation,
)
from routing_replay.kernels.linear import linear, multiply_rows, suits_few_rows

__all__ = ["ExpertWeights", "combine_reference", "experts_reference"]

# torch's grouped GEMM wants every row to start at a multiple of 16 bytes.
_GROUPED_GEMM_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The weights of the experts on this rank, plain row-major.

    Attributes:
        gemm1_weights: `[E_local, 2I, H]` (rows `[gate; up]`), or `[E_local, I, H]` for activations without a gate; in
            the dtype of the rows, or float32.
        gemm2_weights: `[E_local, H, I]`.
        gemm1_bias: `[E_local, 2I]` (or `I`) or None.
        gemm2_bias: `[E_local, H]` or None.
    """

    gemm1_weights: Tensor
    gemm2_weights: Tensor
    gemm1_bias: Tensor | None = None
    gemm2_bias: Tensor | None = None


def _can_group(x: Tensor, weight: Tensor) -> bool:
    row_bytes = (x.shape[1] * x.element_size(), weight.shape[1] * weight.element_size())
    is_aligned = all(count % _GROUPED_GEMM_ALIGNMENT_BYTES == 0 for count in row_bytes)
    return x.is_cuda and x.dtype is weight.dtype and is_aligned


def _grouped_linear(
    x: Tensor, weight: Tensor, group_ends: Tensor, counts: list[int], *, batch_invariant: bool
) -> Tensor:
    """Multiply rows `[group_ends[e-1], group_ends[e])`, `counts[e]` of them, of `x` `[rows, in]` by `weight[e]^T`."""
    if _can_group(x, weight) and not batch_invariant:
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=group_ends)
    rows_of_all = x.to(weight.dtype)
    if not batch_invariant and suits_few_rows(rows_of_all, weight, max(counts)):
        return _few_rows_linear(rows_of_all, weight, counts).to(x.dtype)
    groups: list[Tensor] = []
    for rows, expert in zip(rows_of_all.split(counts), weight.unbind(), strict=True):
        if rows.shape[0] == 0:
            continue
        if batch_invariant:
            groups.append(linear(rows, expert, batch_invariant=True))
        else:
            groups.append(multiply_rows(rows, expert))
    return torch.cat(groups).to(x.dtype)


def _few_rows_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Multiply groups of few rows with the weight as the left factor, all groups into one transposed output."""
    transposed = x.new_empty(weight.shape[1], x.shape[0])
    columns = x.t().split(counts, dim=1)
    outputs = transposed.split(counts, dim=1)
    for out, rows, expert in zip(outputs, columns, weight.unbind(), strict=True):
        if rows.shape[1]:
            torch.mm(expert, rows, out=out)
    return transposed.t().contiguous()


def experts_reference(
    hidden_states: Tensor,
    local_ids: Tensor,
    weights: ExpertWeights,
    activation: ActivationType,
    parameters: SwigluParameters,
    *,
    row_scales: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run every (token, expert) pair through its expert, grouped by expert.

    GEMM outputs and the activated intermediate are rounded to the dtype of `hidden_states`; sums inside are float32.

    Args:
        hidden_states: `[T, H]` float32 or bfloat16.
        local_ids: int64 `[T, K]`, expert on this rank, or -1 for a pair that is not computed here.
        weights: Weights of the `E_local` experts.
        activation: Function between the GEMMs.
        parameters: Per-expert parameters of Swiglu.
        row_scales: float32 `[T, K]`: factors on the input rows of the pairs, rounded to their dtype before GEMM 1. Or None.
        batch_invariant: Make a row's bits independent of the other rows; see `kernels.linear`.

    Returns:
        `gemm2_output` `[rows, H]`, rows sorted by expert and, inside an expert, by token; and
        `expanded_idx_to_permuted_idx` int32 `[T * K]`: the row of each pair, -1 where it is not computed.

    Runtime: one host sync (the number of computed rows); allocates O(T*K*(H+I)); not CUDA-graph safe; bitwise
        deterministic for one shape of input; differentiable in `hidden_states`.
    """
    num_local_experts = weights.gemm1_weights.shape[0]
    flat_ids = local_ids.reshape(-1)
    sort_keys = flat_ids.where(flat_ids >= 0, num_local_experts)
    order = sort_keys.argsort(stable=True)
    counts = torch.bincount(sort_keys, minlength=num_local_experts + 1)[:num_local_experts]
    group_ends = counts.cumsum(0).to(torch.int32)
    # The one host sync: both GEMMs split their rows by the same counts.
    group_counts: list[int] = counts.tolist()
    num_rows = sum(group_counts)
    order = order[:num_rows]
    expert_idx = flat_ids[order]

    expanded_to_permuted = torch.full_like(flat_ids, -1, dtype=torch.int32)
    expanded_to_permuted[order] = torch.arange(num_rows, dtype=torch.int32, device=order.device)
    rows = hidden_states[order // local_ids.shape[1]]
    if num_rows == 0:
        return rows, expanded_to_permuted
    if row_scales is not None:
        rows = (rows.float() * row_scales.reshape(-1)[order].unsqueeze(1)).to(rows.dtype)

    x = _grouped_linear(
        rows, weights.gemm1_weights, group_ends, group_counts, batch_invariant=batch_invariant
    )
    if weights.gemm1_bias is not None:
        x = x + weights.gemm1_bias[expert_idx].to(x.dtype)
    x = apply_activation(x, activation, parameters, expert_idx).to(hidden_states.dtype)
    x = _grouped_linear(
        x, weights.gemm2_weights, group_ends, group_counts, batch_invariant=batch_invariant
    )
    if weights.gemm2_bias is not None:
        x = x + weights.gemm2_bias[expert_idx].to(x.dtype)
    return x, expanded_to_permuted


def combine_reference(
    gemm2_output: Tensor, topk_weights: Tensor, expanded_idx_to_permuted_idx: Tensor
) -> Tensor:
    """Sum the weighted expert outputs of each token in float32, rank 0 first.

    Args:
        gemm2_output: `[rows, H]`, as returned by `experts_reference`.
        topk_weights: float32 `[T, K]`.
        expanded_idx_to_permuted_idx: int32 `[T * K]`, -1 for pairs that are not computed here (they add 0).

    Returns:
        `[T, H]` in the dtype of `gemm2_output`; exact zeros for a token without any computed pair.

    Runtime: no host sync; allocates O(T*K*H); CUDA-graph safe; bitwise deterministic; differentiable.
    """
    num_tokens, top_k = topk_weights.shape
    hidden_size = gemm2_output.shape[1]
    if gemm2_output.shape[0] == 0:
        return gemm2_output.new_zeros(num_tokens, hidden_size)
    row_idx = expanded_idx_to_permuted_idx.reshape(num_tokens, top_k).long()
    total = torch.zeros(num_tokens, hidden_size, dtype=torch.float32, device=gemm2_output.device)
    if gemm2_output.shape[0] == num_tokens * top_k:  # every pair was computed
        for rank in range(top_k):
            rows = gemm2_output.index_select(0, row_idx[:, rank]).float()
            total = total + rows * topk_weights[:, rank, None]
        return total.to(gemm2_output.dtype)
    for rank in range(top_k):
        is_computed = (row_idx[:, rank] >= 0).unsqueeze(1)
        rows = gemm2_output.index_select(0, row_idx[:, rank].clamp_min(0)).float()
        # A row that is not computed here must add 0 even where the one read in its place is not finite.
        total = total + (rows * topk_weights[:, rank, None]).masked_fill_(~is_computed, 0.0)
    return total.to(gemm2_output.dtype)
