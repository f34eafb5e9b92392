"""The exceptions that this library raises on purpose.

Each class is also a standard-library type, so that a caller who knows nothing of this package can still catch it::

    RoutingReplayError
    ├── ConfigError            (ValueError)           an argument or option is not accepted
    │   └── EngineNotReadyError                       an engine that sleeps, or waits for weights
    ├── TraceFormatError       (ValueError)           bytes or arrays are not a well-formed trace
    │   └── RoutingDiagnosisError                     an engine's routing is wrong in ways that have names
    ├── TraceMismatchError     (ValueError)           a well-formed trace that belongs to other tokens or another model
    ├── CaptureError           (RuntimeError)         routing was not captured as promised
    │   └── CaptureOverflowError                      more rows than the device cache was sized for
    ├── DeliveryError          (RuntimeError)         captured routing could not be handed over as the request asked
    ├── StepError              (RuntimeError)         a step of an engine failed, and the requests that it computed with it
    ├── EngineStoppedError     (RuntimeError)         an engine that runs no more steps
    │   └── EngineDeadError                           an engine whose process has ended
    ├── ReplayError            (RuntimeError)         a router did not take the experts that it was given
    ├── UnsupportedModelError  (NotImplementedError)  a model that this library cannot load or attach to
    └── IntegrationError       (RuntimeError)         a host package is missing or of an unsupported version

Messages say what is wrong, the values, what is accepted, and what to do. Every class is picklable.
"""

from collections.abc import Sequence

__all__ = [
    "CaptureError",
    "CaptureOverflowError",
    "ConfigError",
    "DeliveryError",
    "EngineDeadError",
    "EngineNotReadyError",
    "EngineStoppedError",
    "IntegrationError",
    "ReplayError",
    "RoutingDiagnosisError",
    "RoutingReplayError",
    "StepError",
    "TraceFormatError",
    "TraceMismatchError",
    "UnsupportedModelError",
]


class RoutingReplayError(Exception):
    """Base class of every error that routing-replay raises on purpose."""


class ConfigError(RoutingReplayError, ValueError):
    """An argument, option or combination of options is not accepted."""


class EngineNotReadyError(ConfigError):
    """An engine runs no step now: it sleeps, or does not have one whole set of weights."""


class TraceFormatError(RoutingReplayError, ValueError):
    """Bytes or arrays do not form a valid trace: truncated, altered, wrong shape, ids out of range."""


class RoutingDiagnosisError(TraceFormatError):
    """An engine's routing is wrong in ways that have names.

    Attributes:
        findings: What was found, `routing_replay.trace.importers.Finding` each, worst first.
    """

    def __init__(self, message: str, findings: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (*self.args, self.findings)


class TraceMismatchError(RoutingReplayError, ValueError):
    """A valid trace does not belong to the tokens, the trace or the model that it is used with."""


class CaptureError(RoutingReplayError, RuntimeError):
    """A request's routing was not captured completely; its rows are not returned."""


class CaptureOverflowError(CaptureError):
    """A step has more rows than the device cache was sized for."""


class DeliveryError(RoutingReplayError, RuntimeError):
    """Captured routing could not be handed over as the request asked: a trace store refused it."""


class StepError(RoutingReplayError, RuntimeError):
    """A step of an engine failed, or gave a request logits that are not numbers; other requests go on."""


class EngineStoppedError(RoutingReplayError, RuntimeError):
    """An engine has stopped after steps that failed; it runs no request any more."""


class EngineDeadError(EngineStoppedError):
    """The process of an engine has ended; its requests are lost, and it takes no new ones."""


class ReplayError(RoutingReplayError, RuntimeError):
    """A replay did not happen as asked: a router did not fire, fired twice, or is of an unknown form."""


class UnsupportedModelError(RoutingReplayError, NotImplementedError):
    """A model, or a feature of its configuration, that this library does not support."""


class IntegrationError(RoutingReplayError, RuntimeError):
    """A host package is missing, or its version is not supported."""
