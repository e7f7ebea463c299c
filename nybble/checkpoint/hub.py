"""Models from a hub: Hugging Face, or ModelScope, which serves the same Qwen repositories."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal, get_args

from nybble.errors import CapacityError, CheckpointError, ConfigError, NybbleError

Source = Literal["huggingface", "modelscope"]

# Weights as safetensors, never pickles or code.
_PATTERNS = ["*.safetensors", "*.json", "*.tiktoken", "*.jinja", "LICENSE*", "README*"]
_ELSEWHERE = (
    "Give a local folder of the model instead, or run `nybble pull` where there is a network; "
    "HF_ENDPOINT names a mirror, and ModelScope is the other source."
)


def pull(repo_id: str, revision: str | None = None, source: Source = "huggingface") -> Path:
    """Download a model from a hub, or find it in the hub's cache; the folder it stands in.

    revision: a branch, tag or commit; None is the hub's default branch. Without a network, a
    model that was pulled before is found in the cache. CheckpointError: not found, gated, or
    unreachable and not cached; CapacityError: the disk is full.
    """
    if source not in get_args(Source):
        raise ConfigError(f"The source {source!r} is none of {', '.join(get_args(Source))}.")
    try:
        return (_huggingface if source == "huggingface" else _modelscope)(repo_id, revision)
    except OSError as error:
        raise _os_error(repo_id, error) from error


def cached(repo_id: str, source: Source = "huggingface") -> Path | None:
    """The folder of a model that was pulled before, or None; no network is asked."""
    if source == "modelscope":
        return _cached_by_modelscope(repo_id)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def _cached_by_modelscope(repo_id: str) -> Path | None:
    try:
        from modelscope import snapshot_download
    except ImportError:
        return None
    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except (OSError, ValueError):
        return None


def _huggingface(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    # The HTTP library below, and so the base of its errors, differs between releases.
    http_error: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder nor a repository id: "
            "give a folder that exists, or an id such as Qwen/Qwen-1_8B-Chat-Int4."
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on the hub's page, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub knows no model {repo_id}: check the spelling, "
            "or run `hf auth login` if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {revision!r}: leave it out, or take one from its page."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"The hub cannot be reached, and {repo_id} is not in the local cache. {_ELSEWHERE}"
        ) from error
    except http_error as error:
        raise _unreachable(repo_id, error) from error


def _modelscope(repo_id: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub import errors
    except ImportError as error:
        raise ConfigError(
            "ModelScope needs its own package: run `pip install modelscope`, "
            "or pull from Hugging Face."
        ) from error
    # In older releases they have no base in common.
    kinds = [item for item in vars(errors).values() if isinstance(item, type)]
    failures: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        *(kind for kind in kinds if issubclass(kind, Exception)),
    )
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
    except failures as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        try:
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except failures:
            raise _unreachable(repo_id, error) from error


def _unreachable(repo_id: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{repo_id} could not be downloaded ({reason}). {_ELSEWHERE}")


def _os_error(repo_id: str, error: OSError) -> NybbleError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(
            f"The disk is full while downloading {repo_id}: free some space and try again; what "
            "is already there is kept. HF_HOME (MODELSCOPE_CACHE) names another disk."
        )
    return _unreachable(repo_id, error)
