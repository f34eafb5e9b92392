"""Which versions of a foreign engine this library knows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from routing_replay.errors import IntegrationError

__all__ = ["EngineVersion", "check_engine_version"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineVersion:
    """A row of an engine's table of versions.

    Attributes:
        series: Major, minor and, where the table is as fine, patch number, such as `"0.30"`.
        note: How it is known: run with this library, or only read.
    """

    series: str
    note: str


def check_engine_version(
    found: str, *, engine: str, table: Sequence[EngineVersion], allow_untested_version: bool
) -> str:
    """Refuse a version that is not in the table, unless the caller says otherwise.

    Args:
        found: The engine's version.
        engine: Its name.
        table: The versions that are known.
        allow_untested_version: Accept any version.

    Returns:
        How the version is known.

    Raises:
        IntegrationError: The version is not in the table.
    """
    for row in table:
        if re.match(rf"{re.escape(row.series)}(?!\d)", found):
            return row.note
    if allow_untested_version:
        return "unknown to this library"
    known = ", ".join(f"{row.series} ({row.note})" for row in table)
    raise IntegrationError(
        f"{engine} {found} is unknown to this library; known are {known}; use one of these, or pass "
        "allow_untested_version=True (--allow-untested-version): the canary checks its rows all the same"
    )
