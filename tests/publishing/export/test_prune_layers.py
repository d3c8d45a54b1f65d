"""`shortstack export prune-layers`: the list names the blocks of the dense model's GGUF file that `prune` removes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import shortstack
from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.pruning.plan import plan
from shortstack.pruning.prune import prune
from shortstack.publishing.export.prune_layers import export_prune_layers
from tests.publishing.export.rebuilding import by_list, same_logits

Built = Callable[..., Path]


@pytest.mark.parametrize("blocks", ["0", "5", "1,4", "0,2-3,5", "1-5"])
def test_the_list_rebuilds_the_pruned_checkpoint(blocks: str, built: Built, tmp_path: Path) -> None:
    pruned = tmp_path / "p"
    prune(str(built()), out=pruned, blocks=blocks, quiet=True)
    listed = export_prune_layers(str(pruned), quiet=True).listed
    rebuilt = by_list(built(), listed, "model.layers.", "num_hidden_layers", tmp_path / "rebuilt")
    assert same_logits(rebuilt, pruned)


def test_numbers_are_places_in_the_file(built: Built, tmp_path: Path) -> None:
    """A GGUF file of a pruned model counts what is there; a checkpoint that was pruned twice, the original's blocks."""
    prune(str(built()), out=tmp_path / "once", blocks="1", quiet=True)
    made = plan(str(tmp_path / "once"), blocks="3", out=tmp_path / "plan.json")
    prune(str(tmp_path / "once"), out=tmp_path / "twice", plan=made, quiet=True)
    of_plan = export_prune_layers(str(tmp_path / "plan.json"), quiet=True)
    assert (of_plan.layers, of_plan.depth, of_plan.model) == ((2,), 5, str(tmp_path / "once"))
    of_checkpoint = export_prune_layers(str(tmp_path / "twice"), quiet=True)
    assert (of_checkpoint.layers, of_checkpoint.depth, of_checkpoint.model) == ((1, 3), 6, str(built()))
    for number, (model, listed) in enumerate([(tmp_path / "once", "2"), (built(), "1,3")]):
        rebuilt = by_list(model, listed, "model.layers.", "num_hidden_layers", tmp_path / f"rebuilt-{number}")
        assert same_logits(rebuilt, tmp_path / "twice")


def test_printed_or_written(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(str(built()), out=tmp_path / "p", blocks="1,3-4", quiet=True)
    assert run(["export", "prune-layers", str(tmp_path / "p")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "1,3,4"
    assert "--prune-layers 1,3,4 DENSE.gguf PRUNED.gguf TYPE" in shown[-1]
    out = tmp_path / "list.txt"
    assert run(["export", "prune-layers", str(tmp_path / "p"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [1, 3, 4]
    assert out.read_text() == "1,3,4\n"
    spaced = shortstack.export_prune_layers(str(tmp_path / "p"), out=tmp_path / "a list")  # type: ignore[attr-defined]
    assert f"$(cat '{tmp_path / 'a list'}')" in spaced.to_text()
    with pytest.raises(ShortstackError, match="exists already"):
        shortstack.export_prune_layers(str(tmp_path / "p"), out=out)  # type: ignore[attr-defined]


@pytest.mark.fault(122)
@pytest.mark.parametrize(("removed", "fits"), [("0-2", True), ("3-5", True), ("5", True), ("1", False), ("0", False)])
def test_blocks_of_several_kinds(removed: str, fits: bool, built: Built, tmp_path: Path) -> None:
    """llama-quantize leaves what a file says by block as it is: what is left must be like the first blocks."""
    out = tmp_path / "p"
    prune(str(built("gemma3_text")), out=out, blocks=removed, quiet=True)
    if fits:
        assert export_prune_layers(str(out), quiet=True).layers
        return
    with pytest.raises(ShortstackError, match="not all alike") as raised:
        export_prune_layers(str(out), quiet=True)
    assert "export gguf of the pruned checkpoint" in raised.value.hint


def test_an_entry_that_counts_blocks(built: Built, tmp_path: Path) -> None:
    prune(
        str(built("qwen2", use_sliding_window=False, sliding_window=None)), out=tmp_path / "p", blocks="0", quiet=True
    )
    found = export_prune_layers(str(tmp_path / "p"), quiet=True)
    assert found.layers == (0,)
