"""How many kernels a layer of a decode step launches on a GPU: Triton's launches, and every aten op that writes memory.

One step on meta tensors, at the shapes of Llama-2-7B and Llama-3-8B. The launchers run; what they launch is compiled
for a GPU that is not here and counted, not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pared.bench.compile_only import compile_only
from pared.kernels import (
    attention,
    bitmap,
    dense,
    formats,
    ops,
    routed_ffn,
    shared_basis,
    sparse_layout,
    triton_decode,
    triton_fused,
    two_four,
)
from pared.kernels.unit import Packed, Prepared
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.loader import _Loading
from pared.runtime.model import Decoder, Rows
from pared.spec import Spec
from pared.tests import test_traffic
from pared.tests.test_traffic import Store, meta, packs, spec_of

PAGE, BLOCKS = 16, 64
MOST = {"dense": 6, "shared_basis": 10, "two_four": 6, "bitmap": 6, "routed_ffn": 7}
LAUNCHERS = {
    "linear": dense._linear_gpu,
    "linear_around": dense._around_gpu,
    "basis_linear": shared_basis._basis_linear_gpu,
    "basis_linear_around": shared_basis._around_gpu,
    "two_four_linear": two_four._two_four_gpu,
    "two_four_linear_around": two_four._around_gpu,
    "bitmap_linear": bitmap._bitmap_gpu,
    "bitmap_linear_around": bitmap._around_gpu,
    "routed_ffn": routed_ffn._on_gpu,
    "routed_ffn_around": routed_ffn._on_gpu,
    "paged_attention": attention._attention_gpu,
    "decode": triton_decode.decode,
}
NOTHING_WRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


class Written(TorchDispatchMode):
    """Takes our ops to their GPU launchers, and counts every other op that writes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space == "pared":
            launch = LAUNCHERS.get(name) or getattr(triton_fused, name)
            with self:
                return launch(*args, **(kwargs or {}))
        if not func.is_view and name not in NOTHING_WRITTEN:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def decode_step(rows: int) -> tuple[Rows, Batch]:
    def of(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    short = {"dtype": torch.int32}
    starts, lens, tables = of(rows + 1, **short), of(rows, **short), of(rows, BLOCKS, **short)
    batch = Batch(of(rows), of(rows), of(rows), of(rows), starts, lens, tables, of(rows), max_query=1)
    return Rows(meta(rows, 4096), *(of(rows, 64, dtype=torch.float32) for _ in range(2))), batch


def half_zero(spec: Spec, module: ModuleType) -> Iterator[Packed]:
    """Every linear of the blocks with half of its weights zero, and the dense head."""
    for packed in packs(spec, None, ""):
        path, (n, k) = next(iter(packed.modules.items()))
        if path == spec.names.head:
            yield packed
            continue
        tensors = {"values": meta(n, k // 2), "positions": meta(n, k // 8, dtype=torch.uint8)}
        if module is bitmap:
            tensors = {"values": meta(n * k // 2), "bits": meta(n, k // 8, dtype=torch.uint8)}
        yield Packed(module.NAME, module.VERSION, {path: (n, k)}, tensors)


def routed(spec: Spec) -> Iterator[Packed]:
    """Every FFN as one unit; attention and the head dense."""
    ffns = spec.ffns()
    covered = {path for linears in ffns.values() for path in linears}
    yield from (packed for packed in packs(spec, None, "") if not packed.modules.keys() & covered)
    for path in ffns:
        groups, size = spec.layers[0].ffn // 32, 32
        tensors = {"groups": meta(groups, 3, size, 4096), "router": meta(groups, 4096, dtype=torch.float32)}
        params = {"group_size": size, "tau": 0.5, "activation": "silu"}
        yield Packed(routed_ffn.NAME, routed_ffn.VERSION, {path: (4096, 4096)}, tensors, params)


def for_a_gpu(module: ModuleType) -> Callable[..., Prepared]:
    """`prepare` that lays meta tensors out as for a GPU; a bitmap as rows of equally many weights are."""

    def prepare(packed: Packed, device: object) -> Prepared:
        path, (n, k) = next(iter(packed.modules.items()))
        if module is two_four:
            laid = sparse_layout.two_four(packed.tensors["values"], packed.tensors["positions"], k)
            return Prepared(module.NAME, {path: (n,)}, (*laid, None), (n, k))
        bits, ahead = meta(n, k // 64, dtype=torch.int64), meta(n, k // 64, dtype=torch.int16)
        starts, steps = meta(n, dtype=torch.int32), meta(k // 16, n, dtype=torch.int32)
        columns = meta(k // 256, n, dtype=torch.int32)
        laid = sparse_layout.Bitmap(meta(n * k // 2), bits, ahead, starts, steps, columns, sparse_layout.RUN * (n - 1))
        return Prepared(module.NAME, {path: (n,)}, (*laid[:-1], None), (n, k, laid.jump))

    return prepare


def step_kernels(name: str, form: str, rows: int, layers: int, target: str) -> Counter[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_traffic, "LAYERS", layers)
        patch.setattr(ops, "takes_triton", lambda x: True)
        spec = spec_of(name)
        if form in ("two_four", "bitmap"):
            module = formats.by_name(form)
            patch.setattr(module, "prepare", for_a_gpu(module))
            made = list(half_zero(spec, module))
        elif form == "routed_ffn":
            patch.setattr(routed_ffn, "for_triton", lambda device: True)
            made = list(routed(spec))
        else:
            made = list(packs(spec, *((None, "") if form == "dense" else (0.2, "pivoted"))))
        decoder = Decoder(spec, _Loading(Store(spec, made), spec, torch.device("meta"), None).weights())
        heads = [layer.kv_heads for layer in spec.layers]
        cache = KVCache(heads, spec.head_dim, 2, PAGE, decoder.dtype, "meta")
        given = decode_step(rows)
        with compile_only(target) as kernels, Written() as written, torch.inference_mode():
            decoder.run_layers(*given, cache)
    return written.ops + Counter(kernel.metadata.name for kernel in kernels)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("llama-2-7b", form) for form in ("dense", "shared_basis")),
        *(("llama-3-8b", form) for form in MOST),
    ],
)
def test_kernels_of_a_decode_layer(name, form, rows, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    few, more = (step_kernels(name, form, rows, layers, "sm_90") for layers in (2, 4))
    layer = {kernel: (more - few)[kernel] / 2 for kernel in more - few}
    assert sum(layer.values()) <= MOST[form], layer
    assert {"_attend_split", "_merge"} <= layer.keys()
    assert not few - more
