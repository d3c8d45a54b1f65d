"""The matrix: every family of the table, several sets of blocks each.

Pruned equals bypassed, bit for bit; no key is missing or left over; cached generation equals uncached where the
dense model's does; and scores equal those of naive removal and autograd. The families that people run today are in
every `make test`, all others in `make test-all`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.data.calibration import CalibrationSet
from shortstack.errors import ShortstackError
from shortstack.families.table import FAMILIES
from shortstack.inspection.families import families, measured_sets
from shortstack.pruning.plan import plan_for
from shortstack.scoring.criteria import parse_criteria
from shortstack.scoring.score import score_windows
from tests import oracle
from tests.families import tiny
from tests.families.configs import CONFIGS, FIRST
from tests.families.matrix import measured

# What libraries say of themselves when they are imported, or built without a GPU, is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Tiny = Callable[[str], Path]
REFUSED_WHOLE = {name for name, family in FAMILIES.items() if family.refused}
NAMES = sorted(name for name in CONFIGS if name not in REFUSED_WHOLE)
# What these models compute in float64 fails inside transformers.
ONLY_FLOAT32 = {"xglm", "xlnet"}


def every(names: list[str]) -> list[Any]:
    return [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", every(NAMES))
def test_pruned_equals_passed_over(tiny_model: Tiny, name: str, tmp_path: Path) -> None:
    """And the record that `shortstack families` shows is what is found here."""
    found = measured(name, tmp_path, tiny_model(name))
    assert not found.wrong
    assert found.record() == measured_sets()["configurations"][name]
    assert len(found.exact) >= 3 or name == "rwkv", "rwkv is refused whole while rescale_every is set"


# Sets of tiny.sets_of(name) that cannot go, with a part of the reason. All others go.
REFUSED_SETS = {
    **dict.fromkeys(
        (
            "bamba",
            "granitemoehybrid",
            "kimi_linear",
            "lfm2",
            "lfm2_moe",
            "qwen3_5_text",
            "qwen3_next",
            "qwen3_5@composite",
            "qwen3_5_moe_text",
            "qwen3_5_moe@composite",
        ),
        ({(1, 4, 5)}, "no block with attention would stay"),
    ),
    "kimi_linear@rule": ({(3, 4)}, "no block with attention would stay"),
    "modernbert-decoder@rule": ({(0,), (0, 5)}, "block 0 must stay"),
    "olmo_hybrid@rule": ({(1, 3), (3, 4)}, "a block of each type"),
    **dict.fromkeys(("qwen3_5_text@rule", "qwen3_next@rule"), ({(1, 3), (3, 4)}, "no block with attention would stay")),
    "nemotron_h": ({(1, 5)}, "no block with attention would stay"),
    "olmo_hybrid": ({(1, 4, 5), (0, 2, 3)}, "a block of each type"),
    "recurrent_gemma": ({(2, 5)}, "no block with attention would stay"),
    "zamba": ({(1, 4, 5)}, "fewer than two hybrid blocks"),
    "diffllama": ({(0,), (2,), (1, 3), (0, 5), (3, 4)}, "only the last blocks"),
    "ernie4_5_moe@int2": ({(0,), (2,), (0, 5)}, "at a regular interval"),
    "gemma3n_text": ({(1, 3)}, "keys and values of block 1"),
    "gemma4_text@lastS": ({(5,), (0, 5)}, "the last block must attend to everything"),
    "gemma4_text@ple": ({(1, 3)}, "keys and values of block 1"),
    "gemma4_unified_text": ({(5,), (0, 5)}, "the last block must attend to everything"),
    "glm_moe_dsa": ({(1, 3), (3, 4)}, "uses the tokens that block"),
    "gpt2@scaled": ({(0,), (2,), (1, 3), (0, 5), (3, 4)}, "only the last blocks"),
    "hy_v4": ({(1, 3), (3, 4)}, "uses the tokens that block"),
    "jamba": ({(2,)}, "periodic attention and experts"),
    "jamba@p2": ({(2,)}, "periodic attention and experts"),
    "jamba@stock": ({(2,), (3, 4)}, "attention"),
    "modernbert-decoder": ({(0,), (0, 5)}, "block 0 must stay"),
    "qwen4_exp_text": ({(0,), (0, 5)}, "n-gram tables of later blocks"),
    "rwkv": (set(tiny.sets_of("rwkv")), ""),
    "rwkv@norescale": ({(0,), (0, 5)}, "block 0 must stay"),
    "zamba2": ({(1, 3), (3, 4)}, "another of the 2 shared blocks"),
}


@pytest.mark.parametrize("name", NAMES)
def test_refused_sets(tiny_model: Tiny, name: str) -> None:
    """What cannot go exactly is refused by name, and nothing else is: neither imports torch."""
    checkpoint = tiny.open_checkpoint(tiny_model(name))
    refused, reason = REFUSED_SETS.get(name, (set(), ""))
    for blocks in tiny.sets_of(name):
        if blocks in refused:
            with pytest.raises(ShortstackError, match=f"is not exact: .*{reason}"):
                plan_for(checkpoint, blocks=",".join(map(str, blocks)))
        else:
            plan_for(checkpoint, blocks=",".join(map(str, blocks)))


@pytest.mark.parametrize("name", sorted(REFUSED_WHOLE))
def test_families_that_are_refused_whole(tiny_model: Tiny, name: str) -> None:
    with pytest.raises(ShortstackError, match="cannot be shortened"):
        tiny.open_checkpoint(tiny_model(name))


# Mixtures of experts: near-ties of a router flip with the shape of the batch.
ROUTED = {"deepseek_v3", "gpt_oss", "gpt_oss@rule", "llama4_text", "llama4_text@rule", "mixtral", "qwen3_moe"}


@pytest.mark.parametrize("name", sorted(set(FIRST) - ROUTED))
def test_scores_equal_the_oracle_in_float32(tiny_model: Tiny, name: str) -> None:
    check_scores(tiny_model(name), torch.float32, 1e-5)


@pytest.mark.parametrize("name", every(NAMES))
def test_scores_equal_the_oracle(tiny_model: Tiny, name: str) -> None:
    """In float64, for all families alike."""
    if name in ONLY_FLOAT32:
        check_scores(tiny_model(name), torch.float32, 1e-4)
    else:
        check_scores(tiny_model(name), torch.float64, 1e-5)


def check_scores(model_directory: Path, dtype: torch.dtype, relative: float) -> None:
    """Scores of all three criteria against naive removal and autograd on the whole model."""
    checkpoint = tiny.open_checkpoint(model_directory)
    ids_WT = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(7))
    found = score_windows(
        checkpoint,
        CalibrationSet(ids_WT.tolist(), {}),
        parse_criteria("ppl,taylor,magnitude"),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
    )
    model, _ = tiny.load(checkpoint.directory, dtype)
    with torch.no_grad():
        assert found.criteria["ppl"].dense_ppl == pytest.approx(math.exp(float(mean_nll(model, ids_WT))), rel=relative)
        for index in range(checkpoint.depth):
            if not removable(checkpoint, index):
                continue  # others need its state: its hidden states alone are bypassed
            with tiny.passed_over(model, checkpoint, [index]):
                expected = math.exp(float(mean_nll(model, ids_WT)))
            assert found.criteria["ppl"].scores[index] == pytest.approx(expected, rel=relative), index
    blocks = tiny.blocks_of(model, checkpoint)
    magnitude = [{n: float(p.detach().abs().double().sum()) for n, p in oracle.scored(b).items()} for b in blocks]
    mean_nll(model, ids_WT).backward()
    taylor = [
        {
            n: float((p.detach() * p.grad).abs().double().sum()) if p.grad is not None else 0.0
            for n, p in oracle.scored(b).items()
        }
        for b in blocks
    ]
    for criterion, expected_blocks in (("magnitude", magnitude), ("taylor", taylor)):
        tensors = list(found.criteria[criterion].tensors.values())
        assert [set(block) for block in tensors] == [set(block) for block in expected_blocks]
        totals = [sum(block.values()) for block in expected_blocks]
        assert found.criteria[criterion].scores == pytest.approx(totals, rel=relative)


def removable(checkpoint: Any, index: int) -> bool:
    try:
        plan_for(checkpoint, blocks=str(index))
    except ShortstackError:
        return False
    return True


def mean_nll(model: Any, ids_WT: torch.Tensor) -> torch.Tensor:
    """From the definition; CPM-Ant puts a prompt of its own before the text."""
    losses = []
    for ids_T in ids_WT:
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0, -len(ids_T) :]
        log_probabilities = torch.log_softmax(logits[:-1].double(), dim=-1)
        losses.append(-log_probabilities[torch.arange(len(ids_T) - 1), ids_T[1:]].mean())
    return torch.stack(losses).mean()


def test_the_matrix_covers_the_table() -> None:
    assert {name.partition("@")[0] for name in CONFIGS} == set(FAMILIES)
    assert set(measured_sets()["configurations"]) == set(NAMES)


def test_families_counts_what_was_measured() -> None:
    found = families()
    assert found.counted("causal") >= 85
    assert all(facts.reason for facts in found.families if facts.status == "refused")
    text = found.to_text()
    assert f"{found.counted('causal')} decoder-only causal language models are exact" in text
    assert "two stacks of blocks are run in cycles" in " ".join(families("hrm_text").to_text().split())
