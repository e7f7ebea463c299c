"""Where nybble keeps what it makes for itself, and which folder a user means."""

from __future__ import annotations

import os
from pathlib import Path

from nybble.errors import ConfigError


def cache_dir() -> Path:
    """$NYBBLE_CACHE, else $XDG_CACHE_HOME/nybble, else ~/.cache/nybble. Not created here.

    ConfigError where none of them is known.
    """
    if path := os.environ.get("NYBBLE_CACHE"):
        return Path(path)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "nybble"
    try:
        return Path.home() / ".cache" / "nybble"
    except RuntimeError as error:
        raise ConfigError(
            "This user has no home folder to keep models and kernels in: set NYBBLE_CACHE to a "
            "folder."
        ) from error


def local_folder(model: str | Path) -> Path | None:
    """The folder of this name, or None; whatever can be no path, a long prompt say, is none."""
    try:
        path = Path(model).expanduser()
        return path if str(model) and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, not to be looked into; nobody's home
        return None
