"""What `--method` says: `basis_sharing:ratio=20,group=2` names a method and sets its parameters.

A method is a module with NAME, a frozen dataclass `Params` whose LIMITS bound its numbers,
search(model, calibration, record, params, progress), apply(model, record) and summary(record). Params may say what
they read of the calibration: the `text` (so do those that say nothing), only the model's `tokens`, or `nothing`; and
name other `files` that they read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import BadParameter
from .methods import basis_sharing, contrastive, gblm, l3prune, lte, magnitude, recover, sleb, wanda

METHODS: tuple[ModuleType, ...] = (sleb, l3prune, contrastive, basis_sharing, recover, magnitude, wanda, gblm, lte)


@dataclass(frozen=True)
class Step:
    """A method with its parameters."""

    method: ModuleType
    params: Any

    @property
    def reads(self) -> str:
        """What `search` needs of the calibration: text, tokens (the tokenizer) or nothing."""
        return getattr(self.params, "reads", "text")

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the parameters name: with other contents it is another conversion."""
        return getattr(self.params, "files", ())


def parse(recipes: Sequence[str]) -> list[Step]:
    """The steps of a compression, in order.

    Parameters are separated by commas or colons; a value may hold either, since a new one begins with `key=`.
    Raises BadParameter naming the method, the key and the value.
    """
    return [_step(text) for text in recipes]


def _step(text: str) -> Step:
    name, _, rest = text.partition(":")
    method = next((m for m in METHODS if name == m.NAME), None)
    if method is None:
        raise BadParameter(f"no method is called {name!r}; known are {', '.join(m.NAME for m in METHODS)}")
    annotations = get_type_hints(method.Params)
    hints = {field.name: annotations[field.name] for field in fields(method.Params)}
    given: dict[str, Any] = {}
    for setting in re.split(r"[,:](?=\w+=)", rest) if rest else []:
        key, equals, value = setting.partition("=")
        if not equals or key not in hints:
            raise BadParameter(f"{name} has no parameter {key!r}; it takes {', '.join(hints)}, each as key=value")
        if key in given:
            raise BadParameter(f"{name}: {key} is given twice")
        given[key] = _value(name, key, value, hints[key], method.Params.LIMITS.get(key))
    needed = [f.name for f in fields(method.Params) if f.default is MISSING and f.name not in given]
    if needed:
        raise BadParameter(f"{name} needs {needed[0]}=...; it takes {', '.join(hints)}")
    return Step(method, method.Params(**given))


def _value(method: str, key: str, text: str, hint: Any, limits: tuple[float, float] | None) -> Any:
    try:
        value = _read(text, hint)
    except ValueError:
        raise BadParameter(f"{method}: {key}={text} is not {_described(hint)}") from None
    if limits and not limits[0] <= value <= limits[1]:
        raise BadParameter(f"{method}: {key}={text} is outside {limits[0]:g} to {limits[1]:g}")
    return value


def _read(text: str, hint: Any) -> Any:
    """A value of the annotated type. Raises ValueError."""
    plain = _plain(hint)
    if get_origin(plain) is Literal:
        if text not in get_args(plain):
            raise ValueError(text)
        return text
    if get_origin(plain) is tuple:
        return _numbers(text) if get_args(plain)[0] is int else tuple(_words(text))
    return plain(text)


def _plain(hint: Any) -> Any:
    """The type without its `| None`."""
    return next((a for a in get_args(hint) if a is not NoneType), hint) if NoneType in get_args(hint) else hint


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(text)
    return words


def _numbers(text: str) -> tuple[int, ...]:
    """`0-3,7` is 0, 1, 2, 3, 7."""
    found: list[int] = []
    for word in _words(text):
        first, _, last = word.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ValueError(text)
        found += span
    return tuple(found)


def _described(hint: Any) -> str:
    plain = _plain(hint)
    if get_origin(plain) is Literal:
        return f"one of {', '.join(get_args(plain))}"
    if get_origin(plain) is tuple:
        return "a list of numbers such as 0-3,7" if get_args(plain)[0] is int else "a list of names"
    return {"int": "a whole number", "float": "a number", "str": "a text"}[plain.__name__]
