"""cluster: blocks that are given alike states are taken to do alike work; one of each kind stays (LoRP, arXiv 2605.27786).

S is the mean over tokens of the cosine of what goes into two blocks. Spectral clustering of (S + 1) / 2 finds two to four
kinds of blocks. Blocks go one by one, from the kind whose members are most alike; the last of each kind, and the first and
the last block of the model, go at the very end. Needs states.

Legend: N blocks, K clusters, W windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from shortstack.artifacts.scores import CriterionScores
from shortstack.runtime.devices import exact_place
from shortstack.scoring.criteria import Criterion, StatesPass, Swept


class Clusters(Criterion):
    """The place of a block in the order in which blocks go."""

    def on_states(self, states: StatesPass) -> None:
        """Keep the cosine of every pair of blocks, [N][W] for each block."""
        unit = [functional.normalize(states.at(index).float(), dim=-1) for index in states.candidates]
        of_windows = []
        for window in range(states.windows.stop - states.windows.start):
            # All tokens of a window as one long row per block: the products of all pairs are one product of matrices.
            rows = exact_place(torch.stack([one_WTD[window].flatten() for one_WTD in unit])).double()
            of_windows.append(rows @ rows.T / unit[0].shape[1])
        cosine_NNW = torch.stack(of_windows, dim=-1)
        self.kept = dict(zip(states.candidates, cosine_NNW.tolist(), strict=True))

    def finish(self, swept: Swept) -> CriterionScores:
        """Places in the order, from 0."""
        cosine_NNW = torch.tensor([self.kept[index] for index in swept.candidates], dtype=torch.float64)
        similarity_NN = swept.gathered(cosine_NNW).mean(dim=-1)
        order = order_of(similarity_NN, spectral(similarity_NN, how_many(similarity_NN)))
        return CriterionScores(self.name, tuple(float(order.index(place)) for place in range(len(order))), swept.blocks)


def how_many(similarity_NN: torch.Tensor) -> int:
    """Two clusters where blocks are given unlike states, three or four where they are alike: by -log2 of the mean cosine."""
    blocks = len(similarity_NN)
    if blocks < 3:
        return 1
    mean = float((similarity_NN.sum() - similarity_NN.diagonal().sum()) / (blocks * (blocks - 1)))
    unlike = -math.log2(max(mean, 1e-9))
    return min(2 if unlike >= 1 else 3 if unlike >= 0.7 else 4, blocks)


def spectral(similarity_NN: torch.Tensor, clusters: int) -> list[int]:
    """The cluster of each block: k-means on the leading eigenvectors of the normalized similarities (Ng et al. 2001).

    The first centres are points far from one another, so that the same similarities give the same clusters.
    """
    weights = (similarity_NN + 1) / 2
    weights = weights - torch.diag(weights.diagonal())
    scale = weights.sum(dim=1).clamp_min(1e-12).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * weights * scale[None])
    points_NK = functional.normalize(vectors[:, -clusters:], dim=1)
    centres = [points_NK[0]]
    while len(centres) < clusters:
        distance_N = torch.cdist(points_NK, torch.stack(centres)).amin(dim=1)
        centres.append(points_NK[int(distance_N.argmax())])
    centres_KK = torch.stack(centres)
    of_N = torch.cdist(points_NK, centres_KK).argmin(dim=1)
    for _ in range(100):
        means = [points_NK[of_N == k].mean(dim=0) if (of_N == k).any() else centres_KK[k] for k in range(clusters)]
        centres_KK = torch.stack(means)
        now = torch.cdist(points_NK, centres_KK).argmin(dim=1)
        if torch.equal(now, of_N):
            break
        of_N = now
    return of_N.tolist()


def order_of(similarity_NN: torch.Tensor, clusters: Sequence[int]) -> list[int]:
    """Blocks in the order in which they go.

    Of the cluster with the largest mean similarity goes the block that is most like the others of it, the first of equals.
    """
    last = len(clusters) - 1
    inner = [place for place in range(len(clusters)) if place not in (0, last)]
    left = {kind: [place for place in inner if clusters[place] == kind] for kind in sorted(set(clusters))}
    order: list[int] = []
    while any(len(members) > 1 for members in left.values()):
        members = max((some for some in left.values() if len(some) > 1), key=lambda some: _alike(similarity_NN, some))
        # Of two blocks each is as much like the other: what is left of rounding must not choose.
        alike = {
            one: round(sum(float(similarity_NN[one, other]) for other in members if other != one), 6) for one in members
        }
        gone = max(members, key=lambda place: (alike[place], -place))
        members.remove(gone)
        order.append(gone)
    alone = sorted(place for members in left.values() for place in members)
    return [*order, *alone, *(place for place in (last, 0) if place not in order and (place or last))][: last + 1]


def _alike(similarity_NN: torch.Tensor, members: Sequence[int]) -> float:
    some = similarity_NN[members][:, members]
    return float((some.sum() - some.diagonal().sum()) / (len(members) * (len(members) - 1)))
