"""Open a model for a stage: as `open_checkpoint`, and a family that is not in the table is probed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shortstack.checkpoint.anatomy import Family
from shortstack.checkpoint.reader import Checkpoint, read_checkpoint
from shortstack.checkpoint.tokenizer_files import chosen_tokenizer
from shortstack.common.keywords import said_in_python
from shortstack.common.phases import phase
from shortstack.common.progress import Progress
from shortstack.errors import ShortstackError
from shortstack.families.table import UnknownFamilyError, family_of


@said_in_python
def open_checkpoint(
    model: str | Path, *, allow_links: bool = False, family: Family | None = None, headers_only: bool = False
) -> Checkpoint:
    """Open a checkpoint by directory, hub id, or `embedded` (the small model in the package).

    Args:
        model: The checkpoint: a directory, a hub id such as `org/name@revision`, or `embedded`.
        allow_links: Follow symbolic links in the checkpoint that lead out of its directory.
        family: The row of its family, if the table has none (a probed family).
        headers_only: For a hub id that is not in the cache, read the headers on the hub, and download no weights.

    Returns:
        The checkpoint. No tensor is read.

    Raises:
        UnknownFamilyError: the table has no row for its `model_type`.
        ShortstackError: nothing is there, it is not a checkpoint that shortstack can read, or config and tensors
            disagree.
    """
    return _opened(model, allow_links=allow_links, family=family, headers_only=headers_only)


def _opened(model: str | Path, *, allow_links: bool, headers_only: bool, family: Family | None = None) -> Checkpoint:
    row = family_of if family is None else lambda config, place: family
    return read_checkpoint(model, row, allow_links=allow_links, headers_only=headers_only)


@phase("opening checkpoints")
def open_model(
    model: str,
    *,
    allow_links: bool = False,
    headers_only: bool = False,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a checkpoint by directory, hub id, or `embedded`, and report what a user should know about it.

    A family that the table does not know is built tiny and tried; it is accepted only if a pruned copy equals the
    original with those blocks bypassed.

    Args:
        model: which.
        allow_links: follow links that lead out of the directory.
        headers_only: of a hub id that is not in the cache, download no weights.
        tokenizer: a directory or hub id with the tokenizer to use in place of its own.
        progress: where lines are said.

    Raises:
        ShortstackError: nothing is there, it cannot be read, or its family cannot be shortened exactly.
    """
    progress = progress or Progress()
    try:
        checkpoint = _opened(model, allow_links=allow_links, headers_only=headers_only)
    except UnknownFamilyError as error:
        from shortstack.families.probe import probed_family

        family = probed_family(error.model_type, error.config, progress)
        checkpoint = _opened(model, allow_links=allow_links, family=family, headers_only=headers_only)
    for note in checkpoint.notes:
        progress.say(note)
    return checkpoint if tokenizer is None else replace(checkpoint, tokenizer=chosen_tokenizer(tokenizer))


def dense_of(checkpoint: Checkpoint, asked: str | None, progress: Progress) -> tuple[Checkpoint | None, str]:
    """(the dense model that a checkpoint was made from, or None; why it is not there, where it should be).

    Args:
        checkpoint: a pruned or retrained one, or any other.
        asked: which one the user says it is; by default the one that shortstack.json names, if it is local and
            still the same.
        progress: where lines are said.
    """
    record = checkpoint.provenance or {}
    source = asked or record.get("source")
    if source is None or (asked is None and not record.get("steps")):
        return None, ""
    if asked is None and source != "embedded" and not Path(source).is_dir():
        return None, f"the dense model ({source}) is not a local directory: name it with --dense MODEL"
    try:
        dense = open_model(source, allow_links=checkpoint.allow_links, progress=progress)
    except ShortstackError as error:
        return None, f"the dense model cannot be opened: {error.message}"
    if asked is None and dense.fingerprint != record.get("source_fingerprint"):
        return None, f"{source} is no longer what was pruned"
    return dense, ""


def check_pair(dense: Checkpoint, pruned: Checkpoint) -> None:
    """Refuse a dense model that the other was not pruned from.

    Raises:
        ShortstackError: the pruned checkpoint's history names another model, or there is none; or nothing was removed.
    """
    record = pruned.provenance
    if record is None:
        raise ShortstackError(
            f"{pruned.source}: has no shortstack.json, which records the blocks of {dense.source} that it keeps",
            hint="give a checkpoint that `shortstack prune` wrote",
        )
    known = {record.get("source_fingerprint"), *(step.get("fingerprint") for step in record["steps"])}
    same = dense.fingerprint in known | {pruned.fingerprint}
    if not same or not set(pruned.original_blocks) <= set(dense.original_blocks):
        raise ShortstackError(
            f"{dense.source}: is not the model that {pruned.source} was pruned from, which was {record['source']}",
            hint=f"--of {record['source']}",
        )
    if dense.depth == pruned.depth:
        raise ShortstackError(
            f"{pruned.source}: has all {dense.depth} blocks of {dense.source}; there is no cut to repair",
            hint="give a checkpoint from which blocks were removed",
        )
