"""`pared bench serve`: request rates swept against any OpenAI endpoint, with the field names of `vllm bench serve`.

Requests arrive as a Poisson process, whoever of those before them is still waiting, so that a slow server cannot slow
down its own load. Prompts are stretches of a text, drawn afresh for each rate: no prompt cache knows them.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import httpx2 as httpx
import numpy as np
from tqdm import tqdm

from ..errors import BadParameter, EndpointError
from .client import Answer, Endpoint, ask, connected

TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
"""What is timed: to the first token, per token after it, between two pieces, end to end."""
GOALS = ("ttft", "tpot", "e2el")
PERCENTILES = (50, 90, 99)
COLUMNS = (
    "requests/s",
    "came",
    "failed",
    "done/s",
    "tokens/s",
    *(f"{name} p50/p90/p99, ms" for name in TIMES.values()),
)


@dataclass(frozen=True)
class Load:
    """What is asked at each rate: `requests` prompts of `words` words of `text`. goals: what -> ms that it may take."""

    text: str
    rates: tuple[float, ...]
    requests: int = 64
    words: int = 128
    seed: int = 0
    goals: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise BadParameter(f"rates are requests per second above 0, or inf for all at once; got {self.rates}")
        if min(self.requests, self.words) < 1:
            raise BadParameter(f"requests and words are 1 or more, got {self.requests} and {self.words}")
        unknown = sorted((self.goals or {}).keys() - set(GOALS))
        if unknown:
            raise BadParameter(f"goodput is about {', '.join(GOALS)}, not {', '.join(unknown)}")
        if not self.text.split():
            raise BadParameter("the text to draw prompts from holds no word; give one that does")

    def prompts(self, place: int) -> list[str]:
        """The prompts of the rate at `place`, the same ones every time."""
        words = self.text.split()
        starts = np.random.default_rng([self.seed, place]).integers(0, max(1, len(words) - self.words), self.requests)
        return [" ".join(words[start : start + self.words]) for start in starts]

    def arrivals(self, rate: float) -> list[float]:
        """Seconds at which requests come: gaps of one exponential draw, stretched to the rate."""
        gaps = np.random.default_rng([self.seed, len(self.rates)]).exponential(size=self.requests)
        return list(np.cumsum(gaps / gaps.mean()) / rate) if math.isfinite(rate) else [0.0] * self.requests


def sweep(endpoint: Endpoint, load: Load, progress: bool = False) -> dict[str, Any]:
    """Measure every rate, one after the other. Raises EndpointError when the first request of all, which is not
    counted, is not answered, or when none of a whole sweep is."""
    return asyncio.run(_sweep(endpoint, load, progress))


async def _sweep(endpoint: Endpoint, load: Load, progress: bool) -> dict[str, Any]:
    async with connected(endpoint) as (client, known):
        first = await ask(client, known, load.prompts(len(load.rates) + 1)[0])
        if first.error:
            raise EndpointError(f"{known.base}{known.path} does not serve {known.model}: {first.error}")
        asked = {"endpoint_type": "openai-chat" if known.chat else "openai", "base_url": known.base}
        result: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **asked}
        result |= {"model_id": known.model, "num_prompts": load.requests, "prompt_words": load.words}
        result |= {"seed": load.seed, "options": known.options, "goodput": dict(load.goals or {}), "rates": []}
        with tqdm(total=len(load.rates) * load.requests, unit="request", disable=not progress) as bar:
            for place, rate in enumerate(load.rates):
                answers, duration = await _at_rate(client, known, load, place, bar)
                result["rates"].append(summary(answers, duration, rate, load.goals))
        if not any(row["completed"] for row in result["rates"]):
            raise EndpointError(f"{known.base}{known.path} answered no request: {result['rates'][0]['errors'][0]}")
    return result


async def _at_rate(
    client: httpx.AsyncClient, endpoint: Endpoint, load: Load, place: int, bar: Any
) -> tuple[list[Answer], float]:
    """All answers at the rate at `place`, and the seconds from the first request's start to the last one's end."""
    start = time.perf_counter()

    async def one(prompt: str, arrival: float) -> Answer:
        await asyncio.sleep(start + arrival - time.perf_counter())
        answer = await ask(client, endpoint, prompt)
        bar.update()
        return answer

    arrivals = load.arrivals(load.rates[place])
    each = [one(prompt, arrival) for prompt, arrival in zip(load.prompts(place), arrivals, strict=True)]
    answers = await asyncio.gather(*each)
    return answers, time.perf_counter() - min(answer.sent for answer in answers)


def summary(
    answers: Sequence[Answer], duration: float, rate: float, goals: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """One rate as `vllm bench serve` reports it; times in ms, None where nothing was timed. duration: seconds."""
    whole = [answer for answer in answers if not answer.error]
    tokens, prompts = (sum(getattr(one, f"{kind}_tokens") for one in whole) for kind in ("output", "prompt"))
    good = sum(all(_of(one, what) * 1000 <= most for what, most in (goals or {}).items()) for one in whole)
    row: dict[str, Any] = {
        "request_rate": rate if math.isfinite(rate) else "inf",
        "duration": duration,
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(whole) / duration,
        "request_goodput": good / duration if goals else None,
        "output_throughput": tokens / duration,
        "total_token_throughput": (prompts + tokens) / duration,
        "errors": [answer.error for answer in answers if answer.error],
    }
    timed = {
        "ttft": [one.ttft for one in whole],
        "tpot": [one.tpot for one in whole if one.tpot is not None],
        "itl": [gap for one in whole for gap in one.itls],
        "e2el": [one.latency for one in whole],
    }
    for name, seconds in timed.items():
        row |= _spread(name, np.asarray(seconds) * 1000)
    return row


def _of(answer: Answer, what: str) -> float:
    """Seconds of what a goal is about; an answer of one token keeps any tpot, as vLLM has it."""
    return {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.latency}[what]


def _spread(name: str, ms: np.ndarray[Any, Any]) -> dict[str, float | None]:
    told = {f"p{p}": partial(np.percentile, q=p) for p in PERCENTILES}
    told |= {"mean": partial(np.mean), "median": partial(np.median), "std": partial(np.std)}
    return {f"{kind}_{name}_ms": float(of(ms)) if ms.size else None for kind, of in told.items()}


# --- for people ----------------------------------------------------------------------------------


def title(result: Mapping[str, Any]) -> str:
    """The heading of the table: what was asked where, and what a good answer keeps."""
    asked = f"{result['model_id']} at {result['base_url']}, {result['num_prompts']} requests at each rate"
    return asked + (f"; good: {goals(result)}" if result["goodput"] else "")


def goals(result: Mapping[str, Any]) -> str:
    """What a good answer keeps."""
    return ", ".join(f"{TIMES[what]} <= {most:g} ms" for what, most in result["goodput"].items())


def columns(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the table, which tells goodput only where goals were set."""
    return (*COLUMNS, "good/s") if result["goodput"] else COLUMNS


def lines(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each rate."""
    return [(*_line(row), *([f"{row['request_goodput']:.2f}"] if result["goodput"] else [])) for row in result["rates"]]


def failures(result: Mapping[str, Any]) -> list[str]:
    """What went wrong, each thing once, and how often."""
    seen = Counter(error for row in result["rates"] for error in row["errors"])
    return [f"failed {count} times: {error}" for error, count in seen.most_common()]


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    def times(name: str) -> str:
        return " / ".join("-" if (ms := row[f"p{p}_{name}_ms"]) is None else f"{ms:.1f}" for p in PERCENTILES)

    came, rate = row["completed"] + row["failed"], row["request_rate"]
    done = (f"{row['request_throughput']:.2f}", f"{row['output_throughput']:.1f}")
    return (rate if rate == "inf" else f"{rate:g}", f"{came}", f"{row['failed']}", *done, *map(times, TIMES))
