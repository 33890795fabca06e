"""The token-level engine: requests go in, every step gives tokens back. It knows no text and starts no thread.

    id = core.add(tokens, params);  while core.busy: for output in core.step(): ...

Every request ends with exactly one output whose `finish_reason` is set: "stop" (end of text or a stop token),
"length" (max_tokens, the context or the cache is full) or "abort" (cancelled, or a step that it was part of failed).
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import BadParameter, EmptyPrompt, EngineError, ParedError, PromptTooLong
from ..spec import Rope
from .batch import Batch, build_batch
from .cache import BlockAllocator, KVCache
from .guided import Guide
from .model import FfnUse
from .params import SamplingParams
from .prefix import PrefixCache
from .rope import length_matters_above
from .sampler import TokenLogprob, sample, score
from .scheduler import Scheduler
from .sequence import Chunk, Sequence


class ModelSpec(Protocol):
    """What the engine has to know about a model: its vocabulary and its rotary tables, and where longrope's change."""

    @property
    def vocab(self) -> int: ...

    @property
    def rope(self) -> Rope | None: ...

    @property
    def rope_switch(self) -> int | None: ...


class Model(Protocol):
    """Anything that computes a batch: fp32 logits [R, vocab] of the rows asked for, keys and values into the cache."""

    @property
    def spec(self) -> ModelSpec: ...

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor: ...

    def ffn_use(self) -> tuple[FfnUse | None, ...]: ...


@dataclass(frozen=True)
class TokenOutput:
    """What one step gave to one request. `token` is None only for an abort.

    stop_reason: the stop token that ended it, None for the model's own end of text. prompt_logprobs: beside the first
    token where the request asked for them, one for each token of the prompt but the first. cached_tokens: tokens of
    the prompt that were known from requests before. started: when it began to run, by time.monotonic.
    """

    id: int
    token: int | None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    started: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """Running and waiting requests, KV blocks, and totals since the start."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    steps: int
    preemptions: int
    computed_tokens: int  # rows that went through the model, recomputed ones included
    prompt_tokens: int
    cached_tokens: int  # of prompts that have been answered with a first token
    output_tokens: int


class EngineCore:
    """Drives a model over a KV cache. All calls come from one thread.

    context: longest sequence, prompt and answer together. eos: tokens that end an answer unless it ignores them.
    max_batch, chunk: sequences and token rows of one step at most. prefix_caching: do not compute again what an
    earlier request began with as well.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        context: int,
        eos: frozenset[int],
        max_batch: int,
        chunk: int,
        prefix_caching: bool = False,
    ) -> None:
        self.model = model
        self.cache = cache
        self.eos = frozenset(token for token in eos if token < model.spec.vocab)  # some configs name ids beyond it
        self.allocator = BlockAllocator(cache.num_blocks)
        spec = model.spec
        prefixes = PrefixCache(self.allocator, cache.page, length_matters_above(spec.rope)) if prefix_caching else None
        self.scheduler = Scheduler(self.allocator, cache.page, max_batch, chunk, spec.rope_switch, prefixes)
        self.context = context
        self._live: dict[int, Sequence] = {}
        self._outputs: list[TokenOutput] = []
        self._next_id = 0
        self._steps = self._computed = self._prompt_tokens = self._cached = self._output_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has anything left to do or to tell."""
        return bool(self._live or self._outputs)

    def check(self, prompt: Tokens[int], params: SamplingParams) -> None:
        """Raise the RequestError that `add` would raise."""
        if not prompt:
            raise EmptyPrompt("the prompt holds no token; give at least one, such as the model's start of text")
        vocab = self.model.spec.vocab
        named = (("the prompt", prompt), ("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids))
        for name, ids in named:
            bad = [token for token in ids if not 0 <= token < vocab]
            if bad:
                raise BadParameter(f"{name} holds token id {bad[0]}; this model's are 0 to {vocab - 1}")
        for what, room in (("context", self.context), ("KV cache", self.scheduler.capacity)):
            if len(prompt) >= room:
                raise PromptTooLong(
                    f"the prompt has {len(prompt)} tokens and the {what} holds {room}, one of which the answer needs; "
                    + ("shorten it" if what == "context" else "shorten it or give the cache more memory")
                )

    def add(self, prompt: Tokens[int], params: SamplingParams, guide: Guide | None = None) -> int:
        """Queue one request and return its id; `params.n` and `params.guided` are the caller's business.

        guide: says which tokens may come. Raises RequestError.
        """
        self.check(prompt, params)
        room = min(self.context, self.scheduler.capacity)
        sequence = Sequence(
            id=self._next_id,
            tokens=list(prompt),
            prompt_len=len(prompt),
            params=params,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos),
            limit=min(room, len(prompt) + (params.max_tokens or room)),
            rope_floor=len(prompt),
            generator=None if params.seed is None else torch.Generator().manual_seed(params.seed),
            guide=guide,
        )
        self._next_id += 1
        self._live[sequence.id] = sequence
        self.scheduler.add(sequence)
        self._prompt_tokens += len(prompt)
        return sequence.id

    def cancel(self, request_id: int) -> bool:
        """End a request now; the next step reports it as an abort. False when it is no longer there."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._remove(sequence)
        self._outputs.append(TokenOutput(request_id, None, finish_reason="abort"))
        return True

    def step(self) -> list[TokenOutput]:
        """Run the model once and report every new token; empty while prompts are still being read in.

        Raises EngineError (or the ParedError that a kernel raised) when the step fails: its requests are aborted,
        which the next step reports, and all others go on.
        """
        chunks = self.scheduler.schedule()
        if chunks:
            self._guarded(chunks)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _guarded(self, chunks: list[Chunk]) -> None:
        try:
            self._run(chunks)
        except Exception as error:
            for chunk in chunks:
                self.cancel(chunk.sequence.id)
            if isinstance(error, ParedError):
                raise
            rows = sum(chunk.stop - chunk.start for chunk in chunks)
            raise EngineError(
                f"step {self._steps} failed with {len(chunks)} sequences and {rows} token rows: {error!r}; "
                f"these requests are aborted, all others go on"
            ) from error

    def _run(self, chunks: list[Chunk]) -> None:
        self._steps += 1
        logits = self._score(self.model(build_batch(chunks, self.cache.page, self.cache.device), self.cache), chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        tokens, logprobs = sample(logits, sampled) if sampled else ([], [])
        for chunk in chunks:
            self.scheduler.advance(chunk)
            self._computed += chunk.stop - chunk.start
        for sequence, token, logprob in zip(sampled, tokens, logprobs, strict=True):
            self._accept(sequence, token, logprob)

    def _score(self, logits: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
        """Keep the log-probabilities of prompts that ask for them; the rows of logits that give new tokens."""
        if not any(chunk.scored for chunk in chunks):
            return logits
        rows, sampling = 0, []
        for chunk in chunks:
            sequence, scored = chunk.sequence, chunk.scored
            following = sequence.tokens[scored.start + 1 : scored.stop + 1]
            found = score(logits[rows : rows + len(scored)], following, sequence.params.prompt_logprobs or 0)
            sequence.prompt_logprobs[scored.start : scored.stop] = found
            rows += len(scored)
            if chunk.samples:
                sampling.append(rows)
                rows += 1
        return logits[sampling]

    def _accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        first = not sequence.generated
        finish, stop = None, None
        if token in sequence.stop_ids:  # the sampler gives none before min_tokens
            finish, stop = "stop", token if token in sequence.params.stop_token_ids else None
        sequence.tokens.append(token)
        self._output_tokens += 1
        if first:
            self._cached += sequence.cached
        if finish is None and len(sequence.tokens) >= sequence.limit:
            finish = "length"
        if finish:
            self._remove(sequence)
        scores = tuple(sequence.prompt_logprobs) if first else ()
        told = (logprob, finish, stop, scores, sequence.cached, sequence.started)
        self._outputs.append(TokenOutput(sequence.id, token, *told))

    def _remove(self, sequence: Sequence) -> None:
        del self._live[sequence.id]
        self.scheduler.remove(sequence)

    def ffn_use(self) -> tuple[FfnUse | None, ...]:
        """Of every layer what its routed FFN has done since it was loaded, None where it is not routed.

        No part of `stats`, which is asked for after every step: on a GPU this waits for the device.
        """
        return self.model.ffn_use()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_used=self.allocator.used,
            kv_blocks_total=self.allocator.total,
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            computed_tokens=self._computed,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            output_tokens=self._output_tokens,
        )
