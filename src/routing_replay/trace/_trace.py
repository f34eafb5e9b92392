"""`RoutingTrace`: the routing of one token sequence, immutable and checkable."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._build import (
    as_captured,
    as_runs,
    as_valid,
    clear_missing_weights,
    frozen_copy,
    narrow_ids,
)
from routing_replay.trace._checks import check_content, check_structure
from routing_replay.trace._digest import check_digests, sequence_digests
from routing_replay.trace._dtype import DigestArray, IdArray, IntArray, ValidArray, WeightArray
from routing_replay.trace._merge import merge_rows
from routing_replay.trace._ranges import checked_range, truncated_end
from routing_replay.trace._runs import WeightsVersion, slice_runs
from routing_replay.trace._tensors import TraceTensors, to_tensors

if TYPE_CHECKING:
    import torch

_ARRAY_FIELDS = ("ids", "valid", "token_digest", "weights")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RoutingTrace:
    """The experts that the tokens of one sequence met at every MoE layer.

    Row r belongs to token index `start + r` and holds the experts that this token met when it was
    an *input*. A sequence whose last token was sampled and never fed back has one row less than
    tokens. Construction copies the arrays, sets the copies read-only and checks structure alone;
    `validate` checks content. Prefer `from_rows`, which also computes what can be computed.

    Attributes:
        ids: Logical expert ids, `[rows, L, K]`, uint8 up to 256 experts, else uint16, C order.
            Rows that are not valid hold arange(K) and mean nothing.
        valid: Rows in which every layer was captured, bool `[rows]`.
        start: Token index of row 0.
        layer_ids: Decoder layer (0-based) of each of the L slots, strictly increasing.
        num_layers: Decoder layers of the model, dense ones included.
        num_experts: Routed experts of the model, over all ranks.
        top_k: Experts per token, K.
        ordered: Columns are in the router's rank order: largest selection key first, ties to the
            smaller expert id. `False` means that the order says nothing.
        token_digest: Chained digest of the tokens up to and including each row's, uint32
            `[rows]`; see `token_digests`.
        weights_version: Runs `(token_idx of the first row of the run, version)` of the model
            weights that routed the rows; first at `start`, strictly increasing, neighbours of
            different versions, empty only without rows.
        weights: Combine weights for diagnostics, float16 or float32 `[rows, L, K]`, 0 in rows
            that are not valid; never replayed.

    Raises:
        TraceFormatError: A field has another type, dtype, shape or memory order.
    """

    ids: IdArray
    valid: ValidArray
    start: int
    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    ordered: bool = True
    token_digest: DigestArray
    weights_version: WeightsVersion
    weights: WeightArray | None = None

    def __post_init__(self) -> None:
        check_structure(self)
        for name in _ARRAY_FIELDS:
            array: npt.NDArray[np.generic] | None = getattr(self, name)
            if array is not None:
                object.__setattr__(self, name, frozen_copy(array))

    @classmethod
    def from_rows(
        cls,
        ids: IntArray,
        *,
        token_ids: Sequence[int] | IntArray,
        layer_ids: Sequence[int],
        num_layers: int,
        num_experts: int,
        start: int = 0,
        valid: ValidArray | Sequence[bool] | None = None,
        ordered: bool = True,
        weights_version: int | Sequence[tuple[int, int]] = 0,
        weights: WeightArray | None = None,
    ) -> Self:
        """Build a trace from captured rows.

        Ids are range-checked before they are narrowed, so that -1 is refused unless its row is
        marked in `valid`. Distinctness is left to `validate`.

        Args:
            ids: Captured ids `[rows, L, K]`, any integer dtype. The content of rows that are not
                valid is replaced by arange(K).
            token_ids: The whole sequence from token 0, at least `start + rows` integers in
                [0, 2**32); a longer one is accepted, its further tokens are not looked at.
            layer_ids: Decoder layer of each slot, strictly increasing.
            num_layers: Decoder layers of the model.
            num_experts: Routed experts of the model, in [1, 65536].
            start: Token index of row 0.
            valid: Rows that were captured, bool `[rows]`; `None` means all.
            ordered: Columns are in the router's rank order.
            weights_version: One version for all rows, or runs `(token_idx, version)`.
            weights: Combine weights, float16 or float32 `[rows, L, K]`; 0 is stored in rows that
                are not valid.

        Returns:
            The trace, which shares no memory with the arguments.

        Raises:
            TraceFormatError: An argument is not accepted or an id is out of range.
            TraceMismatchError: `token_ids` is shorter than `start + rows`.
        """
        captured = as_captured(ids)
        num_rows, _, top_k = captured.shape
        first = operator.index(start)
        if first < 0:
            raise TraceFormatError(f"start = {first} is negative; pass the token index of row 0")
        mask = as_valid(valid, num_rows=num_rows)
        experts = operator.index(num_experts)
        return cls(
            ids=narrow_ids(captured, mask, num_experts=experts, start=first),
            valid=mask,
            start=first,
            layer_ids=tuple(operator.index(layer_idx) for layer_idx in layer_ids),
            num_layers=operator.index(num_layers),
            num_experts=experts,
            top_k=top_k,
            ordered=ordered,
            token_digest=sequence_digests(token_ids, start=first, stop=first + num_rows),
            weights_version=as_runs(weights_version, start=first, num_rows=num_rows),
            weights=clear_missing_weights(weights, mask),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the trace, valid or not."""
        return len(self.ids)

    @property
    def end(self) -> int:
        """Token index one past the last row: `start + num_rows`."""
        return self.start + len(self.ids)

    @property
    def num_moe_layers(self) -> int:
        """Slots on the layer axis, L."""
        return len(self.layer_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the trace."""
        arrays = (self.ids, self.valid, self.token_digest, self.weights)
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def is_complete(self) -> bool:
        """Whether every row was captured (true without rows)."""
        return bool(self.valid.all())

    def validate(self, token_ids: Sequence[int] | IntArray | None = None) -> None:
        """Check the content of the trace, and with `token_ids` that it belongs to these tokens.

        Args:
            token_ids: The whole sequence from token 0, at least `end` tokens; the tokens from
                `end` on are not looked at.

        Raises:
            TraceFormatError: An id is out of range or repeated in its row and layer, a row that
                is not valid holds anything but arange(K) and weights of 0, a weight is not finite,
                or a token id is not an integer in [0, 2**32).
            TraceMismatchError: The sequence is shorter than the trace or has other tokens; the
                message names the first token index that differs.
        """
        check_content(self)
        if token_ids is not None:
            check_digests(self.token_digest, token_ids, start=self.start, name="the trace")

    def equals(self, other: object) -> bool:
        """Tell whether another trace has the same fields, dtypes and bits.

        Args:
            other: Anything; whatever is not a `RoutingTrace` is not equal.

        Returns:
            True where every field is the same, weights bit for bit.
        """
        if not isinstance(other, RoutingTrace):
            return False
        return all(
            _same_value(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        )

    def merge(
        self, delta: "RoutingTrace", *, token_ids: Sequence[int] | IntArray | None = None
    ) -> "RoutingTrace":
        """Join a later piece of the same sequence.

        `delta` starts at `end` (append) or at `end - 1` (its first row replaces the last one here,
        as after a turn whose last token had no row of its own yet). A replaced row is the later
        one, unless only the earlier one is valid: a captured row never gives way to a missing one.

        An overlap is checked through the digest of the common row. An append has no common row:
        pass `token_ids` to check it.

        Args:
            delta: Rows of the same model and sequence.
            token_ids: The whole sequence from token 0, at least as long as the result; both
                traces are checked against it.

        Returns:
            The joined trace; `ordered` only where both are.

        Raises:
            TraceFormatError: A token id is not an integer in [0, 2**32).
            TraceMismatchError: Another start, layout or token sequence, or weights in one trace
                and not in the other or of another dtype.
        """
        if token_ids is not None:
            check_digests(self.token_digest, token_ids, start=self.start, name="the trace")
            check_digests(delta.token_digest, token_ids, start=delta.start, name="delta")
        rows = merge_rows(self, delta)
        return dataclasses.replace(
            self,
            ids=rows.ids,
            valid=rows.valid,
            ordered=self.ordered and delta.ordered,
            token_digest=rows.token_digest,
            weights_version=rows.weights_version,
            weights=rows.weights,
        )

    def truncate(self, num_tokens: int) -> "RoutingTrace":
        """Keep the rows of the first `num_tokens` tokens of the sequence.

        The result ends at `min(end, num_tokens)`. Note that it may keep the row of token
        `num_tokens - 1`, which the sequence of `num_tokens` tokens has only if that token was an
        input.

        Args:
            num_tokens: Tokens that stay, counted from token 0; more than `start`.

        Returns:
            The shorter trace, or an equal one where `num_tokens >= end`.

        Raises:
            ConfigError: `num_tokens` is below 1 or not above `start`.
        """
        kept_end = truncated_end(num_tokens, first=self.start, end=self.end)
        return self.slice(self.start, kept_end)

    def slice(self, start: int, stop: int) -> "RoutingTrace":
        """Take the rows of the token indexes [start, stop).

        Args:
            start: First token index, in [self.start, stop].
            stop: One past the last token index, in [start, self.end].

        Returns:
            A trace with `stop - start` rows that owns its arrays.

        Raises:
            ConfigError: The range is not inside the trace, or is reversed.
        """
        lower, upper = checked_range(start, stop, first=self.start, end=self.end)
        first, last = lower - self.start, upper - self.start
        return dataclasses.replace(
            self,
            ids=self.ids[first:last],
            valid=self.valid[first:last],
            start=lower,
            token_digest=self.token_digest[first:last],
            weights_version=slice_runs(self.weights_version, start=lower, stop=upper),
            weights=None if self.weights is None else self.weights[first:last],
        )

    def as_sets(self) -> "RoutingTrace":
        """Sort the ids of every row and layer, weights with them, and say so by `ordered=False`.

        Returns:
            A trace that forgets the router's rank order, as codec `packed` does; an equal one where ids ascend and
            `ordered` is False already.
        """
        if self.weights is None:
            return dataclasses.replace(self, ids=np.sort(self.ids, axis=-1), ordered=False)
        order = np.argsort(self.ids, axis=-1, kind="stable")
        return dataclasses.replace(
            self,
            ids=np.take_along_axis(self.ids, order, axis=-1),
            weights=np.take_along_axis(self.weights, order, axis=-1),
            ordered=False,
        )

    def to_torch(self, device: "torch.device | str | int | None" = None) -> TraceTensors:
        """Copy ids and mask into torch tensors.

        Args:
            device: Where the tensors go; `None` is the CPU.

        Returns:
            `ids` int64 `[rows, L, K]` and `valid` bool `[rows]`, sharing no memory with the trace.

        Raises:
            IntegrationError: torch is not installed.

        Runtime: allocates 8 * rows * L * K bytes on the host and as much again on another device;
            the copy to a device is synchronous; not for use inside CUDA-graph capture;
            deterministic; no gradients.
        """
        return to_tensors(self.ids, self.valid, device=device)

    def __repr__(self) -> str:
        return (
            f"RoutingTrace(tokens=[{self.start}, {self.end}), valid={int(self.valid.sum())}/"
            f"{self.num_rows}, moe_layers={self.num_moe_layers}/{self.num_layers}, num_experts="
            f"{self.num_experts}, top_k={self.top_k}, ordered={self.ordered}, weights_version="
            f"{self.weights_version}, weights={self.weights is not None})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Through the constructor: numpy forgets the read-only flag when it unpickles an array.
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return (_rebuild, (type(self), fields))


def _rebuild(cls: type[RoutingTrace], fields: Mapping[str, object]) -> RoutingTrace:
    """Construct a trace from its pickled fields."""
    return cls(**fields)  # pyright: ignore[reportArgumentType]


def _same_value(mine: object, theirs: object) -> bool:
    """Compare two field values, arrays by dtype, shape and bits."""
    if not isinstance(mine, np.ndarray) or not isinstance(theirs, np.ndarray):
        # An array and None differ; comparing them with == would compare element by element.
        return type(mine) is type(theirs) and mine == theirs
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    return np.array_equal(mine.view(np.uint8), theirs.view(np.uint8))
