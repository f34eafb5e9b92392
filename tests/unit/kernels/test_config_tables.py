"""Tables of configurations as files: strict reading, whole writing, and the ones that are shipped."""

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts.choosing import choose_config
from routing_replay.kernels.experts.tables import ConfigTables, LayerShape, read_table, write_table

TILE = {"rows": 64, "depth": 64, "stages": 4, "warps": 4}
LAYER = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_experts": 128,
    "num_local_experts": 128,
    "top_k": 8,
    "is_gated": True,
}


def _entry(least: int, measured: int, most: int) -> dict[str, Any]:
    return {
        "min_tokens": least,
        "max_tokens": most,
        "measured_tokens": measured,
        "config": {"engine": "hopper", "tile_tokens": 16, "gemm1": TILE, "gemm2": TILE},
        "microseconds": 33.25,
        "rule_microseconds": 40,
    }


def _record() -> dict[str, Any]:
    entries = [_entry(1, 1, 1), _entry(2, 4, 8)]
    shape = {"shape": LAYER, "commit": "0" * 12, "versions": ["torch 2.11.0"], "seed": 0, "entries": entries}  # fmt: skip
    return json.loads(
        json.dumps(
            {
                "format": "routing-replay experts configurations",
                "version": 1,
                "device": {"name": "A", "capability": [9, 0], "num_sms": 132},
                "shapes": [shape],
            }
        )
    )


def _write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


def test_table_survives_its_file(tmp_path: Path):
    table = read_table(_write(tmp_path / "a.json", _record()))
    write_table(tmp_path / "b.json", table)
    assert read_table(tmp_path / "b.json") == table
    assert json.loads((tmp_path / "b.json").read_text()) == _record()
    lines = (tmp_path / "b.json").read_text().splitlines()
    assert sum('"measured_tokens"' in line for line in lines) == 2
    assert [entry.measured_tokens for entry in table.shapes[0].entries] == [1, 4]


def test_written_table_is_whole_or_the_older_one(tmp_path: Path):
    path = tmp_path / "a.json"
    write_table(path, read_table(_write(path, _record())))
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_table(path, object())  # type: ignore[arg-type]
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_new_measurement_takes_the_place_of_the_older(tmp_path: Path):
    table = read_table(_write(tmp_path / "a.json", _record()))
    measured = table.shapes[0]
    assert table.with_shape(measured) == table
    other = LayerShape(
        hidden_size=64, intermediate_size=64, num_experts=8, num_local_experts=8, top_k=2
    )
    added = table.with_shape(
        type(measured)(shape=other, commit="c", versions=(), seed=1, entries=())
    )
    assert [item.shape for item in added.shapes] == [measured.shape, other]
    assert added.with_shape(measured).shapes == (added.shapes[1], measured)


def test_own_file_comes_before_the_tables_of_the_package(tmp_path: Path):
    tables = ConfigTables.from_file(_write(tmp_path / "a.json", _record()))
    assert tables.tables[1:] == ConfigTables.shipped().tables
    shape = LayerShape(**LAYER).with_tokens(4)
    config = choose_config(shape, capability=(9, 0), tables=tables)
    assert config == tables.tables[0].shapes[0].entries[1].config


def test_shipped_tables_can_be_read_and_lie_in_the_package():
    folder = resources.files("routing_replay.kernels.experts.tables")
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".json"))
    shipped = ConfigTables.shipped()
    assert "h100.json" in names
    assert len(shipped.tables) == len(names)
    assert shipped is ConfigTables.shipped()
    assert len({table.device.name for table in shipped.tables}) == len(names)
    for table in shipped.tables:
        for measured in table.shapes:
            assert measured.entries, f"{measured.shape} has no entry"
            assert not measured.commit.endswith("-dirty")


Change = Callable[[dict[str, Any]], object]


def _shape(record: dict[str, Any]) -> dict[str, Any]:
    return record["shapes"][0]


def _first(record: dict[str, Any]) -> dict[str, Any]:
    return _shape(record)["entries"][0]


BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "other format": (lambda r: r.update(format="tiles"), ("'tiles'", "accepted is")),
    "other version": (lambda r: r.update(version=2), ("version 2", "routing-replay tune")),
    "unknown name": (lambda r: r.update(shape=1), ("'shape'", "did you mean 'shapes'")),
    "no device": (lambda r: r.pop("device"), ("no 'device'",)),
    "device is a text": (lambda r: r.update(device="A"), ("device is 'A'",)),
    "empty name": (lambda r: r["device"].update(name=""), ("device.name is ''",)),
    "one number": (lambda r: r["device"].update(capability=[9]), ("[9]", "two integers")),
    "number as text": (lambda r: r["device"].update(capability=["9", 0]), ("'9'", "integer")),
    "no processors": (lambda r: r["device"].update(num_sms=0), ("num_sms is 0", "1 or more")),
    "shapes is an object": (lambda r: r.update(shapes={}), ("shapes is {}", "a list")),
    "shape twice": (lambda r: r["shapes"].append(_shape(r)), ("two lists", "768")),
    "no size": (lambda r: _shape(r)["shape"].pop("top_k"), ("shapes[0].shape", "no 'top_k'")),
    "size is a float": (lambda r: _shape(r)["shape"].update(top_k=8.0), ("top_k is 8.0",)),
    "gate is a number": (lambda r: _shape(r)["shape"].update(is_gated=1), ("is_gated is 1",)),
    "commit is empty": (lambda r: _shape(r).update(commit=""), ("commit is ''",)),
    "version is a number": (lambda r: _shape(r).update(versions=[2.11]), ("2.11", "a text")),
    "negative seed": (lambda r: _shape(r).update(seed=-1), ("seed is -1", "0 or more")),
    "no microseconds": (lambda r: _first(r).pop("microseconds"), ("entries[0]", "'microseconds'")),
    "zero microseconds": (lambda r: _first(r).update(microseconds=0), ("microseconds is 0",)),
    "time is a text": (lambda r: _first(r).update(rule_microseconds="1"), ("is '1'", "a number")),
    "time is true": (lambda r: _first(r).update(microseconds=True), ("is True", "a number")),
    "no engine": (lambda r: _first(r)["config"].pop("engine"), ("config", "no 'engine'")),
    "bad engine": (lambda r: _first(r)["config"].update(engine="gluon"), ("'gluon'", "hopper")),
    "tile of 24": (lambda r: _first(r)["config"].update(tile_tokens=24), ("tile_tokens=24", "entry of 1 tokens")),
    "tile field": (lambda r: _first(r)["config"].update(gemm1={**TILE, "ctas": 2}), ("'ctas'",)),
    "range backwards": (lambda r: _first(r).update(max_tokens=0), ("max_tokens is 0",)),
    "not in its range": (lambda r: _first(r).update(measured_tokens=2), ("2 measured", "1 to 1")),
    "ranges overlap": (lambda r: _shape(r)["entries"][1].update(min_tokens=1), ("1 to 8", "1 to 1")),
    "ranges out of order": (lambda r: _shape(r)["entries"].reverse(), ("1 to 1", "2 to 8")),
    "not of the device": (lambda r: r["device"].update(capability=[8, 0]), ("engine='hopper'", "(8, 0)")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_table_is_refused_with_the_file_and_the_value(name: str, tmp_path: Path):
    change, parts = BAD[name]
    record = _record()
    change(record)
    path = _write(tmp_path / "bad.json", record)
    with pytest.raises(ConfigError) as caught:
        read_table(path)
    for part in (*parts, str(path)):
        assert part in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"a":1,"a":2}', b"NaN"])
def test_file_that_is_no_table_is_refused(data: bytes, tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        read_table(path)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1", "1e999"])
def test_time_that_is_no_time_is_refused(value: str, tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(_record()).replace("33.25", value))
    with pytest.raises(ConfigError, match="microseconds is"):
        read_table(path)
