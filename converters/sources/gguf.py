"""GGUF files of the Llama architecture: weights dequantised to fp32, config and tokenizer made from the metadata.

llama.cpp rotates neighbouring pairs (0, 1), (2, 3), ... of each head where Hugging Face rotates (0, D/2),
(1, D/2 + 1), ...: it stores the rows of q and k in that order, and they are put back here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ...errors import SourceError
from .source import Skip, Source

MODULES = {  # in a block: GGUF's name -> Hugging Face's
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # Hugging Face's name -> GGUF's
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens that the tokenizer never splits

_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


class _Metadata:
    """The key-value pairs of a file; a missing or foreign one is named."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path, self._fields = path, reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise SourceError(f"{self.path} lacks {key}; it is no complete GGUF file of a Llama model")
        return value

    def refuse_unless(self, key: str, allowed: tuple[Any, ...]) -> None:
        value = self.get(key)
        if value not in allowed:
            known = " or ".join(repr(one) for one in allowed if one is not None)
            raise SourceError(
                f"{self.path} has {key} {value!r}, pared reads {known or 'files without it'}; "
                "convert the Hugging Face checkpoint that it was made from"
            )


def open_source(path: Path) -> Source:
    """Open a GGUF file of a Llama-architecture model with a byte-level BPE tokenizer that is known exactly."""
    reader = _reader(path)
    metadata = _Metadata(path, reader)
    metadata.refuse_unless("general.architecture", ("llama",))
    metadata.refuse_unless("llama.expert_count", (None, 0))
    metadata.refuse_unless("llama.rope.scaling.type", (None, "none"))
    config = _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))

    def tensors(skip: Skip) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in reader.tensors:
            name = _name(path, tensor.name)
            if not skip(name):
                yield name, _weight(path, tensor, config)

    stat = path.stat()
    fingerprint = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {json.dumps(config)}".encode()).hexdigest()
    return Source(path, "gguf", config, _files(metadata), tensors, fingerprint)


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError, UnicodeDecodeError) as wrong:
        raise SourceError(
            f"{path} is truncated or no GGUF file that can be read ({wrong}); download it again"
        ) from None


def _config(metadata: _Metadata, tied: bool) -> dict[str, Any]:
    """The config.json that the Hugging Face checkpoint of this model has."""
    hidden, heads = metadata.need("llama.embedding_length"), metadata.need("llama.attention.head_count")
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata.need("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata.need("llama.context_length"),
        "rms_norm_eps": _decimal(metadata.need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,  # for engines that do not know rope_parameters yet
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_token_ids(metadata),
        "dtype": "float32",
    }


def _token_ids(metadata: _Metadata) -> dict[str, int]:
    """bos, eos and pad, as both config.json and generation_config.json name them."""
    ids = {name: metadata.get(f"tokenizer.ggml.{_SPECIAL[name]}_token_id") for name in ("bos", "eos", "pad")}
    return {f"{name}_token_id": token for name, token in ids.items() if token is not None}


def _decimal(value: float) -> float:
    """The shortest decimal of a number that was stored as fp32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _name(path: Path, stored: str) -> str:
    """The Hugging Face name of a tensor."""
    parts = stored.split(".")
    if len(parts) == 2 and parts[0] in OUTSIDE:
        return f"{OUTSIDE[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in MODULES:
        return f"model.layers.{parts[1]}.{MODULES[parts[2]]}.{parts[3]}"
    raise SourceError(f"{path} holds {stored}, which pared does not know; convert the checkpoint that it was made from")


def _weight(path: Path, tensor: Any, config: dict[str, Any]) -> torch.Tensor:
    """The tensor in fp32, in Hugging Face's row order."""
    try:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except (NotImplementedError, ValueError) as wrong:
        raise SourceError(f"{tensor.name} in {path} is stored as {tensor.tensor_type.name}: {wrong}") from None
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    module = tensor.name.split(".")[-2]
    return _half_split(weight, heads[module]) if module in heads else weight


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[H * D, ...] with the rows of each head in pairs -> all first ones of the pairs, then all second ones."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


# --- the tokenizer ----------------------------------------------------------------------------------


def _files(metadata: _Metadata) -> dict[str, bytes | Path]:
    metadata.refuse_unless("tokenizer.ggml.model", ("gpt2",))
    metadata.refuse_unless("tokenizer.ggml.pre", tuple(_PRE_TOKENIZERS))
    metadata.refuse_unless("tokenizer.ggml.add_bos_token", (None, False))
    tokens = metadata.need("tokenizer.ggml.tokens")
    special = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[token] for name, token in special.items() if token is not None},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.need("llama.context_length"),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    return {
        "tokenizer.json": _tokenizer(metadata, tokens).to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(_token_ids(metadata), indent=2).encode(),
    }


def _tokenizer(metadata: _Metadata, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.need("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[metadata.need("tokenizer.ggml.pre")]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.need("tokenizer.ggml.token_type")
    whole = [(t, kind) for t, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in whole])
    return tokenizer
