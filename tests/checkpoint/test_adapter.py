"""Adapters trained on the dense model, carried over a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.checkpoint.adapter import check_blocks
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.prune import prune
from tests.kills import recorded_hashes

Built = Callable[..., Path]
NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def adapter(folder: Path, *, blocks: range = range(6), pickled: bool = False, **config: Any) -> Path:
    """What PEFT writes: LoRA of rank 2 on the query projections."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        NAME.format(index, side): torch.randn(shape, generator=generator)
        for index in blocks
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config})
    )
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_blocks_are_renumbered_and_removed_ones_dropped(built: Built, tmp_path: Path, pickled: bool) -> None:
    given = adapter(
        tmp_path / "a", pickled=pickled, layers_to_transform=[0, 1, 2, 3, 4, 5],
        rank_pattern={"model.layers.1.self_attn.q_proj": 4, "model.layers.4.self_attn.q_proj": 8},
    )  # fmt: skip
    result = prune(str(built("llama")), out=tmp_path / "p", blocks="1,3", adapter=given, quiet=True)
    assert result.files == recorded_hashes(tmp_path / "p")
    before = torch.load(given / "adapter_model.bin") if pickled else load_file(given / "adapter_model.safetensors")
    after = load_file(tmp_path / "p/adapter/adapter_model.safetensors")
    assert len(after) == 8
    for new, old in enumerate((0, 2, 4, 5)):
        assert torch.equal(after[NAME.format(new, "A")], before[NAME.format(old, "A")])
    config = json.loads((tmp_path / "p/adapter/adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 1, 2, 3]
    assert config["rank_pattern"] == {"model.layers.2.self_attn.q_proj": 8}
    assert config["base_model_name_or_path"] == str(tmp_path / "p")


def test_a_pattern_that_holds_block_numbers_becomes_names(built: Built, tmp_path: Path) -> None:
    """What it meant is what there are tensors for."""
    given = adapter(tmp_path / "a", target_modules=r".*layers\.(0|1|2|3|4|5)\.self_attn\.q_proj")
    prune(str(built("llama")), out=tmp_path / "p", blocks="1,3", adapter=given, quiet=True)
    config = json.loads((tmp_path / "p/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{index}.self_attn.q_proj" for index in range(4)]


@pytest.mark.parametrize(
    ("key", "given", "written"),
    [
        ("target_modules", ["3.self_attn.q_proj", "1.self_attn.q_proj"], ["layers.2.self_attn.q_proj"]),
        ("exclude_modules", ["3.self_attn.k_proj", "up_proj"], ["layers.2.self_attn.k_proj", "up_proj"]),
        ("rank_pattern", {r"5\.self_attn\.q_proj": 4, "4.mlp": 2}, {r"layers.3\.self_attn\.q_proj": 4}),
        ("alpha_pattern", {"3.w1": 4, "q_proj": 2}, {"3.w1": 4, "q_proj": 2}),  # of an expert: no block has that
    ],
)
def test_ends_of_names_that_begin_with_a_block_number_are_renumbered(
    built: Built, tmp_path: Path, key: str, given: Any, written: Any
) -> None:
    """PEFT compares them with the ends of module names; `3.` would be another block afterwards."""
    of_dense = adapter(tmp_path / "a", **{key: given})
    prune(str(built("llama")), out=tmp_path / "p", blocks="1,4", adapter=of_dense, quiet=True)
    assert json.loads((tmp_path / "p/adapter/adapter_config.json").read_text())[key] == written


def test_no_list_of_blocks_becomes_empty(built: Built, tmp_path: Path) -> None:
    """PEFT would read it as all blocks; something is left of the adapter, which is on the embedding too."""
    given = adapter(tmp_path / "a", blocks=range(1, 2), layers_to_transform=[1])
    tensors = load_file(given / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 8)
    save_file(tensors, given / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match=r"every block of layers_to_transform is removed \(1\)"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", adapter=given, quiet=True)


@pytest.mark.parametrize("named", ["meta/llama", "a folder of links"])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [2, 3]])
def test_part_of_an_unknown_model_is_refused_by_a_pruned_one(
    built: Built, tmp_path: Path, named: str, layers: list[int]
) -> None:
    """Its numbers exist here, and may mean other blocks."""
    pruned, links = tmp_path / "pruned", tmp_path / "links"
    prune(str(built("llama")), out=pruned, blocks="1,4", quiet=True)
    links.mkdir()
    for file in built("llama").iterdir():
        (links / file.name).symlink_to(file)
    base = str(links) if named == "a folder of links" else named
    blocks = range(layers[0], layers[-1] + 1)
    given = adapter(tmp_path / "a", blocks=blocks, layers_to_transform=layers, base_model_name_or_path=base)
    why = "cannot be read" if named == "a folder of links" else "is not known here"
    with pytest.raises(ShortstackError, match=rf"was trained on {base}, which {why}") as refused:
        check_blocks(given, open_checkpoint(pruned), Progress())
    assert f"shortstack prune {built('llama')} --blocks 1,4 --adapter {given}" in refused.value.hint
    assert f"of {pruned}: write that as base_model_name_or_path" in refused.value.hint
    if named == "a folder of links":
        with pytest.raises(ShortstackError, match="renumbered"):
            check_blocks(given, open_checkpoint(pruned, allow_links=True), Progress())
    check_blocks(
        adapter(pruned / "adapter", base_model_name_or_path="moved", blocks=blocks), open_checkpoint(pruned), Progress()
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layers_to_transform": [0, 1, 2, 3]}, "adapter_config.json names no base"),
        ({"base_model_name_or_path": "me/pruned"}, "its base me/pruned is not known here"),
    ],
)
def test_whose_numbers_are_taken_is_reported(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], says: str
) -> None:
    prune(str(built("llama")), out=tmp_path / "pruned", blocks="1,4", quiet=True)
    given = adapter(tmp_path / "a", blocks=range(4), **config)
    check_blocks(given, open_checkpoint(tmp_path / "pruned"), Progress())
    said = capsys.readouterr().err
    assert f"{says}; its block numbers are taken as those of {tmp_path / 'pruned'}" in said


def test_it_computes_what_it_did_with_those_blocks_passed_over(built: Built, tmp_path: Path) -> None:
    """Merged by hand into both: the pruned model with its adapter, and the dense one with blocks bypassed."""
    from tests import oracle, pico

    given = adapter(tmp_path / "a")
    prune(str(built("llama")), out=tmp_path / "p", blocks="1,3", adapter=given, quiet=True)
    dense, pruned = pico.load(built("llama")), pico.load(tmp_path / "p")
    for model, weights in (
        (dense, load_file(given / "adapter_model.safetensors")),
        (pruned, load_file(tmp_path / "p/adapter/adapter_model.safetensors")),
    ):
        for index, block in enumerate(oracle.layers_of(model)):
            change = weights[NAME.format(index, "B")] @ weights[NAME.format(index, "A")]
            block.self_attn.q_proj.weight.data += 2.0 * change
    ids = torch.tensor(pico.windows(2, 12))
    with torch.no_grad():
        expected = oracle.bypassed(dense, {1, 3})(input_ids=ids, use_cache=False).logits
        assert torch.equal(pruned(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layer_replication": [[0, 3], [2, 6]]}, "layer_replication repeats blocks"),
        ({"exclude_modules": "model\\.layers\\.[0-2]\\..*k_proj"}, "may name blocks by number"),
        ({"blocks": range(4, 8)}, r"adapts block 6-7, which .* \(of 6 blocks\) lacks"),
        ({"blocks": range(1, 2)}, "all blocks that it adapts are removed"),
    ],
)
def test_what_cannot_be_carried_is_refused_and_nothing_is_written(
    built: Built, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    given = adapter(tmp_path / "a", **options)
    with pytest.raises(ShortstackError, match=says):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", adapter=given, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_is_no_adapter(built: Built, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ShortstackError, match=r"not an adapter \(no adapter_config.json\)"):
        prune(str(built("llama")), out=tmp_path / "p", blocks="1", adapter=tmp_path / "a", quiet=True)


def test_an_adapter_given_as_the_model_is_refused_with_the_hint_to_merge(tmp_path: Path) -> None:
    given = adapter(tmp_path / "a")
    with pytest.raises(ShortstackError, match="is an adapter") as caught:
        prune(str(given), out=tmp_path / "p", blocks="1", quiet=True)
    assert "merge it into its base model first" in caught.value.hint
