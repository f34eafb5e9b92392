"""What an engine may do while routing is captured, and what is refused, with the reason: one table for both."""

from collections.abc import Iterable
from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["REFUSED", "SUPPORTED", "Refusal", "check_capture_support"]

SUPPORTED = frozenset(
    {
        "async_scheduling",
        "batch_invariant",
        "chunked_prefill",
        "forced_routing",
        "mtp_speculation",
        "ngram_speculation",
        "parallel_sampling",
        "preemption_by_recompute",
        "prefix_caching",
        "prompt_logprobs",
        "weight_update",
    }
)
"""Features of an engine that capture is tested with."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A feature that would make captured rows wrong or incomplete.

    Attributes:
        feature: Its name.
        reason: What goes wrong, and what to do instead.
    """

    feature: str
    reason: str


REFUSED = (
    Refusal(
        "pipeline_parallel",
        "each stage sees only its own layers, so that no rank holds a whole row; use tensor or expert parallelism",
    ),
    Refusal(
        "context_parallel",
        "the tokens of a sequence are spread over ranks and their rows are not gathered; set the context-parallel size to 1",
    ),
    Refusal(
        "kv_transfer",
        "keys and values that another engine computed arrive without their rows; let the engine that samples prefill as well",
    ),
    Refusal(
        "kv_offload",
        "blocks that come back from a host tier get a new place, and their rows do not follow; switch the tier off",
    ),
    Refusal(
        "preemption_by_swap",
        "swapped-in blocks get a new place, and their rows do not follow; preempt by recomputing",
    ),
    Refusal(
        "tree_speculation",
        "keys and values of the accepted branch move after they were computed, and their rows do not; speculate a chain",
    ),
    Refusal(
        "two_batch_overlap",
        "both halves of a step would write the same rows of the device cache; switch the overlap off",
    ),
    Refusal(
        "monolithic_router",
        "experts are picked inside a kernel that cannot write them out; choose a backend with routing_replay_out",
    ),
    Refusal(
        "physical_expert_ids",
        "ids after expert-parallel load balancing name places, not experts; record before the remap",
    ),
    Refusal(
        "hybrid_kv_groups",
        "layers with block tables of their own give a token more than one block, and rows are kept per block; use one KV group",
    ),
)
"""Features that are refused, with the reason."""


def check_capture_support(features: Iterable[str]) -> None:
    """Refuse an engine set-up whose routing cannot be captured exactly.

    Args:
        features: Every feature that the engine will use, by name.

    Raises:
        ConfigError: A feature is refused, or this version does not know it: what was never tested is not captured.
    """
    reasons = {refusal.feature: refusal.reason for refusal in REFUSED}
    for feature in sorted(features):
        if feature in reasons:
            raise ConfigError(
                f"routing cannot be captured with {feature}: {reasons[feature]}; or run without "
                "enable_return_routed_experts"
            )
        if feature not in SUPPORTED:
            raise ConfigError(
                f"routing cannot be captured with {feature!r}: this version does not know the feature; known are "
                f"{', '.join(sorted(SUPPORTED))}"
            )
