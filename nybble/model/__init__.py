"""The decoder, and how it is made from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from nybble.checkpoint import read_json
from nybble.config import ModelConfig, parse_model_config


def read_model_config(folder: Path) -> ModelConfig:
    """The folder's config.json; ConfigError names whatever nybble does not implement."""
    path = folder / "config.json"
    return parse_model_config(read_json(path), str(path))
