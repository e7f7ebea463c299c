"""How the server is to behave: read from the command line once, then fixed."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from nybble.address import fits_header
from nybble.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the HTTP side; those of the model are LLM's.

    names: what clients may call the model; the first is shown. api_key: None lets everybody in.
    cors_origins: web pages of other origins that may call ("*": all). max_waiting: requests that
    may queue beside the running ones. Sizes are bytes, times seconds; request_seconds bounds one
    request from its arrival to its last token. log_prompts: prompts go to the log, word for word.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_public: bool = False
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body: int = 2 * 2**20
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 10.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ConfigError("The model has no name to serve: give one with --served-name.")
        if self.api_key is not None and not (self.api_key and fits_header(self.api_key)):
            raise ConfigError(
                "The API key must be printable ASCII without space around it (a line break at its "
                "end, say), as no client could send it: choose another one."
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}: give one from 1 to 65535, or 0 for any.")
        self._check_positive()
        if self.api_key is None and not self.allow_public and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} lets others on the network use the model: set --api-key (or "
                "NYBBLE_API_KEY), or --allow-public if everybody may."
            )

    def _check_positive(self) -> None:
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting is {self.max_waiting}: give 0 or more.")
        for name in ("max_body", "request_seconds", "drain_seconds", "keep_alive_seconds"):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {getattr(self, name)}: give more than 0.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
