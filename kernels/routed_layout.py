"""How a CPU holds the groups of a routed FFN, from the bytes on disk: plain torch, at load."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

TILE_OUTPUTS = 16


def laid_out(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[G, rows, size, K] as the native kernels read it: gate and up rows [G, rows - 1, size, K], and tiles of down.

    A tile [size / step, TILE_OUTPUTS, step] has the weights of all the group's neurons for neighbouring outputs; bf16
    neurons lie in pairs, step 2, which is how AVX512-BF16 and AMX multiply them. Outputs behind K are zero.
    """
    step, down = _step(groups.dtype), groups[:, -1]
    down = F.pad(down, (0, -down.shape[2] % TILE_OUTPUTS))
    tiles = down.unflatten(2, (-1, TILE_OUTPUTS)).unflatten(1, (-1, step)).permute(0, 3, 1, 4, 2)
    return groups[:, :-1].contiguous(), tiles.contiguous()


def _step(dtype: torch.dtype) -> int:
    """Neurons that lie side by side in a tile of down."""
    return 2 if dtype == torch.bfloat16 else 1


def groups(ins: Tensor, downs: Tensor) -> Tensor:
    """`laid_out` undone: [G, rows, size, K]."""
    down = downs.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
    return torch.cat([ins, down[:, None, :, : ins.shape[3]]], dim=1)
