"""The blocks of the KV pool: reference counts, reuse, and the prefix cache.

Every operation costs O(1) a block, whatever the size of the pool. A block is either free (once in
the free queue) or used (reference count above 0); a free block may still hold cached content.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from jaxllm.engine import sequence as seq

HASH_SIZE = 16  # bytes; 2**64 blocks before two differing prefixes are likely to collide


def extend_block_hashes(
    hashes: list[bytes],
    token_ids: Sequence[int],
    block_size: int,
    salt: str | None = None,
    num_tokens: int | None = None,
) -> None:
    """Appends the missing hashes of the full blocks of ``token_ids``, of which only the first
    ``num_tokens`` are looked at.

    Block i's hash is that of (hash of block i - 1, its token ids), so equal hashes mean equal
    prefixes. The salt enters the first block's and thereby all: other salts never share a block.
    """
    first, end = len(hashes), len(token_ids) // block_size
    if num_tokens is not None:
        end = num_tokens // block_size
    if first >= end:
        return
    stride = 4 * block_size
    content = array("i", token_ids[first * block_size : end * block_size]).tobytes()
    parent = hashes[-1] if hashes else _root_hash(salt)
    for offset in range(0, (end - first) * stride, stride):
        parent = blake2b(parent + content[offset : offset + stride], digest_size=HASH_SIZE).digest()
        hashes.append(parent)


def _root_hash(salt: str | None) -> bytes:
    """The parent of a first block. "" is a salt like any other, and differs from none."""
    if salt is None:
        return bytes(HASH_SIZE)
    return blake2b(
        salt.encode("utf-8", "surrogatepass"), digest_size=HASH_SIZE, person=b"jaxllm-salt"
    ).digest()


class BlockPool:
    """Hands out the blocks 0 .. num_blocks - 1 and remembers what full blocks hold.

    The free queue is in order of reuse: first blocks without cached content, then cached ones, the
    least recently freed first. A sequence's blocks are freed from its tail on, so that of a cached
    prefix the end is lost first, and what remains can still be found.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_queried_tokens = 0  # known tokens of the sequences looked up at admission
        self.num_hit_tokens = 0  # of these, found in the pool
        self.clear()

    def clear(self) -> None:
        """Frees everything and forgets all content: the state after construction, but for stats."""
        self._ref_counts = [0] * self.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated, those with cached content included."""
        return len(self._free)

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """Blocks whose content can be found, held or free."""
        return tuple(self._hash_of_block)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, in [0, 1]."""
        return 1 - len(self._free) / self.num_blocks

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix. They are not held before ``acquire``."""
        blocks: list[int] = []
        block_of_hash = self._block_of_hash
        for digest in hashes:
            block = block_of_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds: acquiring them lowers num_free_blocks by that."""
        ref_counts = self._ref_counts
        return sum(1 for block in blocks if not ref_counts[block])

    def num_holders(self, block: int) -> int:
        """In how many tables the block stands."""
        return self._ref_counts[block]

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these blocks, which are cached or held."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks for writing, held once each; their old content is forgotten.

        The caller has checked num_free_blocks.
        """
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
            self.forget(block)
        return blocks

    def replace(self, block: int) -> int:
        """A block for one of several holders of ``block``, who is its holder no longer. What is in
        it has to be copied."""
        [own] = self.allocate(1)
        self._ref_counts[block] -= 1
        assert self._ref_counts[block] > 0, f"block {block} has no other holder"
        return own

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a table, given in the table's order."""
        for block in reversed(blocks):
            count = self._ref_counts[block] - 1
            assert count >= 0, f"block {block} is freed more often than it was taken"
            self._ref_counts[block] = count
            if count == 0:
                self._free[block] = None
                if block not in self._hash_of_block:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> bool:
        """Makes a held block's content findable. False if another block has the same content.

        The content may be what the step under way computes.
        """
        if digest in self._block_of_hash:
            return False
        self._block_of_hash[digest] = block
        self._hash_of_block[block] = digest
        return True

    def forget(self, block: int) -> None:
        """The block's content is not, or will not be, what was registered."""
        digest = self._hash_of_block.pop(block, None)
        if digest is not None:
            del self._block_of_hash[digest]

    def forget_content(self, digests: Iterable[bytes]) -> None:
        """No block with one of these hashes is found any more, whoever holds it."""
        for digest in digests:
            block = self._block_of_hash.pop(digest, None)
            if block is not None:
                del self._hash_of_block[block]

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content; blocks that sequences hold stay theirs."""
        self._block_of_hash.clear()
        self._hash_of_block.clear()

    def check_integrity(self, sequences: Iterable[seq.Sequence] | None = None) -> None:
        """Raises AssertionError with what is wrong. With all live sequences given, also checks
        that each block is held as often as it stands in their block tables."""
        assert len(self._ref_counts) == self.num_blocks
        for block, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block} has reference count {count}"
            assert (count == 0) == (block in self._free), (
                f"block {block} has reference count {count} and is "
                f"{'' if block in self._free else 'not '}in the free queue"
            )
        num_used = sum(count > 0 for count in self._ref_counts)
        assert len(self._free) + num_used == self.num_blocks, (
            f"{len(self._free)} free + {num_used} used blocks are not {self.num_blocks}"
        )
        inverse = {block: digest for digest, block in self._block_of_hash.items()}
        assert len(inverse) == len(self._block_of_hash), "two hashes name the same block"
        assert inverse == self._hash_of_block, "the maps of hashes and blocks disagree"
        if sequences is not None:
            self._check_tables(sequences)

    def _check_tables(self, sequences: Iterable[seq.Sequence]) -> None:
        held: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.block_table
            held.update(table)
            assert len(set(table)) == len(table), (
                f"sequence {sequence.sequence_id} has a block twice in its table {table}"
            )
            assert len(table) * self.block_size >= sequence.num_computed_tokens, (
                f"sequence {sequence.sequence_id} has {len(table)} blocks for "
                f"{sequence.num_computed_tokens} computed tokens"
            )
        for block, count in enumerate(self._ref_counts):
            assert count == held[block], (
                f"block {block} has reference count {count} and is in {held[block]} tables"
            )
