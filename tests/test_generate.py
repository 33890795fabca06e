"""The real model through the whole engine, judged by transformers.

Greedy tokens are compared by reading each answer back: transformers' logits over prompt and answer must prefer every
token that we chose. That is its greedy answer, by induction, and costs one forward pass instead of 64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from pared.convert import convert
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.engine import EngineCore
from pared.runtime.llm import LLM
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.tests.mock_model import run, tokens_of

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> LLM:
    return LLM(smollm2, dtype="float32", device="cpu", max_batch=32, num_blocks=400)


@pytest.fixture(scope="module")
def prompts(llm: LLM, real_prompts: list[str]) -> list[list[int]]:
    return [llm.tokenizer.encode(prompt) for prompt in real_prompts]


@pytest.fixture(scope="module")
def together(llm: LLM, real_prompts: list[str]) -> list[list[int]]:
    """All prompts in one continuous batch."""
    return [output.token_ids for output in llm.generate(real_prompts, GREEDY)]


def answers(
    model: Callable,
    prompts: list[list[int]],
    *,
    num_blocks: int = 400,
    max_batch: int = 32,
    chunk: int = 1024,
    max_tokens: int = 64,
) -> tuple[list[list[int]], EngineCore]:
    """The greedy answers under other limits than the fixture's, and the engine that gave them."""
    spec = model.spec
    cache = KVCache([layer.kv_heads for layer in spec.layers], spec.head_dim, num_blocks, 16, model.dtype, "cpu")
    core = EngineCore(model, cache, context=1024, eos=frozenset(), max_batch=max_batch, chunk=chunk)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    asked = [core.add(prompt, params) for prompt in prompts]
    outputs = run(core)
    return [tokens_of(outputs[id]) for id in asked], core


def hf_logits(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """transformers' logits [len(answer), V] from which each token of the answer would be chosen."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].float()


def test_greedy_tokens_are_those_of_transformers(smollm2_hf, prompts: list, together: list) -> None:
    assert len(prompts) == 20
    for prompt, answer in zip(prompts, together, strict=True):
        assert len(answer) == 64
        assert hf_logits(smollm2_hf, prompt, answer).argmax(-1).tolist() == answer


def test_reading_back_is_what_generate_gives(smollm2_hf, prompts: list, together: list) -> None:
    with torch.inference_mode():
        whole = smollm2_hf.generate(
            torch.tensor([prompts[3]]),
            attention_mask=torch.ones(1, len(prompts[3]), dtype=torch.long),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
        )
    assert whole[0, len(prompts[3]) :].tolist() == together[3]


def test_alone_each_prompt_gets_the_same_answer(llm: LLM, prompts: list, together: list) -> None:
    assert [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts] == together


def test_chunked_prefill_changes_nothing(llm: LLM, prompts: list, together: list) -> None:
    found, core = answers(llm.model, prompts, max_batch=20, chunk=23)
    assert found == together
    assert core.stats().steps > 64 + 6


def test_preemption_changes_nothing(llm: LLM, prompts: list, together: list) -> None:
    found, core = answers(llm.model, prompts, num_blocks=48)
    assert found == together
    assert core.stats().preemptions > 5
    assert core.stats().computed_tokens > sum(map(len, prompts)) + 20 * 63


def test_streaming_is_blocking(llm: LLM, real_prompts: list) -> None:
    params = SamplingParams(max_tokens=24, stop=["\n\n\n", " the"], include_stop_str_in_output=True)
    for prompt in real_prompts[:3]:
        (whole,) = llm.generate(prompt, params)
        deltas = list(llm.stream(prompt, params))
        assert "".join(delta.text for delta in deltas) == whole.text
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        assert deltas[-1].finish_reason == whole.finish_reason
        if whole.stop_reason == " the":
            assert whole.text.endswith(" the")
            assert whole.text.count(" the") == 1


def test_logprobs_are_those_of_transformers(smollm2_hf, llm: LLM, prompts: list, together: list) -> None:
    (output,) = llm.generate(prompts[0], SamplingParams(max_tokens=16, ignore_eos=True, logprobs=3))
    assert output.token_ids == together[0][:16]
    truth = hf_logits(smollm2_hf, prompts[0], output.token_ids).log_softmax(-1)
    got = torch.tensor([one.logprob for one in output.logprobs])
    want = truth[range(16), output.token_ids]
    top = torch.tensor([[value for _, value in one.top] for one in output.logprobs])
    # Two fp32 computations of logits around 20 in different orders: a few units of their last place.
    assert (got - want).abs().max() < 1e-4
    assert (top - truth.topk(3).values).abs().max() < 1e-4
    assert [one.top[0][0] for one in output.logprobs] == output.token_ids


def test_seeds_reproduce_whatever_else_runs(llm: LLM, real_prompts: list) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=16, n=2)
    (alone,) = llm.generate(real_prompts[0], params)
    others = [SamplingParams(temperature=1.0, max_tokens=16), SamplingParams(temperature=0.8, top_k=4, max_tokens=16)]
    crowded = llm.generate([*real_prompts[1:3], real_prompts[0]], [*others, params])[-1]
    assert [choice.token_ids for choice in crowded.choices] == [choice.token_ids for choice in alone.choices]
    assert alone.choices[0].token_ids != alone.choices[1].token_ids


def test_chat_ends_where_the_model_ends_it(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    output = llm.chat(messages, SamplingParams(max_tokens=40))
    assert "Paris" in output.text
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert output.token_ids[-1] == llm.tokenizer.eos
    assert "<|im_end|>" not in output.text


@pytest.fixture(params=["phi3-longrope", "llama-dynamic"])
def growing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple:
    """A tiny random model whose rotary tables change once a sequence passes 16 tokens, and our decoder of it."""
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared |= {
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    if request.param == "phi3-longrope":
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
        limits = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        config = transformers.Phi3Config(**shared, **limits, rope_parameters=rope)
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = transformers.LlamaConfig(**shared, max_position_embeddings=16, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.2)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False)
    return model, load(tmp_path / "compact", device="cpu")


@pytest.mark.parametrize("num_blocks", [40, 9], ids=["roomy", "preempted"])
def test_rotary_tables_that_change_with_length(growing: tuple, num_blocks: int) -> None:
    model, decoder = growing
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (3, 11, 15, 16, 17, 30)]
    found, core = answers(decoder, prompts, num_blocks=num_blocks, chunk=32, max_tokens=24)
    assert bool(core.stats().preemptions) is (num_blocks == 9)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        theirs = copy.deepcopy(model).generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert answer == theirs[0, len(prompt) :].tolist()


class Recorded:
    """A model that keeps the logits it gave, by sequence: its first KV block names it while nobody is preempted."""

    def __init__(self, model: Callable) -> None:
        self.model, self.spec, self.dtype = model, model.spec, model.dtype
        self.logits: dict[int, list[torch.Tensor]] = {}

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        logits = self.model(batch, cache)
        owner = torch.searchsorted(batch.query_starts, batch.logit_rows, right=True) - 1
        for row, first in zip(logits, batch.block_tables[owner, 0].tolist(), strict=True):
            self.logits.setdefault(first, []).append(row.clone())
        return logits


def test_bf16_differs_only_where_rounding_decides(smollm2: Path, prompts: list, together: list) -> None:
    """Alone and batched run other kernels. The two may part only where the best two logits are closer than the
    error measured between both paths on the tokens before."""
    model = LLM(smollm2, dtype="bfloat16", device="cpu", num_blocks=2).model
    crowd = Recorded(model)
    batched, _ = answers(crowd, prompts, max_batch=20)
    in_crowd = list(crowd.logits.values())
    count, differing, errors, gaps = 8, 0, [], []
    for place in range(count):
        lone = Recorded(model)
        ((alone,), _) = answers(lone, [prompts[place]])
        (mine,) = lone.logits.values()
        differing += sum(a != b for a, b in zip(alone, batched[place], strict=True))
        same = next((i for i in range(64) if alone[i] != batched[place][i]), 64)
        errors += [(mine[i] - in_crowd[place][i]).abs().max().item() for i in range(same)]
        if same < 64:
            best = mine[same].topk(2).values
            gaps.append((best[0] - best[1]).item())
    from_fp32 = sum(a != b for one, two in zip(batched, together, strict=True) for a, b in zip(one, two, strict=True))
    print(
        f"bf16: {differing / (64 * count):.1%} of tokens differ between alone and batched, {from_fp32 / 1280:.1%} from "
        f"fp32; logit error up to {max(errors):.3f}, gaps where they part {[round(gap, 3) for gap in gaps]}"
    )
    assert all(gap < max(errors) for gap in gaps)
