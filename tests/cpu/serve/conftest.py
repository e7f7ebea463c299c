"""A toy model behind a real server."""

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
    """One engine serves one server at a time: a module's."""
    return LLM(toy_folder, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm) as running:
        yield running


@pytest.fixture
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture
def openai(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
