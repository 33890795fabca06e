"""An LLM on a thread of its own, for asyncio: requests are added, streamed and cancelled while it runs.

The thread alone touches the engine. Commands reach it through a queue, which it reads between two steps; what a step
gave goes back to the event loop in one call. Everything else here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ..errors import BadParameter, EngineBusy, EngineError, EngineStopped
from .engine import EngineStats
from .llm import LLM, Prompt, Request
from .model import FfnUse
from .outputs import Delta, Output
from .params import SamplingParams

T = TypeVar("T")
FAILURES = 3
"""Steps that may fail one after the other: one may be its requests' fault, this many mean a broken device."""
USE_EVERY_S = 1.0
"""Between two looks at what routed FFNs did, for which a GPU is waited for."""


class Answers:
    """Requests that were asked together: `async for number, delta in answers`, number being a request's place.

    Raises EngineError when a step that they were part of fails. `close` cancels what is not finished.
    """

    def __init__(self, engine: AsyncEngine, requests: list[Request], first: int) -> None:
        self.requests = requests
        self.keys: list[int] = []  # the engine's, known to its thread
        self.first = first
        self.unfinished = sum(request.params.n for request in requests)
        self._engine = engine
        self._deltas: asyncio.Queue[tuple[int, Delta] | EngineError] = asyncio.Queue()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self.unfinished and self._deltas.empty():
            raise StopAsyncIteration
        found = await self._deltas.get()
        if isinstance(found, EngineError):
            raise found
        return found

    async def outputs(self) -> list[Output]:
        """All answers, when they are finished."""
        outputs = [request.output() for request in self.requests]
        async for number, delta in self:
            outputs[number].fold(delta)
        return outputs

    def take(self, number: int, delta: Delta) -> None:
        self.unfinished -= delta.finish_reason is not None
        self._deltas.put_nowait((number - self.first, delta))

    def fail(self, error: EngineError) -> None:
        self.close()
        self._deltas.put_nowait(error)

    def close(self) -> None:
        """Cancel what is not finished; may be called at any time and more than once."""
        self._engine.forget(self)


class AsyncEngine:
    """Starts with `start`, on the running event loop, and ends with `stop`.

    max_waiting: answers that may wait for a place among those that run. on_step: called after every step of the
    engine, and once more when it has become idle, with what `stats` holds by then. ffn_use: as EngineCore's, now and
    then, and when the engine has become idle.
    """

    def __init__(self, llm: LLM, max_waiting: int = 256, on_step: Callable[[EngineStats], None] | None = None) -> None:
        self.llm = llm
        self.capacity = llm.core.scheduler.max_batch + max_waiting
        self.stats, self.ffn_use = llm.core.stats(), llm.core.ffn_use()
        self.error: EngineStopped | None = None
        self._on_step = on_step
        self._answers: dict[int, Answers] = {}  # by number of request
        self._live = self._next = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deltas: deque[tuple[int, Delta]] = deque()
        self._failed = 0
        self._failure: Exception | None = None
        self._use = self.ffn_use
        self._look_again = 0.0
        self._thread = threading.Thread(target=self._work, name="pared-engine", daemon=True)
        self._tokenizing = ThreadPoolExecutor(1, "pared-tokenizer")

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Fail whatever is still asked, and end the thread after its current step."""
        self.refuse("the engine has been stopped")
        self._fail_all()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._tokenizing.shutdown()

    @property
    def alive(self) -> bool:
        """Whether the thread is there, which ends when steps keep failing."""
        return self._thread.is_alive()

    def refuse(self, why: str) -> None:
        """Take no more requests; those that were taken go on."""
        self.error = self.error or EngineStopped(why)

    async def drained(self) -> None:
        """Wait until nothing is asked."""
        await self._idle.wait()

    async def beside(self, call: Callable[..., T], *args: Any) -> T:
        """What `call` returns, run beside the event loop: for work on texts, which may be long."""
        return await self._loop.run_in_executor(self._tokenizing, call, *args)

    async def request(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """LLM.request, beside the event loop."""
        return await self.beside(self.llm.request, prompt, params)

    def stream(self, requests: list[Request]) -> Answers:
        """Ask now. Raises EngineBusy when too many wait and EngineStopped when none is taken any more."""
        if self.error is not None:
            raise self.error
        wanted = sum(request.params.n for request in requests)
        if wanted > self.capacity:
            raise BadParameter(f"{wanted} answers at a time are more than the {self.capacity} that may run and wait")
        if self._live + wanted > self.capacity:
            raise EngineBusy(
                f"{self._live} of {self.capacity} places are taken, {wanted} are asked for; try again later"
            )
        answers = Answers(self, requests, self._next)
        self._answers.update((number, answers) for number in range(self._next, self._next + len(requests)))
        self._next += len(requests)
        self._live += wanted
        self._idle.clear()
        self._inbox.put(partial(self._begin, answers))
        return answers

    def forget(self, answers: Answers) -> None:
        """Take no more deltas for these answers, and cancel them."""
        for number in range(answers.first, answers.first + len(answers.requests)):
            self._answers.pop(number, None)
        if answers.unfinished:
            self._inbox.put(lambda: self.llm.drop(answers.keys))
        self._live -= answers.unfinished
        answers.unfinished = 0
        if not self._live:
            self._idle.set()

    def _deliver(
        self,
        deltas: list[tuple[int, Delta]],
        failure: Exception | None,
        stats: EngineStats,
        use: tuple[FfnUse | None, ...],
    ) -> None:
        self.stats, self.ffn_use = stats, use
        if self._on_step is not None:
            self._on_step(stats)
        for number, delta in deltas:
            answers = self._answers.get(number)
            if answers is None:  # closed
                continue
            if delta.finish_reason == "abort":  # not by us, or it would be closed
                answers.fail(EngineError(f"the engine failed: {failure}"))
                continue
            answers.take(number, delta)
            self._live -= delta.finish_reason is not None
            if not answers.unfinished:
                self.forget(answers)

    def _fail_all(self) -> None:
        for answers in set(self._answers.values()):
            answers.fail(self.error or EngineStopped("the engine has been stopped"))

    # --- on the engine's thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._obey():
                self._step()
        except Exception as error:
            self.error = EngineStopped(f"the engine has died: {error}; start it again")
            self._loop.call_soon_threadsafe(self._fail_all)

    def _obey(self) -> bool:
        """Do what was commanded, and wait for a command where there is no step to make; False: the end."""
        while True:
            try:
                command = self._inbox.get(block=not self.llm.core.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, answers: Answers) -> None:
        try:
            for place, request in enumerate(answers.requests):
                answers.keys += self.llm.submit(answers.first + place, request, self._deltas)
        except Exception as error:  # it was checked before, so this is no request's fault; others go on
            self._loop.call_soon_threadsafe(answers.fail, EngineError(f"the engine takes no such request: {error!r}"))

    def _step(self) -> None:
        computed = self.llm.core.stats().computed_tokens
        try:
            self.llm.step()
            if self.llm.core.stats().computed_tokens > computed:  # it did not just tell of aborts
                self._failed = 0
            self._look()
        except Exception as error:  # its requests are aborted, which the next step tells
            self._failed, self._failure = self._failed + 1, error
            if self._failed == FAILURES:
                raise
        deltas = list(self._deltas)
        self._deltas.clear()
        self._loop.call_soon_threadsafe(self._deliver, deltas, self._failure, self.llm.core.stats(), self._use)

    def _look(self) -> None:
        """See what routed FFNs did."""
        now = time.monotonic()
        if now >= self._look_again or not self.llm.core.busy:
            self._use, self._look_again = self.llm.core.ffn_use(), now + USE_EVERY_S
