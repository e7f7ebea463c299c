"""The chat page in a real Chromium, against a server that says what the test wants."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, expect
from scripted import Script, ScriptedServer
from serving import serving

from nybble import SamplingParams

SCREENSHOTS = Path(tempfile.gettempdir()) / "nybble-page"
GREEDY = SamplingParams(temperature=0, max_tokens=16)
CODE = "Here:\n\n```python\nprint('a rather long line of code that no phone can show')\n```\n"


@pytest.fixture(scope="module")
def running_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def server(running_server) -> ScriptedServer:
    running_server.reset()
    return running_server


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a fresh profile; nothing it does may break the policy or throw."""
    contexts, faults = [], []

    def open_page(**options: object) -> Page:
        context = browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if "Security" in m.text else None)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


def ask(page: Page, text: str = "Hello?") -> None:
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#input", text)
    page.keyboard.press("Enter")


def finished(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()


def answers(page: Page):
    return page.locator(".assistant .body")


# -- one conversation ----------------------------------------------------------------------------


def test_an_answer_streams_in(page, server):
    server.script = Script(["Half", " an answer"], hold=1)
    ask(page)
    expect(answers(page)).to_have_text("Half")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    server.go.set()
    expect(answers(page)).to_have_text("Half an answer")
    finished(page)
    expect(page.locator(".speed")).to_contain_text("2 tokens")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")


def test_what_is_sent(page, server):
    ask(page, "One")
    finished(page)
    ask(page, "Two")
    finished(page)
    assert server.requests[1] == {
        "model": "scripted",
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "Two"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_settings_are_sent_and_kept(page, server):
    page.click("#open-settings")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("System prompt").fill("Be brief.")
    for label, value in [
        ("Temperature", "0.5"),
        ("Top-p", "0.9"),
        ("Top-k", "40"),
        ("Max tokens", "99"),
        ("Seed", "7"),
    ]:
        dialog.get_by_label(label).fill(value)
    page.keyboard.press("Escape")
    page.reload()
    ask(page)
    finished(page)
    body = server.requests[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 99, "seed": 7}
    assert {name: body[name] for name in sampling} == sampling


def test_impossible_settings_are_not_sent(page, server):
    page.click("#open-settings")
    page.get_by_role("dialog").get_by_label("Top-p").fill("7")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    ask(page)
    finished(page)
    assert "top_p" not in server.requests[0]


def test_stop_ends_the_request_and_keeps_what_came(page, server):
    server.script = Script(["Kept", " never seen"], hold=1)
    ask(page)
    expect(answers(page)).to_have_text("Kept")
    page.click("#stop")
    expect(page.locator(".note")).to_have_text("Stopped.")
    expect(answers(page)).to_have_text("Kept")
    assert server.hung_up.wait(10)


def test_escape_stops(page, server):
    server.script = Script(["Kept", " never seen"], hold=1)
    ask(page)
    expect(answers(page)).to_have_text("Kept")
    page.keyboard.press("Escape")
    assert server.hung_up.wait(10)
    expect(page.locator(".note")).to_have_text("Stopped.")


def test_answer_again(page, server):
    ask(page)
    finished(page)
    server.script = Script(["Another one."])
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text("Another one.")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Hello?"}]


def test_edit_replaces_what_follows(page, server):
    for text in ("One", "Two"):
        ask(page, text)
        finished(page)
    page.get_by_role("button", name="Edit", exact=True).first.click()
    expect(page.locator("#input")).to_have_value("One")
    ask(page, "Three")
    finished(page)
    expect(page.locator(".user .body")).to_have_text(["Three"])
    assert server.requests[2]["messages"] == [{"role": "user", "content": "Three"}]


def test_reload_keeps_the_conversation(page, server):
    ask(page, "Remember me")
    finished(page)
    page.reload()
    expect(page.locator(".user .body")).to_have_text("Remember me")
    expect(answers(page)).to_have_text("Hello there.")
    expect(page.locator(".speed")).to_contain_text("2 tokens")


def test_reload_in_the_middle_keeps_what_came(page, server):
    server.script = Script(["Kept", " never seen"], hold=1)
    ask(page)
    expect(answers(page)).to_have_text("Kept")
    page.reload()
    expect(answers(page)).to_have_text("Kept")
    expect(page.locator(".note")).to_have_text("Stopped.")


def test_the_limit_is_told(page, server):
    server.script = Script(["Too lo"], finish="length")
    ask(page)
    expect(page.locator(".note")).to_contain_text("limit")


def test_thoughts_are_folded(page, server):
    server.script = Script(["<think>\nHmm, **well**", "</think>\n\nFour."])
    ask(page)
    expect(answers(page)).to_have_text("Four.")
    page.get_by_text("Thoughts").click()
    expect(page.locator(".thought strong")).to_have_text("well")


# -- what a model must not do ----------------------------------------------------------------------

HOSTILE = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 1">
[click](javascript:window.pwned=1) [data](data:text/html,<script>1</script>)
![image](https://example.com/track.png)
```html
<script>window.pwned = 1</script>
```
[fine](https://example.com/"onmouseover="window.pwned=1)
"""


def test_hostile_answers_stay_text(page, server):
    outside = []
    page.on("request", lambda r: outside.append(r.url) if "127.0.0.1" not in r.url else None)
    server.script = Script([HOSTILE[i : i + 3] for i in range(0, len(HOSTILE), 3)])
    ask(page, "<b onclick=alert(1)>bold?</b>")
    finished(page)
    expect(answers(page)).to_contain_text("<script>window.pwned = 1</script>")
    expect(answers(page)).to_contain_text('<img src=x onerror="window.pwned = 1">')
    expect(page.locator(".user .body")).to_have_text("<b onclick=alert(1)>bold?</b>")
    assert (
        page.locator("#log :is(script, img, b, [onclick], [onerror], [onmouseover])").count() == 0
    )
    links = page.locator("#log a")
    hrefs = links.evaluate_all("all => all.map(a => a.protocol + a.rel + a.target)")
    assert set(hrefs) == {"https:noopener noreferrer_blank"}
    assert page.evaluate("window.pwned") is None
    page.reload()
    assert page.locator("#log script").count() == 0
    assert page.evaluate("window.pwned") is None
    assert outside == []


def test_the_policy_would_stop_a_slip(browser, server):
    page = browser.new_page()
    page.goto(server.url)
    for slip in (
        "document.body.innerHTML = '<img src=x>'",
        "document.createElement('a').setAttribute('onclick', 'window.pwned = 1')",
        "document.createElement('script').textContent = 'window.pwned = 1'",
    ):
        with pytest.raises(Error, match="Trusted"):
            page.evaluate(f"() => {{ {slip}; }}")
    page.close()


# -- several conversations -------------------------------------------------------------------------


def titles(page: Page):
    return page.locator("#conversations a")


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


# -- errors ----------------------------------------------------------------------------------------


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


# -- people ----------------------------------------------------------------------------------------


def test_chinese_follows_the_browser(open_page, server):
    page = open_page(locale="zh-CN")
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    server.script = Script(["你好", "，世界。"])
    ask(page, "你好吗？")
    expect(answers(page)).to_have_text("你好，世界。")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    page.reload()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_everything_has_words(open_page, locale):
    page = open_page(locale=locale)
    ask(page)
    finished(page)
    words = page.locator("[data-text]").evaluate_all("all => all.map(node => node.textContent)")
    assert all(words)
    assert "undefined" not in words
    names = page.locator("button").evaluate_all(
        "all => all.map(node => node.ariaLabel || node.textContent.trim())"
    )
    assert all(names)


def test_an_input_method_keeps_its_enter(page, server):
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#input", "ni hao")
    page.locator("#input").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(page.locator("#input")).to_have_value("ni hao")
    assert server.requests == []


def test_shift_enter_is_a_new_line(page, server):
    expect(page.locator("#send")).to_be_enabled()
    page.locator("#input").press_sequentially("One")
    height = page.locator("#input").bounding_box()["height"]
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    assert page.locator("#input").bounding_box()["height"] > height
    page.keyboard.press("Enter")
    finished(page)
    assert server.requests[0]["messages"][0]["content"] == "One\nTwo"


def test_by_keyboard_alone(page, server):
    """Write, hear of it, reach every action by Tab, and see where the focus is."""
    ask(page)
    finished(page)
    expect(page.locator("#status")).to_have_text("The answer is complete.")
    reached = {}
    for _ in range(20):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const node = document.activeElement;
                 return [node.ariaLabel || node.textContent.trim(),
                         getComputedStyle(node).outlineStyle]; }"""
        )
        reached[name] = outline
    wanted = {
        "New chat",
        "Settings",
        "Hello?",
        "Rename: Hello?",
        "Delete: Hello?",
        "Copy",
        "Edit",
        "Answer again",
    }
    assert wanted <= set(reached)
    assert {reached[name] for name in wanted} == {"solid"}
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()


def test_copy(open_page, server):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    server.script = Script([CODE])
    ask(page)
    finished(page)
    page.get_by_role("button", name="Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("print('a rather")
    page.locator(".assistant .meta").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == CODE


def test_on_a_phone(open_page, server):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    server.script = Script([CODE, "\n| a | b |\n|---|---|\n| " + "x" * 300 + " | y |\n"])
    ask(page, "Show " + "y" * 200)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#send")).to_be_in_viewport()
    page.get_by_role("button", name="Conversations").click()
    expect(titles(page)).to_be_in_viewport()
    page.get_by_role("button", name="Settings").click()
    box = page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()


def test_reading_back_is_not_disturbed(page, server):
    server.script = Script(["line\n\n" * 200, "the end"], hold=1)
    ask(page)
    expect(answers(page)).to_contain_text("line")
    page.evaluate("document.querySelector('#scroller').scrollTop = 0")
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    server.go.set()
    finished(page)
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == 0
    page.get_by_role("button", name="To the end").click()
    expect(page.get_by_text("the end")).to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(open_page, server, scheme):
    page = open_page(color_scheme=scheme)
    server.script = Script([CODE])
    ask(page)
    finished(page)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{scheme}.png")
    for selector in (".assistant p", ".user .body", ".speed", ".hint", "figcaption"):
        assert contrast(page, selector) >= 4.5, selector  # WCAG 2.2, AA


def contrast(page: Page, selector: str) -> float:
    text, ground = page.locator(selector).first.evaluate(
        """node => {
          const color = getComputedStyle(node).color;
          let at = node;
          const ground = () => getComputedStyle(at).backgroundColor;
          while (ground() === "rgba(0, 0, 0, 0)") at = at.parentElement;
          return [color, ground()];
        }"""
    )
    low, high = sorted(luminance(colour) for colour in (text, ground))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
