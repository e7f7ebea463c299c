from __future__ import annotations

import math

import pytest

from nybble.errors import RequestError
from nybble.sampling import SamplingParams

BAD = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"temperature": 1e39},
    {"temperature": 10**400},
    {"top_p": 1.5},
    {"top_p": -0.5},
    {"min_p": math.nan},
    {"top_k": -1},
    {"top_k": 2.5},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1},
    {"repetition_penalty": 1e-38},
    {"repetition_penalty": 1e38},
    {"presence_penalty": 3},
    {"frequency_penalty": math.inf},
    {"max_tokens": 0},
    {"max_tokens": True},
    {"seed": -1},
    {"seed": 2**64},
    {"logprobs": -1},
    {"stop": ""},
    {"stop": ["a", ""]},
    {"stop": 5},
    {"stop": ["a"] * 17},
    {"stop_token_ids": 5},
    {"ignore_eos": "no"},
    {"logit_bias": [1]},
    {"stop_token_ids": [-1]},
    {"prompt_logprobs": -1},
    {"logit_bias": {5: 100.5}},
    {"logit_bias": {5: math.nan}},
    {"logit_bias": {-1: 1.0}},
]


@pytest.mark.parametrize("values", BAD, ids=str)
def test_bad_values_are_refused_by_name(values):
    name = next(iter(values))
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**values)
    assert caught.value.param == name


def test_stop_may_be_one_text():
    assert SamplingParams(stop="END").stop_texts == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_texts == ("a", "b")


def test_none_is_no_stop():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop_texts, params.stop_token_ids) == ((), ())


def test_a_seed_that_is_too_large_is_told_so():
    with pytest.raises(RequestError, match=r"below 2\^63"):
        SamplingParams(seed=2**63)
