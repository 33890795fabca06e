"""A routed model behind the server: what its routers let sleep is told while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from pared import LLM, Embedder, SamplingParams
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.runtime.server.service import Service
from pared.tests import routed
from pared.tests.serving import eventually, serving


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return routed.serving_folder(tiny_checkpoint, tmp_path_factory.mktemp("routed"))


@pytest.fixture
def service(folder: Path) -> Service:
    return open_service(folder, "routed", Limits(), Wanted(device="cpu", kv_cache_bytes=2**20, pooling="mean"))


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http


def told(http: httpx.Client) -> dict[str, dict[str, float]]:
    """layer -> groups and those asleep, as /metrics has them."""
    found: dict[str, dict[str, float]] = {}
    for name, layer, value in re.findall(
        r'^pared:(ffn_\w+)_total\{layer="(\d+)"\} (\S+)$', http.get("/metrics").text, re.MULTILINE
    ):
        found.setdefault(layer, {})[name] = float(value)
    return found


def test_sleeping_groups_are_counted_layer_by_layer(http: httpx.Client, folder: Path) -> None:
    """Of a request: of its prompt and of all tokens of its answer but the last, which nobody reads."""
    before = told(http)
    asked = {"prompt": "some words", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
    assert http.post("/v1/completions", json=asked).status_code == 200
    after = told(http)
    llm, uses = LLM(folder, device="cpu", num_blocks=50), []
    for _ in range(3):  # a first time decode steps are recorded, which computes a row more
        llm.generate("some words", SamplingParams(max_tokens=9, ignore_eos=True))
        uses.append(llm.core.ffn_use())
    assert list(after) == ["0", "1"]
    for one, two, then, now in zip(*uses[1:], before.values(), after.values(), strict=True):
        rows, woken = two.rows - one.rows, two.woken - one.woken
        assert now["ffn_groups"] - then["ffn_groups"] == one.groups * rows == one.groups * (10 + 8)
        assert now["ffn_groups_asleep"] - then["ffn_groups_asleep"] == one.groups * rows - woken > 0


def test_rows_that_are_embedded_count_too(http: httpx.Client, folder: Path, service: Service) -> None:
    before = told(http)
    assert http.post("/v1/embeddings", json={"input": ["some words", "more"]}).status_code == 200
    eventually(lambda: told(http) != before)
    embedder = Embedder(folder, device="cpu", pooling="mean")
    embedder.encode(["some words", "more"])
    for use, then, now in zip(embedder.ffn_use(), before.values(), told(http).values(), strict=True):
        assert now["ffn_groups"] - then["ffn_groups"] == use.groups * 14
        assert now["ffn_groups_asleep"] - then["ffn_groups_asleep"] == use.groups * 14 - use.woken


def test_a_dense_model_tells_of_no_groups(tiny_folder: Path) -> None:
    service = open_service(tiny_folder, "tiny", Limits(), Wanted(device="cpu", kv_cache_bytes=2**20))
    assert "ffn_groups" not in service.metrics.text().decode()
