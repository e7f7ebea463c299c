"""Reports on stdout: aligned lines, and numbers that people can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned to the left, two spaces apart."""
    rows = [list(row) for row in rows]
    columns = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(columns)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def size(nbytes: float) -> str:
    """Bytes in decimal units, as disks and model cards count them: 38.5 GB."""
    power = 0
    while nbytes >= 999.5 and power < len(_UNITS) - 1:
        nbytes /= 1000
        power += 1
    return f"{nbytes:.3g} {_UNITS[power]}"


def count(number: int) -> str:
    """A number of parameters: 72.3 billion, 135 million."""
    for unit, scale in (("billion", 10**9), ("million", 10**6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"
