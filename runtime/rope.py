"""Rotary tables: the cosines and sines by which queries and keys are rotated, per token.

Every variant is a function of a token's position and of the length its sequence is treated as having
(`rope_lens`): dynamic NTK stretches its base with that length, longrope switches factor lists at the
original context. Both belong to the token and not to the batch, so that batching, chunking and
preemption cannot change a result. Formulas as in transformers' modeling_rope_utils (5.23).
"""

from __future__ import annotations

import math

import torch

from ..spec import Rope


class RotaryTable:
    """Computes cos and sin, fp32 [T, dim / 2], for positions [T] and rope_lens [T] (int64)."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.rope = rope
        self.exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float().to(device) / rope.dim
        self.scale = _attention_scale(rope)
        self.inv_freq = _inv_freq(rope, self.exponents)
        self.long_inv_freq = _longrope(rope, self.exponents, rope.long_factor) if rope.kind == "longrope" else None

    def __call__(self, positions: torch.Tensor, rope_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.float()[:, None] * self._inv_freq_at(rope_lens)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)

    def _inv_freq_at(self, rope_lens: torch.Tensor) -> torch.Tensor:
        if self.long_inv_freq is not None:
            long = (rope_lens > self.rope.original)[:, None]
            return torch.where(long, self.long_inv_freq, self.inv_freq)
        if self.rope.kind == "dynamic":
            return _dynamic(self.rope, self.exponents, rope_lens)
        return self.inv_freq


def length_matters_above(rope: Rope | None) -> int | None:
    """The sequence length above which the rotation of every token depends on it; None: it never does."""
    kinds = {"dynamic": "max_positions", "longrope": "original"}
    return getattr(rope, kinds[rope.kind]) if rope is not None and rope.kind in kinds else None


def _attention_scale(rope: Rope) -> float:
    if rope.attention_factor is not None or rope.kind not in ("yarn", "longrope"):
        return rope.attention_factor if rope.kind in ("yarn", "longrope") and rope.attention_factor else 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original)) if rope.factor > 1 else 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _inv_freq(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    """Inverse frequencies [dim / 2] of the variants that do not depend on a sequence's length."""
    if rope.kind == "longrope":
        return _longrope(rope, exponents, rope.short_factor)
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, exponents)
    return inv_freq


def _longrope(rope: Rope, exponents: torch.Tensor, factors: tuple[float, ...]) -> torch.Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device=exponents.device) * rope.theta**exponents)


def _dynamic(rope: Rope, exponents: torch.Tensor, rope_lens: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling: the base grows with the length beyond the trained context. [T, dim / 2]."""
    lens = rope_lens.clamp(min=rope.max_positions)
    stretch = (rope.factor * lens / rope.max_positions - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return 1.0 / ((rope.theta * stretch)[:, None] ** exponents)


def _llama3(rope: Rope, inv_freq: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    smooth = (rope.original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > rope.original / rope.low_freq_factor, inv_freq / rope.factor, between)
    return torch.where(wavelength < rope.original / rope.high_freq_factor, inv_freq, scaled)


def _yarn(rope: Rope, exponents: torch.Tensor) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): a ramp over dimensions between interpolated and original frequencies."""

    def dimension_of(rotations: float) -> float:
        return rope.dim * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device=exponents.device)
    keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)
    frequency = rope.theta**exponents
    return 1.0 / (rope.factor * frequency) * (1 - keep) + 1.0 / frequency * keep
