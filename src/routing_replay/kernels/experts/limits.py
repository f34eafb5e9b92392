"""What a configuration must keep to run: the limits of the engines and of the devices' shared memory."""

from routing_replay.kernels.experts.config import ENGINES, ExpertsConfig, ExpertsShape, GemmTile

__all__ = [
    "MOST_ACCUMULATORS",
    "accumulators",
    "config_problem",
    "engine_problem",
    "reserved_bytes",
    "shared_memory_bytes",
    "shared_memory_limit",
    "stages_in_memory",
]

_HOPPER_TOKENS = (16, 32, 64, 128, 256)
_HOPPER_TILE = {
    "rows": (64, 128, 256),
    "depth": (64, 128),
    "stages": range(2, 17),
    "warps": (4, 8),
}
# Rows of a tensor map start at multiples of 16 bytes.
_HOPPER_MULTIPLE = 8
_HOPPER_LEAST = 128
# wgmma takes 64 weight rows for each group of four warps.
_WGMMA_ROWS_OF_A_WARP = 16
# A thread has 255 registers; with more sums than these it would spill.
MOST_ACCUMULATORS = 128
_MOST_STAGES = 12
_VECTOR_TILE = {"rows": (1, 64), "depth": (16, 4096), "warps": (1, 8)}
_MOST_VECTOR_STAGES = 64

# Shared memory that one CTA may opt in to: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_SMALL_SHARED_MEMORY = 99 * 1024
_SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): _SMALL_SHARED_MEMORY,
    (8, 7): 163 * 1024,
    (8, 9): _SMALL_SHARED_MEMORY,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): _SMALL_SHARED_MEMORY,
    (12, 1): _SMALL_SHARED_MEMORY,
}


def shared_memory_limit(capability: tuple[int, int]) -> int:
    """Return the shared memory that one CTA may use.

    Args:
        capability: Compute capability of the device; one that is not known counts as the smallest of all.

    Returns:
        Bytes.
    """
    return _SHARED_MEMORY.get(capability, _SMALL_SHARED_MEMORY)


def stages_in_memory(stages: int, capability: tuple[int, int]) -> int:
    """Return how many steps lie in shared memory at once.

    On sm_8x the operands of the current step have gone to registers, so that its place is free; wgmma and tcgen05 read
    them in place.

    Args:
        stages: Of a tile.
        capability: Compute capability of the device.

    Returns:
        Steps.
    """
    return max(1, stages - 1) if capability[0] == 8 else stages


def reserved_bytes(warps: int) -> int:
    """Return what a CTA needs beside the steps in flight: barriers, and what the end of a GEMM exchanges between warps.

    Args:
        warps: Of the CTA.

    Returns:
        Bytes: an upper bound of what the compiler takes on `hopper`, 2104 for 4 warps and 4160 for 8.
    """
    return 256 + 512 * warps


def shared_memory_bytes(
    tile_tokens: int, tile: GemmTile, element_bytes: int, capability: tuple[int, int]
) -> int:
    """Return an upper bound of the shared memory of a CTA: every step in flight holds both operands.

    Args:
        tile_tokens: Rows of tokens.
        tile: The rest of the tile.
        element_bytes: Bytes of an element of the operands.
        capability: Compute capability of the device.

    Returns:
        Bytes.
    """
    stage = (tile_tokens + tile.rows) * tile.depth * element_bytes
    return stage * stages_in_memory(tile.stages, capability) + reserved_bytes(tile.warps)


def _is_power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def engine_problem(engine: str, shape: ExpertsShape, capability: tuple[int, int]) -> str | None:
    """Say why an engine cannot run a layer.

    Args:
        engine: Its name.
        shape: The layer.
        capability: Compute capability of the device.

    Returns:
        What is wrong, what is accepted and what to do; None where it can.
    """
    if engine not in ENGINES:
        return f"engine={engine!r}; accepted are {', '.join(ENGINES)}; leave it out for the fastest"
    if engine == "portable":
        return None
    instead = "use engine='portable' or leave it out"
    if engine == "vector":
        if not shape.is_summed:
            return f"engine='vector' without the sum over experts; accepted is with it: {instead}"
        return None
    if capability != (9, 0):
        return f"engine='hopper' at capability={capability}; accepted is (9, 0): {instead}"
    sizes = (shape.hidden_size, shape.intermediate_size)
    if any(size % _HOPPER_MULTIPLE or size < _HOPPER_LEAST for size in sizes):
        return (
            f"engine='hopper' with hidden_size={sizes[0]}, intermediate_size={sizes[1]}; accepted are multiples of "
            f"{_HOPPER_MULTIPLE} from {_HOPPER_LEAST} on: {instead}"
        )
    if shape.element_bytes != 2:
        return f"engine='hopper' with elements of {shape.element_bytes} bytes; accepted is bfloat16: {instead}"
    return None


def accumulators(tile_tokens: int, tile: GemmTile) -> float:
    """Return how many float32 sums a thread holds.

    Args:
        tile_tokens: Rows of tokens.
        tile: The rest of the tile.

    Returns:
        Registers.
    """
    return tile_tokens * tile.rows / (tile.warps * 32)


def _hopper_problem(name: str, tile_tokens: int, tile: GemmTile) -> str | None:
    for field, values in _HOPPER_TILE.items():
        value: int = getattr(tile, field)
        if value not in values:
            names = ", ".join(map(str, values))
            return f"{name}.{field}={value} with engine='hopper'; accepted are {names}"
    if tile.rows < _WGMMA_ROWS_OF_A_WARP * tile.warps:
        return (
            f"{name}.rows={tile.rows} with {tile.warps} warps and engine='hopper'; accepted are {_WGMMA_ROWS_OF_A_WARP} or more "
            "rows for each warp"
        )
    if accumulators(tile_tokens, tile) > MOST_ACCUMULATORS:
        return (
            f"{name}.rows={tile.rows} with tile_tokens={tile_tokens}, {tile.warps} warps and engine='hopper' needs "
            f"{accumulators(tile_tokens, tile):.0f} sums for each thread; accepted are {MOST_ACCUMULATORS}: take fewer rows or "
            "more warps"
        )
    return None


def _vector_problem(name: str, tile: GemmTile, *, is_gated: bool) -> str | None:
    for field, (least, most) in _VECTOR_TILE.items():
        value: int = getattr(tile, field)
        least_here = 2 * least if is_gated and field == "rows" else least
        if not least_here <= value <= most or not _is_power_of_two(value):
            return f"{name}.{field}={value} with engine='vector'; accepted are powers of two in [{least_here}, {most}]"
    if tile.stages > _MOST_VECTOR_STAGES:
        return f"{name}.stages={tile.stages} with engine='vector'; accepted is [1, {_MOST_VECTOR_STAGES}]"
    return None


def _portable_problem(name: str, tile: GemmTile, *, is_gated: bool) -> str | None:
    # Both factors of a product are 16 or more on each side; a gated CTA has two products of half its rows.
    ranges = {"rows": (32 if is_gated else 16, 256), "depth": (16, 256), "warps": (1, 16)}
    for field, (least, most) in ranges.items():
        value: int = getattr(tile, field)
        if not least <= value <= most or not _is_power_of_two(value):
            return f"{name}.{field}={value}; accepted are powers of two in [{least}, {most}]"
    if tile.stages > _MOST_STAGES:
        return f"{name}.stages={tile.stages}; accepted is [1, {_MOST_STAGES}]"
    return None


def config_problem(
    config: ExpertsConfig, shape: ExpertsShape, capability: tuple[int, int]
) -> str | None:
    """Say why a configuration cannot run.

    Args:
        config: What is to run.
        shape: The layer.
        capability: Compute capability of the device.

    Returns:
        What is wrong, what is accepted and what to do; None where it can.
    """
    problem = engine_problem(config.engine, shape, capability)
    if problem is not None:
        return problem
    tokens, engine = config.tile_tokens, config.engine
    if engine == "vector" and tokens != 1:
        return f"tile_tokens={tokens} with engine='vector'; accepted is 1"
    if engine == "hopper" and tokens not in _HOPPER_TOKENS:
        return f"tile_tokens={tokens} with engine='hopper'; accepted are 16, 32, 64, 128, 256"
    if engine == "portable" and (not 16 <= tokens <= 256 or not _is_power_of_two(tokens)):
        return f"tile_tokens={tokens}; accepted are powers of two in [16, 256]"
    for name, tile, is_gated in (
        ("gemm1", config.gemm1, shape.is_gated),
        ("gemm2", config.gemm2, False),
    ):
        if engine == "vector":
            problem = _vector_problem(name, tile, is_gated=is_gated)
        elif engine == "hopper":
            problem = _hopper_problem(name, tokens, tile)
        else:
            problem = _portable_problem(name, tile, is_gated=is_gated)
        if problem is None and engine != "vector":
            problem = _memory_problem(name, tokens, tile, shape, capability)
        if problem is not None:
            return problem
    return None


def _memory_problem(
    name: str, tile_tokens: int, tile: GemmTile, shape: ExpertsShape, capability: tuple[int, int]
) -> str | None:
    needed = shared_memory_bytes(tile_tokens, tile, shape.element_bytes, capability)
    limit = shared_memory_limit(capability)
    if needed <= limit:
        return None
    return (
        f"{name}={tile} with tile_tokens={tile_tokens} needs up to {needed} bytes of shared memory; accepted are {limit} at "
        f"capability={capability}: take fewer stages, less depth or fewer rows"
    )
