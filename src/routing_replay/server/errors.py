"""Every error in OpenAI's form, with a code."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from routing_replay import errors

__all__ = ["ApiError", "as_api_error", "error_response", "install_error_handlers"]

_LOG = logging.getLogger("routing_replay.server")
_LONGEST_VALUE = 80

# The most derived class of an exception that is listed decides.
_BY_CLASS: Mapping[type[Exception], tuple[int, str]] = {
    errors.ConfigError: (400, "invalid_value"),
    errors.EngineNotReadyError: (503, "engine_not_ready"),
    errors.TraceFormatError: (400, "invalid_trace"),
    errors.TraceMismatchError: (400, "trace_mismatch"),
    errors.UnsupportedModelError: (400, "unsupported_model"),
    errors.CaptureError: (500, "capture_failed"),
    errors.DeliveryError: (500, "delivery_failed"),
    errors.StepError: (500, "step_failed"),
    errors.ReplayError: (500, "replay_failed"),
    errors.EngineDeadError: (503, "engine_dead"),
    errors.EngineStoppedError: (503, "engine_stopped"),
    errors.RoutingReplayError: (500, "internal_error"),
}
_BY_STATUS = {
    400: "bad_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
}


def _type_of(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    if status == 504:
        return "timeout_error"
    return "server_error" if status >= 500 else "invalid_request_error"


class ApiError(HTTPException):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: What is wrong, and what to do.
        code: For programs, such as `"queue_full"`.
        param: The field that is not accepted, if it is one.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.detail,
                "type": _type_of(self.status_code),
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to an exception.

    Args:
        error: What a request raised; what is not raised on purpose is logged, and its text stays here.

    Returns:
        The error with its HTTP status and code.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        status = error.status_code
        code = _BY_STATUS.get(status, "http_error")
        return ApiError(status, error.detail, code=code, headers=error.headers)
    for kind in type(error).__mro__:
        if kind in _BY_CLASS:
            status, code = _BY_CLASS[kind]
            return ApiError(status, str(error), code=code)
    _LOG.error("a request failed in an unforeseen way", exc_info=error)
    message = "the server failed in an unforeseen way; its log says more"
    return ApiError(500, message, code="internal_error")


def error_response(error: Exception) -> JSONResponse:
    """Return the response to an exception."""
    answer = as_api_error(error)
    return JSONResponse(answer.body, answer.status_code, headers=answer.headers)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _field_message(found: Mapping[str, Any], known: Sequence[str]) -> tuple[str, str | None]:
    """What is wrong with one field, and its path."""
    path = ".".join(str(part) for part in found["loc"][1:]) or None
    if found["type"] == "extra_forbidden":
        near = get_close_matches(path or "", known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
        return f"field {_shown(path)} is not known{hint}", path
    if found["type"] == "missing":
        what = (
            f"field {path!r} is missing" if path else "the request has no body; send a JSON object"
        )
        return what, path
    message: str = found["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if found["type"] == "value_error":
        return message, path
    where = f"{path}={_shown(found['input'])}" if path else f"the body is {_shown(found['input'])}"
    return f"{where}: {message}", path


def _invalid_fields(error: RequestValidationError, known: Sequence[str]) -> ApiError:
    found = [_field_message(item, known) for item in error.errors()[:3]]
    message = "; ".join(dict.fromkeys(text for text, _ in found))
    return ApiError(400, message, code="invalid_value", param=found[0][1])


def _known_fields(request: Request) -> list[str]:
    """Names of the fields of the body that a route takes."""
    route = request.scope.get("route")
    body = getattr(route, "body_field", None)
    kind = getattr(getattr(body, "field_info", None), "annotation", None)
    return list(getattr(kind, "model_fields", ()))


def install_error_handlers(app: FastAPI) -> None:
    """Make an application answer each error in OpenAI's form.

    Args:
        app: The application.
    """

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            error = _invalid_fields(error, _known_fields(request))
        return error_response(error)

    for kind in (HTTPException, RequestValidationError, errors.RoutingReplayError, Exception):
        app.add_exception_handler(kind, answer)
