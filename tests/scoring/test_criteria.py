"""A criterion is one file and one row: two toys, which only these tests know, are scored in every way that a run has."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.cli.app import run
from shortstack.data.calibration import CalibrationSet
from shortstack.engine import losses
from shortstack.errors import UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.scoring.criteria import CRITERIA, Criterion, LogitsPass, parse_criteria
from shortstack.scoring.score import score_windows
from tests import oracle, pico
from tests.kills import Warm
from tests.scoring.toys import ROWS

Built = Callable[..., Path]
TOYS = "change,divergence"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in ROWS.items():
        monkeypatch.setitem(CRITERIA, name, row)


def scored(model: Path, criteria: str = TOYS, windows: int = 5, **options: Any) -> dict[str, list[float]]:
    calibration = CalibrationSet(pico.windows(windows), {})
    found = score_windows(open_checkpoint(model), calibration, parse_criteria(criteria), **options)
    return {name: list(one.scores) for name, one in found.criteria.items()}


@torch.no_grad()
def naive_change(loaded: Any, ids_BT: torch.Tensor, power: int = 2) -> list[float]:
    found = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        left = output[0] if isinstance(output, tuple) else output
        found.append(float(((left.double() - given.double()).abs() ** power).mean()))

    for block in oracle.layers_of(loaded):
        block.register_forward_hook(note, with_kwargs=True)
    loaded(input_ids=ids_BT, use_cache=False)
    return found


@torch.no_grad()
def naive_divergence(model: Path, ids_BT: torch.Tensor) -> list[float]:
    def predicted(removed: set[int]) -> torch.Tensor:
        logits = oracle.bypassed(pico.load(model), removed)(input_ids=ids_BT, use_cache=False).logits
        return logits.double().log_softmax(dim=-1)  # type: ignore[no-any-return]

    dense = predicted(set())
    depth = len(oracle.layers_of(pico.load(model)))
    return [float((dense.exp() * (dense - predicted({i}))).sum(dim=-1).mean()) for i in range(depth)]


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "gpt2"])
def test_equals_a_naive_computation(built: Built, family: str, memory: Any) -> None:
    model, ids = built(family), torch.tensor(pico.windows(5))
    found = scored(model, memory=memory)
    assert found["change"] == pytest.approx(naive_change(pico.load(model), ids), rel=1e-5)
    assert found["divergence"] == pytest.approx(naive_divergence(model, ids), rel=1e-4)


@pytest.mark.parametrize("others", ["", "ppl,", "taylor,", "ppl,taylor:batch=2,magnitude,"])
def test_beside_others_it_is_the_same(built: Built, others: str, memory: Any) -> None:
    """With and without branches, kept inputs and kept graphs; and the others are what they are alone."""
    model = built("llama")
    found = scored(model, f"{others}{TOYS}", memory=memory)
    alone = scored(model, "change", memory=memory) | scored(model, "divergence", memory=memory)
    if others:
        alone |= scored(model, others[:-1], memory=memory)
    assert found == {name: pytest.approx(alone[name], rel=1e-6) for name in found}


@pytest.mark.parametrize("options", [{"stream_bytes": 4 * 5 * 16 * 32 * 4}, {"candidates": (1, 4)}])
def test_in_groups_and_for_some_blocks(built: Built, options: dict[str, Any]) -> None:
    model, ids = built("llama"), torch.tensor(pico.windows(5))
    found = scored(model, memory="streamed", **options)
    blocks = options.get("candidates", range(6))
    assert found["change"] == pytest.approx([naive_change(pico.load(model), ids)[i] for i in blocks], rel=1e-5)
    assert found["divergence"] == pytest.approx([naive_divergence(model, ids)[i] for i in blocks], rel=1e-4)


@pytest.mark.parametrize(("tokens", "most"), [(5, 5), (16, 16), (40, 32)])
def test_logits_come_in_slices_that_fit(built: Built, monkeypatch: pytest.MonkeyPatch, tokens: int, most: int) -> None:
    """A part of a window, one window, and as many as fit."""
    from tests.scoring.toys import Divergence

    model, whole = built("llama"), scored(built("llama"), "divergence", memory="streamed")
    seen = []
    real = Divergence.on_logits
    monkeypatch.setattr(losses, "_LOGITS_BYTES", tokens * pico.VOCABULARY * 4)

    def on_logits(self: Divergence, logits: LogitsPass) -> None:
        seen.append(logits.ids_BT.numel())
        real(self, logits)

    monkeypatch.setattr(Divergence, "on_logits", on_logits)
    assert scored(model, "divergence", memory="streamed") == {
        "divergence": pytest.approx(whole["divergence"], rel=1e-6)
    }
    assert max(seen) == most
    assert sum(seen) == 6 * 5 * 16


def test_parameters_are_those_of_the_row(built: Built) -> None:
    ids = torch.tensor(pico.windows(5))
    found = scored(built("llama"), "change,change:power=1")
    assert found["change:power=1"] == pytest.approx(naive_change(pico.load(built("llama")), ids, 1), rel=1e-5)
    assert found["change"] == pytest.approx(naive_change(pico.load(built("llama")), ids, 2), rel=1e-5)
    with pytest.raises(UsageError, match="power=5, expected a whole number from 1 to 4"):
        parse_criteria("change:power=5")
    with pytest.raises(UsageError, match="weight=most, expected one of sum, mean, max, prod"):
        parse_criteria("magnitude:weight=most")


def test_hidden_states_in_several_streams(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 3n's lie before the windows; the model is held whole."""
    model = tiny_model("gemma3n_text")
    windows = [[(7 * row + 3 * place) % 90 + 3 for place in range(16)] for row in range(3)]
    found = score_windows(open_checkpoint(model), CalibrationSet(windows, {}), parse_criteria("change"))
    expected = naive_change(pico.load(model), torch.tensor(windows))
    assert found.criteria["change"].scores == pytest.approx(expected, rel=1e-5)


def test_every_row_is_a_criterion() -> None:
    for name in CRITERIA:
        asked = parse_criteria(name if "others" not in CRITERIA[name].needs else f"ppl,taylor,{name}")[-1]
        started = asked.start()
        assert isinstance(started, Criterion)
        assert type(started).finish is not Criterion.finish
        on_block, on_logits = type(started).on_block, type(started).on_logits
        assert (on_block is not Criterion.on_block) == bool(asked.needs & {"weights", "hidden", "gradients"})
        assert (on_logits is not Criterion.on_logits) == ("logits" in asked.needs)


def arguments(model: Path, windows: Path, out: Path, *more: str) -> list[str]:
    criteria = f"{TOYS},ppl,taylor"
    return ["score", str(model), "--criterion", criteria, "--data", str(windows), "--samples", "5", "--seq-len", "16",
            "--out", str(out), *more]  # fmt: skip


def rows(path: Path) -> Path:
    ids = [[(7 * row + 3 * place) % 90 + 3 for place in range(16)] for row in range(5)]
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in ids))
    return path


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())["criteria"]
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_in_two_processes(
    built: Built, tiny_model: Callable[[str], Path], family: str, warm: Warm, tmp_path: Path
) -> None:
    """One of each engine; five windows, so that the parts differ in size."""
    model, data = tiny_model(family) if "_" in family else built(family), rows(tmp_path / "rows.jsonl")
    command, log = arguments(model, data, tmp_path / "two.json"), tmp_path / "log.txt"
    assert warm.run(command, log, processes=2, module="tests.scoring.toys")["code"] == 0, log.read_text()
    assert run(arguments(model, data, tmp_path / "one.json")) == 0
    two, one = read(tmp_path / "two.json"), read(tmp_path / "one.json")
    for name in one:
        assert two[name]["scores"] == pytest.approx(one[name]["scores"], rel=1e-5), name


@pytest.mark.fault(52)
@pytest.mark.parametrize(("family", "saves"), [("llama", 3), ("llama", 9), ("gemma3n_text", 4)])
def test_killed_it_resumes(
    built: Built, tiny_model: Callable[[str], Path], family: str, saves: int, warm: Warm, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """SIGKILL between blocks, after the logits, in the backward sweep, and between passes of a model that is held whole."""
    model, data = tiny_model(family) if "_" in family else built(family), rows(tmp_path / "rows.jsonl")
    command = arguments(model, data, tmp_path / "killed.json", "--save-every", "0")
    log = tmp_path / "log.txt"
    killed = warm.run(command, log, module="tests.scoring.toys", environment={"TOYS_KILLED_AT": str(saves)})
    assert killed["code"] == -signal.SIGKILL, log.read_text()
    assert not (tmp_path / "killed.json").exists()
    assert run(arguments(model, data, tmp_path / "whole.json")) == 0
    capsys.readouterr()
    assert run(command) == 0
    assert "from the saved state" in capsys.readouterr().err
    assert read(tmp_path / "killed.json") == read(tmp_path / "whole.json")
