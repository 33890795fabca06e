"""What a model is worth: perplexity over anything that gives logits, decoding speed, bytes; and the table of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .errors import BadParameter
from .runtime.accounting import decode_traffic
from .runtime.batch import Batch
from .runtime.cache import KVCache
from .runtime.engine import EngineCore
from .runtime.graphs import GraphedDecoder
from .runtime.llm import context_length
from .runtime.loader import load, pick_device
from .runtime.memory import SHARE_OF_FREE, free_bytes
from .runtime.model import Decoder
from .runtime.params import SamplingParams
from .runtime.text import Tokenizer

LogitsFn = Callable[[torch.Tensor], torch.Tensor]
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
    heads = [layer.kv_heads for layer in decoder.spec.layers]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        length, device = len(tokens), decoder.device
        blocks = -(-length // _PAGE)
        positions = torch.arange(length, device=device)
        cache = KVCache(heads, decoder.spec.head_dim, 1 + blocks, _PAGE, decoder.dtype, device)
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
        return decoder(batch, cache)

    return logits


def tokens_per_second(decoder: Decoder, prompt: int = 32, answer: int = 64, seconds: float = 3.0) -> float:
    """Decoding speed of one sequence through the engine, up to `answer` tokens or about `seconds`."""
    spec = decoder.spec
    length = min(prompt + answer, context_length(spec))
    heads = [layer.kv_heads for layer in spec.layers]
    cache = KVCache(heads, spec.head_dim, 2 + length // _PAGE, _PAGE, decoder.dtype, decoder.device)
    core = EngineCore(GraphedDecoder(decoder), cache, context=length, eos=frozenset(), max_batch=1, chunk=length)
    core.add([i % spec.vocab for i in range(max(1, length - answer))], SamplingParams(max_tokens=answer))
    for _ in range(min(4, 1 + answer // 3)):  # the prompt, then the steps that record a decode step and try it
        core.step()
    start, done = time.perf_counter(), 0
    while core.busy and time.perf_counter() - start < seconds:
        done += len(core.step())
    return done / (time.perf_counter() - start)


@dataclass(frozen=True)
class Row:
    """One line of the table. disk_bytes: all files; bytes_per_token: of the weights that one decode step reads."""

    name: str
    disk_bytes: int
    bytes_per_token: int
    tokens_per_second: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Report:
    """What a conversion or a demo has to show, row by row; as text it is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("model", "disk", "bytes per token", "tokens/s", "perplexity")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        rule = tuple("-" * width for width in widths)
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in (lines[0], rule, *lines[1:])
        )


def _cells(row: Row) -> tuple[str, ...]:
    speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
    quality = "-" if row.perplexity is None else f"{row.perplexity:.3f}"
    return row.name, f"{row.disk_bytes / 1e6:.1f} MB", f"{row.bytes_per_token / 1e6:.1f} MB", speed, quality


def measure(
    path: str | Path,
    text: str | None = None,
    *,
    window: int = 2048,
    protocol: str = "windows",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    int8_head: bool = False,
    progress: bool = False,
) -> Row:
    """Load a compact folder and measure it; perplexity only of a `text`, in windows no longer than it or the context.

    dtype: of weights and activations; default is the folder's. device: default is the GPU if there is one. int8_head:
    see runtime.loader.load; the name then says so.
    A model too large for the device is loaded without its weights: its row has no speed and no perplexity.
    """
    path = Path(path)
    name = f"{path.name}, int8 head" if int8_head else path.name
    target = pick_device(device)
    disk = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    read = sum(decode_traffic(path, dtype, int8_head).values())
    if read > free_bytes(target) * SHARE_OF_FREE[target.type]:
        return Row(name, disk, read)
    decoder = load(path, target, dtype, int8_head)
    quality = None
    if text is not None:
        tokens = Tokenizer(path).encode(text)
        window = max(2, min(window, context_length(decoder.spec), len(tokens)))
        quality = perplexity(decoder_logits(decoder), tokens, window, protocol, progress)
    return Row(name, disk, read, tokens_per_second(decoder), quality)
