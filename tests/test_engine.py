"""The engine and the LLM over a mock model: every answer is what its prompt gives alone, and every ending is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from pared.errors import BadParameter, EmptyPrompt, EngineError, FallbackRefused, FolderDamaged, PromptTooLong
from pared.runtime import llm as llm_module
from pared.runtime.llm import LLM, context_length
from pared.runtime.memory import cache_blocks, free_bytes
from pared.runtime.params import SamplingParams
from pared.runtime.text import REPLACEMENT
from pared.spec import Rope
from pared.tests.mock_model import EOS, VOCAB, LetterTokenizer, MockModel, MockSpec, expected, make_core, run, tokens_of

ENDLESS = SamplingParams(max_tokens=20, ignore_eos=True)


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({"num_blocks": 200, "max_batch": 12, "chunk": 400}, False),
        ({"num_blocks": 200, "max_batch": 12, "chunk": 13}, False),
        ({"num_blocks": 200, "max_batch": 1, "chunk": 1}, False),
        ({"num_blocks": 16, "max_batch": 6, "chunk": 7}, True),
        ({"num_blocks": 60, "page": 1, "max_batch": 5, "chunk": 100}, True),
        ({"num_blocks": 16, "max_batch": 6, "chunk": 7, "rope_switch": 16}, True),
    ],
    ids=["together", "chunked", "one by one", "tiny cache", "pages of one", "longrope"],
)
def test_every_answer_is_what_the_prompt_gives_alone(options: dict, preempts: bool) -> None:
    core = make_core(**options)
    asked = {core.add(prompt, ENDLESS): prompt for prompt in prompts(12)}
    outputs = run(core)
    for id, prompt in asked.items():
        assert tokens_of(outputs[id]) == expected(prompt, 64, ENDLESS, options.get("rope_switch"))
        assert outputs[id][-1].finish_reason == "length"
    assert bool(core.stats().preemptions) is preempts
    assert core.allocator.used == 0


def test_steps_keep_to_their_budget() -> None:
    core = make_core(num_blocks=64, max_batch=3, chunk=7)
    for prompt in prompts(6):
        core.add(prompt, ENDLESS)
    run(core)
    assert max(len(batch.tokens) for batch in core.model.batches) == 7
    assert max(len(batch.context_lens) for batch in core.model.batches) == 3


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    core = make_core(num_blocks=64, max_batch=3, chunk=4)
    short = core.add([1], ENDLESS)
    core.step()
    core.add(list(range(1, 31)), ENDLESS)
    for _ in range(10):  # 30 tokens at 3 a step
        assert [output.id for output in core.step()][:1] == [short]


def test_a_short_prompt_is_answered_in_the_step_after_it_came_however_long_those_before_it_are() -> None:
    core = make_core(num_blocks=64, max_batch=4, chunk=8)
    for _ in range(3):
        core.add(list(range(1, 31)), ENDLESS)
        core.step()
    short = core.add([1, 2], ENDLESS)
    assert short in [output.id for output in core.step()]


def test_seeds_survive_preemption_and_company() -> None:
    def answer(num_blocks: int, company: int) -> list[int]:
        core = make_core(num_blocks=num_blocks, max_batch=6)
        params = SamplingParams(temperature=2.0, top_p=0.95, seed=5, max_tokens=25, ignore_eos=True)
        others = [core.add(prompt, ENDLESS) for prompt in prompts(company, 8)]
        id = core.add([3, 4, 5], params)
        outputs = run(core)
        assert len(outputs) == len(others) + 1
        assert (core.stats().preemptions > 0) is (num_blocks < 20)
        return tokens_of(outputs[id])

    alone = answer(100, 0)
    assert alone == answer(100, 4) == answer(12, 4)
    assert alone != expected([3, 4, 5], 64, SamplingParams(max_tokens=25, ignore_eos=True))


def test_endings() -> None:
    prompt = next(p for p in prompts(50) if EOS in expected(p, 64, ENDLESS)[2:])
    free = expected(prompt, 64, ENDLESS)
    at = free.index(EOS)

    def ends(**options: object) -> tuple[list[int], str, int | None]:
        core = make_core()
        (outputs,) = (run(core) if core.add(prompt, SamplingParams(**options)) == 0 else {}).values()
        return tokens_of(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason

    assert ends(max_tokens=20) == (free[: at + 1], "stop", None)
    assert ends(max_tokens=20, ignore_eos=True) == (free, "length", None)
    assert ends(max_tokens=20, stop_token_ids=[free[1]]) == (free[:2], "stop", free[1])
    assert ends(max_tokens=1) == (free[:1], "length", None)
    assert len(ends(max_tokens=20, min_tokens=at + 1)[0]) > at + 1
    whole, reason, _ = ends(max_tokens=None, ignore_eos=True)
    assert (len(prompt) + len(whole), reason) == (64, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([], {}, EmptyPrompt, "holds no token"),
        ([1, VOCAB], {}, BadParameter, f"token id {VOCAB}; this model's are 0 to {VOCAB - 1}"),
        ([-1], {}, BadParameter, "token id -1"),
        ([1], {"logit_bias": {99: 1.0}}, BadParameter, "logit_bias holds token id 99"),
        ([1], {"stop_token_ids": [VOCAB]}, BadParameter, f"stop_token_ids holds token id {VOCAB}"),
        ([1] * 64, {}, PromptTooLong, "64 tokens and the context holds 64"),
        ([1] * 70, {}, PromptTooLong, "70 tokens and the context holds 64"),
    ],
    ids=["empty", "too large an id", "negative id", "bias", "stop", "as long as the context", "longer"],
)
def test_requests_that_cannot_be_served(prompt: list, params: dict, error: type, words: str) -> None:
    core = make_core()
    with pytest.raises(error, match=words):
        core.add(prompt, SamplingParams(**params))
    assert not core.busy


def test_a_prompt_longer_than_the_cache_is_refused_and_the_longest_that_fits_is_answered() -> None:
    core = make_core(num_blocks=6, page=4)
    with pytest.raises(PromptTooLong, match=r"20 tokens and the KV cache holds 20.*more memory"):
        core.add([1] * 20, ENDLESS)
    core.add([1] * 19, ENDLESS)
    assert len(run(core)[0]) == 1


def test_cancelling() -> None:
    core = make_core(max_batch=1)
    running, waiting, other = (core.add(prompt, ENDLESS) for prompt in prompts(3))
    core.step()
    assert core.cancel(running)
    assert core.cancel(waiting)
    assert not core.cancel(running)
    assert not core.cancel(99)
    outputs = run(core)
    assert [output.finish_reason for output in outputs[running]][-1] == "abort"
    assert [(output.token, output.finish_reason) for output in outputs[waiting]] == [(None, "abort")]
    assert tokens_of(outputs[other]) == expected(prompts(3)[2], 64, ENDLESS)
    assert core.allocator.used == 0


def test_a_failing_step_aborts_its_own_requests_and_no_others() -> None:
    core = make_core(max_batch=2)
    first, second, third = (core.add(prompt, ENDLESS) for prompt in ([1], [2], [3]))
    core.model.fail_next = True
    with pytest.raises(EngineError, match=r"step 1 failed with 2 sequences and 2 token rows.*told to fail"):
        core.step()
    outputs = run(core)
    assert [output.finish_reason for output in outputs[first] + outputs[second]] == ["abort", "abort"]
    assert tokens_of(outputs[third]) == expected([3], 64, ENDLESS)


def test_statistics() -> None:
    core = make_core(num_blocks=9, page=4, max_batch=2, chunk=8)
    for prompt in ([1] * 6, [2] * 5, [3] * 4):
        core.add(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    core.step()
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 1, 1)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (4, 8)
    assert (stats.prompt_tokens, stats.computed_tokens, stats.output_tokens) == (15, 8, 0)
    run(core)
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.preemptions) == (0, 0, 0, 0)
    assert (stats.computed_tokens, stats.output_tokens) == (15 + 3 * 2, 9)


# --- the LLM on top -----------------------------------------------------------------------------


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders need hold neither weights nor a tokenizer."""
    monkeypatch.setattr(llm_module, "load", lambda *_: MockModel())
    monkeypatch.setattr(llm_module, "GraphedDecoder", lambda model: model)
    monkeypatch.setattr(llm_module, "Tokenizer", lambda path: LetterTokenizer())


@pytest.fixture
def llm(mocked: None, tmp_path: Path) -> LLM:
    return LLM(tmp_path, page=4, num_blocks=64, max_batch=4, chunk=16)


def text_of(prompt: str, params: SamplingParams) -> str:
    letters = LetterTokenizer()
    return letters.decode(expected(letters.encode(prompt), 64, params))


def test_prompts_of_every_kind(llm: LLM) -> None:
    tokens = LetterTokenizer().encode("xyz")
    for prompt in ("xyz", tokens, ["xyz"], [tokens]):
        (output,) = llm.generate(prompt, ENDLESS)
        assert output.text == text_of("xyz", ENDLESS)
        assert output.prompt_token_ids == tokens
        assert output.prompt == (None if tokens in (prompt, prompt[0]) else "xyz")
    both = llm.generate(["xyz", [5, 6]], [ENDLESS, SamplingParams(max_tokens=2, ignore_eos=True)])
    assert [len(output.token_ids) for output in both] == [20, 2]
    assert llm.generate([]) == []
    assert llm.chat([{"role": "user", "content": "xyz"}], ENDLESS).text == text_of("xyz", ENDLESS)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "words"),
    [
        ("", None, EmptyPrompt, "no token"),
        (["ok", []], None, EmptyPrompt, "no token"),
        (["ok", "x" * 64], None, PromptTooLong, "64 tokens"),
        ([["o", "k"]], None, BadParameter, "a text or a list of token ids"),
        (["ok", "ok"], [ENDLESS], BadParameter, "2 prompts came with 1 sampling params"),
    ],
    ids=["empty text", "empty tokens", "too long", "no tokens", "params"],
)
def test_nothing_runs_when_one_request_is_wrong(
    llm: LLM, prompts: object, params: object, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.generate(prompts, params)
    assert not llm.core.busy
    assert llm.core.stats().prompt_tokens == 0


def test_streaming_gives_what_blocking_gives(llm: LLM) -> None:
    text = text_of("stream", ENDLESS)
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop=[text[9:11], "never"], n=2, logprobs=1)
    (output,) = llm.generate("stream", params)
    deltas = list(llm.stream("stream", params))
    for choice in output.choices:
        mine = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in mine) == choice.text == text[: text.index(text[9:11])]
        assert [token for delta in mine for token in delta.token_ids] == choice.token_ids
        assert [logprob for delta in mine for logprob in delta.logprobs] == choice.logprobs
        assert len(choice.logprobs) == len(choice.token_ids)
        assert (mine[-1].finish_reason, mine[-1].stop_reason) == ("stop", text[9:11])
        assert (choice.finish_reason, choice.stop_reason) == ("stop", text[9:11])
    assert not llm.core.stats().running


def test_two_streams_take_turns(llm: LLM) -> None:
    pairs = list(zip(llm.stream("one", ENDLESS), llm.stream("two", ENDLESS), strict=True))
    for place, prompt in enumerate(("one", "two")):
        assert "".join(pair[place].text for pair in pairs) == text_of(prompt, ENDLESS)
    assert llm.core.stats().steps < 30


def test_closing_a_stream_cancels_it(llm: LLM) -> None:
    stream = llm.stream("gone", ENDLESS)
    next(stream)
    assert llm.core.stats().running == 1
    stream.close()
    assert (llm.core.stats().running, llm.core.allocator.used) == (0, 0)
    unread = llm.stream("never read", ENDLESS)
    assert not llm.core.stats().waiting
    unread.close()
    assert llm.generate("next", ENDLESS)[0].text == text_of("next", ENDLESS)


def test_stop_strings_and_minimum(llm: LLM) -> None:
    text = text_of("min", ENDLESS)
    stop = next(letter for letter in text if text.count(letter) > 1)
    (kept,) = llm.generate(
        "min", SamplingParams(max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    )
    assert kept.text == text[: text.index(stop) + 1]
    (late,) = llm.generate(
        "min", SamplingParams(max_tokens=20, ignore_eos=True, stop=stop, min_tokens=text.index(stop) + 2)
    )
    assert late.text == text[: text.index(stop, text.index(stop) + 1)]
    cut = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=LetterTokenizer().encode(stop))
    (cut_at_token,) = llm.generate("min", cut)
    assert cut_at_token.text == text[: text.index(stop)]
    assert cut_at_token.token_ids == LetterTokenizer().encode(text[: text.index(stop) + 1])
    assert cut_at_token.stop_reason == cut.stop_token_ids[0]


def test_half_a_character_at_the_end_is_told(llm: LLM) -> None:
    answer = expected(LetterTokenizer().encode("half"), 64, ENDLESS)
    last = next(i for i in range(2, 20) if answer[i] not in answer[:i])

    class Half(LetterTokenizer):
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            text = super().decode(ids, skip_special_tokens)
            return text[:-1] + REPLACEMENT if ids[-1:] == [answer[last]] else text

    llm.tokenizer = Half()
    deltas = list(llm.stream("half", SamplingParams(max_tokens=last + 1, ignore_eos=True)))
    assert "".join(delta.text for delta in deltas) == Half().decode(answer[: last + 1])
    assert deltas[-1].text == REPLACEMENT


def test_choices_with_a_seed_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=3.0, seed=11, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate("seed", params)
    texts = [choice.text for choice in output.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in llm.generate(["x", "seed"], params)[1].choices] == texts
    second = SamplingParams(temperature=3.0, seed=12, max_tokens=12, ignore_eos=True)
    assert llm.generate("seed", second)[0].text == texts[1]


def test_a_failing_step_reaches_the_caller_and_the_model_stays_usable(llm: LLM) -> None:
    bystander = llm.stream("other", ENDLESS)
    next(bystander)
    llm.model.fail_next = True
    with pytest.raises(EngineError, match="told to fail"):
        llm.generate("fails", ENDLESS)
    assert [delta.finish_reason for delta in bystander] == ["abort"]
    assert llm.generate("works", ENDLESS)[0].text == text_of("works", ENDLESS)


def test_strict_reaches_the_kernels(mocked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pared.kernels import dispatch

    class Falling(MockModel):
        def __call__(self, batch: object, cache: object) -> torch.Tensor:
            dispatch.fallback("mock", "it always falls back")
            raise AssertionError("strict let a slower path run")

    monkeypatch.setattr(llm_module, "load", lambda *_: Falling())
    with pytest.raises(FallbackRefused, match="it always falls back"):
        LLM(tmp_path, strict=True, num_blocks=8).generate("x")


def test_folder_defaults(mocked: None, tmp_path: Path) -> None:
    def loaded(generation: dict, config: dict) -> LLM:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        (tmp_path / "config.json").write_text(json.dumps(config))
        return LLM(tmp_path)

    asks = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert loaded(asks, {}).default_params == SamplingParams()
    assert loaded({"do_sample": True, **asks}, {}).default_params == SamplingParams(**asks)
    assert loaded({"do_sample": True}, {}).default_params == SamplingParams(temperature=1.0)
    assert loaded({"eos_token_id": [3, 4]}, {"eos_token_id": 5}).core.eos == {3, 4}
    assert loaded({}, {"eos_token_id": 5}).core.eos == {5}
    assert loaded({}, {}).core.eos == {EOS}
    assert loaded({"eos_token_id": [3, VOCAB]}, {}).core.eos == {3}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(FolderDamaged, match=r"generation_config\.json is no JSON"):
        LLM(tmp_path)


def test_the_size_of_the_cache(mocked: None, tmp_path: Path) -> None:
    assert LLM(tmp_path, max_batch=3, page=16).core.cache.num_blocks == 1 + 3 * 64 // 16
    block = 2 * 4 * 2 * 16 * 4  # k and v, heads of all layers, head_dim, page, fp32
    assert LLM(tmp_path, kv_cache_bytes=10 * block + 1, page=16).core.cache.num_blocks == 10
    with pytest.raises(BadParameter, match="not both"):
        LLM(tmp_path, kv_cache_bytes=1, num_blocks=1)
    with pytest.raises(BadParameter, match="num_blocks=0"):
        LLM(tmp_path, kv_cache_bytes=1)
    with pytest.raises(BadParameter, match="dtype must be bfloat16, float16 or float32, got 'int8'"):
        LLM(tmp_path, dtype="int8")
    free = free_bytes(torch.device("cpu"))
    assert free > 0
    assert cache_blocks(free // 10, 1000, torch.device("cpu")) < 10


def test_context_length_follows_rotary_scaling() -> None:
    def context(kind: str) -> int:
        spec = MockSpec(rope=Rope(kind, 10_000.0, 4, 64, factor=4.0))
        return context_length(spec)

    assert [context(kind) for kind in ("default", "linear", "dynamic", "yarn")] == [64, 256, 256, 64]
    assert context_length(MockSpec()) == 64
