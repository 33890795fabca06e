"""One table per decoder family: where Hugging Face keeps each weight, and which switches the config sets.

`read(config)` turns a `config.json` into a `Spec`. A value that pared cannot run exactly is refused by
name; nothing is guessed. Llama, Mistral, Qwen2, Qwen3, Phi-3, OPT and GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .errors import UnsupportedModel
from .spec import WIDTHS, Layer, Names, Rope, Spec

Config = dict[str, Any]

_LLAMA = Names(
    layer="model.layers.{i}.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    embed="model.embed_tokens",
    final_norm="model.norm",
)
_PHI3 = replace(_LLAMA, qkv=("self_attn.qkv_proj",), ffn_in=("mlp.gate_up_proj",))
_OPT = Names(
    layer="model.decoder.layers.{i}.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    ffn_in=("fc1",),
    ffn_out="fc2",
    attn_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    embed="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
)
_GPT2 = Names(
    layer="transformer.h.{i}.",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    ffn_in=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    attn_norm="ln_1",
    ffn_norm="ln_2",
    embed="transformer.wte",
    final_norm="transformer.ln_f",
    positions="transformer.wpe",
)


# --- reading a config --------------------------------------------------------------------------

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh"), "gelu_new"
)


def read(config: Config) -> Spec:
    """Turn a Hugging Face `config.json` into a `Spec`.

    Raises UnsupportedModel, naming the key and its value, for whatever pared cannot run exactly.
    """
    family = config.get("model_type")
    reader = _FAMILIES.get(family) if isinstance(family, str) else None
    if reader is None:
        raise UnsupportedModel(f"model_type {family!r} is not one of {', '.join(_FAMILIES)}")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel("is_encoder_decoder is true: pared runs decoders only")
    foreign = (config.get("quantization_config") or {}).get("quant_method", "pared")
    if foreign != "pared":
        raise UnsupportedModel(f"quantization_config.quant_method is {foreign!r}: convert the unquantised checkpoint")
    try:
        spec = replace(reader(config), causal=config.get("is_causal") is not False)
    except KeyError as missing:
        raise UnsupportedModel(f"config.json of model_type {family!r} lacks {missing}") from None
    if not spec.causal and any(layer.window for layer in spec.layers):
        raise UnsupportedModel("is_causal is false beside sliding windows, which pared does not run")
    return spec if config.get(WIDTHS) is None else spec.narrowed(config[WIDTHS])


def _act(config: Config, key: str, default: str) -> str:
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{key} {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _count(config: Config, key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{key} must be a positive integer, got {value!r}")
    return value


def _rope(config: Config, head_dim: int, kinds: tuple[str, ...] | None = None) -> Rope:
    """The rotary switches, from today's `rope_parameters` or yesterday's `rope_theta` and `rope_scaling`."""
    given: Config = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise UnsupportedModel("rope_parameters differs between layer types, which pared does not run")
    kind = given.get("rope_type", given.get("type", "default"))
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what the first Phi-3 releases called it
    if kind not in (kinds or ("default", "linear", "dynamic", "llama3", "yarn", "longrope")):
        raise UnsupportedModel(f"rope_type {kind!r} is not one that pared runs for {config['model_type']}")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    trained = _count(config, "max_position_embeddings")
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = int(original or (4096 if config["model_type"] == "phi3" else trained))
    rope = Rope(
        kind=kind,
        theta=float(given.get("rope_theta") or config.get("rope_theta") or 10000.0),
        dim=int(head_dim * partial),
        max_positions=trained,
        factor=float(given.get("factor") or trained / original),
        original=original,
        attention_factor=given.get("attention_factor"),
        beta_fast=given.get("beta_fast") or 32.0,
        beta_slow=given.get("beta_slow") or 1.0,
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=given.get("truncate", True),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        short_factor=tuple(given.get("short_factor") or ()),
        long_factor=tuple(given.get("long_factor") or ()),
    )
    _check_rope(rope, given)
    return rope


def _check_rope(rope: Rope, given: Config) -> None:
    needed = {"linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    for key in needed.get(rope.kind, []):
        if given.get(key) is None:
            raise UnsupportedModel(f"rope_type {rope.kind!r} needs {key!r}, which config.json does not give")
    if rope.kind == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(getattr(rope, key)) != rope.dim // 2:
                raise UnsupportedModel(
                    f"rope {key} has {len(getattr(rope, key))} numbers, not {rope.dim // 2} (half of the rotated dims)"
                )
    if rope.dim < 2 or rope.dim % 2:
        raise UnsupportedModel(f"rotary dimension {rope.dim} is not a positive even number")


def _windows(config: Config, layers: int, family: str) -> list[int]:
    """Keys that each layer may see, 0 for all: Mistral and Phi-3 have one rule, Qwen one per layer."""
    size = config.get("sliding_window")
    if family in ("mistral", "phi3"):
        return [int(size or 0)] * layers
    if family == "llama" or not config.get("use_sliding_window"):
        size = None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if size and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise UnsupportedModel(f"layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"layer type {kind!r} is not full_attention or sliding_attention")
        if kind == "sliding_attention" and not size:
            raise UnsupportedModel("layer_types names sliding_attention, but sliding_window is not set")
    return [int(size or 0) if kind == "sliding_attention" else 0 for kind in kinds]


def _blocks(heads: int, kv_heads: int, ffn: int, windows: list[int], scales: list[float]) -> tuple[Layer, ...]:
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} attention heads are not a multiple of {kv_heads} key/value heads")
    return tuple(Layer(heads, kv_heads, ffn, w, s) for w, s in zip(windows, scales, strict=True))


def _llama_like(config: Config) -> Spec:
    """Llama, Mistral, Qwen2, Qwen3 and Phi-3: RMSNorm, rotary positions, gated FFN."""
    family = config["model_type"]
    hidden, heads, count = (_count(config, k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads))
    eps = {"phi3": 1e-5}.get(family, 1e-6)
    attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    mlp_bias = bool(config.get("mlp_bias", False)) and family == "llama"
    kv_heads = config.get("num_key_value_heads", 8 if family == "mistral" else None) or heads
    windows = _windows(config, count, family)
    return Spec(
        family=family,
        names=_PHI3 if family == "phi3" else _LLAMA,
        vocab=_count(config, "vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        head_dim=head_dim,
        layers=_blocks(heads, kv_heads, _count(config, "intermediate_size"), windows, [head_dim**-0.5] * count),
        max_positions=_count(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm="rms",
        norm_eps=float(config.get("rms_norm_eps", eps)),
        norm_affine=True,
        pre_norm=True,
        final_norm=True,
        gated=True,
        act=_act(config, "hidden_act", "silu"),
        qkv_bias=attention_bias or family == "qwen2",
        out_bias=attention_bias,
        ffn_in_bias=mlp_bias,
        ffn_out_bias=mlp_bias,
        qk_norm=family == "qwen3",
        rope=_rope(config, head_dim, ("default", "longrope") if family == "phi3" else None),
    )


def _opt(config: Config) -> Spec:
    """OPT: learned positions with offset 2, ReLU by default; the 350m one is post-norm and projects its embeddings."""
    hidden, heads, count = (_count(config, k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    bias, before = bool(config.get("enable_bias", True)), bool(config.get("do_layer_norm_before", True))
    head_dim = hidden // heads
    return Spec(
        family="opt",
        names=_OPT,
        vocab=_count(config, "vocab_size"),
        hidden=hidden,
        embed_dim=int(config.get("word_embed_proj_dim") or hidden),
        head_dim=head_dim,
        layers=_blocks(heads, heads, _count(config, "ffn_dim"), [0] * count, [head_dim**-0.5] * count),
        max_positions=_count(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", True)),
        norm="layer",
        norm_eps=1e-5,
        norm_affine=bool(config.get("layer_norm_elementwise_affine", True)),
        pre_norm=before,
        final_norm=before and not config.get("_remove_final_layer_norm", False),
        gated=False,
        act=_act(config, "activation_function", "relu"),
        qkv_bias=bias,
        out_bias=bias,
        ffn_in_bias=bias,
        ffn_out_bias=bias,
        qk_norm=False,
        rope=None,
        position_offset=2,
    )


def _gpt2(config: Config) -> Spec:
    """GPT-2: learned positions, fused c_attn, weights stored as [inputs, outputs]."""
    if config.get("add_cross_attention"):
        raise UnsupportedModel("add_cross_attention is true: pared runs decoders only")
    hidden, heads, count = (_count(config, k) for k in ("n_embd", "n_head", "n_layer"))
    head_dim = hidden // heads
    base = head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    scales = [base / (i + 1) if by_layer else base for i in range(count)]
    return Spec(
        family="gpt2",
        names=_GPT2,
        vocab=_count(config, "vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        head_dim=head_dim,
        layers=_blocks(heads, heads, int(config.get("n_inner") or 4 * hidden), [0] * count, scales),
        max_positions=_count(config, "n_positions"),
        tied=bool(config.get("tie_word_embeddings", True)),
        norm="layer",
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        norm_affine=True,
        pre_norm=True,
        final_norm=True,
        gated=False,
        act=_act(config, "activation_function", "gelu_new"),
        qkv_bias=True,
        out_bias=True,
        ffn_in_bias=True,
        ffn_out_bias=True,
        qk_norm=False,
        rope=None,
        transposed=True,
    )


_FAMILIES: dict[str, Callable[[Config], Spec]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "phi3": _llama_like,
    "opt": _opt,
    "gpt2": _gpt2,
}
