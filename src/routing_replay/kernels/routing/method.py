"""The routing methods, under the names and numbers of FlashInfer's `RoutingMethodType`."""

from enum import IntEnum

__all__ = ["RoutingMethodType"]


class RoutingMethodType(IntEnum):
    """How router logits become expert ids and weights.

    The numbers are FlashInfer's, so that a caller can switch libraries. In every method columns are in rank order:
    largest selection key first, ties to the smaller expert id.
    """

    Default = 0
    """Softmax over all experts in float32, then top-k; weights are not renormalised."""

    Renormalize = 1
    """Top-k of the logits, then softmax in float32 over the selected logits."""

    RenormalizeNaive = 4
    """Softmax over all experts in float32, top-k, then division by the sum (Qwen3-MoE, OLMoE with `norm_topk_prob`).

    Equal to `Renormalize` in exact arithmetic, but selection is on the float32 probabilities: where two of them
    underflow to the same value, the smaller id wins, as in Hugging Face's routers.
    """
