"""The algebra of Basis Sharing (arXiv 2410.03765): one basis for the stacked weights of a group of layers.

With W_i [N, K] of the group's layers stacked to W [n N, K], and G [K, K] the Gram matrix of the inputs
they see in calibration, the best rank-R approximation under the activation-weighted norm
||E||^2 = tr(E G E^T) projects W on the top eigenvectors V of W G W^T:

    W_i ~ C_i B^T      B = W^T V  [K, R] once for the group,      C_i = V_i  [N, R] for each layer

This is the well-conditioned form of the paper's B = S^-1 U Sigma with S = chol(G): no inverse, and no
jitter where G is singular. A group of one is SVD-LLM (private matrices).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """basis [K, R] and coefficients [N, R] per module, fp64; lost and total are weighted squared norms."""

    basis: torch.Tensor
    coefficients: tuple[torch.Tensor, ...]
    lost: float
    total: float

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


def rank(ratio: float, outputs: int, inputs: int, size: int) -> int:
    """Rank at which `size` layers of [outputs, inputs] keep 1 - ratio of their weights (paper, A.1); at least 1.

    Never above what a matrix can have: min(inputs, size * outputs).
    """
    kept = int((1 - ratio) * inputs * outputs * size / (inputs + outputs * size))
    return max(1, min(kept, inputs, size * outputs))


def pivoted_rank(ratio: float, outputs: int, inputs: int, size: int) -> int:
    """The larger rank R at which a pivoted group keeps 1 - ratio: R of the inputs need no stored column of basis.

    R (inputs - R) + R size outputs = (1 - ratio) inputs size outputs, rounded down; at least 1.
    """
    stacked = size * outputs
    total = inputs + stacked
    kept = int((total - (total**2 - 4 * (1 - ratio) * inputs * stacked) ** 0.5) / 2)
    return max(1, min(kept, inputs, stacked))


def factorize(weights: list[torch.Tensor], gram: torch.Tensor, r: int, root: torch.Tensor | None = None) -> Factors:
    """The best rank-r factors of weights [N, K] each under gram [K, K], all fp64.

    root: `square_root(gram)`, where several groups have the same inputs; only more outputs than inputs need it.
    """
    stacked = torch.cat(weights)
    outputs, inputs = stacked.shape
    if outputs <= inputs:
        values, vectors = torch.linalg.eigh(stacked @ gram @ stacked.t())
        v = vectors[:, -r:]
    else:
        seen = stacked @ (square_root(gram) if root is None else root)  # [n N, K]
        values, vectors = torch.linalg.eigh(seen.t() @ seen)
        # Orthogonal columns of falling length: QR norms them without dividing by a singular value near zero.
        v = torch.linalg.qr(seen @ vectors[:, -r:]).Q
    kept = values.clamp(min=0)
    coefficients = v.split([w.shape[0] for w in weights])
    return Factors(stacked.t() @ v, coefficients, float(kept[: len(kept) - r].sum()), float(kept.sum()))


def square_root(gram: torch.Tensor) -> torch.Tensor:
    """The symmetric root of a Gram matrix whose smallest eigenvalues may have come out negative."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.t()


def refit(weights: list[torch.Tensor], basis: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The best coefficients for a basis [K, R] that is kept, under the inputs that a compressed model really sees.

    C = W G B (B^T G B)^+, for ratios of 40 % and more (paper, 3.3); gram is of the deviated inputs.
    """
    weighted = gram @ basis
    normal = basis.t() @ weighted
    solved = torch.linalg.lstsq(normal, (torch.cat(weights) @ weighted).t(), driver="gelsd").solution.t()
    return solved.split([w.shape[0] for w in weights])


def weighted_loss(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(E G E^T) of E = weight - approximation, [N, K] each."""
    error = weight - approximation
    return float(((error @ gram) * error).sum())
