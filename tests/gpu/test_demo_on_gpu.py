"""The demo's answers on a GPU beside those of the CPU in fp32, where the demo is at hand."""

from __future__ import annotations

import pytest
import torch

from nybble import LLM, SamplingParams
from nybble.demo import location

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if not location("demo").exists():
    pytest.skip("needs the demo: run nybble pull demo", allow_module_level=True)

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "Explain gravity to a child.",
    "List three fruits.",
    "What is 17 times 3?",
    "Tell me a short story about a cat.",
    "How do I boil an egg?",
    "What does HTTP mean?",
    "Name the planets of the solar system.",
    "Write a Python function that adds two numbers.",
    "What is photosynthesis?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "What is the largest ocean?",
    "How does a bicycle stay upright?",
    "Describe a sunset.",
    "What are prime numbers?",
    "Why do leaves fall in autumn?",
)
# Where answers part, two logits are nearly equal: their largest and their mean distance. Limits are
# about twice what was measured with 120 questions, one by one and in batches of 20 and 60.
TIES = {
    "float16": (0.05, 0.02),
    "int8": (0.3, 0.06),
    "int6": (1.2, 0.22),
    "int4": (0.4, 0.07),
}
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.mark.parametrize("kind", list(TIES))
def test_answers_are_the_cpus_until_a_near_tie(kind):
    """With the same kind of cache on both sides; what the kinds cost is measured elsewhere."""
    cpu = LLM("demo", device="cpu", dtype="float32", kv_dtype=kind)
    gpu = LLM("demo", device="cuda", kv_dtype=kind)
    prompts = [cpu.chat_ids(question) for question in QUESTIONS]
    wanted, found = ([one.token_ids for one in llm.generate(prompts, GREEDY)] for llm in (cpu, gpu))
    gaps = []
    for prompt, want, got in zip(prompts, wanted, found, strict=True):
        if want != got:
            first = next(i for i, pair in enumerate(zip(want, got)) if pair[0] != pair[1])  # noqa: B905
            logits = cpu.logits([*prompt, *want[:first]])[-1]
            gaps.append(float(logits[want[first]] - logits[got[first]]))
    most, mean = max(gaps, default=0), sum(gaps) / max(len(gaps), 1)
    equal = len(prompts) - len(gaps)
    print(f"{kind}: {equal} of {len(prompts)} equal; gaps up to {most:.3f}, mean {mean:.3f}")
    most_limit, mean_limit = TIES[kind]
    assert most < most_limit
    assert mean < mean_limit
