"""`python -m pared.bench.serve_batching FOLDER`: what continuous batching gives, and what a long prompt takes.

In turns in one run: one client, 16 clients at once, and the offline engine with the same 16 prompts. Then short
requests while a long prompt is read, against short requests alone. Clients and server share this process, so that both
sides have the same processors; in fp32 no speed is given before the served answers are the offline ones.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np

from ..kernels.dispatch import FALLBACKS, set_threads
from ..runtime.llm import LLM
from ..runtime.params import SamplingParams
from ..runtime.server.limits import Limits
from ..runtime.server.opening import service_of
from ..terminal import print_table
from . import record
from .end_to_end import Disagreement
from .hosting import serving

CLIENTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64
SHORT_TOKENS, LONG_TOKENS, ALONE = 16, 8000, 20
CHUNKS = 3
"""Chunk times that a short request may wait beside a long one, above what it takes alone."""
Prompt = list[int]


@dataclass(frozen=True)
class Asking:
    """Clients of one server. Prompts are token ids, so that nobody measures a tokenizer."""

    http: httpx.AsyncClient

    async def wave(self, prompts: Sequence[Prompt]) -> tuple[float, list[list[int]]]:
        """Seconds until all of these, asked at once, are answered; and the answers."""
        begun = time.perf_counter()
        answers = await asyncio.gather(*(self._whole(prompt, NEW_TOKENS) for prompt in prompts))
        return time.perf_counter() - begun, answers

    async def first_token(self, prompt: Prompt) -> float:
        """Seconds to the first token."""
        begun = time.perf_counter()
        async with self.http.stream("POST", "/v1/completions", json=_body(prompt, 1) | {"stream": True}) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    break
        return time.perf_counter() - begun

    async def alone(self, prompts: Sequence[Prompt], long: Prompt) -> tuple[list[float], float]:
        """Seconds to the first token of short prompts one after the other, and of a long one."""
        return [await self.first_token(prompt) for prompt in prompts], await self.first_token(long)

    async def beside(self, prompts: Sequence[Prompt], long: Prompt, gap: float) -> list[float]:
        """The same of short prompts that come, `gap` seconds apart on average, while the long one is read.

        It is read again until there are as many as there are prompts.
        """
        rng, found = random.Random(0), list[float]()
        while len(found) < len(prompts):
            reading = asyncio.create_task(self.first_token(long))
            while True:
                await asyncio.sleep(rng.uniform(0, 2 * gap))
                seconds = await self.first_token(prompts[len(found) % len(prompts)])
                if reading.done():  # the end of it was for nobody else
                    break
                found.append(seconds)
            await reading
        return found

    async def _whole(self, prompt: Prompt, tokens: int) -> list[int]:
        reply = await self.http.post("/v1/completions", json=_body(prompt, tokens))
        return list(reply.raise_for_status().json()["choices"][0]["token_ids"])


def _body(prompt: Prompt, tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


def measure(served: LLM, offline: LLM, tokens: Prompt, rounds: int, long_tokens: int = LONG_TOKENS) -> dict[str, Any]:
    """Serve a model and measure both. tokens: of a text long enough for all prompts. Raises Disagreement.

    offline: the same model once more, as the server's own thread takes up whatever its engine is given.
    """
    shorts = [tokens[i * SHORT_TOKENS : (i + 1) * SHORT_TOKENS] for i in range(ALONE)]
    long = tokens[-long_tokens:]
    prompts = [tokens[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(CLIENTS)]

    async def run(address: str) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=address, timeout=600) as http:
            asking = Asking(http)
            return {**await _batching(asking, offline, prompts, rounds), **await _waiting(asking, shorts, long, served)}

    with serving(service_of(served, "model", Limits())) as address:
        return asyncio.run(run(address))


async def _batching(asking: Asking, llm: LLM, prompts: list[Prompt], rounds: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)

    def offline() -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params)
        return time.perf_counter() - begun, [list(output.choices[0].token_ids) for output in outputs]

    (_, want), (_, got) = offline(), await asking.wave(prompts)
    same = sum(one == other for one, other in zip(want, got, strict=True)) / len(prompts)
    if same < 1 and "float32" in str(llm.model.dtype):
        raise Disagreement(f"{same:.0%} of the served answers are the offline ones; in fp32 all have to be")
    one, many, engine = list[float](), list[float](), list[float]()
    for i in range(rounds):
        seconds, _ = await asking.wave(prompts[i % len(prompts) :][:1])
        one.append(NEW_TOKENS / seconds)
        seconds, _ = await asking.wave(prompts)
        many.append(len(prompts) * NEW_TOKENS / seconds)
        engine.append(len(prompts) * NEW_TOKENS / offline()[0])
    return {
        "same_answers": same,
        "tokens_per_second": {
            "one client": record.quartiles(one),
            f"{len(prompts)} clients": record.quartiles(many),
            "offline engine": record.quartiles(engine),
        },
        "against_one": record.ratios(one, many),
        "against_offline": record.ratios(engine, many),
    }


async def _waiting(asking: Asking, shorts: list[Prompt], long: Prompt, llm: LLM) -> dict[str, Any]:
    alone, reading = await asking.alone(shorts, long)
    chunk = reading / -(-len(long) // llm.core.scheduler.chunk)
    beside = await asking.beside(shorts, long, chunk)
    return {
        "long_tokens": len(long),
        "chunk_tokens": llm.core.scheduler.chunk,
        "long_s": reading,
        "chunk_s": chunk,
        "short_alone_s": record.quartiles(alone),
        "short_beside_s": record.quartiles(beside),
        "short_beside_p95_s": float(np.percentile(beside, 95)),
        "short_beside_count": len(beside),
        "p95_bound_s": float(np.median(alone)) + CHUNKS * chunk,
    }


def lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as rows of text."""

    def spread(values: list[float], unit: str = "", scale: float = 1) -> str:
        low, middle, high = (scale * value for value in values)
        return f"{middle:.3g}{unit} ({low:.3g} to {high:.3g})"

    rates = [(f"tokens/s, {who}", spread(values)) for who, values in result["tokens_per_second"].items()]
    return [
        *rates,
        (f"{CLIENTS} clients against one", spread(result["against_one"])),
        (f"{CLIENTS} clients against the offline engine", spread(result["against_offline"])),
        ("served answers that are the offline ones", f"{result['same_answers']:.0%}"),
        (f"first token of {SHORT_TOKENS} tokens, alone", spread(result["short_alone_s"], " ms", 1000)),
        (f"the same beside {result['long_tokens']} tokens", spread(result["short_beside_s"], " ms", 1000)),
        (f"its p95, of {result['short_beside_count']}", f"{1000 * result['short_beside_p95_s']:.0f} ms"),
        (f"alone and {CHUNKS} chunks", f"{1000 * result['p95_bound_s']:.0f} ms"),
    ]


def main() -> None:
    """Load a folder, measure, print and write."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    from .data import boolq_passages, corpus

    served, offline = (LLM(given.folder, dtype=given.dtype) for _ in range(2))
    tokens = served.tokenizer.encode(corpus(boolq_passages("dev")[:100]))
    result = record.circumstances() | {"dtype": given.dtype} | measure(served, offline, tokens, given.rounds)
    result["fallbacks"] = {" ".join(key): count for key, count in FALLBACKS.items()}
    print_table(f"{given.folder.name} in {given.dtype}, served", ("what", "measured"), lines(result))
    print(f"written to {record.write(f'serve_batching_{given.dtype}', result)}")


if __name__ == "__main__":
    main()
