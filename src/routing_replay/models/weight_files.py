"""Safetensors files: what they hold, and reading it into place in large pieces, several files at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routing_replay.errors import ConfigError, UnsupportedModelError

__all__ = ["StoredTensor", "list_tensors", "read_tensors"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_READERS = 8
_RUN_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20  # two for each reader


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        path: The file.
        dtype: Its data type there.
        shape: Its shape.
        offset: Its first byte in the file.
        num_bytes: Its size there.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        weight_map: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    raise ConfigError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}; pass a folder written by save_pretrained, with safetensors"
    )


def _unreadable(path: Path, reason: object) -> ConfigError:
    return ConfigError(f"{path} cannot be read ({reason}); copy the checkpoint again")


def _file_tensors(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks the header against the file's length
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (OSError, SafetensorError) as err:
        raise _unreadable(path, err) from err
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} in {path} is {entry['dtype']}; supported are {', '.join(_DTYPES)}: convert the checkpoint"
            )
        begin, end = entry["data_offsets"]
        yield StoredTensor(
            name=name,
            path=path,
            dtype=_DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=8 + size + begin,
            num_bytes=end - begin,
        )


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint; only headers are read.

    Args:
        folder: A folder with safetensors, in one file or sharded.

    Returns:
        Where each tensor lies, by name.

    Raises:
        ConfigError: There are no such files, one cannot be read, or a tensor is in two of them.
        UnsupportedModelError: A tensor is not of floats of 16, 32 or 64 bits.
    """
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        for stored in _file_tensors(path):
            if stored.name in found:
                first = found[stored.name].path.name
                raise ConfigError(
                    f"{folder} holds {stored.name} in {first} and in {path.name}; copy the checkpoint again"
                )
            found[stored.name] = stored
    return found


def _runs(
    wanted: Iterable[tuple[StoredTensor, Sequence[Tensor]]],
) -> list[list[tuple[StoredTensor, Sequence[Tensor]]]]:
    """Tensors that follow each other in a file, in pieces of work of equal size."""
    ordered = sorted(wanted, key=lambda item: (item[0].path, item[0].offset))
    runs: list[list[tuple[StoredTensor, Sequence[Tensor]]]] = []
    room = 0
    for item in ordered:
        stored = item[0]
        if not runs or runs[-1][-1][0].path != stored.path or room < stored.num_bytes:
            runs.append([])
            room = _RUN_BYTES
        runs[-1].append(item)
        room -= stored.num_bytes
    return runs


def _read(file: BinaryIO, offset: int, target: Tensor) -> None:
    """Fill a uint8 tensor in host memory."""
    view = memoryview(target.numpy())  # pyright: ignore[reportArgumentType] - numpy arrays are buffers
    file.seek(offset)
    while view:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue] - an unbuffered file has it
        if not count:
            raise OSError("the file ended early")
        view = view[count:]


class _Staging:
    """Two pieces of host memory that take turns: one is filled while the other is copied to the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        pieces = 2 if self._on_gpu else 1
        self._pieces = [
            torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu)
            for _ in range(pieces)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * pieces
        self._turn = 0

    def next(self, num_bytes: int) -> Tensor:
        """A piece that no copy reads any more."""
        self._turn = (self._turn + 1) % len(self._pieces)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        return self._pieces[self._turn][:num_bytes]

    def mark(self) -> None:
        """The copies from the current piece are queued."""
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event


def _place(target: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Round to the model's dtype first: a place in float32 may hold bfloat16 values."""
    if values.dtype != dtype:
        values = values.to(target.device, non_blocking=True).to(dtype)
    target.copy_(values, non_blocking=True)


def _read_tensor(
    file: BinaryIO,
    stored: StoredTensor,
    places: Sequence[Tensor],
    staging: _Staging,
    dtype: torch.dtype,
) -> None:
    targets = [place.detach().view(-1) for place in places]
    first = targets[0]
    if first.device.type == "cpu" and first.dtype == stored.dtype == dtype:
        _read(file, stored.offset, first.view(torch.uint8))
        for other in targets[1:]:
            other.copy_(first)
        return
    item = stored.dtype.itemsize
    for begin in range(0, stored.num_bytes, _CHUNK_BYTES):
        piece = staging.next(min(_CHUNK_BYTES, stored.num_bytes - begin))
        _read(file, stored.offset + begin, piece)
        rows = slice(begin // item, (begin + len(piece)) // item)
        for target in targets:
            _place(target[rows], piece.view(stored.dtype), dtype)
        staging.mark()


def _read_run(
    run: list[tuple[StoredTensor, Sequence[Tensor]]],
    dtype: torch.dtype,
    stream: torch.cuda.Stream | None,
) -> None:
    path = run[0][0].path
    try:
        with torch.no_grad(), torch.cuda.stream(stream), path.open("rb", buffering=0) as file:
            staging = _Staging(run[0][1][0].device)
            for stored, places in run:
                _read_tensor(file, stored, places, staging, dtype)
    except OSError as err:
        raise _unreadable(path, err) from err


def read_tensors(
    wanted: Iterable[tuple[StoredTensor, Sequence[Tensor]]], *, dtype: torch.dtype
) -> None:
    """Read tensors into their places, rounded to the model's dtype.

    Files are read in large pieces by a few threads; on a GPU through pinned memory, copies beside reads.

    Args:
        wanted: Tensors, and the places of each: contiguous, of its number of elements, all on one device.
        dtype: The model's.

    Raises:
        ConfigError: A file cannot be read; some places have been written.

    Runtime: returns when everything is in place; 32 MiB of pinned memory a thread on a GPU, whose copies follow the
        work on the current stream; no gradients.
    """
    runs = _runs(wanted)
    if not runs:
        return
    device = runs[0][0][1][0].device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    num_readers = min(_MAX_READERS, 2 * (os.cpu_count() or 1), len(runs))
    with ThreadPoolExecutor(num_readers, "weights") as pool:
        readings = [pool.submit(_read_run, run, dtype, stream) for run in runs]
        try:
            for reading in readings:
                reading.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if stream is not None:
        stream.synchronize()
