"""L-Eval, closed-ended (An et al. 2023): six kinds of questions about long documents.

Data: LEval/Exam/NAME.jsonl, rows {"input": document, "instructions": [...], "outputs": [...]}.
The scores repeat the benchmark's own script, from which the card's row comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nybble.errors import RequestError
from nybble.eval import data
from nybble.eval.task import Item, Prompt, Settings, Task
from nybble.eval.tasks import choice
from nybble.eval.text import shorten

TASKS = ("coursera", "gsm100", "quality", "tpo", "codeU", "sci_fi")
_MAX_NEW_TOKENS = 512
_ROOM = 100  # tokens for what stands around document and question
_ONE_LETTER = (
    "Please only provide the letter corresponding to the answer (like A or {}) when answering. "
)
_LONG = (
    "Now you are given a very long document. Please follow the instruction based on this document. "
)
_SYSTEM = {
    "coursera": _LONG + "For multi-choice questions, there could be a single correct option or "
    "multiple correct options. " + _ONE_LETTER.format("AB"),
    "gsm100": "Given several question answer pairs, you need to follow a similar format to answer "
    "the last question. Make sure the response is end with The answer is _ . ",
    "codeU": "Now you are given a code base consisting of a large amount of functions and the "
    "corresponding comments. In the end, I will call some functions defined in the code base. "
    "Please carefully read these codes and comments and answer the question.",
    "sci_fi": "Now you are given a scientific fiction. I will ask you some questions and the "
    'answer should be "True" or "False". Notice that you should answer the question based on the '
    "evidence in the document instead of your background knowledge.",
}
_EXAM_SYSTEM = (
    _LONG + "For multi-choice questions, there is only a single correct option. "
    f"{_ONE_LETTER.format('B')}For other questions, please directly give the concise and accurate "
    "answer. "
)
_DIRECT = "Please directly give the answer without any additional output or explanation"
_FROM_TEXT = "based on the world described in the document."
_FROM_WORLD = "based on the real-world knowledge and facts up until your last training"
_FACT = re.compile(r"^(.*?)\[fact:(.*)\]?\s*$", re.DOTALL | re.IGNORECASE)


class LEval(Task):
    """One of the six; `kind` is its file's name."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self.kind = name.removeprefix("leval-")
        self._documents: list[str] = []

    # -- loading -----------------------------------------------------------------------------

    def load(self) -> list[Item]:
        source = data.Source(
            self.name,
            f"a folder with {self.kind}.jsonl of https://huggingface.co/datasets/L4NLP/LEval.",
            repo_id="L4NLP/LEval",
            filename=f"LEval/Exam/{self.kind}.jsonl",
        )
        file = f"{self.kind}.jsonl"
        path = data.find(source, self.settings.data, file, f"LEval/Exam/{file}", f"Exam/{file}")
        fields = {"input": str, "instructions": list, "outputs": list}
        rows = data.read_jsonl(path, fields)
        # Kept here, not in the items: a row on disk has its document in its prompt already.
        self._documents = [row["input"] for row in rows]
        return [item for number, row in enumerate(rows) for item in self._items(row, number, path)]

    def _items(self, row: Mapping[str, Any], number: int, path: object) -> Iterable[Item]:
        pairs = list(zip(row["instructions"], row["outputs"], strict=False))
        if len(row["instructions"]) != len(row["outputs"]):
            raise data.DataError(
                f"{path}, line {number + 1}: as many outputs as instructions belong there; "
                "fetch it again."
            )
        for index, (query, reference) in enumerate(pairs):
            yield from self._parts(
                Item(f"{number}/{index}", query, reference, fields={"document": number})
            )

    def _parts(self, item: Item) -> Iterable[Item]:
        """Science fiction asks twice, after the text and after the world; the others once."""
        if self.kind != "sci_fi":
            yield item
            return
        for part, reference in zip(("text", "world"), _both(item.reference), strict=True):
            yield Item(f"{item.id}/{part}", item.query, reference, part, item.fields)

    def items_of(self, row: Mapping[str, Any], index: int) -> Iterable[tuple[Item, str]]:
        for item, output in super().items_of(row, index):
            if self.kind != "sci_fi" or item.subject:
                yield item, output
                continue
            yield from zip(self._parts(item), _both(output), strict=True)

    # -- prompts -----------------------------------------------------------------------------

    def prompt(self, item: Item) -> Prompt:
        system = _SYSTEM.get(self.kind, _EXAM_SYSTEM)
        document, query = self._fitting(item, system), item.query
        if self.kind in ("gsm100", "codeU"):
            text = f"{document}\n\n{query}"
        else:
            if item.subject == "world":
                query = query.replace(_FROM_TEXT, _FROM_WORLD)
            text = f"Document is as follows. {document} \nQuestion: {query}. {_DIRECT} \nAnswer:"
        if self.settings.base:
            return Prompt(f"{system}\n\n{text}", chat=False, max_tokens=_MAX_NEW_TOKENS)
        return Prompt(text, system, max_tokens=_MAX_NEW_TOKENS)

    def _fitting(self, item: Item, system: str) -> str:
        """The document, without its tail (code: its head) where it is too long."""
        document, tokens = self._documents[int(item.fields["document"])], self.settings.tokens
        if self.settings.context is None:
            return document
        room = self.settings.context - _MAX_NEW_TOKENS - _ROOM - len(tokens(system + item.query))
        if len(tokens(document)) <= room:
            return document
        return shorten(document, max(1, room), tokens, keep_end=self.kind == "codeU")

    # -- scoring -----------------------------------------------------------------------------

    def extract(self, item: Item, output: str) -> str | None:
        if self.kind == "codeU":
            return code_answer(output, len(item.reference.split()))
        if not self.settings.card and self.kind in _MODERN:
            return _MODERN[self.kind](output)
        return _CARD[self.kind](output)

    def score(self, item: Item, answer: str | None) -> float:
        if answer is None:
            return 0.0
        return exact_match(answer, self._reference(item.reference))

    def _reference(self, text: str) -> str:
        if self.kind == "gsm100":
            return math_answer(text)
        if self.kind == "codeU":
            return plain_code(text)
        if self.kind == "sci_fi":
            return text.strip().lower()
        return letters_of_first_word(text)


def _both(text: str) -> tuple[str, str]:
    """The two halves of `True [fact: False]`."""
    match = _FACT.match(text)
    if match is None:
        raise RequestError(
            f"{text[:60]!r} has no [fact: ...]: sci_fi rows are written `True [fact: False]`."
        )
    return match.group(1).strip(), match.group(2).strip("] \n")


# -- multiple choice ---------------------------------------------------------------------------


def first_letter(output: str) -> str:
    """The first of A to D anywhere, within words too; A where there is none.

    A run such as "AB" (or nothing at all) stands for itself.
    """
    if output in choice.LETTERS:
        return output
    return next((character for character in output if character in choice.LETTERS), "A")


def letter_set(output: str) -> str:
    """The letters at the very start, or all those before a space, point or bracket, sorted.

    A letter that ends the text counts only at the start: of "A, C" the script takes A.
    """
    start = output[: len(output) - len(output.lstrip(choice.LETTERS))]
    if start == output or len(start) > 1:
        return "".join(sorted(set(start)))
    rest = output[len(start) :].split("Question")[0]
    found = set(start) | set(re.findall(r"[A-D](?=[\s.)])", rest))
    return "".join(sorted(found)) or "A"


def free_letters(output: str) -> str | None:
    """Today's reading: every free-standing letter of the first line, sorted."""
    lines = output.strip().splitlines()
    options = [line for line in lines if re.match(r"\(?[A-D][.):]?(\s|$)", line)]
    text = "\n".join(line[:3] for line in options) if len(options) > 1 else (lines or [""])[0]
    if re.match(r"[A-D]{1,4}$", text):
        return "".join(sorted(set(text)))
    # A run is in order, "BD.": so few words are one.
    found = re.findall(r"(?<![A-Za-z])(?=[A-D])A?B?C?D?(?![A-Za-z'])", text)
    return "".join(sorted(set("".join(found)))) or None


def letters_of_first_word(text: str) -> str:
    first = (text.split() or [""])[0]
    return re.sub("[^A-D]", "", first) or "A"


# -- numbers, code, true or false ----------------------------------------------------------------


def math_answer(output: str) -> str:
    """The digits before the point of what follows "The answer is", else of the last such word."""
    if match := re.search(r"The answer is (\S+)", output):
        word = match.group(1)
    else:
        words = output.split("\n\n")[0].split(" ")
        word = next((w for w in reversed(words) if any(c.isdigit() for c in w)), "")
    return "".join(c for c in word.split(".")[0] if c.isdigit())


def plain_code(text: str) -> str:
    """White space, commas, quotes, backslashes, ".0" and blanks between brackets do not count."""
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    for spaced, tight in (("] [", "]["), ("[ [", "[["), ("] ]", "]]")):
        text = text.replace(spaced, tight)
    return text


_PHRASES = (
    "will be",
    "of the code",
    "is",
    "would be",
    "the value of",
    "the result of",
    "printed",
)


def code_answer(output: str, reference_words: int) -> str:
    """As many words as the reference has, and three: after "the final output", else the last."""
    text = plain_code(output)
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    _, found, after = text.rpartition("the final output")
    take = reference_words + 3
    words = re.split(r"\s+", after if found else text)
    return " ".join(words[:take] if found else words[-take:])


def verdict(output: str) -> str:
    """The first word that holds true or false; anything else matches no reference."""
    for word in output.lower().split():
        for value in ("true", "false"):
            if value in word:
                return value
    return "<error>"


def exact_match(answer: str, reference: str) -> float:
    """1 if equal; 0.25 for some of a reference's letters; text may contain its reference."""
    if set(reference) <= set(choice.LETTERS):
        if answer == reference:
            return 1.0
        return 0.25 if answer and set(answer) <= set(reference) else 0.0
    try:
        return float(float(answer) == float(reference))
    except ValueError:
        tight = [text.lower().replace(" ", "") for text in (reference, answer)]
        return float(tight[0] in tight[1])


_CARD: Mapping[str, Callable[[str], str]] = {
    "coursera": letter_set,
    "quality": first_letter,
    "tpo": first_letter,
    "gsm100": math_answer,
    "sci_fi": verdict,
}


def _one_letter(output: str) -> str | None:
    return choice.final(output, choice.ENGLISH)


_MODERN: Mapping[str, Callable[[str], str | None]] = {
    "coursera": free_letters,
    "quality": _one_letter,
    "tpo": _one_letter,
}
