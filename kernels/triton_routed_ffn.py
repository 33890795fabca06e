"""Triton kernels of the routed_ffn format, three launches: triton_router.py, wake, triton_routed_down.py.

The router leaves a byte for each row and group. It becomes a list of awake neurons without a word to the host: every
program of `wake` sums the bytes up, finds the neurons that its own places in the list stand for, and ends where the
list has ended. So the grid is that of all neurons, a captured graph fits any decision, and compaction is no launch of
its own. For `down` the programs write down the list, and the hidden values at the same places.

From two rows on the list is that of all rows together, and a row's own bytes cut its hidden values; above
tuning.UNION_ROWS it is the list of all neurons, and above tuning.masked_rows cuBLAS multiplies. A row's result is that
of its own groups on each of these paths.

Each launch begins while the one ahead of it ends (tuning.overlaps); the router's weights are on their way by then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import triton_routed_down, triton_router, tuning
from .routed_ffn import count
from .triton_fused import activate

Tensor = torch.Tensor
ACT_BLOCK = 1024


@triton.jit
def _any_row(chosen_ptr, M, G, g, BLOCK_M: tl.constexpr):
    """int32 [BLOCK_G]: 1 where one of up to BLOCK_M rows wakes the group."""
    awake = tl.load(chosen_ptr + g, mask=g < G, other=0).to(tl.int32)
    for row in tl.static_range(1, BLOCK_M):
        awake |= tl.load(chosen_ptr + row * G + g, mask=(g < G) & (row < M), other=0).to(tl.int32)
    return awake


@triton.jit
def _listed(
    chosen_ptr, M, G, place, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    """(the neurons at places [place, place + BLOCK_N) of the list of awake ones, how many it has).

    The awake group of rank r is the number of those groups up to which no more than r are awake.
    """
    awake = _any_row(chosen_ptr, M, G, tl.arange(0, BLOCK_G), BLOCK_M)
    until = tl.cumsum(awake, axis=0)
    if BLOCK_N > SIZE:
        rank = place // SIZE + tl.arange(0, BLOCK_N // SIZE)
        group = tl.sum((until[:, None] <= rank[None, :]).to(tl.int32), axis=0)
        neuron = tl.reshape(group[:, None] * SIZE + tl.arange(0, SIZE)[None, :], [BLOCK_N])
    else:
        group = tl.sum((until <= place // SIZE).to(tl.int32), axis=0)
        neuron = group * SIZE + place % SIZE + tl.arange(0, BLOCK_N)
    return neuron, tl.sum(awake, axis=0) * SIZE


@triton.jit
def _keep_books(
    chosen_ptr,
    awake_ptr,
    counts_ptr,
    state_ptr,
    count,
    tickets,
    M,
    G,
    PADDED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Write the state, see Hidden; add rows, groups that they woke and groups that were read to the counts."""
    for start in range(0, tickets + 1, BLOCK_G):
        at = start + tl.arange(0, BLOCK_G)
        tl.store(state_ptr + at, tl.where(at == 0, count, 0), mask=at <= tickets)
    g = tl.arange(0, BLOCK_G)
    woken = tl.zeros([BLOCK_G], tl.int32)
    read = tl.zeros([BLOCK_G], tl.int32)
    rows = tl.sum(woken, axis=0)
    for first in range(0, M, 8):  # eight loads on their way at once
        for i in tl.static_range(8):
            row = first + i
            chosen = tl.load(chosen_ptr + row * G + g, mask=(g < G) & (row < M), other=0).to(tl.int32)
            woken += chosen
            read |= chosen
            if PADDED:
                rows += (tl.load(awake_ptr + row, mask=row < M, other=0) != 0).to(tl.int32)
            else:
                rows += tl.where(row < M, 1, 0)
    at = tl.arange(0, 4)
    new = tl.where(at == 0, rows, tl.where(at == 1, tl.sum(woken, axis=0), tl.sum(read, axis=0)))
    tl.store(counts_ptr + at, tl.load(counts_ptr + at, mask=at < 3, other=0) + new, mask=at < 3)


@triton.jit
def _wake_gemv(
    x_ptr,
    in_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    chosen_ptr,
    awake_ptr,
    counts_ptr,
    h_ptr,
    list_ptr,
    state_ptr,
    K,
    G,
    tickets,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    place = program * BLOCK_N + tl.arange(0, BLOCK_N)
    neuron, count = _listed(chosen_ptr, 1, G, program * BLOCK_N, SIZE, 1, BLOCK_N, BLOCK_G)
    if program == tl.num_programs(0) - 1:  # which seldom has a neuron of its own
        _keep_books(chosen_ptr, awake_ptr, counts_ptr, state_ptr, count, tickets, 1, G, PADDED, BLOCK_G)
    if program * BLOCK_N >= count:
        return
    listed = place < count
    tl.store(list_ptr + place, neuron, mask=listed)
    k = tl.arange(0, BLOCK_K)
    rows = in_ptr + neuron[:, None].to(tl.int64) * K + k[None, :]
    up_rows = in_ptr + (G * SIZE + neuron)[:, None].to(tl.int64) * K + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        mask = listed[:, None] & inside[None, :]
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        w = tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x[None, :]
        if GATED:
            w = tl.load(up_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
            up += w.to(tl.float32) * x[None, :]
    h, other = tl.sum(total, axis=1), tl.sum(up, axis=1)
    if GATED:
        if GATE_BIAS:
            h += tl.load(gate_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)
        if UP_BIAS:
            other += tl.load(up_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)
        h = activate(h, ACT) * other
    else:
        if UP_BIAS:
            h += tl.load(up_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)
        h = activate(h, ACT)
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=listed)


@triton.jit
def _wake_gemm(
    x_ptr,
    in_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    chosen_ptr,
    awake_ptr,
    counts_ptr,
    h_ptr,
    list_ptr,
    state_ptr,
    M,
    K,
    G,
    tickets,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    LISTED: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Row tiles vary fastest: programs that run together share their weights, the larger operand.
    tile, program = tl.program_id(0), tl.program_id(1)
    place = program * BLOCK_N + tl.arange(0, BLOCK_N)
    count = G * SIZE
    neuron = place
    if LISTED:  # there is one tile of rows
        neuron, count = _listed(chosen_ptr, M, G, program * BLOCK_N, SIZE, BLOCK_M, BLOCK_N, BLOCK_G)
    last = tl.num_programs(1) - 1  # which has no neuron of its own, unless all are awake
    if (program == (last if LISTED else 0)) & (tile == 0):
        _keep_books(chosen_ptr, awake_ptr, counts_ptr, state_ptr, count, tickets, M, G, PADDED, BLOCK_G)
    if program * BLOCK_N >= count:
        return
    listed = place < count
    if LISTED:
        tl.store(list_ptr + place, neuron, mask=listed)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    rows = in_ptr + neuron[None, :].to(tl.int64) * K + k[:, None]
    up_rows = in_ptr + (G * SIZE + neuron)[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x = tl.load(x_rows + start, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        mask = listed[None, :] & inside[:, None]
        w = tl.load(rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
        total = tl.dot(x, w, total, input_precision="ieee")
        if GATED:
            w = tl.load(up_rows + start, mask=mask, other=0.0, eviction_policy="evict_first")
            up = tl.dot(x, w, up, input_precision="ieee")
    if GATED:
        if GATE_BIAS:
            total += tl.load(gate_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)[None, :]
        if UP_BIAS:
            up += tl.load(up_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACT) * up
    else:
        if UP_BIAS:
            total += tl.load(up_bias_ptr + neuron, mask=listed, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACT)
    m = m[:, None].to(tl.int64)
    mask = (m < M) & listed[None, :]
    chosen = tl.load(chosen_ptr + m * G + (neuron // SIZE)[None, :], mask=mask, other=0)
    total = tl.where(chosen != 0, total, 0.0)
    tl.store(h_ptr + m * (G * SIZE) + place[None, :], total.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_act(
    gate_ptr,
    up_ptr,
    chosen_ptr,
    h_ptr,
    size,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h [M, F], of `size` elements: act(gate) * up, or act(up); zero where a row does not wake the neuron's group."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    h = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        h *= activate(tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32), ACT)
    else:
        h = activate(h, ACT)
    chosen = tl.load(chosen_ptr + at // SIZE, mask=inside, other=0)  # rows are whole groups
    tl.store(h_ptr + at, tl.where(chosen != 0, h, 0.0).to(h_ptr.dtype.element_ty), mask=inside)


class Weights(NamedTuple):
    """An FFN as the kernels read it, all contiguous.

    groups: [P, G, size, K] of x's dtype: gate where there is one (P = 3), up, and down transposed. biases: gate [F],
    up [F] and down [K], or None each. router: fp32 [G, K]. act: one of fused.ACTIVATIONS. threshold: of a logit.
    """

    groups: Tensor
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    router: Tensor
    act: str
    threshold: float

    @property
    def gated(self) -> bool:
        return len(self.groups) == 3

    @property
    def size(self) -> int:
        return self.groups.shape[2]

    @property
    def neurons(self) -> int:
        return len(self.router) * self.size

    @property
    def down(self) -> Tensor:
        return self.groups.view(-1, self.groups.shape[3])[-self.neurons :]


class Hidden(NamedTuple):
    """What `wake` leaves for the sum: values h [M, F] at their places, and the list that says whose they are.

    listed: neurons int32 [F] by place, or None where place and neuron are the same. state: int32, the number of places
    in use, then a zero for each block of y.
    """

    h: Tensor
    listed: Tensor | None
    state: Tensor


def routed_ffn(
    x: Tensor,
    weights: Weights,
    counts: Tensor,
    awake: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """x [M, K] contiguous -> y [M, K] = ffn(rms_norm(x)) + residual, norm and residual where given.

    counts: int64 [3], to which rows, groups that they woke and groups that were read are added. awake: int64 [M]; rows
    where it is 0 wake nothing. norm: fp32 [K].
    """
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    m, name = len(x), tuning.target()
    chosen, x = triton_router.route(x, weights.router, weights.threshold, awake, norm, eps)
    if m > tuning.masked_rows(x.dtype, name):
        count(counts, chosen, awake)
        return _by_cublas(x, weights, chosen, residual)
    tile = tuning.routed_tile(m, x.dtype, name, tuning.ROUTED_DOWN)
    hidden = wake(x, weights, chosen, counts, awake, triton_routed_down.blocks(m, x.shape[1], tile))
    triton_routed_down.down(hidden, weights.down, weights.biases[2], residual, y, tile)
    return y


def wake(x: Tensor, weights: Weights, chosen: Tensor, counts: Tensor, awake: Tensor | None, tickets: int) -> Hidden:
    """The hidden values of the neurons that any row wakes, or of all; zero where a row does not wake them."""
    (m, k), groups, name = x.shape, len(weights.router), tuning.target()
    tile = tuning.routed_tile(m, x.dtype, name, tuning.ROUTED_WAKE)
    listing = m <= tuning.UNION_ROWS.get(name, tuning.UNION_ROWS["default"])
    integers = x.new_empty(weights.neurons + 1 + tickets, dtype=torch.int32)
    listed, state = integers[: weights.neurons], integers[weights.neurons :]
    h = x.new_empty(m, weights.neurons)
    tensors = (x, weights.groups, *weights.biases[:2], chosen, awake, counts, h, listed, state)
    arguments = {
        "ACT": weights.act,
        "GATED": weights.gated,
        "GATE_BIAS": weights.biases[0] is not None,
        "UP_BIAS": weights.biases[1] is not None,
        "SIZE": weights.size,
        "PADDED": awake is not None,
        "BLOCK_G": triton.next_power_of_2(groups),
        **tuning.early(name),
        **tuning.blocks(tile),
    }
    if m == 1:
        _wake_gemv[(triton.cdiv(weights.neurons, tile.n),)](*tensors, k, groups, tickets, **arguments)
    else:
        grid = (triton.cdiv(m, tile.m), triton.cdiv(weights.neurons, tile.n))
        _wake_gemm[grid](*tensors, m, k, groups, tickets, LISTED=listing, BLOCK_M=tile.m, **arguments)
    return Hidden(h, listed if listing else None, state)


def _by_cublas(x: Tensor, weights: Weights, chosen: Tensor, residual: Tensor | None) -> Tensor:
    """Every neuron of every row, the sleeping ones masked between two products of cuBLAS."""
    ins = [rows.flatten(0, 1) for rows in weights.groups[:-1]]
    gate_bias, up_bias, down_bias = weights.biases
    up = F.linear(x, ins[-1], up_bias)
    gate = F.linear(x, ins[0], gate_bias) if weights.gated else None
    h = torch.empty_like(up)
    given = {"ACT": weights.act, "GATED": weights.gated, "SIZE": weights.size, "BLOCK": ACT_BLOCK}
    _masked_act[(triton.cdiv(h.numel(), ACT_BLOCK),)](gate, up, chosen, h, h.numel(), **given)
    y = h @ weights.down if down_bias is None else torch.addmm(down_bias, h, weights.down)
    return y if residual is None else y + residual
