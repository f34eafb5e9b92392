"""Files of prompts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from routing_replay.errors import ConfigError

__all__ = ["Message", "PromptFile", "load_prompts"]

Message = Mapping[str, str]
_KINDS = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """Prompts by name; a name is in exactly one of the three.

    Attributes:
        names: All names, in the order of the file: a line's `id`, or its number.
        texts: Prompts as text.
        conversations: Prompts as messages, for the model's chat template.
        token_ids: Prompts as tokens.
    """

    names: tuple[str, ...]
    texts: Mapping[str, str]
    conversations: Mapping[str, tuple[Message, ...]]
    token_ids: Mapping[str, tuple[int, ...]]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and {"role", "content"} <= set(turn)
            and all(isinstance(part, str) for part in turn.values())
            for turn in value
        )
    )


def _is_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int and token >= 0 for token in value)
    )


_ACCEPTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "prompt": (_is_text, "a text that is not empty"),
    "messages": (_is_conversation, 'a list of {"role": "...", "content": "..."}'),
    "prompt_token_ids": (_is_tokens, "a list of token ids"),
}


def _parse(line: str, where: str) -> tuple[str | None, str, object]:
    """Return the name, the kind and the value of a line."""
    try:
        value = json.loads(line)
    except ValueError as err:
        raise ConfigError(f"{where} is not JSON ({err}); each line is one object") from err
    found = [kind for kind in _KINDS if isinstance(value, dict) and kind in value]
    if len(found) != 1:
        raise ConfigError(
            f"{where} has {' and '.join(found) or 'none'} of {', '.join(_KINDS)}; accepted is an object with exactly "
            "one of them"
        )
    kind, name = found[0], value.get("id")
    is_accepted, wanted = _ACCEPTED[kind]
    if not is_accepted(value[kind]):
        shown = json.dumps(value[kind])
        raise ConfigError(f"{where}: {kind} is {shown[:80]}; accepted is {wanted}")
    if name is not None and type(name) not in (str, int):
        raise ConfigError(
            f"{where}: id is {json.dumps(name)[:80]}; accepted is a text or an integer"
        )
    return None if name is None else str(name), kind, value[kind]


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): JSON may hold other line separators than the newline as they are.
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"prompts={path} cannot be read ({err}); pass a file in UTF-8") from err


def load_prompts(path: Path) -> PromptFile:
    """Read a file of prompts.

    Args:
        path: `.txt` with one prompt a line, or `.jsonl`.

    Returns:
        The prompts.

    Raises:
        ConfigError: The file cannot be read, has no prompt, or a line is not as described.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"prompts={path}; accepted is a file *.jsonl or *.txt")
    by_kind: dict[str, dict[str, object]] = {kind: {} for kind in _KINDS}
    names: dict[str, None] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, kind, value = None, "prompt", cast("object", line.rstrip("\r"))
        if path.suffix == ".jsonl":
            name, kind, value = _parse(line, f"{path} line {number}")
        name = str(number) if name is None else name
        if name in names:
            raise ConfigError(
                f"{path} line {number}: id {name!r} is there already; ids are unique, and a line without one has its "
                "number"
            )
        names[name] = None
        by_kind[kind][name] = value
    if not names:
        raise ConfigError(f"{path} holds no prompt; write one a line")
    return PromptFile(
        names=tuple(names),
        texts=cast("dict[str, str]", by_kind["prompt"]),
        conversations=cast("dict[str, tuple[Message, ...]]", by_kind["messages"]),
        token_ids=cast("dict[str, tuple[int, ...]]", by_kind["prompt_token_ids"]),
    )
