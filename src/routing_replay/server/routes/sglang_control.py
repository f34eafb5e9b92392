"""The routes by which SGLang's clients steer a server, on what `/pause`, `/abort` and the others do."""

from typing import Annotated

from fastapi import APIRouter, Depends

from routing_replay.server.bodies import LimitedRoute
from routing_replay.server.errors import ApiError
from routing_replay.server.openapi import control_responses
from routing_replay.server.protocol.sglang_control import (
    SglangAbort,
    SglangMemory,
    SglangOutcome,
    SglangPause,
    SglangUpdate,
)
from routing_replay.server.serving import Serving, serving_of

__all__ = ["router"]

router = APIRouter(route_class=LimitedRoute, tags=["SGLang"])
_Serving = Annotated[Serving, Depends(serving_of)]


@router.post("/abort_request", summary="End requests", responses=control_responses())
async def abort_request(body: SglangAbort, serving: _Serving) -> SglangOutcome:
    """End one request, or all; one that does not run is no error."""
    if body.abort_all == bool(body.rid):
        raise ApiError(
            400,
            "accepted is either rid or abort_all=true; send one of them",
            code="invalid_value",
            param="rid",
        )
    return SglangOutcome(
        message=f"{await serving.requests.abort(serving.llm, body.rid or None)} ended"
    )


@router.post("/flush_cache", summary="Forget prefixes", responses=control_responses())
@router.get("/flush_cache", include_in_schema=False)
async def flush_cache(serving: _Serving) -> SglangOutcome:
    """Forget the keys, values and routing of cached prefixes."""
    await serving.llm.reset_prefix_cache()
    return SglangOutcome(message="cache flushed")


@router.post("/pause_generation", summary="Stop computing", responses=control_responses())
async def pause_generation(serving: _Serving, body: SglangPause | None = None) -> SglangOutcome:
    """Run no step until `/continue_generation`."""
    mode = (body or SglangPause()).mode
    await serving.llm.pause(mode="abort" if mode == "abort" else "keep")
    return SglangOutcome(message="generation paused")


@router.post("/continue_generation", summary="Go on computing", responses=control_responses())
async def continue_generation(serving: _Serving) -> SglangOutcome:
    """End a pause."""
    await serving.llm.resume()
    return SglangOutcome(message="generation continued")


@router.post(
    "/update_weights_from_disk", summary="Replace the weights", responses=control_responses()
)
async def update_weights_from_disk(body: SglangUpdate, serving: _Serving) -> SglangOutcome:
    """Read new weights from a folder, between two steps."""
    if body.abort_all_requests:
        await serving.requests.abort(serving.llm, None)
    version = await serving.llm.update_weights(
        body.model_path,
        weights_version=None if body.weight_version is None else int(body.weight_version),
        reset_prefix_cache=body.flush_cache,
    )
    return SglangOutcome(message=f"weights have version {version}")


@router.post(
    "/release_memory_occupation", summary="Free the device's memory", responses=control_responses()
)
async def release_memory_occupation(
    serving: _Serving, body: SglangMemory | None = None
) -> SglangOutcome:
    """Take weights and KV cache off the device; refused while requests run."""
    _check_all(body)
    await serving.llm.sleep(1)
    return SglangOutcome(message="memory released")


@router.post(
    "/resume_memory_occupation", summary="Take the memory again", responses=control_responses()
)
async def resume_memory_occupation(
    serving: _Serving, body: SglangMemory | None = None
) -> SglangOutcome:
    """Bring back what `/release_memory_occupation` took away."""
    _check_all(body)
    await serving.llm.wake_up()
    return SglangOutcome(message="memory resumed")


def _check_all(body: SglangMemory | None) -> None:
    if body is not None and not body.is_all:
        raise ApiError(
            400,
            f"tags={body.tags}; accepted is null, or weights and kv_cache together",
            code="invalid_value",
            param="tags",
        )
