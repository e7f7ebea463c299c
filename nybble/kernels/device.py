"""Where to compute: the name of a device, checked."""

from __future__ import annotations

import torch

from nybble.errors import ConfigError


def find_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one, else the CPU. ConfigError: unknown, or no GPU here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}: use auto, cpu, cuda or cuda:1.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch finds no GPU: use cpu.")
    return device
