"""What goes wrong between page and server, and how it goes on."""

from __future__ import annotations

import pytest
from chatpage import Script, answers, ask, finished, titles
from playwright.sync_api import expect


def test_a_refusal_is_shown_and_tried_again(page, server):
    server.script = Script(status=429)
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The queue is full: try again in a moment.")
    server.script = Script()
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text("Hello there.")
    expect(page.get_by_role("alert")).to_have_count(0)
    assert len(server.requests[1]["messages"]) == 1


def test_a_stream_that_is_cut_off(page, server):
    server.script = Script(["Half"], cut=True)
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
    expect(answers(page)).to_have_text("Half")


def test_an_error_in_the_stream(page, server):
    server.script = Script(["Half"], error="The model computed values that are not finite.")
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("The model computed values that are not finite.")
    expect(answers(page)).to_have_text("Half")


def test_a_server_that_is_gone(page, server):
    expect(page.locator("#send")).to_be_enabled()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")


@pytest.mark.parametrize(("code", "told"), [("loading", "is loading"), ("failed", "No model yet.")])
def test_a_model_that_is_not_there_yet(browser, server, code, told):
    server.no_model = code
    page = browser.new_page()
    page.goto(server.url)
    expect(page.locator("#notice")).to_contain_text(told)
    expect(page.locator("#send")).to_be_disabled()
    server.no_model = None
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#notice")).to_be_empty()
    page.close()


def test_the_key_is_asked_for(browser, server):
    server.key = "secret"
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_visible()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_enabled()
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    assert "secret" not in page.evaluate("JSON.stringify({...localStorage})")
    page.close()


def test_leaving_the_key_out_is_no_dead_end(browser, server):
    server.key = "secret"
    page = browser.new_page()
    page.goto(server.url)
    expect(page.get_by_label("API key")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_contain_text("Give the API key.")
    page.get_by_role("button", name="Continue").click()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_enabled()
    page.close()


def test_two_tabs_keep_each_others_conversations(page, server):
    other = page.context.new_page()
    other.goto(server.url)
    ask(page, "First tab")
    finished(page)
    ask(other, "Second tab")
    finished(other)
    for tab in (page, other):
        expect(titles(tab)).to_have_text(["Second tab", "First tab"])
    other.close()
