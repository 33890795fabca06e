"""What clients get: completions and chats, whole and in pieces, in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..outputs import Completion, Delta, Output
from ..sampler import TokenLogprob
from ..text import Tokenizer

Json = dict[str, Any]


@dataclass
class Frame:
    """What all pieces of one reply have in common."""

    id: str
    model: str
    tokenizer: Tokenizer
    token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def reply(self, kind: str, choices: list[Json], **more: Any) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def ids(self, tokens: Sequence[int], prompt: Sequence[int] | None = None) -> Json:
        """The fields of return_token_ids."""
        if not self.token_ids:
            return {}
        return {"token_ids": list(tokens), **({} if prompt is None else {"prompt_token_ids": list(prompt)})}

    def text(self, token: int) -> str:
        """A token as text; bytes that are no text are spelt out, as OpenAI does, so that no two tokens look alike."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(outputs: Sequence[Output]) -> Json:
    """Tokens of prompts, each counted once however many answers it gets, and of answers."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(choice.token_ids) for output in outputs for choice in output.choices)
    cached = {"cached_tokens": sum(output.cached_tokens for output in outputs)}
    total = {"total_tokens": prompt + made, "prompt_tokens_details": cached}
    return {"prompt_tokens": prompt, "completion_tokens": made, **total}


class ChatReply:
    """chat.completion and chat.completion.chunk."""

    whole, piece = "chat.completion", "chat.completion.chunk"

    def __init__(self, frame: Frame, logprobs: bool) -> None:
        self.frame = frame
        self.logprobs = logprobs

    def choice(self, output: Output, place: int, choice: Completion) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        body = self._body(choice.index, choice.logprobs, choice.finish_reason, choice.stop_reason)
        return {"message": message, **body, **self.frame.ids(choice.token_ids, output.prompt_token_ids)}

    def opening(self, output: Output, place: int, first: Delta) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"delta": delta, **self._body(first.index, (), None, None), **self.frame.ids([], output.prompt_token_ids)}
        ]

    def delta(self, output: Output, place: int, delta: Delta) -> Json:
        body = self._body(delta.index, delta.logprobs, delta.finish_reason, delta.stop_reason)
        return {"delta": {"content": delta.text}, **body, **self.frame.ids(delta.token_ids)}

    def _body(self, index: int, scores: Sequence[TokenLogprob], finish: str | None, stop: int | str | None) -> Json:
        logprobs = {"content": [self._scored(score) for score in scores], "refusal": None} if self.logprobs else None
        return {"index": index, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}

    def _scored(self, score: TokenLogprob) -> Json:
        top = [self._token(token, logprob) for token, logprob in score.top]
        return {**self._token(score.token, score.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> Json:
        return {
            "token": self.frame.text(token),
            "logprob": logprob,
            "bytes": list(self.frame.tokenizer.token_bytes(token)),
        }


class CompletionReply:
    """text_completion, whole and in pieces. echo: the prompt stands before each answer."""

    whole = piece = "text_completion"

    def __init__(self, frame: Frame, logprobs: bool, echo: bool) -> None:
        self.frame = frame
        self.logprobs = logprobs
        self.echo = echo
        self._offsets: dict[int, int] = {}  # where the next piece of each choice begins in its text

    def choice(self, output: Output, place: int, choice: Completion) -> Json:
        index = self._index(output, place, choice.index)
        text = (self._prompt(output) if self.echo else "") + choice.text
        scores = [*self._prompt_scores(output, output.prompt_logprobs), *choice.logprobs]
        body = self._body(index, text, scores, choice.finish_reason, choice.stop_reason)
        return {**body, **self.frame.ids(choice.token_ids, output.prompt_token_ids)}

    def opening(self, output: Output, place: int, first: Delta) -> list[Json]:
        """The echo; the log-probabilities of a prompt come with an answer's first delta."""
        if not self.echo:
            return []
        scores = self._prompt_scores(output, first.prompt_logprobs)
        body = self._body(self._index(output, place, first.index), self._prompt(output), scores, None, None)
        return [body | self.frame.ids([], output.prompt_token_ids)]

    def delta(self, output: Output, place: int, delta: Delta) -> Json:
        index = self._index(output, place, delta.index)
        body = self._body(index, delta.text, delta.logprobs, delta.finish_reason, delta.stop_reason)
        return {**body, **self.frame.ids(delta.token_ids)}

    def _index(self, output: Output, place: int, index: int) -> int:
        return place * len(output.choices) + index

    def _prompt(self, output: Output) -> str:
        known = output.prompt
        return self.frame.tokenizer.decode(output.prompt_token_ids, False) if known is None else known

    def _prompt_scores(self, output: Output, scores: Sequence[TokenLogprob]) -> list[TokenLogprob | int]:
        """The first token has none: it stands for itself."""
        return [output.prompt_token_ids[0], *scores] if self.echo and self.logprobs else []

    def _body(
        self,
        index: int,
        text: str,
        scores: Sequence[TokenLogprob | int],
        finish: str | None,
        stop: int | str | None,
    ) -> Json:
        logprobs = self._logprobs(index, scores) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}

    def _logprobs(self, index: int, scores: Sequence[TokenLogprob | int]) -> Json:
        tokens = [self.frame.text(score if isinstance(score, int) else score.token) for score in scores]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if isinstance(score, int) else score.logprob for score in scores],
            "top_logprobs": [None if isinstance(score, int) else self._top(score) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenLogprob) -> Json:
        return {self.frame.text(token): logprob for token, logprob in score.top}
