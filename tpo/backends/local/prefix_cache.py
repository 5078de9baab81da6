"""Prefix cache: keys and values of earlier requests, so that a later call of the same conversation skips their prefill.

Entries are found by content: a prompt is matched against every cached sequence and reuses the longest common prefix.
When memory is needed, the least recently used entry is evicted first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from tpo.backends.local.kv_allocator import Chain, KVCacheAllocator, truncate

_BLOCK = 16
"""Tokens per hashed block: a match must share at least the first block."""

Tokens = tuple[int, ...]


class PrefixCache:
    """Cached sequences; each holds a reference to its segments."""

    def __init__(self, allocator: KVCacheAllocator) -> None:
        self._allocator = allocator
        self._entries: OrderedDict[Tokens, Chain] = OrderedDict()
        self._by_block: dict[int, Tokens] = {}

    def insert(self, tokens: Tokens, chain: Chain) -> None:
        """Cache a sequence. It has as many tokens as its chain."""
        if tokens in self._entries:
            self._entries.move_to_end(tokens)
            return
        self._allocator.acquire(chain)
        self._entries[tokens] = chain
        for block_hash in _block_hashes(tokens):
            self._by_block[block_hash] = tokens

    def match(self, prompt: Sequence[int]) -> Chain:
        """Return the chain of the longest cached prefix of a prompt.

        The last token of the prompt is never taken from the cache, because its logits are needed.
        """
        limit = len(prompt) - 1
        hashes = reversed(_block_hashes(prompt[:limit]))
        found = next((tokens for tokens in map(self._by_block.get, hashes) if tokens is not None), None)
        if found is None:
            return ()
        self._entries.move_to_end(found)
        common = next((i for i, (a, b) in enumerate(zip(found, prompt, strict=False)) if a != b), len(found))
        return truncate(self._entries[found], min(common, limit))

    def evict(self) -> bool:
        """Evict the least recently used sequence. Return False if the cache is empty."""
        if not self._entries:
            return False
        tokens, chain = self._entries.popitem(last=False)
        self._allocator.release(part.segment for part in chain)
        for block_hash in _block_hashes(tokens):
            if self._by_block.get(block_hash) is tokens:
                del self._by_block[block_hash]
        return True

    def clear(self) -> None:
        """Evict all sequences."""
        while self.evict():
            pass


def _block_hashes(tokens: Sequence[int]) -> list[int]:
    """Return a chained hash for each prefix that consists of whole blocks."""
    hashes, block_hash = [], 0
    for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
        block_hash = hash((block_hash, tuple(tokens[end - _BLOCK : end])))
        hashes.append(block_hash)
    return hashes
