"""Tables of measured configurations as JSON files."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts.config import ExpertsChoice, ExpertsConfig
from routing_replay.kernels.experts.strict_json import (
    fields_of,
    int_of,
    items_of,
    number_of,
    parse_json,
    text_of,
)
from routing_replay.kernels.experts.tables.table import (
    ConfigTable,
    Device,
    LayerShape,
    ShapeEntries,
    TableEntry,
)

__all__ = ["read_table", "table_from_json", "table_to_json", "write_table"]

_FORMAT = "routing-replay experts configurations"
_VERSION = 1
_SIZES = ("hidden_size", "intermediate_size", "num_experts", "num_local_experts", "top_k")
_RANGE = ("min_tokens", "max_tokens", "measured_tokens")


def _device(value: object, where: str) -> Device:
    fields = fields_of(value, where, required=("name", "capability", "num_sms"))
    numbers = items_of(fields["capability"], f"{where}.capability")
    if len(numbers) != 2:
        raise ConfigError(f"{where}.capability is {numbers!r}; accepted are two integers")
    major, minor = (int_of(item, f"{where}.capability", least=0) for item in numbers)
    return Device(
        name=text_of(fields["name"], f"{where}.name"),
        capability=(major, minor),
        num_sms=int_of(fields["num_sms"], f"{where}.num_sms"),
    )


def _layer(value: object, where: str) -> LayerShape:
    fields = fields_of(value, where, required=(*_SIZES, "is_gated"))
    is_gated = fields["is_gated"]
    if not isinstance(is_gated, bool):
        raise ConfigError(f"{where}.is_gated is {is_gated!r}; accepted are true and false")
    sizes = {name: int_of(fields[name], f"{where}.{name}") for name in _SIZES}
    return LayerShape(**sizes, is_gated=is_gated)


def _entry(value: object, where: str) -> TableEntry:
    fields = fields_of(
        value, where, required=(*_RANGE, "config", "microseconds", "rule_microseconds")
    )
    choice = ExpertsChoice.from_parsed(fields["config"], f"{where}.config", is_complete=True)
    assert choice.engine is not None
    assert choice.tile_tokens is not None
    assert choice.gemm1 is not None
    assert choice.gemm2 is not None
    config = ExpertsConfig(
        engine=choice.engine,
        tile_tokens=choice.tile_tokens,
        gemm1=choice.gemm1,
        gemm2=choice.gemm2,
    )
    tokens = {name: int_of(fields[name], f"{where}.{name}") for name in _RANGE}
    return TableEntry(
        min_tokens=tokens["min_tokens"],
        max_tokens=tokens["max_tokens"],
        measured_tokens=tokens["measured_tokens"],
        config=config,
        microseconds=number_of(fields["microseconds"], f"{where}.microseconds"),
        rule_microseconds=number_of(fields["rule_microseconds"], f"{where}.rule_microseconds"),
    )


def _shape(value: object, where: str) -> ShapeEntries:
    fields = fields_of(value, where, required=("shape", "commit", "versions", "seed", "entries"))
    versions = items_of(fields["versions"], f"{where}.versions")
    entries = items_of(fields["entries"], f"{where}.entries")
    return ShapeEntries(
        shape=_layer(fields["shape"], f"{where}.shape"),
        commit=text_of(fields["commit"], f"{where}.commit"),
        versions=tuple(text_of(item, f"{where}.versions") for item in versions),
        seed=int_of(fields["seed"], f"{where}.seed", least=0),
        entries=tuple(_entry(item, f"{where}.entries[{i}]") for i, item in enumerate(entries)),
    )


def table_from_json(text: str, what: str) -> ConfigTable:
    """Read a table.

    Args:
        text: JSON.
        what: What it is, for the message of an error: the file, say.

    Returns:
        The table.

    Raises:
        ConfigError: It is not JSON, of another format or version, or a name or value is not accepted.
    """
    fields = fields_of(
        parse_json(text, what), what, required=("format", "version", "device", "shapes")
    )
    if fields["format"] != _FORMAT or fields["version"] != _VERSION:
        raise ConfigError(
            f"{what} is of format {fields['format']!r}, version {fields['version']!r}; accepted is {_FORMAT!r}, "
            f"version {_VERSION}: write it again with routing-replay tune"
        )
    shapes = items_of(fields["shapes"], f"{what}.shapes")
    try:
        return ConfigTable(
            device=_device(fields["device"], f"{what}.device"),
            shapes=tuple(_shape(item, f"{what}.shapes[{i}]") for i, item in enumerate(shapes)),
        )
    except ConfigError as err:
        prefix = "" if str(err).startswith(what) else f"{what}: "
        raise ConfigError(f"{prefix}{err}") from err


def table_to_json(table: ConfigTable) -> str:
    """Write a table.

    Args:
        table: The table.

    Returns:
        JSON that `table_from_json` reads back to an equal table; an entry has a line of its own.
    """
    shapes: list[str] = []
    for item in table.shapes:
        head = {"shape": asdict(item.shape), "commit": item.commit, "versions": item.versions}
        lines = [f"   {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        entries = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in item.entries)
        lines += [
            f'   "seed": {item.seed},',
            '   "entries": [',
            *([entries] if entries else []),
            "   ]",
        ]
        shapes.append("\n".join(["  {", *lines, "  }"]))
    body = ",\n".join(shapes)
    return "\n".join(
        [
            "{",
            f' "format": {json.dumps(_FORMAT)},',
            f' "version": {_VERSION},',
            f' "device": {json.dumps(asdict(table.device))},',
            ' "shapes": [' + (f"\n{body}\n ]" if body else "]"),
            "}",
            "",
        ]
    )


def read_table(path: Path) -> ConfigTable:
    """Read a table's file.

    Args:
        path: The file.

    Returns:
        The table.

    Raises:
        ConfigError: It is not such a table.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path} is not UTF-8: {err}; accepted is a table in JSON") from err
    return table_from_json(text, str(path))


def write_table(path: Path, table: ConfigTable) -> None:
    """Write a table's file, whole or not at all.

    Args:
        path: The file; an older one is replaced.
        table: The table.

    Raises:
        OSError: The folder cannot be written to.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(table_to_json(table))
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
