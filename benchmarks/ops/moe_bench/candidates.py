"""Tiles that every peer with SGLang's and vLLM's knobs may choose from where it has no H100 table of its own."""

from moe_bench.shapes import LayerShape

__all__ = ["nearest", "tile_candidates"]

Tile = dict[str, int]

_FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")  # fmt: skip
_FEW_ROWS = ((16, 64, 128, 1, 4, 3), (16, 128, 128, 1, 8, 5), (16, 128, 128, 1, 4, 2), (16, 64, 256, 1, 4, 4))  # fmt: skip
_SOME_ROWS = ((32, 128, 128, 1, 4, 3), (32, 256, 128, 1, 4, 2), (64, 128, 128, 1, 4, 2), (64, 128, 64, 1, 4, 4))  # fmt: skip
_MANY_ROWS = ((64, 128, 64, 1, 4, 3), (128, 128, 64, 1, 8, 4), (128, 256, 64, 1, 8, 4), (128, 256, 64, 16, 8, 4))  # fmt: skip


def tile_candidates(shape: LayerShape, num_tokens: int) -> list[Tile]:
    """Return four tiles that suit the rows that an expert gets.

    Args:
        shape: The layer.
        num_tokens: T.

    Returns:
        Tiles under the names of SGLang's and vLLM's tables.
    """
    rows = num_tokens * shape.routing.top_k / shape.routing.num_experts
    table = _FEW_ROWS if rows <= 16 else _SOME_ROWS if rows <= 96 else _MANY_ROWS
    return [dict(zip(_FIELDS, values, strict=True)) for values in table]


def nearest(table: dict[int, Tile], num_tokens: int) -> Tile:
    """Return the entry of a table by tokens that both engines would take: the nearest.

    Args:
        table: Tiles by number of tokens.
        num_tokens: T.

    Returns:
        A copy of the tile.
    """
    return dict(table[min(table, key=lambda key: abs(key - num_tokens))])
