"""Who takes part in an end-to-end comparison: pared, transformers, llama.cpp. Each answers a prompt greedily, timed.

All sides have the same prompt and number of threads, and count to the end: an end of text does not stop them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import ParedError


@dataclass(frozen=True)
class Timed:
    """One answer: its tokens, seconds to the first one, and tokens per second after it."""

    tokens: list[int]
    first: float
    rate: float


class Side(Protocol):
    """Something that answers prompts. name: in tables. same_weights: whether it should give the same tokens."""

    name: str
    same_weights: bool

    def once(self, prompt: list[int], new_tokens: int) -> Timed: ...


class Pared:
    """A compact folder, streamed as a user gets it."""

    same_weights = False  # as a peer it is another compression

    def __init__(self, llm: Any, name: str) -> None:
        self.llm, self.name = llm, name

    def once(self, prompt: list[int], new_tokens: int) -> Timed:
        from ..runtime.params import SamplingParams

        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return timed(token for delta in self.llm.stream(prompt, params) for token in delta.token_ids)


class Transformers:
    """The same weights through transformers' generate."""

    name, same_weights = "transformers", True

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig

        self.model = model.eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    @classmethod
    def load(cls, path: Path, dtype: Any, device: Any) -> Transformers:
        """The model of a compact folder."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).to(device))

    def once(self, prompt: list[int], new_tokens: int) -> Timed:
        import torch

        clock, ids = _Clock(), torch.tensor([prompt], device=self.model.device)
        start = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=clock)
        return _rates(out[0, len(prompt) :].tolist(), start, clock.times[1:])  # the first call brings the prompt


class LlamaCpp:
    """A GGUF file through llama.cpp's Python package, in a process of its own.

    OpenMP reads its settings once a process: ours would take from llama.cpp the spinning that its barriers count on.
    """

    def __init__(
        self, path: Path, name: str, same_weights: bool, context: int, threads: int, as_stored: bool = False
    ) -> None:
        self.name, self.same_weights = name, same_weights
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        self._pipe = ours
        self._process = multiprocessing.get_context("spawn").Process(
            target=_serve_llama_cpp, args=(theirs, str(path), context, threads, as_stored), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    def once(self, prompt: list[int], new_tokens: int) -> Timed:
        self._pipe.send((prompt, new_tokens))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            got = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ParedError(f"{self.name} ended with code {self._process.exitcode}; try its file on its own") from None
        if isinstance(got, ParedError):
            raise got
        return got


def in_turns(sides: Sequence[Side], prompt: list[int], new_tokens: int, rounds: int) -> list[tuple[Timed, ...]]:
    """The answers of each side, round after round; a first round that warms up is not counted."""
    answers = [[side.once(prompt, new_tokens) for side in sides] for _ in range(rounds + 1)][1:]
    return list(zip(*answers, strict=True))


def timed(tokens: Iterable[int]) -> Timed:
    """Take an answer's tokens as they come."""
    answer: list[int] = []
    times: list[float] = []
    start = time.perf_counter()
    for token in tokens:
        answer.append(token)
        times.append(time.perf_counter())
    return _rates(answer, start, times)


def _rates(tokens: list[int], start: float, times: list[float]) -> Timed:
    if len(times) < 2:
        raise ParedError(f"{len(times)} tokens were generated, a decode rate needs at least 2; ask for more tokens")
    return Timed(tokens, times[0] - start, (len(times) - 1) / (times[-1] - times[0]))


class _Clock:
    """transformers hands each token to a streamer: this one notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def _serve_llama_cpp(pipe: Any, path: str, context: int, threads: int, as_stored: bool) -> None:
    """Answer prompts until the pipe closes."""
    os.environ.pop("GOMP_SPINCOUNT", None)
    from .llama_cpp import open_gguf

    try:
        model = open_gguf(Path(path), context, threads, as_stored)
    except ParedError as error:
        pipe.send(error)
        return
    pipe.send("ready")
    while True:
        try:
            prompt, new_tokens = pipe.recv()
        except EOFError:
            return
        model.reset()  # else it takes up the last round's prompt from its cache
        pipe.send(timed(_first(model.generate(prompt, top_k=1, temp=0.0), new_tokens)))


def _first(tokens: Iterator[int], count: int) -> Iterator[int]:
    for _ in range(count):
        yield next(tokens)
