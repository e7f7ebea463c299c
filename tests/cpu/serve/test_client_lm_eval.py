"""lm-eval's local-completions against the server, beside scores computed from the logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nybble import SamplingParams

# In an environment of its own: it needs nothing of nybble, and other versions of its packages.
LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
TASKS = Path(__file__).parents[2] / "data" / "lm_eval"
ROWS = [json.loads(line) for line in (TASKS / "rows.jsonl").read_text().splitlines()]

pytestmark = pytest.mark.skipif(
    LM_EVAL is None, reason="no lm_eval on the PATH or in LM_EVAL: pip install 'lm-eval[api]'"
)


def evaluate(server, out, kind, path, tasks, batch="1", **model):
    """{task: its rows as lm-eval logs them}, by their number."""
    model = {"model": "toy", "base_url": server.url + path, "max_retries": 1, **model}
    command = [LM_EVAL, "--model", kind, "--tasks", ",".join(tasks), "--include_path", str(TASKS)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    command += ["--batch_size", batch, "--log_samples", "--output_path", str(out)]
    command += ["--apply_chat_template"] if kind == "local-chat-completions" else []
    done = subprocess.run(
        command,
        cwd=TASKS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    server.wait_until_idle()
    return {
        task: {row["doc_id"]: row for row in read_rows(out, f"samples_{task}_*.jsonl")}
        for task in tasks
    }


@pytest.fixture(scope="module", params=[("1", "4"), ("4", "1")], ids=["batched", "concurrent"])
def samples(server, tmp_path_factory, request):
    concurrent, batch = request.param
    out = tmp_path_factory.mktemp("lm_eval")
    kind, path, tasks = "local-completions", "/v1/completions", ("tiny_choice", "tiny_generate")
    options = {"max_length": 256, "num_concurrent": concurrent}
    return evaluate(server, out, kind, path, tasks, batch, **options)


def read_rows(folder, pattern):
    (path,) = folder.rglob(pattern)
    return [json.loads(line) for line in path.read_text().splitlines()]


def loglikelihood(llm, context, continuation):
    """(sum of the log-probabilities, whether each token was the likeliest), from all logits."""
    begin = len(llm.tokenizer.encode(context))
    ids = llm.tokenizer.encode(context + continuation)
    used = llm.logits(ids)[begin - 1 : -1, : llm.tokenizer.vocab_size]  # never the padding
    rows = torch.log_softmax(used, dim=-1)
    wanted = torch.tensor(ids[begin:])
    total = rows.gather(1, wanted[:, None]).sum()
    return float(total), bool((rows.argmax(dim=-1) == wanted).all())


def test_likelihoods(llm, samples):
    right = 0
    for index, row in enumerate(ROWS):
        found = [response[0] for response in samples["tiny_choice"][index]["resps"]]
        expected = [loglikelihood(llm, row["text"], f" {choice}") for choice in row["choices"]]
        for (likelihood, greedy), (total, likeliest) in zip(found, expected, strict=True):
            assert float(likelihood) == pytest.approx(total, abs=1e-3)
            assert str(greedy) == str(likeliest)
        best = max(range(3), key=lambda i: expected[i][0])
        assert samples["tiny_choice"][index]["acc"] == float(best == row["answer"])
        right += best == row["answer"]


def test_generations(llm, samples):
    for index, row in enumerate(ROWS):
        params = SamplingParams(temperature=0, max_tokens=12, stop=["q"])
        alone = llm.generate(row["text"], params)
        assert samples["tiny_generate"][index]["resps"] == [[alone.text]]


def test_chats(llm, server, tmp_path):
    kind, path = "local-chat-completions", "/v1/chat/completions"
    rows = evaluate(server, tmp_path, kind, path, ["tiny_generate"])["tiny_generate"]
    for index, row in enumerate(ROWS):
        params = SamplingParams(temperature=0, max_tokens=12, stop=["q"])
        assert rows[index]["resps"] == [[llm.chat(row["text"], sampling_params=params).text]]
