"""From traces and a layout to the target ids of every router row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routing_replay.errors import ConfigError, TraceFormatError, TraceMismatchError
from routing_replay.replay.layout import Layout
from routing_replay.trace import RoutingTrace

OnMissing = Literal["error", "native"]
"""What a due row without a captured one becomes: an error, or the model's own top-k, counted."""

TokenIds = Sequence[int] | npt.NDArray[np.integer] | Tensor
"""The token ids of one whole sequence, `[tokens]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRouting:
    """What a trace must agree with to be replayed in a model.

    Attributes:
        layer_ids: Decoder layers (0-based) that have a router, increasing, L of them.
        num_layers: Decoder layers of the model, dense ones included.
        num_experts: Routed experts, E.
        top_k: Experts per token, K.
    """

    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayPlan:
    """The experts that the router rows of one microbatch are to take.

    Attributes:
        targets: Expert ids, int64 `[tokens, L, K]` on the CPU, -1 in rows that are not replayed.
        mask: Rows that are replayed, bool `[tokens]`; the others take the model's own top-k.
        rows_replayed: Rows whose experts are forced.
        rows_native_last: Last tokens of a sequence without a row; no sampled token depends on them.
        rows_native_missing: Due rows that no trace has (only with `on_missing="native"`).
    """

    targets: Tensor
    mask: Tensor
    rows_replayed: int
    rows_native_last: int
    rows_native_missing: int

    @property
    def num_tokens(self) -> int:
        """Rows that every router must see, padding included."""
        return len(self.mask)


def build_plan(
    routing: ModelRouting,
    traces: Sequence[RoutingTrace | None],
    layout: Layout,
    *,
    token_ids: Sequence[TokenIds] | None,
    on_missing: OnMissing,
) -> ReplayPlan:
    """Place the rows of traces at the router rows of a layout.

    Args:
        routing: The model's side.
        traces: One per sequence; `None` is a sequence without a captured row.
        layout: Where the tokens are.
        token_ids: The token ids of every sequence, checked against the traces' digests.
        on_missing: What a due row without a captured one becomes.

    Returns:
        The plan, on the CPU.

    Raises:
        ConfigError: Counts or lengths disagree, or `on_missing` is not accepted.
        TraceFormatError: A trace holds malformed ids.
        TraceMismatchError: A trace belongs to another model or other tokens, has too many rows, or
            lacks a due row under `on_missing="error"`.

    Runtime: host only; allocates 8 * tokens * L * K bytes; deterministic; no gradients.
    """
    if on_missing not in ("error", "native"):
        raise ConfigError(
            f"on_missing = {on_missing!r} is not accepted; it must be 'error' or 'native'"
        )
    _check_counts(traces, layout, token_ids)
    shape = (layout.num_tokens, len(routing.layer_ids), routing.top_k)
    targets = np.full(shape, -1, dtype=np.int64)
    mask = np.zeros(layout.num_tokens, dtype=np.bool_)
    last = missing = 0
    for idx, (trace, length, offset) in enumerate(
        zip(traces, layout.lengths, layout.offsets(), strict=True)
    ):
        captured = np.zeros(length, dtype=np.bool_)
        if trace is not None:
            tokens = None if token_ids is None else np.asarray(token_ids[idx])
            _check_trace(trace, routing, length=length, tokens=tokens, name=f"traces[{idx}]")
            captured[trace.start : trace.end] = trace.valid
            rows = offset + trace.start + np.flatnonzero(trace.valid)
            targets[rows] = trace.ids[trace.valid]
            mask[rows] = True
        absent = np.flatnonzero(~captured[: length - 1])
        if absent.size and on_missing == "error":
            raise TraceMismatchError(_missing_message(trace, idx, length=length, absent=absent))
        missing += int(absent.size)
        last += int(not captured[length - 1])
    return ReplayPlan(
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(mask),
        rows_replayed=int(mask.sum()),
        rows_native_last=last,
        rows_native_missing=missing,
    )


def _check_counts(
    traces: Sequence[RoutingTrace | None], layout: Layout, token_ids: Sequence[TokenIds] | None
) -> None:
    """Check that the arguments speak of the same number of sequences and tokens."""
    num_sequences = len(layout.lengths)
    if len(traces) != num_sequences:
        raise ConfigError(
            f"traces has {len(traces)} entries but the layout has {num_sequences} sequences; pass one"
            f" trace per sequence, None where nothing was captured"
        )
    if token_ids is None:
        return
    if len(token_ids) != num_sequences:
        raise ConfigError(
            f"token_ids has {len(token_ids)} entries but the layout has {num_sequences} sequences;"
            f" pass the token ids of every sequence, or None to skip the check"
        )
    for idx, (tokens, length) in enumerate(zip(token_ids, layout.lengths, strict=True)):
        if len(tokens) != length:
            raise ConfigError(
                f"token_ids[{idx}] has {len(tokens)} tokens but layout.lengths[{idx}] = {length};"
                f" pass the sequence without padding"
            )


def _check_trace(
    trace: RoutingTrace,
    routing: ModelRouting,
    *,
    length: int,
    tokens: npt.NDArray[np.integer] | None,
    name: str,
) -> None:
    """Check one trace against the model, the length of its sequence and its tokens."""
    for field in ("num_experts", "top_k", "num_layers", "layer_ids"):
        have, want = getattr(trace, field), getattr(routing, field)
        if have != want:
            raise TraceMismatchError(
                f"{name} has {field} = {have} but the model has {field} = {want}; replay a trace"
                f" only in the model that it was captured with"
            )
    if trace.end > length:
        raise TraceMismatchError(
            f"{name} has rows for the token indexes [{trace.start}, {trace.end}) but its sequence"
            f" has {length} tokens; truncate the trace together with the tokens"
            f" (RoutingTrace.truncate)"
        )
    outside = trace.valid[:, None, None] & (trace.ids >= routing.num_experts)
    if outside.any():
        row, slot, rank = (int(i) for i in np.argwhere(outside)[0])
        raise TraceMismatchError(
            f"{name}.ids[{row}, {slot}, {rank}] = {trace.ids[row, slot, rank]} (token index"
            f" {trace.start + row}, decoder layer {trace.layer_ids[slot]}) is outside"
            f" [0, {routing.num_experts}); replay a trace only in the model that it was captured with"
        )
    try:
        trace.validate(tokens)
    except TraceMismatchError as err:
        raise TraceMismatchError(f"{name}: {err}") from err
    except TraceFormatError as err:
        raise TraceFormatError(f"{name}: {err}") from err


def _missing_message(
    trace: RoutingTrace | None, idx: int, *, length: int, absent: npt.NDArray[np.intp]
) -> str:
    """Say which due row is missing, why, and what the caller can do."""
    first = int(absent[0])
    if trace is None:
        why = "no trace was given"
    elif trace.start <= first < trace.end:
        why = "the row is marked invalid"
    else:
        why = f"the trace covers the token indexes [{trace.start}, {trace.end})"
    return (
        f"sequence {idx} of {length} tokens has no captured row for token index {first}"
        f" ({absent.size} of {length - 1} due rows missing): {why}; capture the whole sequence, leave"
        f" it out of the batch, or pass on_missing='native'"
    )
