"""Layers with fewer heads and neurons: found as zeros or as smaller tensors, stored as they are, run exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import pared.hf
from pared import errors, families
from pared.compact import open_folder
from pared.convert import convert, export
from pared.reports import folder_report
from pared.runtime.llm import LLM
from pared.runtime.loader import load
from pared.runtime.params import SamplingParams
from pared.tests import tiny
from pared.tests.compressed import spec_of
from pared.tests.test_model import Runner, theirs

assert pared.hf.METHOD  # importing it registers the quantizer

TOKENS = [1, 7, 3, 30, 39, 8, 12, 5, 22, 9]
NEURONS = (1, 4, 7, 9, 12, 15, 20, 23)
FAMILIES = ("llama", "llama-tied-biased", "qwen2-tied", "qwen3", "phi3", "opt-projected", "gpt2")


def gone(spec, i: int) -> list[int]:
    """The heads that layer i loses: in GQA the second group whole, or one head of each group; else two of four."""
    if spec.layers[i].kv_heads == spec.layers[i].heads:
        return [[1, 3], []][i]
    return [[2, 3], [0, 3]][i]


def expected_widths(name: str) -> list[tuple[int, int, int]]:
    ffn = 64 if name == "gpt2" else 24
    return [(2, 2, ffn - 8), (4, 4, ffn)] if name in ("opt-projected", "gpt2") else [(2, 1, ffn - 8), (2, 2, ffn)]


def pruned(name: str, side: str) -> hf.PreTrainedModel:
    """`tiny.model(name)` whose layer 0 lost eight neurons and some heads, layer 1 heads alone, saved as zeros.

    side: "inputs" zeroes what computes a neuron or a head's values, biases too; "outputs" what reads them.
    """
    model = tiny.model(name)
    spec, state = spec_of(model), dict(model.named_parameters())
    names, size = spec.names, spec.head_dim

    def zero(path: str, rows: list[int], dim: int) -> None:
        weight = state[f"{path}.weight"]
        (weight.t() if spec.transposed else weight).index_fill_(dim, torch.tensor(rows, dtype=torch.int64), 0)
        if dim == 0 and f"{path}.bias" in state:
            state[f"{path}.bias"][rows] = 0

    with torch.no_grad():
        for i, layer in enumerate(spec.layers):
            neurons, heads = (NEURONS if i == 0 else []), gone(spec, i)
            groups = sorted({h * layer.kv_heads // layer.heads for h in heads}) if i == 0 else []
            if side == "outputs" or not groups:
                zero(spec.path(i, names.out), [h * size + d for h in heads for d in range(size)], 1)
            else:
                before = 0 if len(names.qkv) == 3 else (layer.heads + layer.kv_heads) * size
                zero(spec.path(i, names.qkv[-1]), [before + g * size + d for g in groups for d in range(size)], 0)
            if side == "outputs":
                zero(spec.path(i, names.ffn_out), list(neurons), 1)
            else:
                up = [n + (layer.ffn if name.startswith("phi3") else 0) for n in neurons]
                zero(spec.path(i, names.ffn_in[-1]), up, 0)
    return model


def saved(path: Path, model: hf.PreTrainedModel) -> Path:
    """`model` with the tokenizer of tiny.checkpoint."""
    tiny.checkpoint(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path)
    return path


def close(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((ours - truth).abs().max() <= 1e-6 * max(1.0, float(truth.abs().max())))


def ours(folder: Path, prompt: int) -> torch.Tensor:
    """Logits of every position: the prompt in two chunks, the rest decoded token by token."""
    runner = Runner(load(folder, device="cpu"))
    sequence = runner.sequence(TOKENS, floor=prompt)
    runner.run([(sequence, prompt - 2)])
    runner.run([(sequence, 2)])
    while sequence.done < len(TOKENS):
        runner.run([(sequence, 1)])
    return torch.stack(sequence.logits)


def widths(folder: Path) -> list[tuple[int, int, int]]:
    with open_folder(folder) as opened:
        return [(y.heads, y.kv_heads, y.ffn) for y in families.read(opened.config).layers]


# --- saved as zeros ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_zero_goes_and_nothing_else_changes(tmp_path, name, side):
    model = pruned(name, side)
    src, out = saved(tmp_path / "src", model), tmp_path / "out"
    convert(src, out, progress=False)
    assert widths(out) == expected_widths(name)
    assert close(ours(out, 6), theirs(model, TOKENS, 6))

    through_hf = hf.AutoModelForCausalLM.from_pretrained(out).eval()
    assert close(theirs(through_hf, TOKENS, 6), theirs(model, TOKENS, 6))
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answer = model.generate(torch.tensor([TOKENS]), **greedy)
    assert torch.equal(through_hf.generate(torch.tensor([TOKENS]), **greedy), answer)
    done = next(iter(LLM(out, device="cpu").generate([TOKENS], SamplingParams(max_tokens=6, ignore_eos=True))))
    assert done.token_ids == answer[0, len(TOKENS) :].tolist()

    plain = hf.AutoModelForCausalLM.from_pretrained(export(out, tmp_path / "plain", progress=False)).eval()
    assert close(theirs(plain, TOKENS, 6), theirs(model, TOKENS, 6))
