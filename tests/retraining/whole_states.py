"""Hidden states as whole models have them, by transformers, and what a run over blocks logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shortstack.common.progress import Progress
from shortstack.data.loaders import open_dataset
from shortstack.data.tokenizer import load_tokenizer
from shortstack.families.open_model import open_checkpoint
from shortstack.retraining.losses import relative_distance
from tests import pico

MORE = {"tokens": "2K", "epochs": 2}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def block_lists(model: Any, depth: int) -> Any:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)


@contextmanager
def outputs(model: Any, depth: int) -> Iterator[list[torch.Tensor]]:
    """Within, what each block gives, in their order."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in block_lists(model, depth)]
    yield found
    for handle in handles:
        handle.remove()


def distances(pruned: Path, dense: Path, batches: list[dict[str, Any]], goals: list[int]) -> list[float]:
    """For each block of the pruned model how far its states are from the dense model's, both run whole, by transformers."""
    ours, theirs = pico.load(pruned), pico.load(dense)
    sums, tokens = [0.0] * len(goals), 0
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if "attention_mask" in given:
            given["position_ids"] = batch["position_ids"]
        real_BT = given.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad(), outputs(ours, len(goals)) as mine, outputs(theirs, max(goals)) as dense_states:
            ours(**given, use_cache=False)
            theirs(**given, use_cache=False)
        for position, goal in enumerate(goals):
            sums[position] += float(relative_distance(mine[position][real_BT], dense_states[goal - 1][real_BT]).sum())
        tokens += int(real_BT.sum())
    return [one / tokens for one in sums]


def validation(data: Path, model: Path, seq_len: int, count: int) -> list[dict[str, Any]]:
    checkpoint = open_checkpoint(model)
    dataset = open_dataset(
        str(data), load_tokenizer(checkpoint), seq_len=seq_len, isolated=data.suffix == ".json",
        progress=Progress(quiet=True), embedding_rows=checkpoint.embedding_rows,
    )  # fmt: skip
    return dataset.validation[:count]


def held_out_text(model: Path, folder: Path) -> list[dict[str, Any]]:
    from tests.retraining import material

    return validation(material.texts(folder / "again.jsonl"), model, 32, 3)
