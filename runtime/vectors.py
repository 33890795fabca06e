"""What becomes of vectors once they are computed: length 1, fewer dimensions, fewer bits."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import BadParameter

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
PRECISIONS = get_args(Precision)


def shape(vectors: torch.Tensor, unit: bool, dimensions: int | None, again: bool) -> torch.Tensor:
    """fp32 [n, D] -> [n, dimensions]: to length 1 if `unit`, cut to the first dimensions (Matryoshka), to length 1 if
    `again`. The order of sentence-transformers, where a model's own Normalize comes before the cut.
    """
    vectors = F.normalize(vectors, dim=-1) if unit else vectors
    vectors = vectors[:, :dimensions]
    return F.normalize(vectors, dim=-1) if again else vectors


def ranges_of(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Smallest and largest value of every dimension: [2, D]."""
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def quantize(
    vectors: np.ndarray[Any, Any], precision: Precision, ranges: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """fp32 [n, D] in fewer bits, with the meanings of sentence-transformers' `quantize_embeddings`.

    int8, uint8: [n, D], 256 even steps between the `ranges` [2, D] of each dimension; default are those of the vectors
    themselves, so give ranges where results have to be comparable. binary, ubinary: the signs, 8 to a byte [n, D / 8],
    as int8 less 128, or as uint8. Raises BadParameter.
    """
    if precision not in PRECISIONS:
        raise BadParameter(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float32":
        return vectors
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        if len(vectors) == 1:
            raise BadParameter(f"one vector has no ranges to make {precision} of; give ranges, [2, dimensions]")
        ranges = ranges_of(vectors) if len(vectors) else np.zeros((2, vectors.shape[1]), np.float32)
    if ranges.shape != (2, vectors.shape[1]):
        raise BadParameter(f"ranges must be [2, {vectors.shape[1]}], got {list(ranges.shape)}")
    starts = ranges[0].astype(np.float32)
    steps = (ranges[1].astype(np.float32) - starts) / 255
    levels = np.clip(np.floor((vectors - starts) / np.where(steps == 0, 1, steps)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
