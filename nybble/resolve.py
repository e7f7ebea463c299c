"""From the name of a model to a folder on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from nybble import demo
from nybble.checkpoint import hub
from nybble.errors import CheckpointError
from nybble.paths import local_folder

Progress = Callable[[str, int, int], None]

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODELSCOPE = "modelscope:"


def resolve(
    model: str | Path, progress: Progress | None = None, revision: str | None = None
) -> Path:
    """A folder if there is one of this name, then `demo`, then a hub repository id.

    "modelscope:owner/name" asks ModelScope instead of the Hugging Face hub. `revision` applies
    to hub repositories. CheckpointError says what the name could have been.
    """
    if (folder := local_folder(model)) is not None:
        return folder
    name = str(model)
    if name in demo.NAMES:
        return demo.demo_folder(name, progress)
    if name.startswith(_MODELSCOPE):
        return hub.pull(name.removeprefix(_MODELSCOPE), revision, source="modelscope")
    if _REPO_ID.fullmatch(name):
        return hub.pull(name, revision)
    raise _unknown(name)


def find(model: str | Path) -> Path:
    """`resolve` without a download: CheckpointError where the model is not on this machine."""
    if (folder := local_folder(model)) is not None:
        return folder
    name = str(model)
    repo_id = name.removeprefix(_MODELSCOPE)
    if name in demo.NAMES:
        found = local_folder(demo.location(name))
    elif _REPO_ID.fullmatch(repo_id):
        found = hub.cached(repo_id, "huggingface" if repo_id == name else "modelscope")
    else:
        raise _unknown(name)
    if found is None:
        raise CheckpointError(f"{name} is not on this machine yet: run `nybble pull {name}` first.")
    return found


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name!r} is no folder here and no model name: give a model's folder, demo, or a "
        "repository id such as Qwen/Qwen-72B-Chat-Int4."
    )
