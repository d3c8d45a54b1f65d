"""The arithmetic of repairs: sums over tokens in float64, and the maps that they give. Tensors in, tensors out.

What a block's states lack is r = target - left. A repair adds to the states what is linear in some features of them (what
the MLP adds, or what goes into its last projection), and multiplies them by one number.

Legend: R tokens, D hidden size, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from shortstack.runtime.devices import exact_place

_SLICE = 1024  # tokens whose products are added up in the precision of the states


@dataclass(frozen=True)
class Map:
    """What is done to the states that leave a block: state := factor * (state + features @ change + offset).

    Attributes:
        features: "moved" is what the last projection of the MLP adds, "inner" what goes into it; "" where nothing is added.
        factor: the number.
        change_FD: the matrix; None where nothing is added.
        offset_D: the constant; None where the projection has no bias to hold it.
    """

    features: str = ""
    factor: float = 1.0
    change_FD: torch.Tensor | None = None
    offset_D: torch.Tensor | None = None

    def __call__(self, left: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        """The states after it, in their own precision; a copy."""
        made = left.clone()
        if self.change_FD is not None and features is not None:
            made += features @ self.change_FD.to(features)
        if self.offset_D is not None:
            made += self.offset_D.to(made)
        return made.mul_(self.factor) if self.factor != 1.0 else made


@dataclass
class FeatureSums:
    """Products of features with one another, with what is lacking, and with the states, summed over tokens in float64.

    Attributes:
        gram_FF, lacking_FD: those.
        left_FD: of no tokens where no number for the states is fitted along.
        total_F: the features, summed.
    """

    gram_FF: torch.Tensor
    lacking_FD: torch.Tensor
    left_FD: torch.Tensor
    total_F: torch.Tensor

    @staticmethod
    def empty(features: int, hidden: int) -> FeatureSums:
        """Of no tokens yet."""
        shapes = ((features, features), (features, hidden), (features, hidden), (features,))
        return FeatureSums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, features_RF: torch.Tensor, lacking_RD: torch.Tensor, left_RD: torch.Tensor | None) -> None:
        """Some more tokens, all in one precision."""
        self.gram_FF += _product(features_RF, features_RF)
        self.lacking_FD += _product(features_RF, lacking_RD)
        if left_RD is not None:
            self.left_FD += _product(features_RF, left_RD)
        self.total_F += exact_place(features_RF).double().sum(dim=0).cpu()

    def and_of(self, others: FeatureSums) -> FeatureSums:
        """The sums of these tokens and of others."""
        return FeatureSums(*(getattr(self, each.name) + getattr(others, each.name) for each in fields(FeatureSums)))


def _product(first_RF: torch.Tensor, second_RD: torch.Tensor) -> torch.Tensor:
    """`first.T @ second` in float64, on the CPU.

    A slice of tokens is multiplied in the precision of the states, float32 at least, which is twice as fast and rounds less
    than the states themselves did; slices are added in float64.
    """
    total_FD = torch.zeros(first_RF.shape[1], second_RD.shape[1], dtype=torch.float64)
    for start in range(0, len(first_RF), _SLICE):
        tokens = slice(start, start + _SLICE)
        total_FD += (first_RF[tokens].T @ second_RD[tokens]).cpu()
    return total_FD


@dataclass
class Sums:
    """All sums at one block.

    Attributes:
        scaled: a number for the states may be fitted along with the map of the features `inner`.
        tokens: how many were added.
        of: by kind of features.
        lacking_D, left_D: summed states.
        left_lacking, left_left: scalar products of states, summed.
        size_before_D, size_after_D: absolute values of the states that leave the block, and of the target.
    """

    scaled: bool = True
    tokens: int = 0
    of: dict[str, FeatureSums] = field(default_factory=dict)
    lacking_D: torch.Tensor | float = 0.0
    left_D: torch.Tensor | float = 0.0
    left_lacking: float = 0.0
    left_left: float = 0.0
    size_before_D: torch.Tensor | float = 0.0
    size_after_D: torch.Tensor | float = 0.0

    def add(self, left_RD: torch.Tensor, target_RD: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """Some more tokens: the states that leave the block, what they should be, and their features by kind."""
        left, target = exact_place(left_RD).double(), exact_place(target_RD).double()
        lacking = target - left
        self.tokens += len(left)
        self.lacking_D = self.lacking_D + lacking.sum(dim=0).cpu()
        self.left_D = self.left_D + left.sum(dim=0).cpu()
        self.left_lacking += float((left * lacking).sum())
        self.left_left += float((left * left).sum())
        self.size_before_D = self.size_before_D + left.abs().sum(dim=0).cpu()
        self.size_after_D = self.size_after_D + target.abs().sum(dim=0).cpu()
        wide = torch.promote_types(left_RD.dtype, torch.float32)
        given_left, given_lacking = left_RD.to(wide), target_RD.to(wide) - left_RD.to(wide)
        for kind, given_RF in features.items():
            if kind not in self.of:
                self.of[kind] = FeatureSums.empty(given_RF.shape[1], left.shape[1])
            counts = self.scaled and kind == "inner"
            self.of[kind].add(given_RF.to(wide), given_lacking, given_left if counts else None)

    def and_of(self, others: Sums) -> Sums:
        """The sums of these tokens and of others."""
        own = {
            each.name: getattr(self, each.name) + getattr(others, each.name)
            for each in fields(Sums)
            if each.name not in ("scaled", "of")
        }
        return Sums(
            scaled=self.scaled, of={kind: sums.and_of(others.of[kind]) for kind, sums in self.of.items()}, **own
        )

    @property
    def finite(self) -> bool:
        """Whether no state was NaN or infinite."""
        return bool(torch.isfinite(torch.as_tensor(self.size_before_D) + torch.as_tensor(self.size_after_D)).all())


def magnitude_ratio(sums: Sums) -> float:
    """How much larger the target's channels are: the mean over channels of mean |target| / mean |state| (Prune&Comp)."""
    before, after = torch.as_tensor(sums.size_before_D), torch.as_tensor(sums.size_after_D)
    used = before > 0
    return float((after[used] / before[used]).mean()) if bool(used.any()) else 1.0


def nearest_factor(sums: Sums) -> float:
    """The number times the states that comes nearest to the target, by squares."""
    return 1.0 + sums.left_lacking / sums.left_left if sums.left_left else 1.0


def linear_map(sums: Sums, kind: str, ridge: float, *, offset: bool, scaled: bool) -> Map:
    """The map of these features that comes nearest to the target, by squares, and is drawn to no change by the ridge.

    ReplaceMe (arXiv 2505.02819) for `moved`; with `scaled` a number for the states themselves is fitted along.

    Args:
        sums: of the block.
        kind: of the features.
        ridge: a share of the mean square of the features.
        offset: a constant is fitted, too.
        scaled: a number is fitted, too.
    """
    own = sums.of[kind]
    gram, lacking, left = own.gram_FF, own.lacking_FD, own.left_FD
    left_lacking, left_left = sums.left_lacking, sums.left_left
    lacking_D, left_D = torch.as_tensor(sums.lacking_D), torch.as_tensor(sums.left_D)
    if offset:  # about their means, a constant drops out
        count = max(1, sums.tokens)
        gram = gram - torch.outer(own.total_F, own.total_F) / count
        lacking = lacking - torch.outer(own.total_F, lacking_D) / count
        left = left - torch.outer(own.total_F, left_D) / count
        left_lacking -= float(left_D @ lacking_D) / count
        left_left -= float(left_D @ left_D) / count
    strength = ridge * float(gram.diagonal().mean())
    solved, of_left = _solved(gram, strength, lacking, left)
    share = 0.0
    if scaled:
        rest = left_left - float((left * of_left).sum())
        share = (left_lacking - float((left * solved).sum())) / rest if rest > 1e-12 * left_left else 0.0
        share = max(share, -0.9)  # a state is never turned round
    factor = 1.0 + share
    change = (solved - share * of_left) / factor
    constant = None
    if offset:
        constant = (lacking_D - share * left_D) / max(1, sums.tokens) / factor - own.total_F / max(
            1, sums.tokens
        ) @ change
    return Map(kind, factor, change, constant)


def _solved(gram: torch.Tensor, strength: float, *products: torch.Tensor) -> list[torch.Tensor]:
    """(gram + strength)^-1 of each of the products; features that are always zero change nothing."""
    size, hidden = len(gram), products[0].shape[1]
    raised = gram + (strength + 1e-300) * torch.eye(size, dtype=gram.dtype)
    joined = torch.cat(products, dim=1)
    lower, failed = torch.linalg.cholesky_ex(raised)
    if bool(failed):  # singular at this ridge
        found = torch.linalg.lstsq(raised, joined, driver="gelsd").solution
    else:
        found = torch.cholesky_solve(joined, lower)
    return [found[:, start : start + hidden] for start in range(0, found.shape[1], hidden)]


def unconstrained_map(sums: Sums, ridge: float) -> Map:
    """The map of the states themselves, which no checkpoint of the family can hold (Ghosted Layers, arXiv 2605.15491)."""
    return linear_map(sums, "left", ridge, offset=False, scaled=False)
