"""What makes a decoder a text encoder: how a text becomes tokens, and their hidden states one vector.

Converters choose depths and train with it, and a folder keeps it as embedding.json, so that what runs the
folder does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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


class Tokens(NamedTuple):
    """A text as token ids, and the first of them that pooling counts: what is before it is instruction."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Embedding:
    """How texts are embedded. max_length: in tokens, the instruction included.

    skip_instruction: pooling counts the text alone, as in L3Prune (arXiv 2410.14578), not what stands before it.
    """

    pooling: Pooling = "weighted_mean"
    template: Template = "none"
    max_length: int = 512
    skip_instruction: bool = True

    def tokenize(self, tokenizer: Any, texts: Sequence[str], prompt: str = "") -> list[Tokens]:
        """Each text in the template behind `prompt`, which ends as it is to be joined; cut at max_length tokens.

        tokenizer: of transformers. As in L3Prune's code, a text counts as many tokens as it has on its own together
        with the end of the template. Raises BadParameter for an empty text, and where no token of one is left.
        """
        before, after = TEMPLATES[self.template]
        texts = [text.strip() for text in texts]
        if empty := [i for i, text in enumerate(texts) if not text]:
            raise BadParameter(f"text {empty[0]} is empty, there is nothing to embed; leave it out")
        whole = tokenizer([f"{before}{prompt}{text}{after}" for text in texts], verbose=False).input_ids
        alone = tokenizer([f"{text}{after}" for text in texts], add_special_tokens=False, verbose=False).input_ids
        found = []
        for i, (ids, content) in enumerate(zip(whole, alone, strict=True)):
            start = max(0, len(ids) - len(content)) if self.skip_instruction else 0
            if start >= min(len(ids), self.max_length):
                raise BadParameter(f"text {i} has no token within {self.max_length}; shorten its instruction")
            found.append(Tokens(ids[: self.max_length], start))
        return found

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
        if made.pooling not in POOLINGS or made.template not in TEMPLATES or type(made.max_length) is not int:
            raise BadParameter(f"{FILE} says {dict(entry)}; pooling is one of {', '.join(POOLINGS)}")
        return made


def pool(hidden: torch.Tensor, counted: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text, fp32 [B, H], of hidden states [B, T, H] where `counted` [B, T] is true, at least once a row.

    weighted_mean: weights 1, 2, 3, ... over what is counted (arXiv 2202.08904). cls, last: its first or last token.
    """
    place = counted.cumsum(1) * counted
    weights = {
        "weighted_mean": lambda: place,
        "mean": lambda: counted,
        "last": lambda: place == place.amax(1, keepdim=True),
        "cls": lambda: place == 1,
    }[pooling]().float()
    return torch.einsum("bt,bth->bh", weights / weights.sum(1, keepdim=True), hidden.float())
