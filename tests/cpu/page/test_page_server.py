"""The page with the real server, on a toy model."""

from __future__ import annotations

import pytest
import toy
from chatpage import ask, finished
from playwright.sync_api import expect
from serving import serving

from nybble import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(toy.write_llama(tmp_path_factory.mktemp("toy")), dtype="float32", threads=1)


def test_with_the_real_server(browser, llm):
    """Key, stream and usage from the server itself, on a toy model."""
    alone = llm.chat([{"role": "user", "content": "the fox"}], sampling_params=GREEDY)
    with serving(llm, api_key="secret") as real:
        page = browser.new_page()
        page.goto(real.url)
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        page.evaluate("localStorage['nybble.settings'] = '{\"temperature\":0,\"max_tokens\":16}'")
        ask(page, "the fox")
        finished(page)
        expect(page.locator(".speed")).to_contain_text("16 tokens")
        expect(page.locator(".note")).to_contain_text("limit")
        kept = page.evaluate("JSON.parse(localStorage['nybble.chat.' + location.hash.slice(1)])")
        assert kept["messages"][1]["content"] == alone.text
        page.close()
        real.wait_until_idle()
