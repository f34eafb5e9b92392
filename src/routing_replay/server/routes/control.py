"""Routes that steer the engine, for trainers: pause, abort, weights, cache and sleep."""

from typing import Annotated

from fastapi import APIRouter, Depends

from routing_replay.server.bodies import LimitedRoute
from routing_replay.server.errors import ApiError
from routing_replay.server.openapi import control_responses
from routing_replay.server.protocol.control import (
    Aborted,
    AbortRequest,
    Done,
    EngineState,
    PauseRequest,
    SleepRequest,
    UpdateWeightsRequest,
    WeightsUpdated,
)
from routing_replay.server.serving import Serving, serving_of

__all__ = ["router"]

router = APIRouter(route_class=LimitedRoute, tags=["control"])
_Serving = Annotated[Serving, Depends(serving_of)]


@router.post("/pause", summary="Stop computing", responses=control_responses())
async def pause(serving: _Serving, body: PauseRequest | None = None) -> Done:
    """Run no step until `/resume`; requests that come meanwhile wait."""
    await serving.llm.pause(mode=(body or PauseRequest()).mode)
    return Done()


@router.post("/resume", summary="Go on computing", responses=control_responses())
async def resume(serving: _Serving) -> Done:
    """End a pause."""
    await serving.llm.resume()
    return Done()


@router.post("/abort", summary="End requests", responses=control_responses())
async def abort(body: AbortRequest, serving: _Serving) -> Aborted:
    """End requests; their blocks are free within a step."""
    if body.all == (body.request_id is not None):
        raise ApiError(
            400,
            "accepted is either request_id or all=true; send one of them",
            code="invalid_value",
            param="request_id",
        )
    return Aborted(aborted=await serving.requests.abort(serving.llm, body.request_id))


@router.post("/update_weights", summary="Replace the weights", responses=control_responses())
async def update_weights(body: UpdateWeightsRequest, serving: _Serving) -> WeightsUpdated:
    """Read new weights from a folder, between two steps; requests that run go on with them."""
    version = await serving.llm.update_weights(
        body.folder,
        weights_version=body.weights_version,
        reset_prefix_cache=body.reset_prefix_cache,
    )
    return WeightsUpdated(weights_version=version)


@router.post("/reset_prefix_cache", summary="Forget prefixes", responses=control_responses())
async def reset_prefix_cache(serving: _Serving) -> Done:
    """Forget the keys, values and routing of cached prefixes."""
    await serving.llm.reset_prefix_cache()
    return Done()


@router.post("/sleep", summary="Free the device's memory", responses=control_responses())
async def sleep(serving: _Serving, body: SleepRequest | None = None) -> Done:
    """Take weights and KV cache off the device; refused while requests run."""
    await serving.llm.sleep((body or SleepRequest()).level)
    return Done()


@router.post("/wake_up", summary="Take the memory again", responses=control_responses())
async def wake_up(serving: _Serving) -> Done:
    """Bring back what `/sleep` took away."""
    await serving.llm.wake_up()
    return Done()


@router.get("/engine_state", summary="Whether the engine works", responses=control_responses())
async def engine_state(serving: _Serving) -> EngineState:
    """Return whether the engine is paused or sleeps, and the version of its weights."""
    stats = await serving.llm.stats()
    return EngineState(
        is_paused=stats.is_paused,
        is_sleeping=stats.is_sleeping,
        weights_version=stats.weights_version,
    )
