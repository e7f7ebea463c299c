"""A toy model behind a real server."""

import json

import pytest
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


# Tools as Qwen2.5's template tells of them, in short.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} Answer <tool_call>...</tool_call>"
    "<|im_end|>\n{% endif %}" + toy.TEMPLATE
)


@pytest.fixture(scope="module", params=["react", "hermes"])
def tool_server(tmp_path_factory, request):
    """Room for tools in the context; both forms in which models call them."""
    folder = toy.write_llama(tmp_path_factory.mktemp("toy"), max_position_embeddings=4096)
    if request.param == "hermes":
        settings = {"chat_template": TOOL_TEMPLATE, "eos_token": "<|im_end|>"}
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
