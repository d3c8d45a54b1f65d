"""Load a whole checkpoint through transformers, with errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shortstack.checkpoint.reader import Checkpoint
from shortstack.errors import ShortstackError

if TYPE_CHECKING:
    import torch


def load_with_transformers(
    checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any]]:
    """(model on the CPU in evaluation mode, what transformers says of missing and unexpected keys).

    Raises:
        ShortstackError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShortstackError(f"{checkpoint.source}: transformers cannot load it: {reason}") from None
    return model.eval(), info


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings about keys, which are checked by the callers."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
