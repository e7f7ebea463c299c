"""Where a benchmark's rows come from: a folder in the published layout, or a download."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nybble.errors import NybbleError
from nybble.paths import cache_dir

_TIMEOUT = 60


class DataError(NybbleError):
    """A benchmark's file is missing or malformed; the message says how to get it."""


@dataclass(frozen=True)
class Source:
    """A benchmark's home: one file or archive of a hub data set, or at a plain address.

    Neither: it cannot be downloaded. hint: how to get the data by hand.
    """

    name: str
    hint: str
    repo_id: str = ""
    filename: str = ""
    url: str = ""

    def fetch(self) -> Path:
        """The file, or the folder that the archive was unpacked to; from the cache if it is there.

        DataError: it cannot be downloaded; the message says how to get the data by hand.
        """
        if not (self.repo_id or self.url):
            raise self.missing("it is not published")
        folder = cache_dir() / "eval" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        if self.repo_id:
            return _unpacked(self._from_hub(), folder)
        target = folder / self.url.rsplit("/", 1)[-1]
        if not target.exists():
            self._from_web(target)
        return target

    def _from_hub(self) -> Path:
        from huggingface_hub import errors, hf_hub_download

        http_error: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
        try:
            return Path(hf_hub_download(self.repo_id, self.filename, repo_type="dataset"))
        except (OSError, http_error) as error:
            raise self.missing(str(error)) from error

    def _from_web(self, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        try:
            with urllib.request.urlopen(self.url, timeout=_TIMEOUT) as response:
                part.write_bytes(response.read())
        except OSError as error:
            raise self.missing(str(error)) from error
        part.replace(target)

    def missing(self, reason: str) -> DataError:
        first = (reason.strip() or "no reason given").splitlines()[0]
        return DataError(
            f"The data of {self.name} could not be downloaded ({first}). "
            f"Give --data DIR: {self.hint}"
        )


def _unpacked(archive: Path, folder: Path) -> Path:
    """Archives are unpacked once; a stamp says that it was finished."""
    stamp = folder / ".unpacked"
    if archive.suffix not in (".zip", ".tar"):
        return archive
    if stamp.exists():
        return folder
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}): fetch it again.") from error
    stamp.touch()
    return folder


def find(source: Source, data: Path | None, *candidates: str) -> Path:
    """The first of the candidate paths that exists under `data` (or the download).

    `data` may name the file itself.
    """
    root = data.expanduser() if data is not None else source.fetch()
    if root.is_file():
        return root
    for candidate in candidates:
        if (path := root / candidate).exists():
            return path
    where = "is no folder" if not root.is_dir() else f"has no {' or '.join(candidates)}"
    raise DataError(f"{root} {where}, which {source.name} needs: {source.hint}")


def read_jsonl(
    path: Path,
    fields: Mapping[str, type],
    optional: Mapping[str, type | tuple[type, ...]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Objects, one a line (.gz unpacked), each with `fields` (and `optional` ones) of these types.

    DataError names the file, the line and what is wrong there.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_checked(line, fields, f"{path}, line {number}"))
                    _check_optional(rows[-1], optional, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path.") from error
    if not rows:
        raise DataError(f"{path} has no rows: fetch it again.")
    return rows


def _checked(line: str, fields: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON ({error}); repair or fetch the file.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: give one JSON object a line.")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            raise DataError(
                f"{where}: {name!r} must be there, as {kind.__name__}: "
                f"the fields are {', '.join(fields)}."
            )
    return row


def _check_optional(
    row: Mapping[str, Any], optional: Mapping[str, type | tuple[type, ...]], where: str
) -> None:
    for name, kind in optional.items():
        if name in row and not isinstance(row[name], kind):
            raise DataError(
                f"{where}: {name!r} cannot be {row[name]!r}: correct it, or leave it out."
            )


def _cells(path: Path, text: str) -> list[list[str]]:
    """The rows that are not empty."""
    try:
        return [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise DataError(f"{path} is no table ({error}): repair or fetch the file.") from error


def read_csv(path: Path, columns: Sequence[str], header: bool) -> list[dict[str, str]]:
    """Rows as dicts. Without a header the columns are given in order; with one, looked up."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): check the path.") from error
    # Not splitlines: a cell may hold other line separators than "\n".
    table = _cells(path, text)
    names = table.pop(0) if header and table else list(columns)
    missing = [column for column in columns if column not in names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}: fetch it again.")
    for number, cells in enumerate(table, 1):
        if len(cells) != len(names):
            raise DataError(
                f"{path}, row {number}: {len(cells)} columns where {len(names)} belong; "
                "repair or fetch the file."
            )
    if not table:
        raise DataError(f"{path} has no rows: fetch it again.")
    return [dict(zip(names, cells, strict=True)) for cells in table]
