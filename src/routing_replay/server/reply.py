"""Responses that take their time: whole or as server-sent events, aborted when the client leaves."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from routing_replay.engine.serving import AsyncLLM
from routing_replay.server.errors import as_api_error, error_response
from routing_replay.server.routing import JsonText, event_pieces
from routing_replay.server.serving import Serving

__all__ = ["EventReply", "JsonReply"]

_DONE = b"data: [DONE]\n\n"


class _Reply(Response, ABC):
    """Runs beside a watch on the connection: where the client leaves, the work is cancelled."""

    def __init__(
        self, serving: Serving, num_completions: int, headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(headers=dict(headers or {}))
        del self.headers["content-length"]  # known only at the end
        self._serving = serving
        self._num_completions = num_completions
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.create_task(self._answer(scope, receive, send))
        watch = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self._serving.metrics.disconnects.inc()
        finally:
            for task in (watch, answer):
                task.cancel()
            await asyncio.gather(watch, answer, return_exceptions=True)
        if not answer.cancelled():
            answer.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._serving.open(self._num_completions) as llm:
                await self._run(llm, send)
        except Exception as error:  # each becomes an answer in OpenAI's form
            if self._is_started:
                await self._end_with(error, send)
            else:
                await error_response(error)(scope, receive, send)

    @abstractmethod
    async def _run(self, llm: AsyncLLM, send: Send) -> None:
        """Send the whole answer."""

    @abstractmethod
    async def _end_with(self, error: Exception, send: Send) -> None:
        """End an answer that has begun, because of an error."""

    async def _start(self, send: Send, content_type: str, headers: Mapping[str, str]) -> None:
        self.headers["content-type"] = content_type
        self.headers.update(headers)
        self._is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    @staticmethod
    async def _send(send: Send, pieces: AsyncIterable[bytes]) -> None:
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})


class JsonReply(_Reply):
    """One JSON body, made while the client waits.

    Args:
        serving: The server.
        num_completions: Completions that the request asks for.
        work: Returns the body.
        headers: Further headers.
    """

    def __init__(
        self,
        serving: Serving,
        num_completions: int,
        work: Callable[
            [AsyncLLM], Awaitable[Mapping[str, object] | Sequence[Mapping[str, object]]]
        ],
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(serving, num_completions, headers)
        self._work = work

    async def _run(self, llm: AsyncLLM, send: Send) -> None:
        body = await self._work(llm)
        text = JsonText(body)
        headers = {"content-length": str(text.num_bytes), **_version_header(body)}
        await self._start(send, "application/json", headers)
        await self._send(send, text.chunks())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_with(self, error: Exception, send: Send) -> None:
        # The body is cut short, which every client sees; nothing that could be sent would be JSON.
        raise error


class EventReply(_Reply):
    """Server-sent events, the first of which is waited for, so that what is wrong from the start has its own status.

    Args:
        serving: The server.
        num_completions: Completions that the request asks for.
        work: Yields the bodies of events.
        headers: Further headers.
    """

    def __init__(
        self,
        serving: Serving,
        num_completions: int,
        work: Callable[[AsyncLLM], AsyncGenerator[Mapping[str, object]]],
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(serving, num_completions, headers)
        self._work = work

    async def _run(self, llm: AsyncLLM, send: Send) -> None:
        async with aclosing(self._work(llm)) as events:
            async for event in events:
                if not self._is_started:
                    kind = "text/event-stream; charset=utf-8"
                    further = {"cache-control": "no-cache", **_version_header(event)}
                    await self._start(send, kind, further)
                await self._send(send, event_pieces(event))
        await self._end(send)

    async def _end_with(self, error: Exception, send: Send) -> None:
        await self._send(send, event_pieces(as_api_error(error).body))
        await self._end(send)

    @staticmethod
    async def _end(send: Send) -> None:
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})


def _version_header(
    body: Mapping[str, object] | Sequence[Mapping[str, object]],
) -> dict[str, str]:
    version = body.get("weights_version") if isinstance(body, Mapping) else None
    return {} if version is None else {"x-weights-version": str(version)}


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
