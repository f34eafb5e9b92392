"""One thing that is wrong with an engine's routing, by name."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from routing_replay.errors import RoutingDiagnosisError

__all__ = ["Finding", "raise_errors"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with an array of routed experts.

    Attributes:
        code: Its name, such as `"all_zero"`; `docs/interop.md` lists all.
        message: What was found, with the values and the first place.
        row: Token index of the first row concerned, or None where the whole array is.
        layer_idx: Decoder layer of the first place, or None where all layers are concerned.
        values: Ids or counts that show it.
        cause: The likely reason, and the remedy.
        upstream: Issues and pull requests where it was met, such as `"vllm#44116"`.
        severity: `"error"`: no correct engine returns this; `"warning"`: a correct one hardly would.
    """

    code: str
    message: str
    row: int | None = None
    layer_idx: int | None = None
    values: tuple[int, ...] = ()
    cause: str = ""
    upstream: tuple[str, ...] = ()
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        known = f" (known: {', '.join(self.upstream)})" if self.upstream else ""
        return (
            f"{self.code}: {self.message}; {self.cause}{known}"
            if self.cause
            else f"{self.code}: {self.message}"
        )


def raise_errors(findings: Iterable[Finding], *, what: str) -> None:
    """Raise if a finding is an error.

    Args:
        findings: What was found.
        what: What was looked at, for the message.

    Raises:
        RoutingDiagnosisError: At least one finding is an error; it carries all findings.
    """
    everything = tuple(findings)
    errors = [finding for finding in everything if finding.severity == "error"]
    if not errors:
        return
    shown = " | ".join(map(str, errors[:_SHOWN]))
    more = f" | and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    raise RoutingDiagnosisError(f"{what} cannot be right: {shown}{more}", everything)
