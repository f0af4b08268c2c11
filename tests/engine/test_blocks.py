"""The block pool: reference counts, prefix cache and eviction, on examples and on random histories."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ragate_engine.blocks import BlockPool, extend_hashes


def hashes_of(tokens: list[int]) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens)
    return hashes


def test_a_chain_hash_names_everything_before_it() -> None:
    same_tail_a = hashes_of([1] * 16 + [5] * 16)
    same_tail_b = hashes_of([2] * 16 + [5] * 16)
    assert same_tail_a[1] != same_tail_b[1]
    assert len(hashes_of([1] * 31)) == 1
    assert same_tail_a[0] == hashes_of([1] * 16)[0]
    grown = hashes_of([1] * 16)
    extend_hashes(grown, [1] * 16 + [5] * 16)
    assert grown == same_tail_a


def test_chains_of_different_roots_have_no_hash_in_common() -> None:
    tokens = [1] * 48
    chains: list[list[bytes]] = [[], [], []]
    for chain, root in zip(chains, (b"", b"one adapter", b"another"), strict=True):
        extend_hashes(chain, tokens[:20], root)
        extend_hashes(chain, tokens, root)
    assert chains[0] == hashes_of(tokens)
    assert len({hash_ for chain in chains for hash_ in chain}) == 9


def test_a_released_block_is_found_again_until_it_is_evicted() -> None:
    pool = BlockPool(3)
    (hash_,) = hashes_of(list(range(16)))
    (block,) = pool.allocate(1) or []
    pool.commit(block, hash_)
    pool.release([block])
    assert pool.match([hash_]) == [block]
    pool.release([block])
    assert pool.allocate(3) is not None
    assert pool.match([hash_]) == []


def test_eviction_takes_the_least_recently_released_and_leaves_before_roots() -> None:
    pool = BlockPool(4)
    chain = hashes_of(list(range(48)))
    blocks = pool.allocate(3) or []
    for block, hash_ in zip(blocks, chain, strict=True):
        pool.commit(block, hash_)
    pool.release(blocks)
    pool.allocate(2)  # the never used block, then the leaf
    assert pool.match(chain) == blocks[:2]


def test_allocating_too_many_takes_nothing() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.free_blocks == 2


def test_a_shared_block_is_free_only_when_all_have_let_go() -> None:
    pool = BlockPool(2)
    (hash_,) = hashes_of([7] * 16)
    (block,) = pool.allocate(1) or []
    pool.commit(block, hash_)
    assert pool.match([hash_]) == [block]
    pool.release([block])
    assert pool.free_blocks == 1
    pool.release([block])
    assert pool.free_blocks == 2


def test_without_a_prefix_cache_nothing_matches() -> None:
    pool = BlockPool(2, prefix_cache=False)
    (hash_,) = hashes_of([7] * 16)
    (block,) = pool.allocate(1) or []
    pool.commit(block, hash_)
    assert pool.match([hash_]) == []


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 80)), max_size=60))
def test_no_history_leaks_or_shares_a_block_wrongly(size: int, history: list[tuple[int, int]]) -> None:
    pool = BlockPool(size)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    for family, length in history:
        if length == 0 and tables:
            pool.release(tables.pop(family % len(tables)))
        else:
            hashes = hashes_of([family] * length)
            found = pool.match(hashes)
            # a hit is a block that was last committed under that very hash
            assert [content[b] for b in found] == hashes[: len(found)]
            fresh = pool.allocate(len(hashes) - len(found))
            if fresh is None:
                pool.release(found)
            else:
                for block, hash_ in zip(fresh, hashes[len(found) :], strict=True):
                    pool.commit(block, hash_)
                    content[block] = hash_
                tables.append(found + fresh)
        pool.check(tables)
