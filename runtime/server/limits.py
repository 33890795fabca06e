"""What a server lets through, and who may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadParameter

KEYS_VARIABLE = "PARED_API_KEYS"


@dataclass(frozen=True)
class Limits:
    """Bounds of every request, and of all together.

    waiting: answers that wait while others run. prompts, n: prompts of a request, and answers to each. texts: to embed
    in a request. prompt_tokens: of one prompt; None: what the model's context holds. body_bytes: size of a request's
    body; body_s: seconds until its headers have arrived, and again until its body has. drain_s: seconds that running
    requests get when the server is told to end.
    """

    waiting: int = 256
    prompts: int = 64
    texts: int = 2048
    n: int = 16
    prompt_tokens: int | None = None
    body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    drain_s: float = 30.0


class Keys:
    """API keys, as their hashes. Without any, everyone may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._hashes)

    def admit(self, authorization: str) -> bool:
        """Whether an Authorization header carries a known key; takes the same time whichever it is."""
        key = authorization.removeprefix("Bearer ").strip()
        digest = hashlib.sha256(key.encode()).digest()
        return not self._hashes or sum(hmac.compare_digest(digest, known) for known in self._hashes) > 0


def read_keys(file: Path | None) -> list[str]:
    """Keys of a file, one a line, and of the environment, between blanks or commas. Raises BadParameter."""
    keys = os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split()
    if file is not None:
        try:
            keys += file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise BadParameter(f"the API keys in {file} cannot be read: {error}") from error
        if not keys:
            raise BadParameter(f"{file} holds no API key; write one a line, or leave the file out to admit everyone")
    return keys
