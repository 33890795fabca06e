"""A pytest plugin that makes bf16 exact in Triton's interpreter, which treats it as raw 16-bit integers.

Triton 3.6 to 3.9 multiply, compare and reduce those bits, and truncate where hardware rounds to
nearest even. Patched: casts to and from fp32, `tl.dot`, and binary arithmetic. Unary arithmetic and
reductions on bf16 stay wrong, so a kernel casts to fp32 right after a load; a GPU wants that as well.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_convert, _dot, _binary = interpreter._convert_float, Builder.create_dot, Builder.binary_op


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 as uint16 -> fp32: the upper half of its bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 as uint16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def convert(values, source, target, rounding):
    if (source, target) == (tl.float32, tl.bfloat16):
        return narrow(values.view(np.float32))
    if (source, target) == (tl.bfloat16, tl.float32):
        return widen(values)
    return _convert(values, source, target, rounding)


def dot(self, a, b, total, *rest):
    a, b = (Handle(widen(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
    return _dot(self, a, b, total, *rest)


def binary(self, left, right, function):
    if not (is_bf16(left) and is_bf16(right)):
        return _binary(self, left, right, function)
    result = function(widen(left.data), widen(right.data))
    if result.dtype == np.bool_:
        return Handle(result, tl.int1)
    return Handle(narrow(result), tl.bfloat16)


interpreter._convert_float, Builder.create_dot, Builder.binary_op = convert, dot, binary
