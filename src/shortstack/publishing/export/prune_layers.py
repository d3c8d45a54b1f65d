"""The list of blocks for `llama-quantize --prune-layers`, which takes them out of a GGUF file of the dense model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.common.json_text import json_text
from shortstack.common.options import stage
from shortstack.common.shown import Shown
from shortstack.errors import ShortstackError
from shortstack.publishing.export.removal import Removal, RemovalOptions, find_removal
from shortstack.runtime.atomic_output import check_new_file, write_file

_OPTIONS = RemovalOptions()
_INSTEAD = "shortstack export gguf of the pruned checkpoint"


@dataclass(frozen=True, repr=False)
class PruneLayersExport(Shown):
    """The list of blocks for `llama-quantize --prune-layers`.

    Attributes:
        out: The file with the list; None if none was requested.
        model: The dense model. The list is for a GGUF file that was converted from it.
        layers: The numbers of the blocks to remove, counted from 0 as in the tensor names of the file (`blk.0.`).
        depth: The number of blocks of the dense model.
    """

    out: Path | None
    model: str
    layers: tuple[int, ...]
    depth: int

    @property
    def listed(self) -> str:
        """The value of the option, such as `3,7`."""
        return ",".join(map(str, self.layers))

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "schema": 1, "out": str(self.out) if self.out else None, "model": self.model, "layers": list(self.layers),
            "depth": self.depth,
        }  # fmt: skip

    def to_text(self) -> str:
        """What a person reads on the terminal."""
        given = self.listed if self.out is None else f"$(cat {shlex.quote(str(self.out))})"
        return "\n".join(
            [
                self.listed,
                f"{len(self.layers)} of the {self.depth} blocks of {self.model}, for a GGUF file of it:",
                f"llama-quantize --prune-layers {given} DENSE.gguf PRUNED.gguf TYPE",
            ]
        )


@stage
def export_prune_layers(
    model: str,
    *,
    out: Path | None = None,
    force: bool = False,
    options: RemovalOptions = _OPTIONS,
) -> PruneLayersExport:
    """List the removed blocks for `llama-quantize --prune-layers`, which removes them from the dense model's GGUF file.

    Args:
        model: A checkpoint that `shortstack prune` wrote, or a plan.json; with `plan`, the model that the plan is for.
        out: Write the list to this file, on one line. By default it is printed.
        force: Replace an existing file.
        options: where the removal is recorded, and the dense model is.

    Returns:
        The list.

    Raises:
        ShortstackError: no block was removed, the weights were changed since, the dense model is another one, or more than
            the number of blocks would have to change in the file.
    """
    if out is not None:
        check_new_file(out, force=force)
    removal = find_removal(model, options)
    _refuse_other_changes(removal)
    found = PruneLayersExport(Path(out) if out else None, removal.dense.source, removal.removed, removal.dense.depth)
    if out is not None:
        write_file(Path(out), (found.listed + "\n").encode())
    return found


def _refuse_other_changes(removal: Removal) -> None:
    """Refuse what llama-quantize cannot do: it takes out blocks, renumbers the others and sets their number, no more.

    Lists with one value per block stay as they are in the file, or llama.cpp works them out by a rule of its own: what is
    left must then be what the first blocks of the dense model were.
    """
    removal.refuse_more_than_blocks("llama-quantize")
    dense, kept = removal.dense, removal.cut.kept
    lists = dense.per_block_lists
    for name, values in lists.items():
        if [values[index] for index in kept] != values[: len(kept)]:
            raise ShortstackError(
                f"{dense.source}: its blocks are not all alike ({name}), and llama-quantize would give what is left the "
                "properties of the first blocks",
                hint=_INSTEAD,
            )
    for name, (before, after) in removal.changed_entries().items():
        if name not in lists:
            raise ShortstackError(
                f"{dense.source}: {name} would have to change from {json_text(before)[:80]} to {json_text(after)[:80]}, and "
                "llama-quantize sets only the number of blocks",
                hint=_INSTEAD,
            )
