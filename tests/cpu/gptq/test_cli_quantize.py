"""The commands quantize, perplexity and compare, from arguments to what they print."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from nybble.cli.app import app

TEXT = "".join(f"{i} times {i} is {i * i}. " for i in range(40))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quantized(speaking_llama, tmp_path, text):
    target = tmp_path / "out"
    options = ("--group-size", 32, "--calibration", text, "--length", 64, "--samples", 4, "--json")
    result = run("quantize", speaking_llama, target, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["calibration"]["tokens"] == 256
    assert report["seconds"] > 0
    return target


def test_quantize_prints_a_table(speaking_llama, tmp_path, text):
    options = ("--bits", 8, "--calibration", text, "--length", 64, "--asym", "--no-correct")
    result = run("quantize", speaking_llama, tmp_path / "out", *options, "--sweeps", 0)
    assert result.exit_code == 0
    assert "| layer | qkv_proj | o_proj | gate_up_proj | down_proj |" in result.stdout
    assert "became" in result.stdout


@pytest.mark.parametrize(("flag", "label"), [("--sym", "gptq"), ("--asym", "gptq_v2")])
def test_zero_points_are_stored_as_other_tools_read_them(
    speaking_llama, tmp_path, text, flag, label
):
    options = (flag, "--group-size", 32, "--calibration", text, "--sweeps", 0, "--no-correct")
    assert run("quantize", speaking_llama, tmp_path / "out", *options).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == label


def test_compare_gives_the_cards_row(speaking_llama, quantized, text):
    result = run("compare", speaking_llama, quantized, "--text", text, "--window", 64, "--json")
    found = json.loads(result.stdout)
    single = run("perplexity", quantized, "--text", text, "--window", 64, "--json")
    alone = json.loads(single.stdout)
    assert alone["perplexity"] == pytest.approx(found["quant"]["perplexity"])
    assert alone["tokens"] == found["quant"]["tokens"] == 63 * (len(TEXT) // 64)
    assert found["ratio"] == pytest.approx(
        math.log(alone["perplexity"]) / math.log(found["base"]["perplexity"]), rel=0.2
    )
    page = run("compare", speaking_llama, quantized, "--text", text, "--window", 64).stdout
    assert "Mean KL divergence" in page


def test_a_plot_is_drawn(speaking_llama, quantized, text, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "layers.png"
    result = run("compare", speaking_llama, quantized, "--text", text, "--plot", plot)
    assert result.exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_report_has_nothing_to_plot(speaking_llama, text, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "layers.png"
    result = run("compare", speaking_llama, speaking_llama, "--text", text, "--plot", plot)
    assert result.exit_code == 1
    assert "leave --plot out" in result.stderr


def test_people_read_the_perplexity_in_a_line(speaking_llama, text):
    result = run("perplexity", speaking_llama, "--text", text)
    assert result.stdout.startswith("perplexity ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 3], "choose 4 or 8"),
        (["--group-size", 12], "-1 or a multiple of 8"),
        (["--calibration", "nowhere.txt"], "does not exist"),
        (["--samples", 0], "at least 1"),
    ],
)
def test_wrong_settings_are_one_clear_line(speaking_llama, tmp_path, options, message):
    result = run("quantize", speaking_llama, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_not_quantised_again(quantized, tmp_path, text):
    result = run("quantize", quantized, tmp_path / "again", "--calibration", text)
    assert result.exit_code == 1
    assert "quantised already" in " ".join(result.stderr.split())
