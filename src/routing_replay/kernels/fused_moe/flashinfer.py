"""The `flashinfer` backend: `bf16_moe` on FlashInfer's TensorRT-LLM kernels, for GPUs of compute capability 10 and 12.

Written against the documented interface of FlashInfer 0.7 and tested with a stand-in that checks what it is given; it has
not run on such a GPU. Numerics are FlashInfer's: combine weights in bfloat16, a grouped router's bias rounded to bfloat16,
sigmoids through tanh. Ids of near ties can therefore differ from those of the other backends.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from routing_replay.errors import ConfigError, IntegrationError
from routing_replay.kernels.backend import check_flashinfer_device
from routing_replay.kernels.experts import ActivationType, SwigluParameters
from routing_replay.kernels.fused_moe.checks import MoEShape
from routing_replay.kernels.routing import RoutingMethod, RoutingMethodType
from routing_replay.kernels.routing.checks import check_bias, check_logits, check_replay_buffer

__all__ = [
    "FlashInferApi",
    "FlashInferWeights",
    "are_prepared",
    "launch",
    "load_flashinfer",
    "prepare_weights",
]

Kind = RoutingMethodType

_EPILOGUE_TILE = 128
_BLOCK_BYTES = 128
_BLOCK = _BLOCK_BYTES // 2  # bfloat16 elements
_ROW_MULTIPLE = 128
_ACTIVATIONS = (ActivationType.Swiglu, ActivationType.Relu2)
# Most experts and most experts of a token that kernels are compiled for.
_SMALL, _LARGE, _BIASED = (256, 8), (2048, 32), (1024, 32)
_LIMITS = {
    Kind.Default: _SMALL,
    Kind.TopK: _SMALL,
    Kind.Sigmoid: _SMALL,
    Kind.SigmoidRenorm: _SMALL,
    Kind.TopKSigmoid: _SMALL,
    Kind.Renormalize: _LARGE,
    Kind.RenormalizeNaive: _LARGE,
    Kind.MiniMax2: _BIASED,
    Kind.DeepSeekV3: _BIASED,
    Kind.Llama4: (128, 1),
}
_MAX_GROUPS, _MAX_SELECTED_GROUPS, _MAX_GROUP_SIZE, _MAX_GROUPED_EXPERTS = 8, 4, 32, 512
_FEW_GROUPED_EXPERTS, _TOP_K_OF_FEW, _TOP_K_OF_MANY = 384, 8, 22


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferApi:
    """What is used of FlashInfer.

    Attributes:
        trtllm_bf16_moe: `flashinfer.fused_moe.trtllm_bf16_moe`.
        reorder_rows_for_gated_act_gemm: `flashinfer.fused_moe.reorder_rows_for_gated_act_gemm`.
        convert_to_block_layout: `flashinfer.fused_moe.convert_to_block_layout`.
        shuffle_matrix_a: `flashinfer.shuffle_matrix_a`.
        block_major_k: `flashinfer.fused_moe.WeightLayout.BlockMajorK`.
    """

    trtllm_bf16_moe: Callable[..., object]
    reorder_rows_for_gated_act_gemm: Callable[[Tensor], Tensor]
    convert_to_block_layout: Callable[[Tensor, int], Tensor]
    shuffle_matrix_a: Callable[[Tensor, int], Tensor]
    block_major_k: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlashInferWeights:
    """Expert weights in the layout of FlashInfer's kernels, made once by `prepare_weights`.

    Attributes:
        gemm1_weights: bfloat16 `[E_local, H / 64, 2I, 64]`, rows of up and gate interleaved and shuffled
            (`[E_local, H / 64, I, 64]` without a gate).
        gemm2_weights: bfloat16 `[E_local, I / 64, H, 64]`, rows shuffled.
        activation_type: The activation that the rows of `gemm1_weights` are laid out for.
    """

    gemm1_weights: Tensor
    gemm2_weights: Tensor
    activation_type: ActivationType


def load_flashinfer(device: torch.device) -> FlashInferApi:
    """Import FlashInfer for a GPU that its kernels run on.

    Args:
        device: Where the op runs.

    Returns:
        Its functions.

    Raises:
        ConfigError: The device is no GPU of compute capability 10 or 12.
        IntegrationError: FlashInfer is not installed, or lacks one of the functions.

    Runtime: host only; the first import may compile.
    """
    check_flashinfer_device(device)
    try:
        top = importlib.import_module("flashinfer")
        fused = importlib.import_module("flashinfer.fused_moe")
        return FlashInferApi(
            trtllm_bf16_moe=fused.trtllm_bf16_moe,
            reorder_rows_for_gated_act_gemm=fused.reorder_rows_for_gated_act_gemm,
            convert_to_block_layout=fused.convert_to_block_layout,
            shuffle_matrix_a=top.shuffle_matrix_a,
            block_major_k=int(fused.WeightLayout.BlockMajorK),
        )
    except (ImportError, AttributeError) as err:
        raise IntegrationError(
            f"backend='flashinfer' needs flashinfer-python 0.7 or newer ({err}); install it, or use backend='triton'"
        ) from err


def prepare_weights(
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    *,
    activation_type: int = ActivationType.Swiglu,
    api: FlashInferApi | None = None,
) -> FlashInferWeights:
    """Lay expert weights out for FlashInfer's kernels; once, when they are loaded.

    The rows of GEMM 1 go from `[gate; up]` to up first, are interleaved in pairs and shuffled in the order of the
    kernels' epilogue; both weights are then cut into blocks of 128 bytes along the reduced dimension.

    Args:
        gemm1_weights: bfloat16 `[E_local, 2I, H]`, rows `[gate; up]` (`[E_local, I, H]` without a gate).
        gemm2_weights: bfloat16 `[E_local, H, I]`.
        activation_type: Swiglu or Relu2.
        api: FlashInfer; None imports it.

    Returns:
        The weights, for `bf16_moe` in place of the plain ones.

    Raises:
        ConfigError: A dtype, shape or activation is not accepted, or the device is not of compute capability 10 or 12.
        IntegrationError: FlashInfer is not installed.

    Runtime: no host sync; allocates as much as the weights, and a few times one expert; bitwise deterministic.
    """
    activation = _checked_activation(activation_type)
    _check_plain(gemm1_weights, gemm2_weights, activation)
    api = load_flashinfer(gemm1_weights.device) if api is None else api
    first = _blocks_of(gemm1_weights)
    second = _blocks_of(gemm2_weights)
    for expert, (rows1, rows2) in enumerate(zip(gemm1_weights, gemm2_weights, strict=True)):
        rows = rows1
        if activation.is_gated:
            gate, up = rows1.chunk(2)
            rows = api.reorder_rows_for_gated_act_gemm(torch.cat((up, gate)))
        first[expert].copy_(_shuffled(rows, api))
        second[expert].copy_(_shuffled(rows2, api))
    return FlashInferWeights(
        gemm1_weights=first.view(torch.bfloat16),
        gemm2_weights=second.view(torch.bfloat16),
        activation_type=activation,
    )


def are_prepared(gemm1_weights: Tensor) -> bool:
    """Return whether weights were laid out by `prepare_weights`: they have four dimensions, and no other backend reads them.

    Args:
        gemm1_weights: Weights of GEMM 1.

    Returns:
        True for four dimensions.

    Runtime: host only.
    """
    return gemm1_weights.ndim == 4


def _blocks_of(weights: Tensor) -> Tensor:
    """Room for all experts, as bytes."""
    experts, rows, columns = weights.shape
    size = (experts, columns // _BLOCK, rows, _BLOCK_BYTES)
    return torch.empty(size, dtype=torch.uint8, device=weights.device)


def _shuffled(rows: Tensor, api: FlashInferApi) -> Tensor:
    """One expert's weight as bytes `[columns / 64, rows, 128]`."""
    as_bytes = rows.contiguous().view(torch.uint8)
    return api.convert_to_block_layout(api.shuffle_matrix_a(as_bytes, _EPILOGUE_TILE), _BLOCK_BYTES)


def _checked_activation(activation_type: int) -> ActivationType:
    if activation_type not in _ACTIVATIONS:
        accepted = " and ".join(f"{item.name} ({item.value})" for item in _ACTIVATIONS)
        raise ConfigError(
            f"activation_type={activation_type} with backend='flashinfer'; accepted are {accepted}: use backend='triton'"
        )
    return ActivationType(activation_type)


def _check_plain(gemm1_weights: Tensor, gemm2_weights: Tensor, activation: ActivationType) -> None:
    for name, tensor in (("gemm1_weights", gemm1_weights), ("gemm2_weights", gemm2_weights)):
        if tensor.dtype is not torch.bfloat16:
            raise ConfigError(
                f"{name} is {tensor.dtype}; accepted is torch.bfloat16 for backend='flashinfer'"
            )
        if tensor.ndim != 3:
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)}; accepted are plain weights of 3 dimensions, prepared once"
            )
    experts, hidden_size, intermediate_size = gemm2_weights.shape
    num_rows = intermediate_size * (2 if activation.is_gated else 1)
    if tuple(gemm1_weights.shape) != (experts, num_rows, hidden_size):
        raise ConfigError(
            f"gemm1_weights has shape {tuple(gemm1_weights.shape)}, expected {(experts, num_rows, hidden_size)} beside "
            f"gemm2_weights {tuple(gemm2_weights.shape)}"
        )
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % _ROW_MULTIPLE:
            raise ConfigError(
                f"{name}={size} with backend='flashinfer'; accepted are multiples of {_ROW_MULTIPLE}: use "
                "backend='triton'"
            )


def _check_method(routing: RoutingMethod, routing_bias: Tensor | None) -> None:
    """Refuse what FlashInfer's router computes otherwise, or has no kernel for."""
    name, experts, top_k = routing.type.name, routing.num_experts, routing.top_k
    most_experts, most_picked = _LIMITS[routing.type]
    if experts > most_experts or top_k > most_picked or experts % 4 or top_k >= experts:
        raise ConfigError(
            f"num_experts={experts} and top_k={top_k} with routing method {name} and backend='flashinfer'; accepted are "
            f"multiples of 4 up to {most_experts} and fewer than all of them, up to {most_picked}: use backend='triton'"
        )
    if routing_bias is not None and routing.has_router_bias:
        raise ConfigError(
            f"routing_bias with routing method {name} is a bias of the router's GEMM, which backend='flashinfer' does not "
            "add; add it to routing_logits, or use backend='triton'"
        )
    needs_bias = routing.type is Kind.DeepSeekV3 and routing.n_group == 1
    if needs_bias and routing_bias is None:
        raise ConfigError(
            f"routing_bias is None with routing method {name} without groups and backend='flashinfer', whose kernel reads "
            "one; pass zeros"
        )
    divides_always = routing.type in (Kind.DeepSeekV3, Kind.MiniMax2)
    if divides_always and not routing.norm_topk_prob:
        raise ConfigError(
            f"norm_topk_prob=False with routing method {name} and backend='flashinfer', which divides by the sum; use "
            "backend='triton'"
        )
    if routing.n_group > 1:
        _check_groups(routing)


def _check_groups(routing: RoutingMethod) -> None:
    experts, size = routing.num_experts, routing.num_experts // routing.n_group
    most_picked = _TOP_K_OF_FEW if experts <= _FEW_GROUPED_EXPERTS else _TOP_K_OF_MANY
    if (
        routing.n_group > _MAX_GROUPS
        or routing.topk_group > _MAX_SELECTED_GROUPS
        or size > _MAX_GROUP_SIZE
        or experts > _MAX_GROUPED_EXPERTS
        or routing.top_k > most_picked
        or routing.top_k >= routing.topk_group * size
    ):
        raise ConfigError(
            f"n_group={routing.n_group} and topk_group={routing.topk_group} with num_experts={experts}, top_k="
            f"{routing.top_k} and backend='flashinfer'; accepted are up to {_MAX_GROUPS} groups of up to {_MAX_GROUP_SIZE}, "
            f"{_MAX_SELECTED_GROUPS} of them selected with more than top_k experts in all, and up to {most_picked} experts "
            "a token: use backend='triton'"
        )


def _check_call(
    hidden_states: Tensor, weights: tuple[Tensor, Tensor], activation: ActivationType, shape: MoEShape,
    unsupported: Mapping[str, object],
) -> None:  # fmt: skip
    for name, value in unsupported.items():
        if isinstance(value, Tensor) or value:
            said = "given" if isinstance(value, Tensor) else value
            raise ConfigError(
                f"{name} is {said} but FlashInfer's trtllm_bf16_moe has no such argument; leave it out, or use "
                "backend='triton' with plain weights"
            )
    if hidden_states.dtype is not torch.bfloat16 or not hidden_states.is_contiguous():
        raise ConfigError(
            f"hidden_states is {hidden_states.dtype} with strides {hidden_states.stride()}; accepted is torch.bfloat16, "
            "contiguous, for backend='flashinfer'"
        )
    rows = shape.intermediate_size * (2 if activation.is_gated else 1)
    experts, hidden = shape.local_num_experts, shape.hidden_size
    for name, tensor, expected in (
        ("gemm1_weights", weights[0], (experts, hidden // _BLOCK, rows, _BLOCK)),
        ("gemm2_weights", weights[1], (experts, shape.intermediate_size // _BLOCK, hidden, _BLOCK)),
    ):  # fmt: skip
        if tuple(tensor.shape) != expected or tensor.dtype is not torch.bfloat16:
            raise ConfigError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected torch.bfloat16 {expected} for "
                "backend='flashinfer'; make it with prepare_weights, once"
            )
        if tensor.device != hidden_states.device:
            raise ConfigError(
                f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}; use one device"
            )


def launch(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    weights: tuple[Tensor, Tensor],
    shape: MoEShape,
    routing: RoutingMethod,
    *,
    activation_type: int,
    parameters: SwigluParameters,
    do_finalize: bool = True,
    routing_replay_out: Tensor | None = None,
    output: Tensor | None = None,
    unsupported: Mapping[str, object],
    api: FlashInferApi | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Run a MoE layer on FlashInfer's kernels.

    Args:
        routing_logits: `[T, E]` bfloat16 or float32.
        routing_bias: `[E]` selection bias, or None.
        hidden_states: bfloat16 `[T, H]`, contiguous.
        weights: `gemm1_weights` and `gemm2_weights` that `prepare_weights` made.
        shape: The integers of the call.
        routing: How logits become ids and weights.
        activation_type: The activation that they were prepared for.
        parameters: Per-expert parameters of Swiglu.
        do_finalize: Return the sum; False returns its parts.
        routing_replay_out: int16 `[>= T, K]`, contiguous: rows `[0, T)` receive the global ids.
        output: bfloat16 `[T, H]` to write into, or None.
        unsupported: Arguments of `bf16_moe` that FlashInfer's op has not, by name; each must be None, False or 0.
        api: FlashInfer; None imports it.

    Returns:
        As `bf16_moe`; the weights of the unfinalized form were rounded to bfloat16.

    Raises:
        ConfigError: An argument is not accepted, or the device is not of compute capability 10 or 12.
        IntegrationError: FlashInfer is not installed.

    Runtime: no host sync of its own; FlashInfer allocates its workspace; CUDA-graph safe and deterministic as far as
        FlashInfer is; not registered with torch.library, so that torch.compile breaks the graph here; no gradients.
    """
    check_logits(routing_logits, routing)
    activation = _checked_activation(activation_type)
    _check_call(hidden_states, weights, activation, shape, unsupported)
    device = hidden_states.device
    check_bias(routing_bias, routing, device)
    _check_method(routing, routing_bias)
    check_replay_buffer(
        "routing_replay_out", routing_replay_out, num_tokens=shape.num_tokens, top_k=shape.top_k, device=device
    )  # fmt: skip
    api = load_flashinfer(device) if api is None else api
    has_groups = routing.type is Kind.DeepSeekV3
    has_scale = routing.type in (Kind.DeepSeekV3, Kind.MiniMax2)
    # Absent rather than None: each came with some version of FlashInfer.
    optional = {
        "routing_replay_out": routing_replay_out,
        "gemm1_alpha": parameters.alpha,
        "gemm1_beta": parameters.beta,
        "gemm1_clamp_limit": parameters.limit,
        "output": output,
    }
    result = api.trtllm_bf16_moe(
        routing_logits=routing_logits,
        routing_bias=routing_bias,
        hidden_states=hidden_states,
        gemm1_weights=weights[0],
        gemm2_weights=weights[1],
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        n_group=routing.n_group if has_groups else None,
        topk_group=routing.topk_group if has_groups else None,
        intermediate_size=shape.intermediate_size,
        local_expert_offset=shape.local_expert_offset,
        local_num_experts=shape.local_num_experts,
        routed_scaling_factor=routing.routed_scaling_factor if has_scale else None,
        routing_method_type=int(routing.type),
        use_shuffled_weight=True,
        weight_layout=api.block_major_k,
        do_finalize=do_finalize,
        activation_type=int(activation),
        norm_topk_prob=routing.norm_topk_prob,
        **{name: value for name, value in optional.items() if value is not None},
    )
    return _as_ours(result, do_finalize)


def _as_ours(result: object, do_finalize: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """FlashInfer returns a tensor or a list, depending on its version."""
    parts = cast("list[Tensor]", [result] if isinstance(result, Tensor) else result)
    if do_finalize:
        return parts[0]
    gemm2_output, topk_weights, expanded_idx_to_permuted_idx = parts
    return gemm2_output, topk_weights.float(), expanded_idx_to_permuted_idx
