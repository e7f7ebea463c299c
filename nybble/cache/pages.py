"""Who has which page of the cache: reference counts, and full pages found again by their content.

Pure bookkeeping: pages are numbers, the tensors behind them are `store.py`'s.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def page_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page: a hash of its tokens and of all that stands before them.

    parent: the key of the page before it; for the first page, whatever else decides its keys
    and values (such as the NTK alpha). 128 bits of BLAKE2: equal names mean equal content.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """`num_pages` pages of `page_size` tokens; each is used, cached or free.

    used: held by one or more owners, who each give back what they took with `release`. cached:
    held by nobody, but its content has a name and may be taken again. free: empty. A page that
    is published must not be written any more: that is why only full ones are shared.

    Pages are taken lowest first. Those from `warm` on are taken only when no cached one is left,
    so that memory follows need; None: all are used before content is given up.
    """

    def __init__(self, num_pages: int, page_size: int, warm: int | None = None) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens is empty")
        self.num_pages, self.page_size = num_pages, page_size
        self._references = [0] * num_pages
        self._untouched = min(num_pages, num_pages if warm is None else warm)
        self._free = list(range(self._untouched - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._free) + self.num_pages - self._untouched

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return self.free + self.cached

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages of unspecified content, of the cached ones the longest unused."""
        if count > self.available:
            raise ValueError(f"{count} pages wanted, {self.available} available")
        pages = [self._next() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def acquire(self, key: bytes) -> int | None:
        """Take the page of this name, shared with its other owners; None where there is none."""
        page = self._pages.get(key)
        if page is not None:
            self._references[page] += 1
            self._cached.pop(page, None)
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference to each page of a sequence.

        The last pages count as longest unused: without those before them they are worth nothing.
        """
        for page in reversed(pages):
            if self._references[page] == 0:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._put_away(page)

    def publish(self, page: int, key: bytes) -> None:
        """Name a full page. The first page of a name keeps it; a twin stays private."""
        if page not in self._keys and self._pages.setdefault(key, page) == page:
            self._keys[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Take the names of pages away: their content is not to be trusted."""
        for page in pages:
            key = self._keys.pop(page, None)
            if key is not None:
                del self._pages[key]
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def check(self, owned: Iterable[int] | None = None) -> None:
        """RuntimeError unless used + free + cached = all, and no name is lost.

        owned: every page that somebody holds, as often as it is held; None leaves that out.
        """
        held = {page for page, count in enumerate(self._references) if count}
        parts = [*held, *self._free, *self._cached, *range(self._untouched, self.num_pages)]
        if sorted(parts) != list(range(self.num_pages)):
            raise RuntimeError(f"pages are lost or in two places: {sorted(parts)}")
        if {page: key for key, page in self._pages.items()} != self._keys:
            raise RuntimeError("names and pages do not match")
        if not self._cached.keys() <= self._keys.keys() or self._keys.keys() & set(self._free):
            raise RuntimeError("a cached page has no name, or a free one has")
        if owned is not None:
            counts = [0] * self.num_pages
            for page in owned:
                counts[page] += 1
            if counts != self._references:
                raise RuntimeError(f"references {self._references}, but the owners hold {counts}")

    def _put_away(self, page: int) -> None:
        if page in self._keys:
            self._cached[page] = None
        else:
            self._free.append(page)

    def _next(self) -> int:
        if self._free:
            return self._free.pop()
        if self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._pages[self._keys.pop(page)]
            return page
        self._untouched += 1
        return self._untouched - 1
