"""The page in a real Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from chatpage import ScriptedServer
from playwright.sync_api import Browser, Page, sync_playwright


# Of a module only: while Playwright runs, asyncio.run does not work in other tests.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


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
