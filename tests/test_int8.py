"""The int8 format beyond its contract (tests/test_formats.py): what quantising loses, and the head that is read so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pared.evaluate import measure
from pared.kernels import int8
from pared.kernels.unit import Unit
from pared.runtime.accounting import decode_traffic
from pared.runtime.llm import LLM
from pared.runtime.params import SamplingParams


def test_every_weight_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(40, 130, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 3, 40)[:, None]
    weight[7] = 0
    unit = int8.quantize(Unit({"m": (40, 130)}, {"weight": weight}))
    found, scale = int8.weight(int8.encode(unit), "m"), unit.tensors["scale"]
    assert ((found - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (unit.tensors["weight"].abs().amax(dim=1)[scale > 1e-30] == 127).all()
    assert not found[7].any()


def test_a_foreign_unit_is_refused() -> None:
    whole = {"weight": torch.zeros(3, 4, dtype=torch.int8), "scale": torch.ones(3)}
    for tensors, why in (
        ({"weight": torch.zeros(3, 4)}, "its scale"),
        (whole | {"scale": torch.ones(4)}, r"\(4,\)"),
        (whole | {"weight": torch.zeros(3, 4)}, "float32"),
        (whole | {"bias": torch.zeros(2)}, r"\(2,\)"),
        (whole | {"zero": torch.zeros(3)}, "zero"),
    ):
        with pytest.raises(ValueError, match=why):
            int8.encode(Unit({"m": (3, 4)}, tensors))
    with pytest.raises(ValueError, match=r"\[M, 4\]"):
        int8.apply(torch.zeros(1, 5), int8.prepare(int8.encode(Unit({"m": (3, 4)}, whole)), "cpu"), "m")


def test_a_head_in_8_bits_reads_half_the_bytes_and_costs_little(smollm2: Path, real_prompts: list[str]) -> None:
    whole, small = (sum(decode_traffic(smollm2, torch.bfloat16, int8_head).values()) for int8_head in (False, True))
    assert whole - small == 49152 * 576 - 4 * 49152
    text = "\n".join(real_prompts * 4)
    plain, quantised = (measure(smollm2, text, window=128, dtype=torch.bfloat16, int8_head=q) for q in (False, True))
    assert quantised.name == f"{plain.name}, int8 head"
    assert quantised.perplexity != plain.perplexity
    assert quantised.perplexity == pytest.approx(plain.perplexity, rel=0.02)


def test_it_answers_and_is_recorded(smollm2: Path) -> None:
    llm = LLM(smollm2, "bfloat16", int8_head=True, num_blocks=32, strict=True)
    output = llm.generate("The capital of France is", SamplingParams(max_tokens=8))
    assert "Paris" in output[0].text
    assert all(step.replays for step in llm.core.model._steps.values())
