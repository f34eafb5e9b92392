"""Strict reading of JSON: exact keys, exact types, no duplicates, no floats."""

import json
from collections.abc import Mapping
from typing import NoReturn, TypeAlias, cast

from routing_replay.errors import TraceFormatError

JsonObject: TypeAlias = Mapping[str, object]


def parse_object(data: bytes, *, where: str) -> JsonObject:
    """Parse UTF-8 JSON text whose top level is an object.

    Args:
        data: The text.
        where: What the text is, for messages.

    Returns:
        The object; integers are Python integers of any size.

    Raises:
        TraceFormatError: Not UTF-8, not JSON, duplicated keys, a float, or another top level.
    """
    try:
        value = cast(
            "object",
            json.loads(
                data.decode("utf-8"),
                object_pairs_hook=_unique_keys,
                parse_float=_refuse_number,
                parse_constant=_refuse_number,
            ),
        )
    except TraceFormatError as err:
        raise TraceFormatError(f"{where}: {err}") from None
    # RecursionError: brackets nested deeper than the interpreter's stack.
    except (ValueError, RecursionError) as err:
        raise TraceFormatError(f"{where} is not JSON in UTF-8: {err}") from err
    return _as_object(value, where=where)


def _unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    """Build an object, refusing a key that occurs twice."""
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise TraceFormatError(f"key {describe(key)} occurs twice; keys must be unique")
        fields[key] = value
    return fields


def _refuse_number(text: str) -> NoReturn:
    """Refuse a number that is not an integer."""
    raise TraceFormatError(f"number {text[:80]} is not an integer; only integers occur in a header")


def _as_object(value: object, *, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise TraceFormatError(f"{where} is {describe(value)}; it must be an object")
    return cast("JsonObject", value)


def check_keys(fields: JsonObject, keys: frozenset[str], *, where: str) -> None:
    """Check that an object has exactly the given keys.

    Raises:
        TraceFormatError: A key is missing or unknown.
    """
    missing, unknown = sorted(keys - fields.keys()), sorted(fields.keys() - keys)
    if missing or unknown:
        raise TraceFormatError(
            f"{where} lacks the keys {missing} and has the unknown keys {describe(unknown)}; it must"
            f" have exactly {sorted(keys)}"
        )


def int_field(fields: JsonObject, key: str, *, where: str, low: int, high: int) -> int:
    """Return an integer in [low, high]; a bool is not one.

    Raises:
        TraceFormatError: Another type or out of range.
    """
    return _as_int(fields[key], where=f"{where}.{key}", low=low, high=high)


def _as_int(value: object, *, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise TraceFormatError(
            f"{where} is {describe(value)}; it must be an integer in [{low}, {high}]"
        )
    return value


def bool_field(fields: JsonObject, key: str, *, where: str) -> bool:
    """Return a bool.

    Raises:
        TraceFormatError: Another type.
    """
    value = fields[key]
    if not isinstance(value, bool):
        raise TraceFormatError(f"{where}.{key} is {describe(value)}; it must be true or false")
    return value


def str_field(fields: JsonObject, key: str, *, where: str) -> str:
    """Return a string.

    Raises:
        TraceFormatError: Another type.
    """
    value = fields[key]
    if not isinstance(value, str):
        raise TraceFormatError(f"{where}.{key} is {describe(value)}; it must be a string")
    return value


def _list_field(fields: JsonObject, key: str, *, where: str) -> list[object]:
    value = fields[key]
    if not isinstance(value, list):
        raise TraceFormatError(f"{where}.{key} is {describe(value)}; it must be an array")
    return cast("list[object]", value)


def ints_field(fields: JsonObject, key: str, *, where: str, high: int) -> tuple[int, ...]:
    """Return an array of integers in [0, high].

    Raises:
        TraceFormatError: Another type or out of range.
    """
    return tuple(
        _as_int(item, where=f"{where}.{key}[{idx}]", low=0, high=high)
        for idx, item in enumerate(_list_field(fields, key, where=where))
    )


def pairs_field(
    fields: JsonObject, key: str, *, where: str, high: int
) -> tuple[tuple[int, int], ...]:
    """Return an array of two-element arrays of integers in [0, high].

    Raises:
        TraceFormatError: Another type, length or out of range.
    """
    pairs: list[tuple[int, int]] = []
    for idx, item in enumerate(_list_field(fields, key, where=where)):
        name = f"{where}.{key}[{idx}]"
        pair = cast("list[object]", item)
        if not isinstance(item, list) or len(pair) != 2:
            raise TraceFormatError(f"{name} is {describe(item)}; it must be [token_idx, version]")
        first, second = (_as_int(part, where=name, low=0, high=high) for part in pair)
        pairs.append((first, second))
    return tuple(pairs)


def objects_field(fields: JsonObject, key: str, *, where: str) -> tuple[JsonObject, ...]:
    """Return an array of objects.

    Raises:
        TraceFormatError: Another type.
    """
    return tuple(
        _as_object(item, where=f"{where}.{key}[{idx}]")
        for idx, item in enumerate(_list_field(fields, key, where=where))
    )


def describe(value: object) -> str:
    """Show a parsed value in a message without repeating megabytes of input."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
