"""What an unfinished run has done so far: one file a layer, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nybble.checkpoint import read_json
from nybble.checkpoint.files import file_errors, lock, sync_folder
from nybble.errors import CheckpointError, ConfigError

_SETTINGS = "settings.json"


def journal_folder(target: Path) -> Path:
    target = Path(os.path.realpath(target))
    return target.parent / f".{target.name}.quantizing"


class Journal:
    """The folder `.NAME.quantizing` beside the target NAME.

        with Journal(target, settings) as journal:
            if index not in journal:
                journal.save(index, tensors, notes)
            tensors, notes = journal.load(index)
            ...
            journal.remove()

    A run with equal settings goes on where the last one was killed; other settings are refused,
    so that no finished work is lost by accident. One process at a time.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        self.folder = journal_folder(target)
        self._settings = json.loads(json.dumps(settings))
        self._lock = -1

    def __enter__(self) -> Journal:
        with file_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = lock(self.folder)
        if handle is None:
            raise CheckpointError(
                f"Another process is quantising into {self.folder.parent}: wait for it."
            )
        self._lock = handle
        try:
            self._check_settings()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._layers():  # nothing to go on with
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def save(self, index: int, tensors: dict[str, torch.Tensor], notes: list[Any]) -> None:
        """Keep the tensors of a finished layer, and notes on it (JSON)."""
        here = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        self._write(self._path(index), save(here, {"notes": json.dumps(notes)}))

    def load(self, index: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
        path = self._path(index)
        try:
            with file_errors(path), safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
                return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}): delete it and quantise again, the other layers "
                "are kept."
            ) from error

    def remove(self) -> None:
        """Forget everything, once the target is complete."""
        shutil.rmtree(self.folder)

    def _check_settings(self) -> None:
        path = self.folder / _SETTINGS
        layers = self._layers()
        if not path.exists() or not layers:
            for left in layers:  # of a removal that was interrupted
                left.unlink()
            self._write(path, json.dumps(self._settings, indent=2).encode())
            return
        before = read_json(path)
        changed = [key for key in self._settings if before.get(key) != self._settings[key]]
        if changed:
            raise ConfigError(
                f"{self.folder} holds an unfinished run that differs in {', '.join(changed)}: "
                "repeat its settings to go on with it, or delete that folder to start anew."
            )

    def _layers(self) -> list[Path]:
        return list(self.folder.glob("layer-*.safetensors"))

    def _write(self, path: Path, data: bytes) -> None:
        partial = path.with_suffix(".partial")
        with file_errors(path):
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"
