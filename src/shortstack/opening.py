"""Open a model for a stage: as `open_checkpoint`, and a family that is not in the table is probed."""

from __future__ import annotations

from shortstack.checkpoint.anatomy import UnknownFamilyError
from shortstack.checkpoint.reader import Checkpoint, open_checkpoint
from shortstack.progress import Progress


def open_model(
    model: str, *, allow_links: bool = False, headers_only: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Open a checkpoint by directory, hub id, or `embedded`, and say what a user should hear about it.

    A family that the table does not know is built tiny and tried; it is accepted only if a pruned copy equals the
    original with those blocks passed over.

    Args:
        model: which.
        allow_links: follow links that lead out of the directory.
        headers_only: of a hub id that is not in the cache, download no weights.
        progress: where lines are said.

    Raises:
        ShortstackError: nothing is there, it cannot be read, or its family cannot be shortened exactly.
    """
    progress = progress or Progress()
    try:
        checkpoint = open_checkpoint(model, allow_links=allow_links, headers_only=headers_only)
    except UnknownFamilyError as error:
        from shortstack.probing import probed_family

        family = probed_family(error.model_type, error.config, progress)
        checkpoint = open_checkpoint(model, allow_links=allow_links, family=family, headers_only=headers_only)
    for note in checkpoint.notes:
        progress.say(note)
    return checkpoint
