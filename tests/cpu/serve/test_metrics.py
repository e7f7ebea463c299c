"""What Prometheus reads: parsed with its own parser, beside an engine that really ran."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nybble.sampling import SamplingParams
from nybble.serve.metrics import Metrics

DASHBOARD = json.loads(files("nybble.serve").joinpath("grafana.json").read_text())
DOCS = Path(__file__).parents[3] / "docs" / "operating.md"
PROMPT = [7 * i % 150 for i in range(140)]  # two full pages and a part


def queries():
    panels = DASHBOARD["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def engine(make_engine, data):
    return make_engine(data / "qwen1-plain", max_context=400)


def samples(metrics):
    """{(name, labels): value} of what is rendered."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_request_is_counted_from_arrival_to_end(metrics):
    metrics.arrived()
    assert samples(metrics)["nybble_requests_in_progress",] == 1
    metrics.first_token(0.3)
    metrics.token(0.004)
    metrics.token(0.004)
    metrics.finished("length", prompt_tokens=5, new_tokens=3, seconds=0.308)
    seen = samples(metrics)
    assert seen["nybble_requests_in_progress",] == 0
    assert seen["nybble_requests_arrived_total",] == 1
    assert seen["nybble_requests_finished_total", "length"] == 1
    assert seen["nybble_time_to_first_token_seconds_bucket", "0.25"] == 0
    assert seen["nybble_time_to_first_token_seconds_bucket", "0.5"] == 1
    assert seen["nybble_inter_token_latency_seconds_count",] == 2
    assert seen["nybble_request_latency_seconds_sum",] == pytest.approx(0.308)
    assert seen["nybble_request_prompt_tokens_sum",] == 5
    assert seen["nybble_request_generated_tokens_sum",] == 3


def test_refusals_are_counted_by_reason(metrics):
    for reason in ("rate_limit_exceeded", "rate_limit_exceeded", "context_length_exceeded"):
        metrics.arrived()
        metrics.rejected(reason)
    seen = samples(metrics)
    assert seen["nybble_requests_rejected_total", "rate_limit_exceeded"] == 2
    assert seen["nybble_requests_rejected_total", "context_length_exceeded"] == 1
    assert seen["nybble_requests_in_progress",] == 0


def test_a_first_refusal_is_a_step_from_zero(metrics):
    """A series that begins with 1 has no rate, so that nobody would see it."""
    seen = samples(metrics)
    assert seen["nybble_requests_rejected_total", "rate_limit_exceeded"] == 0
    assert seen["nybble_requests_finished_total", "error"] == 0


def test_servers_do_not_share_counts(metrics):
    metrics.arrived()
    assert samples(Metrics())["nybble_requests_arrived_total",] == 0


def test_the_engine_is_read_at_each_scrape(metrics, engine):
    assert "nybble_requests_running" not in metrics.render().decode()
    metrics.watch(engine)
    assert samples(metrics)["nybble_engine_steps_total",] == 0
    answer = engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    next(answer)
    during = samples(metrics)
    assert during["nybble_requests_running",] == 1
    assert during["nybble_kv_pages", "used"] == engine.load.pages_used > 0
    list(answer)
    list(engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4)))
    seen = samples(metrics)
    assert seen["nybble_requests_running",] == seen["nybble_requests_waiting",] == 0
    assert seen["nybble_kv_pages", "used"] == 0
    assert seen["nybble_kv_pages", "cached"] == engine.load.pages_cached > 0
    assert sum(value for key, value in seen.items() if key[0] == "nybble_kv_pages") == (
        engine.num_pages
    )
    assert seen["nybble_prompt_tokens_total",] == 2 * len(PROMPT)
    assert seen["nybble_generated_tokens_total",] == 8
    assert 0 < seen["nybble_prefix_cache_hit_tokens_total",] < len(PROMPT)


@pytest.mark.parametrize("text", [" ".join(queries()), DOCS.read_text()], ids=["grafana", "docs"])
def test_dashboard_and_docs_name_what_exists(text, metrics, engine):
    metrics.watch(engine)
    there = {key[0] for key in samples(metrics)}
    there |= {name.removesuffix("_bucket") for name in there}
    asked = set(re.findall(r"\b(?:nybble|process)_\w+", text)) - {"process_"}
    assert len(asked) > 12
    assert asked <= there


def test_the_dashboard_can_be_imported_anywhere():
    """No data source of somebody's own, no panel under another, an id for each panel."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
