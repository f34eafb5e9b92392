"""Reading JSON that must be exactly as described: unknown, missing and repeated names are errors, as are wrong types."""

import difflib
import json
from collections.abc import Sequence
from typing import cast

from routing_replay.errors import ConfigError

__all__ = ["fields_of", "int_of", "items_of", "number_of", "parse_json", "text_of"]


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the name {repeated!r} stands twice in one JSON object; keep one")
    return found


def parse_json(text: str, what: str) -> object:
    """Parse a text.

    Args:
        text: JSON.
        what: What it is, for the message of an error.

    Returns:
        Its value.

    Raises:
        ConfigError: It is not JSON, or a name is repeated in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as err:
        raise ConfigError(f"{what} is not JSON: {err}; it starts with {text[:40]!r}") from err


def fields_of(
    value: object, where: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, object]:
    """Take a value as an object of known names.

    Args:
        value: What was parsed.
        where: Its place, for the message of an error.
        required: Names that must be there.
        optional: Names that may be.

    Returns:
        The object.

    Raises:
        ConfigError: It is no object, a name is unknown, or one is missing.
    """
    names = (*required, *optional)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}; accepted is an object with {', '.join(names)}")
    fields = cast(dict[str, object], value)
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where} has {name!r}; accepted are {', '.join(names)}{hint}")
    for name in required:
        if name not in fields:
            raise ConfigError(f"{where} has no {name!r}; it must name {', '.join(required)}")
    return fields


def items_of(value: object, where: str) -> list[object]:
    """Take a value as a list.

    Args:
        value: What was parsed.
        where: Its place, for the message of an error.

    Returns:
        The list.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}; accepted is a list")
    return cast(list[object], value)


def int_of(value: object, where: str, *, least: int = 1) -> int:
    """Take a value as an integer.

    Args:
        value: What was parsed.
        where: Its place, for the message of an error.
        least: The smallest accepted.

    Returns:
        The integer.

    Raises:
        ConfigError: It is none (true and 1.0 are none), or too small.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{where} is {value!r}; accepted is an integer of {least} or more")
    return value


def number_of(value: object, where: str) -> float:
    """Take a value as a positive, finite number.

    Args:
        value: What was parsed.
        where: Its place, for the message of an error.

    Returns:
        The number.

    Raises:
        ConfigError: It is none.
    """
    if type(value) not in (int, float) or not 0.0 < cast(float, value) < float("inf"):
        raise ConfigError(f"{where} is {value!r}; accepted is a number above 0")
    return float(cast(float, value))


def text_of(value: object, where: str) -> str:
    """Take a value as a text that is not empty.

    Args:
        value: What was parsed.
        where: Its place, for the message of an error.

    Returns:
        The text.

    Raises:
        ConfigError: It is none, or empty.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} is {value!r}; accepted is a text that is not empty")
    return value
