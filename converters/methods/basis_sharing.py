"""Basis Sharing (arXiv 2410.03765): the layers of a group write their weights as one basis times coefficients each.

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

from ...spec import Spec


@dataclass(frozen=True)
class Group:
    """Modules that share one basis. size: the configured number of layers, which the rank formula takes."""

    paths: tuple[str, ...]
    size: int
    observed: tuple[str, ...]  # per module, the one whose input stands for its own


@dataclass(frozen=True)
class Factors:
    """basis [K, R] and coefficients [N, R] per module, fp64; lost and total are weighted squared norms."""

    basis: torch.Tensor
    coefficients: tuple[torch.Tensor, ...]
    lost: float
    total: float

    @property
    def error(self) -> float:
        """The relative activation-weighted error."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0


def rank(ratio: float, outputs: int, inputs: int, size: int) -> int:
    """Rank at which `size` layers of [outputs, inputs] keep 1 - ratio of their weights (paper, A.1); at least 1.

    Never above what a matrix can have: min(inputs, size * outputs).
    """
    kept = int((1 - ratio) * inputs * outputs * size / (inputs + outputs * size))
    return max(1, min(kept, inputs, size * outputs))


def plan(spec: Spec, size: int) -> list[list[Group]]:
    """The groups of every run of `size` consecutive layers, by the paper's rule for each family.

    Shared: what reads the residual stream (q, k, v, gate, up). Private: o and down, and k and v where they have
    fewer heads than q.
    """
    layers = range(len(spec.layers))
    return [
        [group for kind in _kinds(spec, run[0]) for group in _groups(spec, kind, run, size)]
        for run in (layers[start : start + size] for start in layers[::size])
    ]


@dataclass(frozen=True)
class _Kind:
    name: str
    observed: str
    shared: bool


def _kinds(spec: Spec, i: int) -> list[_Kind]:
    names, layer = spec.names, spec.layers[i]
    grouped = layer.kv_heads < layer.heads
    qkv = [_Kind(n, names.qkv[0], not (grouped and j > 0)) for j, n in enumerate(names.qkv)]
    ffn = [_Kind(n, names.ffn_in[0], True) for n in names.ffn_in]
    return [*qkv, _Kind(names.out, names.out, False), *ffn, _Kind(names.ffn_out, names.ffn_out, False)]


def _groups(spec: Spec, kind: _Kind, run: range, size: int) -> list[Group]:
    sets = [tuple(run)] if kind.shared else [(i,) for i in run]
    return [
        Group(
            paths=tuple(spec.path(i, kind.name) for i in members),
            size=size if kind.shared else 1,
            observed=tuple(spec.path(i, kind.observed) for i in members),
        )
        for members in sets
    ]


def factorize(weights: list[torch.Tensor], gram: torch.Tensor, r: int) -> Factors:
    """The best rank-r factors of weights [N, K] each under gram [K, K], all fp64."""
    stacked = torch.cat(weights)
    outputs, inputs = stacked.shape
    if outputs <= inputs:
        values, vectors = torch.linalg.eigh(stacked @ gram @ stacked.t())
        v = vectors[:, -r:]
    else:
        root = stacked @ _square_root(gram)  # [n N, K]
        values, vectors = torch.linalg.eigh(root.t() @ root)
        # Orthogonal columns of falling length: QR norms them without dividing by a singular value near zero.
        v = torch.linalg.qr(root @ vectors[:, -r:]).Q
    kept = values.clamp(min=0)
    coefficients = v.split([w.shape[0] for w in weights])
    return Factors(stacked.t() @ v, coefficients, float(kept[: len(kept) - r].sum()), float(kept.sum()))


def _square_root(gram: torch.Tensor) -> torch.Tensor:
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
