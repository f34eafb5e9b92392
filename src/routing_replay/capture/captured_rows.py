"""The rows of a request that has ended, before anybody has asked for its trace."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.capture.request_rows import RequestRows
from routing_replay.trace import RoutingTrace

__all__ = ["CapturedRows"]


class CapturedRows:
    """All that a trace is made of; to make it costs about a microsecond a row, which no step has to wait for.

    Args:
        spec: Layers, experts and K of the model.
        token_ids: All tokens of the request; the last one was never an input and has no row.
        rows: Their rows, complete but for those of a prefix hit that were not here.
    """

    def __init__(self, spec: RoutingSpec, token_ids: Sequence[int], rows: RequestRows) -> None:
        self._spec = spec
        self._token_ids = token_ids
        self._rows = rows

    @cached_property
    def trace(self) -> RoutingTrace:
        """The trace, made and validated when it is first asked for."""
        spec, rows = self._spec, self._rows
        versions = rows.weights_version
        starts = np.flatnonzero(np.diff(versions, prepend=versions[:1] - 1))
        trace = RoutingTrace.from_rows(
            rows.ids,
            token_ids=self._token_ids,
            layer_ids=spec.layer_ids,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            valid=rows.valid,
            weights_version=[(int(start), int(versions[start])) for start in starts],
        )
        trace.validate()
        return trace
