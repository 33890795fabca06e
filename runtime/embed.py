"""Texts in, vectors out: a compact folder as a text encoder, on packed batches and without a KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import sentence_layout
from ..embedding import POOLINGS, Embedding, Pooling, Text, Tokens
from ..errors import BadParameter
from ..kernels import dispatch
from .llm import context_length, dtype_of
from .loader import load
from .model import Decoder, FfnUse
from .packed import Packed, batches
from .text import Tokenizer
from .vectors import Precision, quantize, shape

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Rows of one batch: a weight that is read serves many; on a CPU still more only leave the cache."""
_SLAB = 4096  # texts that are tokenised and sorted at a time


class TextCut(UserWarning):
    """Texts were longer than the encoder takes, and only their beginning counts."""


@dataclass(frozen=True)
class Embeddings:
    """vectors: fp32 [n, D] on the CPU. tokens: of each text, as it was embedded. cut: tokens that each text lost."""

    vectors: torch.Tensor
    tokens: list[int]
    cut: list[int]

    @property
    def report(self) -> str | None:
        """What was cut off, in a sentence; None when nothing was."""
        losses = [cut for cut in self.cut if cut]
        if not losses:
            return None
        return f"{len(losses)} of {len(self.cut)} texts were cut, the longest by {max(losses)} tokens"


class Embedder:
    """A compact folder, loaded and ready to embed.

    path, dtype, device, strict: as for LLM. pooling, max_length (in tokens): default are the folder's, which it says
    as sentence-transformers' folders do or in embedding.json. batch_tokens: tokens that run at a time. decoder: the
    folder's, where it is loaded already; then dtype and device are its own.

    The names of `encode` and its arguments are those of sentence-transformers. A text gives the same vector whatever
    else is in the call, to the rounding of the model's dtype.

    Raises BadParameter for a folder that does not say how it pools, when pooling is not given.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        strict: bool = False,
        *,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.path, self.strict = Path(path), strict
        self.model = decoder or load(path, device, dtype_of(dtype), head=False)
        embedding = _embedding(path, pooling)
        self.tokenizer = Tokenizer(path)
        self.batch_tokens = batch_tokens or BATCH_TOKENS[self.model.device.type]
        context = context_length(self.model.spec)
        if max_length is not None and not 1 <= max_length <= context:
            raise BadParameter(f"max_length must be 1 to {context}, the context of the model, got {max_length}")
        longest = max_length or embedding.max_length or self.tokenizer.hf.model_max_length
        self.embedding = replace(embedding, max_length=min(longest, context))
        self._packed = Packed(self.model, self.embedding.pooling)

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return self.model.spec.embed_dim

    @property
    def max_length(self) -> int:
        """The longest text in tokens, its prompt included; what is longer is cut."""
        return int(self.embedding.max_length or 0)

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        ranges: np.ndarray[Any, Any] | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool = False,
    ) -> np.ndarray[Any, Any] | torch.Tensor:
        """Vectors [n, D] of texts, in their order; of one string one vector [D].

        prompt: what stands before each text, or prompt_name: one of the folder's prompts. normalize_embeddings: to
        length 1, where the folder does not do it anyway. truncate_dim: the first so many dimensions alone. precision
        and ranges: see vectors.quantize. Texts beyond max_length tokens are cut, with a TextCut warning; `embed` tells
        which. Raises BadParameter for an empty text and for what is no text.
        """
        alone = isinstance(sentences, str)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        with tqdm(total=len(texts), desc="embedding", unit="text", disable=not show_progress_bar) as bar:
            found = self.embed(texts, prompt_name, prompt, bar.update)
        if found.report:
            warnings.warn(f"{found.report}: max_length is {self.max_length}", TextCut, stacklevel=2)
        vectors = self.finish(found.vectors, normalize_embeddings, truncate_dim)
        made = quantize(vectors.numpy(), precision, ranges)
        made = made[0] if alone else made
        return torch.from_numpy(made) if convert_to_tensor else made

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> np.ndarray[Any, Any] | torch.Tensor:
        """`encode` with the folder's prompt for queries, if it has one."""
        return self.encode(sentences, self._named("query"), **options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> np.ndarray[Any, Any] | torch.Tensor:
        """`encode` with the folder's prompt for documents, if it has one."""
        return self.encode(sentences, self._named("document", "passage", "corpus"), **options)

    def embed(
        self,
        texts: Sequence[Text],
        prompt_name: str | None = None,
        prompt: str | None = None,
        advance: Callable[[int], Any] = lambda _: None,
    ) -> Embeddings:
        """Vectors as the model gives them, with the account of tokens; see `encode`.

        In place of a text its token ids may stand; neither template nor prompt is put around those.
        advance: told, batch by batch, how many texts are done.
        """
        before, texts = self.prompt(prompt_name, prompt), list(texts)
        vectors, tokens, cut = torch.empty(len(texts), self.dimension), list[int](), list[int]()
        for start in range(0, len(texts), _SLAB):
            slab = self._tokens(texts[start : start + _SLAB], before, start)
            self._run(slab, vectors[start : start + _SLAB], advance)
            tokens += [len(text.ids) for text in slab]
            cut += [text.cut for text in slab]
        return Embeddings(vectors, tokens, cut)

    def finish(self, vectors: torch.Tensor, normalize: bool, dimensions: int | None) -> torch.Tensor:
        """What `embed` gives, cut and brought to length 1 as `encode` does. Raises BadParameter."""
        if dimensions is not None and not 1 <= dimensions <= self.dimension:
            raise BadParameter(f"vectors of this model have 1 to {self.dimension} dimensions, not {dimensions}")
        return shape(vectors, self.embedding.normalize, dimensions, normalize)

    def ffn_use(self) -> tuple[FfnUse | None, ...]:
        """As Decoder's."""
        return self.model.ffn_use()

    def prompt(self, name: str | None, prompt: str | None) -> str:
        """What stands before a text. Raises BadParameter for a name that the folder has not."""
        if prompt is not None:
            return prompt
        prompts, name = self.embedding.prompts, name or self.embedding.default_prompt
        if name is None:
            return ""
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise BadParameter(f"the folder has no prompt {name!r}; it has {known}; or give prompt, a text")
        return prompts[name]

    def _tokens(self, texts: Sequence[Text], before: str, first: int) -> list[Tokens]:
        vocab = self.model.spec.vocab
        given = {
            i: self.embedding.given(text, vocab, first + i)
            for i, text in enumerate(texts)
            if isinstance(text, (list, tuple))
        }
        words = [text for i, text in enumerate(texts) if i not in given]
        read = iter(self.embedding.tokenize(self.tokenizer.hf, words, before, first))  # type: ignore[arg-type]
        return [given[i] if i in given else next(read) for i in range(len(texts))]

    def _named(self, *names: str) -> str | None:
        return next((name for name in names if name in self.embedding.prompts), None)

    def _run(self, texts: list[Tokens], out: torch.Tensor, advance: Callable[[int], Any]) -> None:
        with dispatch.strict(self.strict):
            for numbers in batches([len(text.ids) for text in texts], self.batch_tokens):
                out[numbers] = self._packed([texts[i] for i in numbers]).cpu()
                advance(len(numbers))


def _embedding(path: str | Path, pooling: Pooling | None) -> Embedding:
    """How the folder embeds, with another pooling if one is named."""
    if pooling is not None and pooling not in POOLINGS:
        raise BadParameter(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    found = sentence_layout.read(path)
    if found is None and pooling is None:
        raise BadParameter(f"{path} does not say how it pools; give pooling, one of {', '.join(POOLINGS)}")
    found = found or Embedding(max_length=None, skip_instruction=False)
    return found if pooling is None else replace(found, pooling=pooling)
