"""One conversation: asking, streaming, stopping, and what a model must not do."""

from __future__ import annotations

import pytest
from chatpage import Script, answers, ask, finished
from playwright.sync_api import Error, expect


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
