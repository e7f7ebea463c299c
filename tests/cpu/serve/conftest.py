"""A toy model behind a real server."""

import json
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import pytest
import talking
import toy
from openai import OpenAI
from serving import serving

from nybble.llm import LLM


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return toy.write_llama(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def llm(toy_folder):
    """What the server's answers are compared with, or what a test serves itself."""
    return LLM(toy_folder, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def server(toy_folder):
    """Its engine is its thread's alone: a test that steps it too would race with it."""
    with serving(LLM(toy_folder, dtype="float32", threads=1)) as running:
        yield running


@pytest.fixture(scope="module", params=["react", "hermes"])
def tool_server(tmp_path_factory, request):
    """Room for tools in the context; both forms in which models call them."""
    folder = toy.write_llama(tmp_path_factory.mktemp("toy"), max_position_embeddings=4096)
    if request.param == "hermes":
        settings = {"chat_template": talking.TEMPLATE, "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with serving(LLM(folder, dtype="float32", threads=1)) as running:
        yield running


@pytest.fixture
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture
def openai(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    with ExitStack() as stack:
        found = {}
        for kind in ("hermes", "react"):
            folder = toy.write_llama(tmp_path_factory.mktemp(kind), max_position_embeddings=4096)
            if kind == "hermes":
                (folder / "chat_template.jinja").write_text(talking.TEMPLATE)
            llm = LLM(folder, dtype="float32", threads=1)
            found[kind] = talking.Talker(stack.enter_context(serving(llm)), llm, kind)
        yield found


@pytest.fixture(params=["hermes", "react"])
def talker(request, talkers, monkeypatch):
    talker = talkers[request.param]
    engine, asked = talker.llm.engine, talker.prompts
    asked.clear()
    make = engine.request

    def request_and_note(prompt_ids, *rest):
        asked.append(prompt_ids)
        return make(prompt_ids, *rest)

    monkeypatch.setattr(engine, "request", request_and_note)
    yield talker
    talker.server.wait_until_idle()


@pytest.fixture
def say(talker, monkeypatch):
    """Lets the model say a text, whatever its weights."""

    def script(text):
        tokenizer = talker.llm.tokenizer
        ids = [*tokenizer.encode(text), tokenizer.special_tokens["<|im_end|>"]]
        said = WeakKeyDictionary()  # an ended answer's place in memory may be another's next

        def choose(logits, states):
            for state in states:
                said[state] = said.get(state, -1) + 1
            return [ids[said[state]] for state in states]

        monkeypatch.setattr(talker.llm.engine._sampler, "choose", choose)

    return script
