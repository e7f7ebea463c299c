"""The official openai npm client: its conformance suite, run by node against a toy model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[2] / "clients" / "openai-node"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="no node: apt-get install npm"),
    pytest.mark.skipif(
        not (SUITE / "node_modules").exists(),
        reason=f"no client: npm ci --prefix {SUITE.relative_to(Path(__file__).parents[3])}",
    ),
]


def test_the_openai_npm_client(server):
    node_suite("conformance", server)


def test_its_tools_and_structured_output(tool_server):
    node_suite("tools", tool_server)


def node_suite(name, server):
    environment = {**os.environ, "BASE_URL": f"{server.url}/v1", "MODEL": "toy"}
    command = [NODE, "--test", "--test-reporter=tap", f"{name}.test.js"]
    done = subprocess.run(
        command, cwd=SUITE, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "# skipped 0" in done.stdout
    server.wait_until_idle()
