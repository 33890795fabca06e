"""Between text and tokens: the folder's tokenizer, text that grows token by token, and stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadParameter, FolderDamaged

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {chr(byte): byte for byte in _PLAIN} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PLAIN)
}
"""The letters in which byte-level tokenizers write bytes: printable ones as they are, the others from U+0100."""
CONTEXT_TOKENS = 5  # tokens before the answer that let a tokenizer place its first space


class Tokenizer:
    """The tokenizer of a folder, as transformers reads it. Nothing is downloaded and no remote code runs."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise FolderDamaged(f"{path}: the tokenizer cannot be read: {error}; convert the model again") from error
        self._special = frozenset(self.hf.all_special_ids)
        fast = type(self.hf)._decode is PreTrainedTokenizerFast._decode
        self._fast: Any = self.hf.backend_tokenizer if fast else None
        self._byte_level = "ByteLevel" in str(
            getattr(self.hf, "backend_tokenizer", None) and self.hf.backend_tokenizer.decoder
        )

    @property
    def eos(self) -> int | None:
        """The end-of-text token, if the tokenizer knows one."""
        return self.hf.eos_token_id

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects around it unless `special` is False."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadParameter(f"the text is no Unicode: {error.reason} at character {error.start}") from None
        # verbose: how long a text may be is for its user to say
        return list(self.hf.encode(text, add_special_tokens=special, verbose=False))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, as it is: nothing is cleaned up."""
        if self._fast is not None:  # what transformers comes to, without its way there: every token of an answer asks
            return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))
        text = self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text. A character may be spread over several, so it need not be UTF-8.

        Pieces of byte-level tokenizers stand for bytes, `<0x0A>` for one byte, and `▁` for a blank.
        """
        piece = self.hf.convert_ids_to_tokens(token) or ""  # a vocabulary may have more ids than pieces
        if token in self._special:
            return piece.encode()
        if self._byte_level and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def chat(self, messages: list[dict[str, Any]], special: bool = False, **template: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins. `template` reaches the folder's chat template.

        special: add the special tokens around a text as well, which most templates write themselves.

        Raises BadParameter when the folder has no chat template, or its template refuses the messages.
        """
        if not self.hf.chat_template:
            raise BadParameter("this model has no chat template; it completes text, so use generate")
        try:
            text = self.hf.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **template})
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise BadParameter(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, special)


class Detokenizer:
    """Turns an answer's tokens into text as they come.

    Only a window of the last tokens is decoded again. Text that ends in a replacement character is held back: it may
    be the beginning of a character whose other bytes are still to come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt[-CONTEXT_TOKENS:])
        self._told = len(self._window)  # tokens of the window whose text has been given out

    def add(self, token: int) -> str:
        """The text that is settled now, often that of this token alone, sometimes none."""
        self._window.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._told], self._skip)
        after = self._tokenizer.decode(self._window, self._skip)
        if after.endswith(REPLACEMENT) and not final:
            return ""
        self._window = self._window[self._told :] or self._window
        self._told = len(self._window)
        return after[_common_start(before, after) :]


def _common_start(a: str, b: str) -> int:
    """How many characters two texts share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class StopStrings:
    """Finds the first stop string in growing text, also across tokens, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def add(self, text: str, final: bool = False) -> str:
        """The text that may be shown now. Once `found` is set, nothing more may be added."""
        text = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:  # the one completed first, so that it does not matter how the text was cut into tokens
            _, at, self.found = min(hits)
            return text[: at + len(self.found)] if self._include else text[:at]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
