"""SmolLM2 as a text encoder on real texts, in turns with sentence-transformers.

The vectors of both have to agree before anything is timed (bench/embed.py says how).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pared import sentence_layout
from pared.bench import embed, record
from pared.embedding import Embedding

ROUNDS = 3


@pytest.fixture(scope="module")
def encoder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, said to be an encoder."""
    folder = tmp_path_factory.mktemp("suites") / "encoder"
    folder.mkdir()
    for file in smollm2.iterdir():
        os.symlink(file, folder / file.name)
    for name, content in sentence_layout.files(Embedding("mean", skip_instruction=False), 576).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["passages", "questions and passages"])
def test_embed(benchmark: Any, encoder: Path, name: str, dtype: str) -> None:
    both, texts = embed.Encoder(encoder, dtype), embed.workloads()[name]
    apart = both.check(texts)
    ours: list[float] = []
    others: dict[str, list[float]] = {side: [] for side in (embed.SORTED, embed.ARRIVAL)}

    def theirs_turn() -> None:
        for side, seconds in others.items():
            seconds.append(both.seconds(side, texts))

    def ours_turn() -> None:
        ours.append(both.seconds(embed.OURS, texts))

    benchmark.pedantic(ours_turn, setup=theirs_turn, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    ours = ours[1:] or ours
    against = {side: record.ratios(ours, seconds[1:] or seconds) for side, seconds in others.items()}
    tokens = sum(both.ours.embed(texts).tokens)
    benchmark.group = f"SmolLM2-135M, embedding {name}"
    benchmark.extra_info.update(
        what=f"{len(texts)} texts, {tokens} tokens",
        dtype=dtype,
        threads=torch.get_num_threads(),
        time_us=[1e6 * s for s in record.quartiles(ours)],
        tokens_per_second=tokens / record.quartiles(ours)[1],
        best_dense=embed.SORTED,
        ratio=against[embed.SORTED],
        ratio_in_order_of_arrival=against[embed.ARRIVAL],
        agreement=apart,
    )
