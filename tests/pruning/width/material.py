"""What tests of width pruning share: a call, and the dense model with the same heads and channels masked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shortstack.families.open_model import open_checkpoint
from shortstack.pruning.width.prune_width import WidthResult, prune_width
from tests.families import tiny


def narrow(model: Path, out: Path, rows: Path, **options: Any) -> WidthResult:
    given = {"data": str(rows), "samples": 4, "quiet": True, "dtype": "float32", **options}
    return prune_width(str(model), out=out, **given)


def masked(model: Any, source: Path, record: dict[str, Any]) -> Any:
    """The dense model with the heads and channels zero that the record says are gone: written anew, on modules alone."""
    blocks = tiny.blocks_of(model, open_checkpoint(source))
    with torch.no_grad():
        for number, gone in record["removed"].items():
            attention, mlp = blocks[int(number)].self_attn, blocks[int(number)].mlp
            for head in numbers(gone["heads"]):
                columns = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                attention.o_proj.weight[:, columns] = 0
            mlp.down_proj.weight[:, numbers(gone["channels"])] = 0
    return model


def numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in filter(None, text.split(", ")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def step_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "shortstack.json").read_text())["steps"][-1]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.WINDOWS, use_cache=False).logits
