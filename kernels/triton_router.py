"""The router of the routed_ffn format: which groups of neurons each row wakes.

A program has some groups' rows of the router in registers and takes one row of x after the other: the sums of a
decision are made in the same order whatever M is, by the same compiled kernel, so that rows with the same bits decide
alike in any company. An RMSNorm ahead is computed on the way, as all of a row is there.

The launch begins while the one ahead of it ends (tuning.overlaps): the router's weights are on their way by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import tuning

Tensor = torch.Tensor
PROGRAM_GROUPS, WARP_INPUTS = 2, 1024
"""Groups of a program, and inputs for each of its warps: a thread holds 64 numbers of the router.

Not a table's to choose: sums of a decision are made in the order that follows from them.
"""


@triton.jit(do_not_specialize=["M"])
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
    mask = (group < G)[:, None] & (k < K)[None, :]
    weights = tl.load(router_ptr + group[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for i in range(min(ROWS, M - tl.program_id(1) * ROWS)):
        row = first + i
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
        tl.store(chosen_ptr + row * G + group, chosen.to(tl.int8), mask=group < G)


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
    (m, k), groups, name = x.shape, len(router), tuning.target()
    chosen = x.new_empty(m, groups, dtype=torch.int8)
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
        NORM=norm is not None,
        PADDED=awake is not None,
        GROUPS=PROGRAM_GROUPS,
        ROWS=rows,
        BLOCK_K=block,
        num_warps=min(max(block // WARP_INPUTS, 1), 16),
        **tuning.early(name),
    )
    return chosen, normed
