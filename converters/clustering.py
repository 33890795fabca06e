"""Neurons in groups of one size, alike ones together: k-means with the sizes fixed.

Constrained k-means as published solves a min-cost flow in every round, which 14,336 neurons in 448 groups are too many
for. Here a round assigns by deferred acceptance: each neuron asks the centre most like it, each centre keeps the
`size` most alike of those that ask, and who is turned away asks the next. No neuron and centre are left that would
both rather have each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import BadParameter

ROUNDS = 20


def balanced_order(weight: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """The order of the neurons in which group g is places g * size to (g + 1) * size - 1: int64 [F].

    weight: [F, K], a row for each neuron, compared by direction alone (MoEfication, arXiv 2110.01786). Inside a group
    neurons keep their order. The same seed gives the same groups. Raises BadParameter where size does not divide F.
    """
    neurons = len(weight)
    if size < 1 or neurons % size:
        raise BadParameter(f"groups of {size} do not divide {neurons} neurons; choose another size")
    rows = F.normalize(weight.detach().float(), dim=1)
    drawn = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    centers, best, highest = rows[drawn[: neurons // size]], drawn, -1.0
    for _ in range(ROUNDS):
        order = _assign(rows @ centers.t(), size).argsort(stable=True)
        sums = rows[order].view(-1, size, rows.shape[1]).sum(1)
        reached = sums.norm(dim=1).mean().item() / size
        if reached <= highest:
            break
        best, highest, centers = order, reached, F.normalize(sums, dim=1)
    return best


def likeness(weight: torch.Tensor, order: torch.Tensor, size: int) -> float:
    """Mean cosine of the neurons to the centre of their group, what the clustering makes large: 1 where all agree."""
    rows = F.normalize(weight.detach().float(), dim=1)[order]
    groups = rows.view(-1, size, rows.shape[1])
    return groups.mean(1).norm(dim=1).mean().item()


def _assign(scores: torch.Tensor, size: int) -> torch.Tensor:
    """The centre of each neuron, int64 [F], from scores [F, centres]; each centre gets `size`. Ties: the first."""
    neurons, centers = scores.shape
    open_to = scores.clone()
    found = torch.full((neurons,), -1)
    while len(free := (found < 0).nonzero()[:, 0]):
        found[free] = open_to[free].argmax(1)
        asking = (found >= 0).nonzero()[:, 0]
        by_score = asking[scores[asking, found[asking]].argsort(descending=True, stable=True)]
        queue = by_score[found[by_score].argsort(stable=True)]
        wanted = found[queue]
        first = torch.searchsorted(wanted, torch.arange(centers))
        turned_away = queue[torch.arange(len(queue)) - first[wanted] >= size]
        open_to[turned_away, found[turned_away]] = -torch.inf
        found[turned_away] = -1
    return found
