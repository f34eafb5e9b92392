"""Fields of a fixed number of bits, one after the other, least significant bit first."""

import numpy as np
from numpy.typing import NDArray

from routing_replay.trace._set_code import LIMB_BITS

_LIMB_BYTES = LIMB_BITS // 8


def pack_fields(limbs: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Write fields of `width` bits.

    Args:
        limbs: int64 `[limbs, n]`, 56 bits each, lowest limb first.
        width: Bits of a field.

    Returns:
        uint8 `[ceil(n * width / 8)]`; bit b of the stream is bit b % 8 of byte b // 8, unused last bits are 0.
    """
    num_fields = limbs.shape[1]
    octets = np.ascontiguousarray(limbs.T, "<i8").view(np.uint8).reshape(num_fields, -1, 8)
    octets = np.ascontiguousarray(octets[..., :_LIMB_BYTES]).reshape(num_fields, -1)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little")


def unpack_fields(
    data: NDArray[np.uint8], num_fields: int, width: int, num_limbs: int
) -> NDArray[np.int64]:
    """Read fields of `width` bits; the inverse of `pack_fields`.

    Args:
        data: uint8, at least `ceil(num_fields * width / 8)`.
        num_fields: How many fields.
        width: Bits of a field.
        num_limbs: Limbs of a field.

    Returns:
        int64 `[limbs, num_fields]`.
    """
    bits = np.unpackbits(data, count=num_fields * width, bitorder="little").reshape(
        num_fields, width
    )
    octets = np.zeros((num_fields, num_limbs * _LIMB_BYTES), np.uint8)
    packed = np.packbits(bits, axis=1, bitorder="little")
    octets[:, : packed.shape[1]] = packed
    words = np.zeros((num_fields, num_limbs, 8), np.uint8)
    words[..., :_LIMB_BYTES] = octets.reshape(num_fields, num_limbs, _LIMB_BYTES)
    return np.ascontiguousarray(words.view("<i8")[..., 0].T, np.int64)
