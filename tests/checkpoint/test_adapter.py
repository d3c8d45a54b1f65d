"""Adapters trained on the dense model, carried over a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortstack.errors import ShortstackError
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


def test_it_computes_what_it_did_with_those_blocks_passed_over(built: Built, tmp_path: Path) -> None:
    """Merged by hand into both: the pruned model with its adapter, and the dense one with blocks passed over."""
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
