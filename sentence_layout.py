"""The layout of sentence-transformers around a model: how a folder says that it embeds, read and written.

    modules.json                         which modules follow each other: Transformer, Pooling, perhaps Normalize
    1_Pooling/config.json                how hidden states become one vector
    sentence_bert_config.json            the longest text in tokens
    config_sentence_transformers.json    prompts by name

With these files `SentenceTransformer(folder)` gives the vectors of `pared.Embedder(folder)`. A template closes after
the text, which they cannot say: such a folder has embedding.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from .embedding import FILE, Embedding, Pooling
from .errors import BadParameter, FolderDamaged, UnsupportedModel

MODULES, TRANSFORMER, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING = "1_Pooling"
LAYOUT = (MODULES, TRANSFORMER, SETTINGS, f"{POOLING}/config.json")
_MODES = {"weighted_mean": "weightedmean", "mean": "mean", "last": "lasttoken", "cls": "cls"}
_KEYS = {
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
}
"""What versions before 6 call the modes; newer ones read both."""


def files(embedding: Embedding, width: int) -> dict[str, bytes]:
    """The files that make a folder an encoder of vectors [width], by their path in it."""
    made: dict[str, Any] = {FILE: json.loads(embedding.file())}
    if embedding.template == "none":
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * embedding.normalize
        made[MODULES] = [_module(i, kind) for i, kind in enumerate(kinds)]
        modes = {key: mode == _MODES[embedding.pooling] for mode, key in _KEYS.items()}
        made[f"{POOLING}/config.json"] = {
            "word_embedding_dimension": width,
            **modes,
            "include_prompt": not embedding.skip_instruction,
        }
        made[TRANSFORMER] = {"max_seq_length": embedding.max_length, "do_lower_case": False}
        made[SETTINGS] = {
            "prompts": embedding.prompts,
            "default_prompt_name": embedding.default_prompt,
            "similarity_fn_name": "cosine",
        }
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in made.items()}


def read(path: str | Path) -> Embedding | None:
    """How the folder embeds: what embedding.json says, else what sentence-transformers' files say; None without any.

    Raises UnsupportedModel naming what pared does not compute, FolderDamaged for a file that is not as it should be.
    """
    path = Path(path)
    if (path / FILE).exists():
        try:
            return Embedding.parse(_json(path / FILE, dict))
        except BadParameter as wrong:
            raise FolderDamaged(f"{path}: {wrong}") from None
    if not (path / MODULES).exists():
        return None
    modules = _json(path / MODULES, list)
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise UnsupportedModel(f"{path / MODULES}: {', '.join(kinds)}; pared runs Transformer, Pooling, Normalize")
        pooling = _json(path / modules[1]["path"] / "config.json", dict)
        settings = _json(path / SETTINGS, dict) if (path / SETTINGS).exists() else {}
        return Embedding(
            pooling=_pooling(path, pooling),
            max_length=_max_length(path / TRANSFORMER),
            skip_instruction=not pooling.get("include_prompt", True),
            normalize=len(kinds) > 2,
            prompts=dict(settings.get("prompts") or {}),
            default_prompt=settings.get("default_prompt_name"),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as wrong:
        raise FolderDamaged(f"{path}: {MODULES} and its neighbours are not of the right form ({wrong!r})") from None


def _module(i: int, kind: str) -> dict[str, Any]:
    place = f"{i}_{kind}" if i else ""
    return {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}


def _pooling(path: Path, config: Mapping[str, Any]) -> Pooling:
    named = config.get("pooling_mode", [mode for mode, key in _KEYS.items() if config.get(key)])
    modes = [named] if isinstance(named, str) else list(named)
    for ours in get_args(Pooling):
        if modes == [_MODES[ours]]:
            return ours
    raise UnsupportedModel(f"{path}: pooling {' and '.join(modes) or 'of no kind'} is not one of {', '.join(_KEYS)}")


def _max_length(path: Path) -> int | None:
    """The longest text in tokens. Whatever else the file asks for is refused, but for what does nothing."""
    config = _json(path, dict) if path.exists() else {}
    plain = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    idle = {
        "transformer_task": "feature-extraction",
        "modality_config": plain,
        "module_output_name": "token_embeddings",
    }
    for key, value in config.items():
        if key != "max_seq_length" and value and value != idle.get(key):
            raise UnsupportedModel(f"{path}: {key} is {value!r}, which pared does not do")
    return config.get("max_seq_length")


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        raise FolderDamaged(f"{path} cannot be read as JSON ({wrong}); copy the folder again") from None
    if not isinstance(content, kind):
        raise FolderDamaged(f"{path} is JSON, but no {kind.__name__}; copy the folder again")
    return content
