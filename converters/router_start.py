"""Where routers begin: a least-squares guess of what each group gives to its FFN's output.

The paper does not say. From zero every score is tau itself and every FFN counts by half; from 1 the wall that its
separability loss builds around tau keeps every group in. A few thousand tokens and one linear system a layer give
scores that follow what a token needs, at any share of groups to be in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .routed import RoutedMlp, routed
from .training import fast_products

RIDGE = 0.03  # of the mean square of an input
FAINT = 1e-6  # contributions below count as this much: logarithms are taken


@torch.no_grad()
def start_routers(model: PreTrainedModel, windows: Sequence[torch.Tensor], share: float, progress: bool) -> None:
    """Set every router so that about `share` of all groups is in, those whose part is largest.

    windows: batches of tokens, int64 [B, T]. The logit of a group approximates the logarithm of its contribution's
    norm, in standard deviations above what `share` of them exceed: W = argmin sum ||W x - y||^2, with a little ridge.
    """
    parts = {path: _Sums(module, model.device) for path, module in routed(model).items()}
    for tokens in tqdm(windows, "routers", unit="batch", disable=not progress):
        with fast_products(model):
            model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    for path, module in routed(model).items():
        module.router.weight.copy_(parts[path].solve(share) + module.threshold * parts[path].constant())


class _Sums:
    """Of one FFN, while all of its groups are in: X^T X, X^T Y, and the parts Y [tokens, groups] themselves."""

    def __init__(self, module: RoutedMlp, device: torch.device) -> None:
        k = module.router.in_features
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.cross = torch.zeros(k, module.router.out_features, dtype=torch.float64, device=device)
        self.total = torch.zeros(k, dtype=torch.float64, device=device)
        self.parts: list[torch.Tensor] = []
        module.rule = self.see

    def see(self, mlp: RoutedMlp, x: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """The rule that lets all groups in and looks at them."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, -2).float()
            parts = mlp.energies(neurons.flatten(0, -2)).sqrt().clamp(min=FAINT).log()
            self.gram += (x.t() @ x).double()
            self.cross += (x.t() @ parts).double()
            self.total += x.sum(0).double()
        self.parts.append(parts)
        return torch.ones(*neurons.shape[:-1], parts.shape[1], device=neurons.device)

    def solve(self, share: float) -> torch.Tensor:
        """W [groups, K]: logits above 0 for about `share` of all groups and tokens."""
        parts = torch.cat(self.parts).flatten()
        edge = parts.kthvalue(max(1, round(len(parts) * (1 - share)))).values
        return self._fit((self.cross - edge * self.total[:, None]) / parts.std().clamp(min=FAINT))

    def constant(self) -> torch.Tensor:
        """w [1, K] with w x near 1, as a router has no bias."""
        return self._fit(self.total[:, None])

    def _fit(self, right: torch.Tensor) -> torch.Tensor:
        ridge = RIDGE * self.gram.diagonal().mean().clamp(min=FAINT)
        return torch.linalg.solve(self.gram + ridge * torch.eye(len(self.gram), device=ridge.device), right).t()
