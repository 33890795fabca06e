"""A text encoder for asyncio: texts that are asked at the same time run together, on a thread of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from ..embedding import Text
from ..errors import BadParameter, EngineBusy, EngineError, EngineStopped, RequestError
from .model import FfnUse
from .text import Tokenizer

T = TypeVar("T")

TOGETHER = 1024
"""Texts of one call of the encoder at most. It makes batches of them by their tokens."""


class Vectors(Protocol):
    """fp32 vectors [n, D], the tokens of each text, and how many tokens it lost to the longest length."""

    @property
    def vectors(self) -> torch.Tensor: ...

    @property
    def tokens(self) -> list[int]: ...

    @property
    def cut(self) -> list[int]: ...


class Encoder(Protocol):
    """A model that embeds texts, or their token ids. `finish` brings vectors to length 1, and cuts them."""

    tokenizer: Tokenizer

    @property
    def max_length(self) -> int: ...

    def embed(self, texts: Sequence[Text], prompt_name: str | None = None) -> Vectors: ...

    def finish(self, vectors: torch.Tensor, normalize: bool, dimensions: int | None) -> torch.Tensor: ...

    def ffn_use(self) -> tuple[FfnUse | None, ...]: ...


@dataclass(frozen=True)
class EncoderRun:
    """One call of the encoder. waited: seconds of each request until it began; seconds: of the call itself."""

    waited: list[float]
    seconds: float
    texts: int
    tokens: int


@dataclass
class _Asked:
    texts: list[Text]
    prompt_name: str | None
    answer: asyncio.Future[tuple[torch.Tensor, list[int], list[int]]]
    since: float = field(default_factory=time.monotonic)


class AsyncEmbedder:
    """Starts with `start`, on the running event loop, and ends with `stop`.

    max_waiting: texts that may wait. on_run: told of every call of the encoder that gave vectors. ffn_use: what routed
    FFNs had done when the last of them ended.
    """

    def __init__(
        self, encoder: Encoder, max_waiting: int = 4096, on_run: Callable[[EncoderRun], None] = lambda _: None
    ) -> None:
        self.encoder = encoder
        self.max_waiting = max_waiting
        self.ffn_use = encoder.ffn_use()
        self._on_run = on_run
        self._waiting: list[_Asked] = []
        self._come = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "pared-encoder")
        self.error: EngineStopped | None = None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.task = self.loop.create_task(self._work())

    @property
    def alive(self) -> bool:
        """Whether texts are embedded still."""
        return not self.task.done()

    @property
    def waiting(self) -> int:
        """Texts that are asked and not answered."""
        return sum(len(asked.texts) for asked in self._waiting if not asked.answer.done())

    async def stop(self) -> None:
        """Fail what is still asked, and end after the current call."""
        self.refuse("the encoder has been stopped")
        self.task.cancel()
        _fail(self._waiting, EngineStopped("the encoder has been stopped"))
        await asyncio.to_thread(self._thread.shutdown)

    def refuse(self, why: str) -> None:
        """Take no more texts; those that were taken go on."""
        self.error = self.error or EngineStopped(why)

    async def embed(
        self, texts: Sequence[Text], prompt_name: str | None = None
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        """What the encoder's `embed` gives for these texts; cancelling it takes back what has not begun.

        Raises EngineBusy, EngineStopped, EngineError, or the RequestError of the encoder.
        """
        if self.error is not None:
            raise self.error
        held = self.waiting
        if len(texts) > self.max_waiting:
            raise BadParameter(f"{len(texts)} texts at a time are more than the {self.max_waiting} that may wait")
        if held + len(texts) > self.max_waiting:
            raise EngineBusy(f"{held} texts wait already and at most {self.max_waiting} may; try again later")
        asked = _Asked(list(texts), prompt_name, self.loop.create_future())
        self._waiting.append(asked)
        self._come.set()
        return await asked.answer

    async def beside(self, call: Callable[..., T], *args: Any) -> T:
        """What `call` returns, run on the encoder's thread: its tokenizer is not to be used by two at a time."""
        return await self.loop.run_in_executor(self._thread, call, *args)

    async def drained(self) -> None:
        """Wait until nothing is asked."""
        await asyncio.gather(*(asked.answer for asked in self._waiting), return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await self._come.wait()
            together = self._next()
            if together:
                await self._run(together)
            else:
                self._come.clear()

    async def _run(self, together: list[_Asked]) -> None:
        texts = [text for asked in together for text in asked.texts]
        begun = time.monotonic()
        try:
            found, use = await self.beside(self._embed, texts, together[0].prompt_name)
            if not bool(found.vectors.isfinite().all()):
                raise EngineError("a vector is not finite; a wider dtype may hold it")
        except RequestError as error:
            if len(together) == 1:
                _fail(together, error)
            else:  # one of them is wrong, which concerns no other
                for asked in together:
                    await self._run([asked])
        except Exception as error:
            _fail(together, EngineError(f"the encoder failed: {error}"))
        else:
            self.ffn_use = use
            waited = [begun - asked.since for asked in together]
            self._on_run(EncoderRun(waited, time.monotonic() - begun, len(texts), sum(found.tokens)))
            _tell(together, found)

    def _embed(self, texts: list[Text], prompt_name: str | None) -> tuple[Vectors, tuple[FfnUse | None, ...]]:
        return self.encoder.embed(texts, prompt_name), self.encoder.ffn_use()

    def _next(self) -> list[_Asked]:
        """What came first, and whatever else has the same prompt and fits."""
        self._waiting = [asked for asked in self._waiting if not asked.answer.done()]
        together: list[_Asked] = []
        room = TOGETHER
        for asked in self._waiting:
            if not together or (asked.prompt_name == together[0].prompt_name and len(asked.texts) <= room):
                together.append(asked)
                room -= len(asked.texts)
        return together


def _fail(together: list[_Asked], error: Exception) -> None:
    for asked in together:
        if not asked.answer.done():  # its client has not left
            asked.answer.set_exception(error)


def _tell(together: list[_Asked], found: Vectors) -> None:
    at = 0
    for asked in together:
        part = slice(at, at + len(asked.texts))
        at += len(asked.texts)
        if not asked.answer.done():
            asked.answer.set_result((found.vectors[part], found.tokens[part], found.cut[part]))
