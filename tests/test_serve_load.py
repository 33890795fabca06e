"""The load test itself, small: it finds nothing where all is well, and says what is wrong where something is."""

from __future__ import annotations

import copy
from pathlib import Path

from pared.bench import serve_load
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
