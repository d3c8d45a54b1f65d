"""Trained weights -> a plain checkpoint: names, types and everything beside the weights as the input has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from shortstack.artifacts.provenance import FILE_NAME
from shortstack.checkpoint.byte_copy import read_through, write_hashed
from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.extra_files import continued_record, copy_companions
from shortstack.checkpoint.headers import read_weights
from shortstack.checkpoint.reader import Checkpoint
from shortstack.engine.load import load_with_transformers, quiet_transformers
from shortstack.errors import ShortstackError
from shortstack.publishing.model_card import model_card
from shortstack.runtime.atomic_output import write_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_LARGEST_SHARD = "5GB"


def stored_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The whole model on the CPU, by default in its own precision (float32 where its tensors have several).

    Raises:
        ShortstackError: transformers cannot load it, or would invent weights.
    """
    stored = {tensor.dtype for tensor in checkpoint.tensors.values() if checkpoint.is_parameter(tensor.name)}
    own = DTYPES.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32
    model, info = load_with_transformers(checkpoint, dtype=dtype or own, trust_remote_code=trust_remote_code)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ShortstackError(f"{checkpoint.source}: the weights lack {missing[0]!r}, which would be random")
    return model


def write_checkpoint(
    checkpoint: Checkpoint, model: Any, directory: Path, step: dict[str, Any], *, save_dtype: str | None = None
) -> None:
    """Write a model as a plain checkpoint, with what goes along and the record of how it came about.

    Args:
        checkpoint: what the model was loaded from: its config, names, types and other files.
        model: with new values in some of its parameters.
        directory: an empty one (a stage).
        step: what was done, for shortstack.json.
        save_dtype: what every tensor is stored in; by default each as it was.

    Raises:
        ShortstackError: a value is not finite in the type it is stored in, or transformers wrote other tensors than the
            input has.
    """
    _cast(checkpoint, model, save_dtype)
    # Published ones hold settings (vicuna's temperature without sampling) that transformers refuses to write again.
    model.generation_config = GenerationConfig()
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size=_LARGEST_SHARD)
    for written in (*directory.glob("*.jinja"), directory / "generation_config.json"):
        written.unlink(missing_ok=True)  # the input's own is copied
    _as_usual(directory)
    files = _check_written(checkpoint, directory, save_dtype)
    tie_undone = checkpoint.tied and not getattr(model.config, "tie_word_embeddings", True)
    config = _untied(checkpoint) if tie_undone else dict(checkpoint.config)
    if save_dtype is not None:
        config = _with_dtype(config, save_dtype)
    data = checkpoint.config_bytes if config == checkpoint.config else config_text(config).encode()
    files["config.json"] = write_hashed(directory / "config.json", data)
    files |= copy_companions(checkpoint, directory)
    record = continued_record(checkpoint, step, checkpoint.original_blocks, files)
    files["README.md"] = write_hashed(directory / "README.md", model_card(record).encode())
    write_json(directory / FILE_NAME, {**record, "files": dict(sorted(files.items()))})


def write_adapter(model: Any, directory: Path) -> None:
    """PEFT's own form of an adapter, without its card of blanks."""
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    _as_usual(directory)


def _as_usual(directory: Path) -> None:
    """Give files the rights that a new file has here; libraries that write by a temporary file leave 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o644 & ~mask)


def _cast(checkpoint: Checkpoint, model: Any, save_dtype: str | None) -> None:
    """Each parameter into the type it is stored in; tied ones stay one."""
    main = checkpoint.tensors[checkpoint.anatomy.embedding].dtype
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            known = checkpoint.tensors.get(name)
            dtype = save_dtype or (known.dtype if known is not None else main)
            parameter.data = parameter.data.to(DTYPES.get(dtype, torch.float32))


def _check_written(checkpoint: Checkpoint, directory: Path, save_dtype: str | None) -> dict[str, str]:
    """Read what was written back, once: names, shapes and values are checked; gives the sha256 of every weight file."""
    tensors, shards = read_weights(directory)
    expected = {t.name: t.shape for t in checkpoint.tensors.values() if checkpoint.is_parameter(t.name)}
    found = {name: tensor.shape for name, tensor in tensors.items() if not checkpoint.is_repeated_head(name)}
    # Checkpoints of a bare base model lack the outermost name; what is written has it.
    base = checkpoint.anatomy.family.prefix.partition(".")[0] + "."
    same = expected == found or {name.removeprefix(base): shape for name, shape in found.items()} == {
        name.removeprefix(base): shape for name, shape in expected.items()
    }
    if not same:
        odd = sorted({*expected.items()} ^ {*found.items()})[0][0]
        raise ShortstackError(
            f"{checkpoint.source}: transformers writes other tensors than it read ({odd}); nothing was published"
        )
    files = {}
    for shard in shards:
        files[shard.name], broken = read_through(shard, [t for t in tensors.values() if t.file == shard])
        if broken is not None:
            raise ShortstackError(
                f"{checkpoint.source}: {broken} is not finite once it is stored"
                f"{f' in {save_dtype}' if save_dtype else ''}",
                hint="--save-dtype bfloat16 has the range of float32",
            )
    return files


def _untied(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of a checkpoint whose head has become a tensor of its own."""
    config, nested = dict(checkpoint.config), checkpoint.anatomy.family.nested
    config["tie_word_embeddings"] = False
    if nested in config:
        config[nested] = {**config[nested], "tie_word_embeddings": False}
    return config


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another stored type, in whichever entries say it."""
    edited = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    for key in ("dtype", "torch_dtype"):
        if key in config:
            edited[key] = dtype
    return edited
