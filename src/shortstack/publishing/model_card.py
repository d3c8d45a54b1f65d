"""What goes beside the weights of a checkpoint that shortstack writes: its model card (README.md) and all the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts.provenance import FILE_NAME
from shortstack.checkpoint.byte_copy import write_hashed
from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.extra_files import continued_record, copy_companions
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import ranges
from shortstack.common.json_fields import nested
from shortstack.common.progress import Progress
from shortstack.runtime.atomic_output import write_json


def write_beside_weights(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    config: dict[str, Any],
    step: dict[str, Any],
    files: dict[str, str],
    kept: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write config.json, tokenizer and the like, the model card and shortstack.json of a new checkpoint.

    Args:
        checkpoint: what the new one was made of.
        directory: where its weights have been written.
        config: of the new one.
        step: what was done, for its history.
        files: sha256 of the files written so far, by name.
        kept: positions, in the checkpoint, of the blocks that stay; by default all.
        progress: where it is reported which files are left out.

    Returns:
        sha256 of every file but shortstack.json, which names them.
    """
    data = checkpoint.config_bytes if config == checkpoint.config else config_text(config).encode()
    files = {
        **files,
        "config.json": write_hashed(directory / "config.json", data),
        **copy_companions(checkpoint, directory, kept=kept, progress=progress),
    }
    blocks = checkpoint.original_blocks
    record = continued_record(checkpoint, step, blocks if kept is None else [blocks[index] for index in kept], files)
    files["README.md"] = write_hashed(directory / "README.md", model_card(record).encode())
    write_json(directory / FILE_NAME, {**record, "files": dict(sorted(files.items()))})
    return files


def model_card(record: dict[str, Any]) -> str:
    """Markdown with YAML front matter, from the record in shortstack.json."""
    import yaml

    source = str(record["source"])
    steps = record["steps"]
    removed = sorted(set(range(record["original_depth"])) - set(record["kept_blocks"]))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["shortstack", "depth-pruning"]}
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        front["base_model"] = source
    stages = {step.get("stage") for step in steps}
    trained = bool(stages & {"retrain", "merge"})
    title = _plain(source)
    if removed:
        title += f" without {len(removed)} of its {record['original_depth']} Transformer blocks"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {title}{', retrained' * trained}{', quantized' * ('quantize' in stages)}",
        "",
        f"Made by shortstack {nested(steps[-1], 'versions', 'shortstack') or ''} from {_plain(source)}, in these steps:",
        "",
        *(_described(step) for step in steps),
        "",
        f"- blocks removed (numbered as in the original model): {ranges(removed) or 'none'}",
        f"- blocks kept: {ranges(record['kept_blocks'])}",
        "",
    ]
    if stages - {"prune"}:
        lines.append("Evaluate it on your own task: figures on one text say little about another.")
    else:
        lines.append(
            "Every tensor that is left has the bytes it had there. Nothing was trained after the removal: expect"
        )
        lines.append("worse text than the original's until it is retrained, and evaluate it on your own task.")
    return "\n".join([*lines, "`shortstack.json` holds the full record; the licence is the original model's.", ""])


def _described(step: dict[str, Any]) -> str:
    """One line about one step."""
    if step.get("stage") == "prune":
        calibration = nested(step, "why", "scores", "calibration", "source") or "none"
        before, after = nested(step, "before", "parameters"), nested(step, "after", "parameters")
        return (
            f"1. pruned from {before} to {after} parameters; chosen by: {_plain(str(step.get('criterion')))}, "
            f"calibration text: {_plain(str(calibration))}"
        )
    if step.get("stage") == "retrain":
        data = _plain(str(nested(step, "data", "source")))
        return (
            f"1. retrained ({step.get('method')}) for {step.get('steps')} steps, {step.get('tokens')} tokens of {data}"
        )
    if step.get("stage") == "quantize":
        calibration = step.get("calibration")
        text = (
            f", calibrated on {nested(calibration, 'samples')} windows of {nested(calibration, 'seq_len')} tokens of "
            f"{_plain(str(nested(calibration, 'source')))}"
        )
        return f"1. quantized to {_plain(str(step.get('scheme')))} ({step.get('method')}){text if calibration else ''}"
    return f"1. {_plain(str(step.get('stage')))}: an adapter was folded into the weights"


def _plain(text: str) -> str:
    """Text without what Markdown, HTML or a table would take as markup."""
    return re.sub(r"[\x00-\x1f\x7f|`<>\[\]*\\]", "_", text)
