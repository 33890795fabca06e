"""Perplexity against an independent computation, and the table that conversions and the demo end with."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers as hf

from pared import errors, evaluate
from pared.convert import convert
from pared.evaluate import Report, Row, decoder_logits, measure, perplexity, tokens_per_second
from pared.runtime.loader import load
from pared.tests import tiny

VOCAB = 11
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, VOCAB, (1030,), generator=torch.Generator().manual_seed(1)).tolist()


def bigram(tokens: torch.Tensor) -> torch.Tensor:
    """A model whose next token depends on the last one alone."""
    return TABLE[tokens]


def loss(window: list[int]) -> float:
    """Mean of -ln p(next | last), from the definition of softmax in doubles."""
    p = [[math.exp(v) for v in row] for row in TABLE.double().tolist()]
    pairs = list(itertools.pairwise(window))
    return -sum(math.log(p[a][b] / sum(p[a])) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("window", [2, 7, 300, 1030])
def test_the_tail_is_dropped_or_weighs_a_whole_window(window):
    pieces = [TOKENS[i : i + window] for i in range(0, len(TOKENS), window)]
    full = [loss(piece) for piece in pieces if len(piece) == window]
    assert perplexity(bigram, TOKENS, window) == pytest.approx(math.exp(sum(full) / len(full)), rel=1e-6)
    every = [loss(piece) for piece in pieces if len(piece) > 1]  # one token alone predicts nothing
    found = perplexity(bigram, TOKENS, window, protocol="tail")
    assert found == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-6)


def test_windows_do_not_see_each_other():
    seen = []
    perplexity(lambda tokens: seen.append(tokens.tolist()) or bigram(tokens), TOKENS, 500, protocol="tail")
    assert seen == [TOKENS[:500], TOKENS[500:1000], TOKENS[1000:]]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    assert perplexity(lambda t: torch.zeros(len(t), 37), [1, 2, 3, 4] * 8, 16) == pytest.approx(37, rel=1e-6)
    assert perplexity(lambda t: torch.zeros(len(t), 37).bfloat16(), [1, 2, 3], 3) == pytest.approx(37, rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 1031}, "1030 tokens, fewer than one window of 1031"),
        ({"window": 1}, "a window of 1 tokens predicts nothing"),
        ({"protocol": "sliding"}, "protocol must be one of windows, tail, got 'sliding'"),
    ],
)
def test_perplexity_that_cannot_be_measured(options, message):
    with pytest.raises(errors.BadParameter, match=message):
        perplexity(bigram, TOKENS, **options)
    with pytest.raises(errors.BadParameter, match="0 tokens"):
        perplexity(bigram, [], protocol="tail")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    convert(tiny.checkpoint(path / "src", "qwen3"), path / "out", progress=False)
    return path / "out"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32])
def test_decoder_logits_are_those_of_transformers(folder, length):
    tokens = torch.arange(length) * 7 % 40
    expected = hf.AutoModelForCausalLM.from_pretrained(folder)(tokens[None]).logits[0]
    found = decoder_logits(load(folder, "cpu"))(tokens)
    assert found.shape == (length, 40)
    assert (found - expected).abs().max() < 1e-5


def test_perplexity_of_a_folder_is_that_of_transformers(folder):
    words = [i * i % 40 for i in range(200)]
    row = measure(folder, " ".join(f"w{i}" for i in words), window=30, protocol="tail")
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    pieces = [torch.tensor([words[i : i + 30]]) for i in range(0, 200, 30)]
    losses = [model(piece, labels=piece).loss.item() for piece in pieces]
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_measure_counts_what_is_there(folder):
    row = measure(folder, device="cpu")
    assert row.name == "out"
    assert row.disk_bytes == sum(file.stat().st_size for file in folder.iterdir())
    weights = (folder / "model.safetensors").stat().st_size
    assert 0.5 * weights < row.bytes_per_token < weights
    assert row.bytes_per_token < row.memory_bytes < 1.1 * weights
    assert row.tokens_per_second > 0
    assert row.perplexity is None
    assert measure(folder, dtype=torch.bfloat16).bytes_per_token < 0.6 * row.bytes_per_token


def test_a_model_too_large_for_the_machine_is_not_loaded(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "free_bytes", lambda device: 1000)
    on_meta = load(folder, "meta")
    monkeypatch.setattr(evaluate, "load", lambda path, device, *_: {"meta": on_meta}[str(device)])
    row = measure(folder, "w1 w2")
    assert row.tokens_per_second is None
    assert row.perplexity is None
    assert row.memory_bytes > row.bytes_per_token > 0


def test_speed_stays_within_the_context_and_the_answer(folder):
    decoder = load(folder, "cpu")
    for prompt, answer in ((1, 3), (32, 64), (500, 4)):
        assert 0 < tokens_per_second(decoder, prompt, answer) < math.inf


def test_the_table():
    rows = (
        Row("dense", 270_000_000, 269_900_000, 269_100_000, 41.25, 21.0934),
        Row("half", 135_000_000, 1, 134_600_000),
    )
    assert str(Report(rows)).splitlines() == [
        "model      disk    memory  bytes per token  tokens/s  perplexity",
        "-----  --------  --------  ---------------  --------  ----------",
        "dense  270.0 MB  269.9 MB         269.1 MB      41.2      21.093",
        "half   135.0 MB    0.0 MB         134.6 MB         -           -",
    ]


def test_the_table_has_a_column_for_every_task():
    rows = (Row("a", 1, 1, 1, accuracy={"piqa": 0.5}), Row("b", 1, 1, 1, accuracy={"piqa": 0.625, "siqa": 1.0}))
    head, _, *lines = str(Report(rows)).splitlines()
    assert head.split()[-2:] == ["piqa", "siqa"]
    assert [line.split()[-4:] for line in lines] == [["-", "50.0", "%", "-"], ["62.5", "%", "100.0", "%"]]


@pytest.mark.parametrize("rows", [1, 48, 512])
def test_log_likelihoods_are_those_of_one_pair_after_the_other(folder, rows):
    decoder = load(folder, "cpu")
    logits_of = decoder_logits(decoder)
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for context, rest in ((1, 1), (3, 2), (7, 5), (31, 1), (20, 12), (30, 9), (1, 40)):  # the last two do not fit
        pairs.append([torch.randint(40, (n,), generator=draw).tolist() for n in (context, rest)])
    best = logits_of(torch.tensor(pairs[1][0])).argmax(-1)[-1].item()
    pairs.append((pairs[1][0], [best]))
    found = list(evaluate.log_likelihoods(decoder, pairs, rows))
    for (context, rest), (score, greedy) in zip(pairs, found, strict=True):
        seen = [*context, *rest][-33:]
        wanted = rest[-(len(seen) - 1) :]
        logprobs = logits_of(torch.tensor(seen[:-1])).double().log_softmax(-1)[-len(wanted) :]
        own = logprobs[range(len(wanted)), wanted].sum().item()
        assert score == pytest.approx(own, abs=1e-4)
        assert greedy == (logprobs.argmax(-1).tolist() == wanted)
    assert found[-1][1]
