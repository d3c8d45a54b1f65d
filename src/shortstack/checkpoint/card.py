"""The model card (README.md) of a checkpoint that shortstack wrote."""

from __future__ import annotations

import re
from typing import Any

from shortstack.checkpoint.structure import ranges
from shortstack.records import nested


def model_card(record: dict[str, Any]) -> str:
    """Markdown with YAML front matter, from the record in shortstack.json."""
    import yaml

    source = str(record["source"])
    step = record["steps"][-1]
    removed = sorted(set(range(record["original_depth"])) - set(record["kept_blocks"]))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["shortstack", "depth-pruning"]}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        front["base_model"] = source
    calibration = nested(step, "why", "scores", "calibration", "source") or "none"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {_plain(source)} without {len(removed)} of its {record['original_depth']} Transformer blocks",
        "",
        f"Made by shortstack {step['versions'].get('shortstack', '')} by removing whole blocks from {_plain(source)};",
        "every tensor that is left has the bytes it had there.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {step['before']['parameters']} | {step['after']['parameters']} |",
        f"| bytes | {step['before']['bytes']} | {step['after']['bytes']} |",
        "",
        f"- blocks removed (numbered as in the original model): {ranges(removed) or 'none'}",
        f"- blocks kept: {ranges(record['kept_blocks'])}",
        f"- chosen by: {_plain(str(step['criterion']))}; calibration text: {_plain(str(calibration))}",
        "",
        "Nothing was trained after the removal: expect worse text than the original's until it is retrained, and evaluate",
        "it on your own task. `shortstack.json` holds the full record; the licence is the original model's.",
        "",
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text without what Markdown, HTML or a table would take as markup."""
    return re.sub(r"[\x00-\x1f\x7f|`<>\[\]*\\]", "_", text)
