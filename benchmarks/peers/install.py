"""Unpack packs of peers where they are to run.

python benchmarks/peers/install.py build/peers/sglang build/peers/vllm --site /tmp/peers

A pack whose parts come in several transfers is unpacked when the last one is there; parts wait in `<site>/.parts`.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from packs import PackError

__all__ = ["install"]

_INSTALLED = ".packs.json"


def install(folders: Iterable[Path], site: Path) -> list[str]:
    """Unpack what is in some folders, and in folders below them.

    Args:
        folders: `build/peers/<name>`, or single parts below it.
        site: Folder that is made and filled.

    Returns:
        One line per pack: that it is unpacked, or which parts it still lacks.

    Raises:
        PackError: A folder holds no pack, or an archive is not the one that was built.
    """
    waiting = site / ".parts"
    names: dict[str, None] = {}
    for folder in folders:
        found = sorted(folder.rglob("pack.json"))
        if not found:
            raise PackError(
                f"{folder} holds no pack; build it with benchmarks/peers/build_packs.py"
            )
        for description in found:
            part = json.loads(description.read_text())
            target = waiting / part["sha256"] / str(part["part"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(description.with_name("archive"), target)
            (target.parent / "pack.json").write_text(json.dumps(part))
            names[part["sha256"]] = None
    return [_unpack(waiting / name, site) for name in names]


def _unpack(folder: Path, site: Path) -> str:
    """Unpack an archive whose parts are all there."""
    pack = json.loads((folder / "pack.json").read_text())
    parts = [folder / str(number) for number in range(1, pack["parts"] + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        return f"{pack['pack']}: waits for part {', '.join(missing)} of {pack['parts']}"
    archive = folder / "archive"
    with archive.open("wb") as target:
        for part in parts:
            target.write(part.read_bytes())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != pack["sha256"]:
        raise PackError(
            f"archive of {pack['pack']} has SHA-256 {digest}, not {pack['sha256']}; carry it again"
        )
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as entries:
        entries.extractall(site, filter="data")
    shutil.rmtree(folder)
    record = site / _INSTALLED
    installed = json.loads(record.read_text()) if record.exists() else {}
    installed[pack["pack"]] = {"paths": pack["paths"], "wheels": pack["wheels"]}
    record.write_text(json.dumps(installed))
    return f"{pack['pack']}: {pack['files']} files, {pack['bytes_unpacked']} bytes"


def main() -> None:
    """Unpack the named folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--site", type=Path, required=True)
    arguments = parser.parse_args()
    for line in install(arguments.folders, arguments.site):
        print(line, flush=True)


if __name__ == "__main__":
    main()
