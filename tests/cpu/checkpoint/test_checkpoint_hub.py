"""Pulling from hubs: no network is used; what the client libraries raise becomes advice."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from nybble.checkpoint import Checkpoint, pull
from nybble.errors import CapacityError, CheckpointError, ConfigError


def make(kind: type[Exception], *arguments: Any) -> Exception:
    """An error of a client library without the HTTP response that its constructor wants."""
    return kind.__new__(kind, *arguments)


def raising(error: Exception) -> Any:
    def download(*_: Any, **__: Any) -> str:
        raise error

    return download


FAILURES: dict[str, tuple[Exception, type[Exception]]] = {
    "a/b is gated: accept its terms": (make(errors.GatedRepoError), CheckpointError),
    "knows no model a/b: check the spelling": (
        make(errors.RepositoryNotFoundError),
        CheckpointError,
    ),
    "has no revision 'r': leave it out": (make(errors.RevisionNotFoundError), CheckpointError),
    "cannot be reached, and a/b is not in.*local folder.*HF_ENDPOINT.*ModelScope": (
        make(errors.LocalEntryNotFoundError),
        CheckpointError,
    ),
    r"could not be downloaded \(HfHubHTTPError\)": (make(errors.HfHubHTTPError), CheckpointError),
    r"could not be downloaded \(refused\)": (ConnectionError("refused\nmore"), CheckpointError),
    "disk is full.*HF_HOME": (OSError(errno.ENOSPC, "No space"), CapacityError),
}


@pytest.mark.parametrize("advice", FAILURES)
def test_a_failed_pull_says_what_to_do(monkeypatch: pytest.MonkeyPatch, advice: str) -> None:
    error, kind = FAILURES[advice]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(kind, match=advice) as caught:
        pull("a/b", "r")
    assert "\n" not in str(caught.value)


def test_no_code_and_no_pickles_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pull("a/b", "main") == tmp_path
    assert (asked["repo_id"], asked["revision"]) == ("a/b", "main")
    files = ["modeling.py", "model.bin", "model.pt", "a.safetensors", "config.json", "q.tiktoken"]
    patterns = asked["allow_patterns"]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))
    assert kept == files[3:]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and a client library that keeps off the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_a_cached_model_is_found_and_read_through_its_links(offline: Path) -> None:
    repo, revision = offline / "models--a--b", "0" * 40
    for name in ("refs", "blobs", f"snapshots/{revision}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs/main").write_text(revision)
    save_file({"a": torch.ones(2)}, repo / "blobs/abc")
    os.symlink("../../blobs/abc", repo / f"snapshots/{revision}/model.safetensors")
    assert Checkpoint.open(pull("a/b")).tensor("a").tolist() == [1, 1]


@pytest.mark.usefixtures("offline")
def test_offline_a_model_that_is_not_cached_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not in the local cache"):
        pull("a/b")


@pytest.mark.parametrize("name", ["not a/repo", "a/b/c", ".."])
def test_a_name_that_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a repository id"):
        pull(name)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of huggingface, modelscope"):
        pull("a/b", source="other")  # type: ignore[arg-type]


def test_modelscope_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        pull("a/b", source="modelscope")


class NotExistError(Exception):
    """As in modelscope.hub.errors, where it derives from Exception alone."""


def fake_modelscope(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    package, hub, hub_errors = (ModuleType(name) for name in ("modelscope", "hub", "errors"))
    package.snapshot_download = download  # type: ignore[attr-defined]
    hub_errors.NotExistError = NotExistError  # type: ignore[attr-defined]
    hub.errors = hub_errors  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.hub", hub)
    monkeypatch.setitem(sys.modules, "modelscope.hub.errors", hub_errors)


def test_modelscope_offline_falls_back_to_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, local_files_only: bool = False, **_: Any) -> str:
        if not local_files_only:
            raise ConnectionError("no route")
        return f"/cache/{repo_id}"

    fake_modelscope(monkeypatch, download)
    assert pull("qwen/x", source="modelscope") == Path("/cache/qwen/x")


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (NotExistError("no such model"), CheckpointError, "a/b could not.*no such model.*folder"),
        (ConnectionError("no route"), CheckpointError, "could not be downloaded.*no route"),
        (OSError(errno.ENOSPC, "No space"), CapacityError, "MODELSCOPE_CACHE"),
    ],
)
def test_a_failed_modelscope_pull_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], advice: str
) -> None:
    fake_modelscope(monkeypatch, raising(error))
    with pytest.raises(kind, match=advice):
        pull("a/b", source="modelscope")
