"""KV blocks: who owns which, and which hold a prefix that another request can reuse."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from routing_replay.capture import BlockRef
from routing_replay.engine.request import Request

__all__ = ["BlockCopy", "KVBlocks"]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block whose keys, values and rows are to be copied before the next step.

    Attributes:
        source: Where they are.
        target: The block of a fork that continues them.
    """

    source: BlockRef
    target: BlockRef


class KVBlocks:
    """Allocation of physical KV blocks, with a prefix cache over full ones.

    A block is hashed once all its tokens are computed; the hash chains over the blocks before it and covers what its
    keys and values depend on: tokens, and forced experts where there are any. A freed block keeps its contents until
    it is needed again, oldest first; its epoch then advances, so that nothing written for the old tokens can be
    taken for the new ones.

    Args:
        num_blocks: Blocks of the KV cache.
        block_size: Tokens of a block.
        enable_prefix_caching: Whether hashed blocks are reused.
        num_usable: How many leading blocks of a hit may be used; None for all. Capture asks for blocks with rows.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        num_usable: Callable[[Sequence[BlockRef]], int] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_caching = enable_prefix_caching
        self._num_usable = num_usable or len
        self._epochs = [0] * num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._generation = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def admit(self, request: Request) -> bool:
        """Give a waiting request the blocks of all tokens that it has, cached ones first.

        Args:
            request: Holds no blocks; on success its `blocks` and `num_computed` are set.

        Returns:
            Whether there was room; nothing changes if not.
        """
        hits = self._find_prefix(request)
        num_new = self.blocks_for(request.num_to_compute) - len(hits)
        num_free_hits = sum(self._ref_counts[block.block_id] == 0 for block in hits)
        if num_new > self.num_free - num_free_hits:
            return False
        for block in hits:
            self._share(block)
        request.blocks = [*hits, *(self._take_free() for _ in range(num_new))]
        request.prefix_generation = self._generation
        request.num_computed = len(hits) * self.block_size
        return True

    def fork(self, parent: Request, child: Request) -> tuple[bool, Sequence[BlockCopy]]:
        """Give a request the prompt that another one has computed, all but its last token.

        The last token is computed again, in a block of the child's own, for its logits.

        Args:
            parent: A running request with the same prompt, computed.
            child: Holds no blocks; on success its `blocks` and `num_computed` are set.

        Returns:
            Whether there was room, and the block to copy, if the last one is filled in part.
        """
        if not self._free:
            return False, ()
        child.num_computed = child.num_prompt_tokens - 1
        num_shared, num_partial = divmod(child.num_computed, self.block_size)
        shared = parent.blocks[:num_shared]
        for block in shared:
            self._share(block)
        own = self._take_free()
        child.blocks = [*shared, own]
        child.prefix_generation = parent.prefix_generation
        if not num_partial:
            return True, ()
        return True, (BlockCopy(parent.blocks[num_shared], own),)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give a running request the blocks of its first `num_tokens` tokens.

        Args:
            request: A running request.
            num_tokens: Tokens that must have a place.

        Returns:
            Whether there was room; nothing changes if not.
        """
        num_new = self.blocks_for(num_tokens) - len(request.blocks)
        if num_new > self.num_free:
            return False
        request.blocks.extend(self._take_free() for _ in range(num_new))
        return True

    def num_places(self, request: Request, *, with_free: bool) -> int:
        """Return how many tokens have a place in a running request's blocks, or could have with every free block."""
        num_blocks = len(request.blocks) + (self.num_free if with_free else 0)
        return num_blocks * self.block_size

    def publish(self, request: Request, start: int, end: int) -> None:
        """Offer the blocks that a step has filled to later requests.

        Args:
            request: A running request.
            start: Its first token in a step that has run,
            end: and one past its last.
        """
        first, last = start // self.block_size, end // self.block_size
        if not self._is_caching or first == last or request.prefix_generation != self._generation:
            return
        digests = self._hashes(request, last)
        for index in range(first, last):
            if digests[index] not in self._by_hash:
                block_id = request.blocks[index].block_id
                self._hash_of[block_id] = digests[index]
                self._by_hash[digests[index]] = block_id

    def free(self, request: Request) -> None:
        """Take back a request's blocks; the tail of its sequence is the first to be reused.

        Args:
            request: A request that has ended or must wait.
        """
        for block in reversed(request.blocks):
            self._ref_counts[block.block_id] -= 1
            if self._ref_counts[block.block_id] == 0:
                self._free[block.block_id] = None
        request.blocks = []

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes; running requests keep their blocks, and offer no more of them.

        What they compute from now on stands on keys and values from before: it must not continue a prefix from after.
        """
        self._generation += 1
        self._by_hash.clear()
        self._hash_of = [None] * self.num_blocks

    def _share(self, block: BlockRef) -> None:
        self._ref_counts[block.block_id] += 1
        self._free.pop(block.block_id, None)

    def _take_free(self) -> BlockRef:
        block_id, _ = self._free.popitem(last=False)
        digest = self._hash_of[block_id]
        if digest is not None:
            del self._by_hash[digest]
            self._hash_of[block_id] = None
        self._epochs[block_id] += 1
        self._ref_counts[block_id] = 1
        return BlockRef(block_id, self._epochs[block_id])

    def _find_prefix(self, request: Request) -> Sequence[BlockRef]:
        """Cached blocks of the tokens, never all of them: the last one is computed for its logits."""
        hits: list[BlockRef] = []
        if self._is_caching and not request.skips_prefix_cache:
            for digest in self._hashes(request, (len(request.token_ids) - 1) // self.block_size):
                if digest not in self._by_hash:
                    break
                block_id = self._by_hash[digest]
                hits.append(BlockRef(block_id, self._epochs[block_id]))
        return hits[: self._num_usable(hits)]

    def _hashes(self, request: Request, num_blocks: int) -> Sequence[bytes]:
        """Chained hashes of a request's first full blocks, each computed once."""
        size, digests = self.block_size, request.block_hashes
        for start in range(len(digests) * size, num_blocks * size, size):
            tokens = np.asarray(request.token_ids[start : start + size], np.int64).tobytes()
            forced = request.forced_bytes(start, start + size)
            parent = digests[-1] if digests else b""
            digests.append(blake2b(parent + tokens + forced, digest_size=16).digest())
        return digests[:num_blocks]
