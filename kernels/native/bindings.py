"""The native CPU library as a class: each of its kernels called with tensors.

The methods of `Library` trust their caller: every check of shapes, dtypes and strides belongs to the launcher that
calls them (dense.py, fused.py, attention.py). Tensors are contiguous unless a method says otherwise, weights of norms
and rotary tables are fp32, and results are written into tensors that the caller made.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
BASIS_WORDS = 7  # a part of basis_linear, as basis.cpp reads it
MOST_PARTS = 8  # of one concat
KINDS = {"silu": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}

_INT, _I64, _F32, _PTR = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_RUN = (_INT, _INT, _INT)  # level, dtype, threads
_SIGNATURES = {
    "pared_best_level": (),
    "pared_linear": (*_RUN, *[_PTR] * 5, _INT, _INT, *[_I64] * 3),
    "pared_sparse_linear": (*_RUN, *[_PTR] * 6, _INT, _INT, *[_I64] * 4),
    "pared_spread": (*_RUN, *[_PTR] * 4, *[_I64] * 3),
    "pared_basis_linear": (*_RUN, *[_PTR] * 2, _I64, _PTR, *[_I64] * 2),
    "pared_routed_ffn": (*_RUN, *[_PTR] * 10, _INT, _INT, *[_I64] * 4, _F32),
    "pared_route": (*_RUN, *[_PTR] * 3, *[_I64] * 3),
    "pared_in_order": (*_RUN, *[_PTR] * 3, *[_I64] * 2),
    "pared_read": (_INT, _INT, _PTR, _I64, _PTR),
    "pared_rms_norm": (*_RUN, *[_PTR] * 3, *[_I64] * 3, _F32),
    "pared_add_rms_norm": (*_RUN, *[_PTR] * 5, *[_I64] * 2, _F32),
    "pared_layer_norm": (*_RUN, *[_PTR] * 4, *[_I64] * 2, _F32),
    "pared_add_layer_norm": (*_RUN, *[_PTR] * 6, *[_I64] * 2, _F32),
    "pared_gated_act": (*_RUN, _INT, *[_PTR] * 2, *[_I64] * 2),
    "pared_act": (*_RUN, _INT, *[_PTR] * 2, *[_I64] * 2),
    "pared_rotary_cache": (*_RUN, *[_PTR] * 9, *[_I64] * 5, _F32),
    "pared_concat": (_INT, *[_PTR] * 2, _I64, _PTR, _I64),
    "pared_paged_attention": (*_RUN, *[_PTR] * 7, *[_I64] * 7, _F32),
    "pared_tape_start": (),
    "pared_tape_stop": (),
    "pared_tape_play": (_PTR, _INT),
    "pared_tape_free": (_PTR,),
}
_RESULTS = {"pared_best_level": _INT, "pared_tape_start": _PTR}

# Rows up to which the native linear beat F.linear in bench/cpu_linear.py, where oneDNN was held to the same
# instruction set. fp16 on an AMX machine has oneDNN's fp16 arithmetic against it; the scalar level never won.
_LINEAR_ROWS = {
    "scalar": {torch.bfloat16: 0, torch.float16: 0, torch.float32: 0},
    "avx2": {torch.bfloat16: 8, torch.float16: 8, torch.float32: 8},
    "avx512": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32},
    "avx512_bf16": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 32},
    "amx": {torch.bfloat16: 64, torch.float16: 4, torch.float32: 32},
}

# With fewer inputs than this a sum is short and its end, which AMX tiles leave to scalar code, weighs more.
_SHALLOW_INPUTS, _SHALLOW_ROWS = 2048, 32

# int8 rows have no dot product of their own: each weight is widened, and arithmetic soon outweighs the bytes saved.
_INT8_ROWS = {"scalar": 0, "avx2": 4, "avx512": 16, "avx512_bf16": 16, "amx": 16}

# sparse_linear against `spread` and F.linear by parts of W. As many rows as a recorded step may have, at least: what
# goes through F.linear cannot be recorded. AMX shares the panels of W that it expands among 512 rows.
_SPARSE_ROWS = {
    "scalar": {torch.bfloat16: 0, torch.float16: 0, torch.float32: 0},
    "avx2": {torch.bfloat16: 8, torch.float16: 8, torch.float32: 8},
    "avx512": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
    "avx512_bf16": {torch.bfloat16: 16, torch.float16: 16, torch.float32: 16},
    "amx": {torch.bfloat16: 512, torch.float16: 4, torch.float32: 16},
}

# basis_linear against two F.linears a part, whose gather and whose z go through memory.
_BASIS_ROWS = _LINEAR_ROWS | {"amx": _LINEAR_ROWS["amx"] | {torch.bfloat16: 128}}

# routed_ffn against F.linear on parts of its weights laid out plainly. AMX reads the weights again for every so many.
_ROUTED_ROWS = _SPARSE_ROWS


class Library:
    """The native kernels of one shared library, at one instruction-set level."""

    def __init__(self, path: Path) -> None:
        """path: the shared library; the level is the best of this CPU."""
        calls = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(calls, name)
            function.argtypes, function.restype = list(arguments), _RESULTS.get(name)
        self.calls, self.path = calls, path
        self._level = self._best = calls.pared_best_level()

    @property
    def level(self) -> str:
        """The instruction set in use, one of LEVELS."""
        return LEVELS[self._level]

    def levels(self) -> tuple[str, ...]:
        """Every level that this CPU can run, slowest first."""
        return LEVELS[: self._best + 1]

    def at(self, level: str) -> Library:
        """The same kernels held to `level`."""
        held = copy.copy(self)
        held._level = LEVELS.index(level)
        if held._level > self._best:
            raise ValueError(f"this CPU runs up to {LEVELS[self._best]}, not {level}")
        return held

    def linear_rows(self, dtype: torch.dtype, inputs: int) -> int:
        """The largest M for which `linear` over `inputs` inputs is the path of choice; F.linear is above it."""
        rows = _LINEAR_ROWS[self.level][dtype]
        return min(rows, _SHALLOW_ROWS) if inputs < _SHALLOW_INPUTS else rows

    def int8_rows(self) -> int:
        """The largest M for which int8 weights stay int8; above, F.linear on the weights that they stand for."""
        return _INT8_ROWS[self.level]

    def sparse_rows(self, dtype: torch.dtype) -> int:
        """The largest M for which `sparse_linear` is the path of choice; above, F.linear on rows that were spread."""
        return _SPARSE_ROWS[self.level][dtype]

    def basis_rows(self, dtype: torch.dtype) -> int:
        """The largest M for which `basis_linear` is the path of choice; two F.linears a part are above it."""
        return _BASIS_ROWS[self.level][dtype]

    def routed_rows(self, dtype: torch.dtype) -> int:
        """The largest M for which `routed_ffn` is the path of choice; F.linear on weights laid out anew above."""
        return _ROUTED_ROWS[self.level][dtype]

    def linear(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> None:
        """out [M, N] = x [M, K] @ w [N, K]^T + bias [N]; x, w, out of one dtype, bias of that or fp32; out may be fp32.

        With a scale, fp32 [N], w is int8 and its row n stands for scale[n] * w[n].

        A row's result does not depend on the other rows nor on M, but for bf16 on AMX between M = 1 and M > 1.
        """
        m, k = x.shape
        self.calls.pared_linear(
            *self._run(x),
            x.data_ptr(),
            w.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            bias is not None and bias.dtype == torch.float32,
            out.dtype == torch.float32,
            m,
            w.shape[0],
            k,
        )

    def sparse_linear(
        self,
        x: torch.Tensor,
        masks: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor,
        bias: torch.Tensor | None,
        per_word: int,
        out: torch.Tensor,
    ) -> None:
        """out [M, N] = x [M, K] @ W [N, K]^T + bias [N] for W as kernels/masked.py lays it out; types as in `linear`.

        The same bits as `linear` on W. A mask with more bits than there are values reads foreign memory.
        """
        pointers = (t.data_ptr() for t in (x, masks, starts, values))
        self.calls.pared_sparse_linear(
            *self._run(x),
            *pointers,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            bias is not None and bias.dtype == torch.float32,
            out.dtype == torch.float32,
            x.shape[0],
            masks.shape[0],
            x.shape[1],
            per_word,
        )

    def spread(
        self, masks: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        """out [R, K] = rows first .. first + R of W, dense."""
        pointers = (t.data_ptr() for t in (masks, starts, values, out))
        self.calls.pared_spread(*self._run(out), *pointers, first, *out.shape)

    def basis_linear(self, x: torch.Tensor, words: Sequence[int], out: torch.Tensor) -> None:
        """out [M, sum N]: for each part, coefficients [N, R] @ z + bias [N], side by side; words: `basis_words` of all.

        z [M, R] = basis [R, K] @ x, or with order int32 [K]: x[order[:R]] + basis [R, K - R] @ x[order[R:]],
        summed in fp32 and rounded once to x's dtype. Rows depend on each other as those of `linear` do.
        """
        count = len(words) // BASIS_WORDS
        packed = _basis_words(count).pack(*words)
        self.calls.pared_basis_linear(
            self._level,
            DTYPES[x.dtype],
            torch.get_num_threads(),
            x.data_ptr(),
            packed,
            count,
            out.data_ptr(),
            *x.shape,
        )

    def routed_ffn(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        router: torch.Tensor,
        counts: torch.Tensor,
        size: int,
        gated: bool,
        kind: str,
        threshold: float,
        awake: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """out [M, K] = the routed FFN of x [M, K], as kernels/routed_ffn.py lays it out and defines it.

        biases: of gate, up and down. counts: int64 [3], to which rows, groups woken and groups read are added.
        A row wakes the same groups in any company and at any M; its sums depend on others as those of `linear` do.
        """
        given = (x, *weights, router, *biases, awake, counts, out)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in given)
        sizes = (*x.shape, len(router), size)
        self.calls.pared_routed_ffn(*self._run(x), *pointers, gated, KINDS[kind], *sizes, threshold)

    def route(self, x: torch.Tensor, router: torch.Tensor, logits: torch.Tensor) -> None:
        """logits fp32 [M, G] = x [M, K] @ router [G, K]^T, bit for bit the sums that decide in `routed_ffn`."""
        pointers = (tensor.data_ptr() for tensor in (x, router, logits))
        self.calls.pared_route(*self._run(x), *pointers, *x.shape, len(router))

    def in_order(self, x: torch.Tensor, order: torch.Tensor, out: torch.Tensor) -> None:
        """out [M, K] = x [M, K][:, order], order int32 [K]: a quarter of the time of torch's index_select."""
        self.calls.pared_in_order(*self._run(x), x.data_ptr(), order.data_ptr(), out.data_ptr(), *x.shape)

    def read(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Read every byte of x as fast as the machine allows: the bench's ceiling. out: int64 [1], a checksum."""
        self.calls.pared_read(
            self._level, torch.get_num_threads(), x.data_ptr(), x.numel() * x.element_size(), out.data_ptr()
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """out [M, D] = x [M, D] / rms(x) * weight [D]; x's rows may lie apart (stride(0) >= D)."""
        m, d = x.shape
        self.calls.pared_rms_norm(
            *self._run(x), x.data_ptr(), weight.data_ptr(), out.data_ptr(), m, d, x.stride(0), eps
        )

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        new_residual: torch.Tensor,
    ) -> None:
        """new_residual [M, D] = x + residual, rounded to their dtype; out = rms_norm(new_residual)."""
        pointers = (t.data_ptr() for t in (x, residual, weight, out, new_residual))
        self.calls.pared_add_rms_norm(*self._run(x), *pointers, *x.shape, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor
    ) -> None:
        """out [M, D] = (x - mean) / std * weight [D] + bias [D]."""
        shift = None if bias is None else bias.data_ptr()
        self.calls.pared_layer_norm(
            *self._run(x), x.data_ptr(), weight.data_ptr(), shift, out.data_ptr(), *x.shape, eps
        )

    def add_layer_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        out: torch.Tensor,
        new_residual: torch.Tensor,
    ) -> None:
        """new_residual [M, D] = x + residual, rounded to their dtype; out = layer_norm(new_residual)."""
        shift = None if bias is None else bias.data_ptr()
        results = out.data_ptr(), new_residual.data_ptr()
        self.calls.pared_add_layer_norm(
            *self._run(x), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), shift, *results, *x.shape, eps
        )

    def gated_act(self, gate_up: torch.Tensor, kind: str, out: torch.Tensor) -> None:
        """out [M, F] = act(gate) * up for gate_up [M, 2F] = gate | up."""
        self.calls.pared_gated_act(*self._run(out), KINDS[kind], gate_up.data_ptr(), out.data_ptr(), *out.shape)

    def act(self, x: torch.Tensor, kind: str, out: torch.Tensor) -> None:
        """out = act(x), any shape."""
        width = x.shape[-1]
        self.calls.pared_act(
            *self._run(x), KINDS[kind], x.data_ptr(), out.data_ptr(), x.numel() // max(1, width), width
        )

    def rotary_cache(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        slots: torch.Tensor,
        heads: int,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        q: torch.Tensor,
    ) -> None:
        """q [T, H, D] and k_pool[slots] = rotated parts of qkv [T, (H + 2 KV) D], v_pool[slots] = its last part.

        cos, sin: fp32 [T, R / 2], R <= D the rotated part (0: none); pools [blocks, page, KV, D]; slots int64 [T].
        norms: RMSNorm weights [D] of the heads of q and of k, applied before they turn.
        """
        kv_heads, head_dim = k_pool.shape[2:]
        weights = (None, None) if norms is None else (norm.data_ptr() for norm in norms)
        tables = qkv.data_ptr(), cos.data_ptr(), sin.data_ptr()
        pools = k_pool.data_ptr(), v_pool.data_ptr(), slots.data_ptr(), q.data_ptr()
        sizes = qkv.shape[0], heads, kv_heads, head_dim, 2 * cos.shape[1]
        self.calls.pared_rotary_cache(*self._run(qkv), *tables, *weights, *pools, *sizes, eps)

    def concat(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out [M, sum N] = parts [M, N], MOST_PARTS at most, side by side."""
        count = len(parts)
        pointers = (_PTR * count)(*(part.data_ptr() for part in parts))
        widths = (_I64 * count)(*(part.shape[1] * part.element_size() for part in parts))
        self.calls.pared_concat(torch.get_num_threads(), pointers, widths, count, out.data_ptr(), out.shape[0])

    def paged_attention(
        self,
        q: torch.Tensor,
        k_pool: torch.Tensor,
        v_pool: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
        scale: float,
        window: int,
        out: torch.Tensor,
    ) -> None:
        """out [T, H, D]: causal softmax(scale q k^T) v over paged keys, as attention.paged_attention defines it.

        pools [blocks, page, KV, D]; query_starts int32 [S + 1], context_lens int32 [S], block_tables int32 [S, B];
        window > 0 hides keys that lie `window` or more before the query.
        """
        pointers = (t.data_ptr() for t in (q, k_pool, v_pool, query_starts, context_lens, block_tables, out))
        _, page, kv_heads, head_dim = k_pool.shape
        sequences, width = block_tables.shape
        self.calls.pared_paged_attention(
            *self._run(q), *pointers, sequences, width, page, q.shape[1], kv_heads, head_dim, window, scale
        )

    def _run(self, x: torch.Tensor) -> tuple[int, int, int]:
        return self._level, DTYPES[x.dtype], torch.get_num_threads()


def basis_words(
    order: torch.Tensor | None, basis: torch.Tensor, coefficients: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, ...]:
    """One part of `Library.basis_linear`, by addresses and sizes: whoever keeps it keeps the tensors too."""
    addresses = (0 if t is None else t.data_ptr() for t in (order, basis, coefficients, bias))
    return (*addresses, *basis.shape, coefficients.shape[0])


@functools.cache
def _basis_words(count: int) -> struct.Struct:
    return struct.Struct(f"{count * BASIS_WORDS}q")
