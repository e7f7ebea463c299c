"""The answers of a batch on disk: a journal while it runs, then one file in the prompts' order.

The journal is `OUTPUT.part`: a line that says which run this is, then a line for each answer, as
they finish. A kill can cut its last line only, which is removed when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from nybble.checkpoint.files import lock
from nybble.errors import ConfigError


class Answers:
    """Use as `with Answers(output, about) as answers:`. `about` tells one run from another.

    ConfigError where the output exists, another process writes it, or the journal is of a run
    that differs: nothing that is finished is ever overwritten.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        self.output = output
        self.journal = output.parent / f"{output.name}.part"
        self._about = json.loads(json.dumps(about))
        self._places: dict[int, int] = {}  # line of the prompt -> offset in the journal
        self.failed = 0
        self._file: BinaryIO

    def __enter__(self) -> Answers:
        if os.path.lexists(self.output):
            raise self._exists()
        with _file_errors(self.journal):
            handle = lock(self.journal, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        if handle is None:
            raise ConfigError(f"Another process is writing {self.journal}: wait for it.")
        self._file = os.fdopen(handle, "a+b")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _file_errors(self.journal):
            self._file.close()

    def __contains__(self, line: int) -> bool:
        """Whether the prompt of this line has its answer."""
        return line in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, line: int, answer: Mapping[str, Any]) -> None:
        """Keep an answer, or the `error` in its place; from now on a kill does not lose it."""
        self._place({"line": line, **answer}, self._file.seek(0, os.SEEK_END))
        self._append({"line": line, **answer})

    def finish(self, lines: Iterable[int]) -> None:
        """Put the answers into the output, in this order, all at once.

        ConfigError where another file has taken that name meanwhile; the journal stays then.
        """
        sorted_part = self.journal.with_name(self.journal.name + ".sorted")
        with _file_errors(sorted_part):
            with sorted_part.open("wb") as file:
                for line in lines:
                    self._file.seek(self._places[line])
                    file.write(self._file.readline())
                file.flush()
                os.fsync(file.fileno())
            self._publish(sorted_part)
            self.journal.unlink()

    def _publish(self, whole: Path) -> None:
        """Under the output's name, all of it at once, and never in another file's place."""
        try:
            os.link(whole, self.output)
            whole.unlink()
        except FileExistsError as error:
            raise self._exists() from error
        except OSError:  # a file system without hard links
            if os.path.lexists(self.output):
                raise self._exists() from None
            whole.replace(self.output)

    def _exists(self) -> ConfigError:
        return ConfigError(f"{self.output} exists: move it away, or give --output another name.")

    # -- the journal ---------------------------------------------------------------------------

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                # Only the beginning of our own first line is ours to remove.
                if number == 0 and not _line(self._about).startswith(line):
                    raise self._damaged("its first line is cut off")
                self._file.truncate(end)
                break
            row = self._parsed(line)
            if number == 0:
                self._check_same(row)
            elif type(row.get("line")) is not int:
                raise self._damaged(f"line {number + 1} is no answer")
            else:
                self._place(row, end)
            end += len(line)
        if end == 0:
            self._append(self._about)

    def _place(self, row: Mapping[str, Any], offset: int) -> None:
        self._places[row["line"]] = offset
        self.failed += "error" in row

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(error) from error
        if not isinstance(row, dict):
            raise self._damaged("a line of it is no JSON object")
        return row

    def _damaged(self, problem: object) -> ConfigError:
        return ConfigError(
            f"{self.journal} is no journal of a run, or damaged ({problem}): move it away to "
            "begin anew, or give --output another name."
        )

    def _check_same(self, before: Mapping[str, Any]) -> None:
        if differ := [key for key in self._about if before.get(key) != self._about[key]]:
            raise ConfigError(
                f"{self.journal} holds an unfinished run that differs in {', '.join(differ)}: "
                "repeat its settings to go on, remove it to begin anew, or give --output "
                "another name."
            )

    def _append(self, row: Mapping[str, Any]) -> None:
        with _file_errors(self.journal):
            self._file.write(_line(row))
            self._file.flush()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}): check the folder and its disk, "
            "then run the same command again; finished rows are kept."
        ) from error
