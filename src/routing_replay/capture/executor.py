"""Who does the host's work: the caller at once, or one thread in the order of the calls."""

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from routing_replay.errors import CaptureError

__all__ = ["Executor", "InlineExecutor", "ThreadExecutor"]

_CHECK_SECONDS = 0.5
"""How often a waiting caller makes sure that the thread still lives: a thread lost to a fork sets no flag."""

_HEAD_START_SECONDS = 2e-4
"""How long the thread leaves the interpreter to a caller that has waited for its work; a woken thread needs a part of that."""

Work = Callable[[], object]


class Executor(Protocol):
    """Runs work in the order in which it comes; work is numbered from 1 on. One thread calls."""

    @property
    def is_inline(self) -> bool:
        """Whether `run` returns only when the work is done."""
        ...

    @property
    def num_done(self) -> int:
        """The number of the last work that is done."""
        ...

    def run(self, work: Work) -> int:
        """Take work on and return its number."""
        ...

    def wait(self, number: int) -> None:
        """Return once the work of that number is done."""
        ...

    def close(self) -> None:
        """Do what was taken on, and take no more."""
        ...


class InlineExecutor:
    """Does work at once; what it raises goes to the caller."""

    is_inline = True

    def __init__(self) -> None:
        self.num_done = 0
        self._is_closed = False

    def run(self, work: Work) -> int:
        """Do the work.

        Args:
            work: The work.

        Returns:
            Its number.

        Raises:
            CaptureError: The executor is closed.
        """
        if self._is_closed:
            raise _closed()
        work()
        self.num_done += 1
        return self.num_done

    def wait(self, number: int) -> None:
        """Return: all work is done.

        Args:
            number: A number that `run` has returned.
        """

    def close(self) -> None:
        """Take no more work."""
        self._is_closed = True


class _Shared:
    """What the thread and its owner share; the thread holds nothing else, so that its owner can be forgotten."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Work | None] = SimpleQueue()
        self.changed = threading.Condition()
        self.num_done = 0
        self.waited_for = 0
        self.failure: BaseException | None = None


class ThreadExecutor:
    """Does work on one thread, in order. If work raises, the thread ends and every later call says so.

    Args:
        name: Of the thread, for debuggers.
    """

    is_inline = False

    def __init__(self, name: str = "routing-capture") -> None:
        self._shared = _Shared()
        self._num_taken = 0
        self._is_closed = False
        self._thread = threading.Thread(target=_serve, args=(self._shared,), name=name, daemon=True)
        self._thread.start()
        # An owner that is dropped without `close` leaves no thread behind.
        weakref.finalize(self, self._shared.queue.put, None)

    @property
    def num_done(self) -> int:
        """The number of the last work that is done."""
        return self._shared.num_done

    def run(self, work: Work) -> int:
        """Hand work to the thread.

        Args:
            work: The work.

        Returns:
            Its number.

        Raises:
            CaptureError: The thread has ended.
        """
        self._check()
        self._shared.queue.put(work)
        self._num_taken += 1
        return self._num_taken

    def wait(self, number: int) -> None:
        """Wait until work is done.

        Args:
            number: A number that `run` has returned.

        Raises:
            CaptureError: The thread ended before it.
        """
        shared = self._shared
        if shared.num_done >= number:
            return
        with shared.changed:
            shared.waited_for = number
            while shared.num_done < number:
                self._check()
                shared.changed.wait(_CHECK_SECONDS)

    def close(self) -> None:
        """Let the thread do what it has, and end; its failure was told to whoever waited."""
        self._is_closed = True
        self._shared.queue.put(None)
        self._thread.join()

    def _check(self) -> None:
        shared = self._shared
        if shared.failure is not None:
            cause = shared.failure
            raise CaptureError(
                f"the thread that collects routing has stopped: {type(cause).__name__}: {cause}; no routing can be "
                "returned any more, start the engine again and report this"
            ) from cause
        if self._is_closed:
            raise _closed()
        if not self._thread.is_alive():
            raise CaptureError(
                "the thread that collects routing is gone, as after a fork; make the engine in the process that uses it"
            )


def _serve(shared: _Shared) -> None:
    try:
        while True:
            work = shared.queue.get()
            if work is None:
                break
            work()
            del work  # it holds its pipeline, which may be forgotten while the thread waits
            with shared.changed:
                shared.num_done += 1
                is_waited_for = shared.waited_for == shared.num_done
                shared.changed.notify_all()
            if is_waited_for:
                # Else the next work keeps the interpreter's lock for a while, and the engine's next launch waits for it.
                time.sleep(_HEAD_START_SECONDS)
    except BaseException as error:
        # Nobody calls a thread: whoever waits for it, now or later, must hear of it.
        shared.failure = error
    with shared.changed:
        shared.changed.notify_all()


def _closed() -> CaptureError:
    return CaptureError("the capture pipeline is closed; make a new one")
