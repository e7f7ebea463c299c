"""nybble: runs Qwen chat models in four bits.

Names are imported on first use, so that `import nybble` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nybble.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    NumericsError,
    NybbleError,
    RequestError,
)

if TYPE_CHECKING:
    from nybble.compat import AutoModelForCausalLM, AutoTokenizer
    from nybble.llm import LLM
    from nybble.outputs import Completion
    from nybble.sampling import SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "NumericsError",
    "NybbleError",
    "RequestError",
    "SamplingParams",
    "__version__",
]

_LAZY = {
    "LLM": "nybble.llm",
    "AutoModelForCausalLM": "nybble.compat",
    "AutoTokenizer": "nybble.compat",
    "Completion": "nybble.outputs",
    "SamplingParams": "nybble.sampling",
}


def __getattr__(name: str) -> Any:
    """PEP 562: called for names that are not here yet."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nybble")
    elif name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
