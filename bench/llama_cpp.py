"""llama.cpp as a peer: a dense folder of the Llama architecture as a GGUF file, and its Python package around it.

Its package, built for this machine: `CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary :all: llama-cpp-python`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import SourceError

KINDS = {"bf16": "BF16", "q8_0": "Q8_0"}
"""What the matrices are stored as, by llama.cpp's own names; norms are fp32."""


def write_gguf(folder: Path, out: Path, kind: str) -> None:
    """The weights of a dense Llama folder as a GGUF file without a vocabulary; kind: one of KINDS.

    Raises SourceError for another architecture.
    """
    import gguf

    from ..converters.sources.detect import open_source

    source = open_source(folder)
    config = source.config
    if config.get("model_type") != "llama" or config.get("rope_scaling"):
        raise SourceError(f"{folder} is no plain Llama model; compare with llama.cpp on one that is")
    writer = gguf.GGUFWriter(str(out), "llama")
    _metadata(writer, config)
    for name, tensor in source.tensors(lambda name: False):
        data, stored = tensor.float(), _name(name)
        if stored.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads" if "attn_q" in stored else "num_key_value_heads"]
            data = _neighbouring_pairs(data, heads)
        quantised = gguf.GGMLQuantizationType[KINDS[kind] if data.dim() > 1 else "F32"]
        writer.add_tensor(stored, gguf.quantize(data.contiguous().numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_gguf(path: Path, context: int, threads: int, as_stored: bool) -> Any:
    """llama.cpp's model around a GGUF file, for `context` tokens. Raises SourceError without the package.

    as_stored: it may not lay matrices out anew, as it does for AMX.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise SourceError(
            "llama-cpp-python is not installed; build it for this machine with "
            "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
        )
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = not as_stored
    llama_cpp.llama_model_default_params = lambda: defaults  # Llama has no argument for it
    return Llama(str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)


def _metadata(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _name(name: str) -> str:
    """A tensor's name in a GGUF file."""
    from ..converters.sources.gguf import MODULES, OUTSIDE

    module, _, part = name.rpartition(".")
    outside, inside = ({theirs: ours for ours, theirs in names.items()} for names in (OUTSIDE, MODULES))
    if module in outside:
        return f"{outside[module]}.{part}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{inside[inner]}.{part}"


def _neighbouring_pairs(weight: Any, heads: int) -> Any:
    """Rows of q or k as llama.cpp rotates them, (0, 1), (2, 3) ..., where Hugging Face has (0, D / 2), ..."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
