"""Where nybble keeps what it makes for itself."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$NYBBLE_CACHE, else $XDG_CACHE_HOME/nybble, else ~/.cache/nybble. Not created here."""
    if path := os.environ.get("NYBBLE_CACHE"):
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nybble"
