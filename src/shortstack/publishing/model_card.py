"""What goes beside the weights of a checkpoint that shortstack writes: config, tokenizer and the like, card and record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortstack.artifacts import provenance
from shortstack.checkpoint.byte_copy import write_hashed
from shortstack.checkpoint.config_file import config_text
from shortstack.checkpoint.extra_files import continued_record, copy_companions
from shortstack.checkpoint.headers import checked_link
from shortstack.checkpoint.reader import Checkpoint
from shortstack.common.progress import Progress
from shortstack.publishing.card_figures import retraining_figures
from shortstack.publishing.card_text import CARD, CardFigures, carried_over, model_card
from shortstack.runtime.atomic_output import write_file, write_json

_NONE = CardFigures()


def write_beside_weights(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    config: dict[str, Any],
    step: dict[str, Any],
    files: dict[str, str],
    kept: Sequence[int] | None = None,
    narrower: bool = False,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write config.json, tokenizer and the like, the model card and shortstack.json of a new checkpoint.

    Args:
        checkpoint: what the new one was made from.
        directory: where its weights have been written.
        config: of the new one.
        step: what was done, for its history.
        files: sha256 of the files written so far, by name.
        kept: positions, in the checkpoint, of the blocks that stay; by default all.
        narrower: its blocks have fewer heads or channels.
        progress: where it is reported which files are left out.

    Returns:
        sha256 of every file but shortstack.json, which names them.
    """
    data = checkpoint.config_bytes if config == checkpoint.config else config_text(config).encode()
    files = {
        **files,
        "config.json": write_hashed(directory / "config.json", data),
        **copy_companions(checkpoint, directory, kept=kept, narrower=narrower, progress=progress),
    }
    blocks = checkpoint.original_blocks
    record = continued_record(checkpoint, step, blocks if kept is None else [blocks[index] for index in kept], files)
    card = checkpoint.directory / CARD
    if card.is_file():
        checked_link(card, checkpoint.directory, checkpoint.allow_links)
    return write_card(directory, record, carried_over(card))


def renew_card(directory: Path) -> None:
    """Write the card of a checkpoint again once figures of its retraining lie beside it."""
    record = provenance.read(directory)
    if record is not None:
        write_card(directory, record, carried_over(directory / CARD))


def write_card(
    directory: Path, record: dict[str, Any], carried: dict[str, Any], figures: CardFigures = _NONE
) -> dict[str, str]:
    """Write the card of a checkpoint, and its record with the card's hash; figures of its retraining are in the card too.

    Args:
        directory: the checkpoint's.
        record: shortstack.json.
        carried: metadata of the card that does not follow from the record.
        figures: what was measured on it.

    Returns:
        sha256 of every file but shortstack.json, which names them.
    """
    shown = CardFigures([*retraining_figures(directory), *figures.tables], figures.eval_results)
    card = model_card(record, carried, shown).encode()
    files = dict(sorted({**record["files"], CARD: hashlib.sha256(card).hexdigest()}.items()))
    write_file(directory / CARD, card)
    write_json(directory / provenance.FILE_NAME, {**record, "files": files})
    return files
