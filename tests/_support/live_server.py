"""A server on an ephemeral port of this machine, run by a thread of the test process."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from routing_replay.assets import tiny_moe_path
from routing_replay.engine import EngineConfig
from routing_replay.engine.serving import AsyncLLM
from routing_replay.server import Server, ServingConfig

_T = TypeVar("_T")
StartEngine = Callable[[], Awaitable[AsyncLLM]]


class LiveServer:
    """A running server."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.url = server.url
        self._loop = loop
        self.exit_code: Future[int] = Future()

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self) -> int:
        """Stop as after SIGTERM, and return the exit code."""
        self.server.stop()
        return self.exit_code.result(60)


@contextmanager
def live_server(
    start_engine: StartEngine, config: ServingConfig, *, wait_ready: bool = True
) -> Iterator[LiveServer]:
    """Run a server until the block is left."""
    made: Future[LiveServer] = Future()

    async def main() -> int:
        live = LiveServer(Server(config, start_engine), asyncio.get_running_loop())
        made.set_result(live)
        return await live.server.run()

    def work() -> None:
        try:
            code = asyncio.run(main())
        except BaseException as error:  # the test sees it
            (made if not made.done() else made.result().exit_code).set_exception(error)
        else:
            made.result().exit_code.set_result(code)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        live = made.result(60)
        if wait_ready:
            live.call(_ready(live))
        yield live
    finally:
        if made.done() and made.exception() is None:
            live = made.result()
            if not live.exit_code.done():
                live.server.stop()
        thread.join(60)
        assert not thread.is_alive()


async def _ready(live: LiveServer) -> None:
    while live.server.serving.phase != "ready" and not live.exit_code.done():
        await asyncio.sleep(0.02)


def post(client: httpx.Client, path: str, **fields: object) -> dict[str, Any]:
    """Send a body that is accepted, and return the answer's."""
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tiny_moe_engine(**settings: object) -> StartEngine:
    """The embedded model in a process of its own."""
    config = EngineConfig(**{"enable_return_routed_experts": True, **settings})

    async def start() -> AsyncLLM:
        return await AsyncLLM.start(tiny_moe_path(), dtype="float32", device="cpu", config=config)

    return start
