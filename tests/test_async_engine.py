"""The engine on its thread: what asyncio gets is what the LLM gives, whatever is cancelled, full or broken."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pared.errors import BadParameter, EngineBusy, EngineError, EngineStopped, PromptTooLong
from pared.runtime import llm as llm_module
from pared.runtime.async_engine import FAILURES, AsyncEngine
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.tests.mock_model import VOCAB, LetterTokenizer, MockModel, expected

pytestmark = pytest.mark.anyio
ENDLESS = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class GatedModel(MockModel):
    """Waits for `gate` before each step, so that a test decides what happens between two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def __call__(self, *args: Any) -> Any:
        assert self.gate.wait(60)
        if self.broken:
            raise RuntimeError("the device is gone")
        return super().__call__(*args)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LLM:
    monkeypatch.setattr(llm_module, "load", lambda *_: GatedModel())
    monkeypatch.setattr(llm_module, "GraphedDecoder", lambda model: model)
    monkeypatch.setattr(llm_module, "Tokenizer", lambda path: LetterTokenizer())
    return LLM(tmp_path, page=4, num_blocks=64, max_batch=4, chunk=16, prefix_caching=True)


@asynccontextmanager
async def running(llm: LLM, max_waiting: int = 100) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(llm, max_waiting)
    engine.start()
    try:
        yield engine
    finally:
        llm.model.gate.set()
        await engine.stop()
        assert not engine._thread.is_alive()


async def ask(engine: AsyncEngine, prompt: object, params: SamplingParams = ENDLESS) -> Any:
    answers = engine.stream([await engine.request(prompt, params)])
    return (await answers.outputs())[0]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(count)]


async def quiet(engine: AsyncEngine) -> None:
    """Until the thread has obeyed everything and stands still."""
    await engine.drained()
    while engine.llm.core.busy or not engine._inbox.empty():
        await asyncio.sleep(0.001)


async def test_many_at_once_get_what_each_gets_alone(llm: LLM) -> None:
    async with running(llm) as engine:
        asked = prompts(30)
        outputs = await asyncio.gather(*(ask(engine, prompt) for prompt in asked))
        for prompt, output in zip(asked, outputs, strict=True):
            assert output.token_ids == expected(prompt, 64, ENDLESS)
        await quiet(engine)
    assert (llm.core.allocator.used, llm._choices) == (0, {})


async def test_requests_asked_together_keep_their_places(llm: LLM) -> None:
    async with running(llm) as engine:
        await ask(engine, "before")
        params = SamplingParams(max_tokens=9, temperature=2.0, seed=4, n=3, ignore_eos=True, logprobs=1)
        requests = [await engine.request("first", ENDLESS), await engine.request("second", params)]
        outputs = await engine.stream(requests).outputs()
    alone = llm.generate(["first", "second"], [ENDLESS, params])
    assert [output.choices for output in outputs] == [output.choices for output in alone]
    assert [output.prompt for output in outputs] == ["first", "second"]


async def test_wrong_requests_are_refused_before_they_are_asked(llm: LLM) -> None:
    async with running(llm) as engine:
        with pytest.raises(PromptTooLong):
            await engine.request("x" * 64)
        request = await engine.request("x", SamplingParams(n=105))
        with pytest.raises(BadParameter, match="105 answers at a time are more than the 104"):
            engine.stream([request])
        assert engine._idle.is_set()


async def test_closing_cancels_and_gives_everything_back(llm: LLM) -> None:
    async with running(llm) as engine:
        llm.model.gate.clear()
        gone = engine.stream([await engine.request("gone", ENDLESS)])
        stays = asyncio.create_task(ask(engine, "stays"))
        waiting = [engine.stream([await engine.request("later", ENDLESS)]) for _ in range(6)]
        for answers in (gone, *waiting):
            answers.close()
            answers.close()
        llm.model.gate.set()
        output = await stays
        assert output.token_ids == expected(LetterTokenizer().encode("stays"), 64, ENDLESS)
        await quiet(engine)
        assert (engine._live, engine._answers, llm._choices, llm.core.allocator.used) == (0, {}, {}, 0)
        read = engine.stream([await engine.request("read a little", ENDLESS)])
        await anext(read)
        read.close()
        async for _ in read:  # what had come by then
            pass
        await quiet(engine)
        assert llm.core.allocator.used == 0


async def test_random_cancellations_disturb_nobody(llm: LLM) -> None:
    rng = random.Random(3)

    async def client(engine: AsyncEngine, prompt: list[int]) -> None:
        answers = engine.stream([await engine.request(prompt, ENDLESS)])
        until = rng.choice([0, 1, 5, 99])
        tokens: list[int] = []
        while len(tokens) < until and answers.unfinished + answers._deltas.qsize():
            tokens += (await anext(answers))[1].token_ids
        answers.close()
        assert tokens == expected(prompt, 64, ENDLESS)[: len(tokens)]
        assert until < 99 or len(tokens) == len(expected(prompt, 64, ENDLESS))

    async with running(llm, 1000) as engine:
        await asyncio.gather(*(client(engine, prompt) for prompt in prompts(60)))
        await quiet(engine)
    assert (llm.core.allocator.used, llm._choices, engine._live) == (0, {}, 0)


async def test_the_queue_is_bounded(llm: LLM) -> None:
    async with running(llm, max_waiting=2) as engine:
        llm.model.gate.clear()
        request = await engine.request("x", ENDLESS)
        taken = [engine.stream([request]) for _ in range(6)]
        with pytest.raises(EngineBusy, match="6 of 6 places are taken, 1 are asked for"):
            engine.stream([request])
        taken[0].close()
        taken[0] = engine.stream([request])
        llm.model.gate.set()
        assert len({tuple((await answers.outputs())[0].token_ids) for answers in taken}) == 1
        await ask(engine, "x")


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(llm: LLM) -> None:
    async with running(llm) as engine:
        llm.model.fail_next = True
        with pytest.raises(EngineError, match=r"the engine failed: step 1 failed.*told to fail"):
            await ask(engine, "unlucky")
        assert (await ask(engine, "lucky")).token_ids == expected(LetterTokenizer().encode("lucky"), 64, ENDLESS)
        assert engine.error is None


async def test_a_request_that_cannot_begin_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(llm) as engine:
        submit = llm.submit

        def broken(number: int, request: Any, queue: Any) -> list[int]:
            if request.text == "broken":
                raise ValueError("a bug")
            return submit(number, request, queue)

        monkeypatch.setattr(llm, "submit", broken)
        requests = [await engine.request("fine", ENDLESS), await engine.request("broken", ENDLESS)]
        with pytest.raises(EngineError, match="a bug"):
            await engine.stream(requests).outputs()
        await ask(engine, "fine")
        await quiet(engine)
        assert (engine.alive, llm.core.allocator.used, llm._choices) == (True, 0, {})


async def test_death_reaches_everyone(llm: LLM) -> None:
    async with running(llm) as engine:
        llm.model.gate.clear()
        llm.model.broken = True
        tasks = [asyncio.create_task(ask(engine, "x")) for _ in range(4 * FAILURES + 5)]
        while engine._live < len(tasks):
            await asyncio.sleep(0.001)
        llm.model.gate.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in errors} <= {EngineError, EngineStopped}
        assert all("the device is gone" in str(error) for error in errors)
        assert any("the engine has died" in str(error) for error in errors)
        with pytest.raises(EngineStopped, match=r"has died.*the device is gone.*start it again"):
            await ask(engine, "too late")
        await engine.drained()


async def test_draining_lets_finish_what_was_taken(llm: LLM) -> None:
    async with running(llm) as engine:
        llm.model.gate.clear()
        answers = engine.stream([await engine.request("last", ENDLESS)])
        engine.refuse("the server is about to end")
        with pytest.raises(EngineStopped, match="about to end"):
            engine.stream(answers.requests)
        llm.model.gate.set()
        await engine.drained()
        assert (await answers.outputs())[0].token_ids == expected(LetterTokenizer().encode("last"), 64, ENDLESS)


async def test_stopping_fails_what_is_still_asked(llm: LLM) -> None:
    async with running(llm) as engine:
        llm.model.gate.clear()
        task = asyncio.create_task(ask(engine, "never"))
        while not engine._live:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(EngineStopped, match="stopped"):
            await task
        llm.model.gate.set()
        await stopping
