"""Bodies of the routes by which SGLang's clients steer a server."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from routing_replay.server.bodies import RequestBody
from routing_replay.server.protocol.sampling import RequestId

__all__ = [
    "SglangAbort",
    "SglangMemory",
    "SglangOutcome",
    "SglangPause",
    "SglangUpdate",
]


class SglangAbort(RequestBody):
    """Which requests are ended; they return what they have."""

    rid: Annotated[
        RequestId | Literal[""] | None,
        Field(description="A request's `rid`; empty with `abort_all`."),
    ] = None
    abort_all: Annotated[bool, Field(description="End every request.")] = False
    abort_message: Annotated[str | None, Field(description="Accepted, not used.")] = None


class SglangPause(RequestBody):
    """What happens to requests that run."""

    mode: Annotated[
        Literal["abort", "in_place"],
        Field(description="`abort`: they end with what they have; `in_place`: they go on later."),
    ] = "abort"


class SglangUpdate(RequestBody):
    """New weights of the same model."""

    model_path: Annotated[
        str, Field(min_length=1, max_length=4096, description="A folder that the server can read.")
    ]
    weight_version: Annotated[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")] | None,
        Field(description="The new version, a number; one more than the last if null."),
    ] = None
    flush_cache: Annotated[bool, Field(description="Forget cached prefixes.")] = True
    abort_all_requests: Annotated[bool, Field(description="End running requests first.")] = False
    load_format: Annotated[
        Literal["auto", "safetensors"] | None, Field(description="Accepted, not used.")
    ] = None
    keep_pause: Annotated[bool, Field(description="Accepted, not used.")] = False
    is_async: Annotated[bool, Field(description="Accepted, not used.")] = False
    torch_empty_cache: Annotated[bool, Field(description="Accepted, not used.")] = False
    recapture_cuda_graph: Annotated[bool, Field(description="Accepted, not used.")] = False
    token_step: Annotated[int, Field(description="Accepted, not used.")] = 0


class SglangMemory(RequestBody):
    """What is freed, or taken again."""

    tags: Annotated[
        list[Literal["weights", "kv_cache", "cuda_graph"]] | None,
        Field(description="Null, or weights and kv_cache: one goes with the other."),
    ] = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out that the engine could not keep alone."""
        return self.tags is None or {"weights", "kv_cache"}.issubset(self.tags)


class SglangOutcome(BaseModel):
    """It is done."""

    success: Literal[True] = True
    message: str = ""
    num_paused_requests: int = 0
