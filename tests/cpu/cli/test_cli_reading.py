"""Lines, blocks and prompts, as users type or pipe them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nybble.cli.reading import checked, read_message


def typed(*lines: str) -> Callable[[str], str]:
    rest = iter(lines)

    def read_line(ask: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read_line


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        ([""], ""),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),  # the input ends where another line was promised
        (['"""one', "two\\", 'three"""'], "one\ntwo\\\nthree"),
        (['"""', "one", '"""'], "one"),
        (['"""one line"""'], "one line"),
        (['  """', "  indented", '"""  '], "  indented"),
        (['"""', "one", "", "two"], "one\n\ntwo"),
        (['say """ here'], 'say """ here'),
    ],
)
def test_a_message_is_a_line_its_continuations_or_a_block(lines: list[str], message: str) -> None:
    assert read_message(typed(*lines)) == message


def test_a_message_ends_where_it_ends() -> None:
    read_line = typed("a\\", "b", "c")
    assert [read_message(read_line), read_message(read_line)] == ["a\nb", "c"]


def test_the_end_of_the_input_is_no_message() -> None:
    with pytest.raises(EOFError):
        read_message(typed())


def test_bytes_that_were_no_utf8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not UTF-8 at character 1.*iconv"):
        checked(b"a\xff".decode(errors="surrogateescape"))
    assert checked("你好 🙂") == "你好 🙂"
