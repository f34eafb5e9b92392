"""The HTTP application."""

from importlib.metadata import version

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from routing_replay.engine.serving import AsyncLLM
from routing_replay.server.admission import RequireKey
from routing_replay.server.config import ServingConfig
from routing_replay.server.errors import install_error_handlers
from routing_replay.server.metrics import ServerMetrics
from routing_replay.server.openapi import install_openapi
from routing_replay.server.protocol.chat import ChatCompletionChunk
from routing_replay.server.protocol.completions import Completion
from routing_replay.server.protocol.sglang import SglangOutput
from routing_replay.server.protocol.vllm_generate import GenerationChunk
from routing_replay.server.routes import (
    chat,
    completions,
    control,
    health,
    models,
    sglang,
    sglang_control,
    tokenization,
    vllm_generate,
)
from routing_replay.server.serving import Serving

__all__ = ["create_app"]

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_ROUTERS = (
    completions.router,
    chat.router,
    sglang.router,
    vllm_generate.router,
    models.router,
    tokenization.router,
    health.router,
    control.router,
    sglang_control.router,
)
_EVENTS = (Completion, ChatCompletionChunk, SglangOutput, GenerationChunk)


class _CountResponses:
    """Count requests under way, and responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "unmatched")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.responses.labels(path, method, message["status"]).inc()
            await send(message)

        with self._metrics.open_requests.track_inprogress():
            await self._app(scope, receive, counted)


def create_app(llm: AsyncLLM | None, config: ServingConfig) -> FastAPI:
    """Make the application.

    Args:
        llm: An engine that is ready; None answers 503 until `app.state.serving.attach(llm)`.
        config: Settings of the server.

    Returns:
        The application; `app.state.serving` is its state.
    """
    app = FastAPI(
        title="routing-replay",
        version=version("routing-replay"),
        description="Rollouts of mixture-of-experts models, with the experts that each token met.",
        redoc_url=None,
    )
    serving = Serving(config, llm)
    app.state.serving = serving
    install_error_handlers(app)
    for router in _ROUTERS:
        app.include_router(router)
    if config.api_keys:
        app.add_middleware(RequireKey, keys=config.api_keys)
    app.add_middleware(_CountResponses, metrics=serving.metrics)
    install_openapi(app, _EVENTS)
    return app
