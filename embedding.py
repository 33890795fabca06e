"""What makes a decoder a text encoder: how a text becomes tokens, and their hidden states one vector.

Converters choose depths and train with it, and a folder keeps it as embedding.json, so that what runs the
folder does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch

from .errors import BadParameter

FILE = "embedding.json"
Pooling = Literal["weighted_mean", "mean", "last", "cls"]
Template = Literal["none", "llama3", "inst", "chatml"]
POOLINGS = get_args(Pooling)
TEMPLATES: dict[str, tuple[str, str]] = {
    "none": ("", ""),
    "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "inst": ("[INST] ", " [/INST]"),  # Mistral, Llama-2-chat
    "chatml": ("<|im_start|>user\n", "<|im_end|>"),  # Qwen2, SmolLM2
}
"""What stands around a text: the turn of a user, in the forms that chat models were trained with."""
Text = str | Sequence[int]
"""A text, or its token ids."""


class Tokens(NamedTuple):
    """A text as token ids, the first of them that pooling counts, and how many tokens were cut off.

    What is before `start` is instruction.
    """

    ids: list[int]
    start: int
    cut: int = 0


@dataclass(frozen=True)
class Embedding:
    """How texts are embedded. max_length: in tokens, the instruction included; None is all that the model can take.

    skip_instruction: pooling counts the text alone, as in L3Prune (arXiv 2410.14578), not what stands before it.
    normalize: vectors have length 1. prompts: what stands before a text, by name; `default_prompt` names the one for
    texts that come with none.
    """

    pooling: Pooling = "weighted_mean"
    template: Template = "none"
    max_length: int | None = 512
    skip_instruction: bool = True
    normalize: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def tokenize(self, tokenizer: Any, texts: Sequence[str], prompt: str = "", first: int = 0) -> list[Tokens]:
        """Each text in the template behind `prompt`, which ends as it is to be joined; cut at max_length tokens.

        tokenizer: of transformers; where it cuts, the special tokens that it ends with stay. As in L3Prune's code, a
        text counts as many tokens as it has on its own together with the end of the template. first: the number of
        the first text in messages. Raises BadParameter for an empty text or one that is no text, and where no token of
        one is left.
        """
        before, after = TEMPLATES[self.template]
        for i, text in enumerate(texts, first):
            if reason := why_not(text):
                raise BadParameter(f"text {i} {reason}")
        whole = _ids(tokenizer, [f"{before}{prompt}{text}{after}" for text in texts], self.max_length)
        starts = [0] * len(texts)
        if self.skip_instruction and (before or prompt):
            alone = _own(tokenizer, [f"{text}{after}" for text in texts])
            starts = [max(0, len(ids) + cut - own) for (ids, cut), own in zip(whole, alone, strict=True)]
        for i, ((ids, _), start) in enumerate(zip(whole, starts, strict=True), first):
            if start >= len(ids):
                raise BadParameter(
                    f"text {i} has no token within {self.max_length}; shorten its instruction, or leave it out"
                )
        return [Tokens(ids, start, cut) for (ids, cut), start in zip(whole, starts, strict=True)]

    def given(self, ids: Sequence[int], vocab: int, number: int = 0) -> Tokens:
        """Token ids as they are: nothing is put around them and all of them count; cut at max_length.

        number: the text's in messages. Raises BadParameter for none, and for what is no id of `vocab` tokens.
        """
        wrong = next((token for token in ids if type(token) is not int or not 0 <= token < vocab), None)
        if wrong is not None:
            raise BadParameter(f"text {number} holds token id {wrong!r}; this model knows 0 to {vocab - 1}")
        if not ids:
            raise BadParameter(f"text {number} is empty, there is nothing to embed; leave it out")
        kept = list(ids[: self.max_length])
        return Tokens(kept, 0, len(ids) - len(kept))

    def file(self) -> bytes:
        """The content of embedding.json."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Embedding:
        """From the content of embedding.json. Raises BadParameter."""
        try:
            made = cls(**entry)
        except TypeError as wrong:
            raise BadParameter(f"{FILE} is not of the right form ({wrong})") from None
        length = made.max_length
        if made.pooling not in POOLINGS or made.template not in TEMPLATES or type(length) not in (int, type(None)):
            raise BadParameter(f"{FILE} says {dict(entry)}; pooling is one of {', '.join(POOLINGS)}")
        return made


def why_not(text: Any) -> str | None:
    """Why this cannot be embedded; None where it can."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not a text; give strings"
    if not text.strip():
        return "is empty, there is nothing to embed; leave it out"
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        return f"is no text ({wrong}); give what decodes as UTF-8"
    return None


def _ids(tokenizer: Any, texts: list[str], longest: int | None) -> list[tuple[list[int], int]]:
    """Token ids of each text, and how many were cut off."""
    found = [(ids, 0) for ids in tokenizer(texts, verbose=False).input_ids] if texts else []
    if longest is None:
        return found
    long = [i for i, (ids, _) in enumerate(found) if len(ids) > longest]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=longest, verbose=False).input_ids
        for i, ids in zip(long, cut, strict=True):
            found[i] = ids, len(found[i][0]) - len(ids)
    return found


def _own(tokenizer: Any, texts: list[str]) -> list[int]:
    """The number of tokens of each text on its own, without special tokens that are put before it."""
    made = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    pairs = zip(made.input_ids, made.special_tokens_mask, strict=True)
    return [len(ids) - [*mask, 0].index(0) for ids, mask in pairs]


def pool(hidden: torch.Tensor, counted: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text, fp32 [B, H], of hidden states [B, T, H] where `counted` [B, T] is true, at least once a row.

    weighted_mean: weights 1, 2, 3, ... over what is counted (arXiv 2202.08904). cls, last: its first or last token.
    """
    place = counted.cumsum(1) * counted
    weights = _weights(place, place.amax(1, keepdim=True), pooling)
    return torch.einsum("bt,bth->bh", weights / weights.sum(1, keepdim=True), hidden.float())


def row_weights(count: int, pooling: str) -> torch.Tensor:
    """`pool` as the fp32 weights [count] of one text's counted rows; their sum is 1."""
    weights = _weights(torch.arange(1, count + 1), torch.tensor(count), pooling)
    return weights / weights.sum()


def _weights(place: torch.Tensor, last: torch.Tensor, pooling: str) -> torch.Tensor:
    """fp32 like place: 1, 2, ... `last` for the tokens that count, 0 for all others."""
    weights = {
        "weighted_mean": lambda: place,
        "mean": lambda: place > 0,
        "last": lambda: place == last,
        "cls": lambda: place == 1,
    }[pooling]()
    return weights.float()
