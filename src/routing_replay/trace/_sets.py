"""Sets of experts as numbers: the combinatorial number system on columns of numpy integers.

The set `c_1 < c_2 < ... < c_K` of experts below E has the number `C(c_1, 1) + ... + C(c_K, K)`, which
counts the sets from 0 to `C(E, K) - 1`. Numbers are held in limbs of 52 bits, little end first,
because a float64 holds such a limb exactly, and a sum of 256 of them still fits an int64.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from routing_replay.trace._dtype import IdArray, trace_id_dtype

Limbs: TypeAlias = Sequence[npt.NDArray[np.int64]]

LIMB_BITS = 52
MAX_SET_BITS = 256
MAX_SET_TOP_K = 256

_LIMB_MASK = (1 << LIMB_BITS) - 1
_FLOAT_MANTISSA_BITS = 52
# The bits of 1.0, the smallest float that is looked up.
_FLOAT_ONE = 1023 << _FLOAT_MANTISSA_BITS
# Entries of one column's index: it stays in the second-level cache.
_MAX_INDEX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Column:
    """What finds the expert in one place of a set.

    In place i (from 1) the expert is `i - 1 + j`, where j is the last index with `at[j] <= rest`.

    Attributes:
        at: `C(i - 1 + j, i)` for j in [0, E - K + 1], as limbs. The last one is above every rest.
        index: For every leading part of a float, the first j whose number has at least that part.
        mantissa_bits: Bits of the mantissa that belong to the leading part.
        num_steps: The most numbers that share a leading part.
    """

    at: tuple[npt.NDArray[np.int64], ...]
    index: npt.NDArray[np.int64]
    mantissa_bits: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetNumbers:
    """Numbers the sets of `top_k` out of `num_experts` experts.

    Attributes:
        num_experts: E.
        top_k: K.
        num_sets: `C(E, K)`.
        num_bits: Bits of the largest number, 0 if there is one set only.
    """

    num_experts: int
    top_k: int
    num_sets: int
    num_bits: int
    _columns: tuple[_Column, ...]

    def rank(self, ids: IdArray) -> list[npt.NDArray[np.int64]]:
        """Return the number of each set.

        Args:
            ids: `[n, K]`, strictly ascending in each row, below `num_experts`.

        Returns:
            Limbs, int64 `[n]` each.
        """
        limbs = [np.zeros(len(ids), dtype=np.int64) for _ in self._columns[-1].at]
        for place, column in enumerate(self._columns):
            offset = ids[:, place].astype(np.int64)
            offset -= place
            for limb, at in zip(limbs, column.at, strict=False):
                limb += at.take(offset)
        for limb, above in itertools.pairwise(limbs):
            above += limb >> LIMB_BITS
            limb &= _LIMB_MASK
        return limbs

    def out_of_range(self, limbs: Limbs) -> npt.NDArray[np.bool_]:
        """Tell for each number whether it is `num_sets` or more, so that no set has it."""
        return _at_most([np.int64(part) for part in _split(self.num_sets, len(limbs))], limbs)

    def unrank(self, limbs: Limbs) -> IdArray:
        """Return the set of each number.

        Args:
            limbs: Numbers below `num_sets` as limbs, int64 `[n]` each.

        Returns:
            Ids `[n, K]`, ascending in each row, of the dtype of traces of `num_experts` experts.
        """
        rest = list(limbs)
        ids = np.empty((len(rest[0]), self.top_k), dtype=trace_id_dtype(self.num_experts))
        for place in range(self.top_k - 1, -1, -1):
            column = self._columns[place]
            rest = rest[: len(column.at)]
            found = column.index.take(_leading_parts(rest, column.mantissa_bits))
            for _ in range(column.num_steps):
                found += _at_most([at.take(found) for at in column.at], rest)
            found -= 1
            ids[:, place] = found + place
            rest = _subtract(rest, [at.take(found) for at in column.at])
        return ids


def sets_refusal(num_experts: int, top_k: int) -> str | None:
    """Say why the sets of a layout are not numbered, or return `None` where they are."""
    if top_k > MAX_SET_TOP_K:
        return f"top_k = {top_k} exceeds {MAX_SET_TOP_K}"
    num_bits = (math.comb(num_experts, top_k) - 1).bit_length()
    if num_bits > MAX_SET_BITS:
        return (
            f"num_experts = {num_experts} and top_k = {top_k} take {num_bits} bits a set, more than"
            f" {MAX_SET_BITS}"
        )
    return None


def set_num_bits(num_experts: int, top_k: int) -> int:
    """Return the bits of the largest number of a set: `ceil(log2 C(E, K))`."""
    return (math.comb(num_experts, top_k) - 1).bit_length()


@functools.lru_cache(maxsize=4)
def set_numbers(num_experts: int, top_k: int) -> SetNumbers:
    """Build the tables of a layout that `sets_refusal` accepts.

    They take 8 * K * (E - K + 2) bytes a limb, and at most 0.5 MB more for each of the K places.
    """
    num_sets = math.comb(num_experts, top_k)
    columns: list[_Column] = []
    # C(i - 1 + j, i) over j is the running sum of C(i - 2 + j, i - 1), from j = 1 on.
    at = [0] + [1] * (num_experts - top_k + 1)
    for _ in range(top_k):
        at = list(itertools.accumulate(at))
        columns.append(_column(at))
    return SetNumbers(
        num_experts=num_experts,
        top_k=top_k,
        num_sets=num_sets,
        num_bits=(num_sets - 1).bit_length(),
        _columns=tuple(columns),
    )


def _column(at: list[int]) -> _Column:
    """Index ascending numbers by the leading part of their float."""
    num_limbs = -(-at[-1].bit_length() // LIMB_BITS)
    limbs = tuple(
        np.array([number >> LIMB_BITS * idx & _LIMB_MASK for number in at], dtype=np.int64)
        for idx in range(num_limbs)
    )
    mantissa_bits = 0
    while True:
        parts = _leading_parts(limbs, mantissa_bits)
        num_steps = int(np.bincount(parts[:-1]).max())
        if num_steps == 1 or 2 * int(parts[-1]) >= _MAX_INDEX:
            break
        mantissa_bits += 1
    index = np.searchsorted(parts, np.arange(int(parts[-1]) + 1), side="left")
    return _Column(
        at=limbs,
        index=index.astype(np.int64),
        mantissa_bits=mantissa_bits,
        num_steps=num_steps,
    )


def _leading_parts(limbs: Limbs, mantissa_bits: int) -> npt.NDArray[np.int64]:
    """Return exponent and leading mantissa bits of each number plus one, as an index from 0.

    It never falls where numbers rise: a limb and 2**52 are exact in float64, each sum is rounded
    once, and rounding keeps the order.
    """
    floats = limbs[0] + 1.0
    for idx, limb in enumerate(limbs[1:], start=1):
        floats += limb * math.ldexp(1.0, LIMB_BITS * idx)
    shift = _FLOAT_MANTISSA_BITS - mantissa_bits
    return (floats.view(np.int64) >> shift) - (_FLOAT_ONE >> shift)


def _at_most(
    left: Sequence[npt.NDArray[np.int64] | np.int64], right: Limbs
) -> npt.NDArray[np.bool_]:
    """Compare numbers limb by limb: `left <= right`."""
    result: npt.NDArray[np.bool_] = left[0] <= right[0]
    for lower, upper in zip(left[1:], right[1:], strict=True):
        result &= lower == upper
        result |= lower < upper
    return result


def _subtract(left: Limbs, right: Limbs) -> list[npt.NDArray[np.int64]]:
    """Subtract smaller numbers limb by limb."""
    limbs = [mine - theirs for mine, theirs in zip(left, right, strict=True)]
    for limb, above in itertools.pairwise(limbs):
        # An arithmetic shift: -1 where the limb went below 0.
        above += limb >> LIMB_BITS
        limb &= _LIMB_MASK
    return limbs


def _split(number: int, num_limbs: int) -> list[int]:
    """Return the limbs of one number; the last one keeps whatever is left."""
    lower = [number >> LIMB_BITS * idx & _LIMB_MASK for idx in range(num_limbs - 1)]
    return [*lower, number >> LIMB_BITS * (num_limbs - 1)]
