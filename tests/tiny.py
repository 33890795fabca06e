"""Tiny random models of every family, saved as transformers saves them; shared by the tests of conversion."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama": hf.LlamaConfig(**_SIZES),
    "llama-tied-biased": hf.LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": hf.MistralConfig(**_SIZES),
    "qwen2-tied": hf.Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen3": hf.Qwen3Config(**_SIZES, head_dim=8),
    "phi3": hf.Phi3Config(**_SIZES),
    "opt-projected": hf.OPTConfig(**_OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    "gpt2": hf.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
}


def model(name: str = "llama", dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """A random model, the same one every time; biases and norms are random too, so that losing one shows."""
    torch.manual_seed(0)
    made = hf.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.to(dtype)


def checkpoint(path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """A Hugging Face folder of `model(name)` with a word-level tokenizer: w0 w1 w2 ..."""
    model(name, dtype).save_pretrained(path, **save)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def state(made: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter once: a tied head is the embedding."""
    return {name: parameter.detach() for name, parameter in made.named_parameters()}
