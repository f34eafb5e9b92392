"""The inputs of a step in one piece of memory: one copy to the device, at addresses that CUDA graphs can keep."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["StepArrays", "StepBuffers", "StepSize", "StepTensors"]

_ALIGNMENT = 16  # bytes; Triton's kernels read aligned rows faster


@dataclass(frozen=True, slots=True)
class StepSize:
    """How large a step is, padding included.

    Attributes:
        num_rows: Tokens.
        num_sequences: Sequences.
        num_samples: Rows that a token is sampled from.
    """

    num_rows: int
    num_sequences: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """The inputs of a step on the device.

    Attributes:
        given_tokens: int64 `[N]`, tokens that the host knows.
        token_source: int64 `[N]`, where each row's token stands among the sampled ones and the given ones after them.
        positions: int64 `[N]`, token index of each row in its sequence.
        slot_mapping: int64 `[N]`, where keys and values go; -1 in padding rows.
        block_tables: int32 `[B, max_blocks]`.
        query_starts: int32 `[B + 1]`, first row of each sequence.
        context_lens: int32 `[B]`, tokens of each sequence after the step; 0 for padding.
        capture_step: int64 `[1]`, the number under which the step's routing leaves.
        sample_rows: int64 `[S]`, rows that a token is sampled from.
        sample_slots: int64 `[S]`, where the sampled tokens are kept.
        temperature: float32 `[S]`.
        uniform: float64 `[S]`, in [0, 1).
    """

    given_tokens: Tensor
    token_source: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    capture_step: Tensor
    sample_rows: Tensor
    sample_slots: Tensor
    temperature: Tensor
    uniform: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """The same on the host, to be filled in; fields as in `StepTensors`."""

    given_tokens: NDArray[np.int64]
    token_source: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    capture_step: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    sample_slots: NDArray[np.int64]
    temperature: NDArray[np.float32]
    uniform: NDArray[np.float64]


_DTYPES: Mapping[str, torch.dtype] = {
    "block_tables": torch.int32,
    "query_starts": torch.int32,
    "context_lens": torch.int32,
    "temperature": torch.float32,
    "uniform": torch.float64,
}


class StepBuffers:
    """Memory for the inputs of a step: a ring on the host, one place on the device, and the sampled tokens before it.

    A step of some size always has its tensors at the same addresses. The host writes the arrays of one slot of the ring
    while copies from others may still be under way.

    Args:
        most: The largest step.
        max_blocks: Columns of a block table.
        num_slots: Sampled tokens that are kept: one for each running request, and one that padding rows write.
        device: Where the model runs.
        ring: Slots of the ring.
    """

    def __init__(
        self,
        most: StepSize,
        *,
        max_blocks: int,
        num_slots: int,
        device: torch.device,
        ring: int = 3,
    ) -> None:
        self._max_blocks = max_blocks
        self._is_cuda = device.type == "cuda"
        self._num_pool_bytes = _padded(8 * num_slots)
        _, num_bytes = self._layout(most)
        memory = torch.zeros(self._num_pool_bytes + num_bytes, dtype=torch.uint8, device=device)
        self._device_bytes = memory[self._num_pool_bytes :]
        self._num_pool = self._num_pool_bytes // 8
        self._all_tokens = memory[: (len(memory) // 8) * 8].view(torch.int64)
        self._host_bytes = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(ring)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * ring
        self._turn = 0

    @property
    def first_given(self) -> int:
        """The `token_source` of the first given token; smaller ones are slots of sampled tokens."""
        return self._num_pool

    @property
    def sampled_tokens(self) -> Tensor:
        """int64 `[num_slots]`: the last token sampled for each slot."""
        return self._all_tokens[: self._num_pool]

    @property
    def all_tokens(self) -> Tensor:
        """int64: sampled tokens, then given ones; what `token_source` points into."""
        return self._all_tokens

    def tensors(self, size: StepSize) -> StepTensors:
        """Return the device's tensors of a step of some size, views of static memory.

        Args:
            size: Of the step.

        Returns:
            Its tensors.
        """
        places, _ = self._layout(size)
        return StepTensors(**{name: _view(self._device_bytes, *place) for name, place in places.items()})  # fmt: skip

    def arrays(self, size: StepSize) -> StepArrays:
        """Return the host's arrays of the next step; waits until the copy that last used them has ended.

        Args:
            size: Of the step.

        Returns:
            Arrays with old contents.
        """
        self._turn = (self._turn + 1) % len(self._host_bytes)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        places, _ = self._layout(size)
        host = self._host_bytes[self._turn]
        return StepArrays(**{name: _view(host, *place).numpy() for name, place in places.items()})

    def upload(self, size: StepSize) -> StepTensors:
        """Copy the arrays last returned to the device.

        Args:
            size: As given to `arrays`.

        Returns:
            The device's tensors.

        Runtime: one asynchronous copy on the current stream.
        """
        _, num_bytes = self._layout(size)
        self._device_bytes[:num_bytes].copy_(
            self._host_bytes[self._turn][:num_bytes], non_blocking=True
        )
        if self._is_cuda:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        return self.tensors(size)

    def _layout(self, size: StepSize) -> tuple[dict[str, tuple[int, tuple[int, ...], torch.dtype]], int]:  # fmt: skip
        """Offset, shape and dtype of each tensor, and the bytes of all; given tokens come first."""
        rows, sequences, samples = size.num_rows, size.num_sequences, size.num_samples
        shapes: dict[str, tuple[int, ...]] = {
            "block_tables": (sequences, self._max_blocks),
            "query_starts": (sequences + 1,),
            "context_lens": (sequences,),
            "capture_step": (1,),
            **dict.fromkeys(("sample_rows", "sample_slots", "temperature", "uniform"), (samples,)),
        }
        places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        offset = 0
        for field in fields(StepTensors):
            shape = shapes.get(field.name, (rows,))
            dtype = _DTYPES.get(field.name, torch.int64)
            places[field.name] = (offset, shape, dtype)
            offset += _padded(dtype.itemsize * int(np.prod(shape)))
        return places, offset


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(memory: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = dtype.itemsize * int(np.prod(shape))
    return memory[offset : offset + num_bytes].view(dtype).view(shape)
