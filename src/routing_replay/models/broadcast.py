"""Weights from a trainer's process to a decoder's, over torch.distributed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from routing_replay.errors import ConfigError
from routing_replay.models.loading import check_weight, place_weight, weight_places
from routing_replay.models.qwen3_moe import Qwen3MoEModel

__all__ = ["WeightInfo", "broadcast_weights", "describe_weights", "receive_weights"]

_BUCKET_BYTES = 256 << 20
_ALIGNMENT = 16  # a tensor of any dtype may begin here
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightInfo:
    """What a receiver must know of a tensor before it comes.

    Attributes:
        name: Its name, as in a checkpoint.
        dtype: `"bfloat16"`, `"float16"`, `"float32"` or `"float64"`.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the dtype."""
        if self.dtype not in _DTYPES:
            raise ConfigError(f"{self.name} is {self.dtype!r}; accepted are {', '.join(_DTYPES)}")

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize


def describe_weights(tensors: Iterable[tuple[str, Tensor]]) -> list[WeightInfo]:
    """Return what receivers must know of tensors, in their order.

    Args:
        tensors: Names and tensors.

    Returns:
        One entry a tensor, of plain values: they may travel as JSON.

    Raises:
        ConfigError: A tensor is not of floats of 16, 32 or 64 bits.

    Runtime: host only; reads no values.
    """
    return [
        WeightInfo(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for name, tensor in tensors
    ]  # fmt: skip


def _buckets(
    items: Iterable[_Item], num_bytes: Callable[[_Item], int]
) -> Iterator[tuple[list[tuple[_Item, int]], int]]:
    """Items with their first byte in a message, and the message's size: alike on both sides, from the sizes alone."""
    bucket: list[tuple[_Item, int]] = []
    size = 0
    for item in items:
        needed = -(-num_bytes(item) // _ALIGNMENT) * _ALIGNMENT
        if bucket and size + needed > _BUCKET_BYTES:
            yield bucket, size
            bucket, size = [], 0
        bucket.append((item, size))
        size += needed
    if bucket:
        yield bucket, size


@torch.no_grad()
def broadcast_weights(
    tensors: Iterable[tuple[str, Tensor]], *, group: dist.ProcessGroup | None, src: int
) -> None:
    """Send tensors to the processes that call `receive_weights`.

    Args:
        tensors: Names and tensors in the order of `describe_weights`, on a device that the group's backend sends from;
            they may be made one by one.
        group: The process group; None for the default one.
        src: This process's rank among all.

    Raises:
        ConfigError: `src` is another process.

    Runtime: a collective; one message for up to 256 MiB of tensors, packed into a buffer of that size (of the largest
        tensor, where that is larger).
    """
    if dist.get_rank() != src:
        raise ConfigError(
            f"src={src}, but this process has rank {dist.get_rank()}; the sender is src"
        )
    for bucket, size in _buckets(tensors, lambda item: item[1].nbytes):
        message = torch.empty(size, dtype=torch.uint8, device=bucket[0][0][1].device)
        for (_, tensor), first in bucket:
            values = tensor.detach().contiguous().view(-1).view(torch.uint8)
            message[first : first + len(values)].copy_(values)
        dist.broadcast(message, src=src, group=group)


@torch.no_grad()
def receive_weights(
    model: Qwen3MoEModel,
    metadata: Sequence[WeightInfo],
    *,
    group: dist.ProcessGroup | None,
    src: int,
) -> None:
    """Replace some of a decoder's weights by those that `broadcast_weights` sends.

    Args:
        model: The decoder.
        metadata: Of `describe_weights` on the sender's side, in its order.
        group: The process group; None for the default one.
        src: The sender's rank among all.

    Raises:
        UnsupportedModelError: A name is unknown or a shape differs. Nothing has been received or replaced then, and the
            sender waits for the group's timeout: let receivers check the metadata before it sends.

    Runtime: a collective; writes in place, so that addresses stay; allocates one message. On a GPU the copies follow the
        work on the current stream.
    """
    places = weight_places(model)
    for info in metadata:
        for place in places.find(info.name):
            check_weight(info.name, place, info.shape)
    device = model.embed_tokens.weight.device
    for bucket, size in _buckets(metadata, lambda info: info.num_bytes):
        message = torch.empty(size, dtype=torch.uint8, device=device)
        dist.broadcast(message, src=src, group=group)
        for info, first in bucket:
            values = message[first : first + info.num_bytes].view(_DTYPES[info.dtype])
            for place in places.find(info.name):
                place_weight(place, values.view(info.shape), model.dtype)
