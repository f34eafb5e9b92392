"""Traces of several sequences in one batch, one after the other, and back."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError, TraceMismatchError
from routing_replay.trace._dtype import DigestArray, IdArray, ValidArray, WeightArray
from routing_replay.trace._runs import WeightsVersion
from routing_replay.trace._tensors import TraceTensors, to_tensors
from routing_replay.trace._trace import RoutingTrace

if TYPE_CHECKING:
    import torch

_MAX_INT32 = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSequence:
    """What the rows of one trace in a batch do not say themselves.

    Attributes:
        first_row: Row of the batch that holds the trace's first row.
        num_rows: Rows of the trace.
        start: Token index of its first row.
        ordered: As in `RoutingTrace`.
        weights_version: As in `RoutingTrace`.
    """

    first_row: int
    num_rows: int
    start: int
    ordered: bool
    weights_version: WeightsVersion


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTraces:
    """The rows of B traces of one model, one sequence after the other; arrays are read-only.

    Attributes:
        ids: Logical expert ids, `[T, L, K]`, of the traces' dtype. Rows that are not valid hold
            arange(K) and mean nothing.
        valid: Rows that were captured, bool `[T]`.
        cu_seqlens: Where each sequence begins and the last one ends, int32 `[B + 1]`.
        token_digest: As in `RoutingTrace`, uint32 `[T]`; 0 in rows that no trace has.
        weights: As in `RoutingTrace`, `[T, L, K]`, 0 in rows that are not valid.
        sequences: One per trace, in order.
        layer_ids: Decoder layer of each of the L slots.
        num_layers: Decoder layers of the model.
        num_experts: Routed experts of the model.
        top_k: Experts per token, K.
    """

    ids: IdArray
    valid: ValidArray
    cu_seqlens: npt.NDArray[np.int32]
    token_digest: DigestArray
    weights: WeightArray | None
    sequences: tuple[PackedSequence, ...]
    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return int(np.diff(self.cu_seqlens).max())

    def unpack(self) -> tuple[RoutingTrace, ...]:
        """Take the batch apart.

        Returns:
            The traces that were packed, equal in every field, in their order.
        """
        return tuple(self._trace(sequence) for sequence in self.sequences)

    def to_torch(self, device: "torch.device | str | int | None" = None) -> TraceTensors:
        """Copy ids and mask into torch tensors.

        Args:
            device: Where the tensors go; `None` is the CPU.

        Returns:
            `ids` int64 `[T, L, K]` and `valid` bool `[T]`, sharing no memory with the batch.

        Raises:
            IntegrationError: torch is not installed.

        Runtime: as `RoutingTrace.to_torch`.
        """
        return to_tensors(self.ids, self.valid, device=device)

    def _trace(self, sequence: PackedSequence) -> RoutingTrace:
        rows = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
        return RoutingTrace(
            ids=self.ids[rows],
            valid=self.valid[rows],
            start=sequence.start,
            layer_ids=self.layer_ids,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            ordered=sequence.ordered,
            token_digest=self.token_digest[rows],
            weights_version=sequence.weights_version,
            weights=None if self.weights is None else self.weights[rows],
        )


def pack_traces(
    traces: Sequence[RoutingTrace], *, lengths: Sequence[int] | None = None
) -> PackedTraces:
    """Put the rows of several traces one after the other, as packed training batches have them.

    Without `lengths` the batch has the traces' rows and nothing else: a sequence of n tokens, whose
    last one was sampled, takes n - 1 rows. With `lengths` every token has a row, as in `input_ids`
    `[1, sum(lengths)]`, and the rows of tokens that a trace does not cover are not valid.

    Args:
        traces: At least one, all of the same model and layers, all or none with weights.
        lengths: Tokens of each sequence, at least the `end` of its trace; `None` packs rows alone.

    Returns:
        The batch, which shares no memory with the traces.

    Raises:
        ConfigError: There are no traces, not one length for each, or 2**31 rows or more.
        TraceMismatchError: A trace is of another model or layers than the first, has weights of
            another dtype, or has rows for tokens past its length.
    """
    _check_same_kind(traces)
    if lengths is None:
        sizes = [trace.num_rows for trace in traces]
        leads = [0] * len(traces)
    else:
        sizes = _checked_lengths(traces, lengths)
        leads = [trace.start for trace in traces]
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    if int(ends[-1]) > _MAX_INT32:
        raise ConfigError(
            f"the batch has {int(ends[-1])} rows; cu_seqlens is int32 and ends at most at {_MAX_INT32}:"
            f" pack fewer traces"
        )
    sequences = tuple(
        PackedSequence(
            first_row=int(begin) + lead,
            num_rows=trace.num_rows,
            start=trace.start,
            ordered=trace.ordered,
            weights_version=trace.weights_version,
        )
        for trace, begin, lead in zip(traces, ends[:-1], leads, strict=True)
    )
    return _fill(traces, sequences, cu_seqlens=ends.astype(np.int32))


def _fill(
    traces: Sequence[RoutingTrace],
    sequences: tuple[PackedSequence, ...],
    *,
    cu_seqlens: npt.NDArray[np.int32],
) -> PackedTraces:
    """Copy every trace to its rows; the others become filler that is not valid."""
    first, total = traces[0], int(cu_seqlens[-1])
    ids = np.empty((total, first.num_moe_layers, first.top_k), first.ids.dtype)
    ids[:] = np.arange(first.top_k, dtype=first.ids.dtype)
    valid = np.zeros(total, np.bool_)
    digest = np.zeros(total, np.uint32)
    weights = None if first.weights is None else np.zeros(ids.shape, first.weights.dtype)
    for trace, sequence in zip(traces, sequences, strict=True):
        rows = slice(sequence.first_row, sequence.first_row + sequence.num_rows)
        ids[rows], valid[rows], digest[rows] = trace.ids, trace.valid, trace.token_digest
        if weights is not None:
            weights[rows] = cast("WeightArray", trace.weights)
    for array in (ids, valid, digest, weights, cu_seqlens):
        if array is not None:
            array.flags.writeable = False
    return PackedTraces(
        ids=ids,
        valid=valid,
        cu_seqlens=cu_seqlens,
        token_digest=digest,
        weights=weights,
        sequences=sequences,
        layer_ids=first.layer_ids,
        num_layers=first.num_layers,
        num_experts=first.num_experts,
        top_k=first.top_k,
    )


def _check_same_kind(traces: Sequence[RoutingTrace]) -> None:
    """Check that there are traces, all of one model and layers and with weights of one dtype."""
    if not traces:
        raise ConfigError("traces is empty; pass at least one trace to pack")
    wanted = _kind(traces[0])
    for idx, trace in enumerate(traces[1:], start=1):
        for name, value in _kind(trace).items():
            if value != wanted[name]:
                raise TraceMismatchError(
                    f"traces[{idx}] has {name} = {value} but traces[0] has {wanted[name]}; pack only"
                    f" traces that were captured alike, of the same model and layers"
                )


def _kind(trace: RoutingTrace) -> dict[str, object]:
    """Return what all traces of a batch have in common, by the names of messages."""
    return {
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "num_layers": trace.num_layers,
        "layer_ids": trace.layer_ids,
        "weights of dtype": None if trace.weights is None else trace.weights.dtype.name,
    }


def _checked_lengths(traces: Sequence[RoutingTrace], lengths: Sequence[int]) -> list[int]:
    """Return the lengths as plain integers, once every trace is known to fit."""
    if len(lengths) != len(traces):
        raise ConfigError(
            f"lengths has {len(lengths)} entries for {len(traces)} traces; pass one for each"
        )
    sizes = [operator.index(length) for length in lengths]
    for idx, (trace, length) in enumerate(zip(traces, sizes, strict=True)):
        if length < trace.end:
            raise TraceMismatchError(
                f"traces[{idx}] has rows up to token index {trace.end - 1} but lengths[{idx}] ="
                f" {length}; pass at least {trace.end}, or truncate the trace first"
            )
    return sizes
