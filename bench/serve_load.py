"""`python -m pared.bench.serve_load FOLDER --minutes 10`: a server under load; every answer has to be the offline one.

Clients ask at random, streamed and whole, greedy and seeded, one answer or two; some leave in the middle. At the end
nothing may be held for anyone, memory has to be flat, and the server's metrics have to agree with what clients counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np

from ..kernels.dispatch import set_threads
from ..runtime.llm import LLM
from ..runtime.params import SamplingParams
from ..runtime.server.limits import Limits
from ..runtime.server.opening import service_of
from ..runtime.server.service import Service
from ..terminal import print_table
from . import record
from .hosting import serving

CLIENTS, QUESTIONS = 64, 48
LEAVING = 0.3
"""The share of requests whose client leaves before the end."""
MOST_TOKENS = 32
GROWTH_BYTES = 32 * 2**20
"""What memory may grow by from the second quarter of a run to the last."""


Answer = tuple[str, list[int]]
"""Text and token ids."""


@dataclass(frozen=True)
class Question:
    """What a client sends, and the offline answers to it."""

    body: dict[str, Any]
    answers: list[Answer]

    @property
    def tokens(self) -> int:
        return sum(len(tokens) for _, tokens in self.answers)


@dataclass
class Counted:
    """What all clients counted. finished, left: answers; tokens: of those that finished."""

    finished: int = 0
    left: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def questions(llm: LLM, prompts: Sequence[str], seed: int = 0) -> list[Question]:
    """Each prompt with params of its own, and its offline answer."""
    rng = random.Random(seed)
    made = []
    for number, prompt in enumerate(prompts):
        asked: dict[str, Any] = {"max_tokens": rng.randint(4, MOST_TOKENS), "temperature": 0.0}
        asked["n"] = rng.choice([1, 1, 2])
        if number % 2:
            asked |= {"temperature": 0.9, "top_p": 0.9, "seed": number}
        made.append((prompt, asked))
    params = [SamplingParams.from_dict(asked) for _, asked in made]
    outputs = llm.generate([prompt for prompt, _ in made], params)
    return [
        Question(
            {"prompt": prompt, "return_token_ids": True, **asked},
            [(choice.text, choice.token_ids) for choice in output.choices],
        )
        for (prompt, asked), output in zip(made, outputs, strict=True)
    ]


class Client:
    """One who asks, and asks again, until the time is over."""

    def __init__(self, http: httpx.AsyncClient, asked: list[Question], counted: Counted, seed: int) -> None:
        self.http, self.asked, self.counted = http, asked, counted
        self.rng = random.Random(seed)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            question = self.rng.choice(self.asked)
            ask = self.rng.choice([self._streamed, self._whole])
            begun = time.monotonic()
            try:
                found = await ask(question, self.rng.random() < LEAVING)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.counted.wrong.append(f"{question.body}: {error!r}")
                continue
            if found is None:
                self.counted.left += len(question.answers)
                continue
            self.counted.seconds.append(time.monotonic() - begun)
            self.counted.finished += len(question.answers)
            self.counted.tokens += question.tokens
            if found != question.answers:
                self.counted.wrong.append(f"{question.body}: {found}, and offline {question.answers}")

    async def _whole(self, question: Question, leaves: bool) -> list[Answer] | None:
        patience = self.rng.uniform(0, 2) if leaves else None
        try:
            reply = await asyncio.wait_for(self.http.post("/v1/completions", json=question.body), patience)
        except asyncio.TimeoutError:
            return None
        return [(choice["text"], choice["token_ids"]) for choice in reply.raise_for_status().json()["choices"]]

    async def _streamed(self, question: Question, leaves: bool) -> list[Answer] | None:
        """Up to the end, or to some event."""
        events = self.rng.randint(0, MOST_TOKENS) if leaves else None
        found: list[Answer] = [("", [])] * len(question.answers)
        async with self.http.stream("POST", "/v1/completions", json=question.body | {"stream": True}) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return found
                if line.startswith("data: "):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    text, tokens = found[choice["index"]]
                    found[choice["index"]] = text + choice["text"], tokens + choice["token_ids"]
                    if events == 0:
                        return None
                    events = events and events - 1
        raise ValueError("the stream broke off")


async def _clients(address: str, asked: list[Question], clients: int, seconds: float) -> tuple[Counted, list[int]]:
    """Run all clients; what they counted, and the process' memory in bytes now and then."""
    counted, memory, until = Counted(), [], time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        running = asyncio.gather(*(Client(http, asked, counted, seed).run(until) for seed in range(clients)))
        while not running.done():
            memory.append(resident())
            await asyncio.wait([running], timeout=max(0.1, seconds / 100))
        await running
    return counted, memory


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(llm: LLM, prompts: Sequence[str], clients: int, seconds: float) -> dict[str, Any]:
    """Serve the model and load it; see `faults` for what the result has to show."""
    asked = questions(llm, prompts)
    service = service_of(llm, "model", Limits())
    with serving(service) as address:
        tasks, before = _tasks(service), _metrics(address)
        counted, memory = asyncio.run(_clients(address, asked, clients, seconds))
        until = time.monotonic() + 60
        while any(_held(service, tasks).values()) and time.monotonic() < until:
            time.sleep(0.1)
        held, after = _held(service, tasks), _metrics(address)
    return {
        "clients": clients,
        "run_s": seconds,
        "counted": asdict(counted) | {"seconds": record.quartiles(counted.seconds)},
        "held": held,
        "memory": [int(part.mean()) for part in np.array_split(memory, 4)],
        "metrics": {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("pared:")},
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What a run shows that it should not; nothing where all is well."""
    counted, metrics, memory = result["counted"], result["metrics"], result["memory"]
    found = [f"wrong: {one}" for one in counted["wrong"]]
    found += [f"{count} {what} are held when all is over" for what, count in result["held"].items() if count]
    if memory[3] - memory[1] > GROWTH_BYTES:
        found.append(f"memory grew from {memory[1]} to {memory[3]} bytes")
    successes = sum(count for name, count in metrics.items() if name.startswith("pared:request_success_total"))
    tokens = metrics["pared:request_generation_tokens_sum"]
    # a client that leaves may do so when its answer is already on the way
    for what, told, least, most in (
        ("answers", successes, counted["finished"], counted["finished"] + counted["left"]),
        ("tokens", tokens, counted["tokens"], counted["tokens"] + counted["left"] * MOST_TOKENS),
        ("generated tokens", metrics["pared:generation_tokens_total"], tokens, float("inf")),
        ("latencies", metrics["pared:e2e_request_latency_seconds_count"], successes, successes),
    ):
        if not least <= told <= most:
            found.append(f"metrics tell {told:g} {what}, clients {least:g} to {most:g}")
    return found


def _tasks(service: Service) -> int:
    engine = service.engine
    return len(asyncio.all_tasks(engine._loop))


def _held(service: Service, tasks: int) -> dict[str, int]:
    """What is there for requests, which must be nothing when there are none."""
    engine = service.engine
    stats = engine.stats
    return {
        "requests": len(engine._answers) + engine._live,
        "answers": len(engine.llm._choices),
        "sequences": stats.running + stats.waiting,
        "KV blocks": stats.kv_blocks_used,
        "tasks": _tasks(service) - tasks,
    }


def _metrics(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics", timeout=600).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def main() -> None:
    """Load a folder, print what was counted, and write it; exit code 1 where something is wrong."""
    set_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    given = parser.parse_args()
    from .data import boolq_questions

    llm = LLM(given.folder, dtype="float32", device="cpu", max_batch=32, chunk=256, prefix_caching=True)
    system = "Answer in one short sentence. "
    prompts = [system * (number % 3) + text for number, text in enumerate(boolq_questions()[:QUESTIONS])]
    result = record.circumstances() | load(llm, prompts, given.clients, 60 * given.minutes)
    wrong = faults(result)
    counted = result["counted"]
    print_table(
        f"{given.clients} clients, {given.minutes:g} minutes, fp32",
        ("finished", "left", "wrong", "tokens/s", "seconds an answer", "MiB of memory by quarters"),
        [
            (
                f"{counted['finished']}",
                f"{counted['left']}",
                f"{len(counted['wrong'])}",
                f"{counted['tokens'] / result['run_s']:.0f}",
                " ".join(f"{value:.2f}" for value in counted["seconds"]),
                " ".join(f"{value / 2**20:.0f}" for value in result["memory"]),
            )
        ],
    )
    print("\n".join(wrong) or "every answer is the offline one, nothing is held, the metrics agree")
    print(f"written to {record.write('serve_load', result | {'faults': wrong})}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
