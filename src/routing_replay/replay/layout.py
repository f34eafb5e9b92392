"""How the tokens of a microbatch are laid out in the rows that every router sees."""

from dataclasses import dataclass
from typing import Literal

from routing_replay.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """Sequences as the rows of `input_ids` `[B, seq_len]`, padded on one side.

    The routers of a Hugging Face model see `B * seq_len` rows, row `b * seq_len + s`. Pass the model
    an `attention_mask` `[B, seq_len]` that is 0 at padding tokens, and with `side="left"` also
    `position_ids` that count from 0 at each sequence's first token, as the rollout engine did.

    Attributes:
        lengths: Tokens of each sequence without padding, each at least 1, B of them.
        seq_len: Columns of `input_ids`, at least the longest length.
        side: Where the padding tokens are.

    Raises:
        ConfigError: A value is not accepted.
    """

    lengths: tuple[int, ...]
    seq_len: int
    side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        _check_lengths(self.lengths)
        if self.side not in ("right", "left"):
            raise ConfigError(f"side = {self.side!r} is not accepted; it must be 'right' or 'left'")
        longest = max(self.lengths)
        if type(self.seq_len) is not int or self.seq_len < longest:
            raise ConfigError(
                f"seq_len = {self.seq_len!r} is not accepted; it must be an int of at least the"
                f" longest sequence, which has {longest} tokens"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of `input_ids`: `(B, seq_len)`."""
        return len(self.lengths), self.seq_len

    @property
    def num_tokens(self) -> int:
        """Rows that a router sees, padding included: `B * seq_len`."""
        return len(self.lengths) * self.seq_len

    def offsets(self) -> tuple[int, ...]:
        """Return the router row of each sequence's token 0."""
        return tuple(
            idx * self.seq_len + (self.seq_len - length if self.side == "left" else 0)
            for idx, length in enumerate(self.lengths)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Sequences one after the other in one row, `input_ids` `[1, sum(lengths)]`.

    Attention must not cross from one sequence to the next. With Transformers (`eager` and `sdpa`
    attention): pass `position_ids` `[1, sum(lengths)]` that restart at 0 at each sequence's first
    token, no `attention_mask`, and `use_cache=False`. The model then detects the sequences from the
    positions; with a cache, which most configurations ask for by default, or with a mask it does
    not, and attends across them without a word. Replay cannot see that, because routers have no
    notion of sequences.

    Attributes:
        lengths: Tokens of each sequence, each at least 1.

    Raises:
        ConfigError: A value is not accepted.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_lengths(self.lengths)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of `input_ids`: `(1, sum(lengths))`."""
        return 1, self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Rows that a router sees: `sum(lengths)`."""
        return sum(self.lengths)

    def offsets(self) -> tuple[int, ...]:
        """Return the router row of each sequence's token 0."""
        return tuple(sum(self.lengths[:idx]) for idx in range(len(self.lengths)))


Layout = Padded | Packed
"""Every layout that `ReplayHandle.replay` and `ReplayHandle.record` accept."""


def _check_lengths(lengths: object) -> None:
    """Check that lengths are a non-empty tuple of positive ints."""
    if not isinstance(lengths, tuple) or not lengths:
        raise ConfigError(
            f"lengths = {lengths!r} is not accepted; it must be a non-empty tuple with the tokens of"
            f" each sequence"
        )
    for idx, length in enumerate(lengths):  # pyright: ignore[reportUnknownVariableType]
        if type(length) is not int or length < 1:  # pyright: ignore[reportUnknownArgumentType]
            raise ConfigError(
                f"lengths[{idx}] = {length!r} is not accepted; it must be an int of at least 1"
            )
