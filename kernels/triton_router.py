"""The router of the routed_ffn format: which groups of neurons each row wakes.

A program has some groups' rows of the router in registers and takes one row of x after the other: the sums of a
decision are made in the same order whatever M is, by the same compiled kernel, so that rows with the same bits decide
alike in any company. An RMSNorm ahead is computed on the way, as all of a row is there.

Above tuning.ONE_BY_ONE_ROWS rows, where reading x for every program takes longer than the FFN, tiles go through tensor
cores first. Their sums are in another order: what lies nearer to the threshold than MARGIN allows is left UNSURE, and a
second launch, the kernel of the few rows, decides it. So more rows never decide otherwise.

The launch begins while the one ahead of it ends (tuning.overlaps): the router's weights are on their way by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import triton_fused, tuning

Tensor = torch.Tensor
PROGRAM_GROUPS, WARP_INPUTS = 2, 1024
"""Groups of a program, and inputs for each of its warps: a thread holds 64 numbers of the router.

Not a table's to choose: sums of a decision are made in the order that follows from them.
"""


UNSURE = 2
MARGIN = 2.0**-11
"""Of |x| |w|: more than two ways to sum x . w can differ by. Three TF32 products of 8 inputs at a time, each sum cut
off at 22 bits or more, are off by some 2^-12 at 4096 inputs even where all errors point the same way."""


@triton.jit
def _route_tiles(
    x_ptr,
    router_ptr,
    awake_ptr,
    chosen_ptr,
    M,
    K,
    G,
    threshold,
    margin,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """0, 1 or UNSURE for a tile of rows and groups."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    g = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    columns = router_ptr + g[None, :].to(tl.int64) * K + k[:, None]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_squares = tl.zeros([BLOCK_M], tl.float32)
    w_squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x = tl.load(rows + start, mask=(m < M)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        w = tl.load(columns + start, mask=(g < G)[None, :] & inside[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision=PRECISION)
        x_squares += tl.sum(x * x, axis=1)
        w_squares += tl.sum(w * w, axis=0)
    slack = margin * tl.sqrt(x_squares)[:, None] * tl.sqrt(w_squares)[None, :]
    chosen = tl.where(tl.abs(logits - threshold) > slack, (logits > threshold).to(tl.int32), 2)
    if PADDED:
        chosen = tl.where((tl.load(awake_ptr + m, mask=m < M, other=0) != 0)[:, None], chosen, 0)
    at = chosen_ptr + m[:, None].to(tl.int64) * G + g[None, :]
    tl.store(at, chosen.to(tl.int8), mask=(m < M)[:, None] & (g < G)[None, :])


@triton.jit(do_not_specialize=["M", "settles"])
def _route(
    x_ptr,
    norm_ptr,
    router_ptr,
    awake_ptr,
    normed_ptr,
    chosen_ptr,
    M,
    K,
    G,
    threshold,
    eps,
    settles,
    NORM: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    first = tl.program_id(1).to(tl.int64) * ROWS
    k = tl.arange(0, BLOCK_K)
    m = first + tl.arange(0, ROWS)
    known = (m < M)[:, None] & (group < G)[None, :] & (settles != 0)
    unsure = tl.load(chosen_ptr + m[:, None] * G + group[None, :], mask=known, other=0) == 2
    if tl.max(tl.max(unsure.to(tl.int32), axis=1), axis=0) < settles:
        return
    mask = (group < G)[:, None] & (k < K)[None, :]
    weights = tl.load(router_ptr + group[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for i in range(min(ROWS, M - tl.program_id(1) * ROWS)):
        row = first + i
        told = tl.load(chosen_ptr + row * G + group, mask=(group < G) & (settles != 0), other=2)
        if tl.max(told, axis=0) == 2:
            x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0)
            if NORM:
                wide = x.to(tl.float32)
                scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / K + eps)
                x = (wide * scale * tl.load(norm_ptr + k, mask=k < K, other=0.0)).to(x.dtype)
                if tl.program_id(0) == 0:
                    tl.store(normed_ptr + row * K + k, x, mask=k < K)
            chosen = tl.sum(x.to(tl.float32)[None, :] * weights, axis=1) > threshold
            if PADDED:
                chosen = chosen & (tl.load(awake_ptr + row) != 0)
            tl.store(chosen_ptr + row * G + group, chosen.to(tl.int8), mask=(group < G) & (told == 2))


def route(
    x: Tensor,
    router: Tensor,
    threshold: float,
    awake: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """int8 [M, G], 1 where a row of x [M, K] wakes a group: its logit exceeds `threshold` and its `awake` is not 0.

    Also x, through an RMSNorm where one is given. router: fp32 [G, K]. See routed_ffn.decide for the definition.
    """
    chosen, name = x.new_empty(x.shape[0], len(router), dtype=torch.int8), tuning.target()
    if x.shape[0] <= tuning.ONE_BY_ONE_ROWS.get(name, tuning.ONE_BY_ONE_ROWS["default"]):
        return chosen, _launch(x, router, threshold, awake, norm, eps, chosen, False)
    if norm is not None:
        x = triton_fused.rms_norm(x, norm, eps)
    (m, k), tile = x.shape, tuning.ROUTER.get(name, tuning.ROUTER["default"])
    _route_tiles[triton.cdiv(m, tile.m), triton.cdiv(len(router), tile.n)](
        x,
        router,
        awake,
        chosen,
        m,
        k,
        len(router),
        threshold,
        MARGIN,
        PADDED=awake is not None,
        PRECISION="ieee" if name.startswith("gfx") else "tf32x3",
        BLOCK_M=tile.m,
        **tuning.blocks(tile),
    )
    return chosen, _launch(x, router, threshold, awake, None, eps, chosen, True)


def _launch(
    x: Tensor,
    router: Tensor,
    threshold: float,
    awake: Tensor | None,
    norm: Tensor | None,
    eps: float,
    chosen: Tensor,
    settles: bool,
) -> Tensor:
    """Fill `chosen`, or settle what is UNSURE in it; x as the FFN reads it."""
    (m, k), groups, name = x.shape, len(router), tuning.target()
    normed = x if norm is None else torch.empty_like(x)
    block, rows = triton.next_power_of_2(k), tuning.ROUTER_ROWS.get(name, tuning.ROUTER_ROWS["default"])
    _route[triton.cdiv(groups, PROGRAM_GROUPS), triton.cdiv(m, rows)](
        x,
        norm,
        router,
        awake,
        normed,
        chosen,
        m,
        k,
        groups,
        threshold,
        eps,
        int(settles),
        NORM=norm is not None,
        PADDED=awake is not None,
        GROUPS=PROGRAM_GROUPS,
        ROWS=rows,
        BLOCK_K=block,
        num_warps=min(max(block // WARP_INPUTS, 1), 16),
        **tuning.early(name)
        | ({"launch_pdl": False} if settles and tuning.overlaps(name) else {}),  # it reads `chosen`
    )
    return normed
