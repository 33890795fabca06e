"""What stands around a linear (`unit.Around`): its definition, and what every launcher checks of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .fused import ACTIVATIONS, check_norm, gated_act_reference, rms_norm_reference
from .unit import Around


def reference(x: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor], around: Around) -> torch.Tensor:
    """act(linear(rms_norm(x))) + residual in plain torch, rounded after every step that is there."""
    if around.norm is not None:
        x = rms_norm_reference(x, around.norm, around.eps)
    y = linear(x)
    if around.act:
        y = gated_act_reference(y, around.act)
    return y if around.residual is None else y + around.residual


def check(op: str, x: torch.Tensor, outputs: int, around: Around) -> None:
    """ValueError where `around` does not fit a linear of x [M, K] -> [M, outputs]."""
    if around.norm is not None:
        check_norm(op, x, around.norm)
    if around.act and (around.act not in ACTIVATIONS or outputs % 2):
        raise ValueError(f"{op} knows {', '.join(ACTIVATIONS)} on gate | up, got {around.act!r} on {outputs} outputs")
    residual, shape = around.residual, (x.shape[0], outputs // (2 if around.act else 1))
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or not residual.is_contiguous()):
        raise ValueError(
            f"{op} wants a contiguous residual {list(shape)} of {x.dtype}, got {tuple(residual.shape)} of "
            f"{residual.dtype} with strides {residual.stride()}"
        )
