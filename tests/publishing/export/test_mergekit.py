"""`shortstack export mergekit`: the merge rebuilds what `prune` writes; mergekit itself where it is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import shortstack
from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.pruning.plan import plan
from shortstack.pruning.prune import prune
from shortstack.publishing.export.mergekit import export_mergekit
from tests.engines import environment_of, ran
from tests.families import tiny
from tests.publishing.export.rebuilding import by_merge, same_logits

Built = Callable[..., Path]
PREFIX, COUNT = {"llama": "model.layers.", "gpt2": "transformer.h."}, {"llama": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("blocks", ["0", "5", "1,4", "0,2-3,5", "1-5"])
def test_it_rebuilds_the_pruned_checkpoint(family: str, blocks: str, built: Built, tmp_path: Path) -> None:
    pruned = tmp_path / "p"
    prune(str(built(family)), out=pruned, blocks=blocks, quiet=True)
    found = export_mergekit(str(pruned), out=tmp_path / "m.yaml", quiet=True)
    assert found.says == []
    rebuilt = by_merge(tmp_path / "m.yaml", PREFIX[family], COUNT[family], tmp_path / "rebuilt")
    assert same_logits(rebuilt, pruned)
    assert not same_logits(rebuilt, built(family))


def test_shards_and_what_was_pruned_twice(built: Built, tmp_path: Path) -> None:
    """Numbers in the record are those of the original model, which is what the merge reads."""
    dense = built(shard_bytes=60_000)
    prune(str(dense), out=tmp_path / "once", blocks="1", quiet=True)
    prune(str(tmp_path / "once"), out=tmp_path / "twice", blocks="3", quiet=True)
    found = export_mergekit(str(tmp_path / "twice"), out=tmp_path / "m.yaml", quiet=True)
    assert found.layer_ranges == [(0, 1), (2, 3), (4, 6)]
    rebuilt = by_merge(tmp_path / "m.yaml", PREFIX["llama"], COUNT["llama"], tmp_path / "rebuilt")
    assert same_logits(rebuilt, tmp_path / "twice")


@pytest.mark.parametrize("alone", [True, False], ids=["the plan alone", "with its model"])
def test_a_plan_of_a_pruned_model(alone: bool, built: Built, tmp_path: Path) -> None:
    """The plan has the original model's numbers; the merge reads a model without block 1."""
    prune(str(built()), out=tmp_path / "once", blocks="1", quiet=True)
    made = tmp_path / "plan.json"
    plan(str(tmp_path / "once"), blocks="3", out=made)
    prune(str(tmp_path / "once"), out=tmp_path / "twice", plan=made, quiet=True)
    if alone:
        found = export_mergekit(str(made), out=tmp_path / "m.yaml", quiet=True)
    else:
        found = export_mergekit(str(tmp_path / "once"), plan=made, out=tmp_path / "m.yaml", quiet=True)
    assert found.layer_ranges == [(0, 2), (3, 5)]
    rebuilt = by_merge(tmp_path / "m.yaml", PREFIX["llama"], COUNT["llama"], tmp_path / "rebuilt")
    assert same_logits(rebuilt, tmp_path / "twice")


def test_what_else_changes_in_the_config_is_reported(built: Built, tmp_path: Path) -> None:
    pruned = tmp_path / "p"
    prune(str(built("qwen2")), out=pruned, blocks="0", quiet=True)
    found = export_mergekit(str(pruned), out=tmp_path / "m.yaml", quiet=True)
    [line] = found.says
    assert "layer_types" in line
    assert line in (tmp_path / "m.yaml").read_text()
    rebuilt = by_merge(tmp_path / "m.yaml", "model.layers.", "num_hidden_layers", tmp_path / "rebuilt")
    shutil.copy(pruned / "config.json", rebuilt)  # as the line says
    assert same_logits(rebuilt, pruned)


def test_names_that_mergekit_would_split(built: Built, tmp_path: Path) -> None:
    """`+` stands before an adapter there, `@` before a revision: the path is given apart."""
    dense = Path(shutil.copytree(built(), tmp_path / "a+b@c"))
    prune(str(dense), out=tmp_path / "p", blocks="1", quiet=True)
    found = export_mergekit(str(tmp_path / "p"), quiet=True)
    record = yaml.safe_load(found.yaml)
    assert {one["sources"][0]["model"]["model"]["path"] for one in record["slices"]} == {str(dense)}


def test_printed_or_written(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(str(built()), out=tmp_path / "p", blocks="1", quiet=True)
    assert run(["export", "mergekit", str(tmp_path / "p")]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["merge_method"] == "passthrough"
    out = tmp_path / "m y.yaml"
    assert run(["export", "mergekit", str(tmp_path / "p"), "--out", str(out), "--json"]) == 0
    assert out.read_text().startswith("# block 1 of 6 left out")
    assert json.loads(capsys.readouterr().out)["layer_ranges"] == [[0, 1], [2, 6]]
    assert run(["export", "mergekit", str(tmp_path / "p"), "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(["export", "mergekit", str(tmp_path / "p"), "--out", str(out), "--force"]) == 0
    assert f"mergekit-yaml '{out}' MERGED" in capsys.readouterr().out  # a command that can be pasted
    assert shortstack.export_mergekit(str(tmp_path / "p")).yaml == out.read_text()  # type: ignore[attr-defined]


@pytest.mark.engine
def test_mergekit_itself(built: Built, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    program = environment_of("mergekit") / "bin/mergekit-yaml"
    prune(str(built()), out=tmp_path / "p", blocks="0,2-3", quiet=True)
    export_mergekit(str(tmp_path / "p"), out=tmp_path / "m.yaml", quiet=True)
    ran(program, tmp_path / "m.yaml", tmp_path / "merged")
    merged: dict[str, object] = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    expected = load_file(tmp_path / "p/model.safetensors")
    assert merged.keys() == expected.keys()
    assert same_logits(tmp_path / "merged", tmp_path / "p")


@pytest.mark.parametrize("export", ["mergekit", "prune-layers"])
class TestRefusals:
    def refused(self, export: str, *arguments: str) -> str:
        function = {"mergekit": "export_mergekit", "prune-layers": "export_prune_layers"}[export]
        keywords = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        with pytest.raises(ShortstackError) as raised:
            getattr(shortstack, function)(arguments[0], quiet=True, **keywords)
        assert raised.value.hint
        return raised.value.message

    def test_a_dense_model(self, export: str, built: Built, tmp_path: Path) -> None:
        assert "records no removed block" in self.refused(export, str(built()))
        prune(str(built()), out=tmp_path / "p", blocks="1", quiet=True)
        plan(str(tmp_path / "p"), blocks="2", out=tmp_path / "plan.json")
        record = json.loads((tmp_path / "plan.json").read_text())
        record["kept"], record["removed"] = sorted([*record["kept"], 2]), []
        (tmp_path / "plan.json").write_text(json.dumps(record))
        assert "removes no block" in self.refused(export, str(tmp_path / "plan.json"))

    def test_more_than_leaving_out_blocks(self, export: str, tmp_path: Path) -> None:
        """A table of Gemma 3n has columns of every block: it is cut, which these tools cannot do."""
        dense = tiny.build(tmp_path / "dense", "gemma3n_text")
        removed = next(blocks for blocks in tiny.sets_of("gemma3n_text") if blocks)
        prune(str(dense), out=tmp_path / "p", blocks=",".join(map(str, removed)), quiet=True)
        assert "removes only whole blocks" in self.refused(export, str(tmp_path / "p"))

    @pytest.mark.fault(123)
    def test_weights_that_were_changed_since(self, export: str, built: Built, tmp_path: Path) -> None:
        prune(str(built()), out=tmp_path / "p", blocks="1", quiet=True)
        path = tmp_path / "p/shortstack.json"
        record = json.loads(path.read_text())
        record["steps"].append({"stage": "retrain", "method": "lora"})
        path.write_text(json.dumps(record))
        assert "no longer those of" in self.refused(export, str(tmp_path / "p"))

    def test_a_dense_model_that_is_gone_or_another(self, export: str, built: Built, tmp_path: Path) -> None:
        dense = Path(shutil.copytree(built(), tmp_path / "dense"))
        prune(str(dense), out=tmp_path / "p", blocks="1", quiet=True)
        plan(str(dense), blocks="1", out=tmp_path / "plan.json")
        dense.rename(tmp_path / "moved")
        for model in ("p", "plan.json"):
            assert "the dense model cannot be opened" in self.refused(export, str(tmp_path / model))
            getattr(shortstack, f"export_{export.replace('-', '_')}")(
                str(tmp_path / model), dense=str(tmp_path / "moved"), quiet=True
            )
        other = str(built(seed=5))
        assert "is not the model that" in self.refused(export, str(tmp_path / "p"), "dense", other)
        assert "is not the model that" in self.refused(export, other, "plan", str(tmp_path / "plan.json"))
        said = self.refused(export, other, "plan", str(tmp_path / "plan.json"), "dense", other)
        assert "no effect with plan" in said
