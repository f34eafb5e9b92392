"""Payload codecs: how the arrays of a trace become bytes.

The header of a file names its codec, and a reader that does not know the name refuses the file. A
codec added later leaves files of the others, and their readers, as they are.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError, IntegrationError, TraceFormatError
from routing_replay.trace._bits import pack_fields, unpack_fields
from routing_replay.trace._json import describe
from routing_replay.trace._set_code import SetCode, rank_width, set_code

# So many sets are ranked at once that their columns stay in the cache; a multiple of 8, so that bytes are not shared.
_FIELDS_AT_ONCE = 1 << 14
_ZSTD_LEVEL = 3


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

    @property
    def keeps_order(self) -> bool:
        """Whether the order of a row's ids survives."""
        ...

    def stored_nbytes(self, spec: SectionSpec) -> int | None:
        """Return the stored bytes of an array that fits `spec`, or None where they depend on its content.

        Raises:
            TraceFormatError: The codec cannot store such an array.
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
    keeps_order = True

    def stored_nbytes(self, spec: SectionSpec) -> int | None:
        """Return exactly the bytes of the array."""
        return spec.nbytes

    def encode(self, spec: SectionSpec, array: npt.NDArray[np.generic]) -> bytes:
        """Copy the array's bytes."""
        return array.astype(spec.dtype, copy=False).tobytes(order="C")

    def decode(self, spec: SectionSpec, data: memoryview) -> npt.NDArray[np.generic]:
        """View the bytes as the array."""
        if spec.dtype.kind == "b":
            _check_bools(spec, np.frombuffer(data, dtype=np.uint8))
        return np.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)


class PackedCodec:
    """Stores the ids of a row and layer as a set, in about log2 C(E, K) bits, and `valid` as bits; the rest raw."""

    name = "packed"
    keeps_order = False

    def stored_nbytes(self, spec: SectionSpec) -> int | None:
        """Return the bytes of the fields."""
        if spec.name == "ids":
            num_fields = math.prod(spec.shape[:-1])
            return -(-num_fields * rank_width(spec.num_experts, spec.shape[-1]) // 8)
        if spec.name == "valid":
            return -(-spec.shape[0] // 8)
        return spec.nbytes

    def encode(self, spec: SectionSpec, array: npt.NDArray[np.generic]) -> bytes:
        """Rank the sets, a few thousand at a time, and write the ranks as fields of bits."""
        if spec.name == "valid":
            return np.packbits(array.view(np.uint8), bitorder="little").tobytes()
        if spec.name != "ids":
            return RawCodec().encode(spec, array)
        code = self._code(spec)
        columns = array.reshape(-1, code.top_k)
        chunks: list[bytes] = []
        for start in range(0, len(columns), _FIELDS_AT_ONCE):
            chunk = np.ascontiguousarray(columns[start : start + _FIELDS_AT_ONCE].T)
            ranks = code.rank(cast("npt.NDArray[np.integer]", chunk))
            chunks.append(pack_fields(ranks, code.width).tobytes())
        return b"".join(chunks)

    def decode(self, spec: SectionSpec, data: memoryview) -> npt.NDArray[np.generic]:
        """Read the fields, refusing ranks that are no set's and last bits that are not zero."""
        if spec.name not in ("ids", "valid"):
            return RawCodec().decode(spec, data)
        octets = np.frombuffer(data, dtype=np.uint8)
        if spec.name == "valid":
            _check_last_bits(spec, octets, spec.shape[0])
            return np.unpackbits(octets, count=spec.shape[0], bitorder="little").view(np.bool_)
        code = self._code(spec)
        num_fields = math.prod(spec.shape[:-1])
        _check_last_bits(spec, octets, num_fields * code.width)
        ids = np.empty((num_fields, code.top_k), spec.dtype)
        for start in range(0, num_fields, _FIELDS_AT_ONCE):
            count = min(_FIELDS_AT_ONCE, num_fields - start)
            first = start * code.width // 8  # whole bytes: _FIELDS_AT_ONCE is a multiple of 8
            ranks = unpack_fields(octets[first:], count, code.width, code.num_limbs)
            bad = code.first_too_large(ranks)
            if bad is not None:
                row, slot = divmod(start + bad, spec.shape[1])
                raise TraceFormatError(
                    f"section ids: row {row}, layer slot {slot} has the rank {code.value(ranks, bad)}, not below "
                    f"C({code.num_experts}, {code.top_k}) = {code.num_sets}; the file is damaged"
                )
            ids[start : start + count] = code.unrank(ranks).T
        return ids.reshape(spec.shape)

    @staticmethod
    def _code(spec: SectionSpec) -> SetCode:
        return set_code(spec.num_experts, spec.shape[-1])


class ZstdCodec:
    """Compresses what another codec stores, each section as one zstd frame.

    Args:
        inner: The other codec.
    """

    def __init__(self, inner: PayloadCodec) -> None:
        self._inner = inner

    @property
    def name(self) -> str:
        """The inner codec's name and `+zstd`."""
        return f"{self._inner.name}+zstd"

    @property
    def keeps_order(self) -> bool:
        """As the inner codec."""
        return self._inner.keeps_order

    def stored_nbytes(self, spec: SectionSpec) -> int | None:
        """Return 0 where the inner codec stores nothing, otherwise None: it depends on the content."""
        return 0 if self._inner.stored_nbytes(spec) == 0 else None

    def encode(self, spec: SectionSpec, array: npt.NDArray[np.generic]) -> bytes:
        """Compress in one frame that names its size; nothing needs no frame."""
        plain = self._inner.encode(spec, array)
        if not plain:
            return b""
        return _zstandard().ZstdCompressor(level=_ZSTD_LEVEL).compress(plain)

    def decode(self, spec: SectionSpec, data: memoryview) -> npt.NDArray[np.generic]:
        """Decompress, once the frame is known to hold exactly what the header demands."""
        wanted = self._inner.stored_nbytes(spec)
        assert wanted is not None
        plain = self._decompress(spec, data, wanted) if wanted else b""
        return self._inner.decode(spec, memoryview(plain))

    @staticmethod
    def _decompress(spec: SectionSpec, data: memoryview, wanted: int) -> bytes:
        zstandard = _zstandard()
        try:
            # Before anything is decompressed: a lying size is what makes a small frame a large one.
            found = zstandard.frame_content_size(data)
            if found != wanted:
                says = (
                    "does not say how many bytes it holds" if found < 0 else f"holds {found} bytes"
                )
                raise TraceFormatError(
                    f"section {spec.name}: its zstd frame {says}; the header demands {wanted}"
                )
            plain: bytes = zstandard.ZstdDecompressor().decompress(
                data, max_output_size=wanted, allow_extra_data=False
            )
        except zstandard.ZstdError as err:
            raise TraceFormatError(
                f"section {spec.name} is not one zstd frame ({err}); the file is damaged"
            ) from err
        if len(plain) != wanted:
            raise TraceFormatError(
                f"section {spec.name}: its zstd frame gave {len(plain)} bytes; the header demands {wanted}"
            )
        return plain


def _zstandard() -> ModuleType:
    """The compressor, which the numpy-only core does not install."""
    try:
        import zstandard
    except ModuleNotFoundError as err:
        raise IntegrationError(
            "codecs with zstd need the package zstandard, which is missing: pip install zstandard"
        ) from err
    return zstandard


def _check_last_bits(spec: SectionSpec, octets: npt.NDArray[np.uint8], num_bits: int) -> None:
    """Refuse bits behind the last field that are not zero."""
    used = num_bits % 8
    if used and int(octets[-1]) >> used:
        raise TraceFormatError(
            f"section {spec.name}: the last byte is {int(octets[-1]):#04x}, but only its lowest {used} bits are used; "
            "the file is damaged"
        )


def _check_bools(spec: SectionSpec, stored: npt.NDArray[np.uint8]) -> None:
    """Refuse bytes other than 0 and 1, which numpy would read as a bool of no defined value."""
    other = np.flatnonzero(stored > 1)
    if other.size:
        first = int(other[0])
        raise TraceFormatError(
            f"section {spec.name} holds the byte {int(stored[first])} at row {first}; it must be 0"
            f" or 1"
        )


_CODECS: tuple[PayloadCodec, ...] = (
    RawCodec(),
    PackedCodec(),
    ZstdCodec(RawCodec()),
    ZstdCodec(PackedCodec()),
)

CODEC_NAMES = tuple(codec.name for codec in _CODECS)
"""Every codec, by its name in headers and arguments."""


def codec_named(name: str) -> PayloadCodec | None:
    """Return the codec of a name, or None where this version of the library does not know it."""
    return next((codec for codec in _CODECS if codec.name == name), None)


def chosen_codec(name: str) -> PayloadCodec:
    """Return the codec that a caller asks for.

    Raises:
        ConfigError: There is no such codec.
    """
    codec = codec_named(name)
    if codec is None:
        raise ConfigError(f"codec={name!r}; accepted are {', '.join(map(repr, CODEC_NAMES))}")
    return codec


def stored_codec(name: str) -> PayloadCodec:
    """Return the codec that a header names.

    Raises:
        TraceFormatError: This version of the library does not know the codec.
    """
    codec = codec_named(name)
    if codec is None:
        raise TraceFormatError(
            f"codec = {describe(name)} is not known; this version knows {', '.join(map(repr, CODEC_NAMES))}; read the "
            "trace with a newer routing-replay"
        )
    return codec
