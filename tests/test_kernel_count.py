"""How many kernels a layer of a decode step launches on a GPU: Triton's launches, and every aten op that writes memory.

One step on meta tensors, at the shapes of Llama-2-7B and Llama-3-8B. The launchers run; what they launch is compiled
for a GPU that is not here and counted, not run.
"""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pared.bench.compile_only import compile_only
from pared.kernels import attention, dense, ops, shared_basis, triton_decode, triton_fused
from pared.runtime.batch import Batch
from pared.runtime.cache import KVCache
from pared.runtime.loader import _Loading
from pared.runtime.model import Decoder, Rows
from pared.tests import test_traffic
from pared.tests.test_traffic import Store, meta, packs, spec_of

PAGE, BLOCKS = 16, 64
MOST = {"dense": 6, "shared_basis": 10}
LAUNCHERS = {
    "linear": dense._linear_gpu,
    "linear_around": dense._around_gpu,
    "basis_linear": shared_basis._basis_linear_gpu,
    "basis_linear_around": shared_basis._around_gpu,
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


def step_kernels(name: str, form: str, rows: int, layers: int, target: str) -> Counter[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_traffic, "LAYERS", layers)
        patch.setattr(ops, "takes_triton", lambda x: True)
        spec = spec_of(name)
        made = list(packs(spec, *((None, "") if form == "dense" else (0.2, "pivoted"))))
        decoder = Decoder(spec, _Loading(Store(spec, made), spec, torch.device("meta"), None).weights())
        heads = [layer.kv_heads for layer in spec.layers]
        cache = KVCache(heads, spec.head_dim, 2, PAGE, decoder.dtype, "meta")
        given = decode_step(rows)
        with compile_only(target) as kernels, Written() as written, torch.inference_mode():
            decoder.run_layers(*given, cache)
    return written.ops + Counter(kernel.metadata.name for kernel in kernels)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("form", MOST)
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
def test_kernels_of_a_decode_layer(name, form, rows, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    few, more = (step_kernels(name, form, rows, layers, "sm_90") for layers in (2, 4))
    layer = {kernel: (more - few)[kernel] / 2 for kernel in more - few}
    assert sum(layer.values()) <= MOST[form], layer
    assert {"_attend_split", "_merge"} <= layer.keys()
    assert not few - more
