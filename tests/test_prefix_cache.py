"""Prefix caching: what was computed before is found again, and no answer differs for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pared.runtime.cache import BlockAllocator
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams
from pared.runtime.rope import length_matters_above
from pared.spec import Rope
from pared.tests.mock_model import expected, make_core, run, tokens_of

ENDLESS = SamplingParams(max_tokens=6, ignore_eos=True)
BEGINNING = list(range(1, 17))


def ask(core, prompt: list[int], params: SamplingParams = ENDLESS) -> tuple[list[int], int]:
    """Answer and cached tokens of one prompt."""
    id = core.add(prompt, params)
    outputs = run(core)[id]
    return tokens_of(outputs), outputs[0].cached_tokens


def test_kept_blocks_are_found_until_their_room_is_needed_oldest_first() -> None:
    allocator = BlockAllocator(6)
    first, second = allocator.allocate(2), allocator.allocate(2)
    for block, key in zip(first + second, (b"a", b"b", b"c", b"d"), strict=True):
        allocator.remember(block, key)
    allocator.release(first)
    allocator.release(second)
    assert (allocator.free, allocator.used) == (5, 0)
    assert allocator.claim([b"a", b"x", b"b"]) == first[:1]
    assert allocator.claim([b"a"]) == first[:1]
    assert (allocator.free, allocator.used) == (4, 1)
    allocator.release(first[:1])
    assert allocator.used == 1  # its other owner
    allocator.allocate(2)  # the blank one, then the end of the first text
    assert allocator.claim([b"b"]) == []
    assert allocator.claim([b"c", b"d"]) == second
    assert (allocator.free, allocator.used) == (0, 5)


def test_a_key_stays_with_the_block_that_had_it_first() -> None:
    allocator = BlockAllocator(4)
    one, other = allocator.allocate(2)
    allocator.remember(one, b"a")
    allocator.remember(other, b"a")
    allocator.remember(one, b"b")
    assert allocator.claim([b"a"]) == [one]
    assert allocator.claim([b"b"]) == []


def test_only_full_blocks_are_shared_and_one_token_is_always_computed() -> None:
    core = make_core(by_length=False, prefix_caching=True, page=4)
    assert ask(core, BEGINNING)[1] == 0
    for prompt, cached in (
        (BEGINNING, 12),  # the fourth block would leave nothing to compute
        ([*BEGINNING, 30], 16),
        ([*BEGINNING[:7], 30], 4),
        (BEGINNING[:4], 0),
        ([30, *BEGINNING], 0),
    ):
        before = core.stats().computed_tokens
        answer, found = ask(core, prompt)
        assert answer == expected(prompt, 64, ENDLESS, by_length=False)
        assert found == cached
        assert core.stats().computed_tokens - before == len(prompt) - cached + len(answer) - 1
    assert core.stats().cached_tokens == 32
    assert core.allocator.used == 0


def test_answers_are_remembered_as_well() -> None:
    core = make_core(by_length=False, prefix_caching=True, page=4)
    answer, _ = ask(core, BEGINNING)
    again = [*BEGINNING, *answer, 30]
    assert ask(core, again) == (expected(again, 64, ENDLESS, by_length=False), 20)


def test_prompts_that_are_read_at_the_same_time_share_what_the_first_has_computed() -> None:
    core = make_core(by_length=False, prefix_caching=True, page=4, chunk=8)
    prompts = [[*range(1, 33), 30 + i] for i in range(3)]
    asked = {core.add(prompt, ENDLESS): prompt for prompt in prompts}
    outputs = run(core)
    for id, prompt in asked.items():
        assert tokens_of(outputs[id]) == expected(prompt, 64, ENDLESS, by_length=False)
    assert core.stats().computed_tokens < 33 + 2 * 20 + 3 * 5
    assert core.allocator.used == 0


def test_where_rotation_depends_on_the_length_only_equal_lengths_share() -> None:
    core = make_core(by_length=True, prefix_caching=True, page=4)
    ask(core, BEGINNING)
    assert ask(core, [*BEGINNING[:12], 30, 31, 32, 33])[1] == 12
    longer = [*BEGINNING, 30]
    assert ask(core, longer) == (expected(longer, 64, ENDLESS), 0)
    kinds = [Rope(kind, 1e4, 4, 64, original=32) for kind in ("default", "dynamic", "longrope", "yarn")]
    assert [length_matters_above(rope) for rope in (None, *kinds)] == [None, None, 64, 32, None]


def test_a_failed_step_leaves_nothing_behind_that_others_would_find() -> None:
    core = make_core(by_length=False, prefix_caching=True, page=4)
    core.add(BEGINNING, ENDLESS)
    core.model.fail_next = True
    with pytest.raises(Exception, match="told to fail"):
        core.step()
    run(core)
    assert ask(core, BEGINNING) == (expected(BEGINNING, 64, ENDLESS, by_length=False), 0)


def test_scored_prompts_are_computed_in_full() -> None:
    core = make_core(by_length=False, prefix_caching=True, page=4, chunk=7)
    ask(core, BEGINNING)
    id = core.add(BEGINNING, SamplingParams(max_tokens=2, prompt_logprobs=2, ignore_eos=True))
    first, second = run(core)[id]
    assert first.cached_tokens == 0
    assert [scored.token for scored in first.prompt_logprobs] == BEGINNING[1:]
    assert not second.prompt_logprobs
    for place, scored in enumerate(first.prompt_logprobs):
        (likeliest,) = expected(
            BEGINNING[: place + 1], 64, SamplingParams(max_tokens=1, ignore_eos=True), by_length=False
        )
        assert scored.top[0][0] == likeliest
        assert len(scored.top) == 2
        assert scored.logprob <= scored.top[0][1]


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> tuple[LLM, LLM]:
    """The tiny model without prefix caching and with it, fp32."""
    options = {"device": "cpu", "num_blocks": 40, "page": 8, "chunk": 64}
    return LLM(tiny_folder, **options), LLM(tiny_folder, prefix_caching=True, **options)


def test_a_real_model_answers_the_same(pair: tuple[LLM, LLM]) -> None:
    plain, caching = pair
    system = "You are a helpful machine that answers every question it is asked. "
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
    cached = []
    for question in ("What is that?", "Why?", "What is this?", "What is that?"):
        (expected_output,), (output,) = (
            plain.generate(system + question, params),
            caching.generate(system + question, params),
        )
        assert output.token_ids == expected_output.token_ids
        mine, theirs = ([one.logprob for one in found.logprobs] for found in (output, expected_output))
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=0)
        assert expected_output.cached_tokens == 0
        cached.append(output.cached_tokens)
    assert cached == [0, 64, 72, 72]
    assert caching.core.allocator.used == 0


def test_prompt_logprobs_are_those_of_the_model(pair: tuple[LLM, LLM]) -> None:
    plain, _ = pair
    text = "a prompt whose tokens are scored"
    (output,) = plain.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0, n=2))
    tokens = plain.tokenizer.encode(text)
    for end in (1, 7, len(tokens) - 1):
        one = SamplingParams(max_tokens=1, logprobs=0, logit_bias={tokens[end]: 100.0})
        (step,) = plain.generate(tokens[:end], one)
        assert step.token_ids == [tokens[end]]
        assert output.prompt_logprobs[end - 1].token == tokens[end]
        assert abs(output.prompt_logprobs[end - 1].logprob - step.logprobs[0].logprob) < 1e-5
    assert len(output.prompt_logprobs) == len(tokens) - 1
