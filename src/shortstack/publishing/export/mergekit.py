"""A passthrough merge for mergekit that rebuilds a pruned checkpoint out of the dense model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import counted, named_blocks
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.publishing.export.removal import Removal, RemovalOptions, find_removal
from shortstack.runtime.atomic_output import check_new_file, write_file

_OPTIONS = RemovalOptions()


@dataclass(frozen=True, repr=False)
class MergekitExport(Shown):
    """A mergekit configuration that rebuilds a pruned checkpoint from the dense model.

    Attributes:
        out: The YAML file; None if none was requested.
        model: The dense model, which the merge reads.
        layer_ranges: The kept blocks as ranges [first, end) of positions in the dense model.
        yaml: The text of the configuration.
        says: What a user should know about the merge.
    """

    out: Path | None
    model: str
    layer_ranges: list[tuple[int, int]]
    yaml: str
    says: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {"schema": 1, **self.__dict__, "out": str(self.out) if self.out else None}

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        head = [self.yaml.rstrip()] if self.out is None else [
            f"{self.out}: {counted(len(self.layer_ranges), 'slice')} of {self.model}",
            f"mergekit-yaml {shlex.quote(str(self.out))} MERGED rebuilds the checkpoint",
        ]  # fmt: skip
        return "\n".join([*head, *self.says])


@stage
def export_mergekit(
    model: str,
    *,
    out: Path | None = None,
    force: bool = False,
    options: RemovalOptions = _OPTIONS,
) -> MergekitExport:
    """Write a passthrough merge for mergekit, which rebuilds a pruned checkpoint from the dense model.

    Args:
        model: A checkpoint that `shortstack prune` wrote, or a plan.json; with `plan`, the model that the plan is for.
        out: Write the merge to this YAML file. By default it is printed.
        force: Replace an existing file.
        options: where the removal is recorded, and the dense model is.

    Returns:
        The merge.

    Raises:
        ShortstackError: no block was removed, the weights were changed since, or the dense model is another one.
    """
    if out is not None:
        check_new_file(out, force=force)
    removal = find_removal(model, options)
    removal.refuse_more_than_blocks("a merge")
    says = _says(removal)
    text = merge_yaml(removal, says)
    if out is not None:
        write_file(Path(out), text.encode())
    return MergekitExport(Path(out) if out else None, _named(removal.dense)["path"], removal.runs, text, says)


def merge_yaml(removal: Removal, comments: list[str]) -> str:
    """The merge: a slice per run of adjacent blocks; tensors keep their dtype, as none is named."""
    import yaml

    dense = removal.dense
    slices = [
        {"sources": [{"model": {"model": _named(dense)}, "layer_range": [first, end]}]} for first, end in removal.runs
    ]
    head = [
        f"{named_blocks(removal.removed)} of {dense.depth} left out; layer_range counts blocks from 0, its end is excluded",
        *comments,
    ]
    body = yaml.safe_dump({"merge_method": "passthrough", "slices": slices}, sort_keys=False, allow_unicode=True)
    return "".join(f"# {_one_line(line)}\n" for line in head) + str(body)


def _named(dense: Checkpoint) -> dict[str, str]:
    """How mergekit finds the model: a path in full, or a hub id with its revision. In parts, as `+` and `@` in a name
    would be read as an adapter and a revision.
    """
    local = Path(dense.source).expanduser()
    if local.is_dir():
        return {"path": str(local.absolute())}
    if dense.source == "embedded":
        return {"path": str(dense.directory.absolute())}
    name, _, revision = dense.source.partition("@")
    revision = revision or dense.revision
    return {"path": name, **({"revision": revision} if revision else {})}


def _says(removal: Removal) -> list[str]:
    """What mergekit leaves undone: it copies the dense model's config, and sets only the number of blocks."""
    changed = removal.changed_entries()
    if not changed:
        return []
    return [
        f"mergekit sets the number of blocks in config.json alone; these entries change, too: {', '.join(sorted(changed))}. "
        "Copy the config.json that `shortstack prune` writes over the merged one"
    ]


def _one_line(text: str) -> str:
    return "".join(one if one.isprintable() else "_" for one in text)
