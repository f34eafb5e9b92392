"""What the routers of one forward pass chose, as traces."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routing_replay.errors import ConfigError, ReplayError
from routing_replay.replay._plan import TokenIds, checked_tokens
from routing_replay.replay.layout import Layout
from routing_replay.trace import ModelRouting, RoutingTrace, token_digests


class Recorder:
    """Collects the effective ids of one forward pass, layer by layer, where they were computed.

    Args:
        routing: The model's layers, experts and top-k.
        layout: Where the tokens are.
        token_ids: Token ids of every sequence, without padding.
        weights_version: Version of the model's weights.
        last_row: Whether the traces have the row of each sequence's last token.

    Raises:
        ConfigError: Counts or lengths disagree, or `weights_version` is not accepted.
        TraceFormatError: A token id is not an integer in [0, 2**32).
    """

    def __init__(
        self,
        routing: ModelRouting,
        layout: Layout,
        token_ids: Sequence[TokenIds],
        *,
        weights_version: int,
        last_row: bool,
    ) -> None:
        if type(weights_version) is not int or weights_version < 0:
            raise ConfigError(
                f"weights_version = {weights_version!r} is not accepted; it must be an int of at"
                f" least 0, the version of the weights that the model has now"
            )
        self.layout = layout
        self._routing = routing
        # Copies, because the caller may refill its buffers before the traces are read.
        self._tokens = [np.array(tokens) for tokens in checked_tokens(token_ids, layout)]
        for tokens in self._tokens:
            token_digests(tokens)  # refuses bad tokens now and not after the forward pass
        self._weights_version = weights_version
        self._last_row = last_row
        self._ids: dict[int, Tensor] = {}
        self._is_ranked: dict[int, Tensor] = {}
        self._is_complete = False
        self._traces: tuple[RoutingTrace, ...] | None = None

    def note(self, layer_idx: int, topk_ids: Tensor, selection: Tensor) -> None:
        """Keep what a router took in the forward pass.

        Args:
            layer_idx: Decoder layer.
            topk_ids: Expert ids, integers `[tokens, K]`, which nobody changes later.
            selection: What the router ranks experts by, `[tokens, E]`.

        Raises:
            ReplayError: The router was called before.

        Runtime: no host sync; keeps the ids and `tokens` bytes; CUDA-graph safe but for the first
            allocation; deterministic; no gradients.
        """
        if layer_idx in self._ids:
            raise ReplayError(
                f"the router of decoder layer {layer_idx} was called a second time inside the record"
                f" block; run exactly one forward pass in it, and open a block per forward pass"
            )
        self._ids[layer_idx] = topk_ids
        self._is_ranked[layer_idx] = in_rank_order(topk_ids, selection)

    def finish(self) -> None:
        """Declare the forward pass complete.

        Raises:
            ReplayError: A router was not called.
        """
        silent = [idx for idx in self._routing.layer_ids if idx not in self._ids]
        if silent:
            raise ReplayError(
                f"the routers of decoder layers {silent} were not called inside the record block, of"
                f" {list(self._routing.layer_ids)}; run one forward pass of the attached model in it"
            )
        self._is_complete = True

    def traces(self) -> tuple[RoutingTrace, ...]:
        """Return one trace per sequence, made at the first call.

        Raises:
            ReplayError: The block is open, or an exception ended it.

        Runtime: the first call copies the ids to the host, which syncs.
        """
        if not self._is_complete:
            raise ReplayError(
                "nothing is recorded: the record block is still open, or an exception ended it; read"
                " the traces after the block"
            )
        if self._traces is None:
            layers = self._routing.layer_ids
            ids = torch.stack([self._ids[idx].cpu() for idx in layers], dim=1).numpy()
            is_ranked = torch.stack([self._is_ranked[idx].cpu() for idx in layers]).all(0).numpy()
            self._traces = tuple(
                self._trace(ids, is_ranked, idx) for idx in range(len(self._tokens))
            )
            self._ids.clear()
            self._is_ranked.clear()
        return self._traces

    def _trace(
        self, ids: npt.NDArray[np.integer], is_ranked: npt.NDArray[np.bool_], idx: int
    ) -> RoutingTrace:
        """Build the trace of one sequence out of the rows of the batch."""
        offset, length = self.layout.offsets()[idx], self.layout.lengths[idx]
        rows = slice(offset, offset + length - (0 if self._last_row else 1))
        trace = RoutingTrace.from_rows(
            ids[rows],
            token_ids=self._tokens[idx],
            layer_ids=self._routing.layer_ids,
            num_layers=self._routing.num_layers,
            num_experts=self._routing.num_experts,
            ordered=bool(is_ranked[rows].all()),
            weights_version=self._weights_version,
        )
        trace.validate()
        return trace


class RecordedRouting:
    """What a `record` block saw. Made by `ReplayHandle.record`.

    Args:
        recorder: Fills up inside the block.
    """

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def traces(self) -> tuple[RoutingTrace, ...]:
        """One trace per sequence of the layout, readable after the block.

        Raises:
            ReplayError: The block is open, or an exception ended it.
            TraceFormatError: A router took an expert twice for one token.

        Runtime: the first read copies 2 * tokens * L * K bytes to the host, which syncs.
        """
        return self._recorder.traces()


def in_rank_order(topk_ids: Tensor, selection: Tensor) -> Tensor:
    """Tell which rows have their experts by decreasing key, equal keys by increasing id.

    Args:
        topk_ids: Expert ids, integers `[tokens, K]`.
        selection: The keys, `[tokens, E]`.

    Returns:
        bool `[tokens]`, on the same device; False where a key is NaN.

    Runtime: no host sync; allocates about 16 * tokens * K bytes; CUDA-graph safe; deterministic; no
        gradients.
    """
    ids = topk_ids.long()
    keys = selection.detach().gather(-1, ids)
    falls = keys[:, :-1] > keys[:, 1:]
    ties = (keys[:, :-1] == keys[:, 1:]) & (ids[:, :-1] < ids[:, 1:])
    return (falls | ties).all(dim=-1)
