"""K-sets of experts as numbers: the combinatorial number system, vectorised over rows.

A set c_1 < c_2 < ... < c_K has the rank C(c_1, 1) + C(c_2, 2) + ... + C(c_K, K), a bijection onto [0, C(E, K)) (the
"combinadic", D. H. Lehmer 1964). Ranks are held in limbs of 56 bits, so that sums of up to 128 terms stay below 2^63.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from routing_replay.errors import TraceFormatError

LIMB_BITS = 56
MAX_TABLE_ENTRIES = 1 << 20
_MAX_TOP_K = 128
_LIMB_MASK = (1 << LIMB_BITS) - 1
_FLOAT_BITS = 53


@dataclass(frozen=True, slots=True)
class _Column:
    """What is needed to look up and to find C(c, k) for one k.

    Attributes:
        limbs: int64 `[limbs, E + 2]`, C(c, k) for c in [0, E], and a last entry above every rank.
        mantissa_bits: Mantissa bits of a float64 rank that choose a bucket.
        first: int32 per bucket: the largest c with C(c, k) at most the bucket's lower end.
    """

    limbs: NDArray[np.int64]
    mantissa_bits: int
    first: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SetCode:
    """The code of the K-subsets of E experts.

    Attributes:
        num_experts: E.
        top_k: K.
        width: Bits of a rank.
        columns: One per k, from 1 to K.
    """

    num_experts: int
    top_k: int
    width: int
    columns: tuple[_Column, ...]

    @property
    def num_limbs(self) -> int:
        """Limbs of a rank."""
        return _limbs_of(self.width)

    @property
    def num_sets(self) -> int:
        """C(E, K)."""
        return comb(self.num_experts, self.top_k)

    def value(self, ranks: NDArray[np.int64], position: int) -> int:
        """Return one rank as a number."""
        return sum(int(limb) << (LIMB_BITS * idx) for idx, limb in enumerate(ranks[:, position]))

    def rank(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Rank sets.

        Args:
            ids: `[K, n]`, distinct in each column, in [0, E), in any order.

        Returns:
            int64 `[limbs, n]`.
        """
        ascending = sort_columns(ids)
        ranks = np.zeros((self.num_limbs, ids.shape[1]), np.int64)
        for column, values in zip(self.columns, ascending, strict=True):
            index = values.astype(np.intp)
            for limb, table in enumerate(column.limbs):
                ranks[limb] += table.take(index)
        for limb in range(self.num_limbs - 1):
            ranks[limb + 1] += ranks[limb] >> LIMB_BITS
            ranks[limb] &= _LIMB_MASK
        return ranks

    def unrank(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sets of ranks.

        Args:
            ranks: int64 `[limbs, n]`, each below C(E, K); overwritten.

        Returns:
            int64 `[K, n]`, ascending in each column.
        """
        out = np.empty((self.top_k, ranks.shape[1]), np.int64)
        for k in range(self.top_k, 0, -1):
            column = self.columns[k - 1]
            found = _largest_at_most(column, ranks, is_exact=self.width <= _FLOAT_BITS)
            out[k - 1] = found
            for limb, table in enumerate(column.limbs):
                ranks[limb] -= table.take(found)
            for limb in range(self.num_limbs - 1):  # borrow
                ranks[limb + 1] += ranks[limb] >> LIMB_BITS
                ranks[limb] &= _LIMB_MASK
        return out

    def first_too_large(self, ranks: NDArray[np.int64]) -> int | None:
        """Return the position of the first rank that is no set's, or None."""
        total = self.num_sets
        limit = [(total >> (LIMB_BITS * limb)) & _LIMB_MASK for limb in range(self.num_limbs)]
        # The highest limb may hold one more bit than its share: C(E, K) can be 2^width.
        limit[-1] = total >> (LIMB_BITS * (self.num_limbs - 1))
        is_above = np.ones(ranks.shape[1], np.bool_)
        for limb, bound in zip(ranks, limit, strict=True):
            is_above = (limb > bound) | ((limb == bound) & is_above)
        bad = np.flatnonzero(is_above)
        return int(bad[0]) if bad.size else None


def sort_columns(ids: NDArray[np.integer]) -> list[NDArray[np.integer]]:
    """Sort each column of `[K, n]` by Batcher's odd-even merge network: minimum and maximum of whole rows."""
    rows = [row.copy() for row in ids]
    count = len(rows)
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(min(k, count - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        low, high = rows[i + j], rows[i + j + k]
                        rows[i + j], rows[i + j + k] = np.minimum(low, high), np.maximum(low, high)
            k //= 2
        p *= 2
    return rows


def _compare(
    column: _Column, index: NDArray[np.int64], ranks: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether C(index, k) is at most the rank, limb by limb."""
    at_most = np.ones(len(index), np.bool_)
    for table, limb in zip(column.limbs, ranks, strict=True):
        value = table.take(index)
        at_most = value <= limb if len(ranks) == 1 else (value < limb) | ((value == limb) & at_most)
    return at_most


def _largest_at_most(
    column: _Column, ranks: NDArray[np.int64], *, is_exact: bool
) -> NDArray[np.int64]:
    """The largest c with C(c, k) at most the rank: a bucket by the rank's leading bits, then one exact step."""
    approximate = ranks[-1].astype(np.float64)
    for limb in ranks[-2::-1]:
        approximate = approximate * float(1 << LIMB_BITS) + limb
    bucket = approximate.view(np.int64) >> (52 - column.mantissa_bits)
    bucket -= (1023 << column.mantissa_bits) - 1
    np.maximum(bucket, 0, out=bucket)  # the rank 0 has a bucket of its own
    found = column.first.take(bucket).astype(np.int64)
    if not is_exact:
        # Rounding to float64 may have led past the end of the rank's own bucket.
        found -= ~_compare(column, found, ranks)
    found += _compare(column, found + 1, ranks)
    return found


def _as_limbs(values: list[int], num_limbs: int) -> NDArray[np.int64]:
    rows = [
        [(value >> (LIMB_BITS * limb)) & _LIMB_MASK for value in values]
        for limb in range(num_limbs)
    ]
    return np.array(rows, np.int64)


def _buckets(binomials: list[int], width: int) -> tuple[int, NDArray[np.int32]]:
    """Choose so many mantissa bits that no bucket holds more than one step, and list each bucket's first c."""
    floats = np.array([float(value) for value in binomials])
    for mantissa_bits in range(20):
        num_buckets = (width + 1) << mantissa_bits
        bits = (np.arange(num_buckets, dtype=np.int64) << (52 - mantissa_bits)) + (1023 << 52)
        first = np.searchsorted(floats, bits.view(np.float64), side="right") - 1
        zero = int(np.searchsorted(floats, 0.0, side="right")) - 1
        first = np.concatenate([[zero], first]).astype(np.int32)
        # From one bucket's start to the next at most one step; the bucket of 0 holds nothing but 0.
        if (np.diff(first[1:]) <= 1).all():
            return mantissa_bits, first
    raise AssertionError(f"no bucket size fits {len(binomials)} binomials of {width} bits")


@lru_cache(maxsize=64)
def rank_width(num_experts: int, top_k: int) -> int:
    """Return the bits of a rank, without building tables.

    Args:
        num_experts: E.
        top_k: K.

    Returns:
        ceil(log2 C(E, K)).

    Raises:
        TraceFormatError: The tables would be too large; `raw` codecs have no such limit.
    """
    accepted = (
        f"codec packed takes top_k up to {_MAX_TOP_K}, and tables of up to {MAX_TABLE_ENTRIES} entries: use codec raw"
        " or raw+zstd"
    )
    # Before C(E, K) is computed: it can have 65536 bits.
    if top_k > _MAX_TOP_K:
        raise TraceFormatError(
            f"top_k = {top_k} (num_experts = {num_experts}) is too large; {accepted}"
        )
    width = (comb(num_experts, top_k) - 1).bit_length()
    entries = top_k * (num_experts + 1) * _limbs_of(width)
    if entries > MAX_TABLE_ENTRIES:
        raise TraceFormatError(
            f"num_experts = {num_experts} with top_k = {top_k} needs ranks of {width} bits and tables of {entries} entries;"
            f" {accepted}"
        )
    return width


def _limbs_of(width: int) -> int:
    return max(1, -(-width // LIMB_BITS))


# Few: the tables of the largest shape take 80 MB, and headers of strangers choose the shapes.
@lru_cache(maxsize=4)
def set_code(num_experts: int, top_k: int) -> SetCode:
    """Build the code of the K-subsets of E experts.

    Args:
        num_experts: E.
        top_k: K.

    Returns:
        The code, with its tables.

    Raises:
        TraceFormatError: The tables would be too large; `raw` codecs have no such limit.
    """
    width = rank_width(num_experts, top_k)
    num_limbs = _limbs_of(width)
    columns: list[_Column] = []
    above = (1 << (LIMB_BITS * num_limbs)) - 1
    for k in range(1, top_k + 1):
        binomials = [comb(c, k) for c in range(num_experts + 1)]
        limbs = np.pad(
            _as_limbs(binomials, num_limbs), ((0, 0), (0, 1)), constant_values=_LIMB_MASK
        )
        mantissa_bits, first = _buckets([*binomials, above], max(width, 1))
        first = np.minimum(first, np.int32(num_experts))
        columns.append(_Column(limbs, mantissa_bits, first))
    return SetCode(num_experts, top_k, width, tuple(columns))
