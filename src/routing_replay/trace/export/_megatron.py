"""Routing as Megatron-Core takes it: one target for each router, over the tokens that this rank computes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError
from routing_replay.trace._dtype import IdArray, ValidArray
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._rows import checked_num_tokens, placed_rows, rows_between
from routing_replay.trace.export._samples import check_one_length_each, check_one_model

__all__ = ["MegatronBatch", "to_megatron", "to_megatron_batch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MegatronBatch:
    """Targets of a batch that is not packed.

    Attributes:
        targets: For each router, by its 1-based `layer_number`, int64 `[S * B, K]`: row s * B + b is token s of
            sequence b, the order in which Megatron flattens its hidden states `[S, B, H]`.
        padding_mask: bool `[B, S]`, True where a row is no captured one (padding, and each sequence's last token), the
            sense in which Megatron's router code reads it, whatever its docstring says.
    """

    targets: dict[int, npt.NDArray[np.int64]]
    padding_mask: npt.NDArray[np.bool_]


def to_megatron(trace: RoutingTrace, *, num_tokens: int) -> dict[int, npt.NDArray[np.int64]]:
    """Make the targets of one sequence for `RouterReplay.set_target_indices`.

    Only MoE layers of the decoder are in it; routers of MTP layers, whose `layer_number` restarts at 1, must not get
    any. Padding for context or sequence parallelism, and the cut to this rank's tokens, come after.

    Args:
        trace: Rows of the sequence.
        num_tokens: Tokens of the sequence, T.

    Returns:
        For each router, by its 1-based `layer_number`, int64 `[T, K]`. The row of the last token, where the trace has
        none, holds arange(K): distinct ids, as the dispatcher needs them.

    Raises:
        ConfigError: `num_tokens` is below 1.
        TraceMismatchError: A row is missing, or the trace is longer than the sequence.
    """
    ids, _ = _sequence(trace, num_tokens=num_tokens)
    return {
        layer_idx + 1: ids[:, slot].astype(np.int64, order="C")
        for slot, layer_idx in enumerate(trace.layer_ids)
    }


def to_megatron_batch(
    traces: Sequence[RoutingTrace], *, num_tokens: Sequence[int], seq_len: int
) -> MegatronBatch:
    """Lay the targets of a right-padded batch out as Megatron flattens it.

    A batch is `[B, S]` in the data and `[S, B]` in the model; targets that are flattened the first way reach the
    wrong tokens without an error.

    Args:
        traces: Rows of each sequence, of one model.
        num_tokens: Tokens of each sequence.
        seq_len: Padded length, S.

    Returns:
        Targets for each router, and the mask of rows that are no captured ones.

    Raises:
        ConfigError: A number is out of range, or there is not one length for each trace.
        TraceMismatchError: As in `to_megatron`, or the traces are of different models.
    """
    check_one_model(traces)
    check_one_length_each(traces, num_tokens=num_tokens)
    width, longest = operator.index(seq_len), max(num_tokens)
    if longest > width:
        raise ConfigError(
            f"seq_len={width} but a sequence has {longest} tokens; pass the padded length of the batch"
        )
    model = traces[0]
    ids = np.empty((width, len(traces), model.num_moe_layers, model.top_k), model.ids.dtype)
    ids[:] = np.arange(model.top_k, dtype=ids.dtype)
    padding_mask = np.ones((len(traces), width), dtype=np.bool_)
    for row, (trace, tokens) in enumerate(zip(traces, num_tokens, strict=True)):
        ids[:tokens, row], captured = _sequence(trace, num_tokens=tokens)
        padding_mask[row, :tokens] = ~captured
    return MegatronBatch(
        targets={
            layer_idx + 1: ids[:, :, slot].reshape(-1, model.top_k).astype(np.int64)
            for slot, layer_idx in enumerate(model.layer_ids)
        },
        padding_mask=padding_mask,
    )


def _sequence(trace: RoutingTrace, *, num_tokens: int) -> tuple[IdArray, ValidArray]:
    """The rows of all tokens, the last one's captured or filler, and which are captured."""
    tokens = checked_num_tokens(trace, num_tokens)
    rows_between(trace, first=0, stop=tokens - 1, target="a Megatron-Core target")
    return placed_rows(trace, num_rows=tokens)
