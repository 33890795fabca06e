"""The server against its own OpenAPI document: whatever is sent, the answer is one that the document names.

`pytest tests/test_server_fuzz.py --fuzz-cases 2000 --timeout 3600` sends more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings

from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.runtime.server.service import Service
from pared.tests.serving import eventually, serving

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.checks")

WANTED = Wanted(device="cpu", max_batch=4, chunk=64, kv_cache_bytes=2**20, pooling="mean")
SECONDS = 60
"""An answer that takes longer hangs."""


@pytest.fixture(scope="module")
def service(tiny_folder: Path) -> Service:
    """Generates and embeds, so that every endpoint has work to do."""
    return open_service(tiny_folder, "tiny", Limits(prompts=4, n=4, texts=8), WANTED)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


def test_the_document_says_how_each_endpoint_refuses(address: str) -> None:
    document = httpx.get(f"{address}/openapi.json", timeout=SECONDS).json()
    assert "securitySchemes" not in document["components"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            told = set(operation["responses"])
            assert {"200", "408", "413", "431"} <= told and "422" not in told
            assert ("401" in told) == (path not in ("/health", "/ready", "/metrics"))
            assert ("400" in told) == (method == "post")
            for status, response in operation["responses"].items():
                if status != "200":
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorReply"}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        assert {"404", "429", "503"} <= set(document["paths"][path]["post"]["responses"])


def test_a_key_is_in_the_document_of_a_server_that_asks_for_it(service: Service) -> None:
    from pared.runtime.server.app import create_app
    from pared.runtime.server.limits import Keys

    document = create_app(service, Keys(["secret"])).openapi()
    assert document["paths"]["/v1/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def test_every_answer_is_one_that_the_document_names(address: str, service: Service, request: Any) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    wanted, taken = request.config.getoption("--fuzz-cases"), [one for one in operations if one.method == "post"]
    sent: Counter[int] = Counter()
    for operation in operations:
        if operation in taken:  # the others have nothing to vary, but for a name
            fuzz(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE), wanted // 10, sent)
        fuzz(operation.as_strategy(), -(-wanted // (2 * len(taken))), sent, service.name)
    assert sum(sent.values()) >= wanted and {200, 400, 404} <= set(sent)
    assert set(sent) <= {200, 400, 404, 405, 429, 503}
    print(f"\n{sum(sent.values())} requests: {dict(sent)}")
    assert httpx.get(f"{address}/health", timeout=SECONDS).status_code == 200
    eventually(lambda: service.generator._live == 0 and service.generator.stats.kv_blocks_used == 0)


def fuzz(cases: Any, count: int, sent: Counter[int], model: str | None = None) -> None:
    """Send so many cases. model: whom bodies ask, as any other name gets no further than a 404."""

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def check(case: Any) -> None:
        if model is not None and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = model
        response = case.call(timeout=SECONDS)
        sent[response.status_code] += 1
        case.validate_response(response, excluded_checks=[checks.positive_data_acceptance])

    check()
