"""OpenAI's own client against a server of a compressed SmolLM2-135M: in fp32 every answer is the offline API's."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pared import LLM, Embedder, SamplingParams, convert
from pared.compact import open_folder
from pared.runtime.outputs import Output
from pared.runtime.server.limits import Limits
from pared.runtime.server.opening import Wanted, open_service
from pared.tests.serving import serving

MODEL = "SmolLM2-135M-2-4"
WAYS = {
    "greedy": {"temperature": 0, "max_tokens": 12},
    "seeded": {"temperature": 1.0, "seed": 11, "max_tokens": 12},
    "n": {"temperature": 0.8, "top_p": 0.9, "seed": 5, "n": 3, "max_tokens": 8},
    "penalties": {"temperature": 0, "frequency_penalty": 1.0, "presence_penalty": 0.5, "max_tokens": 12},
}


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model, as `pared convert --method magnitude:pattern=2:4` makes it."""
    made = tmp_path_factory.mktemp("pruned") / MODEL
    convert(smollm2, made, methods=["magnitude:pattern=2:4"], dtype="bfloat16", progress=False)
    with open_folder(made) as opened:
        assert {unit.format for unit in opened.manifest.units} == {"dense", "two_four"}
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    return LLM(folder, dtype="float32", device="cpu", num_blocks=64)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    wanted = Wanted("float32", "cpu", max_batch=8, chunk=128, kv_cache_bytes=2**26, pooling="mean")
    with serving(open_service(folder, MODEL, Limits(), wanted)) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
        yield client


def same(choices: list[Any], want: Output) -> None:
    """Text, tokens and ends are those of the offline answer."""
    assert [choice.index for choice in choices] == [one.index for one in want.choices]
    for choice, one in zip(choices, want.choices, strict=True):
        assert (choice.text, choice.finish_reason) == (one.text, one.finish_reason)
        assert choice.token_ids == one.token_ids


def folded(pieces: list[Any], text: Any) -> list[tuple[str, str]]:
    """(text, finish_reason) of each choice of a stream; text: of one piece's choice."""
    found: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        for choice in piece.choices:
            before, end = found.get(choice.index, ("", None))
            assert end is None
            found[choice.index] = (before + (text(choice) or ""), choice.finish_reason)
    return [found[index] for index in sorted(found)]


def told(want: Output) -> list[tuple[str, str]]:
    return [(one.text, one.finish_reason) for one in want.choices]


@pytest.mark.parametrize("way", WAYS)
def test_completions(client: openai.OpenAI, alone: LLM, real_prompts: list[str], way: str) -> None:
    (want,) = alone.generate(real_prompts[0], SamplingParams.from_dict(WAYS[way]))
    asked: Any = {"model": MODEL, "prompt": real_prompts[0], **WAYS[way]}
    whole = client.completions.create(**asked, extra_body={"return_token_ids": True})
    same(whole.choices, want)
    assert whole.usage.prompt_tokens == len(want.prompt_token_ids)
    assert whole.usage.completion_tokens == sum(len(one.token_ids) for one in want.choices)
    assert folded(list(client.completions.create(**asked, stream=True)), lambda choice: choice.text) == told(want)


@pytest.mark.parametrize("way", ["greedy", "n"])
def test_chats(client: openai.OpenAI, alone: LLM, real_prompts: list[str], way: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": real_prompts[1]}]
    (want,) = alone.generate([alone.tokenizer.chat(messages)], SamplingParams.from_dict(WAYS[way]))
    asked: Any = {"model": MODEL, "messages": messages, **WAYS[way]}
    whole = client.chat.completions.create(**asked)
    assert [(choice.message.content, choice.finish_reason) for choice in whole.choices] == told(want)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert folded(pieces, lambda choice: choice.delta.content) == told(want)
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert pieces[-1].usage.prompt_tokens == len(want.prompt_token_ids)


def test_many_at_once_streamed_and_whole(address: str, alone: LLM, real_prompts: list[str]) -> None:
    """Asynchronous clients: they share steps, and each gets what it would get alone."""
    prompts = real_prompts[:6]
    params = [SamplingParams.from_dict(list(WAYS.values())[i % 2]) for i in range(len(prompts))]
    want = [told(alone.generate(prompt, one)[0]) for prompt, one in zip(prompts, params, strict=True)]

    async def both(client: openai.AsyncOpenAI, i: int) -> tuple[Any, Any]:
        asked: Any = {"model": MODEL, "prompt": prompts[i], **list(WAYS.values())[i % 2]}
        whole, stream = await asyncio.gather(
            client.completions.create(**asked), client.completions.create(**asked, stream=True)
        )
        pieces = [piece async for piece in stream]
        return [(choice.text, choice.finish_reason) for choice in whole.choices], folded(pieces, lambda c: c.text)

    async def everyone() -> list[tuple[Any, Any]]:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(both(client, i) for i in range(len(prompts))))

    assert asyncio.run(everyone()) == [(one, one) for one in want]


def test_logprobs(client: openai.OpenAI, alone: LLM, real_prompts: list[str]) -> None:
    params = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=3)
    (want,) = alone.generate(real_prompts[2], params)
    asked: Any = {"model": MODEL, "prompt": real_prompts[2], "max_tokens": 6, "temperature": 0, "logprobs": 3}
    got = client.completions.create(**asked, echo=True).choices[0]
    assert got.text == real_prompts[2] + want.text
    expected = [*want.prompt_logprobs, *want.logprobs]
    assert got.logprobs.token_logprobs[0] is None
    assert got.logprobs.token_logprobs[1:] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    for top, one in zip(got.logprobs.top_logprobs[1:], expected, strict=True):
        assert sorted(top.values()) == pytest.approx(sorted(logprob for _, logprob in one.top), abs=1e-4)
    messages: Any = [{"role": "user", "content": real_prompts[2]}]
    (want,) = alone.generate([alone.tokenizer.chat(messages)], SamplingParams(max_tokens=6, logprobs=2))
    asked = {"model": MODEL, "messages": messages, "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    scores = chat.logprobs.content
    assert [score.logprob for score in scores] == pytest.approx([one.logprob for one in want.logprobs], abs=1e-4)
    assert b"".join(bytes(score.bytes) for score in scores).decode(errors="replace").startswith(want.text)
    assert all(len(score.top_logprobs) == 2 and score.top_logprobs[0].logprob >= score.logprob for score in scores)


def test_stop_strings(client: openai.OpenAI, alone: LLM, real_prompts: list[str]) -> None:
    whole = alone.generate(real_prompts[3], SamplingParams(max_tokens=16))[0].text
    stop = whole[len(whole) // 2 :][:3]
    params = SamplingParams(max_tokens=16, stop=(stop, "never there"))
    (want,) = alone.generate(real_prompts[3], params)
    assert want.text == whole[: whole.index(stop)] and want.finish_reason == "stop"
    asked: Any = {"model": MODEL, "prompt": real_prompts[3], "max_tokens": 16, "temperature": 0}
    got = client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert (got.text, got.finish_reason, got.stop_reason) == (want.text, "stop", stop)
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert folded(pieces, lambda choice: choice.text) == told(want)


def test_embeddings(client: openai.OpenAI, folder: Path, real_prompts: list[str]) -> None:
    texts = real_prompts[:5]
    offline = Embedder(folder, dtype="float32", device="cpu", pooling="mean")
    want = offline.encode(texts)
    for form in ("float", "base64", openai.NOT_GIVEN):
        got = [item.embedding for item in client.embeddings.create(model=MODEL, input=texts, encoding_format=form).data]
        vectors = [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in got]
        assert np.array_equal(np.array(vectors, np.float32), want), form
    one = client.embeddings.create(model=MODEL, input=texts[1], dimensions=64)
    assert np.allclose(one.data[0].embedding, offline.encode(texts[1], truncate_dim=64), atol=1e-5)
    assert one.usage.prompt_tokens == len(offline.tokenizer.encode(texts[1]))


def test_what_is_served(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.does) == (MODEL, ["generator", "embedder"])
    with pytest.raises(openai.BadRequestError, match="unknown field temprature"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"temprature": 1})
