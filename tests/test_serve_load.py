"""The measurements of the server, small: what they find where all is well, and what where something is wrong."""

from __future__ import annotations

import copy
import random
from pathlib import Path

from pared.bench import serve_batching, serve_load
from pared.runtime.llm import LLM


def test_a_short_load_leaves_nothing_behind(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, device="cpu", max_batch=8, chunk=64, num_blocks=120, page=8, prefix_caching=True)
    prompts = [f"{'a beginning that many share, ' * (i % 2)}question {i}" for i in range(16)]
    result = serve_load.load(llm, prompts, clients=24, seconds=6)
    assert serve_load.faults(result) == []
    assert result["counted"]["finished"] > 0 and result["counted"]["left"] > 0

    def with_fault(change) -> str:
        broken = copy.deepcopy(result)
        change(broken)
        (found,) = serve_load.faults(broken)
        return found

    assert "1 KV blocks are held" in with_fault(lambda r: r["held"].update({"KV blocks": 1}))
    assert "memory grew" in with_fault(lambda r: r.update(memory=[0, 0, 0, 2**30]))
    assert "wrong: x" in with_fault(lambda r: r["counted"].update(wrong=["x"]))
    assert "tokens, clients" in with_fault(lambda r: r["counted"].update(tokens=10**9))
    latencies = "pared:e2e_request_latency_seconds_count"
    assert "latencies, clients" in with_fault(lambda r: r["metrics"].update({latencies: 1.5}))


def test_batching_is_measured_on_answers_that_agree(tiny_folder: Path) -> None:
    served, offline = (LLM(tiny_folder, device="cpu", max_batch=16, chunk=32, num_blocks=400, page=8) for _ in range(2))
    tokens = [random.Random(0).randrange(256) for _ in range(1200)]
    result = serve_batching.measure(served, offline, tokens, rounds=2, long_tokens=240)
    assert result["same_answers"] == 1 and result["short_beside_count"] > 0
    assert result["chunk_s"] == result["long_s"] / 8
    rates = {who: quartiles[1] for who, quartiles in result["tokens_per_second"].items()}
    assert set(rates) == {"one client", "16 clients", "offline engine"} and min(rates.values()) > 0
    assert all(row[1] for row in serve_batching.lines(result))
