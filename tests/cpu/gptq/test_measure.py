"""Perplexity and divergence against numpy, on toy models behind a byte-level tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nybble.config import QuantConfig
from nybble.errors import CheckpointError, ConfigError, RequestError
from nybble.gptq.run import quantize_checkpoint
from nybble.measure import compare, perplexity, split

TEXT = "".join(chr(32 + (7 * i + i // 9) % 80) for i in range(150))


class Codepoints:
    def encode(self, text):
        return [ord(letter) for letter in text]


@pytest.fixture
def load(make_engine):
    """What measure needs of an LLM: a folder, a tokenizer and logits."""

    def make(folder):
        logits = make_engine(folder).logits
        return SimpleNamespace(folder=folder, tokenizer=Codepoints(), logits=logits)

    return make


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(llm, window):
    ids = [ord(letter) for letter in TEXT]
    rows, losses = [], []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        predicted = log_softmax(llm.logits(part).double().numpy())[:-1]
        rows.append(predicted)
        losses += [-row[token] for row, token in zip(predicted, part[1:], strict=True)]
    return np.concatenate(rows), np.array(losses)


def test_perplexity_is_what_the_documentation_says(llama, load):
    llm = load(llama)
    found = perplexity(llm, TEXT, window=40)
    _, losses = reference(llm, 40)
    assert found.tokens == len(losses) == 3 * 39
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found.to_json()["bits_per_token"] == pytest.approx(losses.mean() / np.log(2), rel=1e-5)


def test_a_comparison_is_what_the_documentation_says(llama, load, tmp_path, windows):
    target = tmp_path / "out"
    quantize_checkpoint(llama, target, QuantConfig(4, 32, False, True), windows)
    base, quant = load(llama), load(target)
    found = compare(base, quant, TEXT, window=50)
    p, p_losses = reference(base, 50)
    q, q_losses = reference(quant, 50)
    by_window = (q_losses - p_losses).reshape(3, 49).mean(1)
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert found.ratio == pytest.approx(np.exp(q_losses.mean() - p_losses.mean()), rel=1e-5)
    spread = found.ratio * by_window.std(ddof=1) / np.sqrt(3)
    assert found.ratio_error == pytest.approx(spread, rel=1e-3)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert len(found.layer_errors) == 3
    assert found.quant_bytes < found.base_bytes
    assert json.loads(json.dumps(found.to_json()))["base"]["tokens"] == 147


def test_a_model_does_not_differ_from_itself(llama, load):
    found = compare(load(llama), load(llama), TEXT, window=50)
    assert (found.ratio, found.kl_mean, found.top1_agreement) == (1, 0, 1)
    assert found.ratio_error == 0
    assert found.layer_errors == ()


def test_one_window_has_no_spread(llama, load):
    assert compare(load(llama), load(llama), TEXT, window=1000).ratio_error is None


def test_a_text_shorter_than_a_window_is_one_window(llama, load):
    assert split(load(llama), "hello", 1024) == [[ord(letter) for letter in "hello"]]
    assert perplexity(load(llama), "hello", 1024).window == 5


def test_progress_counts_windows(llama, load):
    seen = []
    perplexity(load(llama), TEXT, 50, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("text", "window"), [("", 50), ("x", 50), (TEXT, 1), (TEXT, 0)])
def test_nothing_to_predict_is_refused(llama, load, text, window):
    with pytest.raises(ConfigError, match=r"at least 2|fewer than two"):
        perplexity(load(llama), text, window)


def test_a_model_without_tokenizer_is_refused(llama, load):
    llm = load(llama)
    llm.tokenizer = None
    with pytest.raises(RequestError, match="no tokenizer"):
        perplexity(llm, TEXT)


def test_another_vocabulary_is_refused(llama, load):
    other = load(llama)
    logits = other.logits
    other.logits = lambda ids: logits(ids)[:, :-8]
    with pytest.raises(ConfigError, match="264 and 256 tokens"):
        compare(load(llama), other, TEXT)


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"modules": 5},
        {"modules": [5]},
        {"modules": [{"layer": 0}]},
        {"modules": [{"layer": "x", "error": 1}]},
        {"modules": [{"layer": 0, "error": None}]},
        {"modules": [{"layer": 1e999, "error": 1}]},
    ],
)
def test_a_damaged_report_is_refused_before_anything_is_measured(llama, load, report):
    (llama / "quantization_report.json").write_text(json.dumps(report))
    model = load(llama)
    model.logits = None
    with pytest.raises(CheckpointError, match=r"quantization_report\.json is no report"):
        compare(model, model, TEXT)


def test_other_tokens_are_refused(llama, load):
    other = load(llama)
    other.tokenizer = SimpleNamespace(encode=lambda text: [1] * len(text))
    with pytest.raises(ConfigError, match="different tokens"):
        compare(load(llama), other, TEXT)
