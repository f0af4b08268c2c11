"""`BlockPool`: fixed-size KV blocks with reference counts; a hash chain over full blocks is the prefix cache."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from ragate_engine.config import BLOCK_SIZE

ROOT = b""
"""Parent hash of a sequence's first block."""


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], root: bytes = ROOT) -> None:
    """Append to `hashes` the chain hash of every full block of `tokens` that it lacks.

    A chain hash (16 bytes of blake2b) names the tokens of a block, everything before them, and `root`: sequences whose
    K and V differ for the same tokens, as under another adapter, have another.
    """
    first, end = len(hashes), len(tokens) // BLOCK_SIZE
    if first >= end:
        return
    content = array("i", tokens[first * BLOCK_SIZE : end * BLOCK_SIZE]).tobytes()
    parent = hashes[-1] if hashes else root
    size = BLOCK_SIZE * 4
    for at in range(0, len(content), size):
        parent = blake2b(parent + content[at : at + size], digest_size=16).digest()
        hashes.append(parent)


class BlockPool:
    """Hands out block ids. A free block keeps its content and its hash until it is needed for something else.

    The free list is ordered by time of release: the least recently used block is evicted first, and the blocks of
    one sequence are released leaf first, so that a prefix outlives what hangs on it. All operations are O(1) a block.
    """

    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def cached(self, hash_: bytes) -> bool:
        """Whether a block with this chain hash is in the pool."""
        return hash_ in self._by_hash

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `hashes`; the caller holds a reference to each."""
        found: list[int] = []
        for hash_ in hashes if self.prefix_cache else ():
            block = self._by_hash.get(hash_)
            if block is None:
                break
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """`count` fresh blocks, least recently used first, or `None` (and nothing taken) where they are lacking."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            hash_ = self._hash[block]
            if hash_ is not None:
                del self._by_hash[hash_]
                self._hash[block] = None
            self._references[block] = 1
            taken.append(block)
        return taken

    def commit(self, block: int, hash_: bytes) -> None:
        """Publish a held, fully computed block under its chain hash; a twin that is already there stays the one."""
        if self.prefix_cache and self._hash[block] is None and hash_ not in self._by_hash:
            self._hash[block] = hash_
            self._by_hash[hash_] = block

    def forget(self) -> None:
        """Drop every cached prefix; blocks in use stay with those who hold them."""
        self._by_hash.clear()
        self._hash = [None] * self.num_blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a sequence's `blocks` (first to last)."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None

    def check(self, held: Sequence[Sequence[int]] = ()) -> None:
        """Assert the invariants; `held` are the block tables of all live sequences, when the caller knows them."""
        assert all(count >= 0 for count in self._references), "negative reference count"
        assert set(self._free) == {b for b, count in enumerate(self._references) if count == 0}, (
            "free list is off"
        )
        assert {b: h for h, b in self._by_hash.items()} == {
            b: h for b, h in enumerate(self._hash) if h is not None
        }
        counts = [0] * self.num_blocks
        for table in held:
            for block in table:
                counts[block] += 1
        if held or len(self._free) == self.num_blocks:
            assert counts == self._references, "a block is leaked or shared without a reference"
