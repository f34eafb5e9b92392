"""Routing as inference engines answer with it over HTTP: vLLM's three forms and SGLang's.

All of them have every decoder layer on the layer axis and no mark for a missing row; the row of the last token,
which no engine computes, is never in them.
"""

import base64
import io
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._rows import (
    all_layers,
    cast_ids,
    checked_first,
    checked_num_tokens,
    rows_between,
)

__all__ = [
    "VllmGenerateRouting",
    "VllmSplitRouting",
    "to_sglang",
    "to_vllm",
    "to_vllm_generate",
    "to_vllm_split",
]

_NarrowArray = npt.NDArray[np.uint8 | np.uint16]


class VllmGenerateRouting(TypedDict):
    """`routed_experts` of a choice of vLLM's `/inference/v1/generate`."""

    data: str
    """base64 of the C-order bytes."""
    shape: list[int]
    """`[rows, num_layers, K]`."""
    start: int
    """Token index of the first row."""
    dtype: str
    """uint8 up to 256 experts, else uint16."""


class VllmSplitRouting(TypedDict):
    """The two fields of older vLLM versions."""

    prompt_routed_experts: _NarrowArray
    """Rows of the prompt, `[P, num_layers, K]`."""
    routed_experts: _NarrowArray
    """Rows of the completion but its last token, `[G - 1, num_layers, K]`."""


def to_vllm(trace: RoutingTrace, *, num_tokens: int, prompt_start: int = 0) -> str:
    """Make `choices[i].routed_experts` as vLLM's OpenAI routes send it.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and completion.
        prompt_start: The request's `routed_experts_prompt_start`; the answer does not carry it.

    Returns:
        base64 of an `.npy` file, `[num_tokens - 1 - prompt_start, num_layers, K]`, uint8 up to 256 experts, else
        uint16.

    Raises:
        ConfigError: `num_tokens` or `prompt_start` is out of range.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    buffer = io.BytesIO()
    np.save(
        buffer, _vllm_rows(trace, num_tokens=num_tokens, first=prompt_start), allow_pickle=False
    )
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def to_vllm_generate(
    trace: RoutingTrace, *, num_tokens: int, prompt_start: int | None = None
) -> VllmGenerateRouting:
    """Make the routing of a choice of vLLM's `/inference/v1/generate`, which names its first token.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and completion.
        prompt_start: Token index of the first row to send; `None` is where the trace starts.

    Returns:
        A JSON object with `data`, `shape`, `start` and `dtype`.

    Raises:
        ConfigError: `num_tokens` or `prompt_start` is out of range.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    first = trace.start if prompt_start is None else prompt_start
    rows = _vllm_rows(trace, num_tokens=num_tokens, first=first)
    return {
        "data": base64.b64encode(rows.astype(rows.dtype.newbyteorder("<")).tobytes()).decode(
            "ascii"
        ),
        "shape": list(rows.shape),
        "start": first,
        "dtype": rows.dtype.name,
    }


def to_vllm_split(
    trace: RoutingTrace, *, num_tokens: int, num_prompt_tokens: int
) -> VllmSplitRouting:
    """Make the two fields that vLLM versions before the single `.npy` sent, there as nested lists.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and completion.
        num_prompt_tokens: Tokens of the prompt.

    Returns:
        `prompt_routed_experts` `[P, num_layers, K]` and `routed_experts` `[G - 1, num_layers, K]`.

    Raises:
        ConfigError: `num_tokens` is out of range, or `num_prompt_tokens` is not in [1, num_tokens).
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    if not 1 <= num_prompt_tokens < num_tokens:
        raise ConfigError(
            f"num_prompt_tokens={num_prompt_tokens} with num_tokens={num_tokens}; accepted is 1 to num_tokens - 1: the "
            "form has a prompt and a completion"
        )
    rows = _vllm_rows(trace, num_tokens=num_tokens, first=0)
    return {
        "prompt_routed_experts": rows[:num_prompt_tokens].copy(),
        "routed_experts": rows[num_prompt_tokens:].copy(),
    }


def to_sglang(trace: RoutingTrace, *, num_tokens: int, start_len: int = 0) -> str:
    """Make `meta_info["routed_experts"]` (`/generate`) or `sglext["routed_experts"]` (OpenAI routes) of SGLang.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of prompt and completion.
        start_len: The request's `routed_experts_start_len`; the answer does not carry it.

    Returns:
        base64 of the little-endian int32 bytes of `[num_tokens - 1 - start_len, num_layers, K]`, C order.

    Raises:
        ConfigError: `num_tokens` or `start_len` is out of range.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    rows = _engine_rows(
        trace, num_tokens=num_tokens, first=start_len, name="start_len", target="SGLang's field"
    )
    kind = np.dtype(np.int32).newbyteorder("<")
    return base64.b64encode(cast_ids(trace, rows, kind, target="SGLang").tobytes()).decode("ascii")


def _vllm_rows(trace: RoutingTrace, *, num_tokens: int, first: int) -> _NarrowArray:
    return _engine_rows(
        trace, num_tokens=num_tokens, first=first, name="prompt_start", target="vLLM's field"
    ).copy()


def _engine_rows(
    trace: RoutingTrace, *, num_tokens: int, first: int, name: str, target: str
) -> _NarrowArray:
    stop = checked_num_tokens(trace, num_tokens) - 1
    start = checked_first(first, name=name, limit=stop)
    return all_layers(trace, rows_between(trace, first=start, stop=stop, target=target))
