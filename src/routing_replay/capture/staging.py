"""The staging ring: where a step's rows wait on their way from the device to the host."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing_replay.capture.device_cache import DeviceCache, RoutingSpec, StepRows
from routing_replay.kernels.gather import StepRing

__all__ = ["CpuStaging", "CudaStaging", "HostRows", "Staging", "make_staging"]

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class HostRows:
    """The rows of one step on the host; they stay until the slot is used again.

    Attributes:
        rows: uint8 or int16 `[n, L, K]`, C-contiguous.
        flags: uint8 `[n]`, `RowFault` bits; 0 is a good row.
        stamp: Number of the step whose `gather` left them; of rows that `launch` sent, any number.
    """

    rows: NDArray[np.integer]
    flags: NDArray[np.uint8]
    stamp: int


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

    def gather(self, num_rows: int, step: Tensor) -> None:
        """Gather all rows of a bucket into the slot of the step whose number the device finds, and reset them: to be recorded."""
        ...

    def send(self, slot: int, num_rows: int, num_gathered: int) -> None:
        """Send to the host the first rows of a slot that `gather` has just filled."""
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
        self._host_rows, self._host_flags = rows.numpy(), self._slot.flags.numpy()
        self._stamp = -1

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

    def gather(self, num_rows: int, step: Tensor) -> None:
        """Gather all rows of a bucket and reset them.

        Args:
            num_rows: Rows of the bucket.
            step: int64 `[1]`, number of the step.

        Runtime: synchronous.
        """
        self._stamp = int(step)
        self._device_cache.gather(num_rows, num_reset=num_rows, out=self._slot)

    def send(self, slot: int, num_rows: int, num_gathered: int) -> None:
        """Do nothing: the rows are there.

        Args:
            slot: 0.
            num_rows: Live rows of the step.
            num_gathered: Rows of its bucket.
        """

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Return the rows of the last step.

        Args:
            slot: 0.
            num_rows: Live rows of the step.

        Returns:
            Views of the slot.
        """
        del slot
        return HostRows(self._host_rows[:num_rows], self._host_flags[:num_rows], self._stamp)


class _CudaSlot:
    """A slot on the device, its mirror in pinned memory, and the events between them.

    The flags of a bucket end where the step's number is, and its rows begin there, `[... f0 f1 | number | r0 r1 ...]`: those
    of any bucket are one copy.
    """

    def __init__(self, device_bytes: Tensor, spec: RoutingSpec, num_rows: int) -> None:
        self.row_bytes = spec.row_bytes
        self.first_row = _first_row(num_rows)
        self.stamp_place = self.first_row - _ALIGNMENT
        self.device_bytes = device_bytes
        self.host_bytes = torch.empty(len(device_bytes), dtype=torch.uint8, pin_memory=True)
        shape = (num_rows, spec.num_moe_layers, spec.top_k)
        self.device_rows = self._rows(self.device_bytes, spec, shape)
        self.host_rows = self._rows(self.host_bytes, spec, shape).numpy()
        self.host_flags = self.host_bytes[: self.stamp_place].numpy()
        self.host_stamp = self._stamp(self.host_bytes).numpy()
        self.device_stamp = self._stamp(self.device_bytes)
        self.first_flag = self.stamp_place
        self.gathered = torch.cuda.Event()
        # A thread that waits for rows sleeps; it must not take a core from the engine's own thread.
        self.arrived = torch.cuda.Event(blocking=True)

    def _rows(self, buffer: Tensor, spec: RoutingSpec, shape: tuple[int, ...]) -> Tensor:
        end = self.first_row + shape[0] * self.row_bytes
        return buffer[self.first_row : end].view(spec.staging_dtype).view(shape)

    def _stamp(self, buffer: Tensor) -> Tensor:
        return buffer[self.stamp_place : self.stamp_place + 8].view(torch.int64)

    def step_rows(self, num_gathered: int) -> StepRows:
        """Where the rows of a bucket go."""
        flags = self.device_bytes[self.stamp_place - num_gathered : self.stamp_place]
        return StepRows(self.device_rows, flags)


def _first_row(num_rows: int) -> int:
    return (-(-num_rows // _ALIGNMENT) + 1) * _ALIGNMENT


class CudaStaging:
    """A ring of slots on a GPU, copied to pinned memory on a stream of its own.

    All memory is taken here, for the largest step. The forward stream runs one more kernel a step and records one
    event; it waits for nothing. The stream of the copies waits for that event.

    A step that is a CUDA graph gathers its rows itself: a kernel between two graphs makes the launches inside the second one
    slower.

    Args:
        device_cache: Where the layers write.
        num_slots: Steps that may be on their way at once.
    """

    is_asynchronous = True

    def __init__(self, device_cache: DeviceCache, num_slots: int) -> None:
        device, spec, count = device_cache.device, device_cache.spec, device_cache.num_rows
        self._device_cache = device_cache
        self._stream = torch.cuda.Stream(device)
        size = _first_row(count) + -(-count * spec.row_bytes // _ALIGNMENT) * _ALIGNMENT
        self._ring = torch.empty((num_slots, size), dtype=torch.uint8, device=device)
        self._slots = [_CudaSlot(slot, spec, count) for slot in self._ring]
        self._compile()

    def _compile(self) -> None:
        """Run the gather for few and for many rows: no step may wait for a compilation."""
        count = self._device_cache.num_rows
        for num_rows in (0, 1, count):
            num_reset = max(num_rows, 1)
            out = self._slots[0].step_rows(num_reset)
            self._device_cache.gather(num_rows, num_reset=num_reset, out=out)
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
        out = self._slots[slot].step_rows(num_reset)
        self._device_cache.gather(num_rows, num_reset=num_reset, out=out)
        self.send(slot, num_rows, num_reset)

    def gather(self, num_rows: int, step: Tensor) -> None:
        """Gather all rows of a bucket and reset them, on the current stream.

        Args:
            num_rows: Rows of the bucket.
            step: int64 `[1]` on the device: number of the step, whose slot is free once this runs.

        Runtime: one launch; no host sync; no allocation; CUDA-graph safe: each replay goes to the slot of the step that it finds.
        """
        first = self._slots[0]
        ring = StepRing(step, len(self._slots), self._ring.stride(0), first.device_stamp)
        self._device_cache.gather(
            num_rows, num_reset=num_rows, out=first.step_rows(num_rows), ring=ring
        )

    def send(self, slot: int, num_rows: int, num_gathered: int) -> None:
        """Send rows that the current stream gathers to pinned memory on the other.

        Args:
            slot: Where they are.
            num_rows: Live rows of the step.
            num_gathered: Rows of its bucket.

        Runtime: no host sync; no allocation; the current stream never waits.
        """
        if not num_rows:
            return
        at = self._slots[slot]
        low, high = at.stamp_place - num_gathered, at.first_row + num_rows * at.row_bytes
        at.first_flag = low
        at.gathered.record()
        self._stream.wait_event(at.gathered)
        with torch.cuda.stream(self._stream):
            at.host_bytes[low:high].copy_(at.device_bytes[low:high], non_blocking=True)
            at.arrived.record()

    def wait(self, slot: int, num_rows: int) -> HostRows:
        """Wait until the rows of a slot are in pinned memory.

        Args:
            slot: A slot that was sent.
            num_rows: Live rows of the step.

        Returns:
            Views of the slot.

        Runtime: blocks the calling thread without the interpreter's lock.
        """
        at = self._slots[slot]
        if num_rows:
            at.arrived.synchronize()
        flags = at.host_flags[at.first_flag :][:num_rows]
        return HostRows(at.host_rows[:num_rows], flags, int(at.host_stamp[0]))


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
