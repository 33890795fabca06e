"""Bytes of block weights that one decoded token reads, by the spy, at the shapes of Llama-2-7B and Llama-3-8B.

For a memory-bound step bytes are time. Everything is on the meta device: no weight is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from pared import families
from pared.converters.groups import Group, kinds, runs
from pared.converters.low_rank import rank
from pared.kernels import bitmap, dense, formats, masked, shared_basis, two_four
from pared.kernels.unit import Packed
from pared.runtime.accounting import step_traffic
from pared.runtime.loader import _Loading
from pared.runtime.model import Decoder
from pared.spec import Spec

LAYERS = 32
CONFIGS = {
    "llama-2-7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
}
DENSE_GB = {"llama-2-7b": 12.952, "llama-3-8b": 13.959}  # blocks alone, bf16


def spec_of(name: str) -> Spec:
    sizes = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 4096,
    }
    return families.read({"model_type": "llama", **sizes, **CONFIGS[name]})


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def groups(spec: Spec) -> list[Group]:
    return [group for run in runs(spec, 2) for kind in kinds(spec) for group in run.groups(spec, kind, kind.shared)]


def packs(spec: Spec, ratio: float | None, form: str) -> Iterator[Packed]:
    """Every linear of the blocks, grouped in twos by the paper's plan and at its ranks; dense where ratio is None."""
    linears = spec.linears()
    for path in (path for path in linears if ratio is None or path == spec.names.head):
        shape = (linears[path].n, linears[path].k)
        yield Packed(dense.NAME, 1, {path: shape}, {"weight": meta(*shape)})
    for group in groups(spec) if ratio is not None else []:
        first = linears[group.paths[0]]
        r = rank(ratio, first.n, first.k, group.size)
        tensors = {f"coefficients.{path}": meta(first.n, r) for path in group.paths}
        tensors["basis"] = meta(r, first.k - r if form == "pivoted" else first.k)
        if form == "pivoted":
            tensors["pivots"] = meta(r, dtype=torch.int32)
        yield Packed(shared_basis.NAME, 1, dict.fromkeys(group.paths, (first.n, first.k)), tensors)


def sparse_packs(spec: Spec, form: str) -> Iterator[Packed]:
    """Every linear of the blocks with half of its weights zero; the head dense."""
    for path, linear in spec.linears().items():
        n, k = linear.n, linear.k
        if path == spec.names.head:
            yield Packed(dense.NAME, 1, {path: (n, k)}, {"weight": meta(n, k)})
        elif form == "bitmap":
            bits = meta(n, k // 8, dtype=torch.uint8)
            yield Packed(bitmap.NAME, 1, {path: (n, k)}, {"bits": bits, "values": meta(n * k // 2)})
        else:
            positions = meta(n, k // 8, dtype=torch.uint8)
            yield Packed(two_four.NAME, 1, {path: (n, k)}, {"values": meta(n, k // 2), "positions": positions})


class Store:
    """What the loader asks a folder for, on meta tensors."""

    def __init__(self, spec: Spec, made: list[Packed]) -> None:
        self.tensors = {name: meta(*shape) for name, shape in spec.plain().items()}
        plain = tuple(self.tensors)
        units = []
        for packed in made:
            names = {role: f"{next(iter(packed.modules))}/{role}" for role in packed.tensors}
            self.tensors |= {names[role]: tensor for role, tensor in packed.tensors.items()}
            units.append(SimpleNamespace(**{**vars(packed), "tensors": names}))
        self.manifest = SimpleNamespace(units=units, plain=plain)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def block_bytes(spec: Spec, made: list[Packed]) -> int:
    """What the multiplying ops of one decode step receive, less the head."""
    decoder = Decoder(spec, _Loading(Store(spec, made), spec, torch.device("meta"), None).weights())
    read = step_traffic(decoder)
    ops = ("linear", "basis_linear", "bitmap_linear", "two_four_linear")
    multiplying = [op for op in read if op.removeprefix("pared::") in ops]
    return sum(read[op] for op in multiplying) - 2 * spec.vocab * spec.embed_dim


def stored_bytes(spec: Spec, made: list[Packed]) -> int:
    return sum(t.nbytes for packed in made if spec.names.head not in packed.modules for t in packed.tensors.values())


def paths(spec: Spec) -> set[str]:
    return spec.linears().keys() - {spec.names.head}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_blocks_read_what_they_weigh(name):
    spec = spec_of(name)
    made = list(packs(spec, None, ""))
    assert block_bytes(spec, made) == stored_bytes(spec, made)
    assert math.isclose(block_bytes(spec, made) / 1e9, DENSE_GB[name], rel_tol=1e-3)


# ratio: (times fewer bytes read pivoted, share of dense bytes stored pivoted, times fewer read factored or None)
PROMISED = {
    ("llama-2-7b", 0.2): (1.361, 0.685, 1.08),
    ("llama-2-7b", 0.3): (1.508, 0.612, 1.24),
    ("llama-2-7b", 0.5): (1.988, 0.455, 1.74),
    ("llama-3-8b", 0.2): (1.368, 0.705, None),
    ("llama-3-8b", 0.3): (1.526, 0.627, None),
    ("llama-3-8b", 0.5): (2.039, 0.463, None),
}


@pytest.mark.parametrize(("name", "ratio"), PROMISED)
def test_compressed_blocks_read_as_little_as_promised(name, ratio):
    spec = spec_of(name)
    read, stored, as_is = PROMISED[name, ratio]
    whole = block_bytes(spec, list(packs(spec, None, "")))
    pivoted = list(packs(spec, ratio, "pivoted"))
    assert {path for packed in pivoted for path in packed.modules} - {spec.names.head} == paths(spec)
    assert math.isclose(whole / block_bytes(spec, pivoted), read, rel_tol=0.01)
    assert math.isclose(stored_bytes(spec, pivoted) / whole, stored, rel_tol=0.01)
    factored = list(packs(spec, ratio, "factored"))
    assert math.isclose(stored_bytes(spec, factored) / whole, 1 - ratio, rel_tol=0.01)
    if as_is is not None:
        assert math.isclose(whole / block_bytes(spec, factored), as_is, rel_tol=0.01)


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("name", CONFIGS)
def test_traffic_is_what_the_ops_receive(name, form):
    spec = spec_of(name)
    made = list(packs(spec, 0.2, form))
    named = sum(
        formats.by_name(packed.format).traffic(packed, 1).weight_bytes
        for packed in made
        if spec.names.head not in packed.modules
    )
    assert named == block_bytes(spec, made)


@pytest.mark.parametrize("form", ["bitmap", "two_four"])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_of_the_weights_are_nine_sixteenths_of_the_bytes(name, form):
    """As stored and as read; `traffic` knows every byte, but that what stands side by side shares its spare values."""
    spec = spec_of(name)
    made, whole = list(sparse_packs(spec, form)), stored_bytes(spec, list(packs(spec, None, "")))
    assert stored_bytes(spec, made) == whole * 9 // 16
    read = block_bytes(spec, made)
    assert math.isclose(read, whole * 9 / 16, rel_tol=0.003)
    named = sum(
        formats.by_name(packed.format).traffic(packed, 1).weight_bytes
        for packed in made
        if spec.names.head not in packed.modules
    )
    stacked = 3 * LAYERS  # k and v beside q, up beside gate
    assert named - read == 2 * masked.SPARE * stacked
