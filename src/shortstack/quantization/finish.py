"""What llm-compressor wrote -> a checkpoint as shortstack writes them: tensors checked, all else the source's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shortstack.checkpoint.byte_copy import TensorCopy, read_through, same_bytes
from shortstack.checkpoint.config_file import repaired, with_dtype
from shortstack.checkpoint.headers import INDEX, TensorInfo, read_weights
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.publishing.model_card import write_beside_weights
from shortstack.quantization.layers import LayerChoice, kind_of

# What stands for a matrix once it is quantized: its values, and what they are multiplied with.
_VALUES = ("weight_packed", "weight")


def finish(
    checkpoint: Checkpoint, directory: Path, choice: LayerChoice, step: dict[str, Any], progress: Progress
) -> dict[str, str]:
    """Check the weights in `directory`, and put config, companions, card and record beside them.

    Args:
        checkpoint: what was quantized.
        directory: where llm-compressor has saved the result; other files than its weights are replaced.
        choice: what was to be quantized, and what was not.
        step: what was done, for shortstack.json.
        progress: where it is reported which files are left out.

    Returns:
        sha256 of every file, by name.

    Raises:
        ShortstackError: tensors are missing or left over, a dense one was changed, or a value is not finite.
    """
    quantization = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    tensors, shards = read_weights(directory)
    _check_names(checkpoint, tensors, choice)
    files = {}
    for shard in shards:
        files[shard.name], broken = read_through(shard, [t for t in tensors.values() if t.file == shard])
        if broken is not None:
            raise ShortstackError(f"{checkpoint.source}: {broken} is not finite once it is quantized")
    for path in directory.iterdir():
        if path not in shards and path.name != INDEX:
            path.unlink()
    config = json.loads(repaired(checkpoint.repair, "config.json", checkpoint.config_bytes))
    config = with_dtype(config, step["dtype"]) | {"quantization_config": quantization}
    return write_beside_weights(
        checkpoint,
        directory,
        config=config,
        step=step,
        files=files,
        progress=progress,
    )


def _check_names(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], choice: LayerChoice) -> None:
    """Every tensor of the source is there, quantized or as it was, and nothing else is."""
    base = checkpoint.anatomy.family.prefix.partition(".")[0] + "."  # which checkpoints of a bare base model lack
    left = {name.removeprefix(base): tensor for name, tensor in tensors.items()}
    for source in checkpoint.tensors.values():
        if not checkpoint.is_parameter(source.name):
            left.pop(source.name.removeprefix(base), None)
            continue
        name = source.name.removeprefix(base)
        if choice.group_size(kind_of(checkpoint, source) or "") is not None:
            _take_quantized(checkpoint, left, name.removesuffix("weight"))
        else:
            _check_dense(checkpoint, source, left.pop(name, None))
    if left:
        raise ShortstackError(f"{checkpoint.source}: llm-compressor wrote {next(iter(left))!r}, which the source lacks")


def _take_quantized(checkpoint: Checkpoint, left: dict[str, TensorInfo], layer: str) -> None:
    """Take away all tensors of a quantized layer but its bias."""
    parts = [name for name in left if name.startswith(layer) and name != f"{layer}bias"]
    kinds = {name.removeprefix(layer) for name in parts}
    if not kinds.intersection(_VALUES) or "weight_scale" not in kinds:
        raise ShortstackError(f"{checkpoint.source}: llm-compressor left {layer.rstrip('.')} without quantized weights")
    for name in parts:
        del left[name]


def _check_dense(checkpoint: Checkpoint, source: TensorInfo, written: TensorInfo | None) -> None:
    if written is None or written.shape != source.shape:
        raise ShortstackError(f"{checkpoint.source}: llm-compressor did not write {source.name!r} as it was")
    if written.dtype == source.dtype and not same_bytes(TensorCopy(source, ""), TensorCopy(written, "")):
        raise ShortstackError(f"{checkpoint.source}: llm-compressor changed {source.name!r}, which is not quantized")
