"""Compile the C sources once with the user's compiler and keep the result."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from nybble.errors import NybbleError
from nybble.kernels.compiled import kernel_path, read_checked, write_checked

SOURCES = Path(__file__).parent
# -fwrapv: the integers that a NaN turns into may overflow; the row becomes NaN by its scale.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fwrapv", "-fno-math-errno", "-Wno-psabi")
# The first set that compiles is used: a compiler may lack OpenMP or not know this CPU.
ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


class BuildError(NybbleError):
    """The C kernels cannot be built or read on this machine."""


def load(extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernels for this machine: from the cache, or compiled and put there.

    `extra` flags come last, so that they win. Raises BuildError with the compiler's words.
    """
    compiler = find_compiler()
    complaint = ""
    for attempt in ATTEMPTS:
        flags = (*attempt, *extra)
        cached = kernel_path(f"{_key(compiler, flags)}.so")
        if read_checked(cached) is not None:  # a damaged one could crash dlopen
            return _open(cached)
        complaint = _refusal(compiler, flags)
        if complaint:
            continue
        code, complaint = _compile(compiler, flags)
        if code is not None:
            return _kept(cached, code)
    raise BuildError(
        f"the C compiler {compiler[0]} cannot build the kernels ({complaint}): "
        "repair it or set CC to another one, for kernels several times as fast."
    )


def _kept(cached: Path, code: bytes) -> ctypes.CDLL:
    """Loaded from the cache, or where that cannot be written from a file that goes at once."""
    try:
        write_checked(cached, code)  # bytes behind an ELF image are ignored
    except OSError:
        with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
            path = Path(folder) / cached.name
            path.write_bytes(code)
            return _open(path)
    return _open(cached)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"the compiled kernels do not load ({error}): set NYBBLE_CACHE to a folder from "
            "which programs may run."
        ) from None


def find_compiler() -> list[str]:
    """$CC (which may carry arguments), or the first of cc, gcc, clang that exists."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in names:
        command = shlex.split(name)
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    raise BuildError(
        f"no C compiler ({', '.join(names)}) was found: install one (Debian: apt install gcc) "
        "or set CC, for kernels several times as fast."
    )


def _key(compiler: list[str], flags: tuple[str, ...]) -> str:
    """A name that changes with anything that could change the machine code."""
    binary = Path(compiler[0]).resolve()
    status = binary.stat()
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.read_bytes())
    facts = (FLAGS, flags, compiler, str(binary), status.st_size, status.st_mtime_ns)
    digest.update(repr((facts, _processor())).encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Model and instruction sets: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part", "isa")
    return "\n".join(line for line in lines if line.startswith(wanted))


def _refusal(compiler: list[str], flags: tuple[str, ...]) -> str:
    """Why not even an empty file can be built so: known in a fraction of the kernels' time."""
    header = ("-include", "omp.h") if "-fopenmp" in flags else ()
    with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
        target = str(Path(folder) / "empty.so")
        rest = ("-fPIC", "-shared", "-x", "c", os.devnull, "-o", target)
        return _run([*compiler, *flags, *header, *rest]) or ""


def _compile(compiler: list[str], flags: tuple[str, ...]) -> tuple[bytes | None, str]:
    """The code, or None and what the compiler said."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(prefix="nybble-") as folder:
        target = Path(folder) / "kernels.so"
        complaint = _run([*compiler, *FLAGS, *flags, *sources, "-o", str(target), "-lm"])
        if complaint is None and target.is_file():
            return target.read_bytes(), ""
        return None, complaint or "it wrote no file"


def _run(command: list[str]) -> str | None:
    """None on success, else the last line that the compiler said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]
