"""What finished requests leave in the cache, so that the next call of the same conversation need not read it again.

Kept by content, not by name: a prompt is matched against every kept sequence, and takes the longest common beginning.
When memory is needed, what was used longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from tpo.backends.local.kv_allocator import Chain, KVCacheAllocator, cut

_BLOCK = 16

Tokens = tuple[int, ...]


class PrefixCache:
    """Kept sequences; each holds its segments in the arena."""

    def __init__(self, arena: KVCacheAllocator) -> None:
        self._arena = arena
        self._kept: OrderedDict[Tokens, Chain] = OrderedDict()
        self._by_block: dict[int, Tokens] = {}

    def keep(self, tokens: Tokens, chain: Chain) -> None:
        """Hold a sequence of so many tokens as its chain has."""
        if tokens in self._kept:
            self._kept.move_to_end(tokens)
            return
        self._arena.hold(chain)
        self._kept[tokens] = chain
        for mark in _marks(tokens):
            self._by_block[mark] = tokens

    def longest(self, prompt: Sequence[int]) -> Chain:
        """The chain of the longest kept beginning of the prompt, without its last token: one is always read anew."""
        limit = len(prompt) - 1
        marks = reversed(_marks(prompt[:limit]))
        found = next((tokens for tokens in map(self._by_block.get, marks) if tokens is not None), None)
        if found is None:
            return ()
        self._kept.move_to_end(found)
        common = next((i for i, (a, b) in enumerate(zip(found, prompt, strict=False)) if a != b), len(found))
        return cut(self._kept[found], min(common, limit))

    def forget_one(self) -> bool:
        """Let go of what was used longest ago; False when nothing is kept."""
        if not self._kept:
            return False
        tokens, chain = self._kept.popitem(last=False)
        self._arena.release(piece.segment for piece in chain)
        for mark in _marks(tokens):
            if self._by_block.get(mark) is tokens:
                del self._by_block[mark]
        return True

    def forget(self) -> None:
        """Let go of everything."""
        while self.forget_one():
            pass


def _marks(tokens: Sequence[int]) -> list[int]:
    """A number for each beginning of whole blocks."""
    marks, mark = [], 0
    for end in range(_BLOCK, len(tokens) + 1, _BLOCK):
        mark = hash((mark, tuple(tokens[end - _BLOCK : end])))
        marks.append(mark)
    return marks
