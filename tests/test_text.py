"""Text that grows token by token: whole characters only, stop strings wherever tokens happen to be cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from pared.errors import BadParameter, FolderDamaged
from pared.runtime.text import REPLACEMENT, Detokenizer, StopStrings, Tokenizer

MANY_BYTES = "naïve café, Привет мир, 日本語のテキスト, 한국어, 👩‍👩‍👧‍👦 🇫🇷 🎉, ‰ and a\u00a0no-break space"


def save(folder: Path, fast: Fast, **options: object) -> Path:
    """The tokenizer as a folder that transformers opens."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=fast, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte a token, as the last resort of byte-level BPE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    return Tokenizer(save(tmp_path_factory.mktemp("bytewise"), fast, eos_token="<end>"))


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: words carry their space in front, the first one loses it, bytes where no word fits."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "c", "▁word"]
    vocab = {word: i for i, word in enumerate(words)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(save(tmp_path_factory.mktemp("spaced"), fast))


def grown(tokenizer: Tokenizer, prompt: list[int], answer: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    return [*(detokenizer.add(token) for token in answer), detokenizer.finish()]


def test_no_half_character_is_ever_shown(bytewise: Tokenizer) -> None:
    tokens = bytewise.encode(MANY_BYTES)
    assert len(tokens) == len(MANY_BYTES.encode())
    pieces = grown(bytewise, bytewise.encode("x"), tokens)
    assert [piece for piece in pieces if piece] == list(MANY_BYTES)


@settings(max_examples=100, deadline=None)
@given(prompt=st.binary(min_size=1, max_size=6), answer=st.binary(max_size=12))
def test_any_bytes_end_up_as_the_whole_answer_decoded_at_once(
    bytewise: Tokenizer, prompt: bytes, answer: bytes
) -> None:
    text = prompt.decode("latin-1")
    pieces = grown(bytewise, bytewise.encode(text), [bytewise.hf.convert_tokens_to_ids(byte_letter(b)) for b in answer])
    assert "".join(pieces) == answer.decode(errors="replace")
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces[:-1])


def byte_letter(byte: int) -> str:
    """The letter by which byte-level BPE writes a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def test_an_answer_may_complete_the_prompts_last_character(bytewise: Tokenizer) -> None:
    tokens = bytewise.encode("a€b")
    assert grown(bytewise, tokens[:3], tokens[3:]) == ["€", "b", ""]


def test_what_never_completes_is_told_at_the_end(bytewise: Tokenizer) -> None:
    tokens = bytewise.encode("a€")
    assert grown(bytewise, tokens[:1], tokens[1:3]) == ["", "", REPLACEMENT]


def test_special_tokens_are_hidden_or_shown(bytewise: Tokenizer) -> None:
    tokens = [*bytewise.encode("a"), bytewise.eos, *bytewise.encode("b")]
    assert "".join(grown(bytewise, tokens[:1], tokens[1:])) == "b"
    assert "".join(grown(bytewise, tokens[:1], tokens[1:], skip_special_tokens=False)) == "<end>b"


def test_spaces_between_words_stay(spaced: Tokenizer) -> None:
    ids = {word: spaced.hf.convert_tokens_to_ids(word) for word in ("▁a", "▁b", "c", "▁word")}
    answer = [ids["▁b"], ids["c"], ids["▁word"]]
    assert spaced.decode(answer) == "bc word"
    assert grown(spaced, [ids["▁a"]], answer) == [" b", "c", " word", ""]


def test_byte_fallback_waits_for_the_character(spaced: Tokenizer) -> None:
    euro = [spaced.hf.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "€é".encode()]
    word = spaced.hf.convert_tokens_to_ids("▁a")
    assert grown(spaced, [word], [*euro, word]) == ["", "", "€", "", "é", " a", ""]


def shown(pieces: list[str], stops: tuple[str, ...], include: bool = False) -> tuple[str, str | None]:
    """The text that a stream of pieces gives, none of which may have to be taken back."""
    search = StopStrings(stops, include)
    text = ""
    for i, piece in enumerate(pieces):
        text += search.add(piece, final=i == len(pieces) - 1)
        if search.found is not None:
            break
    return text, search.found


def cut_after_first(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The definition: read letter by letter until the text ends in a stop string, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=14),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list, include: bool, seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, len(text))))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert shown(pieces, tuple(stops), include) == cut_after_first(text, tuple(stops), include)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    search = StopStrings(("</end>",), include=False)
    assert [search.add(piece) for piece in ("a", "b <", "/e", "x", "</en")] == ["a", "b ", "", "</ex", ""]
    assert search.add("", final=True) == "</en"
    assert search.found is None


def test_chat_and_its_refusals(bytewise: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="no chat template"):
        bytewise.chat([{"role": "user", "content": "x"}])
    template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    bytewise.hf.save_pretrained(tmp_path)
    chatty = Tokenizer(tmp_path)
    chatty.hf.chat_template = template
    messages = [{"role": "user", "content": "hi"}]
    assert chatty.decode(chatty.chat(messages)) == "<hi>!"
    assert chatty.decode(chatty.chat(messages, add_generation_prompt=False)) == "<hi>"
    with pytest.raises(BadParameter, match="refuses these messages: only users"):
        chatty.chat([{"role": "system", "content": "hi"}])


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderDamaged, match="the tokenizer cannot be read"):
        Tokenizer(tmp_path)


def test_real_text_grows_whole(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    tokens = tokenizer.encode(MANY_BYTES)
    pieces = grown(tokenizer, tokenizer.encode("Once"), tokens)
    assert "".join(pieces) == MANY_BYTES
    assert not any(REPLACEMENT in piece for piece in pieces)
    rng = random.Random(2)
    garbage = [rng.randrange(tokenizer.hf.vocab_size) for _ in range(300)]
    assert "".join(grown(tokenizer, tokenizer.encode("Once"), garbage)) == tokenizer.decode(garbage)
    chat = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hi"}]), skip_special_tokens=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
