"""Paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from nybble.errors import ConfigError


def expanded(option: str, path: Path) -> Path:
    """The path with its ~ replaced: ConfigError where nobody has that name."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{option} {path}: there is no such user, so write the folder out."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder for results, before there are any: ConfigError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {path} cannot be made ({error.strerror}): choose another place."
        ) from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"Nothing can be written to {path}: choose another place.")
