"""SmolLM2 answering: the first token of a long prompt, and tokens after it, in turns with transformers.

The two have to agree on the tokens before anything is timed (bench/end_to_end.py says how).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pared.bench import end_to_end, record
from pared.bench.sides import Pared, Timed, Transformers
from pared.runtime.accounting import decode_traffic
from pared.runtime.llm import LLM

ROUNDS, PROMPT, ANSWER = 3, 512, 32
WHAT: dict[str, Callable[[Timed], float]] = {"prefill": lambda t: t.first, "decode": lambda t: 1 / t.rate}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("what", WHAT)
def test_generate(benchmark: Any, memory: Any, smollm2: Path, what: str, dtype: str) -> None:
    llm = LLM(smollm2, dtype=dtype)
    pared, theirs = Pared(llm, "pared"), Transformers.load(smollm2, llm.model.dtype, llm.model.device)
    prompt = torch.randint(llm.model.spec.vocab, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    agreement = end_to_end.check(pared, theirs, prompt, ANSWER)
    count = ANSWER if what == "decode" else 2
    ours: list[float] = []
    others: list[float] = []

    def theirs_turn() -> None:
        memory.sweep()
        others.append(WHAT[what](theirs.once(prompt, count)))

    def ours_turn() -> None:
        ours.append(WHAT[what](pared.once(prompt, count)))

    benchmark.pedantic(ours_turn, setup=theirs_turn, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    ours, others = ours[1:] or ours, others[1:] or others
    seconds, nbytes = record.quartiles(ours), sum(decode_traffic(smollm2, llm.model.dtype).values())
    rate = nbytes / seconds[1] / 1e9
    benchmark.group = f"SmolLM2-135M, {what}"
    benchmark.extra_info.update(
        what=f"{what} of {PROMPT} tokens" if what == "prefill" else "one token after the prompt",
        dtype=dtype,
        threads=torch.get_num_threads(),
        bytes=nbytes,
        time_us=[1e6 * s for s in seconds],
        tokens_per_second=(PROMPT if what == "prefill" else 1) / seconds[1],
        gb_per_s=rate,
        percent_of_ceiling=100 * rate / memory.ceiling(),
        best_dense="transformers",
        ratio=record.ratios(ours, others),
        agreement=agreement,
    )
