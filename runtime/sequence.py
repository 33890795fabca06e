"""One answer in the making: its tokens, its KV blocks and how far they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .params import SamplingParams

if TYPE_CHECKING:
    from .guided import Guide
    from .sampler import TokenLogprob


@dataclass(eq=False)
class Sequence:
    """The state of one request inside the engine.

    `tokens` are prompt and answer; the first `computed` of them have their keys and values in `blocks`.
    `limit` is the length at which the sequence ends. `rope_floor` is the shortest length that length-dependent
    rotary tables see for any of its tokens: the prompt's, so that neither chunks nor preemption change a key.
    `cached` tokens of the prompt did not have to be computed. `started` is when it was first let in (time.monotonic).
    """

    id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    stop_ids: frozenset[int]
    limit: int
    rope_floor: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    keys: list[bytes] = field(default_factory=list)  # of the full blocks, where prefixes are cached
    cached: int = 0
    started: float | None = None
    generator: torch.Generator | None = None
    guide: Guide | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    seen: torch.Tensor | None = None  # [V] bool, tokens of prompt and answer; only kept for penalties
    counts: torch.Tensor | None = None  # [V] fp32, occurrences in the answer; only kept for penalties

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def may_stop(self) -> bool:
        """Whether the next token may end the answer."""
        return self.generated >= self.params.min_tokens


@dataclass(frozen=True)
class Chunk:
    """The tokens start:stop of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its last row gives the next token."""
        return self.stop == len(self.sequence.tokens)

    @property
    def scored(self) -> range:
        """The places of the prompt whose logits are wanted for the log-probability of the token that follows."""
        wanted = self.sequence.params.prompt_logprobs is not None
        return range(self.start, min(self.stop, self.sequence.prompt_len - 1) if wanted else self.start)
