"""Routing as vLLM returns it.

Source: vLLM 0.21 (#39917, split fields), 0.22 to 0.33 (one base64 `.npy`; the struct of `/inference/v1/generate`).
"""

import numpy as np

from routing_replay.errors import TraceFormatError
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.importers._bind import TokenIds, bind
from routing_replay.trace.importers._wire import Wire, array_of

__all__ = ["import_vllm", "import_vllm_split"]


def import_vllm(
    routed_experts: Wire,
    *,
    token_ids: TokenIds,
    routing: ModelRouting,
    prompt_start: int = 0,
    weights_version: int = 0,
) -> RoutingTrace:
    """Import `routed_experts` of a completion.

    Args:
        routed_experts: Base64 of an `.npy` (HTTP), the array itself (`CompletionOutput.routed_experts`), or
            `{"data", "shape", "start", "dtype"}`: `[rows, all decoder layers, K]`, uint8, uint16 or wider; columns are
            in no order. Dense layers hold zeros.
        token_ids: Prompt and completion.
        routing: The model.
        prompt_start: `routed_experts_prompt_start` of the request: the token index of row 0. A `start` in the struct
            must agree with it.
        weights_version: Version of the weights that routed the rows.

    Returns:
        A trace with `ordered=False`.

    Raises:
        RoutingDiagnosisError: The array cannot be right; its findings say why.
        TraceFormatError: The field is damaged.
    """
    start = prompt_start
    if isinstance(routed_experts, dict) and "start" in routed_experts:
        start = routed_experts["start"]
        if type(start) is not int or start < 0 or prompt_start not in (0, start):
            raise TraceFormatError(
                f"routed_experts.start is {start!r} and prompt_start={prompt_start}; accepted is one token index of 0 or more"
            )
    return bind(
        array_of(routed_experts, name="routed_experts"),
        token_ids=token_ids,
        routing=routing,
        start=start,
        weights_version=weights_version,
        what="routed_experts from vLLM",
    )


def import_vllm_split(
    prompt_routed_experts: Wire,
    routed_experts: Wire | None,
    *,
    prompt_token_ids: TokenIds,
    token_ids: TokenIds,
    routing: ModelRouting,
    weights_version: int = 0,
) -> RoutingTrace:
    """Import the older pair of fields: the prompt's rows of a response, and a choice's own.

    Args:
        prompt_routed_experts: `[P, all decoder layers, K]`, nested lists or any form of `import_vllm`.
        routed_experts: `[G - 1, all decoder layers, K]`; None where a single token was generated.
        prompt_token_ids: The prompt.
        token_ids: Prompt and completion.
        routing: The model.
        weights_version: Version of the weights that routed the rows.

    Returns:
        A trace with `ordered=False`.

    Raises:
        RoutingDiagnosisError: The rows cannot be right.
        TraceFormatError: A field is damaged, or the prompt has not one row for each of its tokens.
    """
    prompt = array_of(prompt_routed_experts, name="prompt_routed_experts")
    num_prompt = len(prompt_token_ids)
    if len(prompt) != num_prompt or prompt.ndim != 3:
        raise TraceFormatError(
            f"prompt_routed_experts has shape {list(prompt.shape)} for a prompt of {num_prompt} tokens; expected is "
            f"[{num_prompt}, layers, experts]"
        )
    rest = prompt[:0] if routed_experts is None else array_of(routed_experts, name="routed_experts")
    if not rest.size:
        rest = prompt[:0]
    if rest.shape[1:] != prompt.shape[1:]:
        raise TraceFormatError(
            f"prompt_routed_experts has shape {list(prompt.shape)} and routed_experts {list(rest.shape)}; they must agree "
            "in layers and experts"
        )
    return bind(
        np.concatenate([prompt, rest]),
        token_ids=token_ids,
        routing=routing,
        weights_version=weights_version,
        what="prompt_routed_experts with routed_experts from vLLM",
    )
