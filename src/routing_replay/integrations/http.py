"""A client of an engine's HTTP server: bounded concurrency, retries where nothing can happen twice, clear errors."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from routing_replay.errors import ConfigError, IntegrationError

if TYPE_CHECKING:
    import httpx

__all__ = ["EngineHttpError", "HttpClient", "RefusedRequestError", "ServerConfig"]

T = TypeVar("T")

# Servers close idle connections after 5 s (uvicorn's default); a connection of that age may be gone when it is used.
_KEEPALIVE_S = 2.0
_REFUSED_FOR_NOW = (429, 503)
_SHOWN_CHARACTERS = 400


class EngineHttpError(IntegrationError):
    """A server cannot be reached, or does not answer as its engine should."""


class RefusedRequestError(EngineHttpError):
    """A server refused one request (HTTP 4xx); others may be accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where a server is, and how hard it may be asked.

    Attributes:
        url: Base address, such as `http://host:8000`.
        api_key: Sent as a bearer token.
        max_concurrency: Most requests under way at once.
        connect_timeout_s: Longest wait for a connection, in seconds.
        request_timeout_s: Longest wait for an answer, in seconds: answers come whole, so this bounds a completion.
        max_retries: Most repetitions of a request that was not accepted.
        retry_delay_s: Wait before the first repetition, in seconds; it doubles.
    """

    url: str
    api_key: str | None = None
    max_concurrency: int = 64
    connect_timeout_s: float = 10.0
    request_timeout_s: float = 3600.0
    max_retries: int = 4
    retry_delay_s: float = 0.5

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url={self.url!r}; accepted is an address like http://host:8000")
        if "@" in self.url:
            raise ConfigError(
                "url holds a name or password, which results would show; pass api_key"
            )
        if self.max_concurrency < 1:
            raise ConfigError(f"max_concurrency={self.max_concurrency}; accepted is 1 or more")
        if self.max_retries < 0:
            raise ConfigError(f"max_retries={self.max_retries}; accepted is 0 or more")
        for name in ("connect_timeout_s", "request_timeout_s", "retry_delay_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; accepted is above 0")


class HttpClient:
    """Talks to one server, from an event loop in a thread of its own: callers may have a loop already.

    A request is repeated only if it did not begin: no connection came about, or the server answered that it takes no
    more now (HTTP 429, 503). A request that was accepted and then lost is never sent again.

    Args:
        config: The server.
        engine: Name of the engine, for messages.
        start_command: How its server is started, for messages.
        transport: Takes the place of the network in tests.

    Raises:
        IntegrationError: The package httpx is missing.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        engine: str,
        start_command: str,
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError as err:
            raise IntegrationError(
                f"{engine} servers are reached with the package httpx, which is missing: pip install httpx"
            ) from err
        self._httpx = httpx
        self._config = config
        self._engine = engine
        self._start_command = start_command
        key = config.api_key
        self._client = httpx.AsyncClient(
            base_url=config.url.rstrip("/"),
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(config.request_timeout_s, connect=config.connect_timeout_s),
            limits=httpx.Limits(
                max_connections=config.max_concurrency, keepalive_expiry=_KEEPALIVE_S
            ),
            transport=transport,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"{engine} client", daemon=True
        )
        self._thread.start()

    def get(self, path: str) -> object:
        """Ask for a JSON document.

        Args:
            path: Path below the base address.

        Returns:
            The document.

        Raises:
            EngineHttpError: There is no such server, or its answer is no JSON document.
        """
        return self._document(self._call(self._send("GET", path, None)), path)

    def post(self, path: str, body: Mapping[str, object]) -> object:
        """Send one JSON document and wait for the answer.

        Args:
            path: Path below the base address.
            body: The document.

        Returns:
            The answer.

        Raises:
            EngineHttpError: There is no such server, it refuses, or its answer is no JSON document.
        """
        return self._document(self._call(self._send("POST", path, body)), path)

    def post_each(
        self, path: str, bodies: Sequence[Mapping[str, object]]
    ) -> Iterator[tuple[int, Callable[[], object]]]:
        """Send many JSON documents, several at once, and give answers as they come.

        Where the iterator is closed early, requests under way are cancelled: engines stop computing them.

        Args:
            path: Path below the base address.
            bodies: The documents.

        Yields:
            Index of a document, and a function that returns the answer to it or raises what `post` raises.
        """
        # Full when the caller is slow: then workers wait, and memory holds no more than this many answers.
        answers: asyncio.Queue[tuple[int, httpx.Response | Exception]] = asyncio.Queue(
            self._config.max_concurrency
        )
        source = iter(enumerate(bodies))

        async def work() -> None:
            for index, body in source:
                try:
                    answer = await self._send("POST", path, body)
                except Exception as err:  # handed to the caller, who raises it
                    answer = err
                await answers.put((index, answer))

        async def start() -> list[asyncio.Task[None]]:
            count = min(self._config.max_concurrency, len(bodies))
            return [asyncio.create_task(work()) for _ in range(count)]

        async def stop(tasks: Sequence[asyncio.Task[None]]) -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        tasks = self._call(start())
        try:
            for _ in bodies:
                index, answer = self._call(answers.get())
                yield index, lambda answer=answer: self._document(answer, path)
        finally:
            if (
                not self._loop.is_closed()
            ):  # else the client was closed first, and has cancelled them
                self._call(stop(tasks))

    def close(self) -> None:
        """Cancel what is under way, close connections, end the thread."""
        if self._loop.is_closed():
            return

        async def shut_down() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.aclose()

        self._call(shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[object, object, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise EngineHttpError(
                f"this client of {self._engine} at {self._config.url} is closed; make another one"
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _send(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> "httpx.Response":
        httpx = self._httpx
        delay = self._config.retry_delay_s
        for attempt in range(self._config.max_retries + 1):
            is_last = attempt == self._config.max_retries
            wait = delay * 2**attempt
            try:
                response = await self._client.request(method, path, json=body)
                if is_last or response.status_code not in _REFUSED_FOR_NOW:
                    return response
                wait = max(wait, _seconds(response.headers.get("retry-after")))
            except (httpx.ConnectError, httpx.ConnectTimeout) as err:
                if is_last:
                    raise self._unreachable(err, attempt + 1) from err
            except httpx.TimeoutException as err:
                raise EngineHttpError(
                    f"{self._engine} at {self._config.url} gave no answer to {path} in "
                    f"{self._config.request_timeout_s:g} s; raise request_timeout_s, or lower max_tokens or "
                    "max_concurrency"
                ) from err
            except httpx.HTTPError as err:
                raise EngineHttpError(
                    f"{self._engine} at {self._config.url} dropped a request to {path} ({type(err).__name__}: {err}); it "
                    "is not sent again, because it may have been computed: look at the server's log"
                ) from err
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, err: Exception, attempts: int) -> EngineHttpError:
        return EngineHttpError(
            f"no {self._engine} server answers at {self._config.url} ({attempts} attempts: {err}); start one with "
            f"{self._start_command}, or pass its address"
        )

    def _document(self, answer: "httpx.Response | Exception", path: str) -> object:
        """The JSON document of an answer."""
        if isinstance(answer, Exception):
            raise answer
        status = answer.status_code
        if status >= 400:
            kind = RefusedRequestError if status < 500 and status != 429 else EngineHttpError
            hint = _HINTS.get(status, "change the request, or look at the server's log")
            raise kind(
                f"{self._engine} at {self._config.url} answered {path} with HTTP {status}: "
                f"{_error_message(answer.text)}; {hint}"
            )
        try:
            return json.loads(answer.content)
        except ValueError as err:
            raise EngineHttpError(
                f"{self._engine} at {self._config.url} answered {path} with {answer.text[:80]!r}, which is no JSON; pass "
                "the base address of the engine's own server"
            ) from err


_HINTS = {
    401: "pass the server's api_key",
    403: "pass the server's api_key",
    404: "pass the base address of the server and the name under which it serves the model",
    429: "lower max_concurrency",
    500: "look at the server's log",
    503: "lower max_concurrency, or wait until the server is ready",
}


def _seconds(value: str | None) -> float:
    """A Retry-After header; 0 where there is none, or a date."""
    return float(value) if value is not None and value.isdigit() else 0.0


def _error_message(text: str) -> str:
    """The message of an error body, OpenAI's form or SGLang's, else the beginning of the body."""
    try:
        found = json.loads(text)
    except ValueError:
        return text[:_SHOWN_CHARACTERS]
    while isinstance(found, dict):
        inner = found.get("error", found.get("message", found.get("detail")))
        if inner is None:
            break
        found = inner
    return str(found)[:_SHOWN_CHARACTERS].rstrip(".")
