"""Arrays of routed experts out of what engines send: base64, `.npy`, bare bytes, structs, nested lists."""

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._dtype import IntArray

Wire = str | bytes | Mapping[str, object] | Sequence[object] | npt.NDArray[np.generic]
"""What an engine hands out: base64 text, bytes, a struct, nested lists, or an array."""

_DTYPES = ("uint8", "uint16", "int8", "int16", "int32", "int64")


def decode_base64(text: str | bytes, *, name: str) -> bytes:
    """Decode base64, refusing anything but its alphabet.

    Raises:
        TraceFormatError: It is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise TraceFormatError(
            f"{name} is not base64 ({err}): {_start(text)}; pass the field as the engine sent it"
        ) from err


def decode_npy(data: bytes, *, name: str) -> IntArray:
    """Decode an `.npy` of integers without a copy, and without ever unpickling.

    Raises:
        TraceFormatError: It is no `.npy` of version 1 or 2, is cut off or too long, or holds something else.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise TraceFormatError(
                f"{name} is an .npy of version {version}; accepted are (1, 0) and (2, 0)"
            )
    except TraceFormatError:
        raise
    except Exception as err:  # what a damaged header makes numpy raise is not documented
        raise TraceFormatError(
            f"{name} is no .npy file ({err}): {_start(data)}; pass the field as the engine sent it"
        ) from err
    if dtype.kind not in "iu":
        raise TraceFormatError(f"{name} holds dtype {dtype}; accepted are integers")
    flat = from_bytes(data, dtype, shape, name=name, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def from_bytes(
    data: bytes, dtype: np.dtype[np.generic], shape: Sequence[int], *, name: str, offset: int = 0
) -> IntArray:
    """View bytes as a flat array that must have as many elements as a shape says.

    Raises:
        TraceFormatError: A size is negative, or the bytes are too few or too many.
    """
    if any(type(size) is not int or size < 0 for size in shape):
        raise TraceFormatError(f"{name} has shape {list(shape)}; accepted are sizes of 0 or more")
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - offset != needed:
        raise TraceFormatError(
            f"{name} has {len(data) - offset} bytes, but shape {list(shape)} of {dtype} takes {needed}; the field was cut "
            "off, or its dtype or shape is another"
        )
    return cast("IntArray", np.frombuffer(data, dtype, offset=offset))


def decode_struct(struct: Mapping[str, object], *, name: str) -> IntArray:
    """Decode `{"data": base64 or bytes, "shape": [...], "dtype": "uint8"}`.

    Raises:
        TraceFormatError: An entry is missing or not of its kind, or they contradict each other.
    """
    data, shape, dtype = (struct.get(key) for key in ("data", "shape", "dtype"))
    if dtype not in _DTYPES:
        raise TraceFormatError(f"{name}.dtype is {dtype!r}; accepted are {', '.join(_DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(type(size) is int for size in shape):
        raise TraceFormatError(f"{name}.shape is {shape!r}; accepted is a list of sizes")
    if isinstance(data, str):
        data = decode_base64(data, name=f"{name}.data")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TraceFormatError(f"{name}.data is a {type(data).__name__}; accepted are base64 text and bytes")  # fmt: skip
    little = np.dtype(str(dtype)).newbyteorder("<")
    return from_bytes(bytes(data), little, shape, name=name).reshape(shape)


def array_of(value: Wire, *, name: str) -> IntArray:
    """Decode any form that says its own shape: base64 or bytes of an `.npy`, a struct, nested lists, an array.

    Raises:
        TraceFormatError: It is none of them, or damaged.
    """
    if isinstance(value, str):
        return decode_npy(decode_base64(value, name=name), name=name)
    if isinstance(value, bytes):
        is_npy = value.startswith(b"\x93NUMPY")
        return decode_npy(value if is_npy else decode_base64(value, name=name), name=name)
    if isinstance(value, Mapping):
        return decode_struct(value, name=name)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as err:  # ragged lists, tensors on a GPU
        raise TraceFormatError(f"{name} is no array of integers ({err})") from err
    if array.dtype.kind not in "iu" and array.size:
        raise TraceFormatError(f"{name} has dtype {array.dtype}; accepted are integers")
    return cast("IntArray", array)


def _start(data: str | bytes) -> str:
    return f"it starts with {data[:32]!r}" if data else "it is empty"
