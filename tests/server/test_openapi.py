"""/openapi.json: it names every route, says the truth about answers, and whatever is generated
from it is answered without a 500."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)
from server_on_a_thread import RunningServer, running_server

from jaxllm import AsyncEngine
from jaxllm.server import page
from jaxllm.server.chat import ChatRequest
from jaxllm.server.openapi import OPERATIONS, describe

NUM_REQUESTS = 2100
PROMPT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
SOUND: dict[str, dict[str, Any]] = {  # a body of each route that is answered
    "/v1/chat/completions": {**PROMPT, "max_tokens": 2},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {**PROMPT, "max_tokens": 2},
    "/v1/messages/count_tokens": PROMPT,
    "/v1/embeddings": {"input": "Hello"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5, 6]},
}
HANG_SECONDS = 15  # more than the five that a deadline may take to be noticed
NUM_SOUND = 40  # requests to each route with some fields of a generated body in a sound one


def description(base_url: str) -> dict[str, Any]:
    with urllib.request.urlopen(base_url + "/openapi.json", timeout=30) as response:
        assert response.headers.get_content_type() == "application/json"
        return json.load(response)


def test_every_route_is_described_and_nothing_else(server: RunningServer) -> None:
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in server.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {
        (method, path)
        for path, methods in description(server.base_url)["paths"].items()
        for method in methods
    }
    assert described == {one for one in served if one[1] not in page.ROUTES}


def test_fields_are_those_that_are_checked(base_url: str) -> None:
    schema = description(base_url)["components"]["schemas"]["ChatRequest"]
    assert set(schema["properties"]) == set(ChatRequest.model_fields)
    assert schema["required"] == ["messages"]
    assert schema["additionalProperties"] is False


def test_all_references_lead_somewhere(base_url: str) -> None:
    document = description(base_url)
    names = set(document["components"]["schemas"])

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert found
    assert found <= {f"#/components/schemas/{name}" for name in names}


def test_the_document_is_valid_openapi(base_url: str) -> None:
    schema = schemathesis.openapi.from_dict(description(base_url))  # from_url leaves its URL out
    schema.validate()
    assert sum(1 for _ in schema.get_all_operations()) == len(OPERATIONS)


def test_a_key_is_asked_for_where_the_server_asks_for_one() -> None:
    assert "securitySchemes" not in describe(OPERATIONS, has_keys=False)["components"]
    document = describe(OPERATIONS, has_keys=True)
    security = {path: next(iter(ops.values())) for path, ops in document["paths"].items()}
    is_open = {path for path, operation in security.items() if "security" not in operation}
    assert is_open == {"/health", "/ready"}


@pytest.fixture(scope="module")
def short_server(make_engine: Callable[[], AsyncEngine]) -> Iterator[RunningServer]:
    """A server that spends little time on any request."""
    options = {"served_model_name": ("tiny",), "request_timeout": 0.3, "max_completions": 8}
    with running_server(make_engine, **options) as running:
        running.wait_started()
        yield running
        running.wait_idle()


class Explorer:
    """Sends generated requests and checks each answer."""

    settings = hypothesis.settings(
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()  # by route
        self.slowest = 0.0

    def explore(self, operation: Any, mode: GenerationMode, count: int) -> None:
        """Sends requests that follow the description, or with NEGATIVE those that do not."""
        settings = hypothesis.settings(self.settings, max_examples=count)
        cases = operation.as_strategy(generation_mode=mode)
        settings(hypothesis.given(cases)(self.check))()

    def explore_near(self, operation: Any, count: int) -> None:
        """Sends sound requests with a few generated fields in them: of those with all fields
        generated nearly none gets past the checks."""

        @hypothesis.settings(self.settings, max_examples=count)
        @hypothesis.given(operation.as_strategy(), hypothesis.strategies.data())
        def send(case: schemathesis.Case, data: Any) -> None:
            assert isinstance(case.body, dict)
            chosen = data.draw(
                hypothesis.strategies.sets(
                    hypothesis.strategies.sampled_from(sorted({*case.body, "stream"})), max_size=2
                )
            )
            fields = {name: case.body[name] for name in chosen if name in case.body}
            case.body = {**SOUND[operation.path], **fields}
            self.check(case)

        send()

    def check(self, case: schemathesis.Case) -> None:
        started = time.monotonic()
        response = case.call(timeout=20)
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.statuses[case.operation.path, response.status_code] += 1
        timed_out = response.status_code == 503 and response.json()["error"]["code"] == "timeout"
        assert response.status_code < 500 or timed_out, f"{case.as_curl_command()}: {response.text}"
        case.validate_response(
            response, checks=[content_type_conformance, response_schema_conformance]
        )


@pytest.mark.long
@pytest.mark.timeout(400)
def test_generated_requests_are_answered(short_server: RunningServer) -> None:
    """Valid and invalid ones: no 500, no hang, and answers are what the document says."""
    schema = schemathesis.openapi.from_url(short_server.base_url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    explorer = Explorer()
    for operation in operations:
        if operation not in posts:  # without a body there is little to vary
            explorer.explore(operation, GenerationMode.POSITIVE, 10)
    share = -(-NUM_REQUESTS // (2 * len(posts)))
    for operation in posts:
        explorer.explore_near(operation, NUM_SOUND)
        explorer.explore(operation, GenerationMode.POSITIVE, share)
        explorer.explore(operation, GenerationMode.NEGATIVE, share)
    assert explorer.statuses.total() >= NUM_REQUESTS
    for operation in posts:
        assert explorer.statuses[operation.path, 200] >= NUM_SOUND / 4, operation.path
        assert explorer.statuses[operation.path, 400] > 20, operation.path
    assert explorer.slowest < HANG_SECONDS
