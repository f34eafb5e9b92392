"""Packs of peers: what is taken of a wheel, which GPU code is kept, and how they are unpacked."""

import json
import struct
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import build_packs
from fatbin import FatbinError, keep_architecture
from install import install
from packs import PACKS, Pack, PackError, Wheel

PTX, CODE = 1, 2


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """GPU code as CUDA's tools lay it out."""
    body = b""
    for kind, architecture, payload in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + bytes(12)
        header += struct.pack("<I", architecture)
        body += header + bytes(64 - len(header)) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(section: bytes, name: bytes = b".nv_fatbin") -> bytearray:
    """The smallest ELF file with one section beside that of names."""
    names = b"\0" + name + b"\0.shstrtab\0"
    begin = 64
    table = begin + len(section) + len(names)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)
    make = struct.Struct("<IIQQQQIIQQ")
    sections = bytes(64)
    sections += make.pack(1, 1, 0, 0, begin, len(section), 0, 0, 8, 0)
    sections += make.pack(2 + len(name), 3, 0, 0, begin + len(section), len(names), 0, 0, 1, 0)
    return header + section + names + sections


def test_only_the_machine_code_of_the_architecture_is_kept():
    kept, other = b"K" * 24, b"o" * 40
    data = library(container((CODE, 80, other), (CODE, 90, kept), (PTX, 90, other)))
    size = len(data)
    assert keep_architecture(data, 90) == 80
    assert len(data) == size
    assert kept in data
    assert b"o" not in data


def test_ptx_is_kept_where_the_architecture_has_no_machine_code():
    ptx, future, other = b"P" * 24, b"F" * 16, b"o" * 40
    data = library(container((CODE, 80, other), (PTX, 80, ptx), (PTX, 100, future)))
    assert keep_architecture(data, 90) == 56
    assert ptx in data
    assert b"F" not in data.replace(b"\x7fELF", b"")


def test_containers_are_cut_one_by_one():
    first = container((CODE, 80, b"o" * 8), (CODE, 90, b"K" * 8))
    second = container((PTX, 80, b"P" * 8))
    data = library(first + bytes(8) + second)
    assert keep_architecture(data, 90) == 8
    assert b"K" * 8 in data
    assert b"P" * 8 in data


def test_library_without_gpu_code_stays_as_it_is():
    data = library(b"x" * 16, name=b".text")
    before = bytes(data)
    assert keep_architecture(data, 90) == 0
    assert bytes(data) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytearray(b"MZ" + bytes(100)), "64-bit little-endian ELF"),
        (library(b"\1" * 24), "no container of GPU code at byte 64"),
        (library(container((3, 90, b"x" * 8))), "no entry of GPU code at byte 80"),
        (library(container((CODE, 90, b"x" * 8))[:40]), "no container of GPU code"),
    ],
)
def test_unexpected_layouts_are_refused(data: bytearray, message: str):
    with pytest.raises(FatbinError, match=message):
        keep_architecture(data, 90)


def made_pack(folder: Path, *, part_bytes: int, paths: tuple[str, ...] = ()) -> Pack:
    """Build a pack from a wheel that is made here."""
    downloads = folder / "wheels"
    downloads.mkdir()
    with zipfile.ZipFile(downloads / "some_engine-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_engine/kernels.py", "answer = 42\n")
        wheel.writestr("some_engine/server.py", "raise SystemExit\n")
        wheel.writestr("some_engine/ops.so", bytes(library(container((CODE, 80, b"o" * 64)))))
    wheel = Wheel(requirement="some-engine==1.0", keep=("*/kernels.py", "*.so"))
    pack = Pack(name="some", wheels=(wheel,), paths=paths)
    build_packs.build(pack, downloads, folder / "out", part_bytes)
    return pack


def test_pack_is_built_and_unpacked(tmp_path: Path):
    made_pack(tmp_path, part_bytes=1 << 20, paths=("some_engine",))
    (line,) = install([tmp_path / "out" / "some"], tmp_path / "site")
    assert line.startswith("some: 2 files")
    assert (tmp_path / "site/some_engine/kernels.py").read_text() == "answer = 42\n"
    assert not (tmp_path / "site/some_engine/server.py").exists()
    assert b"o" * 8 not in (tmp_path / "site/some_engine/ops.so").read_bytes()
    record = json.loads((tmp_path / "site/.packs.json").read_text())
    assert record["some"]["paths"] == ["some_engine"]
    assert list(record["some"]["wheels"]) == ["some_engine-1.0-py3-none-any.whl"]


def test_parts_wait_for_each_other(tmp_path: Path):
    made_pack(tmp_path, part_bytes=150)
    parts = sorted((tmp_path / "out/some").iterdir())
    assert len(parts) > 1
    assert all((part / "archive").stat().st_size <= 150 for part in parts)
    for part in parts[:-1]:
        (line,) = install([part], tmp_path / "site")
        assert line.startswith("some: waits for part")
    assert not (tmp_path / "site/some_engine").exists()
    (line,) = install([parts[-1]], tmp_path / "site")
    assert line.startswith("some: 2 files")


def test_new_build_leaves_no_part_of_an_old_one(tmp_path: Path):
    pack = made_pack(tmp_path, part_bytes=150)
    build_packs.build(pack, tmp_path / "wheels", tmp_path / "out", 1 << 20)
    assert [part.name for part in (tmp_path / "out/some").iterdir()] == ["part1"]


def test_damaged_archive_is_refused(tmp_path: Path):
    made_pack(tmp_path, part_bytes=1 << 20)
    archive = tmp_path / "out/some/part1/archive"
    archive.write_bytes(archive.read_bytes()[:-1] + b"!")
    with pytest.raises(PackError, match=r"archive of some has SHA-256 .*carry it again"):
        install([tmp_path / "out" / "some"], tmp_path / "site")


def test_missing_pack_is_refused(tmp_path: Path):
    with pytest.raises(PackError, match="holds no pack; build it with"):
        install([tmp_path], tmp_path / "site")


def test_file_that_a_wheel_no_longer_has_is_refused(tmp_path: Path):
    made_pack(tmp_path, part_bytes=1 << 20)
    wheel = Wheel(requirement="some-engine==1.0", keep=("*/kernels.py", "*/gone.py"))
    with pytest.raises(PackError, match=r"no file \*/gone.py"):
        build_packs.build(
            Pack(name="some", wheels=(wheel,)), tmp_path / "wheels", tmp_path / "out", 1
        )


def test_archives_depend_on_contents_alone():
    files = {"b": b"2", "a": b"1"}
    assert build_packs.archive_of(files) == build_packs.archive_of(dict(reversed(files.items())))


def test_every_requirement_names_one_version():
    for pack in PACKS.values():
        for wheel in pack.wheels:
            name, separator, version = wheel.requirement.partition("==")
            assert name
            assert separator
            assert version[0].isdigit()
