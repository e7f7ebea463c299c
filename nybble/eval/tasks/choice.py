"""Which of A to D a free answer means: the rules of the card's scripts, and today's.

The card's rules first write the letter where the answer repeats an option's text, then try four
readings in order, and at last take the option most like the answer. Written from the protocol's
description and compared with the original scripts on its cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCD"
_NO = "[^ABCD]"  # a gap never reaches over another letter

ENGLISH = tuple(
    re.compile(pattern)
    for pattern in (
        # "the answer is B", "choose B"; not "the answer is not A"
        rf"(?:[Cc]hoose|(?:[Aa]nswer|[Cc]hoice)(?!{_NO}{{0,20}}?(?:n't|not)){_NO}{{0,12}}?\b)"
        rf"{_NO}{{0,20}}?\b([ABCD])\b",
        # "B is correct"; not "B is not correct"
        rf"\b([ABCD])\b(?!{_NO}{{0,8}}?(?:n't|not){_NO}{{0,5}}?(?:correct|right))"
        rf"{_NO}{{0,10}}?\b(?:correct|right)\b",
        r"^([ABCD])(?:[.,:]|$)",
        r"(?<![a-zA-Z])([ABCD])(?![a-zA-Z=])",
    )
)
_IS = "[是为：:】]"
CHINESE = tuple(
    re.compile(pattern)
    for pattern in (
        # 答案是B、选B; not 答案不是A
        rf"(?:选择?|选定|(?:答案|选项)(?!{_NO}{{0,10}}?[不非]{_NO}{{0,10}}?{_IS})"
        rf"{_NO}{{0,10}}?{_IS}{_NO}{{0,10}}?)([ABCD])(?:选项)?(?:[)。.，,．、ABCD]|$)",
        # B选项正确、B符合题意; not B不正确
        rf"([ABCD])(?:选?项)?(?!{_NO}{{0,4}}?[不非]{_NO}{{0,4}}?(?:正确|对|符合))"
        rf"{_NO}{{0,4}}?(?:正确|对|符合)",
        r"^([ABCD])(?:[。.，,．]|$)",
        r"(?<![a-zA-Z])([ABCD])(?![a-zA-Z=])",
    )
)
_FINAL = re.compile(r"(?:(?i:answer(?:\s+is)?)|答案[是为]?)\W{0,6}([ABCD])(?![A-Za-z])")
# "A cell divides": the first word of a sentence, and no letter; "A is right" and such are.
_ARTICLE = re.compile(
    r"(?:^|(?<=[.!?:]\s))A(?=[ \t]+(?!is\b|because\b|since\b)[a-z])", re.MULTILINE
)
_LONGEST_STEM = 4


def english(output: str, options: Mapping[str, str]) -> str:
    """The card's reading of an English answer; always one of the letters."""
    text = output
    for letter, option in _longest_first(options):
        if stem := option.rstrip("."):
            text = re.sub(re.escape(stem), letter, text, flags=re.IGNORECASE)
    return _first(ENGLISH, text) or _most_alike(text, options)


def chinese(output: str, question: str, options: Mapping[str, str]) -> str:
    """The card's reading of a Chinese answer; always one of the letters."""
    text = _without_stem(output, question)
    for letter, option in _longest_first(options):
        if stem := option.rstrip("。"):
            text = text.replace(stem, letter)
    return _first(CHINESE, text) or _most_alike(text, options)


def final(output: str, patterns: tuple[re.Pattern[str], ...]) -> str | None:
    """Today's reading: the last "Answer: X"; else the card's readings of the plain text.

    patterns: ENGLISH or CHINESE. No guess: None where no letter is named.
    """
    if named := _FINAL.findall(output):
        return str(named[-1])
    return _first(patterns, _ARTICLE.sub("a", output.strip()))


def _without_stem(output: str, question: str) -> str:
    """An answer that repeats the question with its gap filled becomes 答案是 and the filling."""
    parts = question.rstrip("。").split("。")[-1].split("_")
    if len(parts[0].strip()) > _LONGEST_STEM:
        output = output.replace(parts[0], "答案是")
    if len(parts[-1].strip()) > _LONGEST_STEM:
        output = output.replace(parts[-1], "")
    return output


def _longest_first(options: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(options.items(), key=lambda pair: len(pair[1]), reverse=True)


def _first(patterns: tuple[re.Pattern[str], ...], text: str) -> str | None:
    for pattern in patterns:
        if match := pattern.search(text):
            return match.group(1)
    return None


def _most_alike(text: str, options: Mapping[str, str]) -> str:
    from rapidfuzz import fuzz, process, utils

    letters = list(options)
    found = process.extractOne(
        text, list(options.values()), scorer=fuzz.WRatio, processor=utils.default_process
    )
    return letters[found[2]] if found else letters[0]
