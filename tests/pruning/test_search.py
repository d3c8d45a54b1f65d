"""`search` chooses sets by measuring them, and windows that chose nothing judge the choice."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortstack
from shortstack.artifacts.plan import load_plan
from shortstack.engine.streamed import StreamedModel
from shortstack.errors import ShortstackError, UsageError
from shortstack.pruning.selection import parse_selection
from tests import oracle, pico

Built = Callable[..., Path]
WINDOWS = pico.windows(6)
CHOOSING, JUDGING = WINDOWS[:3], WINDOWS[3:]


def found(model: Path, data: str, **options: Any) -> Any:
    return shortstack.search(str(model), data=data, samples=3, seq_len=16, quiet=True, **options)


@torch.no_grad()
def nll(model: Path, removed: set[int], windows: list[list[int]]) -> torch.Tensor:
    return oracle.mean_nll(oracle.bypassed(pico.load(model), removed), windows)


def cheapest(model: Path, sets: list[set[int]]) -> list[set[int]]:
    return sorted(sets, key=lambda one: float(nll(model, one, CHOOSING).mean()))


def pairs(blocks: range = range(6)) -> list[set[int]]:
    return [set(pair) for pair in itertools.combinations(blocks, 2)]


@pytest.mark.parametrize("selection", ["one-shot", "contiguous", "greedy", "beam:6", "beam:9999"])
def test_selections_choose_what_they_say(built: Built, data: str, selection: str) -> None:
    model = built("llama")
    removed = set(found(model, data, remove=2, selection=selection).removed)
    singles = cheapest(model, [{index} for index in range(6)])
    expected = {
        "one-shot": singles[0] | singles[1],
        "contiguous": cheapest(model, [{index, index + 1} for index in range(5)])[0],
        "greedy": cheapest(model, [singles[0] | other for other in singles[1:]])[0],
        "beam:6": cheapest(model, pairs())[0],
        "beam:9999": cheapest(model, pairs())[0],  # wider than there are sets
    }
    assert removed == expected[selection]


def test_evolution_is_never_worse_than_where_it_begins(built: Built, data: str) -> None:
    model = built("llama")
    one_shot = found(model, data, remove=3, selection="one-shot").removed
    evolved = found(model, data, remove=3, selection="evolution:12")
    assert nll(model, set(evolved.removed), CHOOSING).mean() <= nll(model, set(one_shot), CHOOSING).mean()
    assert found(model, data, remove=3, selection="evolution:12").to_json() == evolved.to_json()


def test_swaps_are_never_worse_than_greedy_on_the_windows_that_choose(data: str, tmp_path: Path) -> None:
    """They begin at its set, and can leave it."""
    gains = []
    for seed in range(4):
        model = pico.build(tmp_path / f"model-{seed}", seed=seed)
        greedy, swaps = (found(model, data, remove=3, selection=name) for name in ("greedy", "swaps:6"))
        assert swaps.why["measured"]["sets"][0]["by"] == "swaps:6"
        losses = [float(nll(model, set(one.removed), CHOOSING).mean()) for one in (greedy, swaps)]
        gains.append(losses[0] - losses[1])
    assert min(gains) >= 0
    assert max(gains) > 0


def test_other_windows_judge(built: Built, data: str) -> None:
    """The figures are those of windows that the search never saw, paired with the dense model's."""
    model = built("llama")
    measured = found(model, data, remove=2, selection="beam:6").why["measured"]
    dense = nll(model, set(), JUDGING)
    assert measured["dense_ppl"] == pytest.approx(math.exp(dense.mean()), rel=1e-5)
    assert measured["sets"][0]["by"] == "beam:6"
    assert len(measured["sets"]) == 3
    for one in measured["sets"]:
        difference = nll(model, set(one["removed"]), JUDGING) - dense
        assert one["increase"] == pytest.approx(math.expm1(difference.mean()), rel=1e-3, abs=1e-6)
        error = float(difference.std()) / 3**0.5 * math.exp(difference.mean())
        assert one["stderr"] == pytest.approx(error, rel=1e-3, abs=1e-7)
    chosen = measured["sets"][0]["removed"]
    added = sum(float((nll(model, {i}, CHOOSING) - nll(model, set(), CHOOSING)).mean()) for i in chosen)
    assert measured["added_up"] == pytest.approx(math.expm1(added), rel=1e-3, abs=1e-6)


def test_the_plan_is_read_back_and_prunes(built: Built, data: str, tmp_path: Path) -> None:
    model, out = built("llama"), tmp_path / "plan.json"
    made = found(model, data, remove=2, out=out)
    assert load_plan(out).removed == made.removed
    assert load_plan(out).why["measured"] == made.why["measured"]
    assert "on validation windows" in load_plan(out).to_text()
    pruned = shortstack.prune(str(model), plan=str(out), out=tmp_path / "pruned", verify=True, quiet=True)
    assert pruned.plan.removed == made.removed
    assert made.why["measured"]["sets"][0]["by"] in (tmp_path / "pruned/shortstack.json").read_text()
    assert [one.name for one in tmp_path.iterdir() if "work" in one.name] == []


def test_protected_blocks_stay(built: Built, data: str) -> None:
    model = built("llama", num_hidden_layers=12)
    made = found(model, data, remove=2)
    assert made.protected == (0, 1, 2, 3, 10, 11)
    assert set(made.removed) <= set(range(4, 10))
    with pytest.raises(ShortstackError, match="7 blocks to remove, but only 6 of 12"):
        found(model, data, remove=7)


@pytest.mark.parametrize(("amount", "removed"), [({"ratio": 0.3}, 1), ({"ratio": 0.0}, 0), ({"remove": 0}, 0)])
def test_amounts_are_those_of_plan(built: Built, data: str, amount: dict[str, Any], removed: int) -> None:
    made = found(built("llama"), data, **amount)
    assert len(made.removed) == removed or amount == {"ratio": 0.3}
    assert made.removal_ratio <= amount.get("ratio", 1)


@pytest.mark.parametrize("selection", ["contiguous", "greedy", "beam:3", "evolution:3", "swaps:3"])
def test_sets_that_a_family_refuses_are_skipped_and_that_is_said(
    tiny_model: Callable[[str], Path], tmp_path: Path, selection: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """ModernBERT's first block has no norm before attention: it stays."""
    model, data = tiny_model("modernbert-decoder"), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in pico.windows(6, vocabulary=96)))
    made = shortstack.search(
        str(model), data=str(data), samples=3, seq_len=16, remove=2, plus=False, selection=selection
    )
    assert len(made.removed) == 2
    assert 0 not in made.removed
    assert "cannot be removed exactly and w" in capsys.readouterr().err


def test_killed_between_sets_it_finds_what_it_measured(
    built: Built, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = built("llama"), tmp_path / "plan.json"
    whole = found(model, data, remove=3)
    real, calls = StreamedModel.nll_without, []

    def measure(self: StreamedModel, ids: torch.Tensor, sets: Any, *more: Any, **named: Any) -> torch.Tensor:
        calls.append(len(sets))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, ids, sets, *more, **named)

    monkeypatch.setattr(StreamedModel, "nll_without", measure)
    with pytest.raises(KeyboardInterrupt):
        found(model, data, remove=3, out=out)
    assert not out.exists()
    assert calls == [7, 5, 4]
    again = found(model, data, remove=3, out=out)
    assert calls[3:] == [4, 4]  # the third step, and what judges
    assert again.to_json() == whole.to_json()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gredy", "no such selection"),
        ("greedy:3", "greedy takes no number"),
        ("beam:0", "expected the number of sets"),
        ("beam:x", "expected the number of sets"),
        ("evolution:0", "expected the number of generations"),
        ("swaps:x", "expected the number of generations"),
    ],
)
def test_selections_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_selection(text)


def test_amounts_that_are_missing_or_too_many(built: Built, data: str) -> None:
    with pytest.raises(UsageError, match=r"give one of .*found none"):
        found(built("llama"), data)
    with pytest.raises(UsageError, match="give one of"):
        found(built("llama"), data, remove=1, ratio=0.5)


def test_too_few_windows_are_counted_for_both_halves(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(5)))
    with pytest.raises(ShortstackError, match="6"):
        found(built("llama"), str(path), remove=1)


def test_quantized_models_are_refused(built: Built, data: str, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "quantized"
    shutil.copytree(built("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ShortstackError, match="is quantized"):
        found(model, data, remove=1)
