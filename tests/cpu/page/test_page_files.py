"""What the chat page is made of, without a browser: files, headers, no outside hosts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from nybble.serve.page import FOLDER, router

FILES = sorted(FOLDER.iterdir())
INDEX = (FOLDER / "index.html").read_text()


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_the_page_is_at_the_root(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.text == INDEX
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_comes_with_the_policy(client, path):
    answer = client.get(f"/page/{path.name}")
    assert answer.content == path.read_bytes()
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpage.py", "%2e%2e/page.py"])
def test_other_files_are_not_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_every_file_is_packaged():
    root = FOLDER.parents[2]
    package = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    globs = package["package-data"]["nybble"]
    packaged = {path for glob in globs for path in Path(root / "nybble").glob(glob)}
    assert set(FILES) <= packaged


def test_nothing_is_inline():
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", INDEX)
    assert re.findall(r"<script[^>]*>(.*?)</script>", INDEX, re.DOTALL) == [""]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_outside_host_is_named(path):
    hosts = re.findall(r"https?://[\w.]+", path.read_text())
    assert set(hosts) <= {"http://www.w3.org"}  # the namespace of SVG


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_text_is_parsed_as_html(path):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", path.read_text()
    )
