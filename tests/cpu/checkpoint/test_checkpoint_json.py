"""JSON files of a model folder: an object, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.checkpoint import read_json
from nybble.errors import CheckpointError

BROKEN = {
    "not UTF-8 at byte 2": b'{"\xff": 1}',
    "not valid JSON": b'{"a": }',
    "not valid JSON .*": b"",
    "does not hold a JSON object": b"[1, 2]",
    "nested too deeply": b"[" * 200_000,
    "'a' stands in it twice": b'{"a": 1, "b": 1, "a": 2}',
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
}


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, "三"]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"a": [1, 2.5, "三"]}


@pytest.mark.parametrize("problem", BROKEN)
def test_anything_else_is_refused_by_name(tmp_path: Path, problem: str) -> None:
    (tmp_path / "config.json").write_bytes(BROKEN[problem])
    with pytest.raises(CheckpointError, match=rf"config\.json .*{problem}"):
        read_json(tmp_path / "config.json")


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match="leaves the model's folder"):
        read_json(folder / "config.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_json(tmp_path)
