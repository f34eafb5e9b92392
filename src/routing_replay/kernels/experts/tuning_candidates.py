"""Which configurations the tuner tries: pure functions of the layer and the device."""

import random
from collections.abc import Iterator, Sequence

from routing_replay.kernels.experts.choosing import (
    TILES_OF_TOKENS,
    choose_config,
    rule_config,
    rule_tile_tokens,
)
from routing_replay.kernels.experts.config import ENGINES, ExpertsConfig, ExpertsShape, GemmTile
from routing_replay.kernels.experts.limits import (
    MOST_ACCUMULATORS,
    accumulators,
    config_problem,
    engine_problem,
    reserved_bytes,
    shared_memory_limit,
)
from routing_replay.kernels.experts.tables import ConfigTables

__all__ = ["candidates", "in_order", "with_other_tile"]

_LEAST_ACCUMULATORS = 4
_MOST_VECTOR_TOKENS = 8
_MOST_HOPPER_STAGES = 10


def _hopper_tiles(tile_tokens: int, capability: tuple[int, int]) -> Iterator[GemmTile]:
    """As many stages as fit, with one CTA to an SM and with two: loads in flight are what hides the memory."""
    for rows, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        limit = shared_memory_limit(capability)
        for depth in (64, 128):
            stage_bytes = (tile_tokens + rows) * depth * 2
            for room in (limit // 2, limit):
                free = room - reserved_bytes(warps)
                stages = min(_MOST_HOPPER_STAGES, free // stage_bytes)
                if stages >= 2:
                    yield GemmTile(rows=rows, depth=depth, stages=stages, warps=warps)


def _vector_tiles(gemm: str) -> Iterator[GemmTile]:
    if gemm == "gemm1":
        for rows, warps in ((4, 2), (8, 4), (16, 8)):
            for depth in (512, 1024, 2048):
                yield GemmTile(rows=rows, depth=depth, stages=1, warps=warps)
        return
    for rows, warps in ((2, 2), (4, 4), (8, 8)):
        for depth in (256, 512, 1024):
            for stages in (4, 8, 12, 16, 24):
                yield GemmTile(rows=rows, depth=depth, stages=stages, warps=warps)


def _portable_tiles(tile_tokens: int) -> Iterator[GemmTile]:
    if tile_tokens <= 32:
        for rows in (32, 64, 128):
            for depth, stages in ((64, 4), (64, 6), (128, 3), (128, 5), (256, 3)):
                yield GemmTile(rows=rows, depth=depth, stages=stages, warps=4)
        return
    for rows in (64, 128, 256):
        for depth, stages in ((32, 4), (64, 3), (64, 4), (128, 3)):
            for warps in (4, 8):
                yield GemmTile(rows=rows, depth=depth, stages=stages, warps=warps)


def _tiles(engine: str, tile_tokens: int, gemm: str, capability: tuple[int, int]) -> list[GemmTile]:
    if engine == "vector":
        return list(_vector_tiles(gemm))
    if engine == "hopper":
        tiles = _hopper_tiles(tile_tokens, capability)
    else:
        tiles = _portable_tiles(tile_tokens)
    bounds = (_LEAST_ACCUMULATORS, MOST_ACCUMULATORS)
    return [t for t in tiles if bounds[0] <= accumulators(tile_tokens, t) <= bounds[1]]


def _runnable(
    configs: Sequence[ExpertsConfig], shape: ExpertsShape, capability: tuple[int, int]
) -> tuple[ExpertsConfig, ...]:
    """Keep what can run, each once, in order."""
    kept = {c: None for c in configs if config_problem(c, shape, capability) is None}
    return tuple(kept)


def candidates(shape: ExpertsShape, capability: tuple[int, int]) -> tuple[ExpertsConfig, ...]:
    """Return configurations worth trying, both GEMMs cut alike.

    Rows of tokens are those of the rule and its two neighbours; `portable` is tried only where `hopper` cannot run.
    `with_other_tile` varies one GEMM afterwards.

    Args:
        shape: The layer and its tokens.
        capability: Compute capability of the device.

    Returns:
        Configurations that can run, each once; what the rule has comes first.
    """
    natural = TILES_OF_TOKENS.index(rule_tile_tokens(shape))
    near = TILES_OF_TOKENS[max(0, natural - 1) : natural + 2]
    usable = [e for e in ENGINES if engine_problem(e, shape, capability) is None]
    found = [choose_config(shape, capability=capability, tables=ConfigTables())]
    if "vector" in usable and shape.num_tokens <= _MOST_VECTOR_TOKENS:
        found.append(rule_config("vector", 1, shape, capability))
    engines = ["hopper"] if "hopper" in usable else ["portable"]
    found += [rule_config(e, TILES_OF_TOKENS[natural], shape, capability) for e in engines]
    for engine in engines:
        for tokens in near:
            for tile in _tiles(engine, tokens, "gemm1", capability):
                found.append(
                    ExpertsConfig(engine=engine, tile_tokens=tokens, gemm1=tile, gemm2=tile)
                )
    return _runnable(found, shape, capability)


def with_other_tile(
    config: ExpertsConfig, gemm: str, shape: ExpertsShape, capability: tuple[int, int]
) -> tuple[ExpertsConfig, ...]:
    """Return a configuration and the same with every other tile of one GEMM.

    Args:
        config: Where to start.
        gemm: `gemm1` or `gemm2`.
        shape: The layer and its tokens.
        capability: Compute capability of the device.

    Returns:
        Configurations that can run, each once; the given one comes first.
    """
    found = [config]
    for tile in _tiles(config.engine, config.tile_tokens, gemm, capability):
        gemm1, gemm2 = (tile, config.gemm2) if gemm == "gemm1" else (config.gemm1, tile)
        found.append(
            ExpertsConfig(
                engine=config.engine, tile_tokens=config.tile_tokens, gemm1=gemm1, gemm2=gemm2
            )
        )
    return _runnable(found, shape, capability)


def in_order(configs: Sequence[ExpertsConfig], seed: int) -> tuple[ExpertsConfig, ...]:
    """Shuffle all but the first, so that a budget that runs out cuts off no whole family.

    Args:
        configs: The configurations.
        seed: Of the order.

    Returns:
        The same configurations, the first one first.
    """
    rest = list(configs[1:])
    random.Random(seed).shuffle(rest)
    return (*configs[:1], *rest)
