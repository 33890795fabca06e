"""What clients have to get of any server of ours: OpenAI's own client, and requests that no client sends.

A test module that imports these tests gives the fixture `address`: where `tiny_folder` is served as `tiny`, with at
most 8 prompts and 4 answers a request and bodies of 64 KiB. The clients' API key is `none`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams

MODEL = "tiny"


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> LLM:
    """The offline API, whose answers the server's have to equal."""
    return LLM(tiny_folder, device="cpu", num_blocks=100)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, headers={"authorization": "Bearer none"}) as http:
        yield http


def complete(client: openai.OpenAI, prompt: Any = "hello", **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **options)


# --- completions ----------------------------------------------------------------------------------


def test_a_completion_is_the_offline_answer(client: openai.OpenAI, alone: LLM) -> None:
    got = complete(client, "hello there", max_tokens=12)
    (want,) = alone.generate("hello there", SamplingParams(max_tokens=12))
    assert (got.object, got.model, got.choices[0].index) == ("text_completion", MODEL, 0)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (want.text, want.finish_reason)
    usage = got.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (11, len(want.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert complete(client).usage.completion_tokens == 16


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 3, "max_tokens": 20},
        {"temperature": 1.2, "seed": 5, "top_p": 0.8, "n": 3, "max_tokens": 9},
        {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"70": 5}, "max_tokens": 9},
        {"temperature": 1, "seed": 1, "max_tokens": 9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3},
        {"max_tokens": 7, "ignore_eos": True, "min_tokens": 3, "stop_token_ids": [71], "skip_special_tokens": False},
    ],
    ids=["seeded", "n", "penalties", "beyond OpenAI", "tokens"],
)
def test_sampling_is_the_offline_sampling(client: openai.OpenAI, alone: LLM, options: dict) -> None:
    (want,) = alone.generate("once", SamplingParams.from_dict(options))
    beyond = {
        k: v for k, v in options.items() if k not in openai.types.CompletionCreateParams.__args__[0].__annotations__
    }
    standard = {k: v for k, v in options.items() if k not in beyond}
    got = complete(client, "once", **standard, extra_body=beyond)
    assert [choice.text for choice in got.choices] == [choice.text for choice in want.choices]
    assert [choice.finish_reason for choice in got.choices] == [choice.finish_reason for choice in want.choices]


def test_lists_of_prompts_and_token_ids(client: openai.OpenAI, alone: LLM) -> None:
    tokens = alone.tokenizer.encode("two")
    want = [output.text for output in alone.generate(["one", tokens], SamplingParams(max_tokens=5))]
    assert [choice.text for choice in complete(client, ["one", "two"], max_tokens=5).choices] == want
    assert [choice.text for choice in complete(client, [tokens, tokens], max_tokens=5).choices] == [want[1]] * 2
    assert complete(client, tokens, max_tokens=5).choices[0].text == want[1]
    several = complete(client, ["one", "two"], n=2, max_tokens=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == 6
    assert several.usage.completion_tokens == 20


def test_a_prompt_may_be_cut_to_its_last_tokens(client: openai.OpenAI, alone: LLM) -> None:
    (want,) = alone.generate("end", SamplingParams(max_tokens=5))
    last = {"truncate_prompt_tokens": 3}
    got = complete(client, "x" * 300 + "end", max_tokens=5, echo=True, extra_body=last)
    assert (got.choices[0].text, got.usage.prompt_tokens) == ("end" + want.text, 3)
    got = complete(client, "an end", max_tokens=5, echo=True, extra_body={"truncate_prompt_tokens": 6})
    assert got.choices[0].text.startswith("an end") and got.usage.prompt_tokens == 6
    talk = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=5, extra_body=last)
    assert talk.usage.prompt_tokens == 3


def test_stop_strings(client: openai.OpenAI, alone: LLM) -> None:
    whole = alone.generate("stop", SamplingParams(max_tokens=30, ignore_eos=True))[0].text
    stop = whole[4:6]
    got = complete(client, "stop", max_tokens=30, stop=[stop, "never there"], extra_body={"ignore_eos": True})
    assert got.choices[0].text == whole[: whole.index(stop)]
    assert (got.choices[0].finish_reason, got.choices[0].stop_reason) == ("stop", stop)


def test_logprobs_and_echo(client: openai.OpenAI, alone: LLM) -> None:
    params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=2)
    (want,) = alone.generate("echo", params)
    got = complete(client, "echo", max_tokens=4, logprobs=2, echo=True).choices[0]
    assert got.text == "echo" + want.text
    scores = got.logprobs
    assert scores.tokens[:4] == ["e", "c", "h", "o"]
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    expected = [one.logprob for one in (*want.prompt_logprobs, *want.logprobs)]
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert [len(top) for top in scores.top_logprobs[1:]] == [2] * len(expected)
    assert scores.text_offset[:5] == [0, 1, 2, 3, 4]
    only = complete(client, "echo", max_tokens=0, logprobs=0, echo=True)
    assert (only.choices[0].text, only.choices[0].finish_reason) == ("echo", "length")
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[:3], abs=1e-5)
    assert only.usage.completion_tokens == 0
    plain = complete(client, "echo", max_tokens=4, logprobs=0).choices[0]
    assert plain.logprobs.token_logprobs == pytest.approx(expected[3:], abs=1e-5)
    assert plain.logprobs.top_logprobs == [{}] * 4


@pytest.mark.parametrize("options", [{}, {"n": 3, "logprobs": 2, "echo": True}, {"echo": True, "max_tokens": 0}])
def test_a_streamed_completion_adds_up_to_the_whole(client: openai.OpenAI, options: dict) -> None:
    asked = {"max_tokens": 9, "temperature": 0.8, "seed": 7, **options}
    whole = complete(client, ["stream", "me"], **asked)
    pieces = list(complete(client, ["stream", "me"], stream=True, stream_options={"include_usage": True}, **asked))
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(piece.usage is None for piece in pieces[:-1])
    assert len({piece.id for piece in pieces}) == 1
    for choice in whole.choices:
        mine = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
        assert [one.finish_reason for one in mine[:-1]] == [None] * (len(mine) - 1)
        if "logprobs" in options:
            for field in ("tokens", "token_logprobs", "text_offset"):
                told = [value for one in mine if one.logprobs for value in getattr(one.logprobs, field)]
                assert told == pytest.approx(getattr(choice.logprobs, field), abs=1e-5)


def test_the_stream_as_bytes(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 3, "stream": True, "return_token_ids": True}
    response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, empty = response.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert sum(len(piece["choices"][0]["token_ids"]) for piece in pieces) == 3
    assert all("usage" not in piece for piece in pieces)


# --- chats ----------------------------------------------------------------------------------------

TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is that?"}]


def test_a_chat_is_the_offline_answer(client: openai.OpenAI, alone: LLM) -> None:
    want = alone.chat(TALK, SamplingParams(max_tokens=10))
    got = client.chat.completions.create(model=MODEL, messages=TALK, max_completion_tokens=10)
    assert got.object == "chat.completion"
    assert (got.choices[0].message.role, got.choices[0].message.content) == ("assistant", want.text)
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    parts = [
        TALK[0],
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "that?"}]},
    ]
    again = client.chat.completions.create(model=MODEL, messages=parts, max_tokens=10)
    assert again.choices[0].message.content == want.text


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": TALK, "max_tokens": 10, "n": 2, "temperature": 1, "seed": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    pieces = list(client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True))
    for choice in whole.choices:
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        scores = [score for one in mine if one.logprobs for score in one.logprobs.content]
        assert [score.token for score in scores] == [score.token for score in choice.logprobs.content]
        assert len(scores) == 10 and all(len(score.top_logprobs) == 3 for score in scores)
        texts = [(bytes(score.bytes), score.token) for score in scores]
        assert all(raw == text.encode() or text.startswith("bytes:") for raw, text in texts)


def test_the_template_takes_switches_and_nothing_that_is_not_its_own(client: openai.OpenAI, alone: LLM) -> None:
    body = {"continue_final_message": True, "add_generation_prompt": False}
    begun = [*TALK, {"role": "assistant", "content": "It is"}]
    tokens = alone.tokenizer.chat(begun, continue_final_message=True, add_generation_prompt=False)
    want = alone.generate(tokens, SamplingParams(max_tokens=5))[0].text
    got = client.chat.completions.create(model=MODEL, messages=begun, max_tokens=5, extra_body=body)
    assert got.choices[0].message.content == want
    with pytest.raises(openai.BadRequestError, match="may not hold chat_template"):
        client.chat.completions.create(
            model=MODEL, messages=TALK, extra_body={"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
        )


@pytest.mark.anyio
async def test_many_asynchronous_clients(address: str, alone: LLM) -> None:
    import asyncio

    prompts = [f"prompt number {i}" for i in range(24)]
    want = [output.text for output in alone.generate(prompts, SamplingParams(max_tokens=8))]
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        calls = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=8) for prompt in prompts]
        got = await asyncio.gather(*calls)
    assert [one.choices[0].text for one in got] == want


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- guided ---------------------------------------------------------------------------------------


def test_guided_answers(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
    }
    schema["additionalProperties"] = False
    strict: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    sampled: Any = {"model": MODEL, "messages": TALK, "temperature": 1, "max_tokens": 100}
    for seed in range(3):
        got = client.chat.completions.create(**sampled, seed=seed, response_format=strict).choices[0]
        answer = json.loads(got.message.content)
        assert answer["a"] in (1, 22) and answer["b"] in (True, False) and got.finish_reason == "stop"
    any_object: Any = {"type": "json_object"}
    got = client.chat.completions.create(**sampled, seed=1, response_format=any_object).choices[0]
    assert got.message.content.startswith("{")

    def guided(**asked: Any) -> str:
        body = {"structured_outputs": asked}
        return complete(client, "x", max_tokens=40, temperature=1, seed=4, extra_body=body).choices[0].text

    assert guided(choice=["yes", "no, never"]) in ("yes", "no, never")
    assert set(guided(regex="[ab]{3}c+").rstrip("c")) <= {"a", "b"}
    assert guided(grammar='start: "left" | "right"') in ("left", "right")
    with pytest.raises(openai.BadRequestError, match="the regex that guides the answer is refused"):
        guided(regex="(")
    with pytest.raises(openai.BadRequestError, match="one guide"):
        guided(regex="a", choice=["b"])
    with pytest.raises(openai.BadRequestError, match="the json that guides the answer cannot be read"):
        guided(json="{")


def test_a_guided_answer_disturbs_no_other(client: openai.OpenAI, alone: LLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    want = alone.generate("free", SamplingParams(max_tokens=30))[0].text
    body = {"structured_outputs": {"regex": "(ab){10}"}}
    with ThreadPoolExecutor(4) as pool:
        free = [pool.submit(complete, client, "free", max_tokens=30) for _ in range(2)]
        bound = [pool.submit(complete, client, "free", max_tokens=30, extra_body=body) for _ in range(2)]
        assert [one.result().choices[0].text for one in free] == [want] * 2
        assert [one.result().choices[0].text for one in bound] == ["ab" * 10] * 2


# --- everything else ------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == (MODEL, 256)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="the model other is not served here, tiny is"):
        complete(client.with_options(), "x", extra_body={"model": "other"})
    assert http.get("/v1/models/other").status_code == 404


def test_health_version_and_documents(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    version = http.get("/version").json()
    assert version["formats"]["dense"] >= 1
    assert {row["op"] for row in version["kernels"]} == {"linear", "attention", "fused"}
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_the_tokenizer(http: httpx.Client, alone: LLM) -> None:
    text = "a text é"
    body = {"prompt": text, "return_token_strs": True}
    got = http.post("/tokenize", json=body).json()
    assert got["tokens"] == alone.tokenizer.encode(text)
    assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 256)
    assert got["token_strs"][:3] == ["a", " ", "t"]
    assert http.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": TALK}).json()
    assert chat["tokens"] == alone.tokenizer.chat(TALK)
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|end|>" and "add_generation_prompt" in info["chat_template"]


def test_request_ids(http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    response = http.post("/v1/completions", json=body, headers={"x-request-id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"
    assert response.json()["id"] == "cmpl-my-id.7"
    response = http.post("/v1/completions", json=body)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert http.get("/nowhere").headers["x-request-id"]


# --- refusals -------------------------------------------------------------------------------------

GOOD = {"prompt": "x", "max_tokens": 2}
CHAT = {"messages": TALK, "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        ("completions", {**GOOD, "temprature": 1}, 400, "temprature", "did you mean temperature?"),
        ("completions", {**GOOD, "suffix": "s"}, 400, "suffix", "suffix is not supported by this server"),
        ("chat/completions", {**CHAT, "tools": []}, 400, "tools", "tools is not supported"),
        ("chat/completions", {**CHAT, "zzz": 1}, 400, "zzz", "unknown field zzz; known are"),
        ("completions", {**GOOD, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {**GOOD, "temperature": "0.5"}, 400, "temperature", "valid number"),
        ("completions", {**GOOD, "n": 5}, 400, None, "n must be at most 4 on this server, got 5"),
        ("completions", {**GOOD, "n": 10**30}, 400, "n", "less than or equal to 128"),
        ("completions", {**GOOD, "max_tokens": 0}, 400, None, "at least 1, or 0 with echo"),
        ("completions", {**GOOD, "stop": [""]}, 400, "stop", "stop"),
        ("completions", {**GOOD, "stop": ["a"] * 17}, 400, "stop", "stop"),
        ("completions", {**GOOD, "logit_bias": {"9999": 1}}, 400, None, "logit_bias holds token id 9999"),
        ("completions", {**GOOD, "logit_bias": {"x": 1}}, 400, None, "logit_bias"),
        ("completions", {**GOOD, "prompt": []}, 400, "prompt", "prompt"),
        ("completions", {**GOOD, "prompt": ""}, 400, None, "holds no token"),
        ("completions", {**GOOD, "prompt": [1, 99999]}, 400, None, "token id 99999"),
        ("completions", {**GOOD, "prompt": ["x"] * 9}, 400, None, "at most 8 prompts a request, got 9"),
        ("completions", {**GOOD, "prompt": "x" * 300}, 400, "prompt", "300 tokens and the context holds 256"),
        ("completions", {**GOOD, "min_tokens": 3}, 400, None, "min_tokens=3 is more than max_tokens=2"),
        ("completions", {**GOOD, "stream_options": {}}, 400, None, "stream_options needs stream"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, None, "top_logprobs needs logprobs"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {**CHAT, "messages": [{"role": "king", "content": "x"}]}, 400, "messages", "role"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "name": "x"}]}, 400, "messages", "content"),
        ("embeddings", {"input": "x"}, 404, "model", "it embeds none"),
        ("completions", {"max_tokens": 2}, 400, "prompt", "prompt: Field required"),
        ("completions", [], 400, None, "the body"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_refusals_name_what_is_wrong(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, words: str
) -> None:
    response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": "x", "temperature": 1e999}', 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 10_000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 30_000, 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "\\ud800": 1}', 400),
        (b'{"prompt": "x", "model": "\\ud800"}', 400),
        (b'{"prompt": "x", "structured_outputs": {"regex": "\\ud800"}}', 400),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', 413),
    ],
    ids=[
        "empty",
        "cut",
        "no UTF-8",
        "NaN",
        "infinite",
        "huge integer",
        "deep",
        "lone surrogate",
        "as a name",
        "as a model",
        "as a regex",
        "large",
    ],
)
def test_bodies_that_no_client_sends(http: httpx.Client, content: bytes, status: int) -> None:
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_wrong_paths_and_methods(http: httpx.Client) -> None:
    for response, status in ((http.get("/nowhere"), 404), (http.get("/v1/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["message"]
