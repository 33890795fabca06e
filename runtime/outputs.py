"""What a caller gets back: deltas while an answer grows, and the answer that they fold into."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .engine import TokenOutput
from .params import SamplingParams
from .sampler import TokenLogprob
from .text import Detokenizer, StopStrings, Tokenizer


@dataclass(frozen=True)
class Delta:
    """What one step adds to answer `index` of a request. The last delta of an answer has a finish_reason.

    text is settled: whole characters, and nothing that a stop string may still cut off; so it can lag behind token_ids.
    prompt_logprobs, cached_tokens and started are as TokenOutput's.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    started: float | None = None


@dataclass
class Completion:
    """One answer. token_ids holds every generated token, also those that text leaves out (stops, special tokens).

    finish_reason: "stop" (stop_reason is the stop string or stop token, None for the model's end of text), "length",
    or "abort". logprobs: one per token where the request asked for them, else empty.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def fold(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass
class Output:
    """The answers to one prompt, n of them; text, token_ids and the rest are those of the first.

    prompt is None where the prompt was given as tokens. prompt_logprobs: one for each token of the prompt but the
    first, where the request asked for them. cached_tokens: how many of them were known from requests before.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Completion]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0

    def fold(self, delta: Delta) -> None:
        self.choices[delta.index].fold(delta)
        if delta.index == 0:
            self.prompt_logprobs += delta.prompt_logprobs
            self.cached_tokens = delta.cached_tokens or self.cached_tokens

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.choices[0].stop_reason


class Choice:
    """One answer on its way from the engine's tokens to the caller's deltas, which it leaves in `queue`.

    `request` is the place of its prompt among those that were asked together.
    """

    def __init__(
        self,
        request: int,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        queue: deque[tuple[int, Delta]],
    ) -> None:
        self.request = request
        self.index = index
        self.queue = queue
        self._params = params
        self._text = Detokenizer(tokenizer, prompt, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._generated = 0

    def take(self, output: TokenOutput) -> Delta:
        """Queue and return what the engine's output adds; a stop string found in it ends the answer."""
        text = self._show(output)
        stop = self._stops.found
        delta = Delta(
            index=self.index,
            text=text,
            token_ids=() if output.token is None else (output.token,),
            logprobs=() if output.logprob is None else (output.logprob,),
            finish_reason=output.finish_reason if stop is None else "stop",
            stop_reason=output.stop_reason if stop is None else stop,
            prompt_logprobs=output.prompt_logprobs,
            cached_tokens=output.cached_tokens,
            started=output.started,
        )
        self.queue.append((self.request, delta))
        return delta

    def _show(self, output: TokenOutput) -> str:
        final = output.finish_reason is not None
        ends = output.finish_reason == "stop" and not self._params.include_stop_str_in_output
        text = ""
        if output.token is not None:
            self._generated += 1
            text = "" if ends else self._text.add(output.token)
        if final:
            text += self._text.finish()
        if self._generated <= self._params.min_tokens:
            return text
        return self._stops.add(text, final)
