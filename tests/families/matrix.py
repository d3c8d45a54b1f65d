"""One family's row of the matrix: which sets of blocks go exactly, which are refused, and whether generation holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shortstack.engine.load import aligned
from shortstack.errors import ShortstackError
from shortstack.pruning.plan import plan_for
from shortstack.pruning.prune import prune
from tests.families import tiny

# Whether cached generation equals uncached is decided by near-ties of their token selection (families.md, note 23).
UNSTABLE_CACHE = {"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", "minimax"}


@dataclass
class Measured:
    """What was found of one configuration; `wrong` must be empty."""

    exact: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    cached: str = ""

    def record(self) -> dict[str, Any]:
        """As assets/families.json holds it."""
        assert not self.wrong, self.wrong
        return {"exact": self.exact, "refused": self.refused, "cached": self.cached}


def measured(name: str, folder: Path, model_directory: Path | None = None) -> Measured:
    """Prune by every set, load as a user does, and compare with the original with those blocks bypassed."""
    directory = model_directory or tiny.build(folder / "model", name)
    checkpoint = tiny.open_checkpoint(directory)
    model, dense_keys = tiny.load(directory)
    model = aligned(model)  # as verify does: some CPUs round products of experts by where the weights lie
    stable = name.partition("@")[0] not in UNSTABLE_CACHE and tiny.greedy(model, True) == tiny.greedy(model, False)
    found = Measured(cached="equals uncached" if stable else "differs in the dense model, too")
    for number, blocks in enumerate(tiny.sets_of(name)):
        key = ",".join(map(str, blocks))
        try:
            plan = plan_for(checkpoint, blocks=key).plan
        except ShortstackError as error:
            found.refused[key] = error.message.partition("is not exact: ")[2]
            continue
        out = folder / str(number)
        prune(str(directory), out=out, plan=plan, quiet=True)
        problem = _problem(out, model, checkpoint, blocks, dense_keys, stable)
        if problem:
            found.wrong[key] = problem
        else:
            found.exact.append(key)
    return found


def _problem(
    out: Path, model: Any, checkpoint: Any, blocks: tuple[int, ...], dense_keys: dict[str, Any], stable: bool
) -> str:
    pruned, keys = tiny.load(out)
    if keys["missing_keys"] or set(keys["unexpected_keys"]) - set(dense_keys["unexpected_keys"]):
        return f"odd keys: {keys}"
    with torch.no_grad():
        found = aligned(pruned)(input_ids=tiny.WINDOWS, use_cache=False).logits
        with tiny.passed_over(model, checkpoint, blocks):
            expected = model(input_ids=tiny.WINDOWS, use_cache=False).logits
    if not torch.equal(found, expected):
        return f"logits differ by up to {float((found - expected).abs().max()):.2g}"
    if stable and tiny.greedy(pruned, True) != tiny.greedy(pruned, False):
        return "cached generation differs from uncached"
    return ""
