"""From a request's fields to SamplingParams."""

from __future__ import annotations

import json
from typing import Any

from ...errors import BadParameter
from ..params import Guided, SamplingParams
from .limits import Limits
from .schema import ChatRequest, CompletionRequest, ResponseFormat, Sampled, StructuredOutputs

_SAME = [
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "skip_special_tokens",
]
ANY_JSON_OBJECT = {"type": "object"}


def completion_params(body: CompletionRequest, defaults: SamplingParams, limits: Limits) -> SamplingParams:
    """Raises BadParameter. A max_tokens of 0 only echoes: the one token that is made for it is left out."""
    if body.max_tokens == 0 and not body.echo:
        raise BadParameter("max_tokens must be at least 1, or 0 with echo")
    own: dict[str, Any] = {"max_tokens": body.max_tokens or (1 if body.max_tokens == 0 else None)}
    own["logprobs"] = body.logprobs
    own["prompt_logprobs"] = body.logprobs if body.echo else None
    return _params(body, own, defaults, limits)


def chat_params(body: ChatRequest, defaults: SamplingParams, limits: Limits) -> SamplingParams:
    """Raises BadParameter."""
    if body.top_logprobs is not None and not body.logprobs:
        raise BadParameter("top_logprobs needs logprobs: true")
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    own = {"max_tokens": most, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    return _params(body, own, defaults, limits)


def _params(body: Sampled, own: dict[str, Any], defaults: SamplingParams, limits: Limits) -> SamplingParams:
    if body.n > limits.n:
        raise BadParameter(f"n must be at most {limits.n} on this server, got {body.n}")
    if body.stream_options is not None and not body.stream:
        raise BadParameter("stream_options needs stream: true")
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    return SamplingParams.from_dict({**given, **own, "guided": _guided(body)}, defaults)


def _guided(body: Sampled) -> Guided | None:
    asked = [*_of_format(body.response_format), *_of_structure(body.structured_outputs)]
    if len(asked) > 1:
        raise BadParameter("an answer follows one guide: give response_format or one field of structured_outputs")
    return asked[0] if asked else None


def _of_format(asked: ResponseFormat | None) -> list[Guided]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [Guided("json", json.dumps(ANY_JSON_OBJECT))]
    if asked.json_schema is None:
        raise BadParameter("response_format of type json_schema needs the field json_schema")
    return [Guided("json", json.dumps(asked.json_schema.schema_))]


def _of_structure(asked: StructuredOutputs | None) -> list[Guided]:
    if asked is None:
        return []
    schema = asked.json_ if asked.json_ is None or isinstance(asked.json_, str) else json.dumps(asked.json_)
    choice = None if asked.choice is None else json.dumps(asked.choice)
    each = {"json": schema, "regex": asked.regex, "choice": choice, "grammar": asked.grammar}
    return [Guided(kind, text) for kind, text in each.items() if text is not None]
