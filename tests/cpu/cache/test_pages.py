"""The allocator of pages: references, names, eviction, and a check that can fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nybble.cache.pages import PagePool, page_key


def test_pages_come_lowest_first_and_the_last_given_back_returns_first():
    pool = PagePool(4, 32)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([1])
    assert pool.allocate(2) == [1, 3]


def test_counts_and_pages_for():
    pool = PagePool(4, 32)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 32, 33)] == [0, 1, 1, 2]
    pages = pool.allocate(3)
    pool.publish(pages[0], b"a")
    pool.release(pages[:2])
    assert (pool.used, pool.cached, pool.free, pool.available) == (1, 1, 2, 3)


def test_a_named_page_is_found_after_its_owner_left():
    pool = PagePool(4, 32)
    (page,) = pool.allocate(1)
    pool.publish(page, b"a")
    pool.release([page])
    assert pool.acquire(b"a") == page
    assert pool.acquire(b"a") == page
    assert pool.acquire(b"b") is None
    pool.check([page, page])


def test_the_longest_unused_name_goes_first_and_within_a_sequence_the_last_page():
    pool = PagePool(4, 32)
    old, new = pool.allocate(2), pool.allocate(2)
    for page, key in zip(old + new, (b"old0", b"old1", b"new0", b"new1"), strict=True):
        pool.publish(page, key)
    pool.release(old)
    pool.release(new)
    for gone in (b"old1", b"old0", b"new1", b"new0"):
        pool.allocate(1)
        assert pool.acquire(gone) is None
    with pytest.raises(ValueError, match="available"):
        pool.allocate(1)


def test_free_pages_are_taken_before_cached_ones():
    pool = PagePool(2, 32)
    (page,) = pool.allocate(1)
    pool.publish(page, b"a")
    pool.release([page])
    pool.allocate(1)
    assert pool.acquire(b"a") == page


def test_beyond_the_warm_pages_content_is_given_up_before_memory_is_touched():
    pool = PagePool(4, 32, warm=2)
    pages = pool.allocate(2)
    pool.publish(pages[0], b"a")
    pool.release(pages)
    assert pool.available == 4
    assert pool.allocate(3) == [1, 0, 2]
    assert pool.acquire(b"a") is None
    assert (pool.used, pool.free) == (3, 1)
    pool.check([0, 1, 2])


def test_a_twin_stays_private():
    pool = PagePool(2, 32)
    first, twin = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(twin, b"a")
    pool.release([first, twin])
    assert (pool.cached, pool.free) == (1, 1)
    assert pool.acquire(b"a") == first


def test_forgotten_pages_are_not_found_held_or_cached():
    pool = PagePool(3, 32)
    held, cached = pool.allocate(2)
    pool.publish(held, b"held")
    pool.publish(cached, b"cached")
    pool.release([cached])
    pool.forget([held, cached])
    assert pool.acquire(b"held") is None
    assert pool.acquire(b"cached") is None
    pool.release([held])
    assert pool.free == 3
    pool.check([])


def test_what_nobody_holds_cannot_be_released():
    pool = PagePool(2, 32)
    with pytest.raises(ValueError, match="nobody"):
        pool.release([0])


@pytest.mark.parametrize("size", [(0, 32), (4, 0)])
def test_an_empty_pool_is_refused(size):
    with pytest.raises(ValueError, match="empty"):
        PagePool(*size)


def _lose(pool):
    pool._free.pop()


def _copy(pool):
    pool._free[0] = pool._free[1]


def _rename(pool):
    pool._keys[0] = b"other"


def _unname(pool):
    del pool._pages[pool._keys.pop(1)]


@pytest.mark.parametrize("damage", [_lose, _copy, _rename, _unname])
def test_check_notices_damage(damage):
    pool = PagePool(6, 32)
    pages = pool.allocate(2)
    pool.publish(pages[0], b"a")
    pool.publish(pages[1], b"b")
    pool.release([pages[1]])
    pool.check([pages[0]])
    damage(pool)
    with pytest.raises(RuntimeError):
        pool.check()


def test_check_notices_an_owner_too_many():
    pool = PagePool(2, 32)
    pages = pool.allocate(1)
    with pytest.raises(RuntimeError, match="owners"):
        pool.check([*pages, *pages])


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_names_are_equal_only_for_equal_content(a, b):
    salts = (b"", b"alpha")
    keys = {(salt, tuple(tokens)): page_key(salt, tokens) for salt in salts for tokens in (a, b)}
    assert len(set(keys.values())) == len(keys)


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations, against a model that knows each page's content."""

    owners = Bundle("owners")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(6, 32, warm=3)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes | None] = {}

    @rule(target=owners, count=st.integers(0, 4))
    def allocate(self, count):
        if count > self.pool.available:
            with pytest.raises(ValueError, match="available"):
                self.pool.allocate(count)
            count = 0
        pages = self.pool.allocate(count)
        assert not set(pages) & {page for owner in self.held for page in owner}
        self.content |= dict.fromkeys(pages)
        self.held.append(pages)
        return pages

    @rule(target=owners, name=st.integers(0, 5))
    def acquire(self, name):
        page = self.pool.acquire(bytes([name]))
        if page is None:
            return []
        assert self.content[page] == bytes([name])
        self.held.append([page])
        return [page]

    @rule(owner=owners, name=st.integers(0, 5))
    def publish(self, owner, name):
        if owner in self.held and owner and self.content[owner[0]] is None:
            self.content[owner[0]] = bytes([name])
            self.pool.publish(owner[0], bytes([name]))

    @rule(owner=owners)
    def forget(self, owner):
        self.pool.forget(owner)

    @rule(owner=consumes(owners))
    def release(self, owner):
        if owner in self.held:
            self.held.remove(owner)
            self.pool.release(owner)

    @invariant()
    def accounted(self):
        self.pool.check(page for owner in self.held for page in owner)
        assert self.pool.used + self.pool.free + self.pool.cached == self.pool.num_pages


TestPoolMachine = PoolMachine.TestCase
