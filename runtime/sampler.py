"""From logits to the next token of each sequence.

A step whose sequences are all plainly greedy costs one argmax. Otherwise rows are grouped by what they ask for and
each group is handled as one tensor. Nothing waits for the device but the one read of the chosen tokens, and that of
log-probabilities where they are asked for. A seeded row draws from its own CPU generator, one number a token: what it
gets depends on its logits and its seed alone, not on its batch mates, the device or how often it was preempted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from ..errors import EngineError
from .params import SamplingParams
from .sequence import Sequence
from .transfer import to_device

NOT_FINITE = -1
"""In place of a token whose row holds no finite maximum: so that one read tells both."""

_SCORED_ROWS = 128  # rows of logits whose log-probabilities are made at a time: each is as large as the vocabulary


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's natural log-probability, and the likeliest alternatives as (token id, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each sequence and, where asked for, its log-probability.

    logits: fp32 [R, V], row i for sequences[i]; not modified. Raises EngineError when a row holds no finite maximum.
    """
    adjusted = _adjust(logits, sequences)
    best, tokens = adjusted.max(dim=-1)
    rows = [i for i, sequence in enumerate(sequences) if not sequence.params.greedy]
    if rows:
        at = _there(rows, logits)
        tokens[at] = _draw(adjusted[at], [sequences[i] for i in rows])
    chosen: list[int] = tokens.where(best.abs() < torch.inf, NOT_FINITE).tolist()
    if NOT_FINITE in chosen:
        bad = [sequence.id for sequence, token in zip(sequences, chosen, strict=True) if token == NOT_FINITE]
        raise EngineError(f"the logits of requests {bad} are NaN or infinite; try another dtype, or check the weights")
    for sequence, token in zip(sequences, chosen, strict=True):
        if sequence.guide is not None:
            sequence.guide.accept(token)
        if sequence.counts is not None and sequence.seen is not None:
            sequence.counts[token] += 1
            sequence.seen[token] = True
    return chosen, _logprobs(logits, sequences, chosen)


def _adjust(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Penalties, bias, guides and forbidden endings; the logits themselves when nobody asks for any."""
    penalised = [i for i, sequence in enumerate(sequences) if sequence.params.penalised]
    biased = [
        (i, token, bias) for i, sequence in enumerate(sequences) for token, bias in sequence.params.logit_bias.items()
    ]
    barred = [
        (i, token) for i, sequence in enumerate(sequences) if not sequence.may_stop for token in sequence.stop_ids
    ]
    guides = [(i, sequence.guide) for i, sequence in enumerate(sequences) if sequence.guide is not None]
    if not (penalised or biased or barred or guides):
        return logits
    logits = logits.clone()
    if penalised:
        rows = _there(penalised, logits)
        logits[rows] = _penalise(logits[rows], [sequences[i] for i in penalised])
    if biased:
        *places, values = zip(*biased, strict=True)
        logits[tuple(_there(place, logits) for place in places)] += _there(values, logits)
    if barred:
        logits[tuple(_there(place, logits) for place in zip(*barred, strict=True))] = -torch.inf
    for i, guide in guides:
        logits[i].masked_fill_(~guide.allowed().to(logits.device), -torch.inf)
    return logits


def _there(values: Collection[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the host as a tensor where `like` is."""
    return to_device(torch.tensor(values, dtype=dtype), like.device)


def _penalise(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Repetition over prompt and answer; presence and frequency over the answer. [r, V] -> [r, V]."""
    for sequence in sequences:
        if sequence.counts is None:
            _remember(sequence, logits)
    seen = torch.stack([sequence.seen for sequence in sequences if sequence.seen is not None])
    counts = torch.stack([sequence.counts for sequence in sequences if sequence.counts is not None])
    repetition = _column(sequences, "repetition_penalty", logits)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - counts * _column(sequences, "frequency_penalty", logits)
    return logits - (counts > 0) * _column(sequences, "presence_penalty", logits)


def _remember(sequence: Sequence, like: torch.Tensor) -> None:
    """Count a sequence's tokens once; afterwards each new one is added as it is chosen."""
    vocab = like.shape[-1]
    output = torch.tensor(sequence.output, dtype=torch.int64)
    sequence.counts = to_device(torch.bincount(output, minlength=vocab).float(), like.device)
    sequence.seen = torch.zeros(vocab, dtype=torch.bool, device=like.device)
    sequence.seen[_there(sequence.tokens, like)] = True


def _column(sequences: list[Sequence], name: str, like: torch.Tensor) -> torch.Tensor:
    return _there([getattr(sequence.params, name) for sequence in sequences], like)[:, None]


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """One token per row [r] at the rows' temperatures, out of what top-k, top-p and min-p leave.

    Whatever is cut, the draw itself is over the whole vocabulary in its own order: sorted candidates would make a
    seed's token depend on what batch mates ask for and on how ties were sorted.
    """
    params = [sequence.params for sequence in sequences]
    # The best logit becomes 0 first, so that no temperature, however small, makes an infinity of it; in fp32 the
    # smallest would be 0 themselves.
    temperature = _column(sequences, "temperature", logits).clamp_min(torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if any(p.top_k or p.top_p < 1 for p in params):
        logits = _keep_top(logits, params)
    probs = logits.softmax(dim=-1, dtype=torch.float64)
    if any(p.min_p for p in params):
        floor = _column(sequences, "min_p", logits) * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0)
    return _invert(probs, to_device(_uniforms(sequences), logits.device))


def _keep_top(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Mask what top-k and then top-p leave out; what equals the last one kept stays too. [r, V] -> [r, V]."""
    vocab = logits.shape[-1]
    # Sorting is the dear part: where every row has a top-k, only that many candidates are sorted out.
    width = min(vocab, max(p.top_k or vocab for p in params))
    ranked = logits.topk(width).values
    ranks = torch.arange(width, device=logits.device)
    kept = ranks < _there([p.top_k or vocab for p in params], logits)[:, None]
    probs = ranked.masked_fill(~kept, -torch.inf).softmax(dim=-1, dtype=torch.float64)
    top_p = _there([p.top_p for p in params], logits, torch.float64)[:, None]
    before = probs.cumsum(dim=-1) - probs
    kept &= (before < top_p) | (top_p == 1) | (ranks == 0)
    floor = ranked.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    return logits.masked_fill(logits < floor, -torch.inf)


def _uniforms(sequences: list[Sequence]) -> torch.Tensor:
    """One number in [0, 1) per row, fp64 [r, 1]: from the row's own generator, or the global one."""
    numbers = torch.rand(len(sequences), 1, dtype=torch.float64)
    for i, sequence in enumerate(sequences):
        if sequence.generator is not None:
            numbers[i] = torch.rand(1, dtype=torch.float64, generator=sequence.generator)
    return numbers


def _invert(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The inverse of each row's cumulative distribution: [r, V], [r, 1] -> [r]."""
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding can never select a token of probability 0.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    # A row of NaN points beyond the end here; its caller reports it.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def _logprobs(logits: torch.Tensor, sequences: list[Sequence], chosen: list[int]) -> list[TokenLogprob | None]:
    rows = [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(sequences)
    if not rows:
        return found
    width = max(sequences[i].params.logprobs or 0 for i in rows)
    for i, full in zip(rows, score(logits[_there(rows, logits)], [chosen[i] for i in rows], width), strict=True):
        found[i] = replace(full, top=full.top[: sequences[i].params.logprobs])
    return found


def score(logits: torch.Tensor, tokens: list[int], width: int) -> list[TokenLogprob]:
    """The log-probability of one token per row of logits [r, V], beside the `width` likeliest."""
    found = []
    for start in range(0, len(tokens), _SCORED_ROWS):
        part = tokens[start : start + _SCORED_ROWS]
        logprobs = logits[start : start + len(part)].log_softmax(dim=-1)
        own = logprobs.gather(1, _there(part, logits)[:, None])[:, 0].tolist()
        values, ids = (top.tolist() for top in logprobs.topk(min(logits.shape[-1], width)))
        each = zip(part, own, ids, values, strict=True)
        found += [TokenLogprob(token, mine, tuple(zip(*top, strict=True))) for token, mine, *top in each]
    return found
