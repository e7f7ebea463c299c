"""What a command that draws asks for before it measures anything."""

from __future__ import annotations

from importlib.util import find_spec

from nybble.errors import ConfigError


def require_matplotlib(option: str) -> None:
    """ConfigError, now and not after minutes of work, where plots cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{option} needs matplotlib: pip install matplotlib.")
