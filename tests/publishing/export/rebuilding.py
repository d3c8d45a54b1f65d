"""Rebuild a pruned checkpoint as other tools would, by what an export says and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import pico

Tensors = dict[str, torch.Tensor]


def by_merge(merge: Path, prefix: str, count: str, out: Path) -> Path:
    """What a passthrough merge makes: the blocks of every slice, one after another, and the dense model's other tensors."""
    record = yaml.safe_load(merge.read_text())
    assert record.keys() == {"merge_method", "slices"}
    assert record["merge_method"] == "passthrough"
    [models] = {json.dumps(source["model"]["model"]) for one in record["slices"] for source in one["sources"]}
    dense = Path(json.loads(models)["path"])
    assert dense.is_absolute()
    order: list[int] = []
    for one in record["slices"]:
        [source] = one["sources"]
        order += range(*source["layer_range"])
    return _written(dense, out, prefix, count, {old: new for new, old in enumerate(order)}, len(order))


def by_list(dense: Path, listed: str, prefix: str, count: str, out: Path) -> Path:
    """What llama-quantize makes of a list: those blocks left out, the others renumbered without gaps, their number set."""
    config = json.loads((dense / "config.json").read_text())
    removed = {int(part) for part in listed.split(",")}
    kept = [number for number in range(config[count]) if number not in removed]
    return _written(dense, out, prefix, count, {old: new for new, old in enumerate(kept)}, len(kept))


def _written(dense: Path, out: Path, prefix: str, count: str, place: dict[int, int], depth: int) -> Path:
    shutil.copytree(dense, out)
    tensors: Tensors = {}
    for file in dense.glob("*.safetensors"):
        tensors |= load_file(file)
        (out / file.name).unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    made: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)", name)
        if found is None:
            made[name] = tensor
        elif int(found[1]) in place:
            made[f"{prefix}{place[int(found[1])]}.{found[2]}"] = tensor
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, count: depth}))
    return out


def same_logits(one: Path, other: Path) -> bool:
    """Whether two checkpoints compute the same, bit for bit in float32."""
    ids = torch.tensor(pico.windows(2, 16))
    with torch.no_grad():
        first, second = (pico.load(path)(ids).logits for path in (one, other))
    return torch.equal(first, second)
