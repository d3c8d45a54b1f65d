"""Scores in the published layout: for each criterion a folder with the order and the scores, sorted and unsorted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.csv_folder import file_name, write_csv
from shortstack.artifacts.scores import CriterionScores, Scores, criterion_folder

Rows = list[Sequence[Any]]


def write_scores_csv(scores: Scores, folder: Path, parameters_without: Sequence[int], prefix: str = "block.") -> None:
    """Write `folder/CRITERION_nN/` with block_order.csv and the tables of its scores.

    Of perplexities without each block: all_ppl_sorted.csv, all_ppl_unsorted.csv, and ppl_blockI_removed.csv of each. Of
    scores of tensors: block_score_sorted.csv, block_score_all.csv, block_score_detail.csv and weight_score.csv.

    Args:
        scores: of one checkpoint.
        folder: made where absent.
        parameters_without: parameters of the model without each block, as the published ppl table has them.
        prefix: what stands before a block's number in the names of its tensors.
    """
    windows = scores.calibration.get("samples", 0)
    left = dict(zip(scores.blocks, parameters_without, strict=True))
    source = file_name(str(scores.calibration.get("source", "calibration")))
    for name, found in scores.criteria.items():
        named = criterion_folder(name)
        target = folder / f"{named}_n{windows}"
        write_csv(target / "block_order.csv", [found.order])
        by_block = found.by_block()
        if by_block is None:
            continue
        if found.dense_ppl is not None:
            rows = {index: [index, repr(by_block[index]), windows, left[index]] for index in found.blocks}
            header = ["removed_block", f"{named}_{source}", "num_calib_data", "params"]
            _write_perplexities(target, named, header, rows, found)
        else:
            _write_block_scores(target, by_block, found, prefix)
        if found.sources:
            _write_sources(target, found)


def _write_perplexities(
    target: Path, named: str, header: Sequence[str], rows: dict[int, list[Any]], found: CriterionScores
) -> None:
    write_csv(target / f"all_{named}_unsorted.csv", [header, *rows.values()])
    write_csv(target / f"all_{named}_sorted.csv", [header, *(rows[index] for index in found.order)])
    for index, row in rows.items():
        write_csv(target / f"{named}_block{index}_removed.csv", [header, row])


def _write_block_scores(target: Path, by_block: dict[int, float], found: CriterionScores, prefix: str) -> None:
    """Each block's score, sorted and not; and those of its tensors, where the criterion scores them."""
    ranked: Rows = [
        [rank, f"{prefix}{index}", repr(by_block[index]), index] for rank, index in enumerate(found.order, start=1)
    ]
    write_csv(target / "block_score_sorted.csv", [["rank", "block_name", "block_score", "block_index"], *ranked])
    unsorted: Rows = [[f"{prefix}{index}", repr(by_block[index])] for index in found.blocks]
    write_csv(target / "block_score_all.csv", [["block_name", "block_score"], *unsorted])
    if not found.tensors:
        return
    detail: Rows = [[f"{prefix}{index}", *map(repr, own.values())] for index, own in found.tensors.items()]
    write_csv(target / "block_score_detail.csv", [["block_name", "all_weight_scores"], *detail])
    weights: Rows = [
        [f"{prefix}{index}.{tensor}", repr(value)]
        for index, own in found.tensors.items()
        for tensor, value in own.items()
    ]
    write_csv(target / "weight_score.csv", [["weight_name", "weight_score"], *weights])


def _write_sources(target: Path, found: CriterionScores) -> None:
    """Beside the published layout: a row per block and named source."""
    rows: Rows = [
        [block, source, repr(score), "" if one.stderr is None else repr(one.errors_by_block()[block])]
        for source, one in found.sources.items()
        for block, score in zip(one.blocks, one.scores, strict=True)
    ]
    write_csv(target / "sources.csv", [["block", "source", "score", "stderr"], *rows])
