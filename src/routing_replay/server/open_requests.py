"""The requests that are under way: how long each may take, how all are ended, and their names."""

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager

from routing_replay.engine.serving import AsyncLLM
from routing_replay.server.errors import ApiError

__all__ = ["OpenRequests"]


class OpenRequests:
    """Requests from their admission to the end of their responses.

    Args:
        timeout_s: Seconds that each may take; None for no limit.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._open: dict[asyncio.Timeout, ApiError | None] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    def __len__(self) -> int:
        """Return how many are under way."""
        return len(self._open)

    @asynccontextmanager
    async def hold(self) -> AsyncGenerator[None]:
        """Hold a request open, within the time that it may take.

        Yields:
            Nothing.

        Raises:
            ApiError: 504 where it took too long, or what `fail_all` was given.
        """
        timeout = asyncio.timeout(self._timeout_s)
        self._open[timeout] = None
        self._all_closed.clear()
        try:
            async with timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise self._open[timeout] or self._too_slow() from None
        finally:
            del self._open[timeout]
            if not self._open:
                self._all_closed.set()

    @contextmanager
    def naming(self, request_id: str, engine_ids: Sequence[str]) -> Generator[None]:
        """Keep the name of a request while it runs, so that it can be aborted by it.

        Args:
            request_id: The name.
            engine_ids: What the engine calls its prompts.

        Yields:
            Nothing.

        Raises:
            ApiError: 409, a request of that name runs.
        """
        if request_id in self._names:
            raise ApiError(
                409,
                f"a request with request_id={request_id!r} is running; choose a name that no other has",
                code="request_id_in_use",
                param="request_id",
            )
        self._names[request_id] = tuple(engine_ids)
        try:
            yield
        finally:
            del self._names[request_id]

    def engine_ids(self, request_id: str | None) -> tuple[str, ...]:
        """Return what the engine calls the prompts of a running request, of all of them for None."""
        if request_id is None:
            return tuple(name for names in self._names.values() for name in names)
        return self._names.get(request_id, ())

    async def abort(self, llm: AsyncLLM, request_id: str | None) -> int:
        """End a running request; what it has is returned to whoever asked for it.

        Args:
            llm: The engine.
            request_id: Its name; None ends all.

        Returns:
            How many prompts were ended, 0 where none of that name runs.
        """
        return sum([await llm.abort(name) for name in self.engine_ids(request_id)])

    async def wait_closed(self) -> None:
        """Wait until none is under way."""
        await self._all_closed.wait()

    def fail_all(self, error: ApiError) -> None:
        """End every request with an error.

        Args:
            error: What each is answered.
        """
        now = asyncio.get_running_loop().time()
        for timeout in self._open:
            self._open[timeout] = error
            timeout.reschedule(now)

    def _too_slow(self) -> ApiError:
        return ApiError(
            504,
            f"the request took longer than {self._timeout_s} s and was aborted; ask for fewer tokens, or raise "
            "--request-timeout-s",
            code="request_timeout",
        )
