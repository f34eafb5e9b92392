"""Which rows of a step belong to which request and to which KV blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from routing_replay.errors import ConfigError

__all__ = ["BlockRef", "RowPiece", "RowSpan", "pieces_of"]


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One life of a physical KV block.

    Attributes:
        block_id: Index of the block in the KV cache.
        epoch: Advances whenever the block is given to new tokens.
    """

    block_id: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpan:
    """Consecutive rows of a step that belong to one request.

    Attributes:
        request_id: The request.
        start: Token index of the first row.
        num_rows: How many tokens the request has in the step.
        blocks: All KV blocks of the request, in token order.
    """

    request_id: str
    start: int
    num_rows: int
    blocks: Sequence[BlockRef]


class RowPiece(NamedTuple):
    """Rows of a step on their way to the host; what it names can no longer change under the engine.

    Attributes:
        request_id: The request.
        start: Token index of its first row.
        num_rows: How many there are.
        first: Its first row among the rows of the step.
        blocks: The KV blocks of these tokens, from the one that holds token `start` on.
    """

    request_id: str
    start: int
    num_rows: int
    first: int
    blocks: Sequence[BlockRef]


def pieces_of(spans: Sequence[RowSpan], block_size: int) -> tuple[Sequence[RowPiece], int]:
    """Cut a step into the rows of each request.

    Args:
        spans: The requests of the step, rows one after another.
        block_size: Tokens of a KV block.

    Returns:
        A piece for each span that has a row, and the number of rows of the step.

    Raises:
        ConfigError: A span has more tokens than its blocks hold.
    """
    pieces: list[RowPiece] = []
    new = (
        tuple.__new__
    )  # half the time of the class itself, for hundreds of pieces before the next launch
    first = 0
    for span in spans:
        start, count = span.start, span.num_rows
        if count:
            low, stop = start // block_size, (start + count - 1) // block_size + 1
            blocks = span.blocks[low:stop]
            if len(blocks) < stop - low:
                raise ConfigError(
                    f"request {span.request_id!r} computes tokens [{start}, {start + span.num_rows}), but its "
                    f"{len(span.blocks)} KV blocks of {block_size} tokens end before them; pass all its blocks"
                )
            pieces.append(new(RowPiece, (span.request_id, start, count, first, blocks)))
        first += span.num_rows
    return pieces, first
