"""Launch sizes of the Triton kernels: a table that people edit, with a default. Nothing is searched at run time.

Keys are targets: "sm_90", "gfx942", ... as Triton names the device in use, "default" for any other,
and "interpret" for the interpreter, which pays by the operation and so wants few, large tiles.
No entry has been timed on a GPU yet: the defaults follow from bytes in flight (48 KiB and more for
each multiprocessor), registers and shared memory, which tests/test_triton_compile.py checks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .dispatch import interpreting


class Tile(NamedTuple):
    """What one program computes: `m` rows by `n` outputs, `k` inputs a step, and how it is launched."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# k counts 2-byte elements in both tables; fp32 takes half of it.

# M = 1. Four rows of 1024: every thread has four 16-byte loads of weights in flight in 80 registers or fewer.
GEMV = {
    "default": Tile(1, 4, 1024, warps=4, stages=1),
    "interpret": Tile(1, 1024, 1024, warps=1, stages=1),
}

# M > 1: the first tile with m >= M, else the last.
GEMM = {
    "default": (
        Tile(16, 32, 128, warps=4, stages=4),
        Tile(32, 32, 128, warps=4, stages=4),
        Tile(64, 32, 128, warps=4, stages=3),
        Tile(128, 128, 64, warps=8, stages=3),
    ),
    "gfx942": (
        Tile(16, 32, 128, warps=4, stages=2),
        Tile(32, 32, 128, warps=4, stages=2),
        Tile(64, 32, 128, warps=4, stages=2),
        Tile(128, 128, 64, warps=8, stages=2),
    ),
    "interpret": (Tile(16, 256, 256, warps=1, stages=1), Tile(128, 256, 256, warps=1, stages=1)),
}

# M > 1 in one launch with what stands around the linear, where K cannot be cut: of the tiles with the smallest m >= M
# the first that fills the machine, else the last. Gate and up share its n, down to 16 each.
WHOLE_GEMM = {
    "default": (
        Tile(16, 32, 128, warps=4, stages=4),
        Tile(16, 16, 256, warps=4, stages=4),
        Tile(64, 32, 64, warps=4, stages=4),
    ),
    "gfx942": (
        Tile(16, 32, 128, warps=4, stages=2),
        Tile(16, 16, 256, warps=4, stages=2),
        Tile(64, 32, 128, warps=4, stages=2),
    ),
    "interpret": (Tile(64, 512, 256, warps=1, stages=1),),
}

# Both launches of shared_basis at M = 1, the first tile that fills the machine: its rows are short, so a program takes
# many of them to be worth its start, and shares what it gathered among them. A program loads one step ahead: 16 KiB.
_OF_16_ROWS_AND_FEWER = tuple(Tile(1, n, 4096 // n, warps=4, stages=1) for n in (16, 8, 4))  # 4 x 1024 spills on sm_100
BASIS_GEMV = {
    "default": (Tile(1, 16, 256, warps=4, stages=1), Tile(1, 8, 512, warps=4, stages=1)),
    "sm_80": _OF_16_ROWS_AND_FEWER,
    "sm_90": _OF_16_ROWS_AND_FEWER,
    "gfx942": (Tile(1, 16, 512, warps=4, stages=1), Tile(1, 8, 512, warps=4, stages=1)),
    "interpret": (Tile(1, 1024, 1024, warps=1, stages=1),),
}

# M > 1, the first launch, which gathers a tile of x for as many outputs as it can.
BASIS_GEMM: dict[str, tuple[Tile, ...]] = {
    "default": (Tile(16, 32, 128, warps=4, stages=4), Tile(64, 64, 64, warps=4, stages=4)),
    "gfx942": (Tile(16, 64, 64, warps=4, stages=2), Tile(64, 64, 64, warps=2, stages=2)),
    "interpret": (Tile(16, 256, 256, warps=1, stages=1), Tile(128, 256, 256, warps=1, stages=1)),
}

# two_four at M = 1: k / 32 words of a row, fewer than a program has threads, or x changes hands through shared memory.
TWO_FOUR_GEMV = {
    "default": Tile(1, 32, 2048, warps=4, stages=1),
    "interpret": Tile(1, 256, 2048, warps=1, stages=1),
}

# bitmap at M = 1, rows walked in step: n rows, and a warp for each share of a row's values.
# Neighbouring threads have neighbouring rows, as many as a warp has threads.
ELL_GEMV = {
    "default": Tile(1, 32, 0, warps=16, stages=1),
    "gfx942": Tile(1, 64, 0, warps=8, stages=1),
    "interpret": Tile(1, 256, 0, warps=4, stages=1),
}

# Sparse formats at M > 1: tiles made dense in registers, which cost a program more the fewer rows share them.
SPARSE_GEMM: dict[str, tuple[Tile, ...]] = {
    "default": (Tile(16, 32, 128, warps=4, stages=2), Tile(64, 64, 128, warps=4, stages=2)),
    "sm_100": (Tile(16, 32, 128, warps=4, stages=2), Tile(64, 64, 64, warps=4, stages=2)),
    "interpret": (Tile(16, 256, 512, warps=1, stages=1), Tile(64, 256, 512, warps=1, stages=1)),
}

# The whole weight made dense in memory, for so many rows as m says or more; bitmap's odd rows at M = 1 as well.
SPREAD = {"default": Tile(512, 16, 256, warps=4, stages=1), "interpret": Tile(512, 256, 512, warps=1, stages=1)}

EXPANDED_ROWS = {"default": 256, "interpret": 64}
"""Rows up to which sparse tiles are made dense in registers, once for each tile of rows; above, the weight is made
dense in memory and cuBLAS reads it. Not measured yet. On an H100 (3 TB/s, 800 TFLOP/s) writing and reading 4 bytes a
weight of 16 bits takes as long as the multiplications of some 500 rows; a tile of 64 rows is made dense again for the
next 64, which is paid for by then. Memory for the scratch: one layer's largest weight, lent by torch's allocator."""

# routed_ffn, n neurons of k inputs a step: the first tile with m >= M, else the last. Gate and up each have n rows.
ROUTED_WAKE: dict[str, tuple[Tile, ...]] = {
    "default": (
        Tile(1, 8, 512, warps=4, stages=1),
        Tile(16, 32, 64, warps=4, stages=6),
        Tile(64, 32, 64, warps=4, stages=4),
        Tile(128, 64, 64, warps=8, stages=3),
    ),
    "interpret": tuple(Tile(m, 256, 256, warps=1, stages=1) for m in (1, 16, 64)),
}

# routed_ffn, n outputs from k neurons of the list a step. 256 bytes of a neuron's row are two lines of the cache.
ROUTED_DOWN: dict[str, tuple[Tile, ...]] = {
    "default": (
        Tile(1, 128, 32, warps=4, stages=1),
        Tile(16, 64, 128, warps=4, stages=4),
        Tile(64, 64, 64, warps=4, stages=3),
        Tile(128, 64, 64, warps=8, stages=3),
    ),
    "interpret": (Tile(1, 256, 256, warps=1, stages=1), Tile(64, 256, 256, warps=1, stages=1)),
}

MOST_ROUTED_SPLITS = {"default": 32, "interpret": 3}
"""Splits of the list of awake neurons: the last of them adds up so many sums of its block."""

ROUTER_ROWS = {"default": 8, "interpret": 64}
"""Rows of x that a program of the router takes one after the other; decisions do not depend on it."""

ROUTER = {
    "default": Tile(64, 16, 64, warps=4, stages=3),
    "interpret": Tile(64, 64, 256, warps=1, stages=1),
}
"""The router's tiles of m rows and n groups; k counts inputs of 4 bytes."""

ONE_BY_ONE_ROWS = {"default": 32, "interpret": 32}
"""Rows up to which a router program takes them one by one, in one launch with the norm. Not measured yet."""

UNION_ROWS = {"default": 16, "interpret": 16}
"""Rows up to which only neurons that one of them wakes are read, a tile's worth. Not measured yet: what is saved goes
with 1 - (1 - p)^M of p awake, what the list costs is a prologue of every program."""

MASKED_ROWS = {"default": 128, "interpret": 64}
"""Rows up to which tiles of all neurons are masked as they are made; above, cuBLAS multiplies and a launch masks."""

# Attention: m query rows (times the heads that share a key head) against n keys a step.
ATTENTION = {
    "default": (Tile(16, 64, 0, warps=4, stages=2), Tile(64, 64, 0, warps=4, stages=2)),
    "sm_80": (Tile(16, 64, 0, warps=4, stages=2), Tile(64, 32, 0, warps=4, stages=2)),  # 64 x 64 spills there
    "interpret": (Tile(16, 64, 0, warps=1, stages=1), Tile(64, 128, 0, warps=1, stages=1)),
}

# Attention of a decode step: n keys a step against the heads that share a key head.
DECODE = {
    "default": Tile(16, 32, 0, warps=4, stages=2),
    "sm_100": Tile(16, 32, 0, warps=8, stages=2),  # four warps spill there at a head of 80
    "interpret": Tile(16, 64, 0, warps=1, stages=1),
}

MOST_KV_SPLITS = 32
"""Splits of one sequence: the merge then reads 16 KiB a head."""

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpret": 4, "default": 132}
"""Programs that run at once, at least: a smaller grid leaves part of the machine idle, so K is split."""

MIN_SPLIT_K = 512
"""Inputs that a split must keep: below, writing and adding its partial sums costs more than it fills."""


def target() -> str:
    """The name of the device that a launch would compile for."""
    if interpreting():
        return "interpret"
    current = triton.runtime.driver.active.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else str(current.arch)


def early(name: str) -> dict[str, bool]:
    """The launch arguments of a kernel that begins early where it `overlaps` and says so by EARLY."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(name) else {"EARLY": False}


def overlaps(name: str) -> bool:
    """True where a launch may begin while the one ahead of it still runs and wait inside: NVIDIA from sm_90 on."""
    return name.startswith("sm_") and int(name[3:]) >= 90


def pick(tiles: tuple[Tile, ...], rows: int) -> Tile:
    """The first tile that holds `rows`, else the largest."""
    return next((tile for tile in tiles if tile.m >= rows), tiles[-1])


def linear_tile(m: int, dtype: torch.dtype, name: str, gemm: dict[str, tuple[Tile, ...]] = GEMM) -> Tile:
    """The launch of M = m rows of `dtype` on target `name`, from GEMV or `gemm`."""
    tile = GEMV.get(name, GEMV["default"]) if m == 1 else pick(gemm.get(name, gemm["default"]), m)
    return _of_dtype(tile, dtype)


def whole_tile(m: int, n: int, dtype: torch.dtype, name: str, gated: bool) -> Tile:
    """The launch of M = m rows whose K stays whole, for n outputs, each of gate and of up if gated."""
    tiles: tuple[Tile, ...] = (GEMV.get(name, GEMV["default"]),)
    if m > 1:
        table = WHOLE_GEMM.get(name, WHOLE_GEMM["default"])
        tiles = tuple(tile for tile in table if tile.m == pick(table, m).m)
    if gated:
        least = 1 if m == 1 else 16  # as tensor cores take them
        tiles = tuple(tile._replace(n=max(tile.n // 2, least)) for tile in tiles)
    wanted = MULTIPROCESSORS.get(name, MULTIPROCESSORS["default"])
    filling = (tile for tile in tiles if triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) >= wanted)
    return _of_dtype(next(filling, tiles[-1]), dtype)


def basis_gemv_tile(outputs: tuple[int, ...], dtype: torch.dtype, name: str) -> Tile:
    """The launch of M = 1 for parts of so many outputs: three programs and more a multiprocessor, 48 KiB in flight."""
    tiles, wanted = BASIS_GEMV.get(name, BASIS_GEMV["default"]), 3 * MULTIPROCESSORS.get(name, 132)
    filling = (tile for tile in tiles if sum(triton.cdiv(n, tile.n) for n in outputs) >= wanted)
    return _of_dtype(next(filling, tiles[-1]), dtype)


def expanded_rows(dtype: torch.dtype, name: str) -> int:
    """Rows up to which `_gemm` of triton_sparse.py is the path; fp32 has no tensor cores at full precision."""
    rows = EXPANDED_ROWS.get(name, EXPANDED_ROWS["default"])
    return min(rows, 16) if dtype == torch.float32 else rows


def sparse_tile(m: int, dtype: torch.dtype, name: str, gated: bool) -> Tile:
    """The launch of M = m > 1 rows of a sparse format; gate and up share its n, down to the 16 of tensor cores."""
    tile = pick(SPARSE_GEMM.get(name, SPARSE_GEMM["default"]), m)
    return _of_dtype(tile._replace(n=max(tile.n // 2, 16)) if gated else tile, dtype)


def routed_tile(m: int, dtype: torch.dtype, name: str, table: dict[str, tuple[Tile, ...]]) -> Tile:
    """The launch of M = m rows from one of routed_ffn's tables; fp32 takes half of its k."""
    return _of_dtype(pick(table.get(name, table["default"]), m), dtype)


def routed_splits(programs: int, neurons: int, tile: Tile, name: str) -> int:
    """Into how many parts the list of awake neurons is cut: six small programs a multiprocessor, or two large ones."""
    wanted = (6 if tile.m == 1 else 2) * MULTIPROCESSORS.get(name, MULTIPROCESSORS["default"])
    most = min(MOST_ROUTED_SPLITS.get(name, MOST_ROUTED_SPLITS["default"]), triton.cdiv(neurons, tile.k))
    return max(1, min(most, triton.cdiv(wanted, programs)))


def masked_rows(dtype: torch.dtype, name: str) -> int:
    """Rows up to which routed_ffn's tiles are the path; fp32 has no tensor cores at full precision."""
    rows = MASKED_ROWS.get(name, MASKED_ROWS["default"])
    return min(rows, 16) if dtype == torch.float32 else rows


def two_four_tile(name: str, gated: bool) -> Tile:
    """The launch of M = 1 of two_four; gate and up share its n."""
    tile = TWO_FOUR_GEMV.get(name, TWO_FOUR_GEMV["default"])
    return tile._replace(n=tile.n // 2) if gated else tile


def bitmap_tile(name: str, gated: bool) -> Tile:
    """The launch of M = 1 of bitmap by its bits; gate and up share its n."""
    tile = SPREAD.get(name, SPREAD["default"])
    return tile._replace(n=tile.n // 2) if gated else tile


def decode_tile(group: int, name: str) -> Tile:
    """The launch of a decode step's attention for `group` query heads a key head: a lone one multiplies and adds."""
    tile = DECODE.get(name, DECODE["default"])
    return tile._replace(m=1 if group == 1 else max(tile.m, triton.next_power_of_2(group)))


def decode_splits(programs: int, keys: int, tile: Tile, name: str) -> int:
    """Into how many parts (a power of two) a table of `keys` is cut: two programs and more a multiprocessor."""
    wanted = 2 * MULTIPROCESSORS.get(name, MULTIPROCESSORS["default"])
    parts = 1
    while parts < MOST_KV_SPLITS and programs * parts < wanted and keys > parts * tile.n:
        parts *= 2
    return parts


def _of_dtype(tile: Tile, dtype: torch.dtype) -> Tile:
    return tile._replace(k=tile.k // 2) if dtype == torch.float32 else tile


def splits(programs: int, k: int, tile: Tile, name: str) -> int:
    """Into how many parts K is cut (a power of two) so that the grid fills the machine `name`."""
    wanted = MULTIPROCESSORS.get(name, MULTIPROCESSORS["default"])
    parts = 1
    while programs * parts < wanted and k >= 2 * parts * max(MIN_SPLIT_K, tile.k):
        parts *= 2
    return parts


def blocks(tile: Tile) -> dict[str, int]:
    """The launch arguments of a tile, less its rows."""
    return {"BLOCK_N": tile.n, "BLOCK_K": tile.k, "num_warps": tile.warps, "num_stages": tile.stages}
