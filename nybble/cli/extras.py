"""Packages that only some commands need: looked for before anything long begins."""

from __future__ import annotations

from importlib.util import find_spec

from nybble.errors import ConfigError


def require(what: str, extra: str, *packages: str) -> None:
    """ConfigError, now and not after minutes of work, where a package of an extra is missing."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}: run `pip install '.[{extra}]'` in nybble's "
            "folder."
        )
