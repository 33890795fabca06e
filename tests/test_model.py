"""The decoder against transformers: every family and variant, tiny random weights, fp32, largest difference 1e-5.

Three sequences of different lengths share each batch. They are prefilled at once, or chunk by chunk with
decode steps in between, in scattered pages; some run beyond the sliding window or the original context.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import transformers as hf

from pared.convert import convert
from pared.kernels.native import library
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.loader import load
from pared.runtime.model import Decoder

PAGE = 4
BOUND = 1e-5
LENGTHS = (5, 23, 41)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64, "eos_token_id": 2}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


def rope(kind: str, **more: object) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def phi3(**more: object) -> hf.PreTrainedConfig:
    return hf.Phi3Config(**{**SIZES, **more})


VARIANTS = {
    "llama": hf.LlamaConfig(**SIZES),
    "llama-tied-biased": hf.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-head_dim": hf.LlamaConfig(**SIZES, head_dim=16),
    "llama-gelu": hf.LlamaConfig(**SIZES, hidden_act="gelu"),
    "llama-gelu_tanh": hf.LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "llama-linear": hf.LlamaConfig(**SIZES, **rope("linear", factor=4.0)),
    "llama-dynamic": hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, **rope("dynamic", factor=4.0)),
    "llama-llama3": hf.LlamaConfig(
        **SIZES,
        **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": hf.LlamaConfig(**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": hf.LlamaConfig(
        **SIZES,
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9, truncate=False),
    ),
    "llama-longrope": hf.LlamaConfig(**SIZES, **rope("longrope", original_max_position_embeddings=16, **LONG)),
    "mistral-window": hf.MistralConfig(**SIZES, sliding_window=7),
    "mistral-full": hf.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen2-window": hf.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=16),
    "qwen3-window-biased": hf.Qwen3Config(
        **SIZES,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "phi3": phi3(),
    "phi3-window": phi3(sliding_window=9),
    "phi3-longrope": phi3(original_max_position_embeddings=16, **rope("longrope", **LONG)),
    "phi3-partial": phi3(**rope("default", partial_rotary_factor=0.5)),
    "opt-125m": hf.OPTConfig(**OPT),
    "opt-350m": hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-bare": hf.OPTConfig(
        **OPT,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "opt-old": hf.OPTConfig(**OPT, _remove_final_layer_norm=True),
    "gpt2": hf.GPT2Config(**GPT2),
    "gpt2-scales": hf.GPT2Config(**GPT2, n_inner=40, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False),
    "gpt2-unscaled": hf.GPT2Config(**GPT2, scale_attn_weights=False, activation_function="relu"),
}


def random_model(config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    """Weights large enough that logits differ by far more than the bound; no bias or norm at its neutral value."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            centre = 0.0 if name.endswith("bias") else centre
            parameter.normal_(centre, 0.15)
    return model


@dataclass
class Sequence:
    """A sequence by hand: its tokens, how many of them ran, and the pages it owns."""

    tokens: list[int]
    floor: int
    blocks: list[int]
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


class Runner:
    """Feeds chosen numbers of tokens of each sequence as one batch, all rows' logits wanted."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        spec = decoder.spec
        self.cache = KVCache([y.kv_heads for y in spec.layers], spec.head_dim, 64, PAGE, decoder.dtype, "cpu")
        for pool in (p for pools in self.cache.layers for p in pools):
            pool.fill_(float("nan"))  # a key that was never written must not be read
        self.free = torch.randperm(63, generator=torch.Generator().manual_seed(1)).add(1).tolist()

    def sequence(self, tokens: list[int], floor: int) -> Sequence:
        return Sequence(tokens, floor, [self.free.pop() for _ in range(-(-len(tokens) // PAGE))])

    def run(self, work: list[tuple[Sequence, int]]) -> None:
        positions, tokens, slots, lens, starts, context = [], [], [], [], [0], []
        for sequence, count in work:
            for p in range(sequence.done, sequence.done + count):
                positions.append(p)
                tokens.append(sequence.tokens[p])
                slots.append(sequence.blocks[p // PAGE] * PAGE + p % PAGE)
                lens.append(max(sequence.floor, p + 1))
            sequence.done += count
            starts.append(len(tokens))
            context.append(sequence.done)
        width = max(len(s.blocks) for s, _ in work)
        tables = [s.blocks + [0] * (width - len(s.blocks)) for s, _ in work]
        batch = Batch(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            rope_lens=torch.tensor(lens),
            slots=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(tokens)),
            max_query=max(count for _, count in work),
        )
        logits = self.decoder(batch, self.cache)
        assert logits.dtype == torch.float32
        for (sequence, count), first in zip(work, starts, strict=False):
            sequence.logits.extend(logits[first : first + count])


def theirs(model: hf.PreTrainedModel, tokens: list[int], prompt: int) -> torch.Tensor:
    """Logits of every position: the prompt in one pass, the rest token by token over transformers' cache."""
    model = copy.deepcopy(model)  # dynamic rotary tables remember the longest sequence they have seen
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model(ids[:, :prompt], use_cache=True)
        rows, cache = [out.logits[0]], out.past_key_values
        for p in range(prompt, len(tokens)):
            out = model(ids[:, p : p + 1], past_key_values=cache, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows)


def token_rows(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(params=list(VARIANTS), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A transformers model and our decoder of the same weights, by way of the compact folder."""
    model = random_model(VARIANTS[request.param])
    folder: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "compact", progress=False)
    return model, load(folder / "compact", device="cpu")


def check(sequence: Sequence, truth: torch.Tensor) -> None:
    ours = torch.stack(sequence.logits)
    assert truth.std() > 0.1, "the model says nothing: the comparison would prove nothing"
    assert (ours - truth).abs().max() <= BOUND


def test_prefill_of_a_mixed_batch(pair: tuple) -> None:
    model, decoder = pair
    runner = Runner(decoder)
    sequences = [runner.sequence(tokens, floor=len(tokens)) for tokens in token_rows(96)]
    runner.run([(s, len(s.tokens)) for s in sequences])
    for s in sequences:
        check(s, theirs(model, s.tokens, prompt=len(s.tokens)))


def test_chunked_prefill_and_decode_in_one_batch(pair: tuple) -> None:
    """Prompts of 3, 9 and 29 tokens, fed in chunks of at most 8, the others decoding meanwhile."""
    model, decoder = pair
    runner = Runner(decoder)
    prompts = (3, 9, 29)
    sequences = [runner.sequence(t, floor=p) for t, p in zip(token_rows(96), prompts, strict=True)]
    while any(s.done < len(s.tokens) for s in sequences):
        work = []
        for s, prompt in zip(sequences, prompts, strict=True):
            left = min(8, prompt - s.done) if s.done < prompt else 1
            if s.done < len(s.tokens):
                work.append((s, left))
        runner.run(work)
    for s, prompt in zip(sequences, prompts, strict=True):
        check(s, theirs(model, s.tokens, prompt))


@pytest.mark.skipif(not library.load() or library.load().level == "scalar", reason="torch's head rounds")
def test_logits_of_a_bf16_model_are_fp32_sums(tmp_path: Path) -> None:
    model = random_model(hf.LlamaConfig(**{**SIZES, "vocab_size": 4000})).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "compact", progress=False)
    decoder, hidden = load(tmp_path / "compact", device="cpu"), []
    head = decoder.weights.head
    decoder.weights = replace(decoder.weights, head=lambda x, wide: (hidden.append(x), head(x, wide))[1])
    runner = Runner(decoder)
    sequences = [runner.sequence(tokens, floor=len(tokens)) for tokens in token_rows(4000)]
    runner.run([(s, len(s.tokens)) for s in sequences])
    logits = torch.cat([torch.stack(s.logits) for s in sequences])
    x, weight = hidden[0], model.lm_head.weight.detach()
    truth, rounded = x.double() @ weight.double().t(), torch.nn.functional.linear(x, weight).float()
    assert (logits - truth).abs().max() < 1e-3 * (rounded - truth).abs().max()

    def ties(rows: torch.Tensor) -> int:
        first, second = rows.topk(2).values.unbind(1)
        return int((first == second).sum())

    assert ties(rounded) > 0
    assert ties(logits) == 0
