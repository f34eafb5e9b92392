"""KV blocks: who owns which, and which hold a prefix that another request can reuse."""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from routing_replay.capture import BlockRef
from routing_replay.engine.request import Request

__all__ = ["KVBlocks"]


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
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_caching = enable_prefix_caching
        self._epochs = [0] * num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, request: Request) -> bool:
        """Give a request all the blocks it can come to need, cached ones first.

        Args:
            request: Not yet running; on success its `blocks`, `num_computed` and `num_cached` are set.

        Returns:
            Whether there was room; nothing changes if not.
        """
        hits = self._find_prefix(request)
        num_new = self.blocks_for(request.max_len) - len(hits)
        num_free_hits = sum(self._ref_counts[block_id] == 0 for block_id in hits)
        if num_new > self.num_free - num_free_hits:
            return False
        for block_id in hits:
            self._ref_counts[block_id] += 1
            self._free.pop(block_id, None)
        new = [self._take_free() for _ in range(num_new)]
        request.blocks = [BlockRef(block_id, self._epochs[block_id]) for block_id in (*hits, *new)]
        request.num_computed = request.num_cached = len(hits) * self.block_size
        return True

    def publish(self, request: Request, num_before: int) -> None:
        """Offer the blocks that a step has filled to later requests.

        Args:
            request: A running request whose `num_computed` has advanced.
            num_before: Its `num_computed` before the step.
        """
        first, last = num_before // self.block_size, request.num_computed // self.block_size
        if not self._is_caching or first == last:
            return
        for index, digest in enumerate(self._hashes(request, last)):
            block_id = request.blocks[index].block_id
            if index >= first and digest not in self._by_hash:
                self._hash_of[block_id] = digest
                self._by_hash[digest] = block_id

    def free(self, request: Request) -> None:
        """Take back a request's blocks; the tail of its sequence is the first to be reused.

        Args:
            request: A request that has ended.
        """
        for block in reversed(request.blocks):
            self._ref_counts[block.block_id] -= 1
            if self._ref_counts[block.block_id] == 0:
                self._free[block.block_id] = None
        request.blocks = []

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes; running requests keep their blocks."""
        self._by_hash.clear()
        self._hash_of = [None] * self.num_blocks

    def _take_free(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        digest = self._hash_of[block_id]
        if digest is not None:
            del self._by_hash[digest]
            self._hash_of[block_id] = None
        self._epochs[block_id] += 1
        self._ref_counts[block_id] = 1
        return block_id

    def _find_prefix(self, request: Request) -> Sequence[int]:
        """Cached blocks of the prompt, never all of it: the last prompt token is computed for its logits."""
        hits: list[int] = []
        if self._is_caching:
            for digest in self._hashes(request, (request.num_prompt_tokens - 1) // self.block_size):
                if digest not in self._by_hash:
                    break
                hits.append(self._by_hash[digest])
        return hits

    def _hashes(self, request: Request, num_blocks: int) -> Sequence[bytes]:
        size, parent = self.block_size, b""
        digests: list[bytes] = []
        for start in range(0, num_blocks * size, size):
            tokens = np.asarray(request.token_ids[start : start + size], np.int64).tobytes()
            forced = request.forced_bytes(start, start + size)
            parent = blake2b(parent + tokens + forced, digest_size=16).digest()
            digests.append(parent)
        return digests
