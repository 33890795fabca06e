"""Answers that follow a JSON schema, a regular expression, a choice or a grammar, through llguidance."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import BadParameter
from .params import Guided
from .text import Tokenizer

KEPT = 64
"""Guides that stay compiled: clients tend to ask for the same again."""

BLANKS = " ?"
"""Between the parts of JSON: a small model that has lost its way would write line breaks without end."""


class Guide(Protocol):
    """Tells the sampler what may come next in one answer; where nothing may, the end of text."""

    def allowed(self) -> torch.Tensor: ...

    def accept(self, token: int) -> None: ...


class Guides:
    """Compiles guides for one tokenizer. vocab: the model's, which may be larger. eos: its ends of text."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: frozenset[int]) -> None:
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise BadParameter("guided answers need llguidance: pip install 'pared[guided]'") from None
        if not eos:
            raise BadParameter("this model knows no end of text, so no answer can be guided to its end")
        self._matcher: Any = llguidance.LLMatcher
        self._vocab = vocab
        self._tokenizer = from_tokenizer(tokenizer.hf, n_vocab=vocab, eos_token=sorted(eos))
        self._compiled: dict[Guided, Any] = {}

    def guide(self, guided: Guided) -> Guide:
        """A fresh guide. Raises BadParameter when the grammar is wrong or too complex."""
        compiled = self._compiled.pop(guided, None) or self._compile(guided)
        while len(self._compiled) >= KEPT:
            del self._compiled[next(iter(self._compiled))]
        self._compiled[guided] = compiled
        return _Guide(compiled.deep_copy(), self._vocab)

    def _compile(self, guided: Guided) -> Any:
        to_grammar = {
            "json": self._json,
            "choice": self._choice,
            "regex": self._matcher.grammar_from_regex,
            "grammar": self._matcher.grammar_from_lark,
        }
        try:
            grammar = to_grammar[guided.kind](guided.text)
        except KeyError:
            raise BadParameter(f"answers are guided by {', '.join(to_grammar)}, not by {guided.kind!r}") from None
        except ValueError as error:
            raise BadParameter(f"the {guided.kind} that guides the answer cannot be read: {error}") from error
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise BadParameter(f"the {guided.kind} that guides the answer is refused: {matcher.get_error()}")
        return matcher

    def _json(self, schema: str) -> str:
        return self._matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": BLANKS})

    def _choice(self, choices: str) -> str:
        literals = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(choices))
        return self._matcher.grammar_from_lark(f"start: {' | '.join(literals)}")


class _Guide:
    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, bool [vocab]; llguidance gives the end of text where it has hit a limit."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
