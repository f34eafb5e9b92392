"""Which kernels and tiles run the experts of a layer, as data."""

from dataclasses import dataclass

from routing_replay.errors import ConfigError

__all__ = ["ExpertsChoice", "ExpertsConfig", "ExpertsShape", "GemmTile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """What a configuration is chosen for.

    Attributes:
        num_tokens: T.
        top_k: Experts of a token, shared ones included.
        num_local_experts: Experts on this rank, shared ones included.
        hidden_size: H.
        intermediate_size: I, of one expert.
        is_gated: Whether GEMM 1 has `2I` output rows.
    """

    num_tokens: int
    top_k: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTile:
    """How one grouped GEMM is cut, beside the rows of tokens that both share.

    Attributes:
        rows: Weight rows of a CTA (of gate and up together where GEMM 1 is gated).
        depth: Elements of the inner dimension in one step.
        stages: Steps whose loads are in flight.
        warps: Warps of a CTA.
    """

    rows: int
    depth: int
    stages: int
    warps: int

    def __post_init__(self) -> None:
        for name in ("rows", "depth", "stages", "warps"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} of a GEMM tile; accepted is 1 or more"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A complete choice for one call; nothing of it changes which bits of routing are recorded.

    Attributes:
        engine: `portable` (Triton, sm_80 on) or `hopper` (Gluon, sm_90).
        tile_tokens: Rows of tokens of a tile; both GEMMs and the plan share it.
        gemm1: Tile of GEMM 1.
        gemm2: Tile of GEMM 2.
    """

    engine: str
    tile_tokens: int
    gemm1: GemmTile
    gemm2: GemmTile


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsChoice:
    """What a caller fixes; None leaves a part to the tables, and what is named is kept.

    Attributes:
        engine: As in `ExpertsConfig`.
        tile_tokens: As in `ExpertsConfig`.
        gemm1: As in `ExpertsConfig`.
        gemm2: As in `ExpertsConfig`.
    """

    engine: str | None = None
    tile_tokens: int | None = None
    gemm1: GemmTile | None = None
    gemm2: GemmTile | None = None
