"""families.py: what it reads from a config, and what it refuses by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

from pared import families
from pared.errors import UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def expected_tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint as the spec sees them."""
    spec = families.read(config)
    found = dict(spec.plain())
    for linear in spec.linears().values():
        found[f"{linear.path}.weight"] = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
        if linear.bias:
            found[f"{linear.path}.bias"] = (linear.n,)
    return found


@pytest.mark.parametrize(
    "config",
    [
        LLAMA | {"attention_bias": True, "mlp_bias": True},
        LLAMA | {"tie_word_embeddings": True, "head_dim": 16},
        LLAMA | {"model_type": "mistral"},
        LLAMA | {"model_type": "qwen2"},
        LLAMA | {"model_type": "qwen3", "head_dim": 16},
        LLAMA | {"model_type": "phi3", "pad_token_id": 0},
        OPT,
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
        GPT2,
        GPT2 | {"n_inner": 40, "tie_word_embeddings": False},
    ],
    ids=lambda config: config["model_type"],
)
def test_names_and_shapes_are_those_of_transformers(config: dict) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config))
    spec, expected = families.read(config), expected_tensors(config)
    theirs = {spec.canonical(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs.pop(None, None)
    assert theirs == expected
    backbone = {spec.canonical(name) for name in model.base_model.state_dict()} - {None}
    assert backbone == {name for name in expected if not name.startswith("lm_head")}


def test_a_saved_config_reads_like_the_one_it_was_made_from() -> None:
    """transformers renames rope_scaling to rope_parameters and drops defaults when it saves."""
    old = LLAMA | {
        "rope_theta": 5e5,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    }
    saved = json.loads(hf.AutoConfig.for_model(**old).to_json_string())
    assert "rope_parameters" in saved
    assert families.read(old) == families.read(saved)


def test_windows_follow_each_family() -> None:
    def windows(**more: object) -> list[int]:
        return [layer.window for layer in families.read(LLAMA | more).layers]

    assert windows(model_type="mistral", sliding_window=8) == [8, 8]
    assert windows(model_type="mistral", sliding_window=None) == [0, 0]
    assert windows(model_type="qwen2", sliding_window=8) == [0, 0]  # use_sliding_window is off
    assert windows(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1) == [0, 8]
    per_layer = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert windows(model_type="qwen3", sliding_window=8, **per_layer) == [8, 0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "model_type None"),
        (LLAMA | {"model_type": "gemma2"}, "gemma2"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        (LLAMA | {"hidden_act": "mish"}, "mish"),
        (LLAMA | {"hidden_size": 0}, "hidden_size"),
        (LLAMA | {"hidden_size": "32"}, "hidden_size"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size"),
        (LLAMA | {"num_key_value_heads": 3}, "not a multiple"),
        (LLAMA | {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer types"),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "4"),
        (LLAMA | {"partial_rotary_factor": 0.1}, "rotary dimension"),
        (LLAMA | {"model_type": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        (LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "1 entries"),
        (LLAMA | {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        (LLAMA | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding_window"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_refusals_name_the_key(config: dict, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        families.read(config)


def test_buffers_are_no_weights() -> None:
    assert families.read(LLAMA).canonical("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert families.read(GPT2).canonical("h.0.attn.bias") is None
    assert families.read(GPT2).canonical("h.0.attn.masked_bias") is None
    assert families.read(GPT2).canonical("h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert families.read(OPT).canonical("model.decoder.version") is None
    assert families.read(OPT).canonical("decoder.layers.0.fc1.bias") == "model.decoder.layers.0.fc1.bias"
    assert families.read(OPT).canonical("lm_head.weight") == "model.decoder.embed_tokens.weight"
