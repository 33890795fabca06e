"""Weights that are no numbers are refused where they are first met."""

from __future__ import annotations

import torch

from ..errors import BadWeights


def refuse_bad(name: str, tensor: torch.Tensor, context: str = "") -> None:
    """Raises BadWeights with the place of the first NaN or infinity of a floating tensor."""
    low, high = torch.aminmax(tensor)  # one pass without temporaries; NaN reaches both
    if not (torch.isfinite(low) and torch.isfinite(high)):
        index = tuple(torch.nonzero(~torch.isfinite(tensor))[0].tolist())
        raise BadWeights(f"{name}{list(index)} is {tensor[index].item()}{context}")
