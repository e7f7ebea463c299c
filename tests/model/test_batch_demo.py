"""Real weights, fast kernels: a batch gives each prompt the answer it gets alone."""

from __future__ import annotations

import pytest

from nybble import LLM, SamplingParams

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Who was Ada Lovelace?",
    "What is two plus two?",
    "Say hello in Spanish.",
)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=16),
        SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=16),
    ],
    ids=["greedy", "seeded"],
)
def test_a_list_of_prompts_is_answered_as_each_alone(params):
    demo = LLM("demo")
    prompts = [demo.chat_ids(question) for question in QUESTIONS]
    together = demo.generate(prompts, params)
    alone = [demo.generate(prompt, params) for prompt in prompts]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
