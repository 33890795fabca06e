"""The paged KV cache: one pool per layer under block ids that all layers share, and who owns which block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..errors import BadParameter, EngineError

RESERVED_BLOCK = 0


class KVCache:
    """Keys and values of every layer: layers[i] = (k_pool, v_pool), each [num_blocks, page, kv_heads_i, head_dim].

    A block id names the same `page` tokens in all layers. Block 0 is never given to a sequence: rows that only pad a
    batch write there. Raises BadParameter for fewer than two blocks or an empty page.
    """

    def __init__(
        self,
        kv_heads_per_layer: Sequence[int],
        head_dim: int,
        num_blocks: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if num_blocks < 2 or page < 1:
            raise BadParameter(
                f"a KV cache needs at least 2 blocks of at least 1 token (block 0 is reserved), "
                f"got num_blocks={num_blocks}, page={page}; give it more memory"
            )
        self.num_blocks = num_blocks
        self.page = page
        self.dtype = dtype
        self.device = torch.device(device)
        self.layers = [
            (self._pool(num_blocks, page, heads, head_dim), self._pool(num_blocks, page, heads, head_dim))
            for heads in kv_heads_per_layer
        ]

    def _pool(self, *shape: int) -> torch.Tensor:
        """Zeros, not empty: a masked key has weight 0, and 0 times an uninitialised NaN would still be NaN."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy's zeros are pages that the system hands out when they are first written; torch's are written at once,
        # and a cache sized for the largest batch would take its seconds and its gigabytes before the first request.
        raw = np.zeros(math.prod(shape) * self.dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(self.dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools together."""
        return sum({id(pool): pool.nbytes for layer in self.layers for pool in layer}.values())


class LayerCache(KVCache):
    """A cache for batches that hold their sequences whole: keys are read by their own layer alone, so that layers with
    as many heads write to the same pools one after the other."""

    def __init__(
        self,
        kv_heads_per_layer: Sequence[int],
        head_dim: int,
        num_blocks: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        distinct = sorted(set(kv_heads_per_layer))
        super().__init__(distinct, head_dim, num_blocks, page, dtype, device)
        pools = dict(zip(distinct, self.layers, strict=True))
        self.layers = [pools[heads] for heads in kv_heads_per_layer]


def bytes_per_block(kv_heads_per_layer: Iterable[int], head_dim: int, page: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers, keys and values."""
    return 2 * sum(kv_heads_per_layer) * head_dim * page * dtype.itemsize


class BlockAllocator:
    """Hands out block ids 1..num_blocks-1, each to one owner at a time."""

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, RESERVED_BLOCK, -1))
        self._owned: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._owned)

    def allocate(self, count: int) -> list[int]:
        """`count` block ids that nobody owns; EngineError when fewer are free."""
        if count > len(self._free):
            raise EngineError(f"{count} KV blocks were asked for while {len(self._free)} of {self.total} are free")
        blocks = [self._free.pop() for _ in range(count)]
        self._owned.update(blocks)
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Take blocks back; EngineError for a block that is not owned, and then none is taken."""
        stray = sorted(set(blocks) - self._owned)
        if stray or len(set(blocks)) != len(blocks):
            raise EngineError(f"KV blocks {stray or blocks} were released but are not owned, or are released twice")
        self._owned.difference_update(blocks)
        self._free.extend(reversed(blocks))
