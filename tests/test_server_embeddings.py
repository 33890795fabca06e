"""/v1/embeddings: the vectors of the offline Embedder, whoever else asks; and its limits and failures."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
import torch

from pared import LLM, Embedder, SamplingParams
from pared.convert import convert
from pared.embedding import Embedding
from pared.errors import BadParameter
from pared.runtime.accounting import weight_memory
from pared.runtime.async_embedder import AsyncEmbedder
from pared.runtime.server.app import drain
from pared.runtime.server.limits import Limits
from pared.runtime.server.metrics import Metrics
from pared.runtime.server.opening import Wanted, abilities, open_service
from pared.runtime.server.service import Service
from pared.tests import trained
from pared.tests.serving import eventually, serving

WANTED = Wanted(device="cpu", max_batch=4, chunk=64, kv_cache_bytes=2**20)
TEXTS = ["w3 w7", "w9", "w5 w6 w30 w31 w12 w8", "w3 w7"]
PROMPTS = {"query": "w7 w8 "}


@contextmanager
def clients(service: Service) -> Iterator[tuple[openai.OpenAI, httpx.Client]]:
    with (
        serving(service) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client,
        httpx.Client(base_url=address, timeout=60) as http,
    ):
        yield client, http


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact folder without a head that says how it embeds."""
    home = tmp_path_factory.mktemp("encoder")
    trained.checkpoint(home / "hf")
    made = Embedding("mean", skip_instruction=False, normalize=True, prompts=PROMPTS, max_length=24)
    convert(home / "hf", home / "out", progress=False)
    (home / "out" / "embedding.json").write_bytes(made.file())
    return home / "out"


@pytest.fixture(scope="module")
def offline(encoder: Path) -> Embedder:
    return Embedder(encoder, device="cpu")


@pytest.fixture(scope="module")
def asked(encoder: Path) -> Iterator[tuple[openai.OpenAI, httpx.Client]]:
    with clients(open_service(encoder, "small", Limits(), WANTED)) as both:
        yield both


def vectors(reply: Any) -> np.ndarray:
    assert [item.index for item in reply.data] == list(range(len(reply.data)))
    return np.array([item.embedding for item in reply.data], np.float32)


def test_vectors_are_those_of_the_offline_encoder(asked, offline: Embedder) -> None:
    client, _ = asked
    want = offline.encode(TEXTS)
    for form in ("float", "base64", openai.NOT_GIVEN):
        got = client.embeddings.create(model="small", input=TEXTS, encoding_format=form)
        data = [item.embedding for item in got.data]
        if form == "base64":  # the client leaves it as it is
            data = [np.frombuffer(base64.b64decode(text), "<f4") for text in data]
        assert np.array_equal(np.array(data, np.float32), want), form
        assert (got.usage.prompt_tokens, got.usage.total_tokens) == (11, 11)
    alone = client.embeddings.create(model="small", input=TEXTS[2])
    assert np.abs(vectors(alone) - want[2:3]).max() < 1e-6
    fewer = client.embeddings.create(model="small", input=TEXTS, dimensions=8, extra_body={"normalize": True})
    assert np.allclose(vectors(fewer), offline.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), atol=1e-6)
    named = client.embeddings.create(model="small", input=TEXTS, extra_body={"prompt_name": "query"})
    assert np.allclose(vectors(named), offline.encode_query(TEXTS), atol=1e-6)


def test_token_ids_stand_for_their_text(asked, offline: Embedder) -> None:
    client, http = asked
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    got = client.embeddings.create(model="small", input=ids)
    assert np.array_equal(vectors(got), offline.encode(TEXTS))
    assert got.usage.prompt_tokens == sum(map(len, ids))
    assert np.allclose(vectors(client.embeddings.create(model="small", input=ids[2])), vectors(got)[2:3], atol=1e-6)
    mixed = offline.embed([TEXTS[0], ids[1]])
    assert np.allclose(mixed.vectors, offline.embed(TEXTS[:2]).vectors, atol=1e-6) and mixed.tokens == [2, 1]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"input": [1, 40]}, 400, "token id 40; this model knows 0 to 39"),
        ({"input": [[3], [4, -1]]}, 400, "input"),
        ({"input": [[3], []]}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["w3", 4]}, 400, "input"),
        ({"input": [3], "prompt_name": "query"}, 400, "prompt_name stands before texts"),
        ({"input": "w3", "prompt_name": "title"}, 400, "no prompt 'title'; it has query"),
        ({"input": "w3", "dimensions": 33}, 400, "1 to 32 dimensions, not 33"),
        ({"input": "w3", "dimensions": 0}, 400, "dimensions"),
        ({"input": "w3", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": ["w3", " "]}, 400, "text 1 is empty"),
        ({"input": [3] * 25}, 400, "1 tokens too long"),
        ({"input": "w3 " * 30}, 400, "6 tokens too long"),
        ({"input": "w3", "model": "other"}, 404, "small is"),
    ],
)
def test_refusals(asked, body: dict, status: int, words: str) -> None:
    refused = asked[1].post("/v1/embeddings", json=body)
    assert refused.status_code == status, refused.text
    assert words in refused.json()["error"]["message"]


def test_a_long_text_is_cut_where_that_is_asked(asked, offline: Embedder) -> None:
    reply = asked[1].post("/v1/embeddings", json={"input": [[3] * 30, [3] * 24], "truncate": True}).json()
    first, second = (item["embedding"] for item in reply["data"])
    assert np.allclose(first, second, atol=1e-6) and reply["usage"]["prompt_tokens"] == 48


def test_an_encoder_tells_what_it_is(asked, offline: Embedder) -> None:
    client, http = asked
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["does"], card["max_model_len"]) == (["embedder"], 24)
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert {row["op"] for row in http.get("/version").json()["kernels"]} == {"linear", "attention", "fused"}
    assert http.post("/detokenize", json={"tokens": [3, 4]}).json() == {"prompt": "w3 w4"}
    assert http.get("/tokenizer_info").json()["max_model_len"] == 24
    talk = [{"role": "user", "content": "w3"}]
    for path, body in (("completions", {"prompt": "w3"}), ("chat/completions", {"messages": talk})):
        refused = http.post(f"/v1/{path}", json=body)
        assert refused.status_code == 404 and "it generates none" in refused.json()["error"]["message"]

    def read(name: str) -> float:
        return float(re.search(rf"^pared:{name} (.+)$", http.get("/metrics").text, re.MULTILINE)[1])

    before = read("embedding_tokens_sum"), read("embedding_tokens_count"), read("embedding_seconds_count")
    client.embeddings.create(model="small", input=TEXTS)
    after = read("embedding_tokens_sum"), read("embedding_tokens_count"), read("embedding_seconds_count")
    assert [b - a for a, b in zip(before, after, strict=True)] == [11, 4, 1]
    assert read("num_texts_waiting") == 0
    assert read("weights_bytes") == weight_memory(offline.model)
    assert read("weights_dense_bytes") == pytest.approx(read("weights_bytes"), rel=0.01)  # but for biases of norms


def test_a_folder_that_generates_and_embeds(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, device="cpu", num_blocks=100)
    texts, params = [f"text number {i}" for i in range(12)], SamplingParams(max_tokens=8)
    answers = [output.text for output in llm.generate(texts, params)]
    want = Embedder(tiny_folder, device="cpu", pooling="mean").encode(texts)
    service = open_service(tiny_folder, "both", Limits(), Wanted(device="cpu", kv_cache_bytes=2**22, pooling="mean"))
    assert service.embedder.encoder.model is service.generator.llm.model  # weights are held once
    with clients(service) as (client, http), ThreadPoolExecutor(8) as pool:
        assert http.get("/v1/models").json()["data"][0]["does"] == ["generator", "embedder"]
        made = [pool.submit(client.completions.create, model="both", prompt=text, max_tokens=8) for text in texts]
        found = [pool.submit(client.embeddings.create, model="both", input=text) for text in texts]
        assert [one.result().choices[0].text for one in made] == answers
        assert np.allclose(np.concatenate([vectors(one.result()) for one in found]), want, atol=1e-6)


def test_what_a_folder_does_is_read_from_it(encoder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert abilities(encoder) == (False, True)
    assert abilities(tiny_folder) == (True, False)
    assert open_service(tiny_folder, "x", Limits(), WANTED).embedder is None
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_folder.iterdir():
        (bare / file.name).symlink_to(file)
    config = (bare / "config.json").read_text()
    (bare / "config.json").unlink()
    (bare / "config.json").write_text(config.replace("LlamaForCausalLM", "LlamaModel"))
    assert abilities(bare) == (False, True)
    with pytest.raises(BadParameter, match="does not say how it pools; give pooling"):
        open_service(bare, "x", Limits(), WANTED)


# --- over any encoder ------------------------------------------------------------------------------


class Counting:
    """Embeds a text as its length, and says so to whoever counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list] = []
        self.open = threading.Event()
        self.open.set()

    def embed(self, texts: list, prompt_name: str | None = None) -> Any:
        self.calls.append(list(texts))
        assert self.open.wait(60)
        if "" in texts:
            raise BadParameter("a text is empty")
        if "break" in texts:
            raise RuntimeError("the device is gone")
        lengths = [len(text) for text in texts]
        vectors = torch.tensor([[float("nan" if text == "nan" else len(text)), 1.0, 2.0] for text in texts])
        return SimpleNamespace(vectors=vectors, tokens=lengths, cut=[max(0, length - 10) for length in lengths])

    def finish(self, vectors: torch.Tensor, normalize: bool, dimensions: int | None) -> torch.Tensor:
        vectors = vectors[:, : dimensions or 3]
        return torch.nn.functional.normalize(vectors) if normalize else vectors

    def ffn_use(self) -> tuple[None, ...]:
        return ()


def counting(encoder: Counting) -> Service:
    return Service("lengths", Metrics(), Limits(texts=20), embedder=AsyncEmbedder(encoder, max_waiting=30))


def test_limits_and_failures_of_an_encoder() -> None:
    encoder = Counting()
    service = counting(encoder)
    with clients(service) as (_, http):
        for wrong, status, words in (
            ({"input": ["x"] * 21}, 400, "at most 20 texts"),
            ({"input": "x", "prompt": "y"}, 400, "unknown field prompt"),
            ({"input": "nan"}, 503, "not finite"),
            ({"input": "break"}, 503, "the device is gone"),
        ):
            refused = http.post("/v1/embeddings", json=wrong)
            assert refused.status_code == status and words in refused.json()["error"]["message"]
        encoder.open.clear()
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(http.post, "/v1/embeddings", json={"input": ["x"] * 14}) for _ in range(2)]
            eventually(lambda: service.embedder.waiting == 28)
            full = http.post("/v1/embeddings", json={"input": ["x"] * 3})
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            draining = asyncio.run_coroutine_threadsafe(drain(service), service.embedder.loop)
            eventually(lambda: service.embedder.error is not None)
            assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 503
            assert http.get("/ready").status_code == 503 and not draining.done()
            encoder.open.set()
            assert [one.result().status_code for one in held] == [200, 200]
            draining.result(60)
        service.embedder.loop.call_soon_threadsafe(service.embedder.task.cancel)
        eventually(lambda: http.get("/health").status_code == 503)


def test_a_client_that_leaves_takes_its_texts_along() -> None:
    encoder = Counting()
    service = counting(encoder)
    with clients(service) as (_, http), ThreadPoolExecutor(1) as pool:
        encoder.open.clear()
        first = pool.submit(http.post, "/v1/embeddings", json={"input": "first"})
        eventually(lambda: ["first"] in encoder.calls)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/embeddings", json={"input": "gone"}, timeout=0.2)
        eventually(lambda: service.embedder.waiting == 1)
        encoder.open.set()
        assert first.result().status_code == 200
        assert ["gone"] not in encoder.calls


def test_texts_that_wait_run_together_and_fail_alone() -> None:
    encoder = Counting()
    service = counting(encoder)
    texts = ("first", "a", "bb", "", "ccc")
    with clients(service) as (_, http), ThreadPoolExecutor(len(texts)) as pool:
        encoder.open.clear()
        asked = []
        for number, text in enumerate(texts, 1):
            asked.append(pool.submit(http.post, "/v1/embeddings", json={"input": text}))
            eventually(lambda number=number: service.embedder.waiting == number)
        eventually(lambda: ["first"] in encoder.calls)
        encoder.open.set()
        assert [one.result().status_code for one in asked] == [200, 200, 200, 400, 200]
        assert ["a", "bb", "", "ccc"] in encoder.calls
