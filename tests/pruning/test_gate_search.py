"""`--selection gate:M` measures the sets that gates propose, and says how far it could be trusted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortstack
from shortstack.engine.streamed import StreamedModel
from shortstack.errors import UsageError
from tests import oracle, pico

Built = Callable[..., Path]
WINDOWS = pico.windows(6)


def found(model: Path, data: str, **options: Any) -> Any:
    return shortstack.search(
        str(model), **{"data": data, "samples": 3, "seq_len": 16, "quiet": True, "remove": 2, **options}
    )


@torch.no_grad()
def nll(model: Path, removed: set[int]) -> float:
    return float(oracle.mean_nll(oracle.bypassed(pico.load(model), removed), WINDOWS[:3]).mean())


def test_of_as_many_sets_as_there_are_the_cheapest_is_chosen(built: Built, data: str) -> None:
    """However wrong the gates are: what was measured ranks."""
    model = built("llama")
    made = found(model, data, selection="gate:15")
    pairs = [set(pair) for pair in itertools.combinations(range(6), 2)]
    assert set(made.removed) == min(pairs, key=lambda pair: nll(model, pair))
    gates = made.why["gates"]
    assert len(gates["measured"]) == 15
    for one in gates["measured"]:
        assert one["added_nll"] == pytest.approx(nll(model, set(one["removed"])) - nll(model, set()), abs=2e-5)
        alone = sum(nll(model, {block}) - nll(model, set()) for block in one["removed"])
        assert one["one_by_one"] == pytest.approx(alone, abs=5e-5)
        places = one["removed"]
        said = sum(gates["hessian"][i][j] for i in places for j in places) / 2 - sum(
            gates["gradient"][i] for i in places
        )
        assert one["by_gates"] == pytest.approx(said, abs=1e-9)
    assert [one["by_gates"] for one in gates["measured"]] == sorted(one["by_gates"] for one in gates["measured"])


def test_one_set_is_the_one_of_the_gates(built: Built, data: str) -> None:
    made = found(built("llama"), data, selection="gate:1")
    every = found(built("llama"), data, selection="gate:15").why["gates"]["measured"]
    assert list(made.removed) == every[0]["removed"]
    assert made.why["gates"]["tau"] == {"gates": None, "one_by_one": None, "block_influence": None}


def test_both_baselines_are_judged(built: Built, data: str, tmp_path: Path) -> None:
    model = built("llama")
    made = found(model, data, selection="gate:1", out=tmp_path / "plan.json")
    sets = {one["by"]: one["removed"] for one in made.why["measured"]["sets"]}
    scores = shortstack.score(str(model), criterion="bi", data=data, samples=3, seq_len=16, quiet=True)
    assert sets["block influence"] == list(shortstack.plan(str(model), scores=scores, remove=2).removed)
    one_shot = list(found(model, data, selection="one-shot").removed)
    assert sets.get("one-shot", list(made.removed)) == one_shot
    assert "block influence" in (tmp_path / "plan.json").read_text()


def test_killed_it_resumes(built: Built, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = built("llama"), tmp_path / "plan.json"
    whole, real, calls = found(model, data, selection="gate:4"), StreamedModel.gate_gradients, []

    def gradients(self: StreamedModel, ids: Any, settings: Any, *more: Any) -> torch.Tensor:
        calls.append(settings)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, ids, settings, *more)

    monkeypatch.setattr(StreamedModel, "gate_gradients", gradients)
    with pytest.raises(KeyboardInterrupt):
        found(model, data, selection="gate:4", out=out)
    calls.clear()
    calls += [None] * 4
    assert found(model, data, selection="gate:4", out=out).to_json() == whole.to_json()
    assert len(calls) == 4 + 4


def test_a_block_with_massive_activations_is_reported(
    copied: Built, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copied("llama")
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][5] *= 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    made = found(model, data, selection="gate:15", remove=1)
    massive = made.why["gates"]["massive"]
    assert list(massive) == ["2"]
    assert massive["2"]["largest"] > 1000 * massive["2"]["median"]
    for remove in range(1, 6):
        made = found(model, data, selection="gate:1", remove=remove)
        assert ("block 2 writes massive activations" in made.note) == (2 in made.removed)
    assert 2 in made.removed  # so the loop has seen the line
    assert "block 2 writes massive activations" in made.to_text()


def test_half_precision_is_refused(built: Built, data: str) -> None:
    with pytest.raises(UsageError, match="differences of gradients, which need float32"):
        found(built("llama"), data, selection="gate", dtype="bfloat16")


def test_sets_that_a_family_refuses_are_skipped(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ModernBERT's first block has no norm before attention: it stays."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in pico.windows(6, vocabulary=96)))
    made = found(tiny_model("modernbert-decoder"), str(data), selection="gate:3", plus=False, quiet=False)
    assert 0 not in made.removed
    assert all(0 not in one["removed"] for one in made.why["gates"]["measured"])
    told = capsys.readouterr().err
    assert "cannot be removed exactly and were not measured" in told
    assert "gates: the set that they predict to be the cheapest is number" in told
