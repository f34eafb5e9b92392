"""What is done on the host, in order: every change of the host cache."""

import time
from collections.abc import Sequence

from routing_replay.capture.bad_rows import errors_of
from routing_replay.capture.device_cache import RoutingSpec
from routing_replay.capture.host_cache import HostCache
from routing_replay.capture.pending import StepTicket
from routing_replay.capture.row_span import BlockRef
from routing_replay.capture.staging import HostRows, Staging
from routing_replay.errors import CaptureError

__all__ = ["HostSide"]


class HostSide:
    """The work that an executor runs. A request that has failed gets no more rows until it is freed.

    Args:
        spec: Layers, experts and K of the model.
        host_cache: Where rows of requests and blocks are kept.
        staging: Where the rows of steps arrive.
        allow_missing: Whether a request may begin with rows of its prefix missing.
    """

    def __init__(
        self, spec: RoutingSpec, host_cache: HostCache, staging: Staging, *, allow_missing: bool
    ) -> None:
        self.failed: dict[str, CaptureError] = {}
        self.seconds = 0.0
        self._spec = spec
        self._host_cache = host_cache
        self._staging = staging
        self._allow_missing = allow_missing

    def begin(
        self, request_id: str, prefix: Sequence[BlockRef], num_rows: int, num_expected: int
    ) -> None:
        """Start a request; rows of its prefix that are not here fail it.

        Args:
            request_id: The request.
            prefix: The KV blocks that it attends to without having computed them.
            num_rows: Their tokens.
            num_expected: Rows that it will have at least.
        """
        try:
            self._host_cache.begin(
                request_id,
                prefix,
                num_rows=num_rows,
                num_expected=num_expected,
                allow_missing=self._allow_missing,
            )
        except CaptureError as error:
            self.failed[request_id] = error

    def collect(self, ticket: StepTicket, slot: int) -> HostRows:
        """Wait for a step's rows and give them to their requests.

        Args:
            ticket: The step; its errors are set, and its pieces are those without an error.
            slot: Where its rows arrive.

        Returns:
            The rows, as they lie in the slot.
        """
        arrived = self._staging.wait(slot, ticket.num_rows)
        started = time.thread_time()
        pieces = ticket.pieces
        errors = errors_of(self._spec, ticket, arrived)
        if errors or self.failed:
            for piece in pieces:
                known = self.failed.get(piece.request_id)
                if known is not None:
                    errors[piece.request_id] = known
            self.failed |= errors
            pieces = [piece for piece in pieces if piece.request_id not in errors]
            ticket.errors, ticket.pieces = errors, pieces
        self._host_cache.append_step(pieces, arrived.rows, weights_version=ticket.weights_version)
        self.seconds += time.thread_time() - started
        return arrived

    def place(self, ticket: StepTicket, slot: int) -> None:
        """Give a step's rows, which have arrived, to the KV blocks of their tokens.

        Args:
            ticket: The step, collected.
            slot: Where its rows are.
        """
        self._place(ticket, self._staging.wait(slot, ticket.num_rows))

    def collect_and_place(self, ticket: StepTicket, slot: int) -> None:
        """Do both at once, for a step of few rows.

        Args:
            ticket: The step; as for `collect`.
            slot: Where its rows arrive.
        """
        self._place(ticket, self.collect(ticket, slot))

    def _place(self, ticket: StepTicket, arrived: HostRows) -> None:
        started = time.thread_time()
        self._host_cache.write_blocks(
            ticket.pieces, arrived.rows, weights_version=ticket.weights_version
        )
        self.seconds += time.thread_time() - started

    def copy_block(self, source: BlockRef, target: BlockRef) -> None:
        """Copy the rows of a block.

        Args:
            source: The block that the keys and values come from.
            target: Its copy.
        """
        self._host_cache.copy_block(source, target)

    def truncate(self, request_id: str, num_rows: int) -> None:
        """Forget a request's rows from `num_rows` on.

        Args:
            request_id: The request.
            num_rows: Rows that stay.
        """
        self._host_cache.truncate(request_id, num_rows)

    def free(self, request_id: str) -> None:
        """Forget a request and its failure.

        Args:
            request_id: The request.
        """
        self._host_cache.free(request_id)
        self.failed.pop(request_id, None)

    def forget_blocks(self) -> None:
        """Forget the rows of all blocks."""
        self._host_cache.forget_blocks()

    def is_known(self, request_id: str) -> bool:
        """Return whether a request holds rows, or has failed and was not freed."""
        return request_id in self._host_cache or request_id in self.failed
