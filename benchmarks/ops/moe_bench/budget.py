"""When to stop starting new cases."""

import time
from collections.abc import Callable

__all__ = ["Budget"]


class Budget:
    """Seconds that a run may take; a case that has started is finished."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._started = clock()
        self._longest_case = 0.0

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds that are left; negative once it is overdrawn."""
        return self._seconds - self.used

    def finished_case(self, seconds: float) -> None:
        """Remember how long a case took."""
        self._longest_case = max(self._longest_case, seconds)

    def allows_case(self) -> bool:
        """Whether a case as long as the longest one so far still fits."""
        return self.left > self._longest_case
