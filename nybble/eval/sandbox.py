"""Runs untrusted Python: no network, no files but its own, bounded time, memory and processes.

The child (`jail.py`) confines itself before it reads the program: rlimits, Landlock for files
(Linux 5.13 and later), a seccomp filter for sockets, processes and signals. Neither needs root or
user namespaces, so it works in an ordinary container too. Where one is missing nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from nybble.errors import ConfigError

_JAIL = Path(__file__).with_name("jail.py")
_STARTUP_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """seconds: wall and CPU time; memory: bytes of address space; file_size: bytes a file."""

    seconds: float = 3.0
    memory: int = 512 << 20
    file_size: int = 16 << 20


class Sandbox:
    """unsafe: run without isolation where there is none; limits of time and memory stay."""

    def __init__(self, limits: Limits | None = None, unsafe: bool = False) -> None:
        self.limits = limits or Limits()
        self.isolated = True
        if reason := why_not():
            if not unsafe:
                raise ConfigError(
                    f"Code that a model wrote cannot be isolated here: {reason}. Score on a Linux "
                    "machine that can (5.13 or later, x86-64 or ARM64), or take the risk with "
                    "--run-code-unsafely, best in a virtual machine of its own."
                )
            self.isolated = False

    def passes(self, program: str) -> bool:
        """Whether the program runs to its end without an exception, within the limits."""
        return self.run(program) == "passed"

    def run(self, program: str) -> str:
        """ "passed", "failed" (it raised, exited or was killed) or "timed out"."""
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="nybble-code-") as folder:
            job = {
                "program": program,
                "token": token,
                "folder": folder,
                "isolate": self.isolated,
                **asdict(self.limits),
            }
            return _supervise(job, token, self.limits.seconds)


def _supervise(job: dict[str, object], token: str, seconds: float) -> str:
    """Start the jail in a session of its own; whatever is left of it is killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
    try:
        # The jail keeps the program's own time; this is for a jail that does not come up.
        output, _ = child.communicate(json.dumps(job).encode(), timeout=seconds + _STARTUP_SECONDS)
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        _kill(child)
    if output.strip() == token.encode():
        return "passed"
    return "timed out" if child.returncode in (-signal.SIGALRM, -signal.SIGXCPU) else "failed"


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


@cache
def why_not() -> str | None:
    """What keeps this machine from isolating, or None: a trial run of the jail tells."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has neither Landlock nor seccomp"
    trial = subprocess.run(
        [sys.executable, "-I", "-S", "-B", str(_JAIL), "--check"],
        capture_output=True,
        text=True,
        env={},
        cwd="/",
        timeout=_STARTUP_SECONDS,
        check=False,
    )
    return None if trial.returncode == 0 else trial.stdout.strip() or "the trial run failed"
