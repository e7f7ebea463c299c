"""schemathesis reads the API's own document, and sends what it allows and what it does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import serving

from nybble.serve.app import create_app
from nybble.serve.settings import ServerSettings

EXAMPLES = 20
DOCUMENT = create_app(lambda: None, ServerSettings(("toy",))).openapi()
del DOCUMENT["paths"]["/v1/embeddings"]  # a server error by design: 501
OPERATIONS = [
    result.ok() for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
]
NEEDED = {"messages", "prompt", "tokens"}
# A schema cannot say that two fields exclude each other, or what the vocabulary is.
EXCLUDED = [positive_data_acceptance]
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm) as running:
        yield running
        running.wait_until_idle()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_the_document_allows(server, operation):
    """No 500, and no status, type or body that the document does not name."""
    statuses: Counter[int] = Counter()

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), data=st.data())
    def check(case, data):
        if isinstance(case.body, dict):
            case.body = few_fields(case.body, data, "completions" in operation.path)
        answer = case.call_and_validate(base_url=server.url, excluded_checks=EXCLUDED)
        statuses[answer.status_code] += 1

    check()
    assert statuses[200] > 0 or operation.path_parameters, statuses


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if operation.body],
    ids=lambda operation: operation.label,
)
def test_what_the_document_forbids(server, operation):
    """Refused in the documented form."""

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case):
        # Null is absent, whatever the field.
        assume(not isinstance(case.body, dict) or None not in case.body.values())
        answer = case.call_and_validate(base_url=server.url)
        assert answer.status_code in (400, 404)  # 404: another model

    check()


def few_fields(body: dict[str, Any], data: st.DataObject, generates: bool) -> dict[str, Any]:
    """What must be there and a few of the rest: with all of them, one is always out of range."""
    names = sorted(body.keys() - NEEDED - {"model"})
    chosen = data.draw(st.sets(st.sampled_from(names), max_size=3)) if names else set()
    kept = {name: value for name, value in body.items() if name in chosen | NEEDED}
    if "messages" in kept and data.draw(st.booleans()):
        kept["messages"] = [{"role": "user", "content": "the quick brown fox"}]
    return {"max_tokens": 4, **kept} if generates else kept
