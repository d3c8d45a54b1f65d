"""Which blocks of which dense model a pruned checkpoint, or a plan, leaves out: in positions of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.artifacts.plan import PrunePlan, load_plan
from shortstack.checkpoint.drop_blocks import Cut, cut_blocks
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.formatting import ranges
from shortstack.common.options import Options
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError, UsageError
from shortstack.families.open_model import open_model

_RULES = {
    "auto_map",
    "quantization_config",
}  # entries that pruning edits, and that say nothing about blocks by position


@dataclass(frozen=True)
class Removal:
    """A dense model, and the blocks that are left out of it.

    Attributes:
        dense: the model that blocks are removed from; of a hub id, its headers may be all that is here.
        cut: what is left of it.
    """

    dense: Checkpoint
    cut: Cut

    @property
    def removed(self) -> tuple[int, ...]:
        """Positions of the blocks that are removed, in the dense model, rising."""
        kept = set(self.cut.kept)
        return tuple(index for index in range(self.dense.depth) if index not in kept)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The kept blocks as ranges [first, end) of adjacent positions in the dense model."""
        runs: list[tuple[int, int]] = []
        for index in self.cut.kept:
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs

    def changed_entries(self) -> dict[str, tuple[Any, Any]]:
        """Entries of the config, besides the number of blocks, that are other ones once the blocks are gone: name -> (dense,
        pruned); None for one that is not there.
        """
        family = self.dense.anatomy.family
        before, after = family.text(self.dense.config), family.text(self.cut.config)
        names = [name for name in {**before, **after} if name not in _RULES and name not in family.counts]
        return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}

    def refuse_more_than_blocks(self, tool: str) -> None:
        """Refuse a removal that is more than leaving out tensors of whole blocks and renumbering the others.

        Args:
            tool: what cannot do more, for the error.

        Raises:
            ShortstackError: a tensor would be cut, renamed or added.
        """
        anatomy = self.dense.anatomy
        place = {old: new for new, old in enumerate(self.cut.kept)}
        for copy in self.cut.tensors:
            block = anatomy.block_of(copy.source.name)
            plain = copy.source.name
            if block is not None:
                plain = anatomy.block_name(place.get(block, -1), anatomy.within_block(plain))
            if copy.sliced is not None or copy.zeros or copy.name != plain:
                raise ShortstackError(
                    f"{self.dense.source}: without these blocks {copy.name} is another tensor, and {tool} removes "
                    "only whole blocks",
                    hint="use the checkpoint that `shortstack prune` writes",
                )


@dataclass(frozen=True)
class RemovalOptions(Options):
    """Where the removed blocks are recorded, and where the dense model is.

    Attributes:
        plan: A plan.json of `shortstack plan`.
        dense: The dense model, if it is no longer at the path in shortstack.json or in the plan.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.
        quiet: Show no progress on stderr.
    """

    plan: Path | None = None
    dense: str | None = None
    allow_links: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.plan is not None and self.dense is not None:
            raise UsageError("--dense: no effect with --plan, where MODEL is the dense model", hint="leave it out")


def find_removal(model: str, options: RemovalOptions) -> Removal:
    """The removal that a pruned checkpoint, or a plan, records.

    Args:
        model: a checkpoint that `prune` wrote, or a plan.json; with a plan among the options, the model that it is for.
        options: where else to look.

    Raises:
        ShortstackError: nothing was removed, more than pruning was done, or the dense model is not there or another one.
    """
    plan, dense, allow_links = options.plan, options.dense, options.allow_links
    progress = Progress(quiet=options.quiet)

    def opened(name: str, hint: str) -> Checkpoint:
        try:
            return open_model(name, allow_links=allow_links, headers_only=True, progress=progress)
        except ShortstackError as error:
            raise ShortstackError(f"the dense model cannot be opened: {error.message}", hint=hint) from error

    if plan is not None:
        made = load_plan(plan)
        return _planned(
            made, open_model(model, allow_links=allow_links, headers_only=True, progress=progress), progress
        )
    if Path(model).is_file():
        made = load_plan(model)
        return _planned(made, opened(dense or made.source, "--dense MODEL names it"), progress)
    pruned = open_model(model, allow_links=allow_links, progress=progress)
    record = pruned.provenance
    if record is None or len(record["kept_blocks"]) == record["original_depth"]:
        raise ShortstackError(
            f"{model}: its shortstack.json records no removed block",
            hint="give a checkpoint that `shortstack prune` wrote, or a plan: --plan plan.json",
        )
    further = next((str(step.get("stage")) for step in record["steps"] if step.get("stage") != "prune"), None)
    if further is not None:
        raise ShortstackError(
            f"{model}: its weights are no longer those of {record['source']} (a step of it is: {further})",
            hint="give the checkpoint that `shortstack prune` wrote before, or its plan",
        )
    whole = opened(dense or str(record["source"]), "--dense MODEL names it")
    _check_same(whole, str(record.get("source_fingerprint")), f"{model} was pruned from", progress)
    return _without(whole, record["kept_blocks"])


def _planned(plan: PrunePlan, dense: Checkpoint, progress: Progress) -> Removal:
    _check_same(dense, plan.fingerprint, "the plan was made for", progress)
    if not plan.removed:
        raise ShortstackError(
            f"{dense.source}: the plan removes no block", hint="make a plan that removes at least one block"
        )
    return _without(dense, plan.kept)


def _without(dense: Checkpoint, kept: Sequence[int]) -> Removal:
    return Removal(dense, cut_blocks(dense, [dense.position_of(index) for index in kept]))


def _check_same(dense: Checkpoint, fingerprint: str, what: str, progress: Progress) -> None:
    """Refuse another model than the recorded one; where only headers are here, that is reported."""
    if not dense.is_here:
        progress.say(
            f"{dense.source}: its weights are not local, so it was not checked whether it is the model that {what}"
        )
    elif dense.fingerprint != fingerprint:
        raise ShortstackError(
            f"{dense.source}: is not the model that {what} (the fingerprints differ; it has blocks "
            f"{ranges(dense.original_blocks)})",
            hint="name the dense model with --dense MODEL; with --plan it is MODEL",
        )
