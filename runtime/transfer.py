"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host`, a tensor that nobody writes to any more, on `device`.

    A GPU takes it from pinned memory when its stream gets there; torch keeps that memory until then. From other memory
    the call would wait for all that the stream has to do first.
    """
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
