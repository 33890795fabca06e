"""What a model is worth: perplexity, probabilities of answers, decoding speed, bytes; and the table of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .errors import BadParameter
from .runtime.accounting import step_traffic, weight_memory
from .runtime.batch import Batch, build_batch
from .runtime.cache import KVCache
from .runtime.engine import EngineCore
from .runtime.graphs import GraphedDecoder
from .runtime.llm import context_length
from .runtime.loader import load, pick_device
from .runtime.memory import SHARE_OF_FREE, free_bytes
from .runtime.model import Decoder
from .runtime.params import SamplingParams
from .runtime.sequence import Chunk
from .runtime.sequence import Sequence as Running
from .runtime.text import Tokenizer

LogitsFn = Callable[[torch.Tensor], torch.Tensor]
Questions = Callable[[Decoder, Tokenizer], dict[str, float]]
"""Asks a model and gives, by task, the share of questions that it answered right."""
Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, at least one, and of what might follow it."""
PROTOCOLS = ("windows", "tail")
_PAGE = 16
_ROWS = 256  # rows of logits whose cross-entropy is taken at a time


def perplexity(
    logits_fn: LogitsFn, tokens: Sequence[int], window: int = 2048, protocol: str = "windows", progress: bool = False
) -> float:
    """exp of the mean cross-entropy over windows that do not overlap, each read without what came before it.

    logits_fn: tokens [T] i64 -> logits [T, V]. protocol "windows" drops the tail that fills no window, as
    SLEB, GBLM and Wanda do; "tail" keeps it and gives it the weight of a whole window, as Basis Sharing does.
    Raises BadParameter when the text holds no window, or a window holds no prediction.
    """
    if protocol not in PROTOCOLS:
        raise BadParameter(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if window < 2:
        raise BadParameter(f"a window of {window} tokens predicts nothing; give at least 2")
    pieces = [piece for piece in torch.tensor(list(tokens)).split(window) if len(piece) > 1]
    if protocol == "windows":
        pieces = [piece for piece in pieces if len(piece) == window]
    if not pieces:
        raise BadParameter(f"the text has {len(tokens)} tokens, fewer than one window of {window}; give more text")
    losses = [_cross_entropy(logits_fn(p), p) for p in tqdm(pieces, "perplexity", unit="window", disable=not progress)]
    return math.exp(sum(losses) / len(losses))


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Mean over the predictions of one window: row i of the logits [T, V] predicts token i + 1."""
    rows, targets = logits[:-1].split(_ROWS), tokens[1:].to(logits.device).split(_ROWS)
    total = sum(F.cross_entropy(r.float(), t, reduction="sum").item() for r, t in zip(rows, targets, strict=True))
    return total / (len(tokens) - 1)


def decoder_logits(decoder: Decoder) -> LogitsFn:
    """The logits of every position of one sequence, in one pass."""
    if not decoder.spec.causal:
        raise BadParameter("a model that attends both ways sees the words to predict: it has no perplexity")

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        length, device = len(tokens), decoder.device
        blocks = -(-length // _PAGE)
        positions = torch.arange(length, device=device)
        batch = Batch(
            tokens=tokens.to(device),
            positions=positions,
            rope_lens=torch.full_like(positions, length),
            slots=positions + _PAGE,  # block 0 is reserved
            query_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
            context_lens=torch.tensor([length], dtype=torch.int32, device=device),
            block_tables=torch.arange(1, 1 + blocks, dtype=torch.int32, device=device)[None],
            logit_rows=positions,
            max_query=length,
        )
        return decoder(batch, _cache(decoder, length))

    return logits


def log_likelihoods(decoder: Decoder, pairs: Sequence[Pair], rows: int = 512) -> Iterator[tuple[float, bool]]:
    """For each pair, in order: the natural log-probability of what follows the context, and whether it is greedy.

    rows: tokens of one step; many short pairs share it. What does not fit in the model's context loses its beginning.
    """
    longest = context_length(decoder.spec)
    cut = [([*context, *rest][:-1][-longest:], list(rest)[-longest:]) for context, rest in pairs]
    page_rows = [_PAGE * -(-len(tokens) // _PAGE) for tokens, _ in cut]
    cache = _cache(decoder, max(rows, *page_rows))
    begin = 0
    while begin < len(cut):
        end = begin + 1
        while end < len(cut) and sum(page_rows[begin : end + 1]) <= rows:
            end += 1
        yield from _scores(decoder, cut[begin:end], cache)
        begin = end


def _scores(decoder: Decoder, pairs: Sequence[Pair], cache: KVCache) -> Iterator[tuple[float, bool]]:
    """The pairs (all tokens but the last, those to score) in one step."""
    chunks, wanted, first, block = [], list[int](), 0, 1
    for tokens, rest in pairs:
        count = len(tokens)
        blocks = list(range(block, block + -(-count // _PAGE)))
        running = Running(0, list(tokens), count, SamplingParams(), frozenset(), count + 1, count, blocks=blocks)
        chunks.append(Chunk(running, 0, count))
        wanted += range(first + count - len(rest), first + count)
        first, block = first + count, block + len(blocks)
    batch = replace(build_batch(chunks, _PAGE, decoder.device), logit_rows=torch.tensor(wanted, device=decoder.device))
    logits = decoder(batch, cache)
    targets = torch.tensor([token for _, rest in pairs for token in rest], device=decoder.device)
    scores = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    greedy = logits.argmax(1) == targets
    for score, right in zip(*(part.split([len(rest) for _, rest in pairs]) for part in (scores, greedy)), strict=True):
        yield score.sum().item(), bool(right.all())


def _cache(decoder: Decoder, tokens: int) -> KVCache:
    """Room for so many tokens; block 0 is reserved."""
    heads = [layer.kv_heads for layer in decoder.spec.layers]
    return KVCache(heads, decoder.spec.head_dim, 1 + -(-tokens // _PAGE), _PAGE, decoder.dtype, decoder.device)


def tokens_per_second(decoder: Decoder, prompt: int = 32, answer: int = 64, seconds: float = 3.0) -> float:
    """Decoding speed of one sequence through the engine, up to `answer` tokens or about `seconds`."""
    spec = decoder.spec
    length = min(prompt + answer, context_length(spec))
    core = EngineCore(
        GraphedDecoder(decoder), _cache(decoder, length + 1), context=length, eos=frozenset(), max_batch=1, chunk=length
    )
    core.add([i % spec.vocab for i in range(max(1, length - answer))], SamplingParams(max_tokens=answer))
    for _ in range(min(4, 1 + answer // 3)):  # the prompt, then the steps that record a decode step and try it
        core.step()
    start, done = time.perf_counter(), 0
    while core.busy and time.perf_counter() - start < seconds:
        done += len(core.step())
    return done / (time.perf_counter() - start)


@dataclass(frozen=True)
class Row:
    """One line of the table. disk_bytes: all files; memory_bytes: the weights as they are loaded; bytes_per_token: of
    the weights that one decode step reads; accuracy: task -> share of questions answered right.
    """

    name: str
    disk_bytes: int
    memory_bytes: int
    bytes_per_token: int
    tokens_per_second: float | None = None
    perplexity: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a conversion or a demo has to show, row by row; as text it is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        tasks = list(dict.fromkeys(task for row in self.rows for task in row.accuracy))
        head = ("model", "disk", "memory", "bytes per token", "tokens/s", "perplexity", *tasks)
        lines = [head, *(_cells(row, tasks) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        rule = tuple("-" * width for width in widths)
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in (lines[0], rule, *lines[1:])
        )


def _cells(row: Row, tasks: Sequence[str]) -> tuple[str, ...]:
    sizes = (f"{size / 1e6:.1f} MB" for size in (row.disk_bytes, row.memory_bytes, row.bytes_per_token))
    speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
    quality = "-" if row.perplexity is None else f"{row.perplexity:.3f}"
    answers = (f"{100 * row.accuracy[task]:.1f} %" if task in row.accuracy else "-" for task in tasks)
    return (row.name, *sizes, speed, quality, *answers)


def measure(
    path: str | Path,
    text: str | None = None,
    *,
    window: int = 2048,
    protocol: str = "windows",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    int8_head: bool = False,
    questions: Questions | None = None,
    progress: bool = False,
) -> Row:
    """Load a compact folder and measure it; perplexity only of a `text`, in windows no longer than it or the context.

    dtype: of weights and activations; default is the folder's. device: default is the GPU if there is one. int8_head:
    see runtime.loader.load; the name then says so. questions: what gives the row its accuracy.
    A model too large for the device is loaded without its weights: its row has no speed and no quality.
    """
    path = Path(path)
    name = f"{path.name}, int8 head" if int8_head else path.name
    target = pick_device(device)
    disk = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    on_meta = load(path, "meta", dtype, int8_head)
    sizes = (disk, weight_memory(on_meta), sum(step_traffic(on_meta).values()))
    if sizes[1] > free_bytes(target) * SHARE_OF_FREE[target.type]:
        return Row(name, *sizes)
    decoder = load(path, target, dtype, int8_head)
    quality = None
    if text is not None:
        tokens = Tokenizer(path).encode(text)
        window = max(2, min(window, context_length(decoder.spec), len(tokens)))
        quality = perplexity(decoder_logits(decoder), tokens, window, protocol, progress)
    accuracy = questions(decoder, Tokenizer(path)) if questions else {}
    return Row(name, *sizes, tokens_per_second(decoder), quality, accuracy)
