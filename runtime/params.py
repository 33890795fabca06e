"""What a request may ask of the sampler, checked when it is written down."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadParameter

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_CHOICES = 128
REPETITION = (0.01, 100.0)
"""Beyond these a penalty makes infinities of logits, which fail the step of everyone who is in it."""


@dataclass(frozen=True)
class Guided:
    """What an answer has to look like. kind: "json" (a JSON schema), "regex", "choice" (a JSON list of texts) or
    "grammar" (Lark)."""

    kind: str
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    n                  number of independent answers; with a seed, answer i uses seed + i
    max_tokens         tokens to generate at most, at least 1; None = as many as the context holds
    min_tokens         no end-of-text, stop token or stop string counts before this many tokens
    temperature        0 = greedy; otherwise logits are divided by it
    top_k              keep the k likeliest tokens; 0 = all
    top_p              keep the smallest set of likeliest tokens whose probability reaches p
    min_p              drop tokens less likely than min_p times the likeliest
    repetition_penalty logits of tokens seen in the prompt or the answer are divided (positive) or multiplied by it,
                       0.01 to 100
    presence_penalty   subtracted from the logits of tokens seen in the answer
    frequency_penalty  subtracted once per occurrence in the answer
    logit_bias         token id -> number added to its logit, -100 to 100
    seed               of this request's own random stream; None = torch's global one
    stop               strings that end the answer; cut from it unless include_stop_str_in_output
    stop_token_ids     tokens that end the answer, beside the model's end-of-text
    ignore_eos         go on after end-of-text
    logprobs           None, or the number of likeliest alternatives to report beside each chosen token's own
                       log-probability; all under the model's own distribution, before penalties and temperature
    prompt_logprobs    the same for the tokens of the prompt, each given those before it; the first has none
    skip_special_tokens leave special tokens out of the text
    guided             None, or what the answer has to look like; needs the extra `guided`

    The order is: penalties, bias, temperature, top_k, top_p, min_p. Raises BadParameter with field, value and range.
    """

    n: int = 1
    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()  # or one string
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    guided: Guided | None = None

    def __post_init__(self) -> None:
        for name, convert in (("logit_bias", _bias), ("stop", _stops), ("stop_token_ids", _ids)):
            object.__setattr__(self, name, convert(getattr(self, name)))
        for name, least, most in _INTEGERS:
            _check_integer(name, getattr(self, name), least, most)
        for name, low, high, open_low in _NUMBERS:
            _check_number(name, getattr(self, name), low, high, open_low)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise BadParameter(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BadParameter(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.guided is not None and (self.min_tokens or self.ignore_eos):
            raise BadParameter("a guided answer ends where its guide says: leave min_tokens and ignore_eos out")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
        """Parameters from named options over `defaults`; an unknown name raises BadParameter."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise BadParameter(f"unknown sampling option {name}={options[name]!r}; {hint}")
        return dataclasses.replace(defaults or cls(), **options)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_INTEGERS = (
    ("n", 1, MAX_CHOICES),
    ("max_tokens", 1, None),
    ("min_tokens", 0, None),
    ("top_k", 0, None),
    ("seed", 0, 2**63 - 1 - MAX_CHOICES),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = (  # name, low, high, whether low itself is excluded
    ("temperature", 0.0, math.inf, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("repetition_penalty", *REPETITION, False),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
)
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if value is None and name in _OPTIONAL:
        return
    if not _is_integer(value) or value < low or (high is not None and value > high):  # type: ignore[operator]
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise BadParameter(f"{name} must be an integer {span}, got {value!r}")


def _check_number(name: str, value: object, low: float, high: float, open_low: bool) -> None:
    if not _is_number(value) or value < low or value > high or (open_low and value == low):  # type: ignore[operator]
        span = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise BadParameter(f"{name} must be a finite number {span}, got {value!r}")


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise BadParameter(f"logit_bias must map token ids to numbers, got {value!r}")
    bias = {}
    for key, number in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key  # JSON keys are strings
        if not _is_integer(token) or token < 0 or not _is_number(number) or abs(number) > 100:
            raise BadParameter(f"logit_bias must map token ids to numbers from -100 to 100, got {key!r}: {number!r}")
        bias[token] = float(number)
    return bias


def _stops(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if strings is None or len(strings) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in strings):
        raise BadParameter(f"stop must be a non-empty string or at most {MAX_STOP_STRINGS} of them, got {value!r}")
    return strings


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(_is_integer(token) and token >= 0 for token in value):
        raise BadParameter(f"stop_token_ids must be a list of token ids, got {value!r}")
    return tuple(value)
