"""The page in two languages, by keyboard, on a phone, in light and dark."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from chatpage import Script, answers, ask, finished, titles
from playwright.sync_api import Page, expect

SCREENSHOTS = Path(tempfile.gettempdir()) / "nybble-page"
CODE = "Here:\n\n```python\nprint('a rather long line of code that no phone can show')\n```\n"


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
    screenshot(page, "phone")
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
    screenshot(page, scheme)
    for selector in (".assistant p", ".user .body", ".speed", ".hint", "figcaption"):
        assert contrast(page, selector) >= 4.5, selector  # WCAG 2.2, AA


def screenshot(page: Page, name: str) -> None:
    """For whoever wants to see it."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


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
