"""Tiles and splits of the attention kernels, chosen by pure functions of shapes."""

from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["AttentionTile", "choose_decode_tile", "choose_prefill_tile", "choose_splits"]

_MAX_SPLITS = 64
_WIDE = 256  # bytes of a key of 128 elements in 16 bits, up to which tiles are large


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTile:
    """The work of one CTA at a time.

    Attributes:
        rows: Rows of the tile: the heads of one KV head times query rows; a power of two from 16 on.
        keys: Keys of a step of the loop; a power of two from 16 on.
        stages: Depth of the software pipeline over the keys.
        warps: Warps of the CTA.
    """

    rows: int
    keys: int
    stages: int
    warps: int

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ConfigError(f"{name}={size}; accepted are powers of two from 16 on")


def _at_least(group_size: int) -> int:
    """The smallest tile that holds the heads of one KV head."""
    return max(16, 1 << (group_size - 1).bit_length())


def _wide_keys(key_bytes: int) -> int:
    """As many keys as shared memory has room for twice, beside rows of the same width."""
    return 16 if key_bytes > 512 else 32


def choose_prefill_tile(
    group_size: int, head_dim: int, element_size: int, *, batch_invariant: bool
) -> AttentionTile:
    """Choose the tile for steps in which some sequence has several rows, and for all batch-invariant steps.

    Args:
        group_size: Query heads of a KV head.
        head_dim: Size of a head.
        element_size: Bytes of an element.
        batch_invariant: The tile also decodes, one row at a time: fewer rows, so that it waits for memory alone.

    Returns:
        The tile; it depends on the arguments alone, which the promise of batch invariance rests on.
    """
    least = _at_least(group_size)
    if element_size * head_dim > _WIDE:
        return AttentionTile(
            rows=max(32, least), keys=_wide_keys(element_size * head_dim), stages=2, warps=4
        )
    if batch_invariant:
        return AttentionTile(rows=max(64, least), keys=64, stages=3, warps=4)
    return AttentionTile(rows=max(128, least), keys=64, stages=3, warps=8)


def choose_decode_tile(group_size: int, head_dim: int, element_size: int) -> AttentionTile:
    """Choose the tile for steps of one row per sequence.

    Args:
        group_size: Query heads of a KV head, all in one tile.
        head_dim: Size of a head.
        element_size: Bytes of an element.

    Returns:
        The tile.
    """
    if element_size * head_dim > _WIDE:
        keys = _wide_keys(element_size * head_dim)
        return AttentionTile(rows=_at_least(group_size), keys=keys, stages=2, warps=4)
    return AttentionTile(rows=_at_least(group_size), keys=64, stages=3, warps=4)


def choose_splits(
    num_sequences: int, num_kv_heads: int, max_tiles: int, *, num_processors: int
) -> int:
    """Choose into how many pieces the keys of every decoding sequence are split.

    Args:
        num_sequences: B.
        num_kv_heads: KV heads, each a CTA of its own.
        max_tiles: Tiles of keys that the longest sequence can have.
        num_processors: Streaming multiprocessors of the device, each of which holds two CTAs.

    Returns:
        As many as fill the device once, at least 1.
    """
    wanted = 2 * num_processors // (num_sequences * num_kv_heads)
    return max(1, min(wanted, max_tiles, _MAX_SPLITS))
