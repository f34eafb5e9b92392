"""Build packs of public peers that a GPU machine without a network can be given; needs a package registry.

python benchmarks/peers/build_packs.py --downloads /tmp/wheels sglang vllm

Each pack becomes `build/peers/<name>/`: an archive, in parts of at most `--part-mib` (all the tracked files of this
repository travel beside one), and `pack.json` with what is in it. Nothing of a peer is kept in the repository.
"""

import argparse
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from fatbin import keep_architecture
from packs import PACKS, Pack, PackError, Wheel

ARCHITECTURE = 90
PYTHON = "3.12"
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28, 31, 34, 35, 39))  # fmt: skip
FILTERS = (
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20},
)


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel for the GPU machine's Python, unless it is there already."""
    name, _, version = wheel.requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
        command += ["--abi", f"cp{PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
        for platform in (*PLATFORMS, "manylinux2014_x86_64", "manylinux1_x86_64", "any"):
            command += ["--platform", platform]
        subprocess.run([*command, "--dest", str(folder), wheel.requirement], check=True)
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise PackError(f"{folder} has {len(found)} wheels of {wheel.requirement}; 1 is needed")
    return found[0]


def wheel_files(path: Path, wheel: Wheel) -> dict[str, bytes]:
    """Return the files of a wheel that are taken, with libraries cut to one generation of GPUs."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/") or not wheel.takes(name):
                continue
            data = archive.read(name)
            if name.endswith(".so"):
                library = bytearray(data)
                keep_architecture(library, ARCHITECTURE)
                data = bytes(library)
            files[name] = data
    for pattern in wheel.keep:
        if not any(Wheel(requirement="", keep=(pattern,)).takes(name) for name in files):
            raise PackError(f"{path.name} has no file {pattern}; the peer's layout has changed")
    return files


def archive_of(files: dict[str, bytes]) -> bytes:
    """Return an archive that depends on names and contents alone."""
    buffer = io.BytesIO()
    with (
        lzma.open(buffer, "wb", filters=list(FILTERS)) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size = len(files[name])
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
    return buffer.getvalue()


def parts_of(data: bytes, limit: int) -> list[bytes]:
    """Cut an archive into as few parts as the limit allows, of about the same size."""
    count = -(-len(data) // limit)
    size = -(-len(data) // count)
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


def build(pack: Pack, downloads: Path, out: Path, part_bytes: int) -> dict[str, object]:
    """Build one pack; return what its `pack.json` says."""
    files: dict[str, bytes] = {}
    wheels: dict[str, str] = {}
    for wheel in pack.wheels:
        path = download(wheel, downloads)
        wheels[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        files |= wheel_files(path, wheel)
    data = archive_of(files)
    folder = out / pack.name
    if folder.exists():
        shutil.rmtree(folder)  # an earlier build may have had more parts
    parts = parts_of(data, part_bytes)
    for number, part in enumerate(parts, 1):
        target = folder / f"part{number}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "archive").write_bytes(part)
        description = {
            "pack": pack.name,
            "part": number,
            "parts": len(parts),
            "sha256": hashlib.sha256(data).hexdigest(),
            "files": len(files),
            "bytes_unpacked": sum(map(len, files.values())),
            "bytes_of_part": len(part),
            "paths": list(pack.paths),
            "wheels": wheels,
        }
        (target / "pack.json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def main() -> None:
    """Build the named packs, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packs", nargs="*", choices=[[], *PACKS], help="all where none is named")
    parser.add_argument("--downloads", type=Path, required=True, help="folder of wheels")
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    parser.add_argument("--part-mib", type=float, default=44)
    arguments = parser.parse_args()
    arguments.downloads.mkdir(parents=True, exist_ok=True)
    for name in arguments.packs or PACKS:
        made = build(
            PACKS[name], arguments.downloads, arguments.out, int(arguments.part_mib * 2**20)
        )
        print(json.dumps({key: made[key] for key in made if key != "wheels"}), flush=True)


if __name__ == "__main__":
    main()
