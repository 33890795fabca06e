"""Every launcher compiled at real shapes for GPUs that are not here, and the machine code looked at."""

from __future__ import annotations

import functools
import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from pared.bench.compile_only import SHARED_MEMORY, TARGETS, Report, compile_only, report
from pared.kernels import (
    sparse_layout,
    triton_attention,
    triton_basis,
    triton_bitmap,
    triton_decode,
    triton_dense,
    triton_fused,
    triton_int8,
    triton_routed_ffn,
    triton_two_four,
)
from pared.kernels.dense import GPU_ROWS
from pared.kernels.shared_basis import ALIGN
from pared.kernels.unit import Around

TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
PREFILL_ROWS = GPU_ROWS[torch.bfloat16]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(rows: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> None:
    triton_dense.linear(meta(rows, k, dtype=dtype), meta(n, k, dtype=dtype), meta(n, dtype=dtype))


# Inputs, ranks and outputs of what is stacked, Basis Sharing of two layers: Llama-2-7B and, last, Llama-3-8B's q|k|v.
BASES = {
    "q|k|v 20 %": (4096, (2184, 2184, 2184), (4096, 4096, 4096)),
    "q|k|v 50 %": (4096, (1365, 1365, 1365), (4096, 4096, 4096)),
    "gate|up 20 %": (4096, (2762, 2762), (11008, 11008)),
    "gate|up 50 %": (4096, (1726, 1726), (11008, 11008)),
    "o 20 %": (4096, (1638,), (4096,)),
    "o 50 %": (4096, (1024,), (4096,)),
    "down 20 %": (11008, (2388,), (4096,)),
    "down 50 %": (11008, (1492,), (4096,)),
    "private k|v 20 %": (4096, (2184, 655, 655), (4096, 1024, 1024)),
}


def basis(
    rows: int,
    k: int,
    ranks: tuple[int, ...],
    outputs: tuple[int, ...],
    pivoted: bool = True,
    around: Around | None = None,
) -> None:
    def aligned(n: int) -> int:
        return -(-n // ALIGN) * ALIGN

    triton_basis.basis_linear(
        meta(rows, k),
        [meta(k, dtype=torch.int32) if pivoted else None for _ in ranks],
        [meta(rank, aligned(k - rank if pivoted else k)) for rank in ranks],
        [meta(n, aligned(rank)) for n, rank in zip(outputs, ranks, strict=True)],
        [None for _ in ranks],
        around,
    )


def basis_around(name: str, rows: int) -> None:
    k, ranks, outputs = BASES[name]
    kind = next(kind for kind in ("q|k|v", "gate|up", "o", "down") if name.startswith(kind))
    basis(rows, k, ranks, outputs, around=around(kind, rows, outputs[0], k))


def attend(rows: int, heads: int, kv_heads: int, head_dim: int, window: int = 0) -> None:
    pool = meta(64, 16, kv_heads, head_dim)
    starts, lens, tables = (meta(*shape, dtype=torch.int32) for shape in ((5,), (4,), (4, 32)))
    q = meta(4 * rows, heads, head_dim)
    triton_attention.paged_attention(q, pool, pool, starts, lens, tables, rows, 0.1, window)


def rotate() -> None:
    table, pool = meta(4, 64, dtype=torch.float32), meta(64, 16, 8, 128)
    slots, norm = meta(4, dtype=torch.int64), meta(128, dtype=torch.float32)
    triton_fused.rotary_cache(meta(4, 48 * 128), table, table, pool, pool, slots, 32, norm, norm, 1e-5)


def decode(sequences: int, heads: int, kv_heads: int, blocks: int, head_dim: int = 128, window: int = 0) -> None:
    pool, table = meta(64, 16, kv_heads, head_dim), meta(sequences, head_dim // 2, dtype=torch.float32)
    lens, tables = meta(sequences, dtype=torch.int32), meta(sequences, blocks, dtype=torch.int32)
    qkv, slots = meta(sequences, (heads + 2 * kv_heads) * head_dim), meta(sequences, dtype=torch.int64)
    given = (qkv, table, table, pool, pool, slots, lens, tables, heads)
    triton_decode.decode(*given, None, None, 0.0, 0.1, window)


# K, rows of weights: what a linear of Llama-2-7B and of Llama-3-8B reads and stacks.
LINEARS = {
    "llama-2-7b": {"q|k|v": (4096, 12288), "o": (4096, 4096), "gate|up": (4096, 22016), "down": (11008, 4096)},
    "llama-3-8b": {"q|k|v": (4096, 6144), "o": (4096, 4096), "gate|up": (4096, 28672), "down": (14336, 4096)},
}


def around(kind: str, rows: int, n: int, k: int) -> Around:
    norm = meta(k, dtype=torch.float32)
    return {
        "q|k|v": Around(norm, 1e-5),
        "gate|up": Around(norm, 1e-5, "silu"),
        "o": Around(residual=meta(rows, n)),
        "down": Around(residual=meta(rows, n)),
    }[kind]


def linear_around(kind: str, rows: int, k: int, n: int) -> None:
    triton_dense.linear(meta(rows, k), meta(n, k), None, around=around(kind, rows, n, k))


def int8_head(rows: int) -> None:
    weight, scale = meta(128256, 4096, dtype=torch.int8), meta(128256, dtype=torch.float32)
    triton_int8.int8_linear(meta(rows, 4096), weight, scale, None, True)


def laid_two_four(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return meta(n, sparse_layout.PLANES, k // 32, dtype=dtype), meta(n, k // 32, dtype=torch.int32)


def laid_bitmap(rows: int, n: int, k: int, in_step: bool = True) -> list[torch.Tensor]:
    """What a product of so many rows reads, half of every row kept."""
    values, words = meta(n * k // 2), k // sparse_layout.BITS
    if rows == 1 and in_step:
        checks = -(-k // 2 // sparse_layout.CHECK)
        steps = meta(k // 2 // sparse_layout.UNIT, n, dtype=torch.int32)
        return [values, steps, meta(checks, n, dtype=torch.int32)]
    bits, ahead = meta(n, words, dtype=torch.int64), meta(n, words, dtype=torch.int16)
    return [values, bits, ahead, meta(n, dtype=torch.int32)]


def sparse(rows: int, k: int, n: int, form: str, around: Around | None = None) -> None:
    x = meta(rows, k)
    if form == "2:4":
        triton_two_four.two_four_linear(x, *laid_two_four(n, k), None, around=around)
        return
    laid = laid_bitmap(rows, n, k, in_step=form == "even rows")
    jump = sparse_layout.RUN * (n - 1) if form == "even rows" else 0
    triton_bitmap.bitmap_linear(x, laid, None, (n, k, jump), around=around)


def sparse_around(kind: str, rows: int, k: int, n: int, form: str) -> None:
    sparse(rows, k, n, form, around(kind, rows, n, k))


def two_four_fp32(rows: int) -> None:
    laid = laid_two_four(4096, 4096, torch.float32)
    triton_two_four.two_four_linear(meta(rows, 4096, dtype=torch.float32), *laid, None)


def routed(
    rows: int, groups: int = 448, size: int = 32, gated: bool = True, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Llama-3-8B's FFN and what stands around it; some rows pad."""
    weights = triton_routed_ffn.Weights(
        meta(3 if gated else 2, groups, size, 4096, dtype=dtype),
        (None, None if gated else meta(groups * size, dtype=dtype), None),
        meta(groups, 4096, dtype=torch.float32),
        "silu" if gated else "gelu",
        0.0,
    )
    told, awake = meta(3, dtype=torch.int64), meta(rows, dtype=torch.int64)
    x, norm = meta(rows, 4096, dtype=dtype), meta(4096, dtype=torch.float32)
    triton_routed_ffn.routed_ffn(x, weights, told, awake, norm, 1e-5, x)


def norms() -> None:
    x, weight = meta(4, 4096), meta(4096, dtype=torch.float32)
    triton_fused.add_rms_norm(x, x, weight, 1e-5)
    triton_fused.layer_norm(x, weight, weight, 1e-5)


LAUNCHES = {
    "gemv": lambda: linear(1, 4096, 11008),
    "gemv fp32": lambda: linear(1, 4096, 4096, torch.float32),
    "few rows": lambda: linear(8, 4096, 4096),
    "few rows fp32": lambda: linear(16, 4096, 4096, torch.float32),
    "more rows": lambda: linear(64, 4096, 4096),
    "prefill": lambda: linear(PREFILL_ROWS, 11008, 4096),
    "split": lambda: linear(2, 64, 4096),
    "few queries": lambda: attend(1, 32, 8, 128),
    "few queries, odd head, window": lambda: attend(1, 32, 32, 80, window=2047),
    "chunk": lambda: attend(512, 32, 8, 128),
    "rotate": rotate,
    "norms": norms,
    "gated act": lambda: triton_fused.gated_act(meta(4, 22016), "silu"),
    "act": lambda: triton_fused.act(meta(4, 16384), "gelu"),
    "basis 1, factored": lambda: basis(1, *BASES["q|k|v 20 %"], pivoted=False),
    "basis 8, factored": lambda: basis(8, *BASES["q|k|v 20 %"], pivoted=False),
    **{f"basis 1, {name}": functools.partial(basis, 1, *shape) for name, shape in BASES.items()},
    "int8 head 1": lambda: int8_head(1),
    "int8 head 8": lambda: int8_head(8),
    "two_four fp32 1": lambda: two_four_fp32(1),
    "two_four fp32 8": lambda: two_four_fp32(8),
    **{
        f"sparse {rows}, {form} {k}": functools.partial(sparse, rows, k, 4096, form)
        for rows, k in ((1, 4096), (1, 11008), (8, 4096), (64, 4096), (512, 4096))
        for form in ("2:4", "even rows")
    },
    "sparse 1, odd rows 4096": lambda: sparse(1, 4096, 4096, "odd rows"),
    **{
        f"around sparse {rows}, {form} {kind}": functools.partial(
            sparse_around, kind, rows, *LINEARS["llama-2-7b"][kind], form
        )
        for rows, kind in ((1, "q|k|v"), (1, "gate|up"), (1, "down"), (8, "gate|up"), (64, "gate|up"))
        for form in ("2:4", "even rows")
    },
    **{f"routed {rows}": functools.partial(routed, rows) for rows in (1, 8, 64, 128, 512)},
    "routed 1, groups of 8": lambda: routed(1, groups=1792, size=8),
    "routed 8, groups of 8": lambda: routed(8, groups=1792, size=8),
    "routed 1, two matrices": lambda: routed(1, gated=False),
    "routed 1, fp32": lambda: routed(1, dtype=torch.float32),
    "routed 8, fp32": lambda: routed(8, dtype=torch.float32),
    "decode 1": lambda: decode(1, 32, 32, 64),
    "decode 1, grouped": lambda: decode(1, 32, 8, 64),
    "decode 8, grouped, long": lambda: decode(8, 32, 8, 4096),
    "decode 64, one split": lambda: decode(64, 32, 32, 64),
    "decode 1, odd head, window": lambda: decode(1, 32, 32, 64, head_dim=80, window=2047),
    **{
        f"around {rows}, {model} {kind}": functools.partial(linear_around, kind, rows, *LINEARS[model][kind])
        for rows in (1, 8, 64)
        for model in LINEARS
        for kind in LINEARS[model]
    },
    **{
        f"around basis {rows}, {name}": functools.partial(basis_around, name, rows)
        for rows in (1, 8, 64)
        for name in ("q|k|v 20 %", "gate|up 20 %", "o 20 %", "down 20 %", "down 50 %")
    },
    **{
        f"basis {rows}, {name}": functools.partial(basis, rows, *BASES[name])
        for rows in (8, 64)
        for name in ("q|k|v 20 %", "gate|up 50 %", "o 50 %")
    },
}


@pytest.fixture(scope="module", params=TARGETS)
def built(request, tmp_path_factory) -> tuple[str, dict[str, list[Report]]]:
    """Target name, and what every launch compiled for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp(request.param)))
        reports = {}
        for name, launch in LAUNCHES.items():
            with compile_only(request.param) as kernels:
                launch()
            reports[name] = [report(kernel) for kernel in kernels]
    return request.param, reports


def test_nothing_spills_and_shared_memory_suffices(built):
    target, reports = built
    for name, kernels in reports.items():
        assert kernels, name
        for kernel in kernels:
            assert kernel.spills == 0 == kernel.scratch, (name, kernel)
            assert kernel.shared <= SHARED_MEMORY[target], (name, kernel)


def test_the_gemv_streams_weights_in_16_byte_loads(built):
    target, reports = built
    for name in ("gemv", "gemv fp32"):
        (kernel,) = reports[name]
        if target == "gfx942":
            assert kernel.count("(buffer|global)_load_dwordx4") >= 2
            continue
        assert kernel.count(r"LDG\.E\.EF\.128") >= 4
        assert kernel.count("LDG.*U16") == 0
        assert kernel.registers <= 80  # six programs of four warps a multiprocessor, 48 KiB of weights in flight


def test_the_gemms_use_tensor_cores(built):
    target, reports = built
    small = "HMMA" if target == "sm_90" else TENSOR_CORES[target]  # 16 rows are too few for a warp group
    if target != "sm_100":  # its tensor memory wants 64 rows or more as well
        assert reports["few rows"][0].count(small) > 0
    for name in ("more rows", "prefill", "chunk"):
        assert reports[name][0].count(TENSOR_CORES[target]) > 0


def test_a_small_grid_is_split_and_added_up(built):
    _, reports = built
    assert [kernel.name for kernel in reports["split"]] == ["_gemm", "_sum_partials"]
    assert [kernel.name for kernel in reports["gemv"]] == ["_gemv"]


def test_what_stands_around_takes_no_launch(built):
    _, reports = built
    for name, kernels in reports.items():
        if name.startswith("around"):
            kind = "gemv" if name.split(",")[0].endswith(" 1") else "gemm"
            wanted = [f"_{kind}"]
            if "basis" in name:
                wanted = [f"_basis_{kind}", f"_coefficients_{kind}"]
            elif "sparse 1," in name:
                wanted = ["_two_four_gemv" if "2:4" in name else "_ell_gemv"]
            assert [kernel.name for kernel in kernels] == wanted, name


def test_a_linear_streams_weights_as_before_with_what_stands_around_it(built):
    target, reports = built
    for name in (name for name in reports if name.startswith("around 1,")):
        (kernel,) = reports[name]
        if target == "gfx942":
            assert kernel.count("(buffer|global)_load_dwordx4") >= 2, name
            continue
        assert kernel.count(r"LDG\.E\.EF\.128") >= 4, name
        assert kernel.registers <= 80, name
    for name in (name for name in reports if name.startswith("around") and "sparse" not in name):
        for kernel in reports[name]:
            assert kernel.bytes_an_instruction >= 0.1, (name, kernel)  # below, it waits for itself


def test_a_decode_step_attends_in_two_launches_or_one(built):
    _, reports = built
    for name in (name for name in reports if name.startswith("decode ")):
        names = ["_attend_split"] if "one split" in name else ["_attend_split", "_merge"]
        assert [kernel.name for kernel in reports[name]] == names, name


def test_two_four_streams_values_in_16_byte_loads(built):
    """A thread makes 128 weights' worth a turn of its loop, at six instructions each or fewer."""
    target, reports = built
    for name in (name for name in reports if "sparse 1, 2:4" in name):
        kernel = reports[name][0]
        least = 8 if target == "gfx942" else 16
        assert kernel.wide_loads >= least, (name, kernel)
        assert kernel.count("ACQBULK") == (target in ("sm_90", "sm_100")), name  # waits for the kernel ahead of it
        if "around" not in name:
            assert kernel.narrow_loads == 0, (name, kernel)
            assert kernel.bytes_an_instruction >= (0.15 if target == "gfx942" else 0.3), (name, kernel)
            assert target == "gfx942" or kernel.loop.total() / 128 <= 6, (name, kernel)


def test_rows_in_step_take_values_16_bytes_at_once_and_no_counting(built):
    """Two integer instructions and an address a value; each needs its x, so that narrow loads are one a value."""
    target, reports = built
    for name in (name for name in reports if "sparse 1, even rows" in name):
        kernel = reports[name][0]
        walks = 2 if "gate|up" in name else 1
        assert kernel.wide_loads == 4 * walks, (name, kernel)  # a run of 32 values
        assert kernel.count("POPC|v_bcnt") == 0
        assert kernel.count("ACQBULK") == (target in ("sm_90", "sm_100")), name
        if target != "gfx942" and "around" not in name:
            assert kernel.loop.total() / 32 <= 13, (name, kernel)  # instructions a value, 6.5 a weight
            assert kernel.registers <= 64


def test_sparse_tiles_go_through_tensor_cores_up_to_a_threshold(built):
    target, reports = built
    for form in ("2:4", "even rows"):
        assert reports[f"sparse 512, {form} 4096"][0].name == "_spread"
        assert reports[f"sparse 64, {form} 4096"][0].name == "_gemm"
        assert reports[f"sparse 64, {form} 4096"][0].count(TENSOR_CORES[target]) > 0
        if target != "sm_100":
            assert reports[f"sparse 8, {form} 4096"][0].count("HMMA|v_mfma") > 0


def test_a_routed_ffn_takes_three_launches_that_wait_for_each_other(built):
    """Norm and residual included. More rows are norm, tiles of the router and what these leave unsure, and for a
    prefill cuBLAS with a launch that masks."""
    target, reports = built
    for name in (name for name in reports if name.startswith("routed")):
        kind = "gemv" if name.partition(",")[0] == "routed 1" else "gemm"
        wanted = ["_route", f"_wake_{kind}", f"_down_{kind}"]
        if name in ("routed 64", "routed 128"):
            wanted = ["_rms_norm", "_route_tiles", *wanted]
        if name == "routed 512":
            wanted = ["_rms_norm", "_route_tiles", "_route", "_masked_act"]
        assert [kernel.name for kernel in reports[name]] == wanted, name
        for kernel in reports[name]:
            waits = target in ("sm_90", "sm_100") and kernel.name in ("_route", wanted[-2], wanted[-1])
            waits &= kernel.name != "_masked_act"
            assert kernel.count("ACQBULK") == waits, (name, kernel)


def test_awake_neurons_come_16_bytes_at_a_time(built):
    """Gate and up rows, and 256 bytes of a row of down; the router's row is all in registers."""
    target, reports = built
    for name in ("routed 1", "routed 1, groups of 8", "routed 1, fp32"):
        route, wake, down = reports[name]
        if target == "gfx942":
            assert min(kernel.wide_loads for kernel in reports[name]) >= 2, name
            continue
        assert route.wide_loads >= 16, (name, route)
        assert wake.count(r"LDG\.E\.EF\.128") >= 8, (name, wake)
        assert wake.registers <= 128, (name, wake)  # four programs a multiprocessor, 64 KiB in flight
        assert down.count(r"LDG\.E\.EF\.128") >= 4, (name, down)
        assert down.registers <= 80, (name, down)
    for kernel in reports["routed 1"][1:]:
        assert kernel.bytes_an_instruction >= (0.2 if target == "gfx942" else 0.3), kernel


def test_rows_of_a_routed_ffn_go_through_tensor_cores(built):
    target, reports = built
    for kernel in (*reports["routed 64"][-2:], *reports["routed 128"][-2:]):
        assert kernel.count(TENSOR_CORES[target]) > 0, kernel
    assert reports["routed 512"][1].count(TENSOR_CORES[target]) > 0
    if target != "sm_100":
        for kernel in reports["routed 8"][1:]:
            assert kernel.count("HMMA|v_mfma") > 0, kernel


def test_a_basis_takes_two_launches_for_all_that_is_stacked(built):
    _, reports = built
    for name, kernels in reports.items():
        if name.startswith("basis"):
            kind = "gemv" if name.startswith("basis 1,") else "gemm"
            assert [kernel.name for kernel in kernels] == [f"_basis_{kind}", f"_coefficients_{kind}"], name


def test_a_basis_streams_weights_in_16_byte_loads_that_instructions_keep_up_with(built):
    """Odd ranks too: rows are aligned by zero columns. gfx942 issues for 64 lanes at once."""
    target, reports = built
    least = 0.19 if target == "gfx942" else 0.25
    for name, kernels in reports.items():
        if not name.startswith("basis"):
            continue
        for kernel in kernels:
            assert kernel.bytes_an_instruction >= least, (name, kernel)
            if name.startswith("basis 1,") and target != "gfx942":
                assert kernel.count(r"LDG\.E\.EF\.128") == 8, name  # a step, and the next
                assert kernel.registers <= 128, name  # four programs of four warps a multiprocessor
        if name.endswith("factored") and target != "gfx942":
            assert kernels[0].count("LDG.*U16") == 0


def test_the_second_launch_of_a_basis_waits_with_weights_on_their_way(built, monkeypatch, tmp_path):
    target, reports = built
    waits = target in ("sm_90", "sm_100")
    for name in (name for name in reports if name.startswith("basis")):
        first, second = reports[name]
        assert (first.count("PREEXIT"), second.count("ACQBULK")) == (waits, waits)
    if waits:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        with compile_only(target) as kernels:
            basis(1, *BASES["o 20 %"])
        code = kernels[1].asm["ptx"]
        in_order = re.findall(r"ld\.global\S*evict_first|griddepcontrol\.wait|ld\.global(?!\S*evict)", code)
        assert [text.partition("ld.global")[2][:4] for text in in_order[:4]] == [".L1:"] * 4
        assert in_order.index("griddepcontrol.wait") == 4 < in_order.index("ld.global")
