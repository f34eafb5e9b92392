"""The staging ring: where a step's rows wait on their way from the device to the host."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture.device_cache import DeviceCache, RoutingSpec, StepRows

__all__ = ["CpuStaging", "CudaStaging", "HostRows", "Staging", "make_staging"]

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class HostRows:
    """The rows of one step on the host; they stay until the slot is used again.

    Attributes:
        rows: uint8 or int16 `[n, L, K]`, C-contiguous.
        flags: uint8 `[n]`, `RowFault` bits; 0 is a good row.
    """

    rows: NDArray[np.integer]
    flags: NDArray[np.uint8]


class Staging(Protocol):
    """Slots that a step's rows pass through. One thread launches, one waits."""

    @property
    def num_slots(self) -> int:
        """How many steps may be on their way at once."""
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether rows arrive after `launch` has returned, so that a thread should wait for them."""
        ...

    def launch(self, slot: int, num_rows: int, num_reset: int) -> None:
        """Gather a step's rows into a free slot, reset the bucket, and send the rows to the host."""
        ...

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Wait until the rows of a slot are on the host."""
        ...


class CpuStaging:
    """Staging where the model runs on the CPU: one slot, and the rows are there at once.

    Args:
        device_cache: Where the layers write.
    """

    num_slots = 1
    is_asynchronous = False

    def __init__(self, device_cache: DeviceCache) -> None:
        self._device_cache = device_cache
        spec, count = device_cache.spec, device_cache.num_rows
        shape = (count, spec.num_moe_layers, spec.top_k)
        rows = torch.empty(shape, dtype=spec.staging_dtype)
        self._slot = StepRows(rows, torch.empty(count, dtype=torch.uint8))
        self._host = HostRows(rows.numpy(), self._slot.flags.numpy())

    def launch(self, slot: int, num_rows: int, num_reset: int) -> None:
        """Gather a step's rows and reset the bucket.

        Args:
            slot: 0.
            num_rows: Live rows of the step.
            num_reset: Rows of its bucket.

        Runtime: synchronous.
        """
        del slot
        self._device_cache.gather(num_rows, num_reset=num_reset, out=self._slot)

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Return the rows of the last step.

        Args:
            slot: 0.
            num_rows: Live rows of the step.

        Returns:
            Views of the slot.
        """
        del slot
        return HostRows(self._host.rows[:num_rows], self._host.flags[:num_rows])


class _CudaSlot:
    """A slot on the device, its mirror in pinned memory, and the events between them.

    Flags end where rows begin, `[... f0 f1 | r0 r1 ...]`, so that those of any number of rows are one copy.
    """

    def __init__(self, spec: RoutingSpec, num_rows: int, device: torch.device) -> None:
        self.row_bytes = spec.row_bytes
        self.middle = -(-num_rows // _ALIGNMENT) * _ALIGNMENT
        size = self.middle + num_rows * spec.row_bytes
        self.device_bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.host_bytes = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        shape = (num_rows, spec.num_moe_layers, spec.top_k)
        self.device_rows = self._rows(self.device_bytes, spec, shape)
        self.host_rows = self._rows(self.host_bytes, spec, shape).numpy()
        self.host_flags = self.host_bytes[: self.middle].numpy()
        self.gathered = torch.cuda.Event()
        # A thread that waits for rows sleeps; it must not take a core from the engine's own thread.
        self.arrived = torch.cuda.Event(blocking=True)

    def _rows(self, buffer: Tensor, spec: RoutingSpec, shape: tuple[int, ...]) -> Tensor:
        return buffer[self.middle :].view(spec.staging_dtype).view(shape)


class CudaStaging:
    """A ring of slots on a GPU, copied to pinned memory on a stream of its own.

    All memory is taken here, for the largest step. The forward stream runs one more kernel a step and records one
    event; it waits for nothing. The stream of the copies waits for that event.

    Args:
        device_cache: Where the layers write.
        num_slots: Steps that may be on their way at once.
    """

    is_asynchronous = True

    def __init__(self, device_cache: DeviceCache, num_slots: int) -> None:
        device = device_cache.device
        self._device_cache = device_cache
        self._stream = torch.cuda.Stream(device)
        self._slots = [
            _CudaSlot(device_cache.spec, device_cache.num_rows, device) for _ in range(num_slots)
        ]
        self._compile()

    def _compile(self) -> None:
        """Run the gather for few and for many rows: no step may wait for a compilation."""
        at, count = self._slots[0], self._device_cache.num_rows
        out = StepRows(at.device_rows, at.device_bytes[at.middle - count : at.middle])
        for num_rows in (0, 1, count):
            self._device_cache.gather(num_rows, num_reset=max(num_rows, 1), out=out)
        torch.cuda.synchronize(self._device_cache.device)

    @property
    def num_slots(self) -> int:
        """How many steps may be on their way at once."""
        return len(self._slots)

    @property
    def copy_stream(self) -> torch.cuda.Stream:
        """The stream of the copies."""
        return self._stream

    def launch(self, slot: int, num_rows: int, num_reset: int) -> None:
        """Gather a step's rows on the current stream and send them to pinned memory on the other.

        Args:
            slot: A slot whose rows are used up.
            num_rows: Live rows of the step.
            num_reset: Rows of its bucket.

        Runtime: no host sync; no allocation; the current stream never waits.
        """
        at = self._slots[slot]
        low = at.middle - num_rows
        out = StepRows(at.device_rows, at.device_bytes[low : at.middle])
        self._device_cache.gather(num_rows, num_reset=num_reset, out=out)
        if not num_rows:
            return
        high = at.middle + num_rows * at.row_bytes
        at.gathered.record()
        self._stream.wait_event(at.gathered)
        with torch.cuda.stream(self._stream):
            at.host_bytes[low:high].copy_(at.device_bytes[low:high], non_blocking=True)
            at.arrived.record()

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Wait until the rows of a slot are in pinned memory.

        Args:
            slot: A slot that was launched.
            num_rows: Live rows of the step.

        Returns:
            Views of the slot.

        Runtime: blocks the calling thread without the interpreter's lock.
        """
        at = self._slots[slot]
        if num_rows:
            at.arrived.synchronize()
        return HostRows(at.host_rows[:num_rows], at.host_flags[at.middle - num_rows :])


def make_staging(device_cache: DeviceCache, num_slots: int) -> Staging:
    """Return the staging of a device.

    Args:
        device_cache: Where the layers write.
        num_slots: Steps that may be on their way at once, where they can.

    Returns:
        A ring on a GPU, one slot on a CPU.
    """
    if device_cache.device.type == "cuda":
        return CudaStaging(device_cache, num_slots)
    return CpuStaging(device_cache)
