"""What an export format is, and what it needs to know beside the trace."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace

__all__ = ["ExportFormat", "ExportParameters", "OnMissing"]

OnMissing: TypeAlias = Literal["error", "native", "arange"]
"""What becomes of a missing row: refused, left to the trainer's router, or forced to the experts 0 to K-1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportParameters:
    """What an export needs to know beside the trace.

    Attributes:
        num_tokens: Tokens of the whole sequence, prompt and completion. `None` is one more than the trace ends at:
            the last token was sampled and never fed back.
        num_prompt_tokens: Tokens of the prompt; only formats that keep it apart need it.
        on_missing: What becomes of missing rows; a format refuses a policy that it does not offer.
    """

    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    on_missing: OnMissing = "error"

    def tokens_of(self, trace: RoutingTrace) -> int:
        """Return `num_tokens`, or what a trace says where none was given."""
        return trace.end + 1 if self.num_tokens is None else self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFormat:
    """One way to write a trace for others.

    Attributes:
        name: Its name on the command line.
        suffix: Customary end of a file name.
        description: What the bytes are.
        encoder: Turns a trace and its parameters into bytes.
        policies: Values of `on_missing` that it accepts.
    """

    name: str
    suffix: str
    description: str
    encoder: Callable[[RoutingTrace, ExportParameters], bytes]
    policies: tuple[OnMissing, ...] = ("error",)

    def encode(self, trace: RoutingTrace, parameters: ExportParameters | None = None) -> bytes:
        """Write a trace.

        Args:
            trace: Rows of one sequence.
            parameters: What the trace does not say; `None` is `ExportParameters()`.

        Returns:
            The bytes of one file.

        Raises:
            ConfigError: A parameter is missing or not accepted.
            TraceFormatError: An id of the trace is out of range or repeated in its row.
            TraceMismatchError: The format cannot express the trace.
            IntegrationError: The format needs a package that is not installed.
        """
        chosen = ExportParameters() if parameters is None else parameters
        if chosen.on_missing not in self.policies:
            raise ConfigError(
                f"on_missing={chosen.on_missing!r} is not offered by the format {self.name}; accepted are "
                f"{', '.join(self.policies)}"
            )
        return self.encoder(trace, chosen)
