"""Payload codecs: how the arrays of a trace become bytes.

The header of a file names its codec, and a reader that does not know the name refuses the file. A
codec added later leaves files of the others, and their readers, as they are.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._json import describe


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionSpec:
    """An array as the layout of its trace demands it, known before any payload is read.

    Attributes:
        name: Section name, such as `ids`.
        dtype: Little-endian dtype of the decoded array.
        shape: Shape of the decoded array.
        num_experts: Routed experts of the model, for codecs of ids.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    num_experts: int

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array, in integers that cannot overflow."""
        return math.prod(self.shape) * self.dtype.itemsize


class PayloadCodec(Protocol):
    """Turns one array at a time into bytes and back."""

    @property
    def name(self) -> str:
        """The codec's name in the header."""
        ...

    def check_nbytes(self, spec: SectionSpec, nbytes: int) -> None:
        """Refuse a stored size that `spec` cannot have, before anything is allocated.

        Raises:
            TraceFormatError: The size is impossible.
        """
        ...

    def encode(self, spec: SectionSpec, array: npt.NDArray[np.generic]) -> bytes:
        """Return the stored bytes of an array that fits `spec`."""
        ...

    def decode(self, spec: SectionSpec, data: memoryview) -> npt.NDArray[np.generic]:
        """Return the array, which may be a view of `data`.

        Raises:
            TraceFormatError: The bytes do not encode an array that fits `spec`.
        """
        ...


class RawCodec:
    """Stores arrays as their little-endian bytes in C order."""

    name = "raw"

    def check_nbytes(self, spec: SectionSpec, nbytes: int) -> None:
        """Accept exactly the bytes of the array."""
        if nbytes != spec.nbytes:
            raise TraceFormatError(
                f"section {spec.name} has nbytes = {nbytes} but {spec.dtype.name}"
                f" {list(spec.shape)} takes {spec.nbytes} bytes in codec raw"
            )

    def encode(self, spec: SectionSpec, array: npt.NDArray[np.generic]) -> bytes:
        """Copy the array's bytes."""
        return array.astype(spec.dtype, copy=False).tobytes(order="C")

    def decode(self, spec: SectionSpec, data: memoryview) -> npt.NDArray[np.generic]:
        """View the bytes as the array."""
        if spec.dtype.kind == "b":
            _check_bools(spec, np.frombuffer(data, dtype=np.uint8))
        return np.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)


def _check_bools(spec: SectionSpec, stored: npt.NDArray[np.uint8]) -> None:
    """Refuse bytes other than 0 and 1, which numpy would read as a bool of no defined value."""
    other = np.flatnonzero(stored > 1)
    if other.size:
        first = int(other[0])
        raise TraceFormatError(
            f"section {spec.name} holds the byte {int(stored[first])} at row {first}; it must be 0"
            f" or 1"
        )


def codec_by_name(name: str) -> PayloadCodec:
    """Return the codec that a header names.

    Raises:
        TraceFormatError: This version of the library does not know the codec.
    """
    if name == RawCodec.name:
        return RawCodec()
    raise TraceFormatError(
        f"codec = {describe(name)} is not known; this version reads {RawCodec.name!r}; write the trace with"
        f" that codec, or read it with a newer routing-replay"
    )
