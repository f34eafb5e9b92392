"""What an entrant of the comparison is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from moe_bench.data import LayerInput, LayerWeights
from moe_bench.shapes import LayerShape

__all__ = ["Configuration", "LayerCall", "Peer", "PeerError"]


class PeerError(RuntimeError):
    """A peer cannot be loaded, or does not do what a case needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """How a peer is set up for a case; goes into its row.

    Attributes:
        label: Where the values come from.
        values: The values, as JSON; empty where the peer chooses by itself.
    """

    label: str
    values: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One layer, ready to run from router logits to output.

    Attributes:
        run: Launches the layer and returns `[T, H]`; fit for a CUDA graph.
        recorded: int16 `[T, K]` that `run` writes the ids to, or None.
    """

    run: Callable[[], Tensor]
    recorded: Tensor | None = None


class Peer(Protocol):
    """An implementation of the layer."""

    @property
    def name(self) -> str:
        """Name in the tables."""
        ...

    def refusal(self, shape: LayerShape, num_tokens: int) -> str | None:
        """Why the peer does not run a case, or None."""
        ...

    def configurations(self, shape: LayerShape, num_tokens: int) -> list[Configuration]:
        """What to try; where there are several, the fastest of a short round runs."""
        ...

    def layer(
        self,
        shape: LayerShape,
        given: LayerInput,
        weights: LayerWeights,
        configuration: Configuration,
    ) -> LayerCall:
        """Bind a layer; what depends on weights alone (another layout) is done here, outside the times."""
        ...
