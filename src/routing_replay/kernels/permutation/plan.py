"""The plan of the grouped GEMMs as data, and the sizes of its buffers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_replay.errors import ConfigError

__all__ = ["PermutationPlan", "PermutationShape"]

_MAX_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationShape:
    """What fixes the sizes of a plan; nothing of it is read from a device.

    Attributes:
        num_tokens: T.
        top_k: Columns of the ids, shared experts included.
        num_experts: Experts on all ranks, shared ones included; ids outside are not computed.
        local_expert_offset: First expert on this rank.
        num_local_experts: Experts on this rank.
        tile_tokens: Rows of a tile, of all CTAs of a cluster together.
        cluster_size: CTAs of a cluster along the rows; each has `tile_tokens / cluster_size` of them.

    Raises:
        ConfigError: A value is not accepted, or the buffers would need indices beyond int32.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    local_expert_offset: int
    num_local_experts: int
    tile_tokens: int
    cluster_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 0), ("top_k", 1), ("num_experts", 1), ("tile_tokens", 1), ("cluster_size", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}; accepted is {least} or more")
        end = self.local_expert_offset + self.num_local_experts
        if self.local_expert_offset < 0 or self.num_local_experts < 1 or end > self.num_experts:
            raise ConfigError(
                f"local_expert_offset={self.local_expert_offset} and num_local_experts={self.num_local_experts} name "
                f"experts [{self.local_expert_offset}, {end}); accepted is a part of [0, {self.num_experts})"
            )
        if self.tile_tokens % self.cluster_size:
            raise ConfigError(
                f"tile_tokens={self.tile_tokens} with cluster_size={self.cluster_size}; accepted are multiples of the "
                "cluster size: every CTA of a cluster has as many rows"
            )
        if self.max_padded_tokens > _MAX_INT32 or self.num_expanded > _MAX_INT32:
            raise ConfigError(
                f"num_tokens={self.num_tokens} with top_k={self.top_k} and tile_tokens={self.tile_tokens} needs up to "
                f"{self.max_padded_tokens} rows; accepted are {_MAX_INT32}: split the tokens"
            )

    @property
    def num_expanded(self) -> int:
        """(Token, rank) pairs: T * K."""
        return self.num_tokens * self.top_k

    @property
    def max_tiles(self) -> int:
        """Most tiles of any routing: each expert may end in a tile that is not full."""
        pairs = self.num_tokens * min(self.top_k, self.num_local_experts)
        started = min(self.num_local_experts, pairs)
        return started + (pairs - started) // self.tile_tokens

    @property
    def max_ctas(self) -> int:
        """Entries of the per-CTA arrays."""
        return self.max_tiles * self.cluster_size

    @property
    def max_padded_tokens(self) -> int:
        """Rows of the permuted buffers, padding included."""
        return self.max_tiles * self.tile_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PermutationPlan:
    """Where every (token, rank) pair goes, and which CTA computes which rows of which expert.

    Names are FlashInfer's. Rows of an expert follow each other in the order of tokens, each expert starting at a tile of
    its own; the rank inside an expert is the order of the expanded index `t * K + k`, in every backend.

    Attributes:
        shape: What the plan was made for.
        expanded_idx_to_permuted_idx: int32 `[T * K]`: the row of each pair; -1 where it is not computed here (another
            rank's expert, an id that is none, an expert that came before in the same row).
        permuted_idx_to_token_idx: int32 `[max_padded_tokens]`: the token of each row; -1 in padding; undefined
            past the end, as the next two are.
        cta_idx_xy_to_batch_idx: int32 `[max_ctas]`: *local* expert of each CTA.
        cta_idx_xy_to_mn_limit: int32 `[max_ctas]`: one past the last row in use of each CTA, counted from the first row of
            all. In a cluster it may lie at or below the CTA's own first row: `row < limit` decides.
        num_non_exiting_ctas: int32 `[1]`: CTAs that have an expert.
        total_num_padded_tokens: int32 `[1]`: rows in use, padding included.
    """

    shape: PermutationShape
    expanded_idx_to_permuted_idx: Tensor
    permuted_idx_to_token_idx: Tensor
    cta_idx_xy_to_batch_idx: Tensor
    cta_idx_xy_to_mn_limit: Tensor
    num_non_exiting_ctas: Tensor
    total_num_padded_tokens: Tensor

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six tensors, in the order of the attributes."""
        return (
            self.expanded_idx_to_permuted_idx,
            self.permuted_idx_to_token_idx,
            self.cta_idx_xy_to_batch_idx,
            self.cta_idx_xy_to_mn_limit,
            self.num_non_exiting_ctas,
            self.total_num_padded_tokens,
        )

    def require(self, *, tile_tokens: int, cluster_size: int = 1) -> None:
        """Refuse a GEMM that would read the plan with another tile or cluster.

        Args:
            tile_tokens: Rows of its tile.
            cluster_size: CTAs of its cluster.

        Raises:
            ConfigError: They are not those of the plan.

        Runtime: host only.
        """
        mine = (self.shape.tile_tokens, self.shape.cluster_size)
        if mine != (tile_tokens, cluster_size):
            raise ConfigError(
                f"a GEMM with tile_tokens={tile_tokens}, cluster_size={cluster_size} cannot read a plan with "
                f"tile_tokens={mine[0]}, cluster_size={mine[1]}; both GEMMs of a layer share one plan"
            )
