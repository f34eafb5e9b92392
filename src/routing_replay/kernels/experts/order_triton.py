"""The order in which the CTAs of a grouped GEMM take their work, for both tiled engines."""

# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# Triton's stubs do not describe the values inside a kernel.
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

__all__ = ["tile_and_block"]


@triton.jit
def tile_and_block(pid, num_tiles, BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of tokens and which block of weight rows a CTA takes, of `num_tiles * BLOCKS`.

    Tiles of a group take turns at each block, so that those of one expert read it while it is in the L2 cache. Groups of one
    go through all blocks of a tile.

    Args:
        pid: Number of the CTA, below `num_tiles * BLOCKS`.
        num_tiles: Tiles in use.
        BLOCKS: Blocks of weight rows.
        GROUP: Tiles of a group.

    Returns:
        Its tile and its block.

    Runtime: device code; integers alone.
    """
    group = pid // (GROUP * BLOCKS)
    first = group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = pid % (GROUP * BLOCKS)
    return first + within % size, within // size
