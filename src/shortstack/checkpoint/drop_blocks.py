"""A checkpoint without some of its blocks: its config and its list of tensors. Nothing is read or written here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.anatomy import MTP_COUNTS, Anatomy, Config, TensorEdits, reading_rules
from shortstack.checkpoint.byte_copy import TensorCopy
from shortstack.checkpoint.headers import TensorInfo
from shortstack.checkpoint.renumber_names import Renumbering, moved_names, renumbered, renumbered_quantization
from shortstack.common.formatting import ranges
from shortstack.common.json_text import json_text
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    from shortstack.checkpoint.reader import Checkpoint

# Entries of config.json that are lists about multi-token-prediction blocks, which go with them.
_MTP_LISTS = ("mtp_layers_block_type", "mtp_hybrid_override_pattern", "mtp_local_layer_ids", "mtp_layer_types")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Cut:
    """A checkpoint without some of its blocks: all that writing, verifying and exporting it need to know.

    It is worked out once, when the plan is made or a plan from a file is opened with its checkpoint, and handed on.

    Attributes:
        kept: positions, in the checkpoint, of the blocks that stay, rising.
        config: config.json of the result.
        tensors: every tensor of the result: which bytes of the checkpoint it has, its name and shape; in the order of the
            checkpoint's bytes.
    """

    kept: tuple[int, ...]
    config: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorCopy, ...] = field(repr=False)

    def is_whole(self, depth: int) -> bool:
        """Whether nothing of a checkpoint of this depth is left out."""
        return len(self.kept) == depth and all(copy.sliced is None for copy in self.tensors)


def cut_blocks(checkpoint: Checkpoint, kept: Sequence[int]) -> Cut:
    """The checkpoint without all blocks but those at the positions `kept`.

    Raises:
        ShortstackError: this set of blocks cannot be removed exactly from this checkpoint.
    """
    return Cut(tuple(kept), shortened_config(checkpoint, kept), tuple(shortened_tensors(checkpoint, kept)))


def shortened_config(checkpoint: Checkpoint, kept: Sequence[int]) -> dict[str, Any]:
    """The config of the checkpoint that keeps the blocks at positions `kept`: a copy of the raw one, edited.

    Raises:
        ShortstackError: this set of blocks cannot be removed exactly from this checkpoint.
    """
    config, anatomy, place = checkpoint.config, checkpoint.anatomy, checkpoint.source
    family, depth = anatomy.family, anatomy.depth
    edited = dict(config)
    if checkpoint.repair is not None:
        edited |= checkpoint.repair.edits.get("config.json", {})
    removed = sorted(set(range(depth)) - set(kept))
    if not removed:
        return edited
    reason = reason_against(checkpoint, kept)
    if reason:
        raise ShortstackError(
            f"{place}: removing block {ranges(removed)} is not exact: {reason}", hint="choose other blocks"
        )
    edited.pop("auto_map", None)  # code is not copied, and the family's own class computes the same
    inner = edited
    if family.text(config) is not config:
        edited[family.nested] = inner = dict(family.text(config))
    with reading_rules(place, family):
        _edit_entries(inner, checkpoint, kept)
    if "quantization_config" in config:
        edited["quantization_config"] = renumbered_quantization(config["quantization_config"], anatomy, kept, place)
    return _with_names_moved(edited, Renumbering(anatomy, kept, f"{place}: config.json"))


def _with_names_moved(config: dict[str, Any], names: Renumbering) -> dict[str, Any]:
    """The config with block names renumbered in the entries of other tools, such as `quantization` of MLX."""
    moved: dict[str, Any] = {}
    for key, value in config.items():
        entry = {key: value}
        is_other = key != "quantization_config" and names.names_a_block(entry)
        moved |= moved_names(entry, names) if is_other else entry
    return moved


def reason_against(checkpoint: Checkpoint, kept: Sequence[int]) -> str | None:
    """Why keeping just these positions is not exact, or None where it is."""
    family, depth = checkpoint.anatomy.family, checkpoint.depth
    removed = sorted(set(range(depth)) - set(kept))
    if family.refusal is None or not removed:
        return None
    with reading_rules(checkpoint.source, family):
        return family.refusal(checkpoint.text_config, depth, removed, checkpoint.tensors.keys())


def _edit_entries(edited: dict[str, Any], checkpoint: Checkpoint, kept: Sequence[int]) -> None:
    """Counts, lists, block numbers and rules of the language model's own config, in place."""
    anatomy, text = checkpoint.anatomy, checkpoint.text_config
    family = anatomy.family
    given = set(edited)
    _edit_counts(edited, text, anatomy, kept)
    for keys, base in ((family.numbers, 0), (family.numbers_from_1, 1)):
        for key in keys:
            if isinstance(edited.get(key), list):
                edited[key] = renumbered(edited[key], kept, base)
    if isinstance(edited.get("per_layer_config"), dict):
        edited["per_layer_config"] = _rekeyed(edited["per_layer_config"], kept)
    if family.rewrite is not None:
        edited |= family.rewrite(text, anatomy.depth, kept)
    for key, values in checkpoint.per_block_lists.items():
        shorter = [values[index] for index in kept]
        # A list that the config only implied is needed unless the rule, applied to what is left, says the same.
        implied = family.implied(edited, len(kept)).get(key) if family.implied and key not in given else None
        if implied != shorter:
            edited[key] = shorter


def _edit_counts(edited: dict[str, Any], text: Config, anatomy: Anatomy, kept: Sequence[int]) -> None:
    """How many blocks there are, and of how many of the first or last ones something holds."""
    family, depth = anatomy.family, anatomy.depth
    for key in family.counts:
        if key in edited:
            edited[key] = len(kept)
    for key, default in family.leading.items():
        if key in edited or default:
            edited[key] = sum(index < _whole(text.get(key), default) for index in kept)
    for key, default in family.trailing.items():
        if key in edited or default:
            edited[key] = sum(index >= depth - _whole(text.get(key), default) for index in kept)
    for key in MTP_COUNTS:
        if isinstance(edited.get(key), int):
            edited[key] = 0
    for key in _MTP_LISTS:
        edited.pop(key, None)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def _rekeyed(entries: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A dict by block number (a string, possibly padded with zeros)."""
    place = {old: new for new, old in enumerate(kept)}
    width = max((len(key) for key in entries if key.startswith("0") and len(key) > 1), default=0)
    by_number = {int(key): value for key, value in entries.items() if _NUMBER.fullmatch(key)}
    rest = {key: value for key, value in entries.items() if not _NUMBER.fullmatch(key)}
    moved = {str(place[old]).zfill(width): value for old, value in sorted(by_number.items()) if old in place}
    return {**moved, **rest}


def shortened_tensors(checkpoint: Checkpoint, kept: Sequence[int]) -> list[TensorCopy]:
    """Every tensor of the checkpoint that keeps the blocks at positions `kept`, in the order of the source's bytes.

    A head that shares its bytes with the embedding (in a `.bin` file) is written once, as safetensors has it.
    """
    anatomy = checkpoint.anatomy
    place = {old: new for new, old in enumerate(kept)}
    embedding = checkpoint.tensors[anatomy.embedding]
    tensors = [
        tensor
        for tensor in checkpoint.tensors.values()
        if not (checkpoint.is_repeated_head(tensor.name) and _where(tensor) == _where(embedding))
    ]
    if len(kept) == anatomy.depth:
        return [TensorCopy(tensor, tensor.name) for tensor in tensors]
    rule = anatomy.family.tensors
    edits = TensorEdits()
    if rule is not None:
        with reading_rules(checkpoint.source, anatomy.family):
            edits = rule(checkpoint.text_config, anatomy.prefix, anatomy.depth, checkpoint.tensors, kept)
    copies = []
    for tensor in tensors:
        block = anatomy.block_of(tensor.name)
        if tensor.name in edits.renamed:
            copies.append(TensorCopy(tensor, edits.renamed[tensor.name]))
        elif tensor.name in edits.dropped or anatomy.predicts_further(tensor.name):
            continue
        elif tensor.name in edits.sliced:
            copies.append(TensorCopy(tensor, tensor.name, edits.sliced[tensor.name]))
        elif block is None:
            copies.append(TensorCopy(tensor, tensor.name))
        elif block in place:
            copies.append(TensorCopy(tensor, anatomy.block_name(place[block], anatomy.within_block(tensor.name))))
    copies += [TensorCopy(like, name, zeros=True) for name, like in edits.zeros.items()]
    return copies


def _where(tensor: TensorInfo) -> tuple[Path, int]:
    return tensor.file, tensor.start


def dropped_further_prediction(checkpoint: Checkpoint) -> str:
    """A line that says that multi-token-prediction blocks do not come along, or nothing."""
    names = [name for name in checkpoint.tensors if checkpoint.anatomy.predicts_further(name)]
    if not names:
        return ""
    return (
        f"multi-token-prediction weights are left out ({len(names)} tensors, such as {json_text(names[0])}): "
        "they were trained on the dense model's last hidden states"
    )
