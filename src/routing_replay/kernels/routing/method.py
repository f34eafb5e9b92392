"""The routing methods, under the names and numbers of FlashInfer's `RoutingMethodType`, and their parameters."""

from dataclasses import dataclass
from enum import IntEnum

from routing_replay.errors import ConfigError

__all__ = ["MAX_EXPERTS", "MAX_TOP_K", "RoutingMethod", "RoutingMethodType"]

MAX_EXPERTS = 2048
"""Most experts of a layer."""

MAX_TOP_K = 32
"""Most experts of a token."""

_MAX_GROUPS = 32
_MAX_SELECTED_GROUPS = 16


class RoutingMethodType(IntEnum):
    """How router logits become expert ids and weights.

    The numbers are FlashInfer's, so that a caller can switch libraries. In every method columns are in rank order:
    largest selection key first, ties to the smaller expert id. Scores, biases and weights are float32.
    """

    Default = 0
    """Softmax over all experts, then top-k; weights are not renormalised."""

    Renormalize = 1
    """Top-k of the logits, then softmax over the selected logits (Mixtral; gpt-oss, whose router has a bias)."""

    DeepSeekV3 = 2
    """Sigmoid; a selection bias; the best groups by their two best experts; top-k inside them; division by the sum, and
    a scale (DeepSeek-V3, GLM-4.5, Kimi-K2; one group selects among all experts)."""

    Llama4 = 3
    """The largest logit; its sigmoid."""

    RenormalizeNaive = 4
    """Softmax over all experts, top-k, then division by the sum (Qwen3-MoE, OLMoE with `norm_topk_prob`).

    Equal to `Renormalize` in exact arithmetic, but selection is on the float32 probabilities: where two of them
    underflow to the same value, the smaller id wins, as in Hugging Face's routers.
    """

    TopK = 5
    """Top-k of the logits, which are the weights."""

    SigmoidRenorm = 6
    """Sigmoid, top-k, division by the sum where `norm_topk_prob`."""

    MiniMax2 = 7
    """Sigmoid; a selection bias; top-k; division by the sum, and a scale."""

    Sigmoid = 8
    """Sigmoid, top-k; weights are not renormalised."""

    TopKSigmoid = 9
    """Top-k of the logits, then their sigmoid: unlike `Sigmoid` where it saturates."""


_SELECTION_BIAS = (RoutingMethodType.DeepSeekV3, RoutingMethodType.MiniMax2)
_ROUTER_BIAS = (RoutingMethodType.Renormalize, RoutingMethodType.TopK, RoutingMethodType.TopKSigmoid)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingMethod:
    """One layer's routing, complete but for its tensors.

    Attributes:
        type: How logits become ids and weights.
        num_experts: E.
        top_k: K.
        n_group: Groups of experts; 1 for none. DeepSeekV3 alone has more.
        topk_group: Groups that a token may use.
        routed_scaling_factor: Factor on the weights of DeepSeekV3 and MiniMax2; 1 for the others.
        norm_topk_prob: Divide by the sum in SigmoidRenorm, DeepSeekV3 and MiniMax2; the others decide by themselves.
        num_fused_shared_experts: S experts with the ids E to E+S-1 and weight 1, appended to every row. They are in no
            replay buffer.

    Raises:
        ConfigError: A value is not accepted, or the method has no such parameter.
    """

    type: RoutingMethodType
    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    num_fused_shared_experts: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ConfigError(f"num_experts={self.num_experts}; accepted is 1 to {MAX_EXPERTS}")
        if not 1 <= self.top_k <= min(MAX_TOP_K, self.num_experts):
            raise ConfigError(
                f"top_k={self.top_k}; accepted is 1 to {min(MAX_TOP_K, self.num_experts)} "
                f"(num_experts={self.num_experts})"
            )
        if self.num_fused_shared_experts < 0:
            raise ConfigError(
                f"num_fused_shared_experts={self.num_fused_shared_experts}; accepted is 0 or more"
            )
        self._check_parameters()
        self._check_groups()

    @property
    def num_columns(self) -> int:
        """Ids of a row, shared experts included: K + S."""
        return self.top_k + self.num_fused_shared_experts

    @property
    def takes_bias(self) -> bool:
        """Whether the method can take a bias: on scores for selection alone, or on logits (`has_router_bias`)."""
        return self.type in _SELECTION_BIAS or self.type in _ROUTER_BIAS

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias belongs to the router's GEMM: it then changes the weights as well."""
        return self.type in _ROUTER_BIAS

    @property
    def divides_by_sum(self) -> bool:
        """Whether `norm_topk_prob` applies and is set; RenormalizeNaive always divides."""
        can = self.type in _SELECTION_BIAS or self.type is RoutingMethodType.SigmoidRenorm
        return can and self.norm_topk_prob

    def _check_parameters(self) -> None:
        name = self.type.name
        if self.type is RoutingMethodType.Llama4 and self.top_k != 1:
            raise ConfigError(f"top_k={self.top_k} with routing method {name}; accepted is 1")
        if self.routed_scaling_factor != 1.0 and self.type not in _SELECTION_BIAS:
            raise ConfigError(
                f"routed_scaling_factor={self.routed_scaling_factor} but routing method {name} applies none; pass None or 1"
            )

    def _check_groups(self) -> None:
        groups, selected = self.n_group, self.topk_group
        if groups == 1 and selected == 1:
            return
        if self.type is not RoutingMethodType.DeepSeekV3:
            raise ConfigError(
                f"n_group={groups} and topk_group={selected} but routing method {self.type.name} has no groups; pass None"
            )
        if not 1 <= groups <= _MAX_GROUPS or self.num_experts % groups:
            raise ConfigError(
                f"n_group={groups} with num_experts={self.num_experts}; accepted is 1 to {_MAX_GROUPS}, a divisor of "
                "num_experts"
            )
        if not 1 <= selected <= min(groups, _MAX_SELECTED_GROUPS):
            raise ConfigError(
                f"topk_group={selected} with n_group={groups}; accepted is 1 to {min(groups, _MAX_SELECTED_GROUPS)}"
            )
        size = self.num_experts // groups
        if size < 2 or selected * size < self.top_k:
            raise ConfigError(
                f"n_group={groups}, topk_group={selected} with num_experts={self.num_experts} leave groups of {size} and "
                f"{selected * size} candidates; accepted are groups of 2 or more and at least top_k={self.top_k} candidates"
            )
