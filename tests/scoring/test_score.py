"""Scores against the naive oracle: streamed and resident, one file and shards, tied and untied."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortstack.artifacts.scores import Scores, load_scores
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.plan import plan
from shortstack.scoring.score import score
from tests import oracle, pico
from tests.scoring.material import ALL, assert_equals_oracle, scored

Built = Callable[..., Path]


@pytest.mark.parametrize("memory", ["streamed", "resident"])
@pytest.mark.parametrize(
    "options",
    [{}, {"shard_bytes": 40_000}, {"tie_word_embeddings": True}, {"attention_bias": True}],
    ids=["one-file", "shards", "tied", "biases"],
)
def test_equals_the_oracle(built: Built, options: dict[str, Any], memory: Any) -> None:
    model = built("llama", **options)
    windows = pico.windows()
    assert_equals_oracle(scored(model, windows, memory=memory), model, windows)


@pytest.mark.parametrize("model_name", ["stories260k", "babyllama105"])
@pytest.mark.parametrize("bos_every", [False, True])
def test_real_models_equal_the_oracle(shared: Path, model_name: str, bos_every: bool) -> None:
    from shortstack.data.calibration import draw_windows
    from shortstack.data.sources import read_corpus
    from shortstack.data.tokenizer import load_tokenizer

    model = shared / "data/models" / model_name
    tokenizer = load_tokenizer(open_checkpoint(model))
    corpus = read_corpus(str(shared / "data/text/tinystories/tinystories.txt"), role="calibration")
    windows = draw_windows(corpus, tokenizer, samples=6, seq_len=96, bos_every=bos_every).windows
    assert all((window[0] == 1) for window in windows) or not bos_every
    assert_equals_oracle(scored(model, windows, memory="streamed"), model, windows)


@pytest.mark.parametrize("windows_count", [1, 3, 200])
def test_any_number_of_windows(built: Built, windows_count: int) -> None:
    """Fewer windows than are run at a time, and more: parts of streams and streams together."""
    model = built("llama", num_hidden_layers=4)
    windows = pico.windows(windows_count, 16)
    found = scored(model, windows, "ppl")
    assert found.criteria["ppl"].scores == pytest.approx(oracle.ppl_without_each(model, windows), rel=1e-5)
    assert (found.criteria["ppl"].stderr is None) == (windows_count == 1)


def test_standard_error_is_that_of_the_paired_difference(built: Built) -> None:
    model, windows = built("llama"), pico.windows(5)
    with torch.no_grad():
        dense = oracle.mean_nll(pico.load(model), windows)
        without = oracle.mean_nll(oracle.bypassed(pico.load(model), {2}), windows)
    expected = float((without - dense).std(correction=1) / 5**0.5)
    stderr = scored(model, windows, "ppl").criteria["ppl"].stderr
    assert stderr is not None
    assert stderr[2] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_taylor_parameters(built: Built, power: int, batch: int | None) -> None:
    model, windows = built("llama"), pico.windows()
    name = f"taylor:p={power}" + (f",batch={batch}" if batch else "")
    found = scored(model, windows, name).criteria[name]
    expected = oracle.taylor(model, windows, power=power, batch=batch)
    assert found.scores == pytest.approx([sum(block.values()) for block in expected], rel=1e-4)


def test_batches_of_one_give_the_published_multiple(built: Built) -> None:
    """Ten batches of one window: S is ten times that of one batch of ten, and the order is the same."""
    model, windows = built("llama"), pico.windows(10)
    found = scored(model, windows, "taylor,taylor:batch=1")
    one, ten = found.criteria["taylor"], found.criteria["taylor:batch=1"]
    assert ten.scores == pytest.approx([10 * value for value in one.scores], rel=1e-5)
    assert ten.order == one.order


@pytest.mark.parametrize("reduction", ["mean", "max", "prod"])
def test_reductions_follow_the_definition(built: Built, reduction: str) -> None:
    """A matrix is summed over its input dimension first, then reduced over output rows; then tensors within the block."""
    model = built("llama")
    name = f"magnitude:weight={reduction},block={reduction}"
    found = scored(model, pico.windows(1), name).criteria[name]
    reduce = {"mean": torch.mean, "max": torch.max, "prod": torch.prod}[reduction]
    with torch.no_grad():
        for index, block in enumerate(oracle.layers_of(pico.load(model))):
            values = []
            for parameter in oracle.scored(block).values():
                rows = parameter.abs().double().sum(dim=1) if parameter.ndim == 2 else parameter.abs().double()
                values.append(reduce(rows))
            assert found.scores[index] == pytest.approx(float(reduce(torch.stack(values))), rel=1e-5)


def test_conv1d_rows_are_outputs(built: Built) -> None:
    """GPT-2 keeps matrices as [input, output]: the input dimension is the first."""
    model, name = built("gpt2"), "magnitude:weight=max"
    found = scored(model, pico.windows(1), name).criteria[name].tensors[0]
    weight = oracle.scored(oracle.layers_of(pico.load(model))[0])["attn.c_attn.weight"].detach()
    assert found["attn.c_attn.weight"] == pytest.approx(float(weight.abs().double().sum(dim=0).max()), rel=1e-6)


def test_gradients_are_accumulated_before_absolute_values(built: Built) -> None:
    """Windows run in several parts give what one part gives: |a + b| and not |a| + |b|."""
    model, windows = built("llama"), pico.windows(100, 32)  # 3200 tokens: five parts of 640
    found = scored(model, windows, "taylor").criteria["taylor"].scores
    expected = [sum(block.values()) for block in oracle.taylor(model, windows)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_bfloat16_checkpoint_computed_in_float32(built: Built) -> None:
    model, windows = built("llama", dtype=torch.bfloat16), pico.windows()
    found = scored(model, windows, memory="streamed", dtype="float32")
    assert found.settings["dtype"] == "float32"
    assert_equals_oracle(found, model, windows)


@pytest.mark.fault(91)
def test_same_scores_every_time(built: Built) -> None:
    first, second = (scored(built("llama"), pico.windows(), memory="streamed") for _ in range(2))
    for name in first.criteria:
        assert first.criteria[name].scores == second.criteria[name].scores


def test_scores_of_a_pruned_model_carry_original_indices(built: Built, tmp_path: Path) -> None:
    from shortstack.pruning.prune import prune

    pruned = tmp_path / "pruned"
    prune(str(built("llama")), out=pruned, blocks="1,3", quiet=True)
    found = scored(pruned, pico.windows(), "ppl")
    assert found.blocks == (0, 2, 4, 5)
    assert sorted(found.criteria["ppl"].order) == [0, 2, 4, 5]


@pytest.mark.fault(64)
def test_not_finite_is_an_error(copied: Built) -> None:
    from safetensors.torch import load_file, save_file

    model = copied("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortstackError, match="not finite"):
        scored(model, pico.windows(), "ppl")


def test_stage_reads_rows_and_writes_files(built: Built, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to draw windows from. " * 40)
    found = score(
        str(built("llama")),
        criterion=ALL,
        data=str(text),
        samples=3,
        seq_len=16,
        out=tmp_path / "s.json",
        csv=tmp_path / "csv",
    )
    from shortstack.artifacts.scores import load_scores

    again = load_scores(tmp_path / "s.json")
    assert again.to_json() == found.to_json()
    order = (tmp_path / "csv/ppl_n3/block_order.csv").read_text().strip()
    assert order == ",".join(map(str, found.criteria["ppl"].order))
    tables = {
        str(path.relative_to(tmp_path / "csv")): list(csv.reader(path.read_text().splitlines()))
        for path in (tmp_path / "csv").rglob("*.csv")
    }
    check_perplexities(tables, found)
    for criterion in ("taylor", "magnitude"):
        check_tensors(tables, criterion, found)


Tables = dict[str, list[list[str]]]


def check_perplexities(tables: Tables, found: Scores) -> None:
    """Sorted, unsorted, and a table for each block; with the parameters that are left."""
    ppl = found.criteria["ppl"]
    header, *unsorted = tables["ppl_n3/all_ppl_unsorted.csv"]
    assert header == ["removed_block", "ppl_text.txt", "num_calib_data", "params"]
    assert [(int(row[0]), float(row[1]), row[2]) for row in unsorted] == [
        (index, value, "3") for index, value in zip(ppl.blocks, ppl.scores, strict=True)
    ]
    assert len({row[3] for row in unsorted}) == 1, "blocks of one size leave as much each"
    assert int(unsorted[0][3]) > 0
    assert tables["ppl_n3/all_ppl_sorted.csv"] == [header, *sorted(unsorted, key=lambda row: float(row[1]))]
    for row in unsorted:
        assert tables[f"ppl_n3/ppl_block{row[0]}_removed.csv"] == [header, row]


def check_tensors(tables: Tables, criterion: str, found: Scores) -> None:
    """Per tensor, per block with all its tensors, and per block, sorted and not: each adds up to the next."""
    (name,) = [one for one in found.criteria if one.startswith(criterion)]
    folder = f"{name.replace(':', '-').replace('=', '-').replace(',', '-')}_n3"
    by_block = found.criteria[name].by_block()
    assert by_block is not None
    weights, detail = tables[f"{folder}/weight_score.csv"], tables[f"{folder}/block_score_detail.csv"]
    unsorted, ranked = tables[f"{folder}/block_score_all.csv"], tables[f"{folder}/block_score_sorted.csv"]
    assert (weights[0], detail[0]) == (["weight_name", "weight_score"], ["block_name", "all_weight_scores"])
    assert (unsorted[0], ranked[0]) == (
        ["block_name", "block_score"], ["rank", "block_name", "block_score", "block_index"]
    )  # fmt: skip
    assert {row[0]: float(row[1]) for row in unsorted[1:]} == {
        f"model.layers.{index}": value for index, value in by_block.items()
    }
    assert [(int(row[0]), int(row[3])) for row in ranked[1:]] == list(enumerate(found.criteria[name].order, start=1))
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"} <= {
        row[0] for row in weights
    }
    for block, *values in detail[1:]:
        own = [float(row[1]) for row in weights if row[0].startswith(f"{block}.")]
        assert [float(value) for value in values] == own
        if "block" not in name:
            assert sum(own) == pytest.approx(by_block[int(block.rpartition(".")[2])], rel=1e-9)


def test_window_longer_than_positions(built: Built) -> None:
    with pytest.raises(ShortstackError, match="windows of 65 tokens.*64 positions"):
        scored(built("llama"), pico.windows(2, 65), "ppl")


@pytest.mark.fault(39)
def test_token_without_embedding(built: Built) -> None:
    with pytest.raises(ShortstackError, match="token id 260.*260 rows"):
        scored(built("llama"), [[1, 2, 260]], "ppl")


def test_streamed_holds_no_more_than_two_blocks(built: Built) -> None:
    """After a sweep no block holds a weight; while it runs, one block at a time does."""
    from shortstack.engine.block_model import Skeleton
    from shortstack.engine.block_weights import BlockWeights

    checkpoint = open_checkpoint(built("llama"))
    skeleton = Skeleton(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    with BlockWeights(skeleton, resident=False) as weights:
        for index, _ in weights.each(range(6)):
            full = [i for i, block in enumerate(skeleton.blocks) if not any(p.is_meta for p in block.parameters())]
            assert full == [index]
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters())


@pytest.mark.parametrize("options", [{}, {"stream_bytes": 2 * 4 * 16 * 32 * 4}, {"memory": "resident"}])
def test_some_blocks_alone(built: Built, options: dict[str, Any], tmp_path: Path) -> None:
    """Scores of some blocks are those that all blocks together give; the others have null, and stay in a plan."""
    model, windows = built("llama"), pico.windows()
    everything, some = scored(model, windows), scored(model, windows, candidates=(1, 3, 4), **options)
    for name, found in some.criteria.items():
        whole = everything.criteria[name].by_block() or {}
        assert found.by_block() == pytest.approx({block: whole[block] for block in (1, 3, 4)}, rel=1e-6)
    assert some.criteria["ppl"].dense_ppl == pytest.approx(everything.criteria["ppl"].dense_ppl)
    some.save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())["criteria"]["ppl"]
    assert [value is None for value in written["scores"]] == [index not in (1, 3, 4) for index in range(6)]
    again = load_scores(tmp_path / "s.json")
    assert again.criteria == some.criteria
    assert "not scored: 0, 2, 5" in again.to_text()
    made = plan(str(model), scores=tmp_path / "s.json", criterion="ppl", remove=3, plus=False)
    assert made.removed == (1, 3, 4)
    with pytest.raises(ShortstackError, match="only 3 of 6 are removable .*not scored: 0, 2, 5"):
        plan(str(model), scores=tmp_path / "s.json", criterion="ppl", remove=4, plus=False)
    run = plan(str(model), scores=tmp_path / "s.json", criterion="taylor", remove=2, plus=False, strategy="contiguous")
    assert run.removed == (3, 4)


def test_blocks_that_are_not_there(built: Built, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no block 6, only 0-5"):
        score(str(built("llama")), blocks="2,6", criterion="magnitude")
    with pytest.raises(UsageError, match="block_order.csv names every block"):
        score(str(built("llama")), blocks="2", criterion="magnitude", csv=tmp_path)
    found = score(str(built("llama")), blocks="2,4-5", criterion="magnitude")
    assert found.criteria["magnitude"].blocks == (2, 4, 5)


@pytest.mark.parametrize("more", [{}, {"until": "stable", "remove": 1}])
def test_no_windows_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ShortstackError, match="0 windows of 128 tokens: expected at least 1 window"):
        score("embedded", samples=0, quiet=True, **more)
