"""Requests that schemathesis makes of the OpenAPI document: no server error, no answer that the
document does not describe.
"""

from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import Case, checks

from tests.e2e.deployments import Stack

# Not whether each request is accepted that the document allows: it cannot say all rules.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
# Bounds of the work that a valid request may ask for.
SMALL = {"max_tokens": 2, "max_completion_tokens": 2, "min_tokens": 0, "n": 1}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/score"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/tokenizer_info"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/version"),
        ("GET", "/health"),
    ],
)
def test_answers_are_those_of_the_document(method: str, path: str, stack: Stack) -> None:
    document = schemathesis.openapi.from_url(f"{stack.gateway.http_url}/openapi.json")

    @hypothesis.settings(
        max_examples=15, derandomize=True, suppress_health_check=[*hypothesis.HealthCheck]
    )
    @hypothesis.given(case=document[path][method].as_strategy())
    def answered(case: Case[Any]) -> None:
        if isinstance(case.body, dict):
            small = {name: SMALL[name] for name in SMALL if name in case.body}
            case.body = {**case.body, **small}
        case.call_and_validate(checks=CHECKS, timeout=60)

    answered()
