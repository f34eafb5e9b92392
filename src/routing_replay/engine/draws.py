"""The random numbers of a request: one for each output token, whenever and however often it is asked for."""

from array import array

import torch

__all__ = ["Draws"]

_CHUNK = 64


class Draws:
    """Uniform numbers of a request, by output token.

    The n-th number depends on the seed and n alone, so a token that is sampled again, after a preemption, under
    speculation or in an overlapped step, is drawn with the same number.

    Args:
        seed: Seed of the request.
    """

    __slots__ = ("_generator", "_numbers", "_seed")

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # Its state takes 5 KB: made at the first draw, which greedy requests never come to.
        self._generator: torch.Generator | None = None
        self._numbers = array("d")

    def at(self, output_index: int) -> float:
        """Return the number of an output token.

        Args:
            output_index: Which output token, from 0 on.

        Returns:
            A float64 in [0, 1): on a CPU what `uniform_` gives for one number after the other.
        """
        while output_index >= len(self._numbers):
            self._numbers.extend(self._next_chunk())
        return self._numbers[output_index]

    def _next_chunk(self) -> list[float]:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self._seed)
        numbers = torch.empty(_CHUNK, dtype=torch.float64)
        return numbers.uniform_(generator=self._generator).tolist()
