"""Every fold gives what a hook gives that applies the same map at the cut, for every family that has a place for it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.families.open_model import open_checkpoint
from shortstack.families.residual import RESIDUALS
from shortstack.pruning.prune import prune
from shortstack.pruning.repair.fit import Map
from shortstack.pruning.repair.folds import Fold, changes
from shortstack.pruning.repair.places import named
from shortstack.pruning.repair.write import write_over
from tests.families import tiny
from tests.families.configs import CONFIGS

FAMILIES = sorted(RESIDUALS)
MAPPED = [name for name in FAMILIES if not RESIDUALS[name].norms]
AT = 1  # the block before the cut
SCALE = 1.3


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Two adjacent blocks gone, and another one behind them."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            prune(str(tiny.build(folder / "dense", family)), blocks="2,3,5", out=folder / "pruned", quiet=True)
            made[family] = folder / "pruned"
        return made[family]

    return build


def folded(source: Path, target: Path, *folds: Fold) -> Any:
    """The checkpoint with the folds in its weights, loaded in float64."""
    shutil.copytree(source, target)
    staged = open_checkpoint(target)
    residual = staged.anatomy.family.residual
    assert residual is not None
    edits = changes(staged, residual, folds)
    assert edits
    write_over(staged, edits)
    return tiny.load(target, torch.float64)[0]


@contextlib.contextmanager
def hooked(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tiny.WINDOWS, use_cache=False).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """Equal up to the rounding of weights and the norms' eps; and the map did something."""
    scale = float((expected - expected.mean(dim=-1, keepdim=True)).abs().max())
    assert float((expected - plain).abs().max()) > 1e-2 * scale
    assert float((found - expected).abs().max()) < 2e-4 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factor_in_the_weights_is_a_factor_at_the_cut(
    family: str, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    source = pruned(family)
    model = tiny.load(source, torch.float64)[0]
    blocks = tiny.blocks_of(model, open_checkpoint(source))
    plain = logits(model)
    with hooked(blocks[AT], lambda hidden: hidden * SCALE):
        expected = logits(model)
    close(logits(folded(source, tmp_path / "folded", Fold(AT, Map(factor=SCALE)))), expected, plain)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text"])
def test_factors_of_several_cuts_are_multiplied(family: str, pruned: Callable[[str], Path], tmp_path: Path) -> None:
    source = pruned(family)
    model = tiny.load(source, torch.float64)[0]
    blocks = tiny.blocks_of(model, open_checkpoint(source))
    plain = logits(model)
    first = torch.nn.Module.register_forward_pre_hook
    handle = first(blocks[0], lambda _, given: (given[0] * 0.8, *given[1:]))
    with hooked(blocks[AT], lambda hidden: hidden * SCALE):
        expected = logits(model)
    handle.remove()
    folds = (Fold(-1, Map(factor=0.8)), Fold(AT, Map(factor=SCALE)))
    close(logits(folded(source, tmp_path / "folded", *folds)), expected, plain)


def projections(source: Path) -> list[str]:
    """The block's modules whose outputs together are what its MLP adds."""
    checkpoint = open_checkpoint(source)
    residual = checkpoint.anatomy.family.residual
    assert residual is not None
    names = [checkpoint.anatomy.within_block(t.name) for t in named(checkpoint, AT, residual.mlp)]
    if any(".experts." in name for name in names):
        return [names[0].partition(".experts.")[0]]
    return sorted({name.rpartition(".")[0] for name in names})


@pytest.mark.parametrize("family", MAPPED)
def test_a_linear_map_in_the_weights_is_one_of_what_the_mlp_adds(
    family: str, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    source = pruned(family)
    model = tiny.load(source, torch.float64)[0]
    block = tiny.blocks_of(model, open_checkpoint(source))[AT]
    plain = logits(model)
    modules = dict(block.named_modules())
    (name,) = projections(source)
    module = modules.get(name) or modules["mlp"]
    width = CONFIGS[family].get("hidden_size", 64)
    change = 0.3 * torch.randn(width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    offset = (
        0.1 * torch.arange(width, dtype=torch.float64) / width if getattr(module, "bias", None) is not None else None
    )
    constant = 0 if offset is None else offset
    with (
        hooked(module, lambda added: added + added @ change + constant),
        hooked(block, lambda hidden: hidden * SCALE),
    ):
        expected = logits(model)
    fold = Fold(AT, Map("moved", SCALE, change, offset))
    close(logits(folded(source, tmp_path / "folded", fold)), expected, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "granite"])
def test_a_projection_fitted_anew_adds_what_the_map_says(
    family: str, pruned: Callable[[str], Path], tmp_path: Path
) -> None:
    source = pruned(family)
    checkpoint = open_checkpoint(source)
    model = tiny.load(source, torch.float64)[0]
    block = tiny.blocks_of(model, checkpoint)[AT]
    plain = logits(model)
    (name,) = projections(source)
    module = dict(block.named_modules())[name]
    inner: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, given: inner.append(given[0]))
    multiplier = checkpoint.config.get("residual_multiplier", 1.0)
    wide = logits(model) is not None and inner[-1].shape[-1]
    change = 0.1 * torch.randn(int(wide), 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with hooked(module, lambda added: added + (inner[-1] @ change) / multiplier):
        expected = logits(model)
    close(logits(folded(source, tmp_path / "folded", Fold(AT, Map("inner", 1.0, change), multiplier))), expected, plain)
