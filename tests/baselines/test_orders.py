"""Published block orders: taken wherever scores are, and the parameters that are left are the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from shortstack.baselines.orders import open_scores, published_models
from shortstack.cli.app import run
from shortstack.errors import ShortstackError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan, plan_for

Built = Callable[..., Path]

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {"model_type": "gemma", "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True}
MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8}
# The published models' configs, as far as they say sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1-7b": LLAMA,
    "Llama-2-7b-hf": LLAMA,
    "vicuna-7b-v1.3": LLAMA,
    "vicuna-13b-v1.3": {**LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                        "num_attention_heads": 40},
    "Meta-Llama-3-8B": {**LLAMA, **MISTRAL, "vocab_size": 128256},
    "CatPPT-base": {**LLAMA, **MISTRAL, "model_type": "mistral"},
    "gemma-2b": {**GEMMA, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
                 "num_attention_heads": 8, "num_key_value_heads": 1},
    "gemma-7b": {**GEMMA, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
                 "num_attention_heads": 16, "num_key_value_heads": 16},
}  # fmt: skip


def hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of full size whose weights are a hole in the file: built on meta, 13 GB that take no disk."""
    config = dict(config)
    made = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float16)
    made.architectures = [type(model).__name__]
    made.save_pretrained(folder)
    header: dict[str, Any] = {}
    end = 0
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=True):
        assert id(parameter) not in seen
        seen.add(id(parameter))
        size = 2 * parameter.numel()
        header[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return folder


def test_every_published_model_is_here() -> None:
    assert set(CONFIGS) == set(published_models())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_that_are_left_are_the_published_ones(name: str, tmp_path: Path, shared: Path) -> None:
    published = json.loads((shared / "published/block_orders.json").read_text())["entries"]
    model = open_checkpoint(str(hollow(tmp_path, CONFIGS[name])))
    entries = [entry for entry in published if entry["model"].removesuffix("_yesBOS") == name]
    assert entries
    for entry in entries:
        assert model.parameters() == entry["total_params"]
        assert set(model.block_parameters()) == {entry["params_per_block"]}
        for removed, expected in entry["pruned_sets"].items():
            made = plan_for(
                model, scores=Path(f"published:{name}:{entry['criterion']}"), remove=int(removed), plus=True
            ).plan
            assert made.after["parameters"] == expected["params"]
            assert list(made.removed) == expected["with_plus"]
            bare = plan_for(
                model, scores=Path(f"published:{name}:{entry['criterion']}"), remove=int(removed), plus=False
            ).plan
            assert list(bare.removed) == expected["without_plus"]
            assert round(made.removal_ratio, 5) == pytest.approx(expected["param_ratio_removed"], abs=1e-5)


def test_the_package_holds_what_was_published(shared: Path) -> None:
    for entry in json.loads((shared / "published/block_orders.json").read_text())["entries"]:
        name = entry["model"].removesuffix("_yesBOS")
        found = open_scores(f"published:{name}:{entry['criterion']}").criterion()
        assert list(found.order) == entry["order_least_important_first"]
        assert list(found.scores) == [float(score) for score in entry["scores_by_block_index"]]
        assert published_models()[name]["hub_id"] == entry["hf_id"]


@pytest.fixture
def model(built: Built) -> Path:
    return built("llama", num_hidden_layers=32, hidden_size=8, head_dim=4, num_attention_heads=2)


def test_pruned_without_scoring(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    assert (
        run(["prune", str(model), "--scores", "published:vicuna-7b-v1.3:ppl", "--remove", "6", "--out", str(out)]) == 0
    )
    record = json.loads((out / "shortstack.json").read_text())["steps"][0]
    assert record["removed_blocks"] == [10, 11, 20, 24, 25, 27]
    assert record["why"]["scores"]["source"] == "published:vicuna-7b-v1.3:ppl"
    assert record["why"]["scores"]["calibration"]["seed"] == 1234


def test_names_in_every_form(model: Path) -> None:
    orders = {
        open_scores(f"published:{name}:ppl").criterion().order
        for name in ("vicuna-7b-v1.3", "Vicuna-7B-v1.3", "lmsys/vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.3@main")
    }
    assert len(orders) == 1


def test_the_model_may_be_left_out_where_the_checkpoint_says_it(model: Path, tmp_path: Path) -> None:
    import dataclasses

    checkpoint = dataclasses.replace(open_checkpoint(str(model)), source="lmsys/vicuna-7b-v1.3@main")
    named = plan_for(open_checkpoint(str(model)), scores=Path("published:vicuna-7b-v1.3:taylor"), remove=6).plan
    assert plan_for(checkpoint, scores=Path("published:taylor"), remove=6).plan.removed == named.removed
    with pytest.raises(ShortstackError, match="does not record which published model it is") as caught:
        plan(str(model), scores=Path("published:taylor"), remove=6)
    assert "published:MODEL:taylor" in caught.value.hint


def test_the_history_of_a_checkpoint_says_it_too(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    checkpoint.__dict__["provenance"] = {"source": "lmsys/vicuna-7b-v1.3"}
    assert open_scores("published:ppl", checkpoint).source == "published:vicuna-7b-v1.3:ppl"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        (
            "published:vicuna-7b:ppl",
            "there is no published order of a model 'vicuna-7b'",
            "did you mean vicuna-7b-v1.3?",
        ),
        ("published:vicuna-7b-v1.3:taylo", "no order of vicuna-7b-v1.3 by 'taylo'", "did you mean taylor?"),
        ("published:gemma-2b:magnitude", "no order of gemma-2b by 'magnitude'", "known: ppl, taylor"),
    ],
)
def test_unknown_names(name: str, message: str, hint: str, model: Path) -> None:
    with pytest.raises(ShortstackError, match=message) as caught:
        plan(str(model), scores=Path(name), remove=6)
    assert hint in caught.value.hint


def test_an_order_of_another_depth_is_refused(built: Built) -> None:
    with pytest.raises(ShortstackError, match=r"scores for blocks 0-31, but .* has blocks 0-5"):
        plan(str(built("llama")), scores=Path("published:vicuna-7b-v1.3:ppl"), remove=2)


def test_hollow_files_are_what_they_claim(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = hollow(tmp_path, CONFIGS["llama-1-7b"])
    try:
        with safe_open(path / "model.safetensors", "pt") as stream:
            assert len(list(stream.keys())) == 32 * 9 + 3
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(str(error))
    assert (path / "model.safetensors").stat().st_blocks * 512 < 10_000_000
