"""Decode speed of SmolLM2-135M under the ranks of bench/quality.py's rows, on this CPU, in turns with the dense model.

The weights are random: only their shapes matter for speed. What the rows cost in quality is in
results/quality_basis_sharing.json; bench/plots.py puts the two together.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..kernels.dispatch import set_threads
from . import record

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DENSE, MODE = "dense", "recorded"


def measure(keys: list[str], rounds: int, context: int = 128, tokens: int = 48) -> dict[str, Any]:
    """Tokens per second of the quality rows `keys`, one turn of each a round in changing order.

    Raises KernelError where a model's decode and prefill disagree.
    """
    import torch

    from .. import families
    from .gpu.decode import Subject
    from .gpu.setting import Setting

    setting = Setting(False, torch.device("cpu"), torch.bfloat16, 1, 1, rounds, context, tokens, rows=())
    result, rows = record.circumstances(), quality_rows()
    spec, subjects = families.read(CONFIG), dict[str, Subject]()
    for key in (DENSE, *keys):
        subjects[key] = Subject(spec, _bases(rows[key].get("settings")), setting)
        subjects[key].check()
    speeds: dict[str, list[float]] = {key: [] for key in subjects}
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        for at in torch.randperm(len(subjects), generator=generator).tolist():
            key = list(subjects)[at]
            speeds[key].append(subjects[key].tokens_per_second(MODE))
    return {
        **result,
        "model": "SmolLM2-135M, random weights",
        "dtype": setting.name,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "context": context,
        "generated": tokens,
        "rows": {
            key: {
                "tokens_per_second": record.quartiles(speeds[key]),
                "ratio_to_dense": record.ratios(speeds[DENSE], speeds[key]),
                "bytes_per_token": subject.weight_bytes(),
            }
            for key, subject in subjects.items()
        },
    }


def _bases(settings: dict[str, Any] | None) -> Any:
    """The bases of a quality row, None for the dense one."""
    from .gpu.decode import Bases

    return Bases(settings["ratio"], settings["group"], settings.get("ranks", "paper")) if settings else None


def quality_rows() -> dict[str, Any]:
    """The rows of the quality table by their keys."""
    text = (record.RESULTS / "quality_basis_sharing.json").read_text(encoding="utf-8")
    rows: dict[str, Any] = json.loads(text)["rows"]
    return rows


def comparable() -> list[str]:
    """Rows with a basis of its own for every linear, as the random models have, that were recovered too."""
    return [key for key, row in quality_rows().items() if "recovered" in row and row["settings"]["group"] == 1]


def main() -> None:
    """A table, and JSON beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    set_threads()
    from ..terminal import print_table

    result = measure(comparable(), options.rounds)
    record.write("decode_basis_sharing_cpu", result)
    rows = [
        (
            key,
            *(
                f"{middle:.2f} ({low:.2f} to {high:.2f})"
                for low, middle, high in (row["tokens_per_second"], row["ratio_to_dense"])
            ),
        )
        for key, row in result["rows"].items()
    ]
    print_table(f"{result['model']}, {result['dtype']}", ("row", "tokens/s", "ratio to dense"), rows)


if __name__ == "__main__":
    main()
