"""From traces and a layout to the target ids of every router row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routing_replay.errors import ConfigError, TraceFormatError, TraceMismatchError
from routing_replay.replay.layout import Layout
from routing_replay.trace import ModelRouting, RoutingTrace

OnMissing = Literal["error", "native", "mask_loss", "drop"]
"""What a due row that no trace has becomes.

- `"error"`: an error before the forward pass.
- `"native"`: the model's own top-k, counted; the loss keeps every token.
- `"mask_loss"`: as `"native"`, and `ReplayPlan.loss_mask` is False where the missing row's own
  logits are used: for the prediction of the next token. Later tokens keep their loss; their own
  experts are forced, but they attend to keys and values that a native row made.
- `"drop"`: as `"native"`, and `ReplayPlan.loss_mask` is False in the whole sequence. The stricter
  policy: no token stays that a native row had a part in.
"""

TokenIds = Sequence[int] | npt.NDArray[np.integer] | Tensor
"""The token ids of one whole sequence, `[tokens]`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayPlan:
    """The experts that the router rows of one microbatch are to take.

    Attributes:
        layout: Where the tokens of the sequences are.
        targets: Expert ids, int64 `[tokens, L, K]` on the CPU, -1 in rows that are not replayed.
        mask: Rows that are replayed, bool `[tokens]`; the others take the model's own top-k.
        rows_replayed: Rows whose experts are forced.
        rows_native_last: Last tokens of a sequence without a row; no sampled token depends on them.
        rows_native_missing: Due rows that no trace has; 0 with `on_missing="error"`.
        loss_mask: Logits whose loss is to count, bool on the CPU, of the shape of `input_ids`:
            `[B, seq_len]` padded, `[1, tokens]` packed. The entry of token t speaks of the
            prediction of token t+1 and so stands beside `labels[:, 1:]` once the last column is
            cut off. False at padding, at the last token of every sequence (so that nothing is
            predicted across packed sequences), and where `on_missing` says so. It knows nothing of
            prompts: combine it with the mask of the response.
    """

    layout: Layout
    targets: Tensor
    mask: Tensor
    rows_replayed: int
    rows_native_last: int
    rows_native_missing: int
    loss_mask: Tensor

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
    if on_missing not in get_args(OnMissing):
        raise ConfigError(
            f"on_missing = {on_missing!r} is not accepted; it must be one of {get_args(OnMissing)}"
        )
    _check_traces_count(traces, layout)
    sequences = None if token_ids is None else checked_tokens(token_ids, layout)
    shape = (layout.num_tokens, len(routing.layer_ids), routing.top_k)
    targets = np.full(shape, -1, dtype=np.int64)
    mask = np.zeros(layout.num_tokens, dtype=np.bool_)
    loss_mask = _predicting(layout)
    last = missing = 0
    for idx, (trace, length, offset) in enumerate(
        zip(traces, layout.lengths, layout.offsets(), strict=True)
    ):
        captured = np.zeros(length, dtype=np.bool_)
        if trace is not None:
            tokens = None if sequences is None else sequences[idx]
            _check_trace(trace, routing, length=length, tokens=tokens, name=f"traces[{idx}]")
            captured[trace.start : trace.end] = trace.valid
            rows = offset + trace.start + np.flatnonzero(trace.valid)
            targets[rows] = trace.ids[trace.valid]
            mask[rows] = True
        absent = np.flatnonzero(~captured[: length - 1])
        if absent.size and on_missing == "error":
            raise TraceMismatchError(_missing_message(trace, idx, length=length, absent=absent))
        if on_missing == "mask_loss":
            loss_mask[offset + absent] = False
        elif on_missing == "drop" and absent.size:
            loss_mask[offset : offset + length] = False
        missing += int(absent.size)
        last += int(not captured[length - 1])
    return ReplayPlan(
        layout=layout,
        targets=torch.from_numpy(targets),
        mask=torch.from_numpy(mask),
        rows_replayed=int(mask.sum()),
        rows_native_last=last,
        rows_native_missing=missing,
        loss_mask=torch.from_numpy(loss_mask).view(layout.shape),
    )


def native_plan(routing: ModelRouting, layout: Layout) -> ReplayPlan:
    """Plan a forward pass that is recorded and not replayed: every row is native and none is due.

    Args:
        routing: The model's side.
        layout: Where the tokens are.

    Returns:
        The plan, on the CPU; `targets` is a view of one element.
    """
    shape = (layout.num_tokens, len(routing.layer_ids), routing.top_k)
    return ReplayPlan(
        layout=layout,
        targets=torch.tensor(-1).expand(shape),
        mask=torch.zeros(layout.num_tokens, dtype=torch.bool),
        rows_replayed=0,
        rows_native_last=0,
        rows_native_missing=0,
        loss_mask=torch.from_numpy(_predicting(layout)).view(layout.shape),
    )


def checked_tokens(token_ids: Sequence[TokenIds], layout: Layout) -> list[npt.NDArray[np.integer]]:
    """Return the token ids of every sequence of a layout as arrays on the host.

    Args:
        token_ids: Token ids of every sequence, without padding.
        layout: Where the tokens are.

    Returns:
        One array `[length]` per sequence, which may share memory with the argument.

    Raises:
        ConfigError: Counts or lengths disagree with the layout.

    Runtime: one host sync per tensor that is on a device.
    """
    if len(token_ids) != len(layout.lengths):
        raise ConfigError(
            f"token_ids has {len(token_ids)} entries but the layout has {len(layout.lengths)}"
            f" sequences; pass the token ids of every sequence"
        )
    for idx, (tokens, length) in enumerate(zip(token_ids, layout.lengths, strict=True)):
        if len(tokens) != length:
            raise ConfigError(
                f"token_ids[{idx}] has {len(tokens)} tokens but layout.lengths[{idx}] = {length};"
                f" pass the sequence without padding"
            )
    return [
        tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        for tokens in token_ids
    ]


def _predicting(layout: Layout) -> npt.NDArray[np.bool_]:
    """Return the rows `[tokens]` whose logits predict a token of their own sequence."""
    predicting = np.zeros(layout.num_tokens, dtype=np.bool_)
    for length, offset in zip(layout.lengths, layout.offsets(), strict=True):
        predicting[offset : offset + length - 1] = True
    return predicting


def _check_traces_count(traces: Sequence[RoutingTrace | None], layout: Layout) -> None:
    """Check that there is one entry per sequence."""
    if len(traces) != len(layout.lengths):
        raise ConfigError(
            f"traces has {len(traces)} entries but the layout has {len(layout.lengths)} sequences;"
            f" pass one trace per sequence, None where nothing was captured"
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
        f" it out of the batch, or pass on_missing='native', 'mask_loss' or 'drop'"
    )
