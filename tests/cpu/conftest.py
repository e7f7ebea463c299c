"""Fixtures that several areas share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.checkpoint import Checkpoint
from nybble.engine.engine import Engine
from nybble.kernels import select_backend
from nybble.model import read_model_config
from nybble.model.loader import load_decoder

# Read when triton is first imported: its kernels run in an interpreter here.
os.environ.setdefault("TRITON_INTERPRET", "1")

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    """An engine over a model folder in exact fp32, without tokenizer or sampling defaults."""

    def make(folder: Path, **options: object) -> Engine:
        config = read_model_config(folder)
        backend = select_backend(torch.device("cpu"), exact=True)
        settings = {
            "vocab_size": config.vocab_size,
            "eos_ids": (),
            "max_context": config.max_context,
            "kv_dtype": "float32",
            "prefill_chunk": 512,
        }
        decoder = load_decoder(Checkpoint.open(folder), config, backend, torch.float32)
        return Engine(decoder, **{**settings, **options})

    return make
