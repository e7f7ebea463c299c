"""`nybble serve`, as far as it comes without a model."""

from __future__ import annotations

import json
import signal
import socket
import threading

import pytest
import uvicorn
from typer.testing import CliRunner

from nybble.cli.app import app
from nybble.cli.serve import Listening, _name
from nybble.serve import server
from nybble.serve.settings import ServerSettings


def serve(*arguments, **env):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env=env)


def test_a_model_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    result = serve(tmp_path, "--port", 0)
    assert result.exit_code == 1
    assert "model_type is 'bert'" in result.output
    assert "Traceback" not in result.output


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = serve(tmp_path, "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "choose another --host or --port" in result.output


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "--host"),
        (["--port", 70000], "--port"),
        (["--max-body", 0], "--max-body"),
        (["--served-name", ""], "--served-name"),
        (["--log-prompts", "--quiet"], "--quiet"),
    ],
    ids=str,
)
def test_settings_are_checked_before_anything_is_loaded(tmp_path, arguments, hint):
    result = serve(tmp_path, *arguments)
    assert result.exit_code == 1
    assert hint in result.output


def test_the_key_may_stand_in_the_environment():
    result = serve("/nosuch/folder", "--host", "0.0.0.0", "--port", 0, NYBBLE_API_KEY="k")
    assert "--api-key" not in result.output
    assert result.exit_code == 1


def test_what_clients_call_a_model(tmp_path):
    folder = tmp_path / "Qwen-72B"
    folder.mkdir()
    assert _name(str(folder)) == "Qwen-72B"  # where it stands is nobody's business
    assert _name("Qwen/Qwen-72B-Chat-Int4") == "Qwen/Qwen-72B-Chat-Int4"
    assert Listening(served_name=["a", "b"]).settings("demo").names == ("a", "b")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_the_start_is_obeyed(number, monkeypatch):
    """Also before there is anything that could be drained."""

    def announce(url):
        load = uvicorn.Config.load

        def load_and_be_stopped(config):
            signal.raise_signal(number)
            load(config)

        monkeypatch.setattr(uvicorn.Config, "load", load_and_be_stopped)

    def never():
        threading.Event().wait()

    server.run(never, ServerSettings(names=("toy",), port=0), announce=announce)
