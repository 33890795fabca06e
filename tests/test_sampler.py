"""The sampler against computations of a few lines that share nothing with it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.errors import BadParameter, EngineError
from pared.runtime import sampler
from pared.runtime.params import SamplingParams
from pared.runtime.sampler import sample
from pared.runtime.sequence import Sequence

V = 50


def make(prompt: list[int] | None = None, output: list[int] | None = None, id: int = 0, **options: object) -> Sequence:
    params = SamplingParams(**options)
    prompt = prompt or [1, 2]
    tokens = prompt + (output or [])
    generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
    stops = frozenset(params.stop_token_ids)
    return Sequence(id, tokens, len(prompt), params, stops, 99, len(prompt), generator=generator)


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def frequencies(logits: torch.Tensor, draws: int = 20_000, **options: object) -> torch.Tensor:
    """How often each token is drawn from one row of logits."""
    rows = [make(**options) for _ in range(draws)]
    tokens, _ = sample(logits.expand(draws, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / draws


def test_greedy_takes_the_best_and_leaves_the_logits_alone() -> None:
    logits = logits_of(0, 5)
    before = logits.clone()
    tokens, logprobs = sample(logits, [make() for _ in range(5)])
    assert tokens == [max(range(V), key=row.__getitem__) for row in logits.tolist()]
    assert logprobs == [None] * 5
    sample(logits, [make(temperature=0.5, repetition_penalty=2.0, logit_bias={3: 5.0}) for _ in range(5)])
    assert torch.equal(logits, before)


def test_no_option_makes_an_infinity_or_a_wrong_token_of_good_logits() -> None:
    logits = logits_of(0, 2)
    coldest = [make(temperature=temperature) for temperature in (5e-324, 1e-45)]
    assert sample(logits, coldest)[0] == logits.argmax(dim=-1).tolist()
    for penalty in (0.01, 100.0):
        most = {"repetition_penalty": penalty, "presence_penalty": -2, "frequency_penalty": -2, "logit_bias": {1: 100}}
        tokens, _ = sample(1e30 * logits, [make(temperature=1e300, seed=1, **most) for _ in range(2)])
        assert all(0 <= token < V for token in tokens)


def test_plain_greedy_rows_cost_no_work_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(0, 3)
    assert sampler._adjust(logits, [make() for _ in range(3)]) is logits
    monkeypatch.setattr(sampler, "_draw", None)
    assert len(sample(logits, [make() for _ in range(3)])[0]) == 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
    output=st.lists(st.integers(0, V - 1), max_size=8),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    presence=st.sampled_from([-1.0, 0.0, 0.7]),
    frequency=st.sampled_from([-0.5, 0.0, 0.4]),
    bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-3.0, 4.0]), max_size=3),
)
def test_penalties_and_bias(
    seed: int, prompt: list, output: list, repetition: float, presence: float, frequency: float, bias: dict
) -> None:
    logits = logits_of(seed, 2)
    options = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    got = sampler._adjust(logits, [make(), make(prompt, output, logit_bias=bias, **options)])
    assert torch.equal(got[0], logits[0])
    for token, logit in enumerate(logits[1].tolist()):
        if token in prompt + output:
            logit = logit / repetition if logit > 0 else logit * repetition
        count = output.count(token)
        logit -= count * frequency + (presence if count else 0) - bias.get(token, 0)
        assert got[1, token].item() == pytest.approx(logit, abs=1e-4)


def test_penalties_keep_count_of_what_is_generated() -> None:
    one = make([4, 5], frequency_penalty=2.0)
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 9] = 3.0, 2.0
    chosen = []
    for _ in range(4):
        (token,), _ = sample(logits, [one])
        one.tokens.append(token)
        chosen.append(token)
    assert chosen == [7, 9, 7, 0]  # 3, then 2 against 1, then 1 against 0, then -1, 0 and 0


def test_no_stop_before_min_tokens() -> None:
    logits = logits_of(0)
    best, second = logits[0].topk(2).indices.tolist()
    assert sample(logits, [make(output=[3], min_tokens=2, stop_token_ids=[best])])[0] == [second]
    assert sample(logits, [make(output=[3, 3], min_tokens=2, stop_token_ids=[best])])[0] == [best]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 10 * V, "top_p": 0.999},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(options: dict) -> None:
    torch.manual_seed(5)
    logits = logits_of(3)
    want = filtered(logits[0].tolist(), **options)
    got = frequencies(logits, **options)
    assert not got[torch.tensor(want) == 0].any()
    # Each frequency of 20,000 draws lies within five standard deviations of its probability.
    for probability, frequency in zip(want, got.tolist(), strict=True):
        assert abs(probability - frequency) <= 5 * math.sqrt(probability * (1 - probability) / 20_000) + 1e-9


def filtered(logits: list, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[float]:
    """Temperature, then top-k, top-p and min-p, in plain Python."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)[: top_k or len(weights)]
    total, reached, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def test_a_row_without_top_p_keeps_its_whole_tail() -> None:
    """Also where the probabilities before it already round to 1, and a batch mate has its own cut."""
    logits = torch.linspace(0, -90, V).expand(2, -1)
    kept = sampler._keep_top(logits, [SamplingParams(), SamplingParams(top_k=3, top_p=0.9)])
    assert torch.equal(kept[0], logits[0])
    assert kept[1].isfinite().sum() == 2


def test_a_mixed_batch_gives_each_row_its_own_rules() -> None:
    logits = logits_of(11, 4)
    best = logits.argmax(-1).tolist()
    rows = [
        make(),
        make(temperature=1.0, top_k=1),
        make(temperature=1e-30),
        make(temperature=1.0, top_p=1e-6, seed=3),
    ]
    assert sample(logits, rows)[0] == best


def test_a_seed_decides_alone() -> None:
    logits = logits_of(1)

    def draws(mates: list[dict], **options: object) -> list[int]:
        one = make(temperature=1.3, seed=42, **options)
        rows = torch.cat([logits_of(9, len(mates)), logits]) if mates else logits
        return [sample(rows, [*(make(**mate) for mate in mates), one])[0][-1] for _ in range(30)]

    mates = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5, "seed": 1}, {}]
    for options in ({}, {"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.01}):
        alone = draws([], **options)
        assert len(set(alone)) > 3
        assert all(draws(some, **options) == alone for some in ([], mates[:1], mates[1:2], mates[2:], mates))
    alone = draws([])
    other = make(temperature=1.3, seed=43)
    assert [sample(logits, [other])[0][0] for _ in range(30)] != alone


def test_unseeded_rows_follow_torchs_own_seed() -> None:
    def draws() -> list[int]:
        torch.manual_seed(7)
        return sample(logits_of(2, 40), [make(temperature=2.0) for _ in range(40)])[0]

    assert draws() == draws()
    assert len(set(draws())) > 5


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    for uniform in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        assert sampler._invert(probs, torch.tensor([[uniform]], dtype=torch.float64)).item() in (1, 3)


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = logits_of(6, 3)
    rows = [make(logprobs=2, logit_bias={4: 100}), make(), make(logprobs=0, temperature=0.7, seed=1)]
    tokens, found = sample(logits, rows)
    assert tokens[0] == 4
    assert found[1] is None
    for row, one in ((0, found[0]), (2, found[2])):
        total = math.log(sum(math.exp(x) for x in logits[row].tolist()))
        assert one.token == tokens[row]
        assert one.logprob == pytest.approx(logits[row, tokens[row]].item() - total, abs=1e-5)
    ranked = Counter(dict(enumerate(logits[0].tolist()))).most_common(2)
    assert [token for token, _ in found[0].top] == [token for token, _ in ranked]
    assert found[2].top == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str)
def test_broken_logits_are_named(value: float, options: dict) -> None:
    logits = logits_of(0, 2)
    logits[1, 5] = value
    with pytest.raises(EngineError, match=r"requests \[8\] are NaN or infinite"):
        sample(logits, [make(id=7, **options), make(id=8, **options)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens.*2.5"),
        ({"n": 0}, "n must be an integer from 1 to 128, got 0"),
        ({"n": True}, "n must be an integer"),
        ({"temperature": -0.1}, "temperature must be a finite number at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"temperature": "hot"}, "temperature.*'hot'"),
        ({"top_p": 0}, "top_p must be a finite number above 0 and at most 1, got 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty must be a finite number at least 0.01 and at most 100"),
        ({"presence_penalty": 2.1}, "presence_penalty.*at least -2 and at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias.*-100 to 100.*1: 101"),
        ({"logit_bias": {"x": 1}}, "logit_bias.*'x'"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop must be a non-empty string"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stop": 5}, "stop.*5"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens=9 is more than max_tokens=3"),
    ],
    ids=str,
)
def test_bad_parameters_are_named_with_value_and_range(options: dict, words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        SamplingParams(**options)


def test_options_by_name() -> None:
    base = SamplingParams(temperature=0.7, top_k=4)
    params = SamplingParams.from_dict({"top_k": 9, "logit_bias": {"12": -1}, "stop": ["x", "y"]}, base)
    assert (params.temperature, params.top_k, params.logit_bias, params.stop) == (0.7, 9, {12: -1.0}, ("x", "y"))
    with pytest.raises(BadParameter, match=r"unknown sampling option temprature=1; did you mean temperature\?"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(BadParameter, match="unknown sampling option beams=4; known are n, max_tokens"):
        SamplingParams.from_dict({"beams": 4})
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)
