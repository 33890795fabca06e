"""`pared serve` as its clients see it, beside what any server of ours has to give them (client_suite.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import service_of
from pared.tests.client_suite import *  # noqa: F403
from pared.tests.client_suite import MODEL, TALK, complete
from pared.tests.serving import serving

LIMITS = Limits(prompts=8, n=4, body_bytes=2**16, waiting=100)


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    """What the server runs; tests ask it only while the server is idle, for the answers to expect."""
    return LLM(tiny_folder, device="cpu", max_batch=4, chunk=64, num_blocks=100, page=8, prefix_caching=True)


@pytest.fixture(scope="module")
def address(llm: LLM) -> Iterator[str]:
    with serving(service_of(llm, MODEL, LIMITS)) as address:
        yield address


def test_a_prompt_that_begins_alike_is_known(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": TALK, "max_tokens": 1}
    client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked)
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_guide_that_is_broken_ends_its_answer(alone: LLM) -> None:
    from pared.runtime.guided import Guides
    from pared.runtime.params import Guided

    guide = Guides(alone.tokenizer, 257, alone.core.eos).guide(Guided("regex", "ab"))
    assert guide.allowed().nonzero().flatten().tolist() == alone.tokenizer.encode("a")
    guide.accept(alone.tokenizer.encode("z")[0])
    assert set(guide.allowed().nonzero().flatten().tolist()) == alone.core.eos


def test_metrics_count_what_clients_counted(http: httpx.Client, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    used = complete(client, "count me", n=2, max_tokens=5).usage
    after = read()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("pared:generation_tokens_total") == used.completion_tokens
    assert more("pared:prompt_tokens_total") == 2 * used.prompt_tokens
    assert more('pared:request_success_total{finished_reason="length"}') == 2
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert more(f"pared:{name}_seconds_count") == 2
    assert more("pared:inter_token_latency_seconds_count") == used.completion_tokens - 2
    assert after["pared:num_requests_running"] == after["pared:num_requests_waiting"] == 0
    assert after["pared:kv_cache_usage_perc"] == 0
    assert after["pared:weights_bytes"] > 10_000


def test_an_odd_request_id_is_replaced(http: httpx.Client) -> None:
    odd = http.get("/version", headers={"x-request-id": "no good\tid"}).headers["x-request-id"]
    assert odd != "no good\tid" and len(odd) == 32


def test_a_real_model_under_load_answers_as_it_does_offline(smollm2: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    llm = LLM(smollm2, dtype="float32", device="cpu", max_batch=8, num_blocks=64, prefix_caching=True)
    system = "Answer in one short sentence and be polite. "
    questions = [system + text for text in ("Why is the sky blue?", "What is water?", "Who wrote Faust?", "Why?")]
    want = [llm.generate(question, SamplingParams(max_tokens=8))[0].text for question in questions]
    with (
        serving(service_of(llm, MODEL, LIMITS)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [pool.submit(complete, client, question, max_tokens=8) for question in questions * 2]
        assert [call.result().choices[0].text for call in calls] == want * 2
    assert llm.core.stats().kv_blocks_used == 0
