"""Every format against cuBLAS: set by set at one row, the kernel table; whole layers at 1 to 512 rows, the sweep."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time

import torch

from ...kernels import dense, formats
from . import ceilings, ffn
from .layers import TORCH, Layer, Sets, layer_of, lone, sides_of
from .measuring import measure_sets
from .report import Part
from .setting import MODELS, Setting


def compile_all(part: Part, setting: Setting) -> None:
    """Compile what the other stages launch, on all cores at once: Triton keeps it on disk, and they find it there."""
    tasks = [(setting, model, m) for m in setting.rows for model in MODELS]
    workers = min(len(tasks), max(2, (os.cpu_count() or 2) * 3 // 4))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for model, m, seconds in pool.imap_unordered(_compile, tasks):
            part.row(model=model, m=m, seconds=seconds)


def _compile(task: tuple[Setting, str, int]) -> tuple[str, int, float]:
    setting, model, m = task
    start = time.monotonic()
    sets = layer_of(setting.config(model))
    with torch.no_grad():
        for side in sides_of((), formats.LINEAR):
            with contextlib.suppress(Exception):  # whoever measures it will report it
                for call in Layer(side, sets, m, setting).calls():
                    call()
        with contextlib.suppress(Exception):
            ffn.compile_all(model, m, setting)
    return model, m, time.monotonic() - start


def table(part: Part, setting: Setting) -> None:
    """One token through each set of a layer; dense alone through the head and a lone k of grouped heads."""
    ceiling = ceilings.ceiling(setting)
    part.note(ceiling_gb_per_s=ceiling)
    for model in MODELS:
        config = setting.config(model)
        for modules in layer_of(config):
            _rows(part, model, "|".join(m.path.rpartition(".")[2] for m in modules), [modules], setting, ceiling)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        others = {"lm_head": config["vocab_size"], "k_proj": hidden // heads * config["num_key_value_heads"]}
        for name, outputs in others.items():
            for row in measure_sets([[lone(outputs, hidden)]], 1, sides_of((TORCH,), (dense,)), setting, ceiling):
                part.row(model=model, set=name, **row)


def sweep(part: Part, setting: Setting) -> None:
    """All linears of one layer as one time, for every number of rows."""
    ceiling = ceilings.ceiling(setting)
    part.note(ceiling_gb_per_s=ceiling)
    for m in setting.rows:
        for model in MODELS:
            _rows(part, model, "layer", layer_of(setting.config(model)), setting, ceiling, m)


def _rows(part: Part, model: str, name: str, sets: Sets, setting: Setting, ceiling: float, m: int = 1) -> None:
    for row in measure_sets(sets, m, sides_of(modules=formats.LINEAR), setting, ceiling):
        part.row(model=model, set=name, **row)
