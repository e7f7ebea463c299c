"""Several conversations, several tabs, and a full browser."""

from __future__ import annotations

from chatpage import Script, answers, ask, finished, titles
from playwright.sync_api import expect


def test_conversations_are_listed_chosen_and_renamed(page, server):
    for text in ("First", "Second"):
        page.click("#new-chat")
        ask(page, text)
        finished(page)
    expect(titles(page)).to_have_text(["Second", "First"])
    titles(page).nth(1).click()
    expect(page.locator(".user .body")).to_have_text("First")
    page.get_by_role("button", name="Rename: First").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text(["Second", "Renamed"])
    page.reload()
    expect(titles(page)).to_have_text(["Second", "Renamed"])
    expect(page.get_by_role("heading", level=1)).to_have_text("Renamed")
    page.go_back()
    expect(page.locator(".user .body")).to_have_text("Second")


def test_delete_and_undo(page, server):
    ask(page, "Precious")
    finished(page)
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete: Precious").click()
    expect(titles(page)).to_have_count(0)
    expect(page.locator(".user")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    titles(page).click()
    expect(page.locator(".user .body")).to_have_text("Precious")


def test_an_answer_goes_on_while_another_conversation_is_shown(page, server):
    server.script = Script(["One", " two"], hold=1)
    ask(page, "Long")
    expect(answers(page)).to_have_text("One")
    page.click("#new-chat")
    expect(page.locator("#send")).to_be_visible()
    server.go.set()
    server.script = Script(["Short."])
    ask(page, "Other")
    expect(answers(page)).to_have_text("Short.")
    page.get_by_role("link", name="Long").click()
    expect(answers(page)).to_have_text("One two")


def test_a_deleted_conversation_does_not_come_back(page, server):
    server.script = Script(["One", " two"], hold=1)
    ask(page, "Long")
    expect(answers(page)).to_have_text("One")
    page.locator("#conversations li").hover()
    page.get_by_role("button", name="Delete: Long").click()
    assert server.hung_up.wait(10)
    page.reload()
    expect(titles(page)).to_have_count(0)


def test_a_full_browser_is_told(page, server):
    page.evaluate(
        """() => { for (let size = 2 ** 22; size > 16; size = Math.floor(size / 2)) {
             try { for (let i = 0; ; i += 1) localStorage["fill" + size + i] = "x".repeat(size); }
             catch { /* until nothing fits */ } } }"""
    )
    ask(page, "x" * 1000)
    expect(page.locator("#notice")).to_contain_text("no room left")
    expect(answers(page)).to_have_text("Hello there.")
