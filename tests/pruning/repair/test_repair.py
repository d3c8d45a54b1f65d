"""`shortstack repair`: what it writes, what it states, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.byte_copy import TensorCopy, same_bytes
from shortstack.cli.app import run
from shortstack.common.progress import Progress
from shortstack.data.calibration import CalibrationOptions
from shortstack.data.embedded import say_of_own_text
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from shortstack.pruning.repair.repair import RepairResult, repair
from shortstack.pruning.repair.states import nll_from
from shortstack.runtime.hashes import file_sha256
from shortstack.scoring.options import ScoreOptions
from shortstack.scoring.self_text import self_written
from tests import pico

Built = Callable[..., Path]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of token ids."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": window}) + "\n" for window in pico.windows(120, 16)))
    return path


@pytest.fixture(scope="session")
def cut(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """(pruned, dense) by family and the blocks removed, made once."""
    known: dict[tuple[str, str], tuple[str, str]] = {}

    def get(family: str = "llama", blocks: str = "2,3", **options: Any) -> tuple[str, str]:
        key = (family + repr(options), blocks)
        if key not in known:
            dense, out = str(built(family, **options)), tmp_path_factory.mktemp("cut") / "pruned"
            prune(dense, blocks=blocks, out=out, quiet=True)
            known[key] = str(out), dense
        return known[key]

    return get


def repaired(pair: tuple[str, str], out: Path, rows: Path, **options: Any) -> RepairResult:
    given = {"data": str(rows), "samples": 80, "seq_len": 16, "quiet": True, "dtype": "float32", **options}
    return repair(pair[0], of=pair[1], out=out, **given)


def test_what_it_writes(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    pruned, dense = cut()
    result = repaired((pruned, dense), tmp_path / "out", rows)
    before, after = open_checkpoint(pruned), open_checkpoint(tmp_path / "out")
    assert result.ppl["repaired"] < result.ppl["pruned"]
    assert (after.config, after.original_blocks) == (before.config, before.original_blocks)
    step = after.provenance["steps"][-1] if after.provenance else {}
    assert [one["stage"] for one in after.provenance["steps"]] == ["prune", "repair"] if after.provenance else False
    assert step["tensors"]
    assert step["dense"]["fingerprint"] == open_checkpoint(dense).fingerprint
    for name, tensor in after.tensors.items():
        same = same_bytes(TensorCopy(before.tensors[name], name), TensorCopy(tensor, name))
        assert same == (name not in step["tensors"]), name
    card = (tmp_path / "out/README.md").read_text()
    assert "repaired in closed form (auto)" in card
    pico.load(tmp_path / "out")


def test_its_own_text_is_written_by_the_dense_model(
    cut: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`self:PROMPTS`: what the pruned model would write is the text of a damaged model."""
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("".join(f"{n} is a number\n" for n in range(60)))
    data, (pruned, dense) = f"self:{tmp_path / 'prompts.txt'}", cut()
    result = repaired((pruned, dense), tmp_path / "out", Path(data), samples=40)
    texts = [
        self_written(
            open_checkpoint(one),
            CalibrationOptions(data=data, samples=50, seq_len=16),
            ScoreOptions(dtype="float32"),
            Progress(quiet=True),
        ).sha256
        for one in (dense, pruned)
    ]
    assert result.calibration["sha256"] == texts[0] != texts[1]


def test_a_figure_stated_is_what_the_written_model_gives(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    pair = cut()
    result = repaired(pair, tmp_path / "out", rows)
    windows = [json.loads(line)["input_ids"] for line in rows.read_text().splitlines()][80:100]
    for name, place in (("dense", pair[1]), ("pruned", pair[0]), ("repaired", tmp_path / "out")):
        ids = torch.tensor(windows)
        with torch.no_grad():
            loss = pico.load(Path(place))(input_ids=ids, labels=ids).loss
        assert result.ppl[name] == pytest.approx(float(loss.exp()), rel=1e-4), name
    assert result.ppl["unfolded"] == pytest.approx(result.ppl["repaired"], rel=1e-3)


@pytest.mark.parametrize("method", ["scale", "linear", "full"])
def test_each_method_alone(method: Any, cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    result = repaired(cut(), tmp_path / "out", rows, method=method)
    assert len(result.places) == (3 if method == "full" else 1)
    assert {place["method"] for place in result.places} == {method}
    assert {"none", method} <= result.places[0]["ppl"].keys()
    assert result.ppl["repaired"] == pytest.approx(result.places[-1]["ppl"][method], rel=1e-3)


def test_streamed_and_resident_write_the_same_bytes(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    pair = cut("llama", "1,3", dtype=torch.bfloat16)
    for memory in ("streamed", "resident"):
        repaired(pair, tmp_path / memory, rows, memory=memory)
    first, second = ((tmp_path / memory / "model.safetensors").read_bytes() for memory in ("streamed", "resident"))
    assert first == second


def test_never_worse_than_nothing_where_nothing_can_be_gained(
    cut: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    """Few windows, so that every map is fitted to noise."""
    for blocks in ("2,3", "1,3"):
        out = tmp_path / blocks.replace(",", "-")
        result = repaired(cut("qwen3", blocks), out, rows, samples=1)
        assert result.ppl["repaired"] <= result.ppl["pruned"] * (1 + 1e-6)


@pytest.mark.fault(127)
def test_a_repair_that_rounding_spoils_is_not_made(
    cut: Callable[..., Any], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = cut()
    monkeypatch.setattr("shortstack.pruning.repair.write._nll", lambda *_: 1e9)
    result = repaired(pair, tmp_path / "out", rows)
    same = [(Path(place) / "model.safetensors").read_bytes() for place in (pair[0], tmp_path / "out")]
    assert same[0] == same[1]
    assert result.tensors == 0
    assert result.places[0]["method"] == "none"
    assert result.ppl["repaired"] == result.ppl["pruned"]


def test_cuts_are_repaired_one_after_another(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    result = repaired(cut("llama", "1,3-4"), tmp_path / "out", rows, behind=0)
    assert [place["removed"] for place in result.places] == [[1], [3, 4]]
    first, second = (place["ppl"] for place in result.places)
    assert second["none"] == pytest.approx(min(first.values()), rel=1e-6)
    assert result.ppl["unfolded"] == pytest.approx(min(second.values()), rel=1e-6)


def test_windows_go_to_the_end_of_the_model_as_seldom_as_can_be(
    cut: Callable[..., Any], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the validation windows with every candidate, the rest with one of each method. Behind a cut one method is
    left, and what the loss is without it is known. Maps are fitted twice, with the first token of each window and without.
    """
    gone: list[tuple[int, int]] = []

    def counted(model: Any, held_SWTD: torch.Tensor, *rest: Any) -> torch.Tensor:
        gone.append((len(held_SWTD), held_SWTD.shape[1]))
        return nll_from(model, held_SWTD, *rest)

    monkeypatch.setattr("shortstack.pruning.repair.sweep.nll_from", counted)
    repaired(cut(), tmp_path / "out", rows, behind=1)
    cut_itself = [
        (6, 5),
        (6, 5),
        (1, 5),
        (4, 15),
    ]  # nothing, two factors and two ridges of two maps, twice; four methods
    assert gone == [*cut_itself, (4, 5), (1, 15), (1, 20)]  # behind it, two ridges of one map, twice; the dense model
    gone.clear()
    without = repaired(cut(), tmp_path / "once", rows, behind=1, first_token=False)
    assert gone == [(6, 5), (1, 5), (4, 15), (2, 5), (1, 15), (1, 20)]
    with_it = repaired(cut(), tmp_path / "too", rows, method="full", behind=0, first_token=True)
    assert [place["first_token"] for place in (*without.places, *with_it.places)] == [False, False, True]


def test_blocks_behind_a_cut(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    result = repaired(cut(), tmp_path / "out", rows, behind=1, method="linear")
    assert [(place["position"], place["removed"]) for place in result.places] == [(1, [2, 3]), (2, [])]
    assert [place["where"] for place in result.places] == ["blocks 2-3", "behind: block 4"]


@pytest.mark.fault(125)
def test_a_family_with_norms_behind_takes_a_factor_alone(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    pair = cut("gemma2")
    result = repaired(pair, tmp_path / "out", rows, method="scale")
    assert result.places[0]["method"] == "scale"
    with pytest.raises(ShortstackError, match="the repair `linear` cannot be folded into gemma2 models"):
        repaired(pair, tmp_path / "other", rows, method="linear")
    assert not (tmp_path / "other").exists()


@pytest.mark.fault(124)
def test_a_dense_model_that_is_another_one(cut: Callable[..., Any], built: Built, rows: Path, tmp_path: Path) -> None:
    pruned, dense = cut()
    with pytest.raises(ShortstackError, match="is not the model that") as caught:
        repaired((pruned, str(built("llama", seed=1))), tmp_path / "out", rows)
    assert caught.value.hint == f"--of {dense}"
    with pytest.raises(ShortstackError, match="no shortstack.json"):
        repaired((dense, dense), tmp_path / "out", rows)
    with pytest.raises(ShortstackError, match="no cut to repair"):
        repaired((pruned, pruned), tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(125)
def test_a_family_without_a_place(tiny_model: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    dense = str(tiny_model("falcon_mamba"))
    prune(dense, blocks="2", out=tmp_path / "pruned", quiet=True)
    with pytest.raises(ShortstackError, match="a repair cannot be folded into falcon_mamba models") as caught:
        repaired((str(tmp_path / "pruned"), dense), tmp_path / "out", rows)
    assert "retrain" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(125)
def test_a_cut_at_the_first_block(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    """Nothing before it writes: a factor alone can go there."""
    pair = cut("llama", "0,1")
    assert repaired(pair, tmp_path / "out", rows).places[0]["ppl"].keys() == {"none", "scale"}
    with pytest.raises(ShortstackError, match="no block comes before it") as caught:
        repaired(pair, tmp_path / "other", rows, method="linear")
    assert caught.value.hint == "take `scale`"


@pytest.mark.fault(125)
def test_a_cut_at_the_last_block(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    """The final norm takes a factor out again: a linear map alone does something."""
    pair = cut("llama", "4,5")
    assert "scale" not in repaired(pair, tmp_path / "out", rows).places[0]["ppl"]
    with pytest.raises(ShortstackError, match="no block comes after it") as caught:
        repaired(pair, tmp_path / "other", rows, method="scale")
    assert caught.value.hint == "take `linear`"


@pytest.mark.fault(125)
def test_a_cut_that_the_method_cannot_repair_beside_one_that_it_can(
    cut: Callable[..., Any], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = repaired(cut("llama", "0,3"), tmp_path / "out", rows, method="linear", quiet=False)
    assert [place["method"] for place in result.places] == ["none", "linear"]
    assert "the repair `linear` cannot repair the cut of block 0, which is left unchanged" in capsys.readouterr().err


@pytest.mark.fault(126)
def test_states_that_are_not_finite(built: Built, rows: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(built("llama"), tmp_path / "dense"))
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0] = 1e38
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    prune(str(dense), blocks="3", out=tmp_path / "pruned", quiet=True)
    with pytest.raises(ShortstackError, match="hidden states at the cut of block 3 are not finite"):
        repaired((str(tmp_path / "pruned"), str(dense)), tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()


def test_text_shorter_than_requested(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ShortstackError, match="125 windows needed, found 120 rows"):
        repaired(cut(), tmp_path / "out", rows, samples=100)
    assert not (tmp_path / "out").exists()


def test_options_without_effect_and_out_of_range(cut: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--save-every"):
        repaired(cut(), tmp_path / "out", rows, save_every=3.0)
    with pytest.raises(UsageError, match="--behind -1"):
        repaired(cut(), tmp_path / "out", rows, behind=-1)


def test_a_text_that_nobody_chose_is_said(
    cut: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2 without 8 blocks, repaired on it, was worse than before on text of any other kind."""
    prune("embedded", blocks="5", out=tmp_path / "own", quiet=True)
    for model, data, said in (
        (cut()[0], "embedded", True), (cut()[0], "text.txt", False), (tmp_path / "own", "embedded", False),
    ):  # fmt: skip
        say_of_own_text(open_checkpoint(model), data, "the repair can make the model worse", Progress())
        assert ("so the repair can make the model worse: give text" in capsys.readouterr().err) is said


def test_tokens_that_are_left_out_of_the_fit(cut: Callable[..., Any], tmp_path: Path) -> None:
    """The first of each window, and padding at its end, whatever it holds, change nothing that is fitted."""
    from shortstack.pruning.repair.fitted import _fitted_tokens
    from shortstack.pruning.repair.options import RepairOptions

    ids = torch.tensor([[0, 5, 0, 6, 0, 0], [7, 8, 9, 4, 5, 6], [3, 3, 3, 3, 3, 3]])
    checkpoint = open_checkpoint(cut()[0])
    found, first = _fitted_tokens(ids, 2, checkpoint, RepairOptions())
    assert first.int().tolist() == [[1] + [0] * 5, [1] + [0] * 5, [0] * 6]
    assert found.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0] * 6]
    (found,) = _fitted_tokens(ids, 2, checkpoint, RepairOptions(first_token=False))
    assert found.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0] * 6]
    (found,) = _fitted_tokens(ids, 2, checkpoint, RepairOptions(first_token=True, padding=True))
    assert found.int().tolist() == [[1] * 6, [1] * 6, [0] * 6]


def test_prune_and_repair_in_one_command(
    built: Built, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(built("llama"))
    given: Any = {"data": str(rows), "samples": 80, "seq_len": 16, "dtype": "float32", "quiet": True}
    result = prune(dense, blocks="2,3", out=tmp_path / "one", repair="auto", verify=True, **given)
    prune(dense, blocks="2,3", out=tmp_path / "pruned", quiet=True)
    two = repaired((str(tmp_path / "pruned"), dense), tmp_path / "two", rows)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    assert result.repaired is not None
    assert result.repaired["ppl"] == two.ppl
    assert f"and {two.tensors} repaired: its logits are others" in (result.verified or "")
    record = json.loads((tmp_path / "one/shortstack.json").read_text())
    assert [step["stage"] for step in record["steps"]] == ["prune", "repair"]
    assert str(tmp_path / "one") == record["steps"][1]["source"]
    hashes = {name: file_sha256(tmp_path / "one" / name) for name in record["files"]}
    assert hashes == record["files"] == result.files
    assert run(["check", str(tmp_path / "one"), "--quick"]) == 0
    capsys.readouterr()
    shown = result.to_text().splitlines()
    assert any(line.startswith("cut") and line.endswith("chosen") for line in shown)
    assert any(line.startswith("repaired ") for line in shown)


@pytest.mark.fault(125)
def test_prune_refuses_a_repair_before_it_copies(
    built: Built, tiny_model: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ShortstackError, match="cannot be folded into falcon_mamba"):
        prune(
            str(tiny_model("falcon_mamba")), blocks="2", out=tmp_path / "out", repair="auto", data=str(rows), quiet=True
        )
    with pytest.raises(UsageError, match="--save-every"):
        prune(str(built("llama")), blocks="2", out=tmp_path / "out", repair="auto", save_every=3.0, quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_share_that_is_back() -> None:
    ppl = {"dense": math.exp(2), "pruned": math.exp(4), "repaired": math.exp(2.5), "unfolded": math.exp(2.4)}
    result = RepairResult(Path("o"), "p", "d", [], ppl, 3, {}, {}, 1.0)
    assert result.share_back == pytest.approx(0.75)
    assert "75% of the lost log-perplexity is recovered" in result.to_text()
    assert "in the weights the repair gives 12.18 instead of 11.02" in result.to_text()
    assert RepairResult(Path("o"), "p", "d", [], {**ppl, "pruned": 1.0}, 3, {}, {}, 1.0).share_back is None


@pytest.mark.fault(128)
def test_a_repair_that_does_harm_is_named() -> None:
    """A method that was requested is applied at every cut, also where it is worse than none."""
    ppl = {"dense": 10.0, "pruned": 20.0, "repaired": 30.0, "unfolded": 30.0}
    places = [
        {"where": "block 12", "method": "linear", "ppl": {"none": 20.0, "linear": 40.0}},
        {"where": "block 17", "method": "linear", "ppl": {"none": 40.0, "linear": 30.0}},
    ]
    text = RepairResult(Path("o"), "p", "d", places, ppl, 3, {}, {}, 1.0).to_text()
    assert "the repaired model is worse than the pruned one" in text
    assert "worse: block 12 (20 without it, 40 with it); the repair `auto` leaves them out" in text
    assert "is back" not in text


def test_on_the_command_line(
    cut: Callable[..., Any], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned, dense = cut()
    options = ["--data", str(rows), "--samples", "80", "--seq-len", "16", "--quiet"]
    full = ["--method", "full", "--out", str(tmp_path / "full")]
    assert run(["repair", pruned, "--of", dense, *options, *full]) == 0
    assert "unconstrained" in capsys.readouterr().out
    assert run(["repair", pruned, "--of", dense, *options, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[1:])) <= 80
    assert run(["--json", "repair", pruned, "--of", dense, *options, "--out", str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out)["ppl"].keys() == {"dense", "pruned", "repaired", "unfolded"}
