"""Which kernels and tiles run the experts of a layer, as data."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts.strict_json import fields_of, int_of, parse_json

__all__ = ["ENGINES", "ExpertsChoice", "ExpertsConfig", "ExpertsShape", "GemmTile"]

ENGINES = ("portable", "hopper", "vector")
_TILE_FIELDS = ("rows", "depth", "stages", "warps")
_CHOICE_FIELDS = ("engine", "tile_tokens", "gemm1", "gemm2")


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
        num_experts: Experts on all ranks, shared ones included; None where all are on this rank.
        element_bytes: Bytes of an element of weights or activations, whichever are wider.
        is_summed: Whether the experts of a token are summed, instead of given one by one.
    """

    num_tokens: int
    top_k: int
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    is_gated: bool = True
    num_experts: int | None = None
    element_bytes: int = 2
    is_summed: bool = True

    @property
    def num_routed_over(self) -> int:
        """Experts that the tokens are spread over: those of all ranks."""
        return self.num_local_experts if self.num_experts is None else self.num_experts

    @property
    def gemm1_rows(self) -> int:
        """Output rows of GEMM 1: `2I` where it is gated, otherwise `I`."""
        return self.intermediate_size * (2 if self.is_gated else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmTile:
    """How one grouped GEMM is cut, beside the rows of tokens that both share.

    Attributes:
        rows: Weight rows of a CTA (of gate and up together where GEMM 1 is gated).
        depth: Elements of the inner dimension in one step.
        stages: Steps whose loads are in flight; of GEMM 2 on `vector`, those that start before GEMM 1 has ended.
        warps: Warps of a CTA.
    """

    rows: int
    depth: int
    stages: int
    warps: int

    def __post_init__(self) -> None:
        for name in _TILE_FIELDS:
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} of a GEMM tile; accepted is 1 or more"
                )

    @classmethod
    def from_parsed(cls, value: object, where: str) -> "GemmTile":
        """Read a tile out of parsed JSON.

        Args:
            value: An object with the four fields.
            where: Its place, for the message of an error.

        Returns:
            The tile.

        Raises:
            ConfigError: A name or a value is not accepted.
        """
        fields = fields_of(value, where, required=_TILE_FIELDS)
        return cls(**{name: int_of(fields[name], f"{where}.{name}") for name in _TILE_FIELDS})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A complete choice for one call; nothing of it changes which bits of routing are recorded.

    Attributes:
        engine: `portable` (Triton, sm_80 on), `hopper` (Gluon, sm_90), or `vector` (Triton without tensor cores, sm_80 on, for a
            few tokens).
        tile_tokens: Rows of tokens of a tile; both GEMMs and the plan share it. 1 on `vector`, which has no plan.
        gemm1: Tile of GEMM 1.
        gemm2: Tile of GEMM 2.
    """

    engine: str
    tile_tokens: int
    gemm1: GemmTile
    gemm2: GemmTile

    def as_choice(self) -> "ExpertsChoice":
        """Name every part, so that an op runs exactly this.

        Returns:
            The choice.
        """
        return ExpertsChoice(
            engine=self.engine, tile_tokens=self.tile_tokens, gemm1=self.gemm1, gemm2=self.gemm2
        )


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

    def to_json(self) -> str:
        """Write the parts that are named, always in the same way, so that equal choices have equal texts.

        Returns:
            A JSON object without spaces, names sorted; `{}` where nothing is named.
        """
        named = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(named, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ExpertsChoice":
        """Read what `to_json` writes; the same text is parsed once.

        Args:
            text: A JSON object that names some of the four parts; a part is left out rather than null.

        Returns:
            The choice.

        Raises:
            ConfigError: It is not JSON, a name is unknown or repeated, or a value is of the wrong type.
        """
        return _parsed_choice(text)

    @classmethod
    def from_parsed(
        cls, value: object, where: str, *, is_complete: bool = False
    ) -> "ExpertsChoice":
        """Read a choice out of parsed JSON.

        Args:
            value: An object that names some of the four parts.
            where: Its place, for the message of an error.
            is_complete: Whether all four must be there.

        Returns:
            The choice.

        Raises:
            ConfigError: A name or a value is not accepted.
        """
        required, optional = (_CHOICE_FIELDS, ()) if is_complete else ((), _CHOICE_FIELDS)
        fields = fields_of(value, where, required=required, optional=optional)
        engine = None
        if "engine" in fields:
            engine = fields["engine"]
            if not isinstance(engine, str) or engine not in ENGINES:
                raise ConfigError(
                    f"{where}.engine is {engine!r}; accepted are {', '.join(ENGINES)}"
                )
        tiles = {
            name: GemmTile.from_parsed(fields[name], f"{where}.{name}")
            for name in ("gemm1", "gemm2")
            if name in fields
        }
        tile_tokens = None
        if "tile_tokens" in fields:
            tile_tokens = int_of(fields["tile_tokens"], f"{where}.tile_tokens")
        return cls(engine=engine, tile_tokens=tile_tokens, **tiles)


@lru_cache(maxsize=1024)
def _parsed_choice(text: str) -> ExpertsChoice:
    return ExpertsChoice.from_parsed(
        parse_json(text, "the choice of a configuration"), "the choice"
    )
