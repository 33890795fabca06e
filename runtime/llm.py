"""A model that answers: text or tokens in, text and tokens out, in one process and one thread."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..embedding import FILE as EMBEDDING
from ..errors import BadParameter, FolderDamaged
from ..kernels import dispatch
from ..spec import Spec
from .cache import KVCache, bytes_per_block
from .engine import EngineCore
from .graphs import GraphedDecoder
from .guided import Guides
from .loader import load
from .memory import cache_blocks
from .outputs import Choice, Completion, Delta, Output
from .params import SamplingParams
from .text import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Request:
    """A prompt that has been checked, as tokens, and as text where it was given as that."""

    text: str | None
    tokens: list[int]
    params: SamplingParams

    def output(self) -> Output:
        """The answer to it, empty, for deltas to be folded into."""
        return Output(self.text, self.tokens, [Completion(index) for index in range(self.params.n)])


class LLM:
    """A compact folder, loaded and ready to generate.

    path: the folder. dtype: of weights, activations and KV cache; default is the folder's. device: default is the GPU
    if there is one. strict: an error where a slower path would replace a kernel. int8_head: read the head as 8-bit
    integers (`pared eval --int8-head` tells what that costs). max_batch, chunk: sequences and
    token rows of one step at most. prefix_caching: keep the KV blocks of what was asked, so that prompts which begin
    alike are read once; off unless asked for, as whoever measures asks the same again. page: tokens of a KV block. The
    cache holds num_blocks blocks or kv_cache_bytes bytes; by default what max_batch sequences of full
    context can need, cut to a share of the free memory.

    `default_params` is what a request without params gets: the sampling settings of the folder's
    generation_config.json (only where it says do_sample; else greedy). Params given are taken as they are.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        strict: bool = False,
        *,
        int8_head: bool = False,
        max_batch: int = 64,
        chunk: int = 1024,
        prefix_caching: bool = False,
        page: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
    ) -> None:
        if (Path(path) / EMBEDDING).exists():
            raise BadParameter(
                f"{path} is a text encoder without a head: it gives vectors, and no next token; use Embedder"
            )
        self.strict = strict
        self.model = load(path, device, dtype_of(dtype), int8_head)
        if not self.model.spec.causal:
            raise BadParameter(f"{path} attends both ways (is_causal is false): it embeds, see Embedder")
        self.tokenizer = Tokenizer(path)
        configs = [_read_json(Path(path) / name) for name in ("generation_config.json", "config.json")]
        self.default_params = _default_params(configs[0])
        self.context = context_length(self.model.spec)
        self.core = EngineCore(
            GraphedDecoder(self.model),
            self._cache(max_batch, page, num_blocks, kv_cache_bytes),
            context=self.context,
            eos=_eos_ids(configs, self.tokenizer),
            max_batch=max_batch,
            chunk=chunk,
            prefix_caching=prefix_caching,
        )
        self._choices: dict[int, Choice] = {}
        self._guides: Guides | None = None  # made when first asked for

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Answer one prompt or many, each a text or its token ids, with the same params or one for each.

        Returns one Output per prompt, in order. Raises RequestError before anything runs, EngineError if a step fails.
        """
        requests = self._requests(prompts, params)
        outputs = [request.output() for request in requests]
        for request, delta in self._run(requests):
            outputs[request].fold(delta)
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """The answer as it grows. Errors of the request are raised here; closing the iterator cancels it."""
        return self._stream(self.request(prompt, params))

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams | None = None) -> Output:
        """The answer to a conversation, [{"role": ..., "content": ...}, ...], through the folder's chat template."""
        return self.generate(self.tokenizer.chat(messages), params)[0]

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        with closing(self._run([request])) as run:
            for _, delta in run:
                yield delta

    def _run(self, requests: list[Request]) -> Generator[tuple[int, Delta], None, None]:
        """Both ways to answer: every delta with the number of its request. Other runs may take turns with this one."""
        queue: deque[tuple[int, Delta]] = deque()
        mine = [key for number, request in enumerate(requests) for key in self.submit(number, request, queue)]
        unfinished = len(mine)
        try:
            while unfinished:
                while queue:
                    number, delta = queue.popleft()
                    unfinished -= delta.finish_reason is not None
                    yield number, delta
                if unfinished:
                    self.step()
        finally:
            self.drop(mine)

    def submit(self, number: int, request: Request, queue: deque[tuple[int, Delta]]) -> list[int]:
        """Give a request to the engine: its deltas go into `queue` with its number. Returns what `drop` takes."""
        params, keys = request.params, []
        for index in range(params.n):
            seed = None if params.seed is None else params.seed + index
            guide = self._guides.guide(params.guided) if params.guided and self._guides else None
            keys.append(self.core.add(request.tokens, replace(params, n=1, seed=seed), guide))
            self._choices[keys[-1]] = Choice(number, index, request.tokens, params, self.tokenizer, queue)
        return keys

    def step(self) -> None:
        """One step of the engine for everything that was submitted. Raises EngineError if it fails."""
        with dispatch.strict(self.strict):
            outputs = self.core.step()
        for output in outputs:
            choice = self._choices.get(output.id)
            if choice is None:  # its stop string was found, or its run was closed: this is the engine's last word
                continue
            if choice.take(output).finish_reason:
                self.drop([output.id])

    def drop(self, keys: list[int]) -> None:
        """Forget answers, finished or not."""
        for key in keys:
            if self._choices.pop(key, None):
                self.core.cancel(key)

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Any] = [prompts] if alone else prompts
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise BadParameter(f"{len(many)} prompts came with {len(each)} sampling params; give one, or one for each")
        return [self.request(*pair) for pair in zip(many, each, strict=True)]

    def request(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Check a prompt, a text or token ids, and what is asked of it. Raises RequestError."""
        text = prompt if isinstance(prompt, str) else None
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not all(isinstance(token, int) for token in tokens):
            raise BadParameter(f"a prompt is a text or a list of token ids, got {prompt!r}")
        request = Request(text, tokens, params or self.default_params)
        self.core.check(tokens, request.params)
        if request.params.guided is not None:
            self._guides = self._guides or Guides(self.tokenizer, self.model.spec.vocab, self.core.eos)
            self._guides.guide(request.params.guided)
        return request

    def _cache(self, max_batch: int, page: int, num_blocks: int | None, kv_cache_bytes: int | None) -> KVCache:
        spec, dtype, device = self.model.spec, self.model.dtype, self.model.device
        heads = [layer.kv_heads for layer in spec.layers]
        size = bytes_per_block(heads, spec.head_dim, page, dtype)
        if num_blocks is not None and kv_cache_bytes is not None:
            raise BadParameter(f"give num_blocks={num_blocks} or kv_cache_bytes={kv_cache_bytes}, not both")
        if kv_cache_bytes is not None:
            num_blocks = kv_cache_bytes // size
        elif num_blocks is None:
            num_blocks = cache_blocks(size, 1 + max_batch * -(-self.context // page), device)
        return KVCache(heads, spec.head_dim, num_blocks, page, dtype, device)


def context_length(spec: Spec) -> int:
    """Tokens that the model is made for: linear and dynamic rotary scaling stretch the trained context."""
    stretched = spec.rope is not None and spec.rope.kind in ("linear", "dynamic")
    return int(spec.max_positions * spec.rope.factor) if stretched and spec.rope else spec.max_positions


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a user names. Raises BadParameter for one that kernels do not take."""
    if dtype is None or isinstance(dtype, torch.dtype):
        found = dtype
    else:
        found = getattr(torch, dtype, None)
    if dtype is not None and found not in (torch.bfloat16, torch.float16, torch.float32):
        raise BadParameter(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise FolderDamaged(f"{path} is no JSON: {error}") from error


def _default_params(generation: dict[str, Any]) -> SamplingParams:
    """The sampling settings that a generation_config.json recommends."""
    if not generation.get("do_sample"):
        return SamplingParams()
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    return SamplingParams.from_dict({"temperature": 1.0, **given})


def _eos_ids(configs: list[dict[str, Any]], tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-text tokens: the first that generation_config.json, config.json or the tokenizer names."""
    for found in (*(config.get("eos_token_id") for config in configs), tokenizer.eos):
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
