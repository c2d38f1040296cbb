import random

import pytest

from jaxllm.engine.block_pool import BlockPool, extend_block_hashes


def hashes_of(token_ids, block_size=2, salt=None):
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size, salt)
    return hashes


def fill(pool, token_ids, salt=None):
    """A sequence's blocks, computed and registered."""
    digests = hashes_of(token_ids, pool.block_size, salt)
    table = pool.allocate(len(digests))
    for block, digest in zip(table, digests, strict=True):
        pool.register(block, digest)
    return table


def test_hashes_are_of_full_blocks_and_chained():
    one, other = hashes_of([1, 2, 3, 4, 5]), hashes_of([9, 2, 3, 4])
    assert len(one) == 2
    assert one[1] != other[1], "same tokens in the block, other prefix"
    assert hashes_of([1, 2, 3, 4]) == one


def test_hashes_grow_with_the_sequence_as_if_made_at_once():
    grown: list[bytes] = []
    for length in range(1, 12):
        extend_block_hashes(grown, list(range(length)), 3)
    assert grown == hashes_of(list(range(11)), 3)


def test_salts_separate_also_the_empty_one_and_odd_text():
    made = [hashes_of([1, 2, 3, 4], salt=salt)[1] for salt in (None, "", "a", "b", "\ud800")]
    assert len(set(made)) == 5


def test_match_finds_the_longest_prefix_after_it_was_freed():
    pool = BlockPool(8, 2)
    table = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.free(table)
    assert pool.num_free_blocks == 8
    assert pool.match_prefix(hashes_of([1, 2, 3, 4, 7, 8])) == table[:2]
    assert pool.match_prefix(hashes_of([3, 4])) == []
    assert pool.match_prefix(hashes_of([1, 2], salt="x")) == []


def test_a_shared_block_is_free_when_its_last_holder_frees_it():
    pool = BlockPool(4, 2)
    table = fill(pool, [1, 2])
    pool.acquire(table)
    pool.free(table)
    assert pool.num_free_blocks == 3
    pool.free(table)
    assert pool.num_free_blocks == 4
    pool.check_integrity([])


def test_blocks_without_content_are_reused_first_then_the_end_of_the_oldest_prefix():
    pool = BlockPool(5, 2)
    first = fill(pool, [1, 2, 3, 4])
    second = fill(pool, [5, 6])
    plain = pool.allocate(2)
    pool.free(first)
    pool.free(second)
    pool.free(plain)
    order = [pool.allocate(1)[0] for _ in range(5)]
    assert sorted(order[:2]) == sorted(plain)
    assert order[2:] == [first[1], first[0], second[0]]


def test_a_hit_renews_a_prefix():
    pool = BlockPool(2, 2)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.free(old)
    pool.free(new)
    pool.acquire(old)
    pool.free(old)
    assert pool.allocate(1) == new


def test_reused_content_is_forgotten():
    pool = BlockPool(1, 2)
    pool.free(fill(pool, [1, 2]))
    pool.allocate(1)
    assert pool.match_prefix(hashes_of([1, 2])) == []
    pool.check_integrity()


def test_the_second_block_of_equal_content_is_not_registered():
    pool = BlockPool(4, 2)
    first = fill(pool, [1, 2])
    (second,) = pool.allocate(1)
    assert not pool.register(second, hashes_of([1, 2])[0])
    assert pool.match_prefix(hashes_of([1, 2])) == first
    pool.check_integrity()


def test_reset_forgets_content_but_not_holders():
    pool = BlockPool(4, 2)
    table = fill(pool, [1, 2, 3, 4])
    pool.reset_prefix_cache()
    assert pool.match_prefix(hashes_of([1, 2])) == []
    assert (pool.num_free_blocks, pool.usage) == (2, 0.5)
    pool.free(table)
    pool.check_integrity([])


def test_check_integrity_names_what_is_wrong():
    def broken(damage):
        pool = BlockPool(4, 2)
        fill(pool, [1, 2])
        damage(pool)
        with pytest.raises(AssertionError) as error:
            pool.check_integrity([])
        return str(error.value)

    assert "reference count 1 and is in 0 tables" in broken(lambda pool: None)
    assert "in the free queue" in broken(lambda pool: pool._free.popitem())
    assert "in the free queue" in broken(lambda pool: pool._free.update({0: None}))
    assert "disagree" in broken(lambda pool: pool._hash_of_block.clear())


def test_freeing_twice_is_refused():
    pool = BlockPool(4, 2)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(table)


def test_random_operations_keep_integrity():
    rng = random.Random(0)
    pool = BlockPool(12, 2)
    tables: list[list[int]] = []
    for _ in range(1500):
        token_ids = [rng.randrange(2) for _ in range(2 * rng.randrange(1, 5))]
        digests = hashes_of(token_ids)
        hits = pool.match_prefix(digests)
        num_new = len(digests) - len(hits)
        if rng.random() < 0.5 and num_new + pool.num_free_among(hits) <= pool.num_free_blocks:
            pool.acquire(hits)
            table = hits + pool.allocate(num_new)
            for block, digest in list(zip(table, digests, strict=True))[len(hits) :]:
                pool.register(block, digest)
            tables.append(table)
        elif tables:
            pool.free(tables.pop(rng.randrange(len(tables))))
        pool.check_integrity()
        held = sum(len(table) for table in tables)
        assert sum(pool._ref_counts) == held
