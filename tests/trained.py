"""Small models that have learnt something, so that their blocks are not all alike; shared by the tests of depth."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from pared.converters.calibration import Calibration

VOCAB = 40
_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def _config(family: str, layers: int) -> hf.PreTrainedConfig:
    if family == "llama":
        return hf.LlamaConfig(**_ROTARY, num_hidden_layers=layers, tie_word_embeddings=False)
    if family == "qwen2":  # every third layer looks at a short window
        kinds = ["sliding_attention" if i % 3 == 2 else "full_attention" for i in range(layers)]
        window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
        return hf.Qwen2Config(**_ROTARY, num_hidden_layers=layers, tie_word_embeddings=True, **window)
    if family == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
        return hf.OPTConfig(
            **sizes, num_hidden_layers=layers, vocab_size=VOCAB, max_position_embeddings=64, dropout=0.0, init_std=0.15
        )
    sizes = {"n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, "initializer_range": 0.15}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2Config(**sizes, **ends, n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def words(count: int, seed: int = 0) -> list[str]:
    """A text in which the next word mostly follows from the last two."""
    generator = torch.Generator().manual_seed(seed)
    found = [3, 5]
    for jump in torch.rand(count, generator=generator).tolist():
        found.append(3 + int(37 * jump / 0.2) if jump < 0.2 else 3 + (found[-1] * 2 + found[-2] * 5) % 37)
    return [f"w{i}" for i in found]


TEXT = " ".join(words(6000))


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Word-level: w0 w1 w2 ..., padded with w0."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w2")


CALIBRATION = Calibration(tokenizer(), TEXT, "text")


@cache
def _weights(family: str, layers: int, steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(_config(family, layers)).train()
    windows = CALIBRATION.windows(128, 32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = windows[torch.arange(8) * 5 % 128 + step % 8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def model(family: str = "llama", layers: int = 6, steps: int = 40) -> hf.PreTrainedModel:
    """A trained model, fp32, frozen; the same one every time."""
    made = hf.AutoModelForCausalLM.from_config(_config(family, layers))
    made.load_state_dict(_weights(family, layers, steps))
    return made.eval().requires_grad_(False)


def checkpoint(path: Path, family: str = "llama", layers: int = 6) -> Path:
    """The model as a Hugging Face folder."""
    model(family, layers).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
