"""One block, trained towards given states: which blocks, what is trained of one, the loss, the steps.

Legend: B rows, T tokens, D hidden size, N real tokens, R rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from shortstack.engine.block_model import Skeleton
from shortstack.engine.stand_ins import BlockCall
from shortstack.retraining.losses import relative_distance
from shortstack.retraining.options import Hyperparameters
from shortstack.retraining.trainable import ROUTERS

_LARGEST_NORM = 1.0  # of the gradients, as in the other ways of retraining
_SCALE = 2.0  # alpha / rank, as published for LoRA


def target_depths(kept: Sequence[int], depth: int) -> list[int]:
    """For each surviving block how many blocks of the dense model give the states that it is trained towards: all of those
    before the next surviving one, so that every block is given what it was given in the dense model.

    Args:
        kept: positions of the surviving blocks in the dense model, rising.
        depth: of the dense model.
    """
    return [*kept[1:], depth]


def near_cuts(kept: Sequence[int], depth: int, radius: int | None) -> list[int]:
    """Positions, in the pruned model, of the blocks that are trained: so many on each side of each cut; None for all.

    Args:
        kept, depth: as in `target_depths`.
        radius: blocks on each side.
    """
    if radius is None:
        return list(range(len(kept)))
    bounds = [-1, *kept, depth]
    cuts = [place for place, (before, after) in enumerate(itertools.pairwise(bounds)) if after - before > 1]
    return sorted({at for cut in cuts for at in range(max(0, cut - radius), min(len(kept), cut + radius))})


@dataclass(frozen=True)
class StateLoss:
    """How far states are from those of the dense model; each part is a sum over real tokens.

    Attributes:
        update_weight: of the distance relative to what the dense model changes there, which counts tokens of large states
            (the first ones, often) as much as others.
        cosine_weight: of 1 - the cosine.
    """

    update_weight: float = 0.0
    cosine_weight: float = 0.0

    def __call__(
        self, ours_ND: torch.Tensor, theirs_ND: torch.Tensor, before_ND: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """{"loss": weighted sum, "state": relative squared distance, and "update", "cosine" where they count}.

        Args:
            ours_ND: what the block gives.
            theirs_ND: what it should give.
            before_ND: the dense model's states that `theirs_ND` came of, where the update counts.
        """
        parts = {"state": relative_distance(ours_ND, theirs_ND).sum()}
        loss = parts["state"]
        if before_ND is not None:
            update_ND = theirs_ND.float() - before_ND.float()
            parts["update"] = relative_distance(ours_ND.float() - before_ND.float(), update_ND).sum()
            loss = loss + self.update_weight * parts["update"]
        if self.cosine_weight:
            cosine_N = torch.cosine_similarity(ours_ND.float(), theirs_ND.float(), dim=-1)
            parts["cosine"] = (1 - cosine_N).sum()
            loss = loss + self.cosine_weight * parts["cosine"]
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}


@dataclass
class BlockTraining:
    """What is trained of one block, and its optimizer.

    Attributes:
        block: the module; its own weights stay as they are, unless they are in float32 and trained themselves.
        hyperparameters: of the run.
        steps: of this block.
        generator: of the factors' first values.
    """

    block: torch.nn.Module
    hyperparameters: Hyperparameters
    steps: int
    generator: torch.Generator
    leaves: dict[str, torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._frozen = {name: value.detach() for name, value in self.block.named_parameters()}
        self.rank = (self.hyperparameters.local or {}).get("lora_rank")
        floating = {name: value for name, value in self._frozen.items() if value.is_floating_point()}
        if self.rank is None:
            self.leaves = {name: value.float().requires_grad_() for name, value in floating.items()}
        else:
            matrices = {name: value for name, value in floating.items() if _is_projection(name, value)}
            self.leaves = {key: leaf for name, value in matrices.items() for key, leaf in self._factors(name, value)}
        chosen = self.hyperparameters
        self.optimizer = torch.optim.AdamW(
            list(self.leaves.values()),
            lr=chosen.learning_rate,
            betas=chosen.betas,
            weight_decay=chosen.weight_decay,
            foreach=False,  # all at once would take as much memory again
        )

    def _factors(self, name: str, matrix: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        rows, columns = matrix.shape
        drawn_RI = torch.empty(self.rank or 0, columns).uniform_(-1, 1, generator=self.generator) / math.sqrt(columns)
        factors = {f"{name}.A": drawn_RI, f"{name}.B": torch.zeros(rows, self.rank or 0)}
        return [(key, value.to(matrix.device).requires_grad_()) for key, value in factors.items()]

    def weights(self) -> dict[str, torch.Tensor]:
        """The block's parameters as they are now, by name."""
        if self.rank is None:
            return {**self._frozen, **self.leaves}
        adapted = {key.removesuffix(".A") for key in self.leaves if key.endswith(".A")}
        changed = {
            name: self._frozen[name].float() + _SCALE * (self.leaves[f"{name}.B"] @ self.leaves[f"{name}.A"])
            for name in adapted
        }
        return {**self._frozen, **changed}

    def states(self, skeleton: Skeleton, hidden_BTD: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """What the block gives with them, [B, T, D]."""
        weights = self.weights()

        def with_weights(hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return functional_call(self.block, weights, (hidden_BTD, *args), kwargs)

        device, dtype = skeleton.device.type, skeleton.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return skeleton.run_block(with_weights, hidden_BTD, call)  # type: ignore[arg-type]

    def rate(self, step: int) -> float:
        """The learning rate of a step of the block, from 0: it rises over the warm-up, then falls to nothing as a cosine."""
        warmup, largest = self.hyperparameters.warmup_steps, self.hyperparameters.learning_rate
        if step < warmup:
            return largest * (step + 1) / (warmup + 1)
        return largest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def update(self, step: int) -> float:
        """Change the weights by their gradients; gives the norm that those had."""
        gradients = [leaf for leaf in self.leaves.values() if leaf.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(gradients, _LARGEST_NORM, foreach=False))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- the state of a run that may be killed

    def saved(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(what is trained, what the optimizer knows of it), on the CPU."""
        trained = {name: leaf.detach().cpu().contiguous() for name, leaf in self.leaves.items()}
        known = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, leaf in self.leaves.items()
            for key, value in self.optimizer.state[leaf].items()
        }
        return trained, known

    def restore(self, trained: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]) -> None:
        """Put back what `saved` gave; without the state of the optimizer it starts from step 0."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(trained[name])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if all(f"{name}.{key}" in known for key in keys):
                    device = {"step": torch.device("cpu")}
                    self.optimizer.state[leaf] = {
                        key: known[f"{name}.{key}"].to(device.get(key, leaf.device)) for key in keys
                    }


def _is_projection(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2 and name.removesuffix(".weight").rpartition(".")[2] not in ROUTERS
