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
    """Hands out block ids 1..num_blocks-1, and remembers by key what full blocks hold.

    A block that has a key may get further owners, all of whom only read it. When the last one leaves it keeps key and
    content until its room is needed; what was given back longest ago goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks - 1
        self._blank = list(range(num_blocks - 1, RESERVED_BLOCK, -1))
        self._kept: dict[int, None] = {}  # blocks with a key and no owner, longest unused first
        self._owners: dict[int, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._blank) + len(self._kept)

    @property
    def used(self) -> int:
        return len(self._owners)

    def allocate(self, count: int) -> list[int]:
        """`count` block ids that nobody owns; EngineError when fewer are free."""
        if count > self.free:
            raise EngineError(f"{count} KV blocks were asked for while {self.free} of {self.total} are free")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def claim(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of these keys up to the first that is unknown, each with one owner more."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, key: bytes) -> None:
        """An owned block is full, and `key` says of what. Where another block has the key, that one keeps it."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: list[int]) -> None:
        """Take one owner off each block; EngineError for a block that is not owned, and then none is taken."""
        stray = sorted(set(blocks) - self._owners.keys())
        if stray or len(set(blocks)) != len(blocks):
            raise EngineError(f"KV blocks {stray or blocks} were released but are not owned, or are released twice")
        for block in reversed(blocks):  # so that the end of a text is evicted before its beginning
            self._owners[block] -= 1
            if not self._owners[block]:
                self._retire(block)

    def _retire(self, block: int) -> None:
        del self._owners[block]
        if block in self._key_of:
            self._kept[block] = None
        else:
            self._blank.append(block)

    def _evict(self) -> int:
        block = next(iter(self._kept))
        del self._kept[block]
        del self._block_of[self._key_of.pop(block)]
        return block
